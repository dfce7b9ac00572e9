"""What is read off the held-out examples: how well they are ranked, the operating point, and the temperature."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize_scalar
from sklearn.metrics import average_precision_score

from guardloop.core.records import Row

NEVER_BLOCKED = ("hard_negative", "passed")
CONTRAST = 0.5  # targets above count as unsafe when the held-out examples are ranked
HAIR = 1e-3  # on the scale of scores
ROUNDING = 1e-9  # of a sum of weights, which must not move the threshold by a row
HOTTEST = 100.0  # bound of the temperature, and of its inverse


def ranking(examples: Sequence[Row], scores: np.ndarray) -> float | None:
    """Average precision of `scores` on the lessons among `examples`, by their targets; None with one class only."""
    rows, targets = _lessons(examples)
    unsafe = targets > CONTRAST
    if unsafe.all() or not unsafe.any():
        return None
    return float(average_precision_score(unsafe, scores[rows]))


def benign_fpr(examples: Sequence[Row], scores: np.ndarray, threshold: float) -> float | None:
    """Share of the safe prompts among the lessons whose score is above `threshold`; None where none is safe.

    Which are safe, nobody knows. Of two guesses the higher share is given, since each misses something: those that
    never drew a blocked response are the easy ones, where most safe prompts draw one; and lessons that count by the
    P(safe) of their targets count too little, where the targets are too sure.
    """
    shares = [float(safe[scores > threshold].sum() / safe.sum()) for safe in _safe(examples)]
    return max(shares, default=None)


def operating_point(
    examples: Sequence[Row], scores: np.ndarray, baseline_scores: np.ndarray, baseline_threshold: float, share: float
) -> float:
    """The threshold above which at most `share` more of the held-out safe prompts are than before, by both guesses.

    It lies a hair above the last score that is let through, which rounding may move when the adapter is merged.
    """
    points = []
    for safe in _safe(examples):
        before = safe[baseline_scores > baseline_threshold].sum()
        points.append(_point(scores[safe > 0], safe[safe > 0], (before + share * safe.sum()) * (1 + ROUNDING)))
    return max(points, default=baseline_threshold)


def stricter_point(
    held_out: Sequence[Row],
    scores: np.ndarray,
    baseline_scores: np.ndarray,
    taught: Sequence[Row],
    taught_scores: np.ndarray,
    baseline_threshold: float,
    share: float,
) -> float:
    """The operating point of the held-out examples, or, where it is higher, that of them and of the `taught` ones.

    What the adapter was taught it lets through too easily, so these alone would not do; but they are several times as
    many, and a threshold from few prompts is off by chance. The baseline flagged none of them.
    """
    both = [*held_out, *taught], np.concatenate([scores, taught_scores])
    before = np.concatenate([baseline_scores, np.full(len(taught), -np.inf)])
    return max(
        operating_point(held_out, scores, baseline_scores, baseline_threshold, share),
        operating_point(*both, before, baseline_threshold, share),
    )


def same_share(before: np.ndarray, after: np.ndarray, threshold: float) -> float:
    """The point nearest to `threshold` above which are as many of `after[N]` as of `before[N]` are above `threshold`.

    Where scores are equal there may be none; fewer are above it then.
    """
    if not len(after):
        return threshold
    falling = np.sort(after.astype(float))[::-1]
    count = int((before > threshold).sum())
    least = falling[count - 1] if count else np.inf  # of those that are to be above it
    most = falling[count] if count < len(falling) else -np.inf
    step = min(HAIR, float(least - most) / 2)
    if most <= threshold < least:
        return threshold
    return float(least - step if threshold >= least else most + step)


def _point(scores: np.ndarray, weights: np.ndarray, allowed: float) -> float:
    """A hair above the highest score with which the weights from there upwards come to more than `allowed`."""
    falling = np.argsort(-scores, kind="stable")
    beyond = np.cumsum(weights[falling]) > allowed
    last = float(scores[falling[np.argmax(beyond) if beyond.any() else -1]])
    above = scores[scores > last]
    return last + (min(HAIR, float(above.min() - last) / 2) if len(above) else HAIR)


def _safe(examples: Sequence[Row]) -> list[np.ndarray]:
    """Two guesses of how far each example is a safe prompt, `float[N]`, without those by which none is."""
    never = np.array([float(row["kind"] in NEVER_BLOCKED) for row in examples])
    rows, targets = _lessons(examples)
    weighed = np.zeros(len(examples))
    weighed[rows] = 1 - targets
    return [safe for safe in (never, weighed) if safe.any()]


def _lessons(examples: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the examples that are not replayed, `int[L]`, and their targets, `float[L]`."""
    rows = [i for i, row in enumerate(examples) if not row["kind"].startswith("replay")]
    return np.array(rows, dtype=int), np.array([examples[i]["target"] for i in rows], dtype=float)


def temperature(examples: Sequence[Row], scores: np.ndarray) -> float:
    """The T for which sigmoid(score / T) has the least weighted cross-entropy to the targets; 1 without examples.

    Temperature scaling (Guo et al., "On calibration of modern neural networks", 2017), with soft targets.
    """
    if not len(examples):
        return 1.0
    targets, weights = (np.array([row[name] for row in examples], dtype=float) for name in ("target", "weight"))

    def cost(log_temperature: float) -> float:
        scaled = scores.astype(float) / math.exp(log_temperature)
        return float(np.average(np.logaddexp(0, scaled) - targets * scaled, weights=weights))

    bound = math.log(HOTTEST)
    return math.exp(float(minimize_scalar(cost, bounds=(-bound, bound), method="bounded").x))
