"""Traffic that was held out of the training set, labelled by its judged responses.

A prompt that passed the baseline's input check and then drew blocked responses should be caught; one that never
did should still pass. The label is the frozen judge's, not a person's: it shows whether the candidate learnt what it
was trained on, and not whether that was right.
"""

from collections.abc import Iterable

import numpy as np
from scipy.stats import binomtest

from guardloop.core.records import Row
from guardloop.evaluation.bootstrap import TAIL, bootstrap
from guardloop.evaluation.metrics import Floats, Weights, auprc, curve, rank, recall_at_fpr
from guardloop.evaluation.paired import GuardRun, paired_estimate
from guardloop.evaluation.result import Estimate, HeldOutResult


def measure_held_out(
    rows: Iterable[Row], candidate: GuardRun, resamples: int, seed: int
) -> tuple[HeldOutResult | None, list[str]]:
    """Measure rows of `records.HELD_OUT_PROMPT` with the candidate's `score`. Also gives notes for the report.

    None where one of the two kinds of prompt is missing. Shares have exact binomial intervals (Clopper and Pearson),
    as a bootstrap of 0 of 12 would claim certainty; their differences have paired bootstrap intervals.
    """
    kept = [row for row in rows if row["response_unsafe"] is not None and row["score"] is not None]
    unsafe = np.array([row["response_unsafe"] for row in kept], dtype=bool)
    if not kept or unsafe.all() or not unsafe.any():
        kinds = f"{int(unsafe.sum())} have blocked responses, {int((~unsafe).sum())} have none"
        return None, [f"Held-out prompts were not measured: both kinds are needed, and {kinds}."]
    group = np.unique([row["group"] for row in kept], return_inverse=True)[1].astype(np.int64)
    scores = {
        "baseline": np.array([row["prompt_score"] for row in kept], dtype=np.float64),
        "candidate": np.array([row["score"] for row in kept], dtype=np.float64),
    }
    rankings = {name: rank(values, unsafe) for name, values in scores.items()}
    flagged = scores["candidate"] > candidate.threshold
    blocked = flagged & ~unsafe

    def statistic(weights: Weights) -> dict[str, Floats]:
        curves = {name: curve(ranking, weights) for name, ranking in rankings.items()}
        newly_blocked = weights[:, blocked].sum(axis=1) / curves["candidate"].safe
        values: dict[str, Floats] = {}
        for name, c in curves.items():  # each read off its own curve, so that neither has the finer threshold
            values |= {f"{name}/auprc": auprc(c), f"{name}/matched": recall_at_fpr(c, newly_blocked)}
        return values

    point = statistic(np.ones((1, len(kept))))
    samples = bootstrap(statistic, group, unsafe, resamples, seed)
    matched = paired_estimate("matched", point, samples)
    result = HeldOutResult(
        prompts=len(kept),
        response_unsafe=int(unsafe.sum()),
        never_unsafe=int((~unsafe).sum()),
        caught=_share(int((flagged & unsafe).sum()), int(unsafe.sum())),
        newly_blocked=_share(int(blocked.sum()), int((~unsafe).sum())),
        control=matched.baseline,
        beyond_control=matched.change,
        auprc=paired_estimate("auprc", point, samples),
    )
    return result, []


def _share(part: int, whole: int) -> Estimate:
    interval = binomtest(part, whole).proportion_ci(1 - 2 * TAIL, method="exact")
    return Estimate(value=part / whole, low=float(interval.low), high=float(interval.high))
