"""The commands for before a run: doctor and plan."""

import json
from typing import Annotated

import typer
from rich.console import Console

from guardloop.config import PlatformSettings, load_platform, load_settings
from launch.commands import DEMO, FAILED, ConfigOption, KnownPlatform

app = typer.Typer()
console = Console(highlight=False)
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON.")]


@app.command()
def doctor(config: ConfigOption = DEMO, platform: KnownPlatform = None, as_json: JsonOption = False) -> None:
    """Check this machine, the models and services of a configuration, and say how to mend what is wrong."""
    from launch.checks import failures, table
    from launch.doctor import examine
    from launch.local import home

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
