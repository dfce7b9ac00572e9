"""The commands for runs on this machine: run, reproduce and compile."""

import json
from pathlib import Path
from typing import Annotated

import typer

from guardloop.cli import choices
from guardloop.cli.checkout import use_checkout
from guardloop.cli.options import DEMO, FAILED, ConfigOption, JsonOption, PipelineOption, PlatformOption, console
from guardloop.cli.terminal import Terminal
from guardloop.config import load_platform, load_settings
from guardloop.core.errors import GuardLoopError
from guardloop.core.places import home

app = typer.Typer()


@app.command()
def run(
    config: ConfigOption = DEMO,
    pipeline: PipelineOption = "full",
    platform: PlatformOption = "local",
    earlier: Annotated[
        str,
        typer.Option("--from", help="The run whose artifacts train and evaluate use.", autocompletion=choices.runs),
    ] = "latest",
    as_json: JsonOption = False,
) -> None:
    """Run the pipeline on this machine."""
    use_checkout()
    from launch.checks import preflight
    from launch.local.run import run_local
    from launch.local.runs import find_run
    from launch.local.summary import conclude
    from launch.pipelines import artifacts

    console = Terminal(stderr=as_json)
    settings, where = load_settings(config), load_platform(platform)
    if where.cluster:
        raise GuardLoopError(
            f"{platform} is a cluster", f"`guardloop submit --platform {platform}` runs the pipeline there"
        )
    before = find_run(earlier) if artifacts(pipeline) else None
    preflight.check(settings, home())
    parts = f", traffic in {where.shards} parts" if where.shards > 1 else ""
    how = {"docker": "in containers of this machine"}.get(where.runner, "on this machine")
    console.print(f"[bold]GuardLoop[/]: pipeline {pipeline}, settings of {config}, {how}{parts}", soft_wrap=True)
    try:
        ended = run_local(pipeline, settings, where, config.name, console, before)
    except KeyboardInterrupt:
        console.print("Nothing was promoted. Run the same again: responses and training go on from where they were.")
        raise
    summary = conclude(ended, console)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))


@app.command()
def reproduce(
    run: Annotated[
        str, typer.Argument(help="A run of this machine, or `latest`.", autocompletion=choices.runs)
    ] = "latest",
    as_json: JsonOption = False,
) -> None:
    """Run an earlier run again, and compare the artifacts; exit code 1 if one differs."""
    use_checkout()
    from launch.local.reproduce import reproduce as run_and_compare
    from launch.local.runs import find_run

    compared = run_and_compare(find_run(run), Terminal(stderr=as_json))
    if as_json:
        typer.echo(json.dumps([{**vars(one), "same": one.same} for one in compared], indent=2))
    if not compared or not all(one.same for one in compared):
        raise typer.Exit(FAILED)


@app.command(name="compile")
def compile_(
    platform: PlatformOption = "local",
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", help="Settings that KFP's form starts with.", autocompletion=choices.configurations
        ),
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="Where the YAML files go.")] = Path("build/pipelines"),
) -> None:
    """Compile every pipeline to KFP's IR YAML."""
    use_checkout()
    from launch.kubeflow.compile import compile_all

    settings = load_settings(config) if config else None
    where = load_platform(platform)
    try:
        paths = compile_all(folder, where, None, settings, config.name if config else "")
    except OSError as error:
        raise GuardLoopError(
            f"cannot write {folder}: {error.strerror or error}", "choose another place: --out"
        ) from None
    for path in paths:
        console.print(f"  [green]✓[/] {path}")
