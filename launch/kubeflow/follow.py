"""Following a run on a cluster, stage by stage, until it ends in whatever way."""

import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from launch.kubeflow.calls import ApiError
from launch.kubeflow.cluster import Cluster
from launch.kubeflow.logs import last_words
from launch.kubeflow.tasks import DRIVER, ENDED, message_of, moment, seconds_of, stage_of, stages_of

POLL_SECONDS = 3.0
PATIENCE_SECONDS = 900.0
"""How long Kubeflow Pipelines may be away, or a state stay unknown, before following is given up."""
AT_WORK = frozenset({None, "", "RUNTIME_STATE_UNSPECIFIED", "PENDING", "RUNNING", "CANCELING", "PAUSED"})
MARKS = {"SUCCEEDED": "[green]✓[/]", "FAILED": "[red]✗[/]", "SKIPPED": "[dim]-[/]", "CANCELED": "[yellow]■[/]"}


@dataclass(frozen=True)
class Ending:
    """How a run ended: its state, the stage that failed if one did, and what it said."""

    run_id: str
    state: str
    stage: str | None = None
    message: str = ""

    @property
    def succeeded(self) -> bool:
        """Whether the run did all that it should."""
        return self.state == "SUCCEEDED"


def follow(cluster: Cluster, run_id: str, console: Console) -> Ending:
    """Draw the run until it ends. Raises ApiError where it is gone, or cannot be seen for too long."""
    patient = Cluster(
        cluster.target, PATIENCE_SECONDS, lambda words: console.print(f"  [yellow]{escape(words)}[/]", soft_wrap=True)
    )
    run = patient.run(run_id)
    stages = stages_of(patient.version_of(run))
    drawing = _Drawing(console, stages)
    unknown_since: float | None = None
    with drawing.progress:
        while True:
            drawing.show(run)
            if run.state not in AT_WORK:
                if run.state in ENDED or moment(run.finished_at):
                    break
                unknown_since = unknown_since or time.monotonic()
                if time.monotonic() - unknown_since > PATIENCE_SECONDS:
                    raise ApiError(f"run {run_id} is in a state that is not known here: {run.state}", "see its page")
            elif run.state in (None, "", "RUNTIME_STATE_UNSPECIFIED") and moment(run.finished_at):
                break
            else:
                unknown_since = None
            time.sleep(POLL_SECONDS)
            run = patient.run(run_id)
    return _ending(patient, run, stages)


class _Drawing:
    """A line for each stage that ended; for those at work a spinner, or a line where no terminal is."""

    def __init__(self, console: Console, stages: frozenset[str]) -> None:
        self.console = console
        self.stages = stages
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}[/]"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._at_work: dict[Any, TaskID] = {}
        self._said: set[tuple[Any, str]] = set()

    def show(self, run: Any) -> None:
        """Draw what is new."""
        self._say_state(run.state)
        for task in _tasks(run):
            name = stage_of(task.display_name or "", self.stages)
            if name is None or task.state in (None, "PENDING", "RUNTIME_STATE_UNSPECIFIED"):
                continue
            self._show_task(task, name)

    def _say_state(self, state: str | None) -> None:
        words = {"PENDING": "waiting to start", "CANCELING": "being stopped", "PAUSED": "paused"}
        if state in words and self._new("run", state):
            self.console.print(f"  [dim]{words[state]}[/]")
        elif state not in AT_WORK | ENDED and self._new("run", str(state)):
            self.console.print(f"  [yellow]in a state not known here: {escape(str(state))}[/]")

    def _show_task(self, task: Any, name: str) -> None:
        key = task.task_id or (name, task.create_time)
        if task.state not in ENDED:
            if self._new(key, "at work"):
                self._at_work[key] = self.progress.add_task(name, total=None)
                if not self.console.is_terminal:
                    self.console.print(f"  … {name}", highlight=False, markup=False)
            return
        if not self._new(key, task.state):
            return
        if key in self._at_work:
            self.progress.remove_task(self._at_work.pop(key))
        seconds = seconds_of(task)
        took = f"{seconds:7.1f} s" if seconds is not None else " " * 9
        words = "" if task.state == "SUCCEEDED" else task.state.lower()
        self.console.print(
            f"  {MARKS[task.state]} {escape(name):<24} [dim]{took}[/]  {words}".rstrip(),
            highlight=False,
            soft_wrap=True,
        )

    def _new(self, key: Any, state: str) -> bool:
        known = (key, state) in self._said
        self._said.add((key, state))
        return not known


def _tasks(run: Any) -> list[Any]:
    tasks = (run.run_details.task_details if run.run_details else None) or []
    return sorted(tasks, key=lambda task: str(moment(task.end_time) or "later"))


def _ending(cluster: Cluster, run: Any, stages: frozenset[str]) -> Ending:
    state = str(run.state or "RUNTIME_STATE_UNSPECIFIED")
    if state == "SUCCEEDED":
        return Ending(run.run_id, state)
    failed = [task for task in _tasks(run) if task.state == "FAILED"]
    of_stages = [task for task in failed if stage_of(task.display_name or "", stages)]
    if of_stages:
        name = str(stage_of(of_stages[0].display_name, stages))
        words = message_of(of_stages[0]) or "\n".join(last_words(cluster, run, name)) or message_of(run)
        return Ending(run.run_id, state, name, words)
    for task in failed:  # a driver prepares its stage: the inputs, the cache, the pod
        name = (task.display_name or "").removesuffix(DRIVER)
        if (task.display_name or "").endswith(DRIVER):
            return Ending(run.run_id, state, name, message_of(task) or message_of(run) or "it could not be started")
    return Ending(run.run_id, state, None, message_of(run))
