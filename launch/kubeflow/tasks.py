"""The stages of a run among the many tasks that Kubeflow Pipelines reports (drivers, graphs, loops, executors)."""

import re
from datetime import UTC, datetime
from typing import Any

DRIVER = "-driver"
ENDED = frozenset({"SUCCEEDED", "SKIPPED", "FAILED", "CANCELED"})


def stages_of(version: Any) -> frozenset[str]:
    """The stages of a pipeline version: the names of the tasks that run a container. Empty where it is not known."""
    spec = (version.pipeline_spec if version is not None else None) or {}
    spec = spec.get("pipeline_spec", spec)
    parts = spec.get("components", {})
    return frozenset(
        name
        for part in (spec.get("root", {}), *parts.values())
        for name, task in part.get("dag", {}).get("tasks", {}).items()
        if "executorLabel" in parts.get(task["componentRef"]["name"], {})
    )


def stage_of(task: str, stages: frozenset[str]) -> str | None:
    """The stage that a task is; without knowledge of the stages, whatever is no driver, loop, condition or executor."""
    name = re.sub(r"\(.*\)$", "", task)
    if stages:
        return name if name in stages else None
    other = re.fullmatch(r"|root|executor.*|.*-driver|(condition|for-loop|iteration|guardloop).*", name)
    return None if other else name


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
    told = [part.error, *(status.error for status in reversed(part.state_history or []))]
    return next((" ".join(str(error.message).split()) for error in told if error is not None and error.message), "")
