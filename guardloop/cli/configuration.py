"""The commands that show settings: config show and config fields."""

import json

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from guardloop.cli.options import DEMO, ConfigArgument, JsonOption, console, settings_of
from guardloop.config import describe_fields

app = typer.Typer(no_args_is_help=True, help="Look at the settings.")


@app.command()
def show(config: ConfigArgument = DEMO, as_json: JsonOption = False) -> None:
    """Print every setting of a configuration, defaults included."""
    sections = settings_of(config).model_dump(mode="json")
    typer.echo(json.dumps(sections, indent=2) if as_json else yaml.safe_dump(sections, sort_keys=False).rstrip())


@app.command()
def fields(as_json: JsonOption = False) -> None:
    """List every setting with its type, default and meaning."""
    rows = list(describe_fields())
    if as_json:
        names = ("setting", "type", "default", "meaning")
        typer.echo(json.dumps([dict(zip(names, row, strict=True)) for row in rows], indent=2))
        return
    table = Table("setting", "default", "meaning", box=None, pad_edge=False, header_style="bold")
    for name, _, default, meaning in rows:
        table.add_row(escape(name), escape(default), escape(meaning))
    console.print(table)
