"""Running a pipeline on this machine through kfp.local, drawn in the terminal as it goes."""

import errno
import json
import os
import platform as platform_module
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from guardloop.config import PlatformSettings, Settings
from guardloop.core.errors import GuardLoopError
from guardloop.core.places import home, tracking_uri
from guardloop.core.settings import read_section
from launch.local.containers import ready
from launch.version import code_state

POLL_SECONDS = 0.2
SAY_SECONDS = 30.0
STOP_SECONDS = 30.0
DECISIVE = ("torch", "transformers", "peft", "tokenizers", "numpy", "scikit-learn", "pyarrow")
KFP_WORKERS = 2  # kfp.local runs at most this many loop iterations side by side
PARAMETERS = {
    "process": ("dataset", "guard", "responders", "mining", "seed", "max_error_share", "shards"),
    "train": ("guard", "training", "registry", "seed"),
    "evaluate": ("guard", "evaluation", "gate", "registry", "seed"),
}
PARAMETERS["full"] = (*PARAMETERS["process"], "training", "evaluation", "gate", "registry")
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

    def inherited(self, name: str) -> Path | None:
        """The output called `name` of this run, or of the run that it started from, or None."""
        if found := self.artifact(name):
            return found
        started_from = json.loads((self.folder / "run.json").read_text("utf-8")).get("from")
        if started_from and (home() / "runs" / started_from / "run.json").is_file():
            return find_run(started_from).inherited(name)
        return None


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
    arguments: dict[str, Any] = {**settings.sections(), "shards": platform.shards}
    arguments = {name: arguments[name] for name in PARAMETERS[pipeline]}
    for name in NEEDS.get(pipeline, ()):
        found = earlier.inherited(name) if earlier else None
        if found is None:
            which = f"the run {earlier.id} has no {name}" if earlier else f"{pipeline} starts from an earlier run"
            raise GuardLoopError(which, "name a run that has one with --from RUN (or `latest`)")
        arguments[f"{name}_uri"] = str(found)
    run = _create(pipeline, arguments, settings.sections(), platform, configuration)
    if earlier:
        _describe(run, **{"from": earlier.id})
    return execute(run, platform, console)


def execute(run: Run, platform: PlatformSettings, console: Console, more: Mapping[str, str] | None = None) -> Run:
    """Execute a run whose folder is there, and draw it. `more` goes into the environment of its stages.

    Raises as `run_local` does.
    """
    if platform.runner == "docker":
        platform = platform.model_copy(update={"docker": ready(platform.docker)})
        _describe(run, platform=platform.plain())
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
            _draw(run, process, console)
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


def run_again(earlier: Run, console: Console) -> Run:
    """Repeat an earlier run with its own arguments, on as many threads, from nothing that it left.

    It is recorded in a database of its own, so that no candidate is registered twice. Raises as `run_local` does.
    """
    told = json.loads((earlier.folder / "run.json").read_text("utf-8"))
    # an older run's arguments hold its id
    arguments = {name: value for name, value in told["arguments"].items() if name != "run_id"}
    for name, place in arguments.items():
        if name.endswith("_uri") and not Path(place).exists():
            raise GuardLoopError(f"{earlier.id} started from {place}, which is gone", "restore it")
    platform = read_section(PlatformSettings, told["platform"], f"{earlier.id}: platform")
    platform = platform.model_copy(update={"stage_threads": told.get("threads") or platform.stage_threads})
    settings = yaml.safe_load((earlier.folder / "settings.yaml").read_text("utf-8"))
    run = _create(earlier.pipeline, arguments, settings, platform, told.get("configuration", ""))
    own = {"tracking_uri": f"sqlite:///{run.folder / 'registry' / 'mlflow.db'}"}
    if "registry" in arguments:
        guard = arguments["guard"]
        if str(guard.get("adapter", "")).startswith("models:/"):  # the baseline stays where it is registered
            guard = {"tracking_uri": arguments["registry"].get("tracking_uri") or tracking_uri(), **guard}
        registry = arguments["registry"] | own
        _describe(run, arguments=_arguments(run) | {"registry": registry, "guard": guard})
    return execute(run, platform, console, {"GUARDLOOP_WORK": str(run.folder / "work")})


def _arguments(run: Run) -> dict[str, Any]:
    return dict(json.loads((run.folder / "run.json").read_text("utf-8"))["arguments"])


def _create(
    pipeline: str,
    arguments: dict[str, Any],
    sections: Mapping[str, Any],
    platform: PlatformSettings,
    configuration: str,
) -> Run:
    """The folder of a new run, with all that is needed to repeat it."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    runs = home() / "runs"
    try:
        folder = _new_folder(runs, f"{stamp}-{pipeline}")
        run = Run(folder.name, pipeline, folder)
        described = {"pipeline": pipeline, "arguments": arguments, "created": stamp, "platform": platform.plain()}
        described |= {"configuration": configuration, "threads": _threads(platform), **made_with()}
        _describe(run, **described)
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


def _describe(run: Run, **values: Any) -> None:
    """Add to run.json."""
    path = run.folder / "run.json"
    told = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(told | values, indent=2), "utf-8")


def made_with() -> dict[str, Any]:
    """The code and the libraries on which a result depends."""
    versions = {"python": platform_module.python_version(), "processor": platform_module.machine()}
    return {"code": code_state().tag, "versions": versions | {name: version(name) for name in DECISIVE}}


def _threads(platform: PlatformSettings) -> int:
    """Processor threads of one stage."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return platform.stage_threads or max(1, cores // min(platform.shards, KFP_WORKERS))


def _environment(run: Run, platform: PlatformSettings) -> dict[str, str]:
    """What the stages find in their environment: where to report and record, and how many threads to use."""
    told = json.loads((run.folder / "run.json").read_text("utf-8"))
    return {
        **os.environ,
        "GUARDLOOP_EVENTS": str(run.folder / "events.jsonl"),
        "GUARDLOOP_RUN_ID": run.id,
        "GUARDLOOP_CONFIGURATION": told["configuration"],
        "GUARDLOOP_GIT_SHA": told["code"],
        "MLFLOW_TRACKING_URI": tracking_uri(),
        "OMP_NUM_THREADS": str(_threads(platform)),
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
