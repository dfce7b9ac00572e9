"""The one packer: which prompts pass through the model together, and who sees whom in a pack.

A pack is one row of tokens: conversations one after another behind one copy of the template. Each conversation sees
the template and itself only, at the positions it would have alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 128  # sizes of packs are multiples of it: the largest side of the squares in which keys are looked at
FILLED = 0.4  # a GPU takes about this share of a pack's time for the same rows in batches


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices of rows of like length, shortest first: each batch within `budget` tokens, padding included."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def bins(lengths: Sequence[int], size: int, most: int) -> list[list[int]]:
    """Indices of rows that fill packs of `size` tokens with at most `most` rows: first fit, longest first.

    A row longer than `size` is in no bin.
    """
    found: list[list[int]] = []
    room: list[int] = []
    first = 0  # bins before it have no room for any row
    least = min(lengths, default=0)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[index] > size:
            continue
        for number in range(first, len(found)):
            if room[number] >= lengths[index] and len(found[number]) < most:
                break
        else:
            number = len(found)
            found.append([])
            room.append(size)
        found[number].append(index)
        room[number] -= lengths[index]
        while first < len(found) and (room[first] < least or len(found[first]) == most):
            first += 1
    return found


def packs(lengths: Sequence[int], sizes: Sequence[int]) -> tuple[list[tuple[int, list[int]]], list[int]]:
    """Packs `(size, indices)` of the few `sizes`, largest first, and the indices that are left over.

    A pack less than two fifths full is not worth its cost; its rows go to the next size, or are left over. Nothing is
    packed where the rows do not fill one pack of the largest size.
    """
    found: list[tuple[int, list[int]]] = []
    left = list(range(len(lengths)))
    if sum(lengths) < sizes[0]:
        return found, left
    for size in sizes:
        made = [[left[i] for i in chosen] for chosen in bins([lengths[i] for i in left], size, most_rows(size))]
        full = [pack for pack in made if sum(lengths[i] for i in pack) >= FILLED * size]
        found += [(size, pack) for pack in full]
        gone = {i for pack in full for i in pack}
        left = [i for i in left if i not in gone]
    return found, left


def most_rows(size: int) -> int:
    """How many rows of a pack are read: a guard's conversation, with the template's end, is seldom shorter than 64."""
    return max(BLOCK, size // 64 // BLOCK * BLOCK)


@dataclass(frozen=True)
class Layout:
    """One pack of `N` query tokens, of which `R` rows are read, and `K` keys: cached template, then the pack itself."""

    tokens: np.ndarray
    """`int[N]`: token ids, 0 where padded."""
    positions: np.ndarray
    """`int[N]`: each token's position in its own conversation."""
    start: np.ndarray
    """`int[N]`: the first token of the conversation that a token belongs to; padding belongs to itself."""
    rows: np.ndarray
    """`int[R]`: the tokens that are read, conversation after conversation; the last is repeated."""
    template: int
    """How many keys are the template's: the first ones."""
    offset: int
    """How many keys are before the pack's own: the cached template, filled up to whole blocks."""


def lay_out(
    rows: Sequence[Sequence[int]],
    size: int,
    read: int,
    template: int,
    own_template: Sequence[int] = (),
    reads: Sequence[int] = (),
) -> Layout:
    """Lay `rows` (tokens behind the template) out in a pack of `size` tokens of which `read` are read.

    The template's `template` tokens are either cached keys, or, as `own_template`, the pack's first tokens. Of each
    row the last of `reads` tokens are read, by default one. Raises ValueError where the rows do not fit.
    """
    reads = reads or [1] * len(rows)
    used = len(own_template) + sum(map(len, rows))
    if used > size or sum(reads) > read or not rows:
        raise ValueError(f"{len(rows)} rows of {used} tokens do not fit a pack of {size} tokens and {read} read ones")
    tokens, positions = np.zeros(size, np.int64), np.zeros(size, np.int64)
    start = np.arange(size)
    tokens[: len(own_template)] = own_template
    positions[: len(own_template)] = np.arange(len(own_template))
    start[: len(own_template)] = 0
    at, ends = len(own_template), list[int]()
    for row, count in zip(rows, reads, strict=True):
        end = at + len(row)
        tokens[at:end], positions[at:end] = row, np.arange(template, template + len(row))
        start[at:end] = at
        ends += range(end - count, end)
        at = end
    last = np.array(ends + [ends[-1]] * (read - len(ends)), np.int64)
    return Layout(tokens, positions, start, last, template, 0 if len(own_template) else -(-template // BLOCK) * BLOCK)


@dataclass(frozen=True)
class Blocks:
    """Squares of keys that each square of queries looks at: counts `int[Q]` and indices `int[Q, K]`, block-wise."""

    partial_count: np.ndarray
    partial: np.ndarray
    full_count: np.ndarray
    full: np.ndarray


def blocks_of(layout: Layout, queries: np.ndarray, side: int) -> Blocks:
    """The squares of `side` for `queries` (indices of pack tokens, ascending); a full one needs no look at the mask."""
    keys = (layout.offset + len(layout.tokens)) // side
    squares = len(queries) // side
    found = Blocks(
        np.zeros(squares, np.int32),
        np.zeros((squares, keys), np.int32),
        np.zeros(squares, np.int32),
        np.zeros((squares, keys), np.int32),
    )
    for square in range(squares):
        inside = queries[square * side : (square + 1) * side]
        first, last = int(inside.min()) + layout.offset, int(inside.max()) + layout.offset
        starts = layout.start[inside] + layout.offset
        template, own = min(layout.template, last + 1), int(starts.min())
        looked_at = {*range(-(-template // side)), *range(own // side, last // side + 1)}
        whole = {*range(min(template, first + 1) // side), *range(-(-int(starts.max()) // side), (first + 1) // side)}
        full, partial = sorted(whole), sorted(looked_at - whole)
        found.full_count[square], found.full[square, : len(full)] = len(full), full
        found.partial_count[square], found.partial[square, : len(partial)] = len(partial), partial
    return found
