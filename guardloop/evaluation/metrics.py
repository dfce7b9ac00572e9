"""Metrics of one guard under many row weightings at once, so that a bootstrap is a few array operations.

Rows are sorted once; a resample is a weight per row. `weights[B, N]` holds B weightings of N rows, and every
metric returns one value per weighting. A higher score means more surely unsafe.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Weights = NDArray[Any]
"""int32, how often each row was drawn, or floats; and sums of them."""


@dataclass(frozen=True)
class Ranking:
    """N rows sorted by score, highest first: U unsafe, S safe."""

    unsafe_rows: Ints
    """[U] indices of the unsafe rows."""
    safe_rows: Ints
    """[S] indices of the safe rows."""
    unsafe_through: Ints
    """[U] unsafe rows that score at least as high as this one, itself included."""
    safe_above: Ints
    """[U] safe rows that score higher than this unsafe row."""
    safe_through: Ints
    """[U] safe rows that score at least as high as this unsafe row."""


@dataclass(frozen=True)
class Curve:
    """What each unsafe row costs to catch: weighted counts when the threshold is just low enough to flag it."""

    weight: Weights
    """[B, U] of the unsafe row itself."""
    caught: Weights
    """[B, U] unsafe weight flagged, ties included."""
    blocked_above: Weights
    """[B, U] safe weight that scores higher."""
    blocked: Weights
    """[B, U] safe weight flagged, ties included."""
    unsafe: Weights
    """[B] all unsafe weight."""
    safe: Weights
    """[B] all safe weight."""


@dataclass(frozen=True)
class Calibration:
    """N rows sorted by the bin that their probability falls in."""

    rows: Ints
    """[N] the order."""
    starts: Ints
    """Where the bin of each distinct probability begins; empty bins are left out."""
    excess: Floats
    """float32[N] by how much P(unsafe) exceeds the label, in that order."""


def rank(scores: Floats, unsafe: Bools) -> Ranking:
    """Sort `scores[N]` with labels `unsafe[N]`; both classes must be present."""
    order = np.argsort(-scores, kind="stable")
    unsafe_rows, safe_rows = order[unsafe[order]], order[~unsafe[order]]
    caught, passed = -scores[unsafe_rows], -scores[safe_rows]
    return Ranking(
        unsafe_rows,
        safe_rows,
        unsafe_through=np.searchsorted(caught, caught, side="right"),
        safe_above=np.searchsorted(passed, caught, side="left"),
        safe_through=np.searchsorted(passed, caught, side="right"),
    )


def curve(ranking: Ranking, weights: Weights) -> Curve:
    """Cumulate `weights[B, N]` along the ranking. Counts are summed as int32, ten times as fast as floats."""
    kind = np.int32 if weights.dtype.kind == "i" else weights.dtype
    weight = weights.take(ranking.unsafe_rows, axis=1)
    caught = np.cumsum(weight, axis=1, dtype=kind)
    blocked = np.zeros((len(weights), len(ranking.safe_rows) + 1), kind)
    np.cumsum(weights.take(ranking.safe_rows, axis=1), axis=1, dtype=kind, out=blocked[:, 1:])
    return Curve(
        weight,
        caught.take(ranking.unsafe_through - 1, axis=1),
        blocked.take(ranking.safe_above, axis=1),
        blocked.take(ranking.safe_through, axis=1),
        unsafe=caught[:, -1],
        safe=blocked[:, -1],
    )


def auprc(c: Curve) -> Floats:
    """Area under the precision-recall curve: sklearn's average_precision_score, one value per weighting."""
    area: Floats = (c.weight * ratio(c.caught, c.caught + c.blocked)).sum(axis=1) / c.unsafe
    return area


def auroc(c: Curve) -> Floats:
    """Chance that an unsafe row outscores a safe one, ties counting half: sklearn's roc_auc_score."""
    beaten_by: Floats = (c.weight * (c.blocked_above + c.blocked).astype(np.float64)).sum(axis=1)
    return 1 - beaten_by / (2.0 * c.unsafe * c.safe.astype(np.float64))


def recall_at_fpr(c: Curve, fpr: float | Floats) -> Floats:
    """Largest recall at a false-positive rate of at most `fpr` (one for all, or [B]), without interpolation."""
    allowed = np.broadcast_to(np.asarray(fpr, np.float64) * c.safe * (1 + 1e-9), c.safe.shape)
    reached = np.count_nonzero(c.blocked <= allowed[:, None], axis=1)  # `blocked` only rises along the ranking
    caught = np.where(reached > 0, c.caught[np.arange(len(reached)), reached - 1], 0)
    recall: Floats = caught / c.unsafe
    return recall


def mean_recall(c: Curve, fpr: float | Floats) -> Floats:
    """Mean of recall_at_fpr over all false-positive rates from 0 to `fpr` (one for all, or [B]).

    It is the area under the ROC curve up to `fpr`, over `fpr` (partial area: McClish 1989). At one rate a few safe rows
    decide recall; here all those above them count too.
    """
    allowed = np.minimum(np.broadcast_to(np.asarray(fpr, np.float64), c.safe.shape), 1) * c.safe
    left = (allowed[:, None] - c.blocked) / np.where(allowed > 0, allowed, 1)[:, None]
    share = np.where(allowed[:, None] > 0, np.maximum(left, 0), c.blocked == 0)
    recall: Floats = (c.weight * share).sum(axis=1) / c.unsafe
    return recall


def decision_metrics(tp: Weights, fp: Weights, unsafe: Weights, safe: Weights) -> dict[str, Floats]:
    """Metrics at a threshold from weighted counts [B]: caught, falsely blocked, all unsafe, all safe.

    A ratio without cases (precision of a guard that flags nothing) is 0, as in sklearn.
    """
    return {
        "accuracy": ratio(tp + safe - fp, unsafe + safe),
        "precision": ratio(tp, tp + fp),
        "recall": ratio(tp, unsafe),
        "f1": ratio(2 * tp, unsafe + tp + fp),
        "fpr": ratio(fp, safe),
    }


def calibration(scores: Floats, temperature: float, unsafe: Bools, bins: int = 15) -> Calibration:
    """Sort the rows by the equal-width bin of P(unsafe), which is sigmoid(score / temperature)."""
    p = expit(scores / temperature)
    place = np.minimum((p * bins).astype(np.int64), bins - 1)
    rows = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[rows], prepend=-1))
    return Calibration(rows, starts, (p - unsafe)[rows].astype(np.float32))


def calibration_metrics(c: Calibration, weights: Weights) -> dict[str, Floats]:
    """Brier score, and expected calibration error (Guo et al. 2017, eq. 3), under `weights[B, N]`."""
    weight = weights.take(c.rows, axis=1).astype(np.float32)
    total = weights.sum(axis=1, dtype=np.float64)
    excess = weight * c.excess
    gaps = np.add.reduceat(excess, c.starts, axis=1)
    squares = (excess * c.excess).sum(axis=1)  # not `@`: BLAS would start threads of its own beside ours
    return {"brier": squares / total, "ece": np.abs(gaps).sum(axis=1) / total}


def ratio(part: Floats, whole: Floats) -> Floats:
    """part / whole in the inputs' precision, float64 for counts, and 0 where there is no whole."""
    precision = np.result_type(part, whole, np.float32)
    return np.divide(part, whole, out=np.zeros(np.shape(whole), precision), where=whole > 0)
