"""Metrics of one guard under many row weightings at once, so that a bootstrap is a few array operations.

Rows are sorted once; a resample is a weight per row. `weights[B, N]` holds B weightings of N rows, and every
metric returns one value per weighting. Score, margin: higher means more surely unsafe.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


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

    weight: Floats
    """[B, U] of the unsafe row itself."""
    caught: Floats
    """[B, U] unsafe weight flagged, ties included."""
    blocked_above: Floats
    """[B, U] safe weight that scores higher."""
    blocked: Floats
    """[B, U] safe weight flagged, ties included."""
    unsafe: Floats
    """[B] all unsafe weight."""
    safe: Floats
    """[B] all safe weight."""


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


def curve(ranking: Ranking, weights: Floats) -> Curve:
    """Cumulate `weights[B, N]` along the ranking. Integer weights stay exact in float32 up to 2**24."""
    weight = weights[:, ranking.unsafe_rows]
    caught = np.cumsum(weight, axis=1)
    safe = weights[:, ranking.safe_rows]
    blocked = np.zeros((len(weights), safe.shape[1] + 1), weights.dtype)
    np.cumsum(safe, axis=1, out=blocked[:, 1:])
    return Curve(
        weight,
        caught[:, ranking.unsafe_through - 1],
        blocked[:, ranking.safe_above],
        blocked[:, ranking.safe_through],
        unsafe=caught[:, -1],
        safe=blocked[:, -1],
    )


def auprc(c: Curve) -> Floats:
    """Area under the precision-recall curve: sklearn's average_precision_score, one value per weighting."""
    area: Floats = (c.weight * ratio(c.caught, c.caught + c.blocked)).sum(axis=1) / c.unsafe
    return area


def auroc(c: Curve) -> Floats:
    """Chance that an unsafe row outscores a safe one, ties counting half: sklearn's roc_auc_score."""
    beaten_by: Floats = (c.weight * (c.blocked_above + c.blocked)).sum(axis=1, dtype=np.float64)
    return 1 - beaten_by / (2.0 * c.unsafe * c.safe.astype(np.float64))


def recall_at_fpr(c: Curve, fpr: float | Floats) -> Floats:
    """Largest recall at a false-positive rate of at most `fpr` (one for all, or [B]), without interpolation."""
    allowed = np.broadcast_to(np.asarray(fpr, np.float64) * c.safe * (1 + 1e-9), c.safe.shape)
    caught: Floats = np.where(c.blocked <= allowed[:, None], c.weight, 0).sum(axis=1)
    return caught / c.unsafe


def decision_metrics(tp: Floats, fp: Floats, unsafe: Floats, safe: Floats) -> dict[str, Floats]:
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


def calibration_columns(margins: Floats, temperature: float, unsafe: Bools, bins: int) -> Floats:
    """[N, 1 + bins] whose weighted column sums give `calibration_metrics`.

    P(unsafe) is sigmoid(margin / temperature). The first column is the squared error; the others hold, in the
    equal-width bin that the probability falls in, by how much it exceeds the label.
    """
    p = expit(margins / temperature)
    columns = np.zeros((len(p), 1 + bins))
    columns[:, 0] = (p - unsafe) ** 2
    columns[np.arange(len(p)), 1 + np.minimum((p * bins).astype(np.int64), bins - 1)] = p - unsafe
    return columns


def calibration_metrics(sums: Floats, total: Floats) -> dict[str, Floats]:
    """Brier score, and expected calibration error (Guo et al. 2017, eq. 3), from `sums[B, 1 + bins]`, `total[B]`."""
    return {"brier": sums[:, 0] / total, "ece": np.abs(sums[:, 1:]).sum(axis=1) / total}


def ratio(part: Floats, whole: Floats) -> Floats:
    """part / whole in float64 or the inputs' precision, and 0 where there is no whole."""
    return np.divide(part, whole, out=np.zeros(np.shape(whole), np.result_type(part, whole)), where=whole > 0)
