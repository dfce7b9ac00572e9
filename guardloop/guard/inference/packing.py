"""Which conversations pass through the model together, and what each token of a packed sequence sees.

A pack is one sequence of tokens: conversations one after another, after one copy of the prefix (the template's first
tokens). Each conversation sees the prefix and itself only, at the positions that it would have alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

BLOCK = 128
"""Sizes of packs are multiples of it: the largest side of the mask's blocks."""
MIN_FILLED = 0.4  # a GPU takes about this share of a pack's time for the same conversations in batches
T = TypeVar("T")


def padded_batches(items: Sequence[T], max_tokens: int, length: Callable[[T], int]) -> Iterator[list[T]]:
    """The items in batches of like length, shortest first, each within `max_tokens` tokens, padding included."""
    batch: list[T] = []
    for item in sorted(items, key=length):
        if batch and (len(batch) + 1) * length(item) > max_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def bins(items: Sequence[T], size: int, max_items: int, length: Callable[[T], int]) -> tuple[list[list[T]], list[T]]:
    """The items in bins of `size` tokens and at most `max_items` items (first fit, longest first); those too long."""
    filled: list[list[T]] = []
    room: list[int] = []
    first = 0  # bins before it have no room for any item
    shortest = min(map(length, items), default=0)
    for item in sorted((item for item in items if length(item) <= size), key=length, reverse=True):
        tokens = length(item)
        for number in range(first, len(filled)):
            if room[number] >= tokens and len(filled[number]) < max_items:
                break
        else:
            number = len(filled)
            filled.append([])
            room.append(size)
        filled[number].append(item)
        room[number] -= tokens
        while first < len(filled) and (room[first] < shortest or len(filled[first]) == max_items):
            first += 1
    return filled, [item for item in items if length(item) > size]


def packs(
    items: Sequence[T], sizes: Sequence[int], length: Callable[[T], int]
) -> tuple[list[tuple[int, list[T]]], list[T]]:
    """Packs `(size, items)` of the few `sizes`, which come largest first, and the items that are left over.

    A pack less than two fifths full is not worth its cost; its items go to the next size, or are left over. Nothing is
    packed where the items do not fill one pack of the largest size.
    """
    chosen: list[tuple[int, list[T]]] = []
    left = list(items)
    if sum(map(length, left)) < sizes[0]:
        return chosen, left
    for size in sizes:
        filled, left = bins(left, size, max_labels(size), length)
        for pack in filled:
            if sum(map(length, pack)) >= MIN_FILLED * size:
                chosen.append((size, pack))
            else:
                left += pack
    return chosen, left


def max_labels(size: int) -> int:
    """How many labels a pack has room for: a conversation, with the template's end, seldom has fewer than 64 tokens."""
    return max(BLOCK, size // 64 // BLOCK * BLOCK)


@dataclass(frozen=True)
class Layout:
    """A pack of `N` query tokens, of which `L` are at labels, and its keys: the cached prefix's, then its own."""

    tokens: np.ndarray
    """`int[N]`: token ids, 0 where padded."""
    positions: np.ndarray
    """`int[N]`: each token's position in its own conversation."""
    start: np.ndarray
    """`int[N]`: the first token of the conversation that a token belongs to; padding belongs to itself."""
    label_positions: np.ndarray
    """`int[L]`: each conversation's last token; the last one's is repeated."""
    prefix_length: int
    """How many keys are the prefix's: the first ones."""
    offset: int
    """How many keys are before the pack's own: the cached prefix, filled up to whole blocks."""


def lay_out(
    conversations: Sequence[Sequence[int]],
    size: int,
    prefix_length: int,
    prefix_tokens: Sequence[int] = (),
) -> Layout:
    """Lay conversations (their tokens after the prefix) out in a pack of `size` tokens.

    The prefix's tokens are either cached keys, or, as `prefix_tokens`, the pack's first tokens. Of each conversation
    the last token is read. Raises ValueError where they do not fit.
    """
    count = max_labels(size)
    used = len(prefix_tokens) + sum(map(len, conversations))
    if used > size or not 0 < len(conversations) <= count:
        raise ValueError(
            f"{len(conversations)} conversations of {used} tokens do not fit a pack of {size} tokens and {count} labels"
        )
    tokens, positions = np.zeros(size, np.int64), np.zeros(size, np.int64)
    start = np.arange(size)
    tokens[: len(prefix_tokens)] = prefix_tokens
    positions[: len(prefix_tokens)] = np.arange(len(prefix_tokens))
    start[: len(prefix_tokens)] = 0
    begin, last = len(prefix_tokens), list[int]()
    for conversation in conversations:
        end = begin + len(conversation)
        tokens[begin:end] = conversation
        positions[begin:end] = np.arange(prefix_length, prefix_length + len(conversation))
        start[begin:end] = begin
        last.append(end - 1)
        begin = end
    last += [last[-1]] * (count - len(last))
    offset = 0 if len(prefix_tokens) else -(-prefix_length // BLOCK) * BLOCK
    return Layout(tokens, positions, start, np.array(last, np.int64), prefix_length, offset)


@dataclass(frozen=True)
class Blocks:
    """Blocks of keys that each block of queries sees in part or in full: counts `int[Q]` and indices `int[Q, K]`."""

    partial_count: np.ndarray
    partial: np.ndarray
    full_count: np.ndarray
    full: np.ndarray


def blocks_of(layout: Layout, queries: np.ndarray, side: int) -> Blocks:
    """The blocks of `side` keys for blocks of `queries` (ascending tokens of the pack); a full one needs no mask."""

    def touching(begin: int, end: int) -> set[int]:
        """Blocks that overlap the keys from `begin` up to `end`."""
        return set(range(begin // side, -(-end // side)))

    def inside(begin: int, end: int) -> set[int]:
        """Blocks that lie within them."""
        return set(range(-(-begin // side), end // side))

    keys = (layout.offset + len(layout.tokens)) // side
    count = len(queries) // side
    blocks = Blocks(
        np.zeros(count, np.int32),
        np.zeros((count, keys), np.int32),
        np.zeros(count, np.int32),
        np.zeros((count, keys), np.int32),
    )
    for number in range(count):
        block_queries = queries[number * side : (number + 1) * side]
        # as keys: the first and the last query, and where the conversations of the block's queries start
        first, last = int(block_queries.min()) + layout.offset, int(block_queries.max()) + layout.offset
        starts = layout.start[block_queries] + layout.offset
        prefix = layout.prefix_length
        seen_by_all = inside(0, min(prefix, first + 1)) | inside(int(starts.max()), first + 1)
        seen_by_some = touching(0, min(prefix, last + 1)) | touching(int(starts.min()), last + 1)
        full, partial = sorted(seen_by_all), sorted(seen_by_some - seen_by_all)
        blocks.full_count[number], blocks.full[number, : len(full)] = len(full), full
        blocks.partial_count[number], blocks.partial[number, : len(partial)] = len(partial), partial
    return blocks
