"""The training examples of each arm: the recipe's, and those of every control that it must beat."""

import random
from collections.abc import Sequence

from sklearn.metrics import average_precision_score

from bench.experiment.settings import Arm, ExperimentSettings, Subset
from guardloop.core.records import Row
from guardloop.core.settings import read_section
from guardloop.mining.evidence import gather
from guardloop.mining.mine import MiningResult, is_held_out, mine
from guardloop.mining.settings import MiningSettings


def arm_examples(
    arm: Arm, screened: Sequence[Row], judged: Sequence[Row], settings: ExperimentSettings
) -> tuple[list[Row], MiningResult]:
    """The arm's training examples (records.EXAMPLE), and what the recipe mines from the same evidence."""
    mining = read_section(MiningSettings, {**settings.mining.plain(), **arm.mining}, f"arms.{arm.name}")
    kept = [
        row
        for row in judged
        if (not arm.responders or row["responder"] in arm.responders)
        and (arm.samples is None or row["sample"] < arm.samples)
    ]
    mined = mine(screened, kept, mining)
    known = [row for row in screened if row["score"] is not None and not is_held_out(row["group"], mining.held_out)]
    match arm.examples:
        case "recipe":
            examples = mined.examples
        case "self":
            examples = [_example(row, float(row["flagged"]), "self") for row in known]
        case "gold":
            examples = [_example(row, float(row["unsafe"]), "gold") for row in known if row["unsafe"] is not None]
            examples += [row for row in mined.examples if row["kind"] == "replay_response"]
        case "positives" | "balanced":
            passed = {row["id"]: row for row in known if not row["flagged"]}
            evidence = {id: e for id, e in gather(kept).items() if id in passed}
            positives = {id for id, e in evidence.items() if e.is_positive(mining.min_blocked_share)}
            examples = [_example(passed[id], 1.0, "positive") for id in sorted(positives)]
            if arm.examples == "balanced":
                others = sorted(set(passed) - positives)
                drawn = random.Random(0).sample(others, min(len(others), len(positives)))
                examples += [_example(passed[id], 0.0, "random") for id in drawn]
    return examples, mined


def ranking(
    examples: Sequence[Row], screened: Sequence[Row], subsets: Sequence[Subset]
) -> dict[str, tuple[float, float]]:
    """AUPRC of the baseline's score and of the targets on the passed prompts, by subset that has both classes.

    The data's labels are used here to measure the targets, and nowhere else.
    """
    targets = {row["id"]: row["target"] for row in examples if row["response"] is None}
    known = [row for row in screened if row["id"] in targets and not row["flagged"] and row["unsafe"] is not None]
    ranked = {}
    for subset in subsets:
        rows = [row for row in known if row["source"].startswith(subset.source)]
        labels = [row["unsafe"] for row in rows]
        if len(set(labels)) > 1:
            by_score = average_precision_score(labels, [row["score"] for row in rows])
            by_target = average_precision_score(labels, [targets[row["id"]] for row in rows])
            ranked[subset.name] = (by_score, by_target)
    return ranked


def _example(row: Row, target: float, kind: str) -> Row:
    return {
        "id": row["id"],
        "prompt": row["prompt"],
        "response": None,
        "target": target,
        "weight": 1.0,
        "kind": kind,
        "reason": f"the control {kind}",
        "group": row["group"],
    }
