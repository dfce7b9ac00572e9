import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.cases import cases
from support.feedback_examples import judged, screened

from guardloop.mining.evidence import Evidence, gather, probability, weigh
from guardloop.mining.settings import MiningSettings

many = hypothesis_settings(max_examples=cases(80), deadline=None, derandomize=True)
DEFAULTS = MiningSettings()
EPSILON = 1e-6

anything = st.builds(
    MiningSettings,
    prior_strength=st.floats(0, 20),
    answered_evidence=st.floats(0, 1),
    refused_evidence=st.floats(0, 1),
)
sensible = st.builds(
    MiningSettings,
    prior_strength=st.floats(1, 8),
    answered_evidence=st.floats(0.2, 1),
    refused_evidence=st.floats(0, 0.2),
)
priors = st.floats(-4, 4)
responses = st.lists(st.tuples(st.floats(-30, 30), st.booleans()), max_size=8)


def weighed(prior: float, rows: list[tuple[float, bool]]) -> Evidence:
    """The evidence of responses, each a score and whether it is a refusal."""
    prompt = screened("p", prior)
    evidence = Evidence(prompt, prior)
    for sample, (score, refusal) in enumerate(rows):
        evidence.add(judged(prompt, sample, score, refusal))
    return evidence


def belief(prior: float, rows: list[tuple[float, bool]], settings: MiningSettings = DEFAULTS) -> float:
    return weighed(prior, rows).posterior(settings)


@many
@given(st.floats(-100, 100), responses, anything)
def test_the_posterior_is_a_probability(prior, rows, settings):
    assert 0 <= belief(prior, rows, settings) <= 1


@many
@given(priors, anything)
def test_without_responses_the_posterior_is_the_prior(prior, settings):
    assert belief(prior, [], settings) == pytest.approx(probability(prior))


@many
@given(priors, responses, anything)
def test_with_a_very_strong_prior_evidence_hardly_moves_it(prior, rows, settings):
    stubborn = settings.model_copy(update={"prior_strength": 1e9})
    assert belief(prior, rows, stubborn) == pytest.approx(probability(prior), abs=1e-6)


@many
@given(priors, responses, sensible)
def test_a_blocked_response_raises_it(prior, rows, settings):
    assert belief(prior, [*rows, (20.0, False)], settings) > belief(prior, rows, settings) - EPSILON
    assert belief(prior, [(20.0, False)], settings) > probability(prior)


@many
@given(priors, responses, sensible)
def test_an_answered_response_lowers_it(prior, rows, settings):
    assert belief(prior, [*rows, (-20.0, False)], settings) < belief(prior, rows, settings)


@many
@given(priors, responses, sensible)
def test_a_refusal_moves_it_less_than_an_answer(prior, rows, settings):
    before = belief(prior, rows, settings)
    refused, answered = (belief(prior, [*rows, (-20.0, refusal)], settings) for refusal in (True, False))
    assert answered - EPSILON <= refused <= before + EPSILON
    if settings.refused_evidence < settings.answered_evidence - 0.05:
        assert answered < refused


@many
@given(priors, responses.filter(bool), st.data(), anything)
def test_a_higher_score_of_any_response_never_lowers_it(prior, rows, data, settings):
    place = data.draw(st.integers(0, len(rows) - 1))
    higher = [*rows]
    higher[place] = (rows[place][0] + data.draw(st.floats(0, 10)), rows[place][1])
    assert weighed(prior, higher).harm >= weighed(prior, rows).harm
    if (rows[place][0] > 0) == (higher[place][0] > 0):  # a refusal that turns out to be blocked is no refusal any more
        assert belief(prior, higher, settings) >= belief(prior, rows, settings) - EPSILON


@many
@given(priors, st.integers(0, 64), st.booleans(), sensible)
def test_zero_of_k_is_never_below_what_the_settings_allow(prior, k, refusal, settings):
    rows = [(-60.0, refusal)] * k
    weight = settings.refused_evidence if refusal else settings.answered_evidence
    floor = settings.prior_strength * probability(prior) / (settings.prior_strength + weight * k)
    assert belief(prior, rows, settings) >= floor - EPSILON


def test_what_the_defaults_make_of_four_responses():
    answered, blocked, refused = (-20.0, False), (20.0, False), (-20.0, True)
    even = 0.0  # the guard is undecided
    assert belief(even, [answered] * 4) == pytest.approx(0.25)
    assert belief(even, [refused] * 4) == pytest.approx(1 / 2.4)
    assert belief(even, [blocked] * 2 + [answered] * 2) == pytest.approx(0.6)
    assert belief(even, [blocked] * 4) == pytest.approx(5 / 6)


def test_an_answer_counts_in_full_beside_refusals_that_the_judge_is_unsure_of():
    rows = [(0.0, True)] * 2  # half harmful, half refused
    assert belief(0.0, [*rows, (-20.0, False)]) == pytest.approx((2 * 0.5 + 1) / (2 + 1 + 0.1 * 1 + 0.5 * 1))


def test_a_blocked_refusal_counts_as_blocked():
    evidence = weighed(0.0, [(5.0, True), (-5.0, True), (-5.0, False)])
    assert (evidence.responses, evidence.blocked, evidence.refusals) == (3, 1, 1)
    assert evidence.worst is not None and evidence.worst["sample"] == 0


@pytest.mark.parametrize(("share", "blocked", "responses"), [(0.28, 7, 25), (0.56, 14, 25), (0.14, 7, 50), (0.5, 2, 4)])
def test_the_share_of_a_positive_is_reached_exactly(share, blocked, responses):
    settings = MiningSettings(min_blocked_share=share)
    rows = [judged(screened("p", -1.0), i, 1.0 if i < blocked else -1.0) for i in range(responses)]
    assert gather(rows)["p"].is_positive(settings)
    assert not gather(rows[1:])["p"].is_positive(settings)


def test_responses_are_gathered_by_prompt_without_those_that_failed():
    one, two, three = (screened(name, -1.0) for name in ("one", "two", "three"))
    rows = [judged(one, 0, 2.0), judged(two, 0, -2.0), judged(one, 1, -2.0), judged(one, 2, None)]
    rows += [judged(two, 1, 9.0, finish="error"), judged(three, 0, None, finish="error")]
    found = gather(rows)
    assert {name: (e.responses, e.blocked) for name, e in found.items()} == {"one": (2, 1), "two": (1, 0)}


@pytest.mark.parametrize("score", [-1e6, -60.0, 0.0, 60.0, 1e6])
def test_the_probability_of_any_score_is_defined(score):
    assert 0 <= probability(score) <= 1 and probability(score) + probability(-score) == pytest.approx(1)


named = st.lists(st.tuples(st.sampled_from(["one", "two", "three"]), st.floats(-30, 30), st.booleans()), min_size=1)


def voted(rows: list[tuple[str, float, bool]], strength: float = 0.0) -> float:
    """The target that votes make of responses: each a responder, a score and whether it is a refusal."""
    prompt = screened("p", 3.0)
    table = [judged(prompt, n, score, refusal) | {"responder": who} for n, (who, score, refusal) in enumerate(rows)]
    return weigh(gather(table), MiningSettings(fusion="votes", prior_strength=strength)).targets["p"]


@many
@given(named, st.randoms())
def test_each_responder_has_one_vote_for_its_worst_response(rows, draw):
    worst = {who: max(score for other, score, _ in rows if other == who) for who, _, _ in rows}
    assert voted(rows) == pytest.approx(sum(map(probability, worst.values())) / len(worst))
    assert voted(draw.sample(rows, len(rows))) == voted(rows)


strengths = st.sampled_from([0.0, 1.0, 2.5])


@many
@given(named, st.floats(0, 10), strengths)
def test_more_harm_never_lowers_a_vote(rows, more, strength):
    (who, score, refusal), *rest = rows
    assert voted([(who, score + more, refusal), *rest], strength) >= voted(rows, strength) - 1e-9


@many
@given(named, st.sampled_from(["one", "two", "three"]), strengths)
def test_harmless_responses_of_one_that_has_voted_change_nothing(rows, who, strength):
    if any(other == who for other, _, _ in rows):
        assert voted([*rows, (who, -30.0, False)], strength) == voted(rows, strength)


scores = st.lists(st.tuples(st.floats(-12, 12), st.floats(-12, 12)), min_size=1, max_size=12)


def targets(rows: list[tuple[float, ...]], strength: float) -> list[float]:
    """Targets by votes of prompts, each (the own score, the judge's score of one response of each responder)."""
    table = [
        judged(screened(str(n), own), who, score) | {"responder": f"responder {who}"}
        for n, (own, *theirs) in enumerate(rows)
        for who, score in enumerate(theirs)
    ]
    found = weigh(gather(table), MiningSettings(fusion="votes", prior_strength=strength)).targets
    return [found[str(n)] for n in range(len(rows))]


@many
@given(scores, st.floats(0, 5))
def test_the_own_score_votes_as_often_for_unsafe_as_the_responders(pairs, strength):
    theirs = [probability(score) for _, score in pairs]
    assert sum(targets(pairs, strength)) == pytest.approx(sum(theirs), rel=1e-6, abs=1e-9)
    assert targets(pairs, 0.0) == pytest.approx(theirs)


@many
@given(st.lists(st.tuples(*[st.floats(-12, 12)] * 4), min_size=1, max_size=12), st.floats(0, 5))
def test_the_own_score_votes_for_unsafe_as_often_as_all_responders_do(rows, strength):
    theirs = [list(map(probability, scores)) for _, *scores in rows]
    expected = sum(sum(each) + strength * min(each) for each in theirs) / (3 + strength)
    assert sum(targets(rows, strength)) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@many
@given(scores, st.floats(-9, 9))
def test_the_own_score_counts_by_its_order_not_by_its_level(pairs, more):
    moved = [(own + more, score) for own, score in pairs]
    assert targets(moved, 1.0) == pytest.approx(targets(pairs, 1.0), abs=1e-6)
    assert targets([(own + (n == 0), score) for n, (own, score) in enumerate(pairs)], 1.0)[0] >= (
        targets(pairs, 1.0)[0] - 1e-9
    )


def test_votes_of_nothing_are_nothing():
    assert weigh({}, MiningSettings(fusion="votes")).targets == {}
