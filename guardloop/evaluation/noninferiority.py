"""Slices against the loss that each may have: every one is tested both ways."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from guardloop.evaluation.bootstrap import TAIL
from guardloop.evaluation.metrics import Floats
from guardloop.evaluation.result import Outcome, SliceResult
from guardloop.evaluation.slices import MeasuredSlice


@dataclass(frozen=True)
class JudgedSlice:
    """A slice, and whether its loss stays within the limit."""

    part: MeasuredSlice
    limit: float
    """The largest loss that is tolerated."""
    outcome: Outcome
    p_loss_beyond_limit: float
    """p-value of the hypothesis that the loss is larger: small is good."""

    @property
    def result(self) -> SliceResult:
        """Both guards on the slice."""
        return self.part.result

    @property
    def of_responses(self) -> bool:
        """Whether it is of judged responses, rather than of prompts."""
        return self.part.result.dimension == "role"


def min_error(change: float, groups: int) -> float:
    """Standard error that the change of a share has at least, over `groups` decisions, if the change is `change`.

    The changes of n decisions (-1, 0 or 1) vary least where all go one way: change * (1 - change) / n. Resamples of a
    few unchanged decisions show no variation at all, and would rule out what is still likely.
    """
    return math.sqrt(change * (1 - change) / max(groups, 1))


def judge_slices(family: list[tuple[MeasuredSlice, float]]) -> list[JudgedSlice]:
    """Test every slice of the family against its limit, both ways.

    passed: a loss beyond the limit is ruled out. A guard is promoted only if it is in all slices, so each is tested at
    the level of one interval end (an intersection-union test: Berger 1982). failed: a loss within the limit is ruled
    out, with Holm's correction, as one slice of many is enough for that.
    """
    if not family:
        return []
    # Normal tails, not shares of resamples: the smallest share that n resamples can show is 1 / n, too coarse for Holm.
    z = np.array([(part.result.gain.value + limit) / standard_error(part, limit) for part, limit in family])
    p_beyond, p_within = norm.sf(z), holm(norm.cdf(z))
    outcomes: list[Outcome] = [
        "passed" if beyond <= TAIL else "failed" if within <= TAIL else "not proven"
        for beyond, within in zip(p_beyond, p_within, strict=True)
    ]
    return [
        JudgedSlice(part, limit, outcome, float(p))
        for (part, limit), outcome, p in zip(family, outcomes, p_beyond, strict=True)
    ]


def standard_error(part: MeasuredSlice, limit: float) -> float:
    """Of the slice's gain; of a share at least `min_error`."""
    smallest = 0.0 if part.result.metric == "auprc" else min_error(limit, part.groups)
    return max(part.error, smallest, 1e-9)  # a ranking that did not change has no error


def holm(p: Floats) -> Floats:
    """Step-down adjusted p-values [M] (Holm 1979)."""
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted
