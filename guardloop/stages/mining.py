"""From verdicts on responses to a training set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guardloop.core.progress import Stage
from guardloop.core.records import EXAMPLE, HELD_OUT_PROMPT, Row, read_metadata, read_tables, write_jsonl, write_table
from guardloop.core.settings import read_section
from guardloop.mining.settings import MiningSettings
from guardloop.stages.files import BLOCKED_INPUTS, EXAMPLES, HELD_OUT, MINING, MINING_PAGE, Sections


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

    settings = read_section(MiningSettings, mining, "mining").model_copy(update={"seed": seed})
    folder = Path(training_set)
    with Stage("mine_feedback") as stage:
        stage.say("weighing the evidence")
        found = mine(read_tables(screened), read_tables(judged), settings)
        metadata = (
            {"screened": read_metadata(screened[0]), "judged": read_metadata(judged[0])} if screened and judged else {}
        )
        write_training_set(found, folder, metadata)
        kinds = ", ".join(f"{n} {kind}" for kind, n in found.counts.items())
        stage.done(len(found.examples), kinds if found.enough else f"not enough to train: {found.reason}")
    figures = {"positives": found.counts.get("positive", 0), "examples": len(found.examples), "blocked": found.blocked}
    return {k: float(v) for k, v in figures.items()}, found.enough


def write_training_set(found: Any, folder: Path, metadata: Row, examples: list[Row] | None = None) -> None:
    """Write a training set: the examples of mining, or others in their place, and what people read of it."""
    from guardloop.report.render import render_mining
    from guardloop.report.story import MinedExample, MiningSummary

    story = MiningSummary(
        enough=found.enough,
        reason=found.reason,
        screened=found.screened,
        passed=found.passed,
        responses=found.responses,
        refusals=found.refusals,
        blocked=found.blocked,
        held_out=len(found.held_out),
        counts=found.counts,
        lexical_weight=found.lexical_weight,
        examples=[MinedExample(**row) for row in found.shown],
    )
    write_table(found.examples if examples is None else examples, EXAMPLE, folder / EXAMPLES, lambda: metadata)
    write_table(found.held_out, HELD_OUT_PROMPT, folder / HELD_OUT, lambda: metadata)
    write_jsonl(found.blocked_inputs, folder / BLOCKED_INPUTS)
    (folder / MINING).write_text(story.model_dump_json(indent=2), "utf-8")
    (folder / MINING_PAGE).write_text(render_mining(story), "utf-8")
