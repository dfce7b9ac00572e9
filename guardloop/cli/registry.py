"""The commands for registered guards: review, promote, rollback and ui."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from guardloop.cli.options import DEMO, ConfigOption, JsonOption, console, settings_of
from guardloop.core.places import tracking_uri

if TYPE_CHECKING:
    from guardloop.registry.registry import Registry

app = typer.Typer()


@app.command()
def review(config: ConfigOption = DEMO, as_json: JsonOption = False) -> None:
    """List the registered guards: what the gate said of each, and which is in use."""
    versions = _registry(config).versions()
    if as_json:
        typer.echo(json.dumps([{**c.__dict__, "created": c.created.isoformat()} for c in versions], indent=2))
        return
    table = Table("version", "created", "aliases", "gate", "AUPRC", "why", box=None, pad_edge=False)
    for c in versions:
        change = f"{c.metrics.get('baseline_auprc', 0):.3f} → {c.metrics.get('candidate_auprc', 0):.3f}"
        why = f"{c.headline} Forced: {c.force_reason}" if c.force_reason else c.headline
        created = f"{c.created:%Y-%m-%d %H:%M}"
        table.add_row(str(c.version), created, ", ".join(c.aliases), c.verdict, change, escape(why))
    console.print(table if versions else "no guard is registered yet: `guardloop run` trains one")


@app.command()
def promote(
    version: Annotated[int, typer.Argument(help="Version of the registered model.")],
    config: ConfigOption = DEMO,
    force: Annotated[str, typer.Option("--force", help="Promote against the gate, for this reason.")] = "",
) -> None:
    """Make a version the champion; refused where the gate did not pass it."""
    before = _registry(config).promote(version, force)
    console.print(f"version {version} is the champion" + (f"; version {before} is kept as previous" if before else ""))


@app.command()
def rollback(config: ConfigOption = DEMO) -> None:
    """Bring the previous champion back."""
    console.print(f"version {_registry(config).rollback()} is the champion again")


@app.command()
def ui(port: Annotated[int, typer.Option(help="Port of the page.", min=1, max=65535)] = 5000) -> None:
    """Open MLflow on the runs and guards of this machine."""
    address = tracking_uri()
    console.print(f"MLflow on {address}: open http://127.0.0.1:{port} (Ctrl-C ends it)")
    arguments = ["ui", "--backend-store-uri", address, "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *arguments])


def _registry(config: Path) -> "Registry":
    from guardloop.registry.registry import Registry

    os.environ.setdefault("MLFLOW_TRACKING_URI", tracking_uri())
    return Registry(settings_of(config).registry)
