import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import cases

from guardloop.guard.inference.packed import VisibleKeys
from guardloop.guard.inference.packing import (
    BLOCK,
    bins,
    blocks_of,
    lay_out,
    max_labels,
    packs,
    padded_batches,
)

PROPERTY = settings(max_examples=cases(80), deadline=None, derandomize=True)
lengths = st.lists(st.integers(1, 700), max_size=80)


def items_of(lengths):
    """What is packed: here numbers with their lengths."""
    return list(enumerate(lengths))


def tokens_of(item):
    return item[1]


@given(lengths=lengths, budget=st.integers(1, 3000))
@PROPERTY
def test_every_row_is_in_one_batch_within_the_budget(lengths, budget):
    made = list(padded_batches(items_of(lengths), budget, tokens_of))
    assert sorted(item for batch in made for item in batch) == items_of(lengths)
    assert all(len(batch) == 1 or len(batch) * max(map(tokens_of, batch)) <= budget for batch in made)


@given(lengths=lengths, size=st.integers(1, 1200), most=st.integers(1, 9))
@PROPERTY
def test_every_row_that_fits_is_in_one_bin(lengths, size, most):
    made, too_long = bins(items_of(lengths), size, most, tokens_of)
    assert sorted(item for filled in made for item in filled) == [i for i in items_of(lengths) if tokens_of(i) <= size]
    assert too_long == [item for item in items_of(lengths) if tokens_of(item) > size]
    assert all(0 < len(filled) <= most and sum(map(tokens_of, filled)) <= size for filled in made)


@given(lengths=lengths, size=st.integers(1, 1200))
@PROPERTY
def test_no_two_bins_could_be_one(lengths, size):
    made, _ = bins(items_of(lengths), size, 10**6, tokens_of)
    assert sum(2 * sum(map(tokens_of, filled)) <= size for filled in made) <= 1


@given(lengths=st.lists(st.integers(84, 592), max_size=120))
@PROPERTY
def test_packs_and_what_is_left_over_are_all_rows_once(lengths):
    made, left = packs(items_of(lengths), (4096, 1024), tokens_of)
    assert sorted([item for _, pack in made for item in pack] + left) == items_of(lengths)
    for size, pack in made:
        assert 0.4 * size <= sum(map(tokens_of, pack)) <= size
        assert len(pack) <= max_labels(size)
    if sum(lengths) < 4096:
        assert not made
    else:
        assert sum(map(tokens_of, left)) < 0.4 * 1024


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
    return lay_out(rows, size, template, own)


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
def test_the_blocks_hold_all_that_is_seen_and_full_ones_nothing_else(side, pack):
    layout = laid_out(**pack)
    keys = layout.offset + len(layout.tokens)
    seen = seen_in(pack["rows"], pack["template"], pack["cached"], keys, layout.offset)
    for queries in (np.arange(len(layout.tokens)), layout.label_positions):
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
    for queries in (np.arange(len(layout.tokens)), layout.label_positions):
        mask = VisibleKeys(layout, queries, torch.device("cpu")).mask
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
        assert layout.label_positions[number] == at - 1
    assert layout.prefix_length == pack["template"]
    assert layout.offset % BLOCK == 0
    assert (0 <= layout.offset - pack["template"] < BLOCK) if pack["cached"] else layout.offset == 0


@pytest.mark.parametrize("rows", [[], [[1] * 129], [[1]] * 129])
def test_rows_that_do_not_fit_are_refused(rows):
    with pytest.raises(ValueError, match="do not fit a pack"):
        lay_out(rows, 128, 10)
