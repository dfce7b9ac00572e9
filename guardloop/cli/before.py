"""The commands for before a run: doctor and plan."""

import json
from typing import Annotated

import typer

from guardloop.cli import choices
from guardloop.cli.checkout import use_checkout
from guardloop.cli.options import DEMO, FAILED, ConfigArgument, ConfigOption, JsonOption, KnownPlatform, console
from guardloop.config import PlatformSettings, load_platform, load_settings
from guardloop.core.places import home

app = typer.Typer()


@app.command()
def doctor(config: ConfigOption = DEMO, platform: KnownPlatform = None, as_json: JsonOption = False) -> None:
    """Check this machine, the models and services of a configuration, and say how to mend what is wrong."""
    use_checkout()
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
    past: Annotated[
        str | None,
        typer.Option(help="Also show what this run (an id, or `latest`) took.", autocompletion=choices.runs),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate tokens, time and storage of a run, stage by stage, before it is started."""
    use_checkout()
    from launch.checks.plan import compare, compare_table, make_plan, plan_table
    from launch.checks.rates import find_alike, read_past

    settings = load_settings(config)
    earlier = read_past(past) if past else None
    planned = make_plan(settings, find_alike(settings, but=earlier.run if earlier else ""))
    rows = compare(planned, earlier) if earlier else []
    if as_json:
        compared = {"past": {"run": earlier.run, "stages": rows}} if earlier else {}
        typer.echo(json.dumps(planned.plain() | compared, indent=2))
        return
    console.print(plan_table(planned))
    console.print(f"\nrates: {planned.source}. ~ is rough, ? is not known:", markup=False)
    for reason in planned.reasons():
        console.print(f"  - {reason}", markup=False)
    for note in planned.notes:
        console.print(f"\n{note}", markup=False)
    if earlier:
        console.print(f"\nbeside the run {earlier.run}:")
        console.print(compare_table(rows))
