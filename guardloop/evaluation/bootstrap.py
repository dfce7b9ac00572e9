"""Stratified cluster bootstrap: whole near-duplicate groups are redrawn, within strata of equal labels."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from guardloop.evaluation.metrics import Bools, Floats, Ints
from guardloop.evaluation.result import Estimate

Statistic = Callable[[Floats], Mapping[str, Floats]]
"""weights[B, N] -> named values [B]."""

BLOCK_CELLS = 1 << 19
"""Weights held at once: small enough for the processor's cache, which is what bounds the speed."""


def bootstrap(statistic: Statistic, groups: Ints, unsafe: Bools, resamples: int, seed: int) -> dict[str, Floats]:
    """Values [resamples] of each named statistic. Paired: both guards see the same resamples.

    groups[N] are group numbers 0 .. G-1, unsafe[N] the labels.
    """
    blocks = [dict(statistic(weights)) for weights in resample_weights(groups, unsafe, resamples, seed)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def resample_weights(groups: Ints, unsafe: Bools, resamples: int, seed: int) -> Iterator[Floats]:
    """Blocks float32[B, N] of how often each row was drawn; `resamples` rows of weights in all.

    A group's stratum is the set of labels it holds: unsafe, safe, or both. A mixed group is thus redrawn whole,
    and every resample holds both classes if the data do.
    """
    size = int(groups.max()) + 1
    has_unsafe = np.bincount(groups, weights=unsafe, minlength=size) > 0
    has_safe = np.bincount(groups, weights=~unsafe, minlength=size) > 0
    stratum = has_unsafe + 2 * has_safe
    strata = [np.flatnonzero(stratum == kind) for kind in (1, 2, 3)]
    rng = np.random.default_rng(seed)
    block = max(1, min(resamples, BLOCK_CELLS // len(groups)))
    for start in range(0, resamples, block):
        draws = min(block, resamples - start)
        counts = np.zeros((draws, size), np.float32)
        for members in strata:
            counts[:, members] = _draw(rng, draws, len(members))
        yield counts[:, groups]


def _draw(rng: np.random.Generator, draws: int, size: int) -> Ints:
    """How often each of `size` things comes up in `size` draws with replacement: int64[draws, size]."""
    picked = rng.integers(size, size=(draws, size)) + size * np.arange(draws)[:, None] if size else np.zeros(0, int)
    return np.bincount(picked.ravel(), minlength=draws * size).reshape(draws, size)


def estimate(value: float, samples: Floats, confidence: float) -> Estimate:
    """The value with the percentile interval of its bootstrap samples."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return Estimate(value=float(value), low=float(low), high=float(high))
