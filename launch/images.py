"""The stages' images: one for each, named after it, with the commit as tag, so that a name never changes its meaning.

`python -m launch.images` prints the tag of this checkout.
"""

import re
import sys
from typing import Any, get_args

from guardloop.config.cluster import StageName
from guardloop.config.docker import DockerSettings
from guardloop.core.errors import GuardLoopError
from launch.version import code_state

STAGES: tuple[str, ...] = get_args(StageName)
MODEL_STAGES = frozenset({"screen", "generate-responses", "train-guard"})
"""Stages that compute with a model: their images come for a GPU, too."""


def stage_of(image: str) -> str:
    """The stage that `image` is for: its name without registry, tag and digest."""
    return re.split("[:@]", image.rpartition("/")[2])[0]


def image_of(stage: str, registry: str, tag: str, gpu: bool = False) -> str:
    """The image of `stage` in `registry`. Raises GuardLoopError for the tag `latest` or none."""
    if not tag:
        raise _no_checkout()
    if tag == "latest":
        raise GuardLoopError(
            f"{stage}: an image needs a tag that never moves, not {tag!r}",
            "leave the tag out for that of this checkout, or name one; results are cached by image",
        )
    return f"{registry}/{stage}:{tag}{'-gpu' if gpu and stage in MODEL_STAGES else ''}"


def use_images(executors: dict[str, Any], settings: DockerSettings) -> None:
    """Name the images that the stages run in, in the table of executors of a compiled pipeline."""
    for executor in executors.values():
        if "container" in executor:  # an importer has none
            stage = stage_of(executor["container"]["image"])
            image = image_of(stage, settings.registry, settings.tag or "", gpu=settings.gpus != 0)
            executor["container"]["image"] = image


def checkout_tag() -> str:
    """The tag of this checkout's images: its commit, with a hash of what was changed since.

    Raises GuardLoopError outside a git checkout.
    """
    if tag := code_state().tag:
        return tag
    raise _no_checkout()


def _no_checkout() -> GuardLoopError:
    return GuardLoopError(
        "no git checkout to name images after", "start in the repository, or set the images' tag in the platform"
    )


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{checkout_tag()}\n")
    except GuardLoopError as error:
        sys.exit(f"error: {error}")
