"""The process in which kfp.local executes a pipeline; what it prints goes to the run's log."""

import json
import logging
import signal
import subprocess
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from guardloop.config import PlatformSettings
from guardloop.core.errors import GuardLoopError
from guardloop.core.escaped import escape
from guardloop.core.settings import read_section
from launch.images import use_images
from launch.local.containers import Watch, docker_runner
from launch.pipelines import pipelines


def execute(folder: Path) -> None:
    """Run the pipeline that `folder`/run.json describes, with its artifacts under `folder`/artifacts."""
    from kfp import local  # noqa: PLC0415  (kfp takes a second to import)

    warnings.filterwarnings("ignore", message=".*base image.*", category=RuntimeWarning)
    logging.getLogger().setLevel(logging.INFO)
    run = json.loads((folder / "run.json").read_text("utf-8"))
    names = [part["base"] for part in (run["arguments"].get("guard"),) if part]
    names += [one["model"] for one in run["arguments"].get("responders", [])]
    if embedded := sorted({name for name in names if name.startswith("embedded:")}):
        # in a process of its own, which gives its memory back
        subprocess.run([sys.executable, "-m", "guardloop.models.embedded", *embedded], check=True)
    pipeline, platform = pipelines()[run["pipeline"]], read_section(PlatformSettings, run["platform"], "platform")
    runner: Any = local.SubprocessRunner(use_venv=False)
    watch: AbstractContextManager[Any] = nullcontext()
    if platform.runner == "docker":
        use_images(pipeline.pipeline_spec.deployment_spec["executors"], platform.docker)
        runner = docker_runner(folder.name, folder.parents[1], run["arguments"], platform.docker)
        watch = Watch(folder.name)
        signal.signal(signal.SIGTERM, lambda *_: _stop(watch))
    for place in ("artifacts", "workspace"):
        (folder / place).mkdir()  # Docker would make them, for root
    local.init(
        runner=runner,
        pipeline_root=str(folder / "artifacts"),
        workspace_root=str(folder / "workspace"),
        raise_on_error=True,
    )
    with watch:
        pipeline(**escape(run["arguments"]))


def _stop(watch: Any) -> None:
    watch.stop()  # first, since KFP waits for its containers
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    try:
        execute(Path(sys.argv[1]).absolute())
    except GuardLoopError as error:
        sys.exit(f"error: {error}")
