"""Compiling the pipelines to KFP's IR YAML."""

from pathlib import Path

from guardloop.docker import DockerSettings
from launch.containers import use_images
from launch.images import checkout_tag


def compile_all(folder: Path) -> list[Path]:
    """Compile each pipeline into `folder`, with the images of this checkout. Returns the files."""
    from kfp import compiler  # noqa: PLC0415  (kfp takes a second to import)

    from pipeline import PIPELINES  # noqa: PLC0415

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, pipeline in PIPELINES.items():
        path = folder / f"{name}.yaml"
        use_images(pipeline.pipeline_spec.deployment_spec["executors"], DockerSettings(tag=checkout_tag()))
        compiler.Compiler().compile(pipeline, str(path))
        paths.append(path)
    return paths
