"""Running a pipeline on this machine through kfp.local, in a process of its own that is followed as it goes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from guardloop.config import PlatformSettings, Settings
from guardloop.core.errors import GuardLoopError
from guardloop.core.places import tracking_uri
from guardloop.core.settings import read_section
from launch.local.containers import ready
from launch.local.drawing import draw, title
from launch.local.runs import Run, new_run, stage_threads
from launch.pipelines import artifacts, parameters

STOP_SECONDS = 30.0
CHECKOUT = Path(__file__).absolute().parents[2]


def run_local(
    pipeline: str,
    settings: Settings,
    platform: PlatformSettings,
    configuration: str,
    console: Console,
    earlier: Run | None = None,
) -> Run:
    """Execute `pipeline` and draw it. `earlier` gives the artifacts that train and evaluate start from.

    Raises GuardLoopError where a stage refused its input, and KeyboardInterrupt after a tidy stop.
    """
    values: dict[str, Any] = {**settings.sections(), "shards": platform.shards}
    arguments = {name: values[name] for name in parameters(pipeline)}
    for name in artifacts(pipeline):
        artifact = earlier.inherited(name) if earlier else None
        if artifact is None:
            which = f"the run {earlier.id} has no {name}" if earlier else f"{pipeline} starts from an earlier run"
            raise GuardLoopError(which, "name a run that has one with --from RUN (or `latest`)")
        arguments[f"{name}_uri"] = str(artifact)
    run = new_run(pipeline, arguments, settings.sections(), platform, configuration, earlier)
    return execute(run, platform, console)


def run_again(earlier: Run, console: Console) -> Run:
    """Repeat an earlier run with its own arguments, on as many threads, from nothing that it left.

    It is recorded under names of its own (`...-again`), so that no candidate is registered twice.
    Raises as `run_local` does.
    """
    record = earlier.record
    # an older run's arguments hold its id
    arguments = {name: value for name, value in record["arguments"].items() if name != "run_id"}
    for name, place in arguments.items():
        if name.endswith("_uri") and not Path(place).exists():
            raise GuardLoopError(f"{earlier.id} started from {place}, which is gone", "restore it")
    platform = read_section(PlatformSettings, record["platform"], f"{earlier.id}: platform")
    platform = platform.model_copy(update={"stage_threads": record.get("threads") or platform.stage_threads})
    if registry := arguments.get("registry"):
        again = {name: f"{registry[name]}-again" for name in ("experiment", "model")}
        arguments["registry"] = registry | again
    settings = yaml.safe_load((earlier.folder / "settings.yaml").read_text("utf-8"))
    run = new_run(earlier.pipeline, arguments, settings, platform, record.get("configuration", ""))
    return execute(run, platform, console, {"GUARDLOOP_WORK": str(run.folder / "work")})


def execute(run: Run, platform: PlatformSettings, console: Console, more: Mapping[str, str] | None = None) -> Run:
    """Execute a run whose folder is there, and draw it. `more` goes into the environment of its stages.

    Raises as `run_local` does.
    """
    if platform.runner == "docker":
        platform = platform.model_copy(update={"docker": ready(platform.docker)})
        run.describe(platform=platform.plain())
    started = time.monotonic()
    with run.log.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.local.execute", str(run.folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**_environment(run, platform), **(more or {})},
            start_new_session=True,
        )
        try:
            draw(run, lambda: process.poll() is None, console)
        except KeyboardInterrupt:
            _stop(process)
            raise
    run.seconds = time.monotonic() - started
    if process.returncode != 0:
        raise _failure(run)
    return run


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the run with its stages, by force where they do not listen."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_SECONDS)
            return


def _environment(run: Run, platform: PlatformSettings) -> dict[str, str]:
    """What the stages find in their environment: where to report and record, and how many threads to use."""
    record = run.record
    return {
        **os.environ,
        "GUARDLOOP_EVENTS": str(run.folder / "events.jsonl"),
        "GUARDLOOP_RUN_ID": run.id,
        "GUARDLOOP_CONFIGURATION": record["configuration"],
        "GUARDLOOP_GIT_SHA": record["code"],
        "MLFLOW_TRACKING_URI": tracking_uri(),
        "OMP_NUM_THREADS": str(stage_threads(platform)),
        "OMP_WAIT_POLICY": "passive",  # spinning threads starve each other where cores are shared
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH", "")])),
        "TOKENIZERS_PARALLELISM": "false",
    }


def _failure(run: Run) -> GuardLoopError:
    """What went wrong: the stage's own words, or where the log is."""
    if run.failure:
        return GuardLoopError(f"{title(run.failure['stage'])}: {run.failure['error']}", f"the whole log: {run.log}")
    lines = run.log.read_text("utf-8", "replace").splitlines()
    if errors := [line.partition("GuardLoopError: ")[2] for line in lines if "GuardLoopError: " in line]:
        return GuardLoopError(errors[-1], f"the whole log: {run.log}")  # before its stage began
    tail = "\n".join(lines[-12:])
    return GuardLoopError(f"the run failed outside its stages:\n{tail}", f"the whole log: {run.log}")
