"""Slices against their margins: each is tested both ways, and many tests are corrected for."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from guardloop.evaluation.metrics import Floats
from guardloop.evaluation.result import Outcome
from guardloop.evaluation.slices import MeasuredSlice


@dataclass(frozen=True)
class JudgedSlice:
    """A slice with the verdict on its margin."""

    part: MeasuredSlice
    outcome: Outcome
    p: float
    """Holm-adjusted, of a loss within the margin: small is good."""


def judge_slices(family: list[tuple[MeasuredSlice, float]], alpha: float) -> list[JudgedSlice]:
    """Test every slice against its margin, both ways, with Holm's correction over the family.

    passed: a loss beyond the margin is ruled out. failed: a loss within the margin is ruled out.
    """
    if not family:
        return []
    # Normal tails, not shares of resamples: the smallest share that n resamples can show is 1 / n, too coarse for Holm.
    # The floor on the error keeps a slice without any changed decision from dividing by zero.
    sure = np.array([(part.result.gain.value + margin) / max(part.error, 1e-9) for part, margin in family])
    p_beyond = holm(norm.sf(sure))
    p_within = holm(norm.cdf(sure))
    outcomes: list[Outcome] = [
        "passed" if sound <= alpha else "failed" if bad <= alpha else "not proven"
        for sound, bad in zip(p_beyond, p_within, strict=True)
    ]
    return [
        JudgedSlice(part, outcome, float(p)) for (part, _), outcome, p in zip(family, outcomes, p_beyond, strict=True)
    ]


def holm(p: Floats) -> Floats:
    """Step-down adjusted p-values [M] (Holm 1979). Those of statsmodels collect garbage at every call: 0.1 s."""
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted
