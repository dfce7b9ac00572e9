"""The command line: the commands of all groups, and how it ends."""

from typing import Annotated

import typer
from rich.markup import escape

from guardloop import __version__
from guardloop.cli import before, cluster, configuration, guard, registry, report, run, schedule, serve
from guardloop.cli.terminal import Terminal
from guardloop.core.errors import GuardLoopError
from guardloop.core.progress import show_clean_text

STOPPED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Find prompts that slip past a safeguard model, train it on them, and promote it only if it got better.",
)
for group in (run, guard, report, registry, serve, before, cluster):
    app.add_typer(group.app)
app.add_typer(configuration.app, name="config")
app.add_typer(schedule.app, name="schedule")


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit()


def main() -> None:
    """Entry point: problems that the user can mend end with exit code 2 and no traceback."""
    show_clean_text()
    try:
        app()
    except GuardLoopError as error:
        Terminal(stderr=True).print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise SystemExit(2) from None
    except SystemExit as end:
        if end.code == STOPPED:  # typer's answer to Ctrl-C
            Terminal(stderr=True).print("stopped")
        raise


if __name__ == "__main__":
    main()
