"""Running an earlier run again, and comparing what came out, file by file."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.local.run import run_again
from launch.local.runs import Run, made_with

NOT_COMPARED = frozenset({"executor_output.json", "report", "report.html", "summary", "summary.md"})
"""Files that name the run, its time and its place."""


@dataclass(frozen=True)
class Compared:
    """A file of both runs: its SHA-256 in each, or None where it is missing."""

    name: str
    before: str | None
    after: str | None

    @property
    def same(self) -> bool:
        """Whether both runs wrote the same bytes."""
        return self.before == self.after


def reproduce(earlier: Run, console: Console) -> list[Compared]:
    """Run `earlier` again, and print and return how its artifacts compare.

    Raises GuardLoopError where the run cannot be repeated, or left no artifacts.
    """
    for change in changed(earlier):
        console.print(f"  [yellow]![/] {escape(change)}")
    again = run_again(earlier, console)
    compared = list(compare(earlier.folder, again.folder))
    console.print(_table(compared, earlier, again))
    different = sum(not one.same for one in compared)
    console.print(
        f"{different} of {len(compared)} artifacts differ"
        if different
        else f"all {len(compared)} artifacts are the same"
    )
    return compared


def changed(earlier: Run) -> Iterator[str]:
    """What is not as it was when `earlier` ran."""
    record, now = earlier.record, made_with()
    if record.get("code") != now["code"]:
        yield f"the code was {record.get('code') or 'not recorded'}, and is {now['code'] or 'no checkout'}"
    before = record.get("versions", {})
    yield from (
        f"{name} was {before.get(name, 'not recorded')}, and is {value}"
        for name, value in now["versions"].items()
        if before.get(name) != value
    )


def compare(before: Path, after: Path) -> Iterator[Compared]:
    """The artifacts of two runs, by stage and name."""
    old, new = _hashes(before), _hashes(after)
    for name in sorted(old | new):
        yield Compared(name, old.get(name), new.get(name))


def _hashes(run: Path) -> dict[str, str]:
    compared = {}
    for path in (run / "artifacts").glob("*/**/*"):
        if path.is_file() and path.name not in NOT_COMPARED:
            with path.open("rb") as file:
                name = "/".join(path.relative_to(run / "artifacts").parts[1:])  # without the time of its start
                compared[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return compared


def _table(compared: list[Compared], earlier: Run, again: Run) -> Table:
    table = Table("artifact", earlier.id, again.id, "", box=None, pad_edge=False, header_style="bold")
    for one in compared:
        word = "[green]same[/]" if one.same else "[red]differs[/]" if one.before and one.after else "[red]missing[/]"
        table.add_row(one.name, (one.before or "-")[:12], (one.after or "-")[:12], word)
    return table
