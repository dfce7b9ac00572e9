"""Following a run on a cluster, stage by stage, until it ends in whatever way."""

import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from guardloop.core.errors import GuardLoopError
from launch.kubeflow.calls import ApiError
from launch.kubeflow.cluster import Cluster
from launch.kubeflow.logs import last_words, outcome_in, stage_logs
from launch.kubeflow.namespace import Namespace, NoAccessError
from launch.kubeflow.tasks import (
    ENDED,
    Stage,
    message_of,
    moment,
    shards_of,
    stage_of,
    stages_at,
    titles_of,
    was_stopped,
)

POLL_SECONDS = 3.0
PATIENCE_SECONDS = 900.0
"""How long Kubeflow Pipelines may be away, or a state stay unknown, before following is given up."""
WAITING_SECONDS = 20.0
"""How often it is looked up why a pod does not start, and how long a stage may wait before it is told."""
STALE_SECONDS = 600.0
"""A run that did not change for so long, and has no pod left, has lost its workflow."""
LATE_POLLS = 5  # the states of tasks follow the run's by a poll or two
AT_WORK = frozenset({None, "", "RUNTIME_STATE_UNSPECIFIED", "PENDING", "RUNNING", "CANCELING", "PAUSED"})
MARKS = {"SUCCEEDED": "[green]✓[/]", "FAILED": "[red]✗[/]", "SKIPPED": "[dim]-[/]", "CANCELED": "[yellow]■[/]"}


@dataclass(frozen=True)
class Ending:
    """How a run ended: its state, the stage that failed if one did, and what it said; or what was decided."""

    run_id: str
    state: str
    stage: Stage | None = None
    message: str = ""
    decision: str = ""

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
    titles = titles_of(patient.version_of(run))
    drawing = _Drawing(console, titles)
    pods = _Pods(patient, run_id)
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
            drawing.say_waiting(pods.why_waiting(run), shards_of(run))
            time.sleep(POLL_SECONDS)
            run = patient.run(run_id)
        for _ in range(LATE_POLLS):
            if run.state != "FAILED" or any(stage.state == "FAILED" for stage in stages_at(run, titles)):
                break
            time.sleep(POLL_SECONDS)
            run = patient.run(run_id)
        drawing.show(run)
    return _ending(patient, run, titles)


class _Pods:
    """What the pods of a run tell, looked up now and then, as far as Kubernetes can be asked from here."""

    def __init__(self, cluster: Cluster, run_id: str) -> None:
        self.run_id = run_id
        self._namespace: Namespace | None = None
        if cluster.target.namespace:
            try:
                self._namespace = Namespace(cluster.target.namespace)
            except NoAccessError:
                self._namespace = None
        self._looked = self._changed = time.monotonic()
        self._last = ""

    def why_waiting(self, run: Any) -> dict[str, str]:
        """Why pods cannot start, by node. Raises ApiError for a run whose workflow is gone."""
        now, state = time.monotonic(), str(run.run_details)
        if state != self._last:
            self._last, self._changed = state, now
        if self._namespace is None or now - self._looked < WAITING_SECONDS:
            return {}
        self._looked = now
        try:
            if now - self._changed > STALE_SECONDS and not self._namespace.pods(f"pipeline/runid={self.run_id}"):
                where = f"namespace {self._namespace.name} ({self._namespace.context})"
                raise ApiError(
                    f"run {self.run_id} will never end: it has no pod left in {where}, and nothing changed for "
                    f"{STALE_SECONDS / 60:.0f} minutes, so its workflow is gone",
                    "a schedule that is deleted takes the workflows of its runs along; submit the run anew",
                )
            return self._namespace.why_waiting(self.run_id)
        except NoAccessError:
            self._namespace = None
            return {}


class _Drawing:
    """A line for each stage that ended; for those at work a spinner, or a line where no terminal is."""

    def __init__(self, console: Console, titles: dict[str, str]) -> None:
        self.console = console
        self.titles = titles
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
        words = {"PENDING": "waiting to start", "CANCELING": "being stopped", "PAUSED": "paused"}
        if run.state in words and self._new("run", run.state):
            self.console.print(f"  [dim]{words[run.state]}[/]")
        elif run.state not in AT_WORK | ENDED and self._new("run", str(run.state)):
            self.console.print(f"  [yellow]in a state not known here: {escape(str(run.state))}[/]")
        stopped = was_stopped(run)
        for stage in stages_at(run, self.titles):
            self._show(stage, stopped)

    def say_waiting(self, reasons: dict[str, str], shards: int) -> None:
        """Tell why pods cannot start, each reason once."""
        for node, reason in reasons.items():
            stage = stage_of(node, self.titles)
            what = stage.title if stage else "a pod of Kubeflow Pipelines"
            if stage and stage.shard is not None and shards > 1:
                what += f" {stage.shard + 1}/{shards}"
            if self._new(node, reason):
                self.console.print(f"  [yellow]! {escape(what)} cannot start:[/] {escape(reason)}", soft_wrap=True)

    def _show(self, stage: Stage, stopped: bool) -> None:
        if stage.state not in ENDED:
            if self._new(stage.key, "at work"):
                self._at_work[stage.key] = self.progress.add_task(escape(stage.title), total=None)
                if not self.console.is_terminal:
                    self.console.print(f"  … {stage.title}", highlight=False, markup=False)
            return
        if not self._new(stage.key, "ended"):
            return
        if stage.key in self._at_work:
            self.progress.remove_task(self._at_work.pop(stage.key))
        took = "from cache" if stage.cached else f"{stage.seconds:8.1f} s" if stage.seconds is not None else " " * 10
        state = "CANCELED" if stopped and stage.state == "FAILED" else stage.state
        words = {"SUCCEEDED": "", "CANCELED": "stopped"}.get(state, state.lower())
        line = f"  {MARKS[state]} {escape(stage.title):<26} [dim]{took}[/]  {words}".rstrip()
        self.console.print(line, highlight=False, soft_wrap=True)

    def _new(self, key: Any, state: str) -> bool:
        known = (key, state) in self._said
        self._said.add((key, state))
        return not known


def _ending(cluster: Cluster, run: Any, titles: dict[str, str]) -> Ending:
    state = str(run.state or "RUNTIME_STATE_UNSPECIFIED")
    stages = stages_at(run, titles)
    if state == "SUCCEEDED":
        return Ending(run.run_id, state, decision=_decision(cluster, run, stages))
    if was_stopped(run):
        return Ending(run.run_id, "CANCELED")
    failed = [stage for stage in stages if stage.state == "FAILED"]
    for stage in failed:
        if not stage.from_driver:
            words = "\n".join(last_words(cluster, run, stage.task, stage.shard)) or stage.message or message_of(run)
            return Ending(run.run_id, state, stage, words)
    for stage in failed:  # a driver prepares its stage: the inputs, the cache, the pod
        message = stage.message or message_of(run) or "it could not be started"
        return Ending(run.run_id, state, stage, message)
    return Ending(run.run_id, state, None, message_of(run))


def _decision(cluster: Cluster, run: Any, stages: list[Stage]) -> str:
    """What the run decided, and why as far as its stages' logs are there; empty for a part that decides nothing."""
    ended = {stage.task for stage in stages if stage.state == "SUCCEEDED"}
    if "promote-model" in ended:
        decision, stage = "Promoted: the trained guard is the champion now.", "evaluate"
    elif "register-model" in ended:
        decision, stage = "Not promoted: the gate did not prove the trained guard better.", "evaluate"
    elif "record-mining" in ended:
        decision, stage = "Nothing was trained: too few prompts drew blocked responses.", "mine-feedback"
    else:
        return ""
    try:
        words = outcome_in(stage_logs(cluster, run, stage)[-1].text, stage.replace("-", "_"))
    except GuardLoopError:
        words = ""
    return f"{decision} {words}".rstrip()
