"""The commands for runs on a cluster: submit, follow, runs, logs and cancel."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from guardloop.cli.checkout import use_checkout
from guardloop.cli.connection import check_needs, connect, make_order, platform_of
from guardloop.cli.options import (
    DEMO,
    FAILED,
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
from guardloop.cli.terminal import Terminal
from guardloop.config import load_platform
from guardloop.core.errors import GuardLoopError
from guardloop.core.text import clean

if TYPE_CHECKING:
    from launch.kubeflow.cluster import Cluster

app = typer.Typer()
COLOURS = {"SUCCEEDED": "green", "FAILED": "red", "RUNNING": "cyan", "CANCELED": "yellow"}
RunArgument = Annotated[str, typer.Argument(help="Id, its first characters, name, or `latest`.")]


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
    use_checkout()
    console = Terminal(stderr=as_json)
    where = load_platform(platform)
    order = make_order(config, pipeline, platform, where, artifact, fresh)
    cluster = connect(where, host, namespace, experiment)
    from launch.kubeflow import submit as submitting

    checks = check_needs(cluster, order, config, force, console)
    submitted: dict[str, Any] = {"checks": [check.plain() for check in checks], "run": None}
    if dry_run:
        words = f"{order.package.name}, version {order.version_name}: nothing was submitted (dry run)"
        console.print(words, soft_wrap=True)
    else:
        version, reused = submitting.upload(cluster, order)
        how = "there already" if reused else "uploaded"
        console.print(f"{order.package.name}, version {version.display_name} ({how})", soft_wrap=True)
        run = submitting.start(cluster, order, version)
        page = cluster.target.run_page(run.run_id)
        console.print(f"run {run.run_id} in experiment {escape(cluster.target.experiment)}", soft_wrap=True)
        console.print(f"  {page}", soft_wrap=True, markup=False)
        submitted["run"] = {"id": run.run_id, "page": page}
    if as_json:
        typer.echo(json.dumps(submitted, indent=2))
    if wait and not dry_run:
        _follow(cluster, run.run_id, console)


@app.command()
def follow(
    run: RunArgument = "latest",
    platform: KnownPlatform = None,
    host: HostOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Follow a run on a cluster until it ends; the exit code tells how."""
    cluster = connect(platform_of(platform), host, namespace)
    _follow(cluster, cluster.find_run(run).run_id, console)


@app.command()
def runs(
    platform: KnownPlatform = None,
    host: HostOption = None,
    namespace: NamespaceOption = None,
    experiment: Annotated[str | None, typer.Option(help="Only the runs of this experiment.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List the runs on a cluster."""
    cluster = connect(platform_of(platform), host, namespace)
    from launch.kubeflow.tasks import moment, was_stopped

    experiment_id = None
    if experiment and (experiment_id := cluster.find_experiment(experiment)) is None:
        raise GuardLoopError(f"no experiment {experiment!r} at {cluster.target.host}", "check the name")
    rows = []
    for run in cluster.runs(experiment_id, limit):
        started, ended = moment(run.created_at), moment(run.finished_at)
        rows.append(
            {
                "id": run.run_id,
                "name": run.display_name,
                "state": "CANCELED" if was_stopped(run) else run.state or "unknown",
                "created": started.isoformat() if started else None,
                "seconds": (ended - started).total_seconds() if started and ended else None,
                "page": cluster.target.run_page(run.run_id),
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "state", "created", "minutes", "name"):
        table.add_column(name, no_wrap=name == "run")
    for row in rows:
        colour = COLOURS.get(row["state"], "default")
        minutes = f"{row['seconds'] / 60:.1f}" if row["seconds"] is not None else ""
        created = str(row["created"] or "")[:16].replace("T", " ")
        table.add_row(row["id"], f"[{colour}]{escape(row['state'])}[/]", created, minutes, escape(row["name"] or ""))
    console.print(table if rows else "no runs yet: `guardloop submit` starts one")


@app.command()
def logs(
    run: RunArgument,
    stage: Annotated[str | None, typer.Argument(help="Only this stage, such as train-guard.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also the lines of Kubeflow and Argo.")] = False,
    platform: KnownPlatform = None,
    host: HostOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Print what the stages of a run on a cluster have printed."""
    cluster = connect(platform_of(platform), host, namespace)
    from launch.kubeflow.logs import stage_logs

    for log in stage_logs(cluster, cluster.find_run(run), stage):
        part = f", shard {log.shard + 1}" if log.shard is not None else ""
        console.print(f"[bold]── {escape(log.stage)}{part}[/] [dim]{escape(log.pod)}[/]", soft_wrap=True)
        typer.echo(clean(log.text if everything else log.own).rstrip("\n"))


@app.command()
def cancel(
    run: RunArgument,
    platform: KnownPlatform = None,
    host: HostOption = None,
    namespace: NamespaceOption = None,
) -> None:
    """Stop a run on a cluster."""
    cluster = connect(platform_of(platform), host, namespace)
    from launch.kubeflow.follow import AT_WORK

    one = cluster.find_run(run)
    if one.state not in AT_WORK:
        console.print(f"run {one.run_id} has ended already: {escape(one.state)}", soft_wrap=True)
        return
    cluster.terminate(one.run_id)
    console.print(f"run {one.run_id} is being stopped", soft_wrap=True)


def _follow(cluster: "Cluster", run_id: str, console: Terminal) -> None:
    """Follow a run. Raises typer.Exit with FAILED unless it succeeded."""
    from launch.kubeflow.follow import follow as watch

    try:
        ending = watch(cluster, run_id, console)
    except KeyboardInterrupt:
        console.print(
            f"\nthe run goes on: `guardloop follow {run_id}` shows it, `guardloop cancel {run_id}` stops it",
            soft_wrap=True,
        )
        raise
    except GuardLoopError as error:
        raise GuardLoopError(
            f"{error.what}\nthe run may go on: {cluster.target.run_page(run_id)}", f"guardloop follow {run_id}"
        ) from None
    if ending.succeeded:
        if ending.decision:
            console.print(f"[bold]{escape(ending.decision)}[/]", soft_wrap=True)
            console.print("  report: on the run's page, outputs of the stage evaluate", soft_wrap=True)
            console.print("  guards: `guardloop review` lists them, with what the gate said of each", soft_wrap=True)
        console.print(f"[green]succeeded[/]: run {run_id}", soft_wrap=True)
        return
    errors = Terminal(stderr=True)
    if ending.state == "CANCELED":
        errors.print(f"[yellow]stopped[/]: run {run_id}; nothing was promoted", soft_wrap=True)
        raise typer.Exit(FAILED)
    stage = f" in {ending.stage.title}" if ending.stage else ""
    errors.print(f"[red]{escape(ending.state)}[/]{escape(stage)}: run {run_id}", soft_wrap=True)
    if ending.message:
        errors.print(escape(ending.message), soft_wrap=True)
    task = f" {ending.stage.task}" if ending.stage else ""
    errors.print(f"  -> its log: guardloop logs {run_id}{task}", soft_wrap=True)
    raise typer.Exit(FAILED)
