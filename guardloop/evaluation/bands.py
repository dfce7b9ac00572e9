"""Bands around a guard's curves: how far they move from one resample of the test set to the next."""

from dataclasses import dataclass

import numpy as np

from guardloop.evaluation.bootstrap import bootstrap
from guardloop.evaluation.metrics import Bools, Floats, Ints, Weights, curve, rank, ratio, recall_at_fpr

RESAMPLES = 400
GRID = np.linspace(0, 1, 51)


@dataclass(frozen=True)
class Band:
    """Pointwise 95% interval of a curve: low[P] and high[P] at x[P]."""

    x: Floats
    low: Floats
    high: Floats


def curve_bands(scores: Floats, unsafe: Bools, group: Ints, seed: int = 0) -> tuple[Band, Band]:
    """Bands of the precision-recall and the ROC curve of `scores[N]`; both classes must be present."""
    ranking = rank(scores, unsafe)

    def statistic(weights: Weights) -> dict[str, Floats]:
        c = curve(ranking, weights)
        precision = ratio(c.caught, c.caught + c.blocked)
        values: dict[str, Floats] = {}
        for i, at in enumerate(GRID):
            values[f"roc {i}"] = recall_at_fpr(c, float(at))
            wanted = np.maximum(at * c.unsafe * (1 - 1e-9), 0.5)  # before the first is caught there is no precision
            reached = (c.caught < wanted[:, None]).sum(axis=1)
            values[f"pr {i}"] = np.take_along_axis(precision, reached[:, None], axis=1)[:, 0]
        return values

    samples = bootstrap(statistic, group, unsafe, RESAMPLES, seed)

    def band(kind: str) -> Band:
        ends = np.quantile([samples[f"{kind} {i}"] for i in range(len(GRID))], [0.025, 0.975], axis=1)
        return Band(GRID, ends[0], ends[1])

    return band("pr"), band("roc")
