"""Parts of the test set: which ones there are, and how the two guards compare on each."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from guardloop.evaluation.bootstrap import bootstrap, estimate
from guardloop.evaluation.metrics import Bools, Floats, Weights, auprc, curve, rank
from guardloop.evaluation.result import SliceResult
from guardloop.evaluation.settings import Dimension, EvaluationSettings
from guardloop.evaluation.table import Table

Metric = Literal["auprc", "fpr", "recall"]
POOLED = "other"
MIN_ROWS = 50
"""Distinct rows of a class that a slice needs before that class is measured: with fewer, intervals are as wide as the
losses that matter. Smaller slices of one dimension are pooled."""
LENGTHS = (200, 1000, 4000)
"""Characters at which the slices of the dimension `length` begin; fixed, so that reports can be compared."""


@dataclass(frozen=True)
class MeasuredSlice:
    """A slice, with what its p-values are computed from."""

    result: SliceResult
    error: float
    """Bootstrap standard error of the gain."""
    groups: int
    """Near-duplicate groups of the rows that were measured."""


def measure_slices(
    table: Table, thresholds: tuple[float, float], settings: EvaluationSettings, seed: int
) -> tuple[list[MeasuredSlice], list[str]]:
    """Measure every slice of the User-role `table` that is large enough; also notes on those that are not.

    `thresholds` are the baseline and the candidate's.
    """
    measured, notes = [], []
    for dimension in settings.slices:
        parts, too_small = _parts(table, dimension)
        for name, rows in parts.items():
            if (part := measure(table.take(rows), dimension, name, thresholds, settings.resamples, seed)) is not None:
                measured.append(part)
        if too_small:
            notes.append(f"Too few rows to measure apart, by {dimension}: {', '.join(too_small)}.")
    return measured, notes


def measure_responses(table: Table, thresholds: tuple[float, float], resamples: int, seed: int) -> list[MeasuredSlice]:
    """The `table` of responses as one slice; and where that is a ranking, what the guards decide of its unsafe and of
    its safe rows at their `thresholds` for responses. Empty where there are too few.
    """
    whole = measure(table, "role", "responses", thresholds, resamples, seed) if len(table) else None
    if whole is None or whole.result.metric != "auprc":
        return [whole] if whole else []
    classes = {"unsafe responses": table.unsafe, "safe responses": ~table.unsafe}
    parts = (measure(table.take(rows), "role", name, thresholds, resamples, seed) for name, rows in classes.items())
    return [whole, *(part for part in parts if part)]


def measure(
    table: Table, dimension: str, name: str, thresholds: tuple[float, float], resamples: int, seed: int
) -> MeasuredSlice | None:
    """Compare both guards on all rows of `table`; None when neither class has enough rows.

    AUPRC needs both classes; with one class too small, the other's error rate at the thresholds is measured.
    """
    metric = _metric(table)
    if metric is None:
        return None
    kept = table if metric == "auprc" else table.take(table.unsafe if metric == "recall" else ~table.unsafe)
    if metric == "auprc":
        rankings = [rank(scores, kept.unsafe) for scores in (kept.baseline, kept.candidate)]

        def statistic(weights: Weights) -> dict[str, Floats]:
            baseline, candidate = (auprc(curve(ranking, weights)) for ranking in rankings)
            return {"baseline": baseline, "candidate": candidate}
    else:
        flagged = np.stack([kept.baseline > thresholds[0], kept.candidate > thresholds[1]], axis=1)
        statistic = partial(flag_rates, flagged)
    point = statistic(np.ones((1, len(kept))))
    samples = bootstrap(statistic, kept.group, kept.unsafe, resamples, seed)
    sign = -1 if metric == "fpr" else 1
    gains = sign * (samples["candidate"] - samples["baseline"])
    baseline, candidate = float(point["baseline"][0]), float(point["candidate"][0])
    result = SliceResult(
        dimension=dimension,
        name=name,
        rows=len(table),
        unsafe=int(table.unsafe.sum()),
        metric=metric,
        baseline=baseline,
        candidate=candidate,
        gain=estimate(sign * (candidate - baseline), gains),
    )
    return MeasuredSlice(result, error=float(gains.std()), groups=kept.distinct(np.ones(len(kept), bool)))


def flag_rates(flagged: Bools, weights: Weights) -> dict[str, Floats]:
    """Weighted share flagged by the baseline and the candidate: `flagged[N, 2]`, weights[B, N]."""
    counts = [weights.take(np.flatnonzero(column), axis=1).sum(axis=1) for column in flagged.T]
    baseline, candidate = (count / weights.sum(axis=1) for count in counts)
    return {"baseline": baseline, "candidate": candidate}


def _metric(table: Table) -> Metric | None:
    unsafe, safe = table.distinct(table.unsafe) >= MIN_ROWS, table.distinct(~table.unsafe) >= MIN_ROWS
    if unsafe:
        return "auprc" if safe else "recall"
    return "fpr" if safe else None


def _parts(table: Table, dimension: Dimension) -> tuple[dict[str, Bools], list[str]]:
    """Rows [N] of each measurable slice, and the names of slices that stay too small even when pooled.

    A slice that is the whole table is left out: the headline is its measure.
    """
    names = _names(table, dimension)
    parts = {name: names == name for name in {name for name in names if name is not None}}
    large = {name: rows for name, rows in parts.items() if _metric(table.take(rows))}
    small = [name for name in parts if name not in large]
    if len(small) > 1:
        pooled = np.isin(names, small)
        if _metric(table.take(pooled)):
            large[POOLED if POOLED not in large else f"{POOLED} (pooled)"], small = pooled, []
    shortest = {name: int(table.length[rows].min()) if dimension == "length" else 0 for name, rows in large.items()}
    order = sorted(large, key=lambda name: (shortest[name], name))
    return {name: large[name] for name in order if not large[name].all()}, sorted(small)


def _names(table: Table, dimension: Dimension) -> NDArray[np.object_]:
    """The slice [N] that each row is in, None for none."""
    if dimension == "length":
        labels = [
            *(f"{a} to {b - 1} characters" for a, b in pairwise((0, *LENGTHS))),
            f"{LENGTHS[-1]} or more characters",
        ]
        return np.array(labels, object)[np.digitize(table.length, LENGTHS)]
    if dimension == "jailbreak":
        words = {True: "yes", False: "no", None: None}
        return np.array([words[value] for value in table.jailbreak], object)
    return {"category": table.category, "source": table.source, "language": table.language}[dimension]
