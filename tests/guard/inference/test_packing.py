import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import cases

from guardloop.guard.inference.packed import Seen
from guardloop.guard.inference.packing import (
    BLOCK,
    batches,
    bins,
    blocks_of,
    lay_out,
    most_rows,
    packs,
)

PROPERTY = settings(max_examples=cases(80), deadline=None, derandomize=True)
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


PACK = st.fixed_dictionaries(
    {
        "rows": st.lists(st.integers(1, 200).map(lambda n: [5] * n), min_size=1, max_size=12),
        "template": st.integers(1, 300),
        "cached": st.booleans(),
        "spare": st.integers(0, 2),
    }
)


def laid_out(rows, template, cached, spare):
    own = [] if cached else [9] * template
    size = (-(-(len(own) + sum(map(len, rows))) // BLOCK) + spare) * BLOCK
    return lay_out(rows, size, BLOCK, template, own)


def seen_in(rows, template, cached, keys, offset):
    """Keys that each token of a pack sees, said plainly: the template, and its own conversation up to itself."""
    owner = np.full(keys, -1)  # -1: nobody's; -2: the template's
    owner[:template] = -2
    at = offset if cached else template
    for number, row in enumerate(rows):
        owner[at : at + len(row)] = number
        at += len(row)
    return {
        q - offset: np.isin(owner, (-2, owner[q])) & (np.arange(keys) <= q)
        for q in range(offset, keys)
        if owner[q] != -1
    }


@pytest.mark.slow
@pytest.mark.parametrize("side", [64, BLOCK])
@given(pack=PACK)
@PROPERTY
def test_the_squares_hold_all_that_is_seen_and_full_ones_nothing_else(side, pack):
    layout = laid_out(**pack)
    keys = layout.offset + len(layout.tokens)
    seen = seen_in(pack["rows"], pack["template"], pack["cached"], keys, layout.offset)
    for queries in (np.arange(len(layout.tokens)), layout.rows):
        blocks = blocks_of(layout, queries, side)
        assert len(blocks.full_count) == len(queries) // side
        for square in range(len(queries) // side):
            inside = [seen[q] for q in queries[square * side : (square + 1) * side] if q in seen]
            partial = set(blocks.partial[square, : blocks.partial_count[square]].tolist())
            full = set(blocks.full[square, : blocks.full_count[square]].tolist())
            assert not partial & full
            for block in range(keys // side):
                parts = [row[block * side : (block + 1) * side] for row in inside]
                if any(part.any() for part in parts):
                    assert block in partial | full
                if block in full:
                    assert all(part.all() for part in parts)


@pytest.mark.slow
@given(pack=PACK)
@PROPERTY
def test_the_mask_is_what_each_token_sees(pack):
    layout = laid_out(**pack)
    keys = layout.offset + len(layout.tokens)
    for queries in (np.arange(len(layout.tokens)), layout.rows):
        mask = Seen(layout, queries, torch.device("cpu")).mask
        found = mask(None, None, torch.arange(len(queries))[:, None], torch.arange(keys)[None]).numpy()
        wanted = seen_in(pack["rows"], pack["template"], pack["cached"], keys, layout.offset)
        assert all((found[n] == wanted[q]).all() for n, q in enumerate(queries.tolist()) if q in wanted)


@given(pack=PACK)
@PROPERTY
def test_positions_are_those_of_a_conversation_alone(pack):
    layout = laid_out(**pack)
    at = 0 if pack["cached"] else pack["template"]
    for number, row in enumerate(pack["rows"]):
        own = slice(at, at + len(row))
        assert layout.positions[own].tolist() == list(range(pack["template"], pack["template"] + len(row)))
        assert set(layout.start[own].tolist()) == {at}
        at += len(row)
        assert layout.rows[number] == at - 1
    assert layout.template == pack["template"]
    assert layout.offset % BLOCK == 0
    assert (0 <= layout.offset - pack["template"] < BLOCK) if pack["cached"] else layout.offset == 0


@pytest.mark.parametrize("rows", [[], [[1] * 129], [[1]] * 129])
def test_rows_that_do_not_fit_are_refused(rows):
    with pytest.raises(ValueError, match="do not fit a pack"):
        lay_out(rows, 128, 128, 10)
