"""From verdicts on responses to a training set."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from guardloop.core.progress import Stage
from guardloop.core.records import EXAMPLE, HELD_OUT_PROMPT, Row, read_metadata, read_tables, write_jsonl, write_table
from guardloop.core.settings import read_section
from guardloop.mining.settings import MiningSettings
from guardloop.stages.files import BLOCKED_INPUTS, EXAMPLES, HELD_OUT, MINING, MINING_PAGE, Sections

if TYPE_CHECKING:
    from guardloop.mining.mine import MiningResult


def mine_feedback(
    screened: Sequence[str | Path],
    judged: Sequence[str | Path],
    training_set: str | Path,
    mining: Sections,
    seed: int = 0,
) -> tuple[dict[str, float], bool]:
    """Write the training set (a folder: examples, blocked_inputs.jsonl, mining.json and its page).

    Returns figures, and whether there is enough to train on.
    """
    from guardloop.mining.mine import mine

    settings = read_section(MiningSettings, mining, "mining")
    with Stage("mine_feedback") as stage:
        stage.say("weighing the evidence")
        result = mine(read_tables(screened), read_tables(judged), settings, seed)
        stage.say(result.smoothing)
        tables = {"screened": screened, "judged": judged}
        metadata = {name: read_metadata(paths[0]) for name, paths in tables.items() if paths}
        write_training_set(result, Path(training_set), metadata)
        kinds = ", ".join(f"{n} {kind}" for kind, n in result.counts.items())
        stage.done(len(result.examples), kinds if result.enough else f"not enough to train: {result.reason}")
    figures = {"positives": result.counts.get("positive", 0), "examples": len(result.examples)}
    return {name: float(n) for name, n in (figures | {"blocked": result.blocked}).items()}, result.enough


def write_training_set(result: "MiningResult", folder: Path, metadata: Row, examples: list[Row] | None = None) -> None:
    """Write a training set: the examples of mining, or others in their place, and what people read of it."""
    from guardloop.report.render import render_mining
    from guardloop.report.story import MinedExample, MiningSummary

    summary = MiningSummary(
        enough=result.enough,
        reason=result.reason,
        screened=result.screened,
        passed=result.passed,
        responses=result.responses,
        refusals=result.refusals,
        blocked=result.blocked,
        held_out=len(result.held_out),
        counts=result.counts,
        lexical_weight=result.lexical_weight,
        smoothing=result.smoothing,
        examples=[MinedExample(**row) for row in result.shown],
    )
    write_table(result.examples if examples is None else examples, EXAMPLE, folder / EXAMPLES, lambda: metadata)
    write_table(result.held_out, HELD_OUT_PROMPT, folder / HELD_OUT, lambda: metadata)
    write_jsonl(result.blocked_inputs, folder / BLOCKED_INPUTS)
    (folder / MINING).write_text(summary.model_dump_json(indent=2), "utf-8")
    (folder / MINING_PAGE).write_text(render_mining(summary), "utf-8")
