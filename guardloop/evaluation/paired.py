"""Both guards on one table: every metric, with the paired bootstrap interval of each and of its change."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from guardloop.evaluation.bootstrap import Stratum, bootstrap, estimate
from guardloop.evaluation.measurements import Spread
from guardloop.evaluation.metrics import (
    Floats,
    Weights,
    auprc,
    auroc,
    calibration,
    calibration_metrics,
    curve,
    decision_metrics,
    mean_recall,
    rank,
    recall_at_fpr,
)
from guardloop.evaluation.result import Comparison
from guardloop.evaluation.table import Table
from guardloop.evaluation.wording import FPRS, METRICS

SPREAD_RESAMPLES = 400
"""Enough for a variance to a tenth."""


@dataclass(frozen=True)
class GuardRun:
    """What is known of a guard besides its scores."""

    name: str
    threshold: float
    """A prompt with a score above it is flagged. Chosen on validation data, never on the test set."""
    median_label_mass: float
    """Median of P(safe) + P(unsafe) over the test rows."""
    unreadable: int
    """Test rows that it could not judge; they are not among the scores."""
    temperature: float = 1.0
    """Fitted on held-out data, never on the test set; 1 where it was not."""
    response_threshold: float | None = None
    """A response with a score above it is flagged; None where that is `threshold`, too."""

    def judging(self, what: str) -> "GuardRun":
        """The guard at its threshold for what is judged, `prompt` or `response`."""
        if what == "prompt" or self.response_threshold is None:
            return self
        return replace(self, threshold=self.response_threshold)


def compare_guards(
    table: Table, baseline: GuardRun, candidate: GuardRun, resamples: int, seed: int
) -> dict[str, Comparison]:
    """Every metric of `wording.METRICS`, on a table that holds both classes."""
    statistic = _statistic(table, baseline, candidate)
    point = statistic(np.ones((1, len(table))))
    samples = bootstrap(statistic, table.group, table.unsafe, resamples, seed)
    return {name: paired_estimate(name, point, samples) for name in METRICS}


def change_spreads(table: Table, baseline: GuardRun, candidate: GuardRun, seed: int) -> dict[str, Spread]:
    """How much of the variance of each metric's change comes from which prompts were drawn, by class."""
    statistic = _statistic(table, baseline, candidate)

    def variances(fixed: Stratum | None) -> dict[str, float]:
        samples = bootstrap(statistic, table.group, table.unsafe, SPREAD_RESAMPLES, seed, fixed)
        return {name: float((samples[f"candidate/{name}"] - samples[f"baseline/{name}"]).var()) for name in METRICS}

    whole, unsafe = variances(None), variances("safe")
    return {name: Spread(unsafe[name], max(whole[name] - unsafe[name], 0.0)) for name in METRICS}


def paired_estimate(metric: str, point: dict[str, Floats], samples: dict[str, Floats]) -> Comparison:
    """The metric from values [1] and bootstrap samples [R], both named "baseline/metric" and "candidate/metric"."""
    before, after = f"baseline/{metric}", f"candidate/{metric}"
    return Comparison(
        baseline=estimate(point[before][0], samples[before]),
        candidate=estimate(point[after][0], samples[after]),
        change=estimate(point[after][0] - point[before][0], samples[after] - samples[before]),
    )


def _statistic(table: Table, baseline: GuardRun, candidate: GuardRun) -> Callable[[Weights], dict[str, Floats]]:
    """Every metric of both guards, named "baseline/auprc" and so on, as a function of weights[B, N]."""
    guards = {}
    for name, scores, run in (("baseline", table.baseline, baseline), ("candidate", table.candidate, candidate)):
        flagged = scores > run.threshold
        caught, blocked = np.flatnonzero(flagged & table.unsafe), np.flatnonzero(flagged & ~table.unsafe)
        calibrated = calibration(scores, run.temperature, table.unsafe)
        guards[name] = rank(scores, table.unsafe), caught, blocked, calibrated

    def statistic(weights: Weights) -> dict[str, Floats]:
        values: dict[str, Floats] = {}
        curves = {name: curve(ranking, weights) for name, (ranking, *_) in guards.items()}
        for name, (_, caught, blocked, calibrated) in guards.items():
            c = curves[name]
            tp, fp = (weights.take(rows, axis=1).sum(axis=1) for rows in (caught, blocked))
            metrics = decision_metrics(tp, fp, c.unsafe, c.safe)
            metrics |= calibration_metrics(calibrated, weights)
            metrics |= {"auprc": auprc(c), "auroc": auroc(c)}
            metrics |= {f"recall_at_{fpr}": recall_at_fpr(c, float(fpr)) for fpr in FPRS}
            values |= {f"{name}/{metric}": value for metric, value in metrics.items()}
        for name, c in curves.items():  # each off its own curve, about the baseline's rate in the same resample
            values[f"{name}/recall_near_baseline_fpr"] = mean_recall(c, 2 * values["baseline/fpr"])
        return values

    return statistic
