import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.metrics import average_precision_score
from support.cases import cases

from guardloop.mining.latent_class import Channel, Counts, Fusion, fuse

K = 4.0


def traffic(prompts=2500, harm_if_unsafe=0.4, harm_if_safe=0.05, alike=0.5, refused=(0.05, 0.05), seed=0):
    """Scores, what four responses to each prompt showed, and the truth."""
    draw = np.random.default_rng(seed)
    unsafe = draw.random(prompts) < 0.2
    scores = draw.normal(-2.5, 1.2, prompts) + 1.2 * unsafe
    strength = 1 / alike - 1
    mean = np.where(unsafe, harm_if_unsafe, harm_if_safe)
    harm = draw.binomial(int(K), draw.beta(mean * strength + 1e-3, (1 - mean) * strength + 1e-3)).astype(float)
    no = draw.binomial(int(K), np.where(unsafe, *refused)).astype(float)
    total = np.full(prompts, K)
    return scores, [Counts("r: harmful", harm, total), Counts("r: refused", no, total)], unsafe


@pytest.fixture(scope="module")
def fitted():
    scores, counts, _ = traffic()
    return fuse(scores, counts)


def test_it_finds_what_responses_and_scores_are_worth(fitted):
    scores, counts, unsafe = traffic()
    harm, refusals = fitted.channels
    assert (harm.if_unsafe, harm.if_safe) == (pytest.approx(0.4, abs=0.12), pytest.approx(0.05, abs=0.03))
    assert harm.alike == pytest.approx(0.5, abs=0.15)
    assert refusals.if_unsafe == pytest.approx(refusals.if_safe, abs=0.03)
    posterior = fitted.posterior(scores, counts)
    assert posterior.mean() == pytest.approx(unsafe.mean(), abs=0.08)
    ranked = [average_precision_score(unsafe, scores) for scores in (posterior, scores, counts[0].seen)]
    assert ranked[0] > ranked[1] + 0.1 and ranked[0] > ranked[2] + 0.1


def test_responses_that_tell_nothing_change_nothing():
    scores, counts, unsafe = traffic(harm_if_unsafe=0.1, harm_if_safe=0.1)
    found = fuse(scores, counts)

    posterior, half = found.posterior(scores, counts), (2 * expit(scores) + counts[0].seen) / (2 + K)
    ranked = [average_precision_score(unsafe, scores) for scores in (posterior, scores, half)]
    assert ranked[0] == pytest.approx(ranked[1], abs=0.01)
    assert ranked[2] < ranked[1] - 0.1  # which fixed weights do not know


def test_refusals_count_where_they_follow_the_class():
    scores, counts, unsafe = traffic(harm_if_unsafe=0.05, harm_if_safe=0.05, refused=(0.6, 0.05))
    found = fuse(scores, counts)

    assert found.channels[1].if_unsafe > 0.4 > found.channels[1].if_safe
    posterior = found.posterior(scores, counts)
    assert average_precision_score(unsafe, posterior) > average_precision_score(unsafe, scores) + 0.2


def test_no_harm_from_a_responder_that_never_complies_is_no_sign_of_safety():
    scores, counts, _ = traffic(harm_if_unsafe=0.001, harm_if_safe=0.001)
    found = fuse(scores, counts)

    assert found.channels[0].log_ratio(Counts("", np.zeros(1), np.full(1, K)))[0] == pytest.approx(0, abs=0.1)


@hypothesis_settings(max_examples=cases(80), deadline=None, derandomize=True)
@given(score=st.floats(-200, 200), harm=st.floats(0, 8), more=st.floats(0, 1), total=st.integers(0, 8))
def test_more_harm_and_a_higher_score_never_lower_it(fitted, score, harm, more, total):
    def belief(score, harm):
        seen = [Counts("", np.array([h]), np.array([float(total)])) for h in (harm, 0.0)]
        return float(fitted.posterior(np.array([score]), seen)[0])

    harm = min(harm, total)
    rest = total - harm
    assert 0 <= belief(score, harm) <= belief(score, harm + more * rest) + 1e-9 <= 1 + 1e-9
    assert belief(score, harm) <= belief(score + 1, harm) + 1e-9


def test_large_traffic_is_learnt_from_a_sample_and_weighed_whole(monkeypatch):
    monkeypatch.setattr("guardloop.mining.latent_class.SAMPLE", 600)
    scores, counts, unsafe = traffic(prompts=1500)
    found = fuse(scores, counts)
    again = fuse(scores, counts)

    assert found == again  # the sample has a seed
    assert found.posterior(scores, counts).shape == (1500,)
    assert average_precision_score(unsafe, found.posterior(scores, counts)) > 0.6


@pytest.mark.parametrize("prompts", [1, 2, 5])
def test_a_handful_of_prompts_is_no_fault(prompts):
    scores, counts, _ = traffic(prompts=prompts)
    assert np.isfinite(fuse(scores, counts).posterior(scores, counts)).all()


def test_a_posterior_without_responses_is_the_prior():
    fusion = Fusion(0.5, 0.2, [Channel("", 0.4, 0.1, 0.3)])
    scores = np.array([-3.0, 0.0, 2.0])
    nothing = [Counts("", np.zeros(3), np.zeros(3))]
    assert fusion.posterior(scores, nothing) == pytest.approx(fusion.prior(scores))
