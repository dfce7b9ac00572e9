"""The geometry of the plots: figures in, coordinates out. The templates draw them, the stylesheet colours them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from guardloop.core.records import Row
from guardloop.evaluation.bands import Band, curve_bands
from guardloop.evaluation.result import Estimate, EvaluatedGuard, Evaluation, GateCheck
from guardloop.report.text import MINUS

Floats = NDArray[np.float64]
GUARDS = ("baseline", "candidate")
BINS = 36
POINTS = 240


@dataclass(frozen=True)
class Scale:
    """A linear map from values to pixels; values beyond its ends are drawn at the ends."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of `value`."""
        value = min(max(value, self.low), self.high)
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self, wanted: int = 5) -> list[tuple[float, str]]:
        """About `wanted` round values with their labels, as (pixel, label)."""
        rough = (self.high - self.low) / wanted
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * size for size in (1, 2, 2.5, 5, 10) if unit * size >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [(self.at(i * step), f"{i * step:.6g}".replace("-", MINUS)) for i in range(first, last + 1)]


@dataclass(frozen=True)
class GuardCurve:
    """One guard's curve, its area, and the point where the guard works."""

    guard: str
    points: str
    band: str
    """Outline of its pointwise 95% band."""
    area: float
    point: tuple[float, float] | None
    """Where the guard works; None where it has no precision because it blocks nothing."""
    at: str
    """The operating point in words."""


@dataclass(frozen=True)
class CurvePlot:
    """A curve of both guards on axes from 0 to 1."""

    title: str
    x_label: str
    y_label: str
    area_name: str
    x: Scale
    y: Scale
    chance: str
    """What a guard that guesses would reach."""
    curves: list[GuardCurve]


@dataclass(frozen=True)
class Hill:
    """How the scores of one class are spread, as an outline."""

    unsafe: bool
    points: str


@dataclass(frozen=True)
class HillPlot:
    """Both classes under one guard, with its threshold."""

    guard: str
    x: Scale
    threshold: float
    threshold_label: str
    hills: list[Hill]


@dataclass(frozen=True)
class Whisker:
    """An interval with its value on a scale; an end that the scale cuts off is drawn open."""

    at: float
    low: float | None = None
    high: float | None = None
    cut_low: bool = False
    cut_high: bool = False
    limit: float | None = None


def curve_plots(prompts: Sequence[Row], evaluation: Evaluation) -> list[CurvePlot]:
    """Precision-recall and ROC of both guards with their bands; none where a class is missing."""
    unsafe = np.array([row["unsafe"] for row in prompts], dtype=bool)
    if unsafe.all() or not unsafe.any():
        return []
    x, y = Scale(0, 1, 40, 328), Scale(0, 1, 248, 12)
    group = np.unique([row["group"] for row in prompts], return_inverse=True)[1].astype(np.int64)
    precision_recall, roc = [], []
    for guard in GUARDS:
        scores = np.array([row[f"{guard}_score"] for row in prompts], dtype=np.float64)
        metrics = {name: getattr(both, guard).value for name, both in evaluation.metrics.items()}
        precisions, recalls, _ = precision_recall_curve(unsafe, scores)
        rates, caught, _ = roc_curve(unsafe, scores)
        bands = [_band(band, x, y) for band in curve_bands(scores, unsafe, group)]
        line = recalls[::-1], precisions[::-1]
        precision_recall.append(_curve(guard, metrics, *line, area="auprc", band=bands[0], x=x, y=y))
        roc.append(_curve(guard, metrics, rates, caught, area="auroc", band=bands[1], x=x, y=y))
    level, diagonal = y.at(float(unsafe.mean())), f"{x.start},{y.start} {x.end},{y.end}"
    flat = f"{x.start},{level} {x.end},{level}"
    return [
        CurvePlot("Precision and recall", "recall", "precision", "AUPRC", x, y, flat, precision_recall),
        CurvePlot("ROC", "false-positive rate", "recall", "AUROC", x, y, diagonal, roc),
    ]


def hill_plots(prompts: Sequence[Row], evaluation: Evaluation) -> list[HillPlot]:
    """The scores of safe and unsafe prompts under each guard, on one shared scale."""
    if not prompts:
        return []
    scores = {guard: np.array([row[f"{guard}_score"] for row in prompts], dtype=np.float64) for guard in GUARDS}
    limits: dict[str, EvaluatedGuard] = {guard: getattr(evaluation, guard) for guard in GUARDS}
    unsafe = np.array([row["unsafe"] for row in prompts], dtype=bool)
    everything = np.concatenate(list(scores.values()))
    low, high = np.percentile(everything, [0.1, 99.9])
    thresholds = [guard.threshold for guard in limits.values() if math.isfinite(guard.threshold)]
    low, high = min([low, *thresholds]), max([high, *thresholds])
    pad = 0.05 * (high - low) or 1.0
    x = Scale(float(low - pad), float(high + pad), 12, 328)
    spreads = {
        (guard, kind): _spread(scores[guard][unsafe == kind], x)
        for guard in GUARDS
        for kind in (False, True)
        if (unsafe == kind).any()
    }
    y = Scale(0, float(max(spread.max() for spread in spreads.values())), 148, 22)
    return [
        HillPlot(
            guard=guard,
            x=x,
            threshold=x.at(limits[guard].threshold),
            threshold_label=f"{limits[guard].threshold:.2f}".replace("-", MINUS),
            hills=[Hill(kind, _outline(spread, x, y)) for (name, kind), spread in spreads.items() if name == guard],
        )
        for guard in GUARDS
    ]


def forest(changes: Sequence[Estimate], width: float = 200) -> tuple[Scale, list[Whisker | None]]:
    """Changes as whiskers on one scale around 0. Very wide intervals are cut off, so that the others stay legible."""
    known = [change for change in changes if math.isfinite(change.value)]
    values = [change.value for change in known]
    ends = [end for change in known for end in change.ends if math.isfinite(end)]
    reach = 4 * float(np.median(np.abs(ends))) if ends else 0.0
    low = min([0.0, *values, *(max(end, -reach) for end in ends)])
    high = max([0.0, *values, *(min(end, reach) for end in ends)])
    pad = 0.06 * (high - low) or 0.1
    scale = Scale(low - pad, high + pad, 6, width - 6)
    return scale, [_whisker(change.value, change.low, change.high, scale) for change in changes]


def check_whisker(check: GateCheck, width: float = 120) -> Whisker | None:
    """A check's value and interval against its limit, on a scale of its own."""
    known = [v for v in (check.value, check.low, check.high, check.limit) if v is not None]
    if check.value is None or not all(math.isfinite(v) for v in known):
        return None
    pad = 0.18 * (max(known) - min(known)) or 0.1
    scale = Scale(min(known) - pad, max(known) + pad, 4, width - 4)
    whisker = _whisker(check.value, check.low, check.high, scale)
    return replace(whisker, limit=scale.at(check.limit)) if whisker else None


def _whisker(value: float, low: float | None, high: float | None, scale: Scale) -> Whisker | None:
    if not math.isfinite(value):
        return None
    if low is None or high is None or not math.isfinite(low + high):
        return Whisker(scale.at(value))
    return Whisker(scale.at(value), scale.at(low), scale.at(high), low < scale.low, high > scale.high)


def _band(band: Band, x: Scale, y: Scale) -> str:
    """There along the lower edge, back along the upper one."""
    there = [(x.at(float(at)), y.at(float(low))) for at, low in zip(band.x, band.low, strict=True)]
    back = [(x.at(float(at)), y.at(float(high))) for at, high in zip(band.x, band.high, strict=True)]
    return " ".join(f"{px},{py}" for px, py in [*there, *reversed(back)])


def _curve(
    guard: str, metrics: Mapping[str, float], xs: Floats, ys: Floats, *, area: str, band: str, x: Scale, y: Scale
) -> GuardCurve:
    names, at = {
        "auprc": (("recall", "precision"), (metrics["recall"], metrics["precision"])),
        "auroc": (("FPR", "recall"), (metrics["fpr"], metrics["recall"])),
    }[area]
    return GuardCurve(
        guard=guard,
        points=_polyline(xs, ys, x, y),
        band=band,
        area=metrics[area],
        point=(x.at(at[0]), y.at(at[1])) if all(map(math.isfinite, at)) else None,
        at=f"the {guard} works at {names[0]} {at[0]:.3f}, {names[1]} {at[1]:.3f}",
    )


def _polyline(xs: Floats, ys: Floats, x: Scale, y: Scale) -> str:
    """At most `POINTS` points, evenly spaced along the curve."""
    travelled = np.concatenate([[0.0], np.cumsum(np.hypot(np.diff(xs), np.diff(ys)))])
    kept = np.unique(np.searchsorted(travelled, np.linspace(0, travelled[-1], POINTS)).clip(max=len(xs) - 1))
    return " ".join(f"{x.at(float(xs[i]))},{y.at(float(ys[i]))}" for i in kept)


def _spread(scores: Floats, x: Scale) -> Floats:
    """The share of `scores` in each of `BINS` equal bins, lightly smoothed; outliers count in the end bins."""
    counts, _ = np.histogram(scores.clip(x.low, x.high), bins=BINS, range=(x.low, x.high))
    padded = np.pad(counts / max(len(scores), 1), 1)
    smooth: Floats = 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]
    return smooth


def _outline(spread: Floats, x: Scale, y: Scale) -> str:
    step = (x.high - x.low) / BINS
    middles = [(x.at(x.low + (i + 0.5) * step), y.at(float(share))) for i, share in enumerate(spread)]
    return " ".join(f"{px},{py}" for px, py in [(x.start, y.start), *middles, (x.end, y.start)])
