"""The commands for runs on a cluster: submit, follow, runs, logs, cancel and schedule."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from guardloop.cli import choices
from guardloop.config import PlatformSettings, load_platform, load_settings
from guardloop.core.errors import GuardLoopError

app = typer.Typer()
schedule_app = typer.Typer(no_args_is_help=True, help="Recurring runs on a cluster.")
app.add_typer(schedule_app, name="schedule")
console = Console(highlight=False)

FAILED = 1

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="Configuration file.", autocompletion=choices.configurations)
]
ConfigArgument = Annotated[Path, typer.Argument(help="Configuration file.", autocompletion=choices.configurations)]
PipelineOption = Annotated[
    str, typer.Option(help="process, train, evaluate or full.", autocompletion=choices.pipelines)
]
PlatformOption = Annotated[
    str,
    typer.Option(help="Where to run: a name in configs/platform, or a file.", autocompletion=choices.platforms),
]
HostOption = Annotated[
    str | None, typer.Option(envvar="KF_PIPELINES_ENDPOINT", help="Kubeflow Pipelines, such as https://host/pipeline.")
]
NamespaceOption = Annotated[str | None, typer.Option(envvar="KF_PIPELINES_NAMESPACE", help="Namespace of the runs.")]
ExperimentOption = Annotated[
    str | None, typer.Option(envvar="KF_PIPELINES_DEFAULT_EXPERIMENT_NAME", help="Experiment of the runs.")
]
KnownPlatform = Annotated[
    str | None,
    typer.Option("--platform", help="Platform whose `kubeflow` section to use.", autocompletion=choices.platforms),
]
ArtifactOption = Annotated[
    list[str] | None,
    typer.Option("--artifact", help="NAME=URI of an earlier output, for train and evaluate; repeat for each."),
]
RunArgument = Annotated[str, typer.Argument(help="Id, its first characters, name, or `latest`.")]
DEMO = Path("configs/demo.yaml")


@app.command()
def submit(
    config: ConfigOption = DEMO,
    pipeline: PipelineOption = "full",
    platform: PlatformOption = "minikube",
    host: HostOption = None,
    namespace: NamespaceOption = None,
    experiment: ExperimentOption = None,
    artifact: ArtifactOption = None,
    wait: Annotated[bool, typer.Option(help="Follow the run until it ends; the exit code tells how.")] = True,
    fresh: Annotated[bool, typer.Option("--fresh", help="Take nothing from Kubeflow's cache.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, and submit nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Submit although a check failed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Checks and run as JSON; the rest goes to stderr.")] = False,
) -> None:
    """Run the pipeline on a cluster, through Kubeflow Pipelines."""
    from launch.kubeflow import submit as submitting

    said = Console(highlight=False, stderr=as_json)
    where = load_platform(platform)
    order = _order(config, pipeline, platform, where, artifact, fresh)
    cluster = _cluster(where, host, namespace, experiment)
    told: dict[str, Any] = {
        "checks": [check.plain() for check in _preflight(cluster, order, config, force, said)],
        "run": None,
    }
    if dry_run:
        said.print(
            f"{order.package.name}, version {order.version_name}: nothing was submitted (dry run)", soft_wrap=True
        )
    else:
        version, reused = submitting.upload(cluster, order)
        said.print(
            f"{order.package.name}, version {version.display_name} ({'there already' if reused else 'uploaded'})",
            soft_wrap=True,
        )
        run = submitting.start(cluster, order, version)
        page = cluster.target.run_page(run.run_id)
        said.print(f"run {run.run_id} in experiment {escape(cluster.target.experiment)}", soft_wrap=True)
        said.print(f"  {page}", soft_wrap=True, markup=False)
        told["run"] = {"id": run.run_id, "page": page}
    if as_json:
        typer.echo(json.dumps(told, indent=2))
    if wait and not dry_run:
        _follow(cluster, run.run_id, said)


@app.command()
def follow(
    run: RunArgument = "latest",
    platform: KnownPlatform = None,
    host: HostOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Follow a run on a cluster until it ends; the exit code tells how."""
    cluster = _cluster(_known(platform), host, namespace)
    _follow(cluster, cluster.find_run(run).run_id, console)


@app.command()
def runs(
    platform: KnownPlatform = None,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    experiment: Annotated[str | None, typer.Option(help="Only the runs of this experiment.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List the runs on a cluster."""
    from launch.kubeflow.tasks import moment

    cluster = _cluster(_known(platform), host, namespace)
    experiment_id = None
    if experiment and (experiment_id := cluster.experiment(experiment, create=False)) is None:
        raise GuardLoopError(f"no experiment {experiment!r} at {cluster.target.host}", "check the name")
    rows = []
    for run in cluster.runs(experiment_id, limit):
        started, ended = moment(run.created_at), moment(run.finished_at)
        rows.append(
            {
                "id": run.run_id,
                "name": run.display_name,
                "state": run.state or "unknown",
                "created": started.isoformat() if started else None,
                "seconds": (ended - started).total_seconds() if started and ended else None,
                "page": cluster.target.run_page(run.run_id),
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    colours = {"SUCCEEDED": "green", "FAILED": "red", "RUNNING": "cyan", "CANCELED": "yellow"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "state", "created", "minutes", "name"):
        table.add_column(name, no_wrap=name == "run")
    for row in rows:
        colour = colours.get(row["state"], "default")
        minutes = f"{row['seconds'] / 60:.1f}" if row["seconds"] is not None else ""
        created = str(row["created"] or "")[:16].replace("T", " ")
        table.add_row(row["id"], f"[{colour}]{escape(row['state'])}[/]", created, minutes, escape(row["name"] or ""))
    console.print(table if rows else "no runs yet: `guardloop submit` starts one")


@app.command()
def logs(
    run: RunArgument,
    stage: Annotated[str | None, typer.Argument(help="Only this stage, such as train-guard.")] = None,
    platform: KnownPlatform = None,
    host: HostOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Print what the stages of a run on a cluster have printed."""
    from launch.kubeflow.logs import stage_logs

    cluster = _cluster(_known(platform), host, namespace)
    for log in stage_logs(cluster, cluster.find_run(run), stage):
        console.print(f"[bold]── {escape(log.stage)}[/] [dim]{escape(log.pod)}[/]", soft_wrap=True)
        typer.echo(log.text.rstrip("\n"))


@app.command()
def cancel(
    run: RunArgument,
    platform: KnownPlatform = None,
    host: HostOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Stop a run on a cluster."""
    from launch.kubeflow.follow import AT_WORK

    cluster = _cluster(_known(platform), host, namespace)
    found = cluster.find_run(run)
    if found.state not in AT_WORK:
        console.print(f"run {found.run_id} has ended already: {escape(found.state)}", soft_wrap=True)
        return
    cluster.terminate(found.run_id)
    console.print(f"run {found.run_id} is being stopped", soft_wrap=True)


@schedule_app.command()
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
) -> None:
    """Run the pipeline on a cluster again and again."""
    from launch.kubeflow import schedule

    schedule.six_fields(cron)
    where = load_platform(platform)
    order = _order(config, pipeline, platform, where, artifact, fresh=True)  # else the cache would answer each time
    cluster = _cluster(where, host, namespace, experiment)
    _preflight(cluster, order, config, force, console)
    name = name or f"{order.package.name}-{config.stem}"
    made, what = schedule.create(cluster, order, name, cron)
    console.print(
        f"schedule {escape(name)} {what}: {schedule.cron_of(made)} (seconds first, the cluster's time zone)",
        soft_wrap=True,
    )


@schedule_app.command(name="list")
def list_(
    platform: KnownPlatform = None,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List the schedules."""
    from launch.kubeflow.schedule import cron_of

    rows = [
        {"id": one.recurring_run_id, "name": one.display_name, "status": one.status or "unknown", "cron": cron_of(one)}
        for one in _cluster(_known(platform), host, namespace).schedules()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("schedule", "status", "cron", "id", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(escape(str(row[key])) for key in ("name", "status", "cron", "id")))
    console.print(table if rows else "no schedules yet: `guardloop schedule create` makes one")


ScheduleArgument = Annotated[str, typer.Argument(help="Name or id of the schedule.")]


@schedule_app.command()
def pause(
    name: ScheduleArgument, platform: KnownPlatform = None, host: HostOption = None, namespace: NamespaceOption = None
) -> None:
    """Start no more runs until it is resumed."""
    _each(name, "paused", lambda cluster, one: cluster.pause_schedule(one), platform, host, namespace)


@schedule_app.command()
def resume(
    name: ScheduleArgument, platform: KnownPlatform = None, host: HostOption = None, namespace: NamespaceOption = None
) -> None:
    """Start runs again."""
    _each(name, "resumed", lambda cluster, one: cluster.resume_schedule(one), platform, host, namespace)


@schedule_app.command()
def delete(
    name: ScheduleArgument, platform: KnownPlatform = None, host: HostOption = None, namespace: NamespaceOption = None
) -> None:
    """Forget a schedule; its runs stay."""
    _each(name, "deleted", lambda cluster, one: cluster.delete_schedule(one), platform, host, namespace)


def _each(name: str, done: str, action: Any, platform: str | None, host: str | None, namespace: str | None) -> None:
    from launch.kubeflow.schedule import named

    cluster = _cluster(_known(platform), host, namespace)
    for one in named(cluster, name):
        action(cluster, one.recurring_run_id)
        console.print(f"schedule {escape(str(one.display_name))} is {done}", soft_wrap=True)


def _order(
    config: Path, pipeline: str, platform: str, where: PlatformSettings, artifacts: list[str] | None, fresh: bool
) -> Any:
    from launch.kubeflow.submit import prepare

    if not where.cluster:
        clusters = "minikube, gpu-cluster, or a file of yours"
        raise GuardLoopError(f"{platform} is no cluster: it runs on this machine", f"--platform {clusters}")
    given = {}
    for artifact in artifacts or []:
        name, equals, uri = artifact.partition("=")
        if not (name and equals and "://" in uri):
            raise GuardLoopError(f"--artifact {artifact}: not NAME=URI", "for example training_set=s3://bucket/path")
        given[name] = uri
    return prepare(pipeline, load_settings(config), where, config.name, Path(platform).stem, given, fresh)


def _known(platform: str | None) -> PlatformSettings:
    return load_platform(platform) if platform else PlatformSettings()


def _cluster(platform: PlatformSettings, host: str | None, namespace: str | None, experiment: str | None = None) -> Any:
    from launch.kubeflow.cluster import Cluster
    from launch.kubeflow.target import find_target

    warnings = Console(stderr=True, highlight=False)
    return Cluster(
        find_target(platform, host, namespace, experiment),
        say=lambda words: warnings.print(f"[yellow]{escape(words)}[/]", soft_wrap=True),
    )


def _preflight(cluster: Any, order: Any, config: Path, force: bool, said: Console) -> list[Any]:
    """Check what the run needs, and say it. Raises GuardLoopError where a check failed, unless it is forced."""
    from launch.checks.check import failures, table
    from launch.checks.cluster import check_all

    checks = check_all(cluster, order.package, load_settings(config))
    said.print(table(checks))
    said.print()
    if failed := failures(checks):
        needless = not set(failed) & {"Kubeflow Pipelines", "access"}
        if force and needless:
            said.print(f"[yellow]going on, although these failed: {escape(', '.join(failed))}[/]", soft_wrap=True)
            return checks
        raise GuardLoopError(
            f"nothing was submitted: {', '.join(failed)}",
            "mend what the table names" + ("; --force submits nevertheless" if needless else ""),
        )
    return checks


def _follow(cluster: Any, run_id: str, said: Console) -> None:
    """Follow a run. Raises typer.Exit with FAILED unless it succeeded."""
    from launch.kubeflow.follow import follow as watch

    try:
        ending = watch(cluster, run_id, said)
    except KeyboardInterrupt:
        said.print(
            f"\nthe run goes on: `guardloop follow {run_id}` shows it, `guardloop cancel {run_id}` stops it",
            soft_wrap=True,
        )
        raise
    except GuardLoopError as error:
        raise GuardLoopError(
            f"{error.what}\nthe run may go on: {cluster.target.run_page(run_id)}", f"guardloop follow {run_id}"
        ) from None
    if ending.succeeded:
        said.print(f"[green]succeeded[/]: run {run_id}", soft_wrap=True)
        return
    told = Console(stderr=True, highlight=False)
    stage = f" in {ending.stage}" if ending.stage else ""
    told.print(f"[red]{escape(ending.state)}[/]{escape(stage)}: run {run_id}", soft_wrap=True)
    if ending.message:
        told.print(escape(ending.message), soft_wrap=True)
    told.print(f"  -> its log: guardloop logs {run_id}{' ' + ending.stage if ending.stage else ''}", soft_wrap=True)
    raise typer.Exit(FAILED)
