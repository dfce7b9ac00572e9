"""What the shell completes: the names of configurations, platforms, pipelines, runs and benchmarks of this checkout."""

from collections.abc import Callable
from pathlib import Path


def _files(folder: str, names: bool) -> list[str]:
    return sorted(path.stem if names else str(path) for path in Path(folder).glob("*.yaml"))


def _completing(known: Callable[[], list[str]]) -> Callable[[str], list[str]]:
    """The known words that begin as what is typed; where a path is typed, the shell's own files are better."""
    return lambda incomplete: [word for word in known() if word.startswith(incomplete)]


def _runs() -> list[str]:
    from guardloop.core.places import home

    return sorted(path.name for path in (home() / "runs").glob("*"))


configurations = _completing(lambda: _files("configs", names=False))
platforms = _completing(lambda: _files("configs/platform", names=True))
benchmarks = _completing(lambda: _files("configs/benchmarks", names=True))
pipelines = _completing(lambda: ["process", "train", "evaluate", "full"])
runs = _completing(_runs)
