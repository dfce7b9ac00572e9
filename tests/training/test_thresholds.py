"""The two operating points of a trained guard: one for prompts, which training moves, and one for responses."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import cases

from guardloop.guard.engine import Guard
from guardloop.guard.settings import GuardSettings
from guardloop.training.calibrate import GAP, same_share
from guardloop.training.examples import split
from guardloop.training.settings import TrainingSettings
from guardloop.training.train import train

SCORE = st.floats(-20, 20).map(lambda value: round(value, 3))
PAIRS = st.lists(st.tuples(SCORE, SCORE), min_size=1, max_size=40)


@settings(max_examples=cases(200), deadline=None, derandomize=True)
@given(PAIRS, SCORE)
def test_as_many_are_flagged_as_before(pairs, threshold):
    before, after = np.array(pairs).T
    found, count = same_share(before, after, threshold), int((before > threshold).sum())
    flagged = int((after > found).sum())
    assert flagged <= count
    if len(set(after)) == len(after):
        assert flagged == count
    nearer = threshold + (found - threshold) * 0.9 - np.sign(found - threshold) * 2 * GAP
    if abs(found - threshold) > 30 * GAP:  # what lies well between the two flags another number
        assert int((after > nearer).sum()) != count


@settings(max_examples=cases(50), deadline=None, derandomize=True)
@given(st.lists(SCORE, max_size=30), SCORE)
def test_a_threshold_that_still_flags_as_many_stays(scores, threshold):
    assert same_share(np.array(scores), np.array(scores), threshold) == threshold


def example(number, prompt, response, target, kind):
    metadata = {"id": f"e{number}", "group": f"g{number}", "weight": 1.0, "reason": ""}
    return metadata | {"prompt": prompt, "response": response, "target": target, "kind": kind}


@pytest.mark.slow
def test_training_moves_the_threshold_of_prompts_and_keeps_the_share_of_responses(base, tmp_path):
    words = ["cake", "bread", "garden", "door", "village", "flour", "sugar", "baker"]
    prompts = [f"tell me about the {one} {other}" for one in words for other in words]
    responses = [("how?", f"the {one} and a {other}") for one in words for other in words]
    default = GuardSettings(base=str(base), min_label_mass=0.0, policy=str(base / "policy.yaml"))
    known = [
        verdict.score
        for verdict in Guard.load(default).score(
            [{"prompt": prompt, "response": response} for prompt, response in responses]
        )
    ]
    middle = float(np.median(known))
    settings = default.model_copy(update={"response_threshold": middle})
    rows = [example(n, prompt, None, 0.9, "positive" if n % 2 else "passed") for n, prompt in enumerate(prompts)]
    rows += [
        example(100 + n, *turns, 1 / (1 + np.exp(-score)), "replay_response")
        for n, (turns, score) in enumerate(zip(responses, known, strict=True))
    ]
    options = TrainingSettings(epochs=3, rank=4, learning_rate=1e-2, batch_size=16, validation=0.4)
    trained = train(rows, settings, options, tmp_path / "adapter")
    metadata = json.loads((tmp_path / "adapter" / "guard.json").read_text())
    assert (metadata["threshold"], metadata["response_threshold"]) == (trained.threshold, trained.response_threshold)

    candidate = Guard.load(settings, tmp_path / "adapter")
    assert (candidate.threshold, candidate.response_threshold) == (trained.threshold, trained.response_threshold)
    held_out = [row for row in split(rows, options.validation, 0)[1] if row["response"] is not None]
    before = sum(verdict.flagged for verdict in Guard.load(settings).score(held_out))
    after = [verdict.flagged for verdict in candidate.score(held_out)]
    assert 0 < before < len(held_out)
    assert sum(after) == before
    at_the_prompts = sum(v.score > trained.threshold for v in candidate.score(held_out))
    assert at_the_prompts != before  # one threshold for both would have moved the judging of responses


@pytest.mark.slow
def test_without_replayed_responses_their_threshold_is_the_default_guards(base, tmp_path):
    rows = [example(n, f"cake {n}", None, float(n % 2), "positive" if n % 2 else "passed") for n in range(40)]
    settings = GuardSettings(base=str(base), min_label_mass=0.0, policy=str(base / "policy.yaml"))
    options = TrainingSettings(rank=2, learning_rate=1e-2)
    trained = train(rows, settings.model_copy(update={"response_threshold": 0.75}), options, tmp_path / "a")
    assert trained.response_threshold == 0.75
