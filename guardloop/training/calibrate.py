"""What is read off the held-out examples: how well they are ranked, the operating point, and the temperature."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize_scalar
from sklearn.metrics import average_precision_score

from guardloop.records import Row

LESSONS = ("positive", "hard_negative", "uncertain", "refused", "passed")
NEVER_BLOCKED = ("hard_negative", "passed")
CONTRAST = 0.5  # targets above count as unsafe when the held-out examples are ranked
HAIR = 1e-3  # on the scale of margins
HOTTEST = 100.0  # bound of the temperature, and of its inverse


def ranking(examples: Sequence[Row], margins: np.ndarray) -> float | None:
    """Average precision of `margins` on the lessons among `examples`, by their targets; None with one class only."""
    rows = [i for i, row in enumerate(examples) if row["kind"] in LESSONS]
    unsafe = np.array([examples[i]["target"] > CONTRAST for i in rows], dtype=bool)
    if unsafe.all() or not unsafe.any():
        return None
    return float(average_precision_score(unsafe, margins[rows]))


def benign_fpr(examples: Sequence[Row], margins: np.ndarray, threshold: float) -> float | None:
    """Share of the never-blocked examples whose margin is above `threshold`; None without any."""
    never = [i for i, row in enumerate(examples) if row["kind"] in NEVER_BLOCKED]
    return float((margins[never] > threshold).mean()) if never else None


def operating_point(
    examples: Sequence[Row], margins: np.ndarray, default_margins: np.ndarray, default_threshold: float, share: float
) -> float:
    """The threshold above which at most `share` more of the held-out never-blocked prompts are flagged than before.

    It lies a hair above the last margin that is let through, which rounding may move when the adapter is merged.
    """
    before = benign_fpr(examples, default_margins, default_threshold)
    if before is None:
        return default_threshold
    never = np.sort([margin for margin, row in zip(margins, examples, strict=True) if row["kind"] in NEVER_BLOCKED])
    last = float(np.quantile(never, 1 - min(1.0, before + share), method="higher"))
    above = never[never > last]
    return last + min(HAIR, float(above[0] - last) / 2) if len(above) else last + HAIR


def temperature(examples: Sequence[Row], margins: np.ndarray) -> float:
    """The T for which sigmoid(margin / T) has the least weighted cross-entropy to the targets; 1 without examples.

    Temperature scaling (Guo et al., "On calibration of modern neural networks", 2017), with soft targets.
    """
    if not len(examples):
        return 1.0
    targets, weights = (np.array([row[name] for row in examples], dtype=float) for name in ("target", "weight"))

    def cost(log_temperature: float) -> float:
        scaled = margins.astype(float) / math.exp(log_temperature)
        return float(np.average(np.logaddexp(0, scaled) - targets * scaled, weights=weights))

    bound = math.log(HOTTEST)
    return math.exp(float(minimize_scalar(cost, bounds=(-bound, bound), method="bounded").x))
