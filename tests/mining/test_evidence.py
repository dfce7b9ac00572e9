import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.cases import cases
from support.mining_examples import judged, screened

from guardloop.mining.evidence import gather, probability, vote

many = hypothesis_settings(max_examples=cases(80), deadline=None, derandomize=True)


def test_a_blocked_refusal_counts_as_blocked():
    rows = [(5.0, True), (-5.0, True), (-5.0, False)]
    evidence = gather(judged(screened("p", 0.0), n, score, refusal) for n, (score, refusal) in enumerate(rows))["p"]
    assert (evidence.responses, evidence.blocked, evidence.refusals) == (3, 1, 1)
    assert evidence.worst_response is not None and evidence.worst_response["sample"] == 0


@pytest.mark.parametrize(("share", "blocked", "responses"), [(0.28, 7, 25), (0.56, 14, 25), (0.14, 7, 50), (0.5, 2, 4)])
def test_the_share_of_a_positive_is_reached_exactly(share, blocked, responses):
    rows = [judged(screened("p", -1.0), i, 1.0 if i < blocked else -1.0) for i in range(responses)]
    assert gather(rows)["p"].is_positive(share)
    assert not gather(rows[1:])["p"].is_positive(share)


def test_responses_are_gathered_by_prompt_without_those_that_failed():
    one, two, three = (screened(name, -1.0) for name in ("one", "two", "three"))
    rows = [judged(one, 0, 2.0), judged(two, 0, -2.0), judged(one, 1, -2.0), judged(one, 2, None)]
    rows += [judged(two, 1, 9.0, finish="error"), judged(three, 0, None, finish="error")]
    found = gather(rows)
    assert {name: (e.responses, e.blocked) for name, e in found.items()} == {"one": (2, 1), "two": (1, 0)}


@pytest.mark.parametrize("finish", ["filtered", "prompt_filtered"])
def test_what_a_providers_filter_withheld_is_blocked_and_other_silence_is_nothing(finish):
    prompt = screened("p", -1.0)
    rows = [judged(prompt, 0, -9.0, finish=finish), judged(prompt, 1, -9.0), judged(prompt, 2, None, finish=finish)]
    rows += [judged(prompt, 3 + n, 9.0, finish=kind) for n, kind in enumerate(("thinking", "tool_call", "empty"))]
    evidence = gather(rows)["p"]
    assert (evidence.responses, evidence.blocked, evidence.refusals) == (3, 2, 0)
    assert evidence.worst_response is not None and evidence.worst_response["response"] is None
    assert vote({"p": evidence}, 0.0).by_id["p"] == pytest.approx(1.0)


@pytest.mark.parametrize("score", [-1e6, -60.0, 0.0, 60.0, 1e6])
def test_the_probability_of_any_score_is_defined(score):
    assert 0 <= probability(score) <= 1 and probability(score) + probability(-score) == pytest.approx(1)


named = st.lists(st.tuples(st.sampled_from(["one", "two", "three"]), st.floats(-30, 30), st.booleans()), min_size=1)


def voted(rows: list[tuple[str, float, bool]], strength: float = 0.0) -> float:
    """The target that votes make of responses: each a responder, a score and whether it is a refusal."""
    prompt = screened("p", 3.0)
    table = [judged(prompt, n, score, refusal) | {"responder": who} for n, (who, score, refusal) in enumerate(rows)]
    return vote(gather(table), strength).by_id["p"]


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
    """Targets of prompts, each (the baseline's score, the judge's score of one response of each responder)."""
    table = [
        judged(screened(str(n), own), who, score) | {"responder": f"responder {who}"}
        for n, (own, *theirs) in enumerate(rows)
        for who, score in enumerate(theirs)
    ]
    by_id = vote(gather(table), strength).by_id
    return [by_id[str(n)] for n in range(len(rows))]


@many
@given(scores, st.floats(0, 5))
def test_the_prior_votes_as_often_for_unsafe_as_the_responders(pairs, strength):
    theirs = [probability(score) for _, score in pairs]
    assert sum(targets(pairs, strength)) == pytest.approx(sum(theirs), rel=1e-6, abs=1e-9)
    assert targets(pairs, 0.0) == pytest.approx(theirs)


@many
@given(st.lists(st.tuples(*[st.floats(-12, 12)] * 4), min_size=1, max_size=12), st.floats(0, 5))
def test_the_prior_votes_for_unsafe_as_often_as_all_responders_do(rows, strength):
    theirs = [list(map(probability, scores)) for _, *scores in rows]
    expected = sum(sum(each) + strength * min(each) for each in theirs) / (3 + strength)
    assert sum(targets(rows, strength)) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@many
@given(scores, st.floats(-9, 9))
def test_the_prior_counts_by_its_order_not_by_its_level(pairs, more):
    moved = [(own + more, score) for own, score in pairs]
    assert targets(moved, 1.0) == pytest.approx(targets(pairs, 1.0), abs=1e-6)
    assert targets([(own + (n == 0), score) for n, (own, score) in enumerate(pairs)], 1.0)[0] >= (
        targets(pairs, 1.0)[0] - 1e-9
    )


def test_votes_of_nothing_are_nothing():
    assert vote({}, 1.0).by_id == {}
