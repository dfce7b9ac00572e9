"""The commands for recurring runs on a cluster: schedule create, list, pause, resume and delete."""

import json
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from guardloop.cli.checkout import use_checkout
from guardloop.cli.connection import check_needs, connect, make_order, platform_of
from guardloop.cli.options import (
    DEMO,
    ArtifactOption,
    ConfigOption,
    ExperimentOption,
    HostOption,
    JsonOption,
    KnownPlatform,
    NamespaceOption,
    PipelineOption,
    PlatformOption,
    console,
)
from guardloop.config import load_platform

app = typer.Typer(no_args_is_help=True, help="Recurring runs on a cluster.")
WaitOption = Annotated[bool, typer.Option("--wait", help="Wait until the run of the old schedule has ended.")]
NowOption = Annotated[bool, typer.Option("--now", help="Stop the run of the old schedule.")]
ScheduleArgument = Annotated[str, typer.Argument(help="Name or id of the schedule.")]


@app.command()
def create(
    cron: Annotated[str, typer.Option(help='When, as in a crontab: "0 3 * * 1" is Mondays at 3:00. Or @daily.')],
    name: Annotated[str, typer.Option(help="Name of the schedule; an older one of this name is replaced.")] = "",
    config: ConfigOption = DEMO,
    pipeline: PipelineOption = "full",
    platform: PlatformOption = "minikube",
    host: HostOption = None,
    namespace: NamespaceOption = None,
    experiment: ExperimentOption = None,
    artifact: ArtifactOption = None,
    force: Annotated[bool, typer.Option("--force", help="Create it although a check failed.")] = False,
    wait: WaitOption = False,
    now: NowOption = False,
) -> None:
    """Run the pipeline on a cluster again and again."""
    use_checkout()
    from launch.kubeflow import schedule

    schedule.six_fields(cron)
    where = load_platform(platform)
    order = make_order(config, pipeline, platform, where, artifact, fresh=True)  # else the cache would answer each time
    cluster = connect(where, host, namespace, experiment)
    check_needs(cluster, order, config, force, console)
    name = name or f"{order.package.name}-{config.stem}"
    made, what = schedule.create(cluster, order, name, cron, _patience(wait, now))
    console.print(
        f"schedule {escape(name)} {what}: {schedule.cron_of(made)} (seconds first, the cluster's time zone)",
        soft_wrap=True,
    )


@app.command(name="list")
def list_(
    platform: KnownPlatform = None,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the schedules."""
    cluster = connect(platform_of(platform), host, namespace)
    from launch.kubeflow.schedule import cron_of

    rows = [
        {"id": one.recurring_run_id, "name": one.display_name, "status": one.status or "unknown", "cron": cron_of(one)}
        for one in cluster.schedules()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("schedule", "status", "cron", "id", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(escape(str(row[key])) for key in ("name", "status", "cron", "id")))
    console.print(table if rows else "no schedules yet: `guardloop schedule create` makes one")


@app.command()
def pause(
    name: ScheduleArgument, platform: KnownPlatform = None, host: HostOption = None, namespace: NamespaceOption = None
) -> None:
    """Start no more runs until it is resumed."""
    _each(name, "paused", lambda cluster, one: cluster.pause_schedule(one), platform, host, namespace)


@app.command()
def resume(
    name: ScheduleArgument, platform: KnownPlatform = None, host: HostOption = None, namespace: NamespaceOption = None
) -> None:
    """Start runs again."""
    _each(name, "resumed", lambda cluster, one: cluster.resume_schedule(one), platform, host, namespace)


@app.command()
def delete(
    name: ScheduleArgument,
    platform: KnownPlatform = None,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    wait: WaitOption = False,
    now: NowOption = False,
) -> None:
    """Forget a schedule; the runs that ended stay."""
    cluster = connect(platform_of(platform), host, namespace)
    from launch.kubeflow import schedule

    for one in schedule.named(cluster, name):
        schedule.delete(cluster, one, _patience(wait, now))
        console.print(f"schedule {escape(str(one.display_name))} is deleted", soft_wrap=True)


def _patience(wait: bool, now: bool) -> Literal["refuse", "wait", "now"]:
    return "now" if now else "wait" if wait else "refuse"


def _each(name: str, done: str, action: Any, platform: str | None, host: str | None, namespace: str | None) -> None:
    cluster = connect(platform_of(platform), host, namespace)
    from launch.kubeflow.schedule import named

    for one in named(cluster, name):
        action(cluster, one.recurring_run_id)
        console.print(f"schedule {escape(str(one.display_name))} is {done}", soft_wrap=True)
