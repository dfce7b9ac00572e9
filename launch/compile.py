"""Compiling the pipelines to KFP's IR YAML."""

from pathlib import Path


def compile_all(folder: Path) -> list[Path]:
    """Compile each pipeline into `folder`. Returns the files."""
    from kfp import compiler  # noqa: PLC0415  (kfp takes a second to import)

    from pipeline import PIPELINES  # noqa: PLC0415

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, pipeline in PIPELINES.items():
        path = folder / f"{name}.yaml"
        compiler.Compiler().compile(pipeline, str(path))
        paths.append(path)
    return paths
