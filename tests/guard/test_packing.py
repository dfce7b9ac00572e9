import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardloop.guard.packing import (
    BLOCK,
    NOTHING,
    PADDING,
    TEMPLATE,
    batches,
    bins,
    blocks_of,
    lay_out,
    most_rows,
    packs,
)

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True)
lengths = st.lists(st.integers(1, 700), max_size=80)


@given(lengths=lengths, budget=st.integers(1, 3000))
@PROPERTY
def test_every_row_is_in_one_batch_within_the_budget(lengths, budget):
    made = list(batches(lengths, budget))
    assert sorted(i for batch in made for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget for batch in made)


@given(lengths=lengths, size=st.integers(1, 1200), most=st.integers(1, 9))
@PROPERTY
def test_every_row_that_fits_is_in_one_bin(lengths, size, most):
    made = bins(lengths, size, most)
    assert sorted(i for chosen in made for i in chosen) == [i for i, n in enumerate(lengths) if n <= size]
    assert all(0 < len(chosen) <= most and sum(lengths[i] for i in chosen) <= size for chosen in made)


@given(lengths=lengths, size=st.integers(1, 1200))
@PROPERTY
def test_no_two_bins_could_be_one(lengths, size):
    filled = [sum(lengths[i] for i in chosen) for chosen in bins(lengths, size, 10**6)]
    assert sum(2 * f <= size for f in filled) <= 1


@given(lengths=st.lists(st.integers(84, 592), max_size=120))
@PROPERTY
def test_packs_and_what_is_left_over_are_all_rows_once(lengths):
    made, left = packs(lengths, (4096, 1024))
    assert sorted([i for _, pack in made for i in pack] + left) == list(range(len(lengths)))
    for size, pack in made:
        assert 0.4 * size <= sum(lengths[i] for i in pack) <= size
        assert len(pack) <= most_rows(size)
    if sum(lengths) < 4096:
        assert not made
    else:
        assert sum(lengths[i] for i in left) < 0.4 * 1024


def seen_by(layout, query):
    """Keys that a token sees, said plainly: the template, and its own conversation up to itself."""
    owner, keys = layout.owner[query], layout.key_owner
    index = np.arange(len(keys))
    return ((keys == TEMPLATE) | (keys == owner)) & (index <= query + layout.offset)


layouts = st.builds(
    lambda rows, template, cached, spare: lay_out(
        rows, _size(rows, 0 if cached else template, spare), BLOCK, template, () if cached else [9] * template
    ),
    rows=st.lists(st.integers(1, 200).map(lambda n: [5] * n), min_size=1, max_size=12),
    template=st.integers(1, 300),
    cached=st.booleans(),
    spare=st.integers(0, 2),
)


def _size(rows, template, spare):
    return (-(-(template + sum(map(len, rows))) // BLOCK) + spare) * BLOCK


@given(layout=layouts)
@PROPERTY
def test_the_squares_hold_all_that_is_seen_and_full_ones_nothing_else(layout):
    every = np.arange(len(layout.owner))
    for queries in (every, layout.rows):
        blocks = blocks_of(layout, queries)
        for square in range(len(queries) // BLOCK):
            inside = queries[square * BLOCK : (square + 1) * BLOCK]
            partial = set(blocks.partial[square, : blocks.partial_count[square]].tolist())
            full = set(blocks.full[square, : blocks.full_count[square]].tolist())
            assert not partial & full
            seen = np.array([seen_by(layout, q) for q in inside])
            for block in range(-(-len(layout.key_owner) // BLOCK)):
                part = seen[:, block * BLOCK : (block + 1) * BLOCK]
                real = layout.owner[inside] != PADDING
                if part[real].any():
                    assert block in partial | full
                if block in full:
                    assert part.all()


@given(layout=layouts)
@PROPERTY
def test_positions_are_those_of_a_conversation_alone(layout):
    for number in range(1, int(layout.owner.max()) + 1):
        own = np.flatnonzero(layout.owner == number)
        template = int((layout.key_owner == TEMPLATE).sum())
        assert layout.positions[own].tolist() == list(range(template, template + len(own)))
        assert layout.rows[number - 1] == own[-1]
    assert len(layout.key_owner) % BLOCK == 0
    assert ((layout.key_owner == NOTHING).sum() < BLOCK) or layout.offset == 0


@pytest.mark.parametrize("rows", [[], [[1] * 129], [[1]] * 129])
def test_rows_that_do_not_fit_are_refused(rows):
    with pytest.raises(ValueError, match="do not fit a pack"):
        lay_out(rows, 128, 128, 10)
