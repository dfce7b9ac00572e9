"""The lessons of each arm: the recipe's, and those of every control that it must beat."""

import random
from collections.abc import Sequence

from sklearn.metrics import average_precision_score

from bench.experiment.settings import Arm, ExperimentSettings, Subset
from guardloop.core.records import Row
from guardloop.core.settings import read_section
from guardloop.mining.evidence import gather
from guardloop.mining.mine import MiningResult, is_held_out, mine
from guardloop.mining.settings import MiningSettings


def lessons(
    arm: Arm, screened: Sequence[Row], judged: Sequence[Row], settings: ExperimentSettings
) -> tuple[list[Row], MiningResult]:
    """The arm's training examples (records.EXAMPLE), and the mined that the recipe makes of the same evidence."""
    mining = read_section(MiningSettings, {**settings.mining.plain(), **arm.mining}, f"arms.{arm.name}")
    kept = [
        row
        for row in judged
        if (not arm.responders or row["responder"] in arm.responders)
        and (arm.samples is None or row["sample"] < arm.samples)
    ]
    mined = mine(screened, kept, mining)
    if arm.lessons == "recipe":
        return mined.examples, mined
    seen = [row for row in screened if row["score"] is not None and not is_held_out(row["group"], mining)]
    if arm.lessons == "self":
        return [_example(row, float(row["flagged"]), "self") for row in seen], mined
    if arm.lessons == "gold":
        replayed = [row for row in mined.examples if row["kind"] == "replay_response"]
        return [_example(row, float(row["unsafe"]), "gold") for row in seen if row["unsafe"] is not None] + replayed, (
            mined
        )
    passed = {row["id"]: row for row in seen if not row["flagged"]}
    evidence = {id: found for id, found in gather(kept).items() if id in passed}
    found = {id for id, e in evidence.items() if e.is_positive(mining)}
    examples = [_example(passed[id], 1.0, "positive") for id in sorted(found)]
    if arm.lessons == "balanced":
        others = sorted(set(passed) - found)
        chosen = random.Random(mining.seed).sample(others, min(len(others), len(found)))
        examples += [_example(passed[id], 0.0, "random") for id in chosen]
    return examples, mined


def ranking(
    examples: Sequence[Row], screened: Sequence[Row], subsets: Sequence[Subset]
) -> dict[str, tuple[float, float]]:
    """AUPRC of the baseline's score and of the targets on the passed prompts, by subset that has both classes.

    The data's labels are looked at here to see what was taught, and nowhere else.
    """
    taught = {row["id"]: row["target"] for row in examples if row["response"] is None}
    known = [row for row in screened if row["id"] in taught and not row["flagged"] and row["unsafe"] is not None]
    found = {}
    for subset in subsets:
        rows = [row for row in known if row["source"].startswith(subset.source)]
        labels = [row["unsafe"] for row in rows]
        if len(set(labels)) > 1:
            own, target = ([row["score"] for row in rows], [taught[row["id"]] for row in rows])
            found[subset.name] = (average_precision_score(labels, own), average_precision_score(labels, target))
    return found


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
