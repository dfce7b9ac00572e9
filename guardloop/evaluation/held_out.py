"""The second target: prompts held out of the training set, labelled by what became of them.

A prompt that passed the baseline's input check and then drew blocked responses should be caught; one that never
did should still pass. The label is the frozen judge's, not a person's, so it says whether the lesson was learnt, and
not whether the lesson was right.
"""

from collections.abc import Iterable

import numpy as np
from scipy.stats import binomtest

from guardloop.core.records import Row
from guardloop.evaluation.bootstrap import bootstrap
from guardloop.evaluation.metrics import Floats, Weights, auprc, curve, rank, recall_at_fpr
from guardloop.evaluation.paired import GuardRun, paired_estimate
from guardloop.evaluation.result import Estimate, HeldOutResult
from guardloop.evaluation.settings import EvaluationSettings


def measure_held_out(
    rows: Iterable[Row], candidate: GuardRun, settings: EvaluationSettings
) -> tuple[HeldOutResult | None, list[str]]:
    """Measure held-out prompts: rows of `records.HELD_OUT_PROMPT` with the candidate's `score`. Also notes on it.

    None where one of the two kinds of prompt is missing. Shares have exact binomial intervals (Clopper and Pearson),
    as a bootstrap of 0 of 12 would claim certainty; their differences have paired bootstrap intervals.
    """
    kept = [row for row in rows if row["response_unsafe"] is not None and row["score"] is not None]
    unsafe = np.array([row["response_unsafe"] for row in kept], dtype=bool)
    if not kept or unsafe.all() or not unsafe.any():
        found = f"{int(unsafe.sum())} prompts with blocked responses and {int((~unsafe).sum())} without"
        return None, [f"Held-out prompts was not measured: it has {found}."]
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
        for name, found in curves.items():  # each read off its own curve, so that neither has the finer threshold
            values |= {f"{name}/auprc": auprc(found), f"{name}/matched": recall_at_fpr(found, newly_blocked)}
        return values

    point = statistic(np.ones((1, len(kept))))
    samples = bootstrap(statistic, group, unsafe, settings.resamples, settings.seed)
    matched = paired_estimate("matched", point, samples, settings.confidence)
    result = HeldOutResult(
        prompts=len(kept),
        response_unsafe=int(unsafe.sum()),
        never_unsafe=int((~unsafe).sum()),
        caught=_share(int((flagged & unsafe).sum()), int(unsafe.sum()), settings.confidence),
        newly_blocked=_share(int(blocked.sum()), int((~unsafe).sum()), settings.confidence),
        control=matched.baseline,
        beyond_control=matched.gain,
        auprc=paired_estimate("auprc", point, samples, settings.confidence),
    )
    return result, []


def _share(part: int, whole: int, confidence: float) -> Estimate:
    interval = binomtest(part, whole).proportion_ci(confidence, method="exact")
    return Estimate(value=part / whole, low=float(interval.low), high=float(interval.high))
