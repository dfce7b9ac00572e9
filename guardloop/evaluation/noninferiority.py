"""Slices against their margins: each is tested both ways."""

import math
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
    """Of a loss beyond the margin: small is good."""


def least_error(margin: float, groups: int) -> float:
    """Standard error that the change of a share has at least, over `groups` decisions, if the change is `margin`.

    The changes of n decisions (-1, 0 or 1) vary least where all go one way: margin * (1 - margin) / n. Resamples of a
    few unchanged decisions show no variation at all, and would rule out what is still likely.
    """
    return math.sqrt(margin * (1 - margin) / max(groups, 1))


def judge_slices(family: list[tuple[MeasuredSlice, float]], alpha: float) -> list[JudgedSlice]:
    """Test every slice of the family against its margin, both ways.

    passed: a loss beyond the margin is ruled out. A guard is promoted only if it is in all slices, so each is tested at
    `alpha` (an intersection-union test: Berger 1982). failed: a loss within the margin is ruled out, with Holm's
    correction, as one slice of many is enough for that.
    """
    if not family:
        return []
    # Normal tails, not shares of resamples: the smallest share that n resamples can show is 1 / n, too coarse for Holm.
    sure = np.array([(part.result.gain.value + margin) / _error(part, margin) for part, margin in family])
    p_beyond = norm.sf(sure)
    p_within = holm(norm.cdf(sure))
    outcomes: list[Outcome] = [
        "passed" if sound <= alpha else "failed" if bad <= alpha else "not proven"
        for sound, bad in zip(p_beyond, p_within, strict=True)
    ]
    return [
        JudgedSlice(part, outcome, float(p)) for (part, _), outcome, p in zip(family, outcomes, p_beyond, strict=True)
    ]


def _error(part: MeasuredSlice, margin: float) -> float:
    least = 0.0 if part.result.metric == "auprc" else least_error(margin, part.groups)
    return max(part.error, least, 1e-9)  # a ranking that did not change has no error


def holm(p: Floats) -> Floats:
    """Step-down adjusted p-values [M] (Holm 1979). Those of statsmodels collect garbage at every call: 0.1 s."""
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted
