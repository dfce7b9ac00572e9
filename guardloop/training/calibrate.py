"""What is read off the validation examples: how well they are ranked, the thresholds, and the temperature."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize_scalar
from sklearn.metrics import average_precision_score

from guardloop.core.records import Row
from guardloop.training.examples import UNSAFE_TARGET, is_replay

NEVER_BLOCKED = ("hard_negative", "passed")
GAP = 1e-3  # between a threshold and the score it is set by, on the scale of scores
ROUNDING = 1e-9  # of a sum of weights, which must not move the threshold by a row
MAX_TEMPERATURE = 100.0  # and its inverse is the least


def ranking(examples: Sequence[Row], scores: np.ndarray) -> float | None:
    """Average precision of `scores` on the mined ones of the examples, by their targets; None with one class only."""
    rows, targets = _mined(examples)
    unsafe = targets > UNSAFE_TARGET
    if unsafe.all() or not unsafe.any():
        return None
    return float(average_precision_score(unsafe, scores[rows]))


def benign_fpr(examples: Sequence[Row], scores: np.ndarray, threshold: float) -> float | None:
    """Share of the safe prompts whose score is above `threshold`, by the higher estimate; None where none is safe."""
    shares = [float(safe[scores > threshold].sum() / safe.sum()) for safe in _safe_weights(examples)]
    return max(shares, default=None)


def operating_point(
    examples: Sequence[Row], scores: np.ndarray, baseline_scores: np.ndarray, baseline_threshold: float, share: float
) -> float:
    """The lowest threshold that flags at most `share` more of the safe prompts than the baseline did.

    It holds under both estimates of which are safe, and lies a little above the last score that is let through, which
    rounding may move when the adapter is merged.
    """
    thresholds = []
    for safe in _safe_weights(examples):
        before = safe[baseline_scores > baseline_threshold].sum()
        allowed = (before + share * safe.sum()) * (1 + ROUNDING)
        thresholds.append(_lowest_threshold(scores[safe > 0], safe[safe > 0], allowed))
    return max(thresholds, default=baseline_threshold)


def stricter_point(
    validation: Sequence[Row],
    scores: np.ndarray,
    baseline_scores: np.ndarray,
    trained_on: Sequence[Row],
    trained_on_scores: np.ndarray,
    baseline_threshold: float,
    share: float,
) -> float:
    """The operating point of the validation examples, or, where it is higher, that of them and of the training ones.

    The adapter lets through too easily what it was trained on, so these alone would not do; but they are several times
    as many, and a threshold from few prompts is off by chance. The baseline flagged none of them.
    """
    both = [*validation, *trained_on], np.concatenate([scores, trained_on_scores])
    before = np.concatenate([baseline_scores, np.full(len(trained_on), -np.inf)])
    return max(
        operating_point(validation, scores, baseline_scores, baseline_threshold, share),
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
    lowest_flagged = falling[count - 1] if count else np.inf
    highest_passed = falling[count] if count < len(falling) else -np.inf
    if highest_passed <= threshold < lowest_flagged:
        return threshold
    gap = min(GAP, float(lowest_flagged - highest_passed) / 2)
    return float(lowest_flagged - gap if threshold >= lowest_flagged else highest_passed + gap)


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

    bound = math.log(MAX_TEMPERATURE)
    return math.exp(float(minimize_scalar(cost, bounds=(-bound, bound), method="bounded").x))


def _lowest_threshold(scores: np.ndarray, weights: np.ndarray, allowed: float) -> float:
    """The lowest threshold with at most `allowed` weight above it, a little above the highest score let through."""
    order = np.argsort(-scores, kind="stable")
    over = np.cumsum(weights[order]) > allowed
    highest_passed = float(scores[order[np.argmax(over) if over.any() else -1]])
    flagged = scores[scores > highest_passed]
    return highest_passed + (min(GAP, float(flagged.min() - highest_passed) / 2) if len(flagged) else GAP)


def _safe_weights(examples: Sequence[Row]) -> list[np.ndarray]:
    """Two estimates of how far each example is a safe prompt, `float[N]`, without those by which none is.

    Which are safe, nobody knows, and each estimate misses something: those that never drew a blocked response are the
    easy ones, where most safe prompts draw one; and mined ones that count by the P(safe) of their targets count too
    little, where the targets are too sure.
    """
    never_blocked = np.array([float(row["kind"] in NEVER_BLOCKED) for row in examples])
    rows, targets = _mined(examples)
    by_target = np.zeros(len(examples))
    by_target[rows] = 1 - targets
    return [safe for safe in (never_blocked, by_target) if safe.any()]


def _mined(examples: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the examples that are not replayed, `int[M]`, and their targets, `float[M]`."""
    rows = [i for i, row in enumerate(examples) if not is_replay(row)]
    return np.array(rows, dtype=int), np.array([examples[i]["target"] for i in rows], dtype=float)
