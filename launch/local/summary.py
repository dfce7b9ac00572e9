"""The end of a run: one table of the stages, the decision in plain words, and where to look next."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from guardloop.core.progress import short
from guardloop.evaluation.result import INTERVAL, Evaluation
from guardloop.evaluation.wording import with_interval
from guardloop.report.summary import held_out_line, metric_rows
from guardloop.stages import BLOCKED_INPUTS, EVALUATION, MINING, MINING_PAGE, REPORT
from launch.local.drawing import title
from launch.local.runs import Run

SHOWN = ("auprc", "recall_near_baseline_fpr", "recall", "fpr", "precision", "f1", "accuracy", "auroc")


def conclude(run: Run, console: Console) -> dict[str, Any]:
    """Print the tables and the decision, and write summary.json into the run's folder. Returns what it holds."""
    evaluated, training_set = run.artifact("evaluated"), run.artifact("training_set")
    evaluation = None
    if evaluated and (evaluated / EVALUATION).is_file():
        evaluation = Evaluation.model_validate_json((evaluated / EVALUATION).read_text("utf-8"))
    mined = json.loads((training_set / MINING).read_text("utf-8")) if training_set else None
    decision, words = _decision(run, evaluation, mined)
    console.print()
    console.print(_stage_table(run))
    if evaluation:
        console.print()
        console.print(_metric_table(evaluation))
        if evaluation.held_out:
            console.print(f"\n{held_out_line(evaluation.held_out)}", width=100)
    colour = {"promoted": "green", "done": "green"}.get(decision, "yellow")
    console.print()
    console.print(Panel(escape(words), title=decision, border_style=colour, title_align="left", width=100))
    for name, place in _places(run, evaluated, training_set).items():
        console.print(f"  {name:<9} {place}", soft_wrap=True)
    summary = {
        "run": run.id,
        "pipeline": run.pipeline,
        "decision": decision,
        "headline": words,
        "seconds": round(run.seconds, 1),
        "stages": [{k: s[k] for k in ("stage", "items", "seconds", "outcome")} for s in run.stages],
        "mining": {k: v for k, v in mined.items() if k != "examples"} if mined else None,
        "evaluation": evaluation.model_dump(mode="json") if evaluation else None,
    }
    (run.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    return summary


def _decision(run: Run, evaluation: Evaluation | None, mined: dict[str, Any] | None) -> tuple[str, str]:
    if evaluation:
        return "promoted" if evaluation.decision.promote else "not promoted", evaluation.decision.headline
    if mined and not mined["enough"]:
        return "nothing to train on", f"The run ended early: {mined['reason']}."
    return "done", f"{run.pipeline} finished."


def _stage_table(run: Run) -> Table:
    table = Table("stage", box=None, pad_edge=False, header_style="bold")
    for name in ("items", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("result")
    for stage in run.stages:
        table.add_row(title(stage["stage"]), f"{stage['items']:,}", f"{stage['seconds']:.1f}", escape(stage["outcome"]))
    table.add_row("whole run", "", f"{run.seconds:.1f}", "with the start of each stage's process", style="bold")
    return table


def _metric_table(evaluation: Evaluation) -> Table:
    title = f"test set: {evaluation.rows} prompts, {evaluation.unsafe} unsafe"
    table = Table(title, box=None, pad_edge=False, header_style="bold")
    for name in ("baseline", "candidate", f"change ({INTERVAL})"):
        table.add_column(name, justify="right")
    for row in metric_rows(evaluation.metrics, SHOWN):
        values = (f"{estimate.value:.3f}" for estimate in (row.baseline, row.candidate))
        table.add_row(row.name, *values, with_interval(row.change))
    return table


def _places(run: Run, evaluated: Path | None, training_set: Path | None) -> dict[str, str]:
    """Where to look next; what people open has a link in the run's folder, which is shorter to type."""
    places = {}
    if evaluated:
        places["report"] = short(_link(run, evaluated / REPORT))
    if training_set:
        _link(run, training_set / BLOCKED_INPUTS)
        places["mining"] = f"{short(_link(run, training_set / MINING_PAGE))} and {BLOCKED_INPUTS} beside it"
    if evaluated:
        places["registry"] = "make ui opens MLflow; guardloop review lists the candidates"
    return {**places, "log": short(run.log)}


def _link(run: Run, file: Path) -> Path:
    link = run.folder / file.name
    link.unlink(missing_ok=True)
    link.symlink_to(file.relative_to(run.folder))
    return link
