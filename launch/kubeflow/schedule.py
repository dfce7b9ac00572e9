"""Recurring runs: one schedule per name, whatever is asked how often."""

import re
from typing import Any

from guardloop.core.errors import GuardLoopError
from launch.kubeflow.cluster import Cluster
from launch.kubeflow.submit import Order, upload

NAMED = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")


def six_fields(cron: str) -> str:
    """`cron` as Kubeflow Pipelines reads it, which has seconds first: five fields there mean something else.

    Raises GuardLoopError unless it has the five fields of a crontab, six with seconds, or is one of @daily and others.
    """
    text = " ".join(cron.split())
    if text in NAMED or re.fullmatch(r"@every (\d+[hms])+", text):
        return text
    fields = text.split(" ")
    if len(fields) not in (5, 6) or not all(re.fullmatch(r"[\dA-Za-z*?/,-]+", field) for field in fields):
        raise GuardLoopError(
            f"not a cron expression: {cron!r}", 'write for example "0 3 * * 1" (Mondays at 3:00), or @daily'
        )
    return text if len(fields) == 6 else f"0 {text}"


def create(cluster: Cluster, order: Order, name: str, cron: str) -> tuple[Any, str]:
    """Make the schedule called `name` be this one. Returns it and `created`, `replaced` or `unchanged`."""
    cron = six_fields(cron)
    version, _ = upload(cluster, order)
    experiment_id = cluster.experiment(cluster.target.experiment)
    assert experiment_id is not None
    before = list(cluster.schedules(name))
    same = [one for one in before if _is_same(one, version, cron, order.arguments, experiment_id)]
    kept = same[0] if same else None
    if kept is None:  # the new one first: should this stop half-way, there is one too many, not none
        described = f"{order.configuration}, version {version.display_name}"
        kept = cluster.create_schedule(name, cron, experiment_id, version, order.arguments, described)
    for one in before:
        if one.recurring_run_id != kept.recurring_run_id:
            cluster.delete_schedule(one.recurring_run_id)
    return kept, "unchanged" if same else "replaced" if before else "created"


def named(cluster: Cluster, name: str) -> list[Any]:
    """The schedules called `name`, or with this id. Raises GuardLoopError if there is none."""
    every = list(cluster.schedules())
    found = [one for one in every if name in (one.display_name, one.recurring_run_id)]
    if not found:
        known = ", ".join(sorted({str(one.display_name) for one in every})) or "none"
        raise GuardLoopError(f"no schedule {name!r} at {cluster.target.host}", f"schedules there: {known}")
    return found


def cron_of(schedule: Any) -> str:
    """When a schedule starts runs, as it was set."""
    trigger = schedule.trigger
    if trigger is not None and trigger.cron_schedule is not None:
        return str(trigger.cron_schedule.cron)
    if trigger is not None and trigger.periodic_schedule is not None:
        return f"every {trigger.periodic_schedule.interval_second} s"
    return ""


def _is_same(one: Any, version: Any, cron: str, arguments: dict[str, Any], experiment_id: str) -> bool:
    reference = one.pipeline_version_reference
    parameters = one.runtime_config.parameters if one.runtime_config is not None else None
    return (
        reference is not None
        and reference.pipeline_version_id == version.pipeline_version_id
        and cron_of(one) == cron
        and parameters == arguments
        and one.experiment_id == experiment_id
    )
