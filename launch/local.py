"""Running a pipeline on this machine through kfp.local, drawn in the terminal as it goes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from guardloop.config import PlatformSettings, Settings
from guardloop.errors import GuardLoopError
from launch.containers import ready
from launch.version import code_state

POLL_SECONDS = 0.2
SAY_SECONDS = 30.0
KFP_WORKERS = 2  # kfp.local runs at most this many loop iterations side by side
PARAMETERS = {
    "process": ("dataset", "guard", "responder", "feedback", "shards"),
    "train": ("guard", "training", "registry"),
    "evaluate": ("guard", "evaluation", "gate", "registry", "run_id"),
    "full": (
        *("dataset", "guard", "responder", "feedback", "training", "evaluation", "gate", "registry"),
        *("shards", "run_id"),
    ),
}
NEEDS = {"train": ("training_set",), "evaluate": ("training_set", "test_set", "adapter")}


@dataclass
class Run:
    """A run on this machine: its folder and what its stages have told so far."""

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

    def artifact(self, name: str) -> Path | None:
        """The newest output called `name` of any stage, or None."""
        found = sorted((self.folder / "artifacts").rglob(name), key=lambda p: p.stat().st_mtime)
        outputs = [p for p in found if p.parent.parent.parent == self.folder / "artifacts"]
        return outputs[-1] if outputs else None


def home() -> Path:
    """Where runs, logs and the local registry are kept: $GUARDLOOP_HOME, or .guardloop here."""
    return Path(os.environ.get("GUARDLOOP_HOME", ".guardloop")).absolute()


def find_run(name: str) -> Run:
    """An earlier run by id, or `latest`. Raises GuardLoopError if there is none."""
    folder = home() / "runs" / name
    if not (folder / "run.json").is_file():
        known = sorted(p.name for p in (home() / "runs").glob("*") if p.name != "latest")
        raise GuardLoopError(f"no run {name!r}", f"runs here: {', '.join(known) or 'none'}")
    folder = folder.resolve()
    return Run(folder.name, json.loads((folder / "run.json").read_text("utf-8"))["pipeline"], folder)


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
    if platform.runner == "docker":
        platform = platform.model_copy(update={"docker": ready(platform.docker)})
    run = _create(pipeline, settings, platform, earlier)
    environment = _environment(run, platform, configuration)
    started = time.monotonic()
    with run.log.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.execute", str(run.folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        try:
            _draw(run, process, console)
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=30)
            raise
    run.seconds = time.monotonic() - started
    if process.returncode != 0:
        raise _failure(run)
    return run


def _create(pipeline: str, settings: Settings, platform: PlatformSettings, earlier: Run | None) -> Run:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = home() / "runs" / f"{stamp}-{pipeline}"
    arguments: dict[str, Any] = {**settings.sections(), "shards": platform.shards, "run_id": folder.name}
    arguments = {name: arguments[name] for name in PARAMETERS[pipeline]}
    for name in NEEDS.get(pipeline, ()):
        found = earlier.artifact(name) if earlier else None
        if found is None:
            which = f"the run {earlier.id} has no {name}" if earlier else f"{pipeline} starts from an earlier run"
            raise GuardLoopError(which, "name a run that has one with --from RUN (or `latest`)")
        arguments[f"{name}_uri"] = str(found)
    try:
        folder.mkdir(parents=True)
        described = {"pipeline": pipeline, "arguments": arguments, "created": stamp, "platform": platform.plain()}
        (folder / "run.json").write_text(json.dumps(described, indent=2), "utf-8")
        (folder / "settings.yaml").write_text(yaml.safe_dump(settings.sections(), sort_keys=False), "utf-8")
        (folder / "events.jsonl").touch()
        latest = folder.parent / "latest"
        latest.unlink(missing_ok=True)
        latest.symlink_to(folder.name)
    except OSError as error:
        raise GuardLoopError(
            f"cannot write {folder}: {error.strerror or error}", "free disk space, or set GUARDLOOP_HOME"
        ) from error
    return Run(folder.name, pipeline, folder)


def tracking_uri() -> str:
    """MLflow's address: MLFLOW_TRACKING_URI, or a database in the home folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


def _environment(run: Run, platform: PlatformSettings, configuration: str) -> dict[str, str]:
    """What the stages find in their environment: where to report and record. Nothing here changes a result."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = platform.stage_threads or max(1, cores // min(platform.shards, KFP_WORKERS))
    return {
        **os.environ,
        "GUARDLOOP_EVENTS": str(run.folder / "events.jsonl"),
        "GUARDLOOP_RUN_ID": run.id,
        "GUARDLOOP_CONFIGURATION": configuration,
        "GUARDLOOP_GIT_SHA": code_state().tag,
        "MLFLOW_TRACKING_URI": tracking_uri(),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",  # spinning threads starve each other where cores are shared
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")])),
        "TOKENIZERS_PARALLELISM": "false",
    }


def _draw(run: Run, process: "subprocess.Popen[bytes]", console: Console) -> None:
    """Follow the events until the process ends: a bar for each stage at work, a line for each that is done."""
    progress = Progress(
        TextColumn("  [bold]{task.description}[/] {task.fields[doing]}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    bars: dict[str, TaskID] = {}
    with progress, (run.folder / "events.jsonl").open(encoding="utf-8") as events:
        alive = True
        while alive:
            alive = process.poll() is None
            for event in _new(events):
                _show(event, run, progress, bars)
            time.sleep(POLL_SECONDS if alive else 0)


def _new(events: Any) -> Iterator[dict[str, Any]]:
    while True:
        place = events.tell()
        line = events.readline()
        if not line.endswith("\n"):
            events.seek(place)
            return
        yield json.loads(line)


def _show(event: dict[str, Any], run: Run, progress: Progress, bars: dict[str, TaskID]) -> None:
    name, kind = event["stage"], event["event"]
    if kind == "start":
        bars[name] = progress.add_task(name, total=None, doing="", rate="", said=event["at"])
    elif kind == "progress" and name in bars:
        _say_without_terminal(event, progress, bars[name])
        rate = f"{event['rate']:.1f}/s {event.get('note') or ''}" if event.get("rate") else ""
        progress.update(
            bars[name], completed=event.get("done", 0), total=event.get("total"), doing=event["doing"], rate=rate
        )
    elif kind in ("done", "failed"):
        if name in bars:
            progress.remove_task(bars.pop(name))
        if kind == "failed":
            run.failure = run.failure or event
            progress.console.print(f"  [red]✗[/] {name:<24} [red]failed[/] after {event['seconds']:.0f} s")
        else:
            run.stages.append(event)
            progress.console.print(
                f"  [green]✓[/] {name:<24} [dim]{event['seconds']:6.1f} s[/]  {escape(event['outcome'])}",
                highlight=False,
                soft_wrap=True,
            )


def _say_without_terminal(event: dict[str, Any], progress: Progress, bar: TaskID) -> None:
    """Where no bar can be drawn, a line now and then."""
    task = progress.tasks[progress.task_ids.index(bar)]
    if progress.console.is_terminal or event["at"] - task.fields["said"] < SAY_SECONDS:
        return
    progress.update(bar, said=event["at"])
    far = f" {event['done']}/{event['total']}" if event.get("total") else ""
    progress.console.print(f"    {event['stage']}: {event['doing']}{far}", highlight=False, markup=False)


def _failure(run: Run) -> GuardLoopError:
    """What went wrong: the stage's own words, or where the log is."""
    if run.failure:
        return GuardLoopError(f"{run.failure['stage']}: {run.failure['error']}", f"the whole log: {run.log}")
    lines = run.log.read_text("utf-8", "replace").splitlines()
    if said := [line.partition("GuardLoopError: ")[2] for line in lines if "GuardLoopError: " in line]:
        return GuardLoopError(said[-1], f"the whole log: {run.log}")  # before its stage began, as with older images
    tail = lines[-12:]
    return GuardLoopError("the run failed outside its stages:\n" + "\n".join(tail), f"the whole log: {run.log}")
