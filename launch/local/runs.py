"""The runs of this machine: a folder each, with all that is needed to read or repeat the run."""

import errno
import json
import os
import platform as platform_module
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from guardloop.config import PlatformSettings
from guardloop.core.errors import GuardLoopError
from guardloop.core.places import home
from launch.version import code_state

DECISIVE = ("torch", "transformers", "peft", "tokenizers", "numpy", "scikit-learn", "pyarrow")
KFP_WORKERS = 2  # kfp.local runs at most this many loop iterations side by side


@dataclass
class Run:
    """A run on this machine: its folder, and what its stages have reported so far."""

    id: str
    pipeline: str
    folder: Path
    seconds: float = 0.0
    stages: list[dict[str, Any]] = field(default_factory=list)
    failure: dict[str, Any] | None = None

    @property
    def log(self) -> Path:
        """Everything that the stages printed."""
        return self.folder / "run.log"

    @property
    def record(self) -> dict[str, Any]:
        """What run.json holds: pipeline, arguments, platform, code and versions."""
        return dict(json.loads((self.folder / "run.json").read_text("utf-8")))

    def describe(self, **values: Any) -> None:
        """Add to run.json."""
        path = self.folder / "run.json"
        record = self.record if path.is_file() else {}
        path.write_text(json.dumps(record | values, indent=2), "utf-8")

    def artifact(self, name: str) -> Path | None:
        """The newest output called `name` of any stage, or None."""
        paths = sorted((self.folder / "artifacts").rglob(name), key=lambda path: path.stat().st_mtime)
        outputs = [path for path in paths if path.parent.parent.parent == self.folder / "artifacts"]
        return outputs[-1] if outputs else None

    def inherited(self, name: str) -> Path | None:
        """The output called `name` of this run, or of the run that it started from, and so on; or None."""
        run, passed = self, {self.id}
        while not (artifact := run.artifact(name)):
            origin = run.record.get("from")
            if not origin or origin in passed or not _is_run(origin):
                return None
            run = find_run(origin)
            passed.add(run.id)
        return artifact


def find_run(name: str) -> Run:
    """An earlier run by id, or `latest`. Raises GuardLoopError if there is none."""
    if not _is_run(name):
        known = sorted(path.name for path in (home() / "runs").glob("*") if path.name != "latest")
        raise GuardLoopError(f"no run {name!r}", f"runs here: {', '.join(known) or 'none'}")
    folder = (home() / "runs" / name).resolve()
    run = Run(folder.name, "", folder)
    run.pipeline = run.record["pipeline"]
    return run


def _is_run(name: str) -> bool:
    """Whether it is the name of a run, not a path to somewhere else."""
    return any(path.name == name and (path / "run.json").is_file() for path in (home() / "runs").glob("*"))


def new_run(
    pipeline: str,
    arguments: dict[str, Any],
    sections: Mapping[str, Any],
    platform: PlatformSettings,
    configuration: str,
    earlier: Run | None = None,
) -> Run:
    """The folder of a new run, with all that is needed to repeat it; `earlier` is the run that it starts from."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    runs = home() / "runs"
    try:
        folder = _new_folder(runs, f"{stamp}-{pipeline}")
        run = Run(folder.name, pipeline, folder)
        run.describe(
            pipeline=pipeline,
            arguments=arguments,
            created=stamp,
            platform=platform.plain(),
            configuration=configuration,
            threads=stage_threads(platform),
            **({"from": earlier.id} if earlier else {}),
            **made_with(),
        )
        (folder / "settings.yaml").write_text(yaml.safe_dump(dict(sections), sort_keys=False), "utf-8")
        (folder / "events.jsonl").touch()
        pointer = runs / f".latest-{run.id}"  # replaced at once, since another run may start at this moment
        pointer.symlink_to(folder.name)
        pointer.replace(runs / "latest")
    except OSError as error:
        raise GuardLoopError(
            f"cannot write {runs}: {error.strerror or error}", "free disk space, or set GUARDLOOP_HOME"
        ) from error
    return run


def _new_folder(runs: Path, name: str) -> Path:
    """A folder of its own, also where another run started in the same second."""
    for number in range(1, 100):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise FileExistsError(errno.EEXIST, f"too many runs called {name}")


def made_with() -> dict[str, Any]:
    """The code and the libraries on which a result depends."""
    versions = {"python": platform_module.python_version(), "processor": platform_module.machine()}
    return {"code": code_state().tag, "versions": versions | {name: version(name) for name in DECISIVE}}


def stage_threads(platform: PlatformSettings) -> int:
    """Processor threads of one stage."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return platform.stage_threads or max(1, cores // min(platform.shards, KFP_WORKERS))
