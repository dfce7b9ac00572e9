"""The commands for before a run: doctor and plan."""

import json
from typing import Annotated

import typer
from rich.console import Console

from guardloop.cli import choices
from guardloop.cli.cluster import DEMO, FAILED, ConfigArgument, ConfigOption, KnownPlatform
from guardloop.config import PlatformSettings, load_platform, load_settings

app = typer.Typer()
console = Console(highlight=False)
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON.")]


@app.command()
def doctor(config: ConfigOption = DEMO, platform: KnownPlatform = None, as_json: JsonOption = False) -> None:
    """Check this machine, the models and services of a configuration, and say how to mend what is wrong."""
    from guardloop.core.places import home
    from launch.checks.check import failures, table
    from launch.checks.doctor import examine

    settings = load_settings(config)
    checks = examine(settings, load_platform(platform) if platform else PlatformSettings(), home())
    wrong = failures(checks)
    if as_json:
        typer.echo(json.dumps([check.plain() for check in checks], indent=2))
    else:
        console.print(table(checks))
        console.print()
        words = f"[red]{len(wrong)} failed[/]: {', '.join(wrong)}" if wrong else "[green]nothing failed[/]"
        console.print(f"{config.name}: {words}", soft_wrap=True)
    if wrong:
        raise typer.Exit(FAILED)


@app.command()
def plan(
    config: ConfigArgument = DEMO,
    compare: Annotated[
        str | None,
        typer.Option(help="Also show what this run (an id, or `latest`) took.", autocompletion=choices.runs),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate tokens, time and storage of a run, stage by stage, before it is started."""
    from launch.checks.plan import compare as side_by_side
    from launch.checks.plan import compare_table, make_plan, plan_table
    from launch.checks.rates import find_alike, read_past

    settings = load_settings(config)
    past = read_past(compare) if compare else None
    planned = make_plan(settings, find_alike(settings, but=past.run if past else ""))
    rows = side_by_side(planned, past) if past else []
    if as_json:
        compared = {"compared": {"run": past.run, "stages": rows}} if past else {}
        typer.echo(json.dumps(planned.plain() | compared, indent=2))
        return
    console.print(plan_table(planned))
    console.print(f"\nrates: {planned.source}. ~ is rough, ? is not known:", markup=False)
    for reason in planned.reasons():
        console.print(f"  - {reason}", markup=False)
    if past:
        console.print(f"\nbeside the run {past.run}:")
        console.print(compare_table(rows))
