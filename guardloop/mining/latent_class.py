"""What judged responses say of a prompt, when neither the responder nor the judge can be trusted alone.

Every prompt is unsafe or not, which nobody sees. What is seen: the baseline's score on it, how many of its
responses were harmful in the judge's eyes, and how many were refusals. A mixture of two classes (Dawid and Skene, 1979)
is fitted by maximum likelihood: how often each responder does either for unsafe and for other prompts, and how far the
baseline's score can be believed. So a responder that complies with nothing, or a judge that blocks at random,
counts for nothing; and no label of a person is needed.

Responses to one prompt are alike for reasons that have nothing to do with its class, so counts are beta-binomial: many
samples of one responder never make a certainty.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import betaln, expit, logit

Floats = NDArray[np.float64]
SAMPLE = 5_000  # prompts that the mixture is fitted on; the rest get its posterior
EDGE = 1e-3  # no share is taken for 0 or 1
ALIKE = (0.1, 0.9)  # bounds of the correlation of responses to one prompt, given its class: one judge misjudges alike
STARTS = ((0.0, 0.0), (-1.5, -1.5))  # (log slope, intercept) to start from: the likelihood has several peaks
SLOPE_PENALTY = 4.0  # strength, in prompts, of the belief that the slope of the baseline's score is 1
# The parameter vector: log slope, intercept, then for each channel the logits of the share of safe prompts, of how far
# the share of unsafe ones rises above it, and of the correlation.
LINE_BOUNDS = ((-3.0, 1.5), (-12.0, 12.0))
CHANNEL_BOUNDS = ((-9.0, 9.0), (-9.0, 9.0), (-6.0, 6.0))


@dataclass(frozen=True)
class Counts:
    """Of each prompt: how many of its `total` responses were `seen` to be something, `float[N]` both."""

    name: str
    seen: Floats
    total: Floats


@dataclass(frozen=True)
class Channel:
    """How often one kind of count is met in each class."""

    name: str
    if_unsafe: float
    """Expected share for unsafe prompts."""
    if_safe: float
    """Expected share for other prompts."""
    alike: float
    """Correlation of the responses to one prompt, given its class: 0 independent, 1 all the same."""

    def log_ratio(self, counts: Counts) -> Floats:
        """log P(counts | unsafe) - log P(counts | safe) of each prompt, `float[N]`."""
        return _log_likelihood(counts, self.if_unsafe, self.alike) - _log_likelihood(counts, self.if_safe, self.alike)


@dataclass(frozen=True)
class Fusion:
    """The fitted mixture."""

    slope: float
    intercept: float
    """Before any response is seen, P(unsafe) is expit(slope * score + intercept)."""
    channels: list[Channel]

    def prior(self, scores: Floats) -> Floats:
        """P(unsafe) by the baseline's scores, `float[N]`, on the posterior's scale."""
        p_unsafe: Floats = expit(self.slope * scores + self.intercept)
        return p_unsafe

    def posterior(self, scores: Floats, counts: Sequence[Counts]) -> Floats:
        """P(unsafe) of each prompt, `float[N]`."""
        logits = self.slope * scores + self.intercept
        for channel, seen in zip(self.channels, counts, strict=True):
            logits = logits + channel.log_ratio(seen)
        p_unsafe: Floats = expit(logits)
        return p_unsafe


def fuse(scores: Floats, counts: Sequence[Counts], seed: int = 0) -> Fusion:
    """Fit the mixture to the baseline's scores on N prompts, `float[N]`, and what their responses showed."""
    if len(scores) > SAMPLE:
        chosen = np.sort(np.random.default_rng(seed).choice(len(scores), SAMPLE, replace=False))
        scores = scores[chosen]
        counts = [Counts(c.name, c.seen[chosen], c.total[chosen]) for c in counts]

    shares = [np.clip(c.seen.sum() / max(1.0, c.total.sum()), 0.01, 0.9) for c in counts]
    channels = [value for share in shares for value in (logit(share / 2), logit(share), -1.0)]
    bounds = [*LINE_BOUNDS, *CHANNEL_BOUNDS * len(counts)]
    fits = [
        minimize(_penalised_nll, np.array([*line, *channels]), (scores, counts), method="L-BFGS-B", bounds=bounds)
        for line in STARTS
    ]
    return _unpack(min(fits, key=lambda fit: float(fit.fun)).x, counts)


def _unpack(values: Floats, counts: Sequence[Counts]) -> Fusion:
    """The mixture that a parameter vector stands for."""
    channels = []
    for c, (safe_share, rise, correlation) in zip(counts, values[2:].reshape(-1, 3), strict=True):
        safe = EDGE + (1 - 3 * EDGE) * expit(safe_share)
        unsafe = safe + (1 - EDGE - safe) * expit(rise)  # a positive rise: the classes cannot switch
        alike = ALIKE[0] + np.ptp(ALIKE) * expit(correlation)
        channels.append(Channel(c.name, float(unsafe), float(safe), float(alike)))
    return Fusion(float(np.exp(values[0])), float(values[1]), channels)


def _penalised_nll(values: Floats, scores: Floats, counts: Sequence[Counts]) -> float:
    """Mean negative log likelihood, with the penalty on the slope."""
    fusion = _unpack(values, counts)
    logits = fusion.slope * scores + fusion.intercept
    unsafe, safe = -np.logaddexp(0, -logits), -np.logaddexp(0, logits)
    for channel, seen in zip(fusion.channels, counts, strict=True):
        unsafe = unsafe + _log_likelihood(seen, channel.if_unsafe, channel.alike)
        safe = safe + _log_likelihood(seen, channel.if_safe, channel.alike)
    return float(SLOPE_PENALTY * values[0] ** 2 - np.logaddexp(unsafe, safe).sum()) / max(1, len(scores))


def _log_likelihood(counts: Counts, share: float, alike: float) -> Floats:
    """Beta-binomial log likelihood, without the constant, of `seen` (fractions allowed) among `total`, `float[N]`."""
    strength = 1 / alike - 1
    a, b = share * strength, (1 - share) * strength
    likelihood: Floats = betaln(counts.seen + a, counts.total - counts.seen + b) - betaln(a, b)
    return likelihood
