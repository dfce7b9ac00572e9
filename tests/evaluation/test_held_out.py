import numpy as np
import pytest
from scipy.stats import binomtest

from guardloop.core.records import HELD_OUT_PROMPT
from guardloop.evaluation.compare import evaluate
from guardloop.evaluation.held_out import measure_held_out
from guardloop.evaluation.paired import GuardRun
from guardloop.evaluation.settings import EvaluationSettings

FAST = EvaluationSettings(resamples=300)
RESAMPLES = (300, 0)
CANDIDATE = GuardRun("candidate", 0.5, 0.99, 0)


def held_out(unsafe, baseline, candidate):
    """Rows of the HELD_OUT_PROMPT contract; `unsafe` may hold None for prompts in between."""
    return [
        dict.fromkeys(HELD_OUT_PROMPT.names)
        | {"id": str(i), "prompt": f"prompt {i}", "group": str(i), "response_unsafe": label}
        | {"prompt_score": before, "score": after, "responses": 4, "blocked": 4 if label else 0}
        for i, (label, before, after) in enumerate(zip(unsafe, baseline, candidate, strict=True))
    ]


def simulated(shift, count=600, seed=0):
    rng = np.random.default_rng(seed)
    unsafe = rng.random(count) < 0.3
    baseline = np.minimum(rng.normal(size=count) - 2 + 0.5 * unsafe, 0)  # all of them passed
    return held_out(unsafe.tolist(), baseline.tolist(), (rng.normal(size=count) + shift * unsafe).tolist())


def test_shares_are_counted_at_the_candidates_threshold_and_have_exact_intervals():
    unsafe = [True] * 10 + [False] * 20 + [None] * 5
    rows = held_out(unsafe, [-1.0] * 35, [1.0] * 7 + [0.5] * 3 + [1.0] * 2 + [0.0] * 18 + [9.0] * 5)
    found, notes = measure_held_out(rows, CANDIDATE, *RESAMPLES)
    assert (found.prompts, found.response_unsafe, found.never_unsafe, notes) == (30, 10, 20, [])
    assert (found.caught.value, found.newly_blocked.value) == (0.7, 0.1)
    exact = binomtest(7, 10).proportion_ci(method="exact")
    assert (found.caught.low, found.caught.high) == pytest.approx((exact.low, exact.high))


def test_none_of_a_few_is_not_certain():
    rows = held_out([True] * 5 + [False] * 12, [-1.0] * 17, [1.0] * 5 + [0.0] * 12)
    found, _ = measure_held_out(rows, CANDIDATE, *RESAMPLES)
    assert found.newly_blocked.value == 0 and found.newly_blocked.high > 0.2


def test_a_guard_that_learnt_beats_the_lowered_threshold():
    found, _ = measure_held_out(simulated(shift=3.0), CANDIDATE, *RESAMPLES)
    assert found.beyond_control.low > 0
    assert found.beyond_control.value == pytest.approx(found.caught.value - found.control.value, abs=0.02)
    assert found.auprc.change.low > 0


def test_lowering_the_threshold_alone_gains_nothing():
    rows = [row | {"score": row["prompt_score"] + 2.0} for row in simulated(shift=0.0)]  # the same order, a bias
    found, _ = measure_held_out(rows, CANDIDATE, *RESAMPLES)
    assert found.caught.value > 0 and found.newly_blocked.value > 0
    assert found.beyond_control.value == found.auprc.change.value == 0


@pytest.mark.parametrize("labels", [[], [True] * 4, [False] * 4, [None] * 4])
def test_too_few_held_out_prompts_are_a_note(labels):
    found, notes = measure_held_out(held_out(labels, [-1.0] * len(labels), [1.0] * len(labels)), CANDIDATE, *RESAMPLES)
    assert found is None and "Held-out prompts were not measured" in notes[0]


def test_the_evaluation_carries_it(drawn):
    scores, guards = drawn()
    rows = simulated(shift=3.0)
    found = evaluate(scores, *guards, FAST, held_out=rows)
    assert found.held_out is not None and found.held_out.prompts == len(rows)
    assert evaluate(scores, *guards, FAST).held_out is None
    assert any("Held-out prompts" in note for note in evaluate(scores, *guards, FAST, held_out=[]).notes)
