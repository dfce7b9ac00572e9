"""What a terminal shows of a run: a bar for each stage at work, a line for each that ended."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from launch.local.runs import Run

POLL_SECONDS = 0.2
SAY_SECONDS = 30.0


def draw(run: Run, is_alive: Callable[[], bool], console: Console) -> None:
    """Follow the events of a run until its process ends, and keep in `run` what its stages report."""
    progress = Progress(
        TextColumn("  [bold]{task.description}[/] {task.fields[doing]}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    bars: dict[str, TaskID] = {}
    with progress, (run.folder / "events.jsonl").open(encoding="utf-8") as events:
        alive = True
        while alive:
            alive = is_alive()
            for event in _new(events):
                _show(event, run, progress, bars)
            time.sleep(POLL_SECONDS if alive else 0)


def _new(events: Any) -> Iterator[dict[str, Any]]:
    while True:
        place = events.tell()
        line = events.readline()
        if not line.endswith("\n"):
            events.seek(place)
            return
        yield json.loads(line)


def _show(event: dict[str, Any], run: Run, progress: Progress, bars: dict[str, TaskID]) -> None:
    name, kind = event["stage"], event["event"]
    console = progress.console
    if kind == "start":
        bars[name] = progress.add_task(escape(title(name)), total=None, doing="", rate="", last_said=event["at"])
    elif kind == "progress" and name in bars:
        _say_without_terminal(event, progress, bars[name])
        rate = f"{event['rate']:.1f}/s {event.get('note') or ''}" if event.get("rate") else ""
        progress.update(
            bars[name], completed=event.get("done", 0), total=event.get("total"), doing=event["doing"], rate=rate
        )
    elif kind in ("done", "failed"):
        if name in bars:
            progress.remove_task(bars.pop(name))
        shown = f"{escape(title(name)):<26}"
        if kind == "failed":
            run.failure = run.failure or event
            console.print(f"  [red]✗[/] {shown} [red]failed[/] after {event['seconds']:.0f} s")
        else:
            run.stages.append(event)
            line = f"  [green]✓[/] {shown} [dim]{event['seconds']:6.1f} s[/]  {escape(event['outcome'])}"
            console.print(line, highlight=False, soft_wrap=True)


def title(stage: str) -> str:
    """A stage as people say it: `screen prompts 1` for the events of `screen prompts [0]`."""
    name, bracket, shard = stage.replace("_", " ").partition(" [")
    return f"{name}, part {int(shard.rstrip(']')) + 1}" if bracket else name


def _say_without_terminal(event: dict[str, Any], progress: Progress, bar: TaskID) -> None:
    """Where no bar can be drawn, a line now and then."""
    task = progress.tasks[progress.task_ids.index(bar)]
    if progress.console.is_terminal or event["at"] - task.fields["last_said"] < SAY_SECONDS:
        return
    progress.update(bar, last_said=event["at"])
    share = f" {event['done']}/{event['total']}" if event.get("total") else ""
    line = f"    {title(event['stage'])}: {event['doing']}{share}"
    progress.console.print(line, highlight=False, markup=False)
