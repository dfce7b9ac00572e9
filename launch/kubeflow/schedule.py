"""Recurring runs: one schedule per name, whatever is asked how often."""

import re
import time
from typing import Any, Literal

from guardloop.core.errors import GuardLoopError
from launch.kubeflow.cluster import Cluster
from launch.kubeflow.follow import AT_WORK
from launch.kubeflow.submit import Order, upload

Patience = Literal["refuse", "wait", "now"]
POLL_SECONDS = 10.0
RUNS_LOOKED_AT = 100

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


def create(cluster: Cluster, order: Order, name: str, cron: str, patience: Patience = "refuse") -> tuple[Any, str]:
    """Make the schedule called `name` be this one. Returns it and `created`, `replaced` or `unchanged`.

    `patience` is for a run of the schedule that is replaced, as in `delete`.
    """
    cron = six_fields(cron)
    version, _ = upload(cluster, order)
    experiment_id = cluster.experiment(cluster.target.experiment)
    before = list(cluster.schedules(name))
    same = [one for one in before if _is_same(one, version, cron, order.arguments, experiment_id)]
    kept = same[0] if same else None
    replaced = [one for one in before if kept is None or one.recurring_run_id != kept.recurring_run_id]
    for one in replaced:
        _settle_run(cluster, one, patience)
    if kept is None:  # the new one first: should this stop half-way, there is one too many, not none
        described = f"{order.configuration}, version {version.display_name}"
        kept = cluster.create_schedule(name, cron, experiment_id, version, order.arguments, described)
    for one in replaced:
        cluster.delete_schedule(one.recurring_run_id)
    return kept, "unchanged" if same else "replaced" if before else "created"


def delete(cluster: Cluster, schedule: Any, patience: Patience = "refuse") -> None:
    """Delete a schedule. Kubernetes deletes the workflow of its run along with it, and the run never ends then.

    `patience` says what to do where a run is under way: refuse (with a GuardLoopError), wait until it ends, or stop it.
    """
    _settle_run(cluster, schedule, patience)
    cluster.delete_schedule(schedule.recurring_run_id)


def _settle_run(cluster: Cluster, schedule: Any, patience: Patience) -> None:
    """Deal with the run of a schedule that is about to be deleted."""
    running = [
        run
        for run in cluster.runs(limit=RUNS_LOOKED_AT)
        if run.recurring_run_id == schedule.recurring_run_id and run.state in AT_WORK
    ]
    if running and patience == "refuse":
        ids = ", ".join(str(run.run_id) for run in running)
        raise GuardLoopError(
            f"schedule {schedule.display_name} has a run under way, {ids}, whose workflow would be deleted with it",
            "--wait waits until it has ended, --now stops it and goes on",
        )
    for run in running:
        cluster.pause_schedule(schedule.recurring_run_id)
        if patience == "now":
            cluster.terminate(run.run_id)
        while cluster.run(run.run_id).state in AT_WORK:
            time.sleep(POLL_SECONDS)


def named(cluster: Cluster, name: str) -> list[Any]:
    """The schedules called `name`, or with this id. Raises GuardLoopError if there is none."""
    every = list(cluster.schedules())
    matching = [one for one in every if name in (one.display_name, one.recurring_run_id)]
    if not matching:
        known = ", ".join(sorted({str(one.display_name) for one in every})) or "none"
        raise GuardLoopError(f"no schedule {name!r} at {cluster.target.host}", f"schedules there: {known}")
    return matching


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
