"""Each stage finds in its image all that it imports: the pipeline runs with its image's packages and no others."""

import json
import os
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from support.workshop import Workshop

from launch.images import MODEL_STAGES, stage_of
from pipeline import PIPELINES
from scripts.locked import members, normalize, read_lock, select

HERE = {"guardloop"}


@pytest.fixture
def hidden(tmp_path: Path) -> dict[str, list[str]]:
    """The modules that are installed here and not in the image, for each function of a stage."""
    modules = packages_distributions()
    functions = {}
    for pipeline in PIPELINES.values():
        for executor in pipeline.pipeline_spec.deployment_spec["executors"].values():
            if "container" in executor:
                container = executor["container"]
                arguments = [*container["command"], *container["args"]]
                name = arguments[arguments.index("--function_to_execute") + 1]
                has = packages(stage_of(container["image"])) | HERE
                functions[name] = sorted(m for m, owners in modules.items() if not {normalize(o) for o in owners} & has)
    return functions


@pytest.mark.slow
def test_a_run_needs_nothing_that_the_images_lack(
    hidden: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "hidden.json"
    told.write_text(json.dumps(hidden))
    here = str(Path(__file__).parent / "only_locked")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("HIDDEN_FROM_STAGES", str(told))

    workshop = Workshop(tmp_path)
    ended = workshop.guardloop(guard={"threshold": workshop.middle_of_sample()})

    assert "torch" in hidden["register_model"]
    assert "torch" not in hidden["screen"]
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "register model" in ended.stdout


def packages(stage: str) -> set[str]:
    """What the stage's CPU image has, by name."""
    groups = ["stage", stage, *(["model"] if stage in MODEL_STAGES else [])]
    names = {package.name for package in select(read_lock(), members(groups), members(["executor"]))}
    return names | ({"torch"} if stage in MODEL_STAGES else set())
