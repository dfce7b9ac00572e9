"""The stages of a run among the many tasks that Kubeflow Pipelines reports: drivers, graphs, loops, retries, pods.

A task names the nodes that follow it by their ids, and not its own. But an id is a hash of a node's full name, and the
full name is made of display names; so the names are found again, and with them which stage of which shard a task is.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from typing import Any

from launch.pipelines import stage_titles

ENDED = frozenset({"SUCCEEDED", "SKIPPED", "FAILED", "CANCELED"})
NOT_STARTED = frozenset({None, "", "PENDING", "RUNTIME_STATE_UNSPECIFIED"})
CACHED_SECONDS = 1.0  # no pod is that fast
DRIVER = "-driver"


@dataclass(frozen=True)
class Stage:
    """One stage of a run, or of one of its shards."""

    task: str
    """Its name in the pipeline: `screen-2`."""
    title: str
    """Its name for people: `screen responses 2/4`."""
    state: str
    seconds: float | None = None
    message: str = ""
    shard: int | None = None
    from_driver: bool = False
    """Whether it is the driver, which prepares the stage, that ended so."""

    @property
    def key(self) -> tuple[str, int | None]:
        """What tells it from the others."""
        return self.task, self.shard

    @property
    def cached(self) -> bool:
        """Whether its result came from an earlier run."""
        return self.state == "SUCCEEDED" and self.seconds is not None and self.seconds < CACHED_SECONDS


def titles_of(version: Any) -> dict[str, str]:
    """The titles of a pipeline version's stages by task, in plain words; {} where the version is not known."""
    spec = (version.pipeline_spec if version is not None else None) or {}
    spec = spec.get("pipeline_spec", spec)
    return {task: title.replace("_", " ") for task, title in stage_titles(spec).items()}


def stages_at(run: Any, titles: dict[str, str]) -> list[Stage]:
    """The stages that have begun, or ended, in the order of their ends."""
    tasks = (run.run_details.task_details if run.run_details else None) or []
    names, shards = _names_of(tasks), shards_of(run)
    stages: dict[tuple[str, int | None], tuple[Any, Stage]] = {}
    for task in sorted(tasks, key=lambda task: len(task.display_name or "")):  # a stage before its attempts: screen(0)
        stage = stage_of(names.get(id(task), task.display_name or ""), titles)
        if stage is None or task.state in NOT_STARTED or (stage.from_driver and task.state != "FAILED"):
            continue
        known = stages.get(stage.key)
        if known is None or (known[1].from_driver and not stage.from_driver):
            part = f" {stage.shard + 1}/{shards}" if stage.shard is not None and shards > 1 else ""
            stage = replace(
                stage,
                title=stage.title + part,
                state=str(task.state),
                seconds=seconds_of(task),
                message=message_of(task),
            )
            stages[stage.key] = task, stage
    by_end = sorted(stages.values(), key=lambda pair: str(moment(pair[0].end_time) or "later"))
    return [stage for _, stage in by_end]


def stage_of(node: str, titles: dict[str, str]) -> Stage | None:
    """The stage that a node belongs to, by its full name; without known titles, whatever is no graph and no loop."""
    parts = [part for part in node.split(".") if not part.startswith("executor")]
    last = re.sub(r"(\(\d+\))+$", "", parts[-1]) if parts else ""
    task = last.removesuffix(DRIVER)
    graph = re.fullmatch(r"|root|(condition|for-loop|iteration|guardloop).*", task)
    if task not in titles if titles else graph:
        return None
    loops = re.findall(r"iteration-iterations\((\d+):", node)
    shard = int(loops[-1]) if loops else None
    return Stage(task, titles.get(task, task), "", shard=shard, from_driver=last != task)


def shards_of(run: Any) -> int:
    """How many parts the traffic of a run has."""
    parameters = (run.runtime_config.parameters if run.runtime_config else None) or {}
    return int(parameters.get("shards") or 1)


def _names_of(tasks: Iterable[Any]) -> dict[int, str]:
    """Full names of nodes by the identity of their task."""
    tasks = list(tasks)
    children = {id(task): [child.pod_name for child in task.child_tasks or [] if child.pod_name] for task in tasks}
    known = {node for nodes in children.values() for node in nodes}
    if not known:
        return {}
    workflow = min(known).rpartition("-")[0]
    shown = {task.display_name for task in tasks if task.display_name}
    by_id, open_names = {workflow: workflow}, [workflow]
    while open_names:
        above = open_names.pop()
        names = [f"{above}.{name}" for name in shown] + ([f"{above}(0)"] if above == workflow else [])
        for name in names:
            node = f"{workflow}-{_hash(name)}"
            if node in known and node not in by_id:
                by_id[node] = name
                open_names.append(name)
    full_names = ((id(task), _name_of(task, children[id(task)], by_id)) for task in tasks)
    return {task: name for task, name in full_names if name}


def _name_of(task: Any, children: list[str], by_id: dict[str, str]) -> str | None:
    """The full name of a task: of those that end as it is shown, the one from which its children follow."""
    candidates = [name for name in by_id.values() if name.rpartition(".")[2] == task.display_name]
    following = [by_id[child] for child in children if child in by_id]
    for name in candidates:
        graph = name.rpartition(".")[0]
        inside = (f"{name}.", f"{name}(")
        if any(child.startswith(inside) or child.rpartition(".")[0] == graph for child in following):
            return name
    return candidates[0] if len(candidates) == 1 else None


@cache
def _hash(name: str) -> int:
    """FNV-1a with 32 bits, of which Argo makes a node's id."""
    value = 2166136261
    for byte in name.encode():
        value = ((value ^ byte) * 16777619) & 0xFFFFFFFF
    return value


def seconds_of(task: Any) -> float | None:
    """How long a task took or has been at work, or None where it has not started."""
    start, end = moment(task.start_time), moment(task.end_time)
    return ((end or datetime.now(UTC)) - start).total_seconds() if start else None


def moment(time: datetime | None) -> datetime | None:
    """`time`, or None where it only stands for `not yet`: the API sends the epoch, or the year 1, for that."""
    if time is None or time.year < 2000:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def message_of(part: Any) -> str:
    """What a run or a task says of its failure, or nothing."""
    errors = [part.error, *(status.error for status in reversed(part.state_history or []))]
    return next((" ".join(str(error.message).split()) for error in errors if error is not None and error.message), "")


def was_stopped(run: Any) -> bool:
    """Whether someone stopped the run: Kubeflow Pipelines calls such runs failed, and only their history tells."""
    asked = any(status.state == "CANCELING" for status in run.state_history or [])
    return run.state == "CANCELED" or (asked and run.state == "FAILED")
