"""Stratified cluster bootstrap: whole near-duplicate groups are redrawn, within strata of equal labels."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from guardloop.evaluation.metrics import Bools, Floats, Ints, Weights
from guardloop.evaluation.result import Estimate

Counts = NDArray[np.int32]
Statistic = Callable[[Weights], Mapping[str, Floats]]
"""weights[B, N] -> named values [B]."""

TAIL = 0.025
"""Of every interval, on either side: 95% are inside. A rule of the gate reads one end, so this is its error rate."""
Stratum = Literal["unsafe", "safe", "mixed"]
STRATA: tuple[Stratum, ...] = ("unsafe", "safe", "mixed")
"""Of a group: the labels that it holds."""
BLOCK_CELLS = 1 << 19
"""Weights held at once: small enough for the processor's cache, which is what bounds the speed."""


def bootstrap(
    statistic: Statistic, groups: Ints, unsafe: Bools, resamples: int, seed: int, fixed: Stratum | None = None
) -> dict[str, Floats]:
    """Values [resamples] of each named statistic. Paired: both guards see the same resamples.

    groups[N] are group numbers 0 .. G-1, unsafe[N] the labels. Groups of the stratum `fixed` are never redrawn.
    """
    drawn = resample_weights(groups, unsafe, resamples, seed, fixed)
    blocks = []
    with ThreadPoolExecutor(1) as ahead:  # numpy computes outside the interpreter's lock
        following = ahead.submit(next, drawn, None)
        while (weights := following.result()) is not None:
            following = ahead.submit(next, drawn, None)
            blocks.append(dict(statistic(weights)))
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def resample_weights(
    groups: Ints, unsafe: Bools, resamples: int, seed: int, fixed: Stratum | None = None
) -> Iterator[Counts]:
    """Blocks int32[B, N] of how often each row was drawn; `resamples` rows of weights in all.

    A group's stratum is the set of labels it holds: unsafe, safe, or both. A mixed group is thus redrawn whole,
    and every resample holds both classes if the data do.
    """
    size = int(groups.max()) + 1
    has_unsafe = np.bincount(groups, weights=unsafe, minlength=size) > 0
    has_safe = np.bincount(groups, weights=~unsafe, minlength=size) > 0
    stratum = has_unsafe + 2 * has_safe
    strata = {kind: np.flatnonzero(stratum == number) for number, kind in enumerate(STRATA, start=1)}
    members = np.concatenate(list(strata.values()))
    place = np.zeros(size, np.int64)  # of a group in `members`
    place[members] = np.arange(len(members))
    rows = place[groups]
    rng = np.random.default_rng(seed)
    block = max(1, min(resamples, BLOCK_CELLS // len(groups)))
    for start in range(0, resamples, block):
        draws = min(block, resamples - start)
        counts = [
            np.ones((draws, len(kept)), np.int32) if kind == fixed else _draw(rng, draws, len(kept))
            for kind, kept in strata.items()
        ]
        yield np.concatenate(counts, axis=1).take(rows, axis=1)


def _draw(rng: np.random.Generator, draws: int, size: int) -> Counts:
    """How often each of `size` things comes up in `size` draws with replacement: int32[draws, size]."""
    if not size:
        return np.zeros((draws, 0), np.int32)
    picked = rng.integers(size, size=(draws, size))
    picked += size * np.arange(draws)[:, None]
    return np.bincount(picked.ravel(), minlength=draws * size).astype(np.int32).reshape(draws, size)


def estimate(value: float, samples: Floats) -> Estimate:
    """The value with the percentile interval of its bootstrap samples."""
    low, high = np.quantile(samples, [TAIL, 1 - TAIL])
    return Estimate(value=float(value), low=float(low), high=float(high))
