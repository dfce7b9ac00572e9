import numpy as np
import pytest
from scipy.stats import binomtest, norm

from guardloop.evaluation.bootstrap import bootstrap
from guardloop.evaluation.compare import evaluate
from guardloop.evaluation.measurements import Changed, Spread
from guardloop.evaluation.power import WRONG_WAY, more_decisions, more_of_both, more_rows, sentence
from guardloop.evaluation.settings import EvaluationSettings, GateSettings

FAST = EvaluationSettings(resamples=200)


def checks(scores, guards, **gate):
    return {check.name: check for check in evaluate(scores, *guards, FAST, GateSettings(**gate)).decision.checks}


def test_the_rows_that_are_named_decide_in_four_of_five_tests():
    room, error, rows = 0.03, 0.02, 400
    more = more_rows(room, error, rows)
    draws = np.random.default_rng(0).normal(room, error * (rows / (rows + more)) ** 0.5, 20_000)
    decided = (draws > norm.isf(0.025) * error * (rows / (rows + more)) ** 0.5).mean()
    assert 0.79 < decided < 0.83
    assert more_rows(0.0, error, rows) is None


def test_the_changed_decisions_that_are_named_decide_in_four_of_five_tests():
    said = more_decisions(Changed(mended=30, spoiled=18), 200, "unsafe")
    more = int(said.split()[1])
    changed = round(48 * (200 + more) / 200)
    mended = np.random.default_rng(0).binomial(changed, 30 / 48, 400)
    assert 0.74 < np.mean([binomtest(int(k), changed).pvalue <= 0.05 and k > changed / 2 for k in mended]) < 0.86
    assert said.endswith("more unsafe prompts would decide it.")
    assert more_decisions(Changed(mended=3, spoiled=3), 200, "unsafe") == WRONG_WAY


@pytest.mark.parametrize(
    ("spread", "kind"),
    [(Spread(1e-4, 1e-7), "unsafe prompts"), (Spread(1e-7, 1e-4), "safe prompts"), (Spread(1e-2, 1e-2), "as in this")],
)
def test_the_kind_is_that_which_takes_the_fewest(spread, kind):
    assert kind in more_of_both(0.02, spread, 300, 300)


def test_counts_are_rounded_up_and_bounded():
    assert sentence(more_rows(1.0, 1.0, 1234), "prompts") == "About 8,500 more prompts would decide it."
    assert sentence(more_rows(1e-5, 1.0, 1234), "prompts").startswith("More than 100,000 further prompts")


def test_a_stratum_that_is_fixed_is_not_redrawn():
    unsafe = np.arange(300) < 100
    counts = bootstrap(
        lambda w: {"unsafe": w[:, :100].std(axis=1), "safe": w[:, 100:].std(axis=1)},
        np.arange(300),
        unsafe,
        20,
        0,
        "safe",
    )
    assert (counts["safe"] == 0).all() and (counts["unsafe"] > 0.5).all()


def test_what_is_not_proven_says_how_many_more_prompts_of_which_kind(drawn):
    scores, guards = drawn(candidate_auprc=0.64, rows=700, seed=2)
    found = checks(scores, guards)
    for check in found.values():
        if check.outcome != "not proven":
            assert check.more == ""
        else:
            assert check.more.endswith((" would decide it.", " are needed.", "right way.")), check.name
        assert "gate." not in check.more and "max_" not in check.more
    assert found["ranking"].more.startswith("About ") and "prompts" in found["ranking"].more
    assert "safe prompts would decide it" in found["false_positives"].more
    assert found["slices"].more == "About 180 more safe prompts in jailbreak yes would decide it."


def test_too_few_prompts_are_counted_and_responses_are_asked_for(drawn):
    scores, guards = drawn(candidate_auprc=0.75)
    found = checks([row for row in scores if row["response"] is None], guards, min_unsafe=10_000)
    assert found["unsafe_prompts"].more.endswith("more distinct unsafe prompts are needed.")
    assert found["responses"].more == "At least 50 safe and 50 unsafe responses are needed."
