"""The command that shows a sample report."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from guardloop.cli.options import console
from guardloop.core.errors import GuardLoopError
from guardloop.core.places import home

app = typer.Typer()


@app.command(name="demo-report")
def demo_report(
    out: Annotated[Path | None, typer.Option(help="Write the page here, and open nothing.")] = None,
) -> None:
    """Open a sample report: what a run ends with, on data that was made up."""
    from guardloop.report.sample import sample_report

    path = out or home() / "demo-report.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sample_report(), "utf-8")
    except OSError as error:
        raise GuardLoopError(f"cannot write {path}: {error.strerror or error}", "choose another place: --out") from None
    console.print(str(path), soft_wrap=True, markup=False)
    if out is None and not webbrowser.open(path.absolute().as_uri()):
        console.print("no browser was found here: open that file in one")
