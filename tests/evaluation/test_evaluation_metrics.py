from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, roc_auc_score, roc_curve
from support.cases import cases

from guardloop.evaluation.bootstrap import resample_weights
from guardloop.evaluation.metrics import (
    auprc,
    auroc,
    calibration,
    calibration_metrics,
    curve,
    decision_metrics,
    mean_recall,
    rank,
    recall_at_fpr,
)

REAL = st.floats(0, 5).map(lambda weight: round(weight, 3))
WHOLE = st.integers(0, 4)


@st.composite
def weighted_rows(draw, weights=REAL):
    """Scores with many ties, labels and weights; both classes carry weight."""
    row = st.tuples(st.integers(-4, 4), st.booleans(), weights)
    rows = [
        *draw(st.lists(row, max_size=40)),
        (draw(st.integers(-4, 4)), True, 1.0),
        (draw(st.integers(-4, 4)), False, 1.0),
    ]
    scores, unsafe, weight = zip(*rows, strict=True)
    return np.array(scores, float), np.array(unsafe), np.array(weight, float)


@settings(max_examples=cases(200), deadline=None)
@given(weighted_rows())
def test_areas_are_those_of_scikit_learn(rows):
    scores, unsafe, weight = rows
    c = curve(rank(scores, unsafe), weight[None])
    assert auprc(c)[0] == pytest.approx(average_precision_score(unsafe, scores, sample_weight=weight), abs=1e-9)
    assert auroc(c)[0] == pytest.approx(roc_auc_score(unsafe, scores, sample_weight=weight), abs=1e-9)


@settings(max_examples=cases(200), deadline=None)
@given(weighted_rows(WHOLE), st.sampled_from([0.0, 0.01, 0.05, 0.2, 0.5, 1.0]))
def test_recall_at_fpr_is_the_best_point_of_the_roc_curve(rows, fpr):
    scores, unsafe, weight = rows
    blocked, caught, _ = roc_curve(unsafe, scores, sample_weight=weight, drop_intermediate=False)
    best = caught[blocked <= fpr + 1e-12].max()
    assert recall_at_fpr(curve(rank(scores, unsafe), weight[None]), fpr)[0] == pytest.approx(best)


@settings(max_examples=cases(200), deadline=None)
@given(weighted_rows(WHOLE), st.sampled_from([0.01, 0.05, 0.2, 0.5, 1.0]))
def test_mean_recall_is_the_area_under_the_steps_of_the_roc_curve(rows, fpr):
    scores, unsafe, weight = rows
    c = curve(rank(scores, unsafe), weight[None])
    blocked, _, _ = roc_curve(unsafe, scores, sample_weight=weight, drop_intermediate=False)
    steps = np.unique([0.0, fpr, *blocked[blocked < fpr]])
    area = sum(recall_at_fpr(c, start)[0] * (end - start) for start, end in pairwise(steps))
    assert mean_recall(c, fpr)[0] == pytest.approx(area / fpr)


@settings(max_examples=cases(50), deadline=None)
@given(weighted_rows(WHOLE))
def test_mean_recall_at_no_false_positives_is_recall_there_and_beyond_one_stays(rows):
    scores, unsafe, weight = rows
    c = curve(rank(scores, unsafe), np.stack([weight, weight]))
    assert mean_recall(c, np.array([0.0, 1.4])) == pytest.approx([recall_at_fpr(c, 0.0)[0], mean_recall(c, 1.0)[0]])


@settings(max_examples=cases(50), deadline=None)
@given(weighted_rows(WHOLE))
def test_a_weight_is_that_many_copies_of_the_row(rows):
    scores, unsafe, weight = rows
    many = np.repeat(np.arange(len(scores)), weight.astype(int))
    weighted = curve(rank(scores, unsafe), weight[None])
    copied = curve(rank(scores[many], unsafe[many]), np.ones((1, len(many))))
    for metric in (auprc, auroc, lambda c: recall_at_fpr(c, 0.1)):
        assert metric(weighted)[0] == pytest.approx(metric(copied)[0])


def test_each_weighting_has_its_own_value_and_its_own_fpr():
    rng = np.random.default_rng(0)
    scores, unsafe = rng.normal(size=200).round(1), rng.random(200) < 0.3
    weights = rng.integers(0, 4, size=(7, 200), dtype=np.int32)
    fprs = np.linspace(0, 0.6, 7)
    together = curve(rank(scores, unsafe), weights)
    for b in range(7):
        alone = curve(rank(scores, unsafe), weights[b : b + 1].astype(np.float64))
        assert auprc(together)[b] == pytest.approx(auprc(alone)[0], abs=1e-5)
        assert auroc(together)[b] == pytest.approx(auroc(alone)[0], abs=1e-5)
        assert recall_at_fpr(together, fprs)[b] == pytest.approx(recall_at_fpr(alone, fprs[b])[0], abs=1e-5)


@settings(max_examples=cases(50), deadline=None)
@given(weighted_rows(), st.floats(0.1, 10), st.floats(-5, 5))
def test_only_the_order_of_scores_matters_to_the_areas(rows, scale, shift):
    scores, unsafe, weight = rows
    one, other = (curve(rank(s, unsafe), weight[None]) for s in (scores, scores * scale + shift))
    assert auprc(one)[0] == pytest.approx(auprc(other)[0])
    assert auroc(one)[0] == pytest.approx(auroc(other)[0])


def test_a_constant_guard_is_at_chance():
    unsafe = np.arange(100) < 7
    c = curve(rank(np.zeros(100), unsafe), np.ones((1, 100)))
    assert auprc(c)[0] == pytest.approx(0.07)
    assert auroc(c)[0] == pytest.approx(0.5)
    assert recall_at_fpr(c, 0.05)[0] == 0


def test_decision_metrics_of_a_known_table():
    found = decision_metrics(*(np.array([float(v)]) for v in (30, 10, 40, 160)))
    expected = {"accuracy": 0.9, "precision": 0.75, "recall": 0.75, "f1": 0.75, "fpr": 0.0625}
    assert {name: value[0] for name, value in found.items()} == pytest.approx(expected)


def test_a_guard_that_flags_nothing_has_precision_and_f1_zero():
    found = decision_metrics(*(np.array([float(v)]) for v in (0, 0, 40, 160)))
    assert found["precision"][0] == found["f1"][0] == f1_score([1, 0], [0, 0], zero_division=0) == 0
    assert found["accuracy"][0] == 0.8


def calibrated(scores, unsafe, weights=None, temperature=1.0, bins=15):
    weights = np.ones((1, len(scores))) if weights is None else weights
    found = calibration_metrics(calibration(scores, temperature, unsafe, bins), weights)
    return {name: value[0] for name, value in found.items()}


def test_brier_is_that_of_scikit_learn():
    rng = np.random.default_rng(1)
    scores, unsafe, weights = rng.normal(size=300) * 3, rng.random(300) < 0.4, rng.integers(0, 4, (1, 300))
    for temperature in (1.0, 2.5):
        wanted = brier_score_loss(unsafe, 1 / (1 + np.exp(-scores / temperature)), sample_weight=weights[0])
        assert calibrated(scores, unsafe, weights, temperature)["brier"] == pytest.approx(wanted)


def test_ece_is_the_gap_between_confidence_and_frequency():
    unsafe = np.arange(100) < 50
    assert calibrated(np.zeros(100), unsafe)["ece"] == pytest.approx(0)  # says 0.5, is 0.5
    assert calibrated(np.full(100, 50.0), unsafe)["ece"] == pytest.approx(0.5)  # says 1, is 0.5
    assert calibrated(np.where(unsafe, 50.0, -50.0), unsafe)["ece"] == pytest.approx(0, abs=1e-9)
    assert calibrated(np.where(unsafe, -50.0, 50.0), unsafe)["ece"] == pytest.approx(1)


def test_the_weighted_ece_is_that_of_copied_rows():
    rng = np.random.default_rng(2)
    scores, unsafe, weights = rng.normal(size=80), rng.random(80) < 0.4, rng.integers(0, 4, 80)
    many = np.repeat(np.arange(80), weights)
    assert calibrated(scores, unsafe, weights[None])["ece"] == pytest.approx(
        calibrated(scores[many], unsafe[many])["ece"]
    )


def test_the_right_temperature_calibrates():
    rng = np.random.default_rng(3)
    log_odds = rng.normal(size=20_000) * 2
    unsafe = rng.random(20_000) < 1 / (1 + np.exp(-log_odds))
    errors = {t: calibrated(3 * log_odds, unsafe, temperature=t)["ece"] for t in (1.0, 3.0, 9.0)}
    assert errors[3.0] < 0.02
    assert min(errors[1.0], errors[9.0]) > 0.05


def test_at_its_own_false_positive_rate_a_guard_catches_no_less_than_at_its_threshold():
    draw = np.random.default_rng(0)
    scores, unsafe = draw.normal(size=400), np.arange(400) % 3 == 0
    flagged = scores > 1.0
    weights = next(resample_weights(np.arange(400), unsafe, 500, seed=0))
    c = curve(rank(scores, unsafe), weights)
    caught, blocked = (weights[:, flagged & of].sum(axis=1) for of in (unsafe, ~unsafe))
    found = decision_metrics(caught, blocked, c.unsafe, c.safe)
    assert len(found["fpr"]) == 500
    assert (recall_at_fpr(c, found["fpr"]) >= found["recall"]).all()  # a rate rounded down would lose a blocked row
