import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import cases

from guardloop.evaluation.bootstrap import bootstrap, estimate, resample_weights
from guardloop.evaluation.metrics import auprc, auroc, curve, rank, recall_at_fpr


def all_weights(groups, unsafe, resamples=300, seed=0):
    return np.concatenate(list(resample_weights(groups, unsafe, resamples, seed)))


@settings(max_examples=cases(100), deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=40))
def test_groups_are_redrawn_whole_and_within_their_stratum(rows):
    groups = np.unique([group for group, _ in rows], return_inverse=True)[1]
    unsafe = np.array([label for _, label in rows])
    weights = all_weights(groups, unsafe, resamples=20)
    assert weights.shape == (20, len(rows))
    for group in set(groups):
        assert (weights[:, groups == group] == weights[:, groups == group][:, :1]).all()
    first = np.unique(groups, return_index=True)[1]
    labels = [frozenset(unsafe[groups == groups[i]]) for i in first]
    for stratum in set(labels):
        members = first[[label == stratum for label in labels]]
        assert (weights[:, members].sum(axis=1) == len(members)).all()
    assert (weights[:, unsafe].sum(axis=1) > 0).all() or not unsafe.any()
    assert (weights[:, ~unsafe].sum(axis=1) > 0).all() or unsafe.all()


def test_every_row_is_drawn_equally_often_on_average():
    groups, unsafe = np.arange(40), np.arange(40) < 10
    assert all_weights(groups, unsafe, 20_000).mean(axis=0) == pytest.approx(np.ones(40), abs=0.05)


def test_the_number_of_resamples_and_the_seed_are_kept():
    groups, unsafe = np.arange(3000), np.arange(3000) < 900
    one, same, other = (all_weights(groups, unsafe, 401, seed) for seed in (1, 1, 2))
    assert len(one) == 401
    assert (one == same).all()
    assert (one != other).any()


def test_near_duplicates_do_not_narrow_the_interval():
    rng = np.random.default_rng(0)
    unsafe = rng.random(400) < 0.4
    scores = rng.normal(size=400) + unsafe

    def spread(copies, grouped):
        s, u = np.tile(scores, copies), np.tile(unsafe, copies)
        groups = np.tile(np.arange(400), copies) if grouped else np.arange(400 * copies)
        ranking = rank(s, u)
        return bootstrap(lambda w: {"auprc": auprc(curve(ranking, w))}, groups, u, 400, 0)["auprc"].std()

    assert spread(4, grouped=True) == pytest.approx(spread(1, grouped=True), rel=0.1)
    assert spread(4, grouped=False) < 0.7 * spread(4, grouped=True)


def test_the_interval_of_a_mean_is_the_textbook_one():
    flagged = np.arange(1000) < 200
    statistic = lambda w: {"recall": w @ flagged.astype(w.dtype) / w.sum(axis=1)}  # noqa: E731
    found = estimate(0.2, bootstrap(statistic, np.arange(1000), np.ones(1000, bool), 4000, 0)["recall"])
    half = 1.96 * np.sqrt(0.2 * 0.8 / 1000)
    assert (found.low, found.high) == pytest.approx((0.2 - half, 0.2 + half), abs=0.003)


@pytest.mark.slow
def test_ten_thousand_resamples_of_five_thousand_rows_take_seconds():
    rng = np.random.default_rng(0)
    unsafe = rng.random(5000) < 0.3
    rankings = [rank(rng.normal(size=5000) + unsafe, unsafe) for _ in range(2)]

    def statistic(weights):
        curves = [curve(ranking, weights) for ranking in rankings]
        values = [value for c in curves for value in (auprc(c), auroc(c), recall_at_fpr(c, 0.05))]
        return {str(i): value for i, value in enumerate(values)}

    start = time.perf_counter()
    assert bootstrap(statistic, np.arange(5000), unsafe, 10_000, 0)["0"].shape == (10_000,)
    assert time.perf_counter() - start < 10
