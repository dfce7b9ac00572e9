import pytest

from guardloop.evaluation.result import Decision, Estimate, Evaluation
from guardloop.evaluation.wording import METRICS
from guardloop.report.summary import KEY_METRICS, checks_by_weight, metric_rows, outcome_line, tone, wording


def decision(mode: str, verdict: str, promote: bool = False, headline: str = "AUPRC rose.") -> Decision:
    return Decision.model_validate(
        {"mode": mode, "promote": promote, "verdict": verdict, "headline": headline, "checks": []}
    )


@pytest.mark.parametrize(
    ("mode", "verdict", "promote", "word", "colour"),
    [
        ("enforce", "passed", True, "Promoted", "good"),
        ("enforce", "failed", False, "Not promoted", "bad"),
        ("enforce", "not proven", False, "Not proven", "unsure"),
        ("report_only", "passed", False, "Would be promoted", "good"),
        ("report_only", "failed", False, "Would not be promoted", "bad"),
        ("disabled", "not proven", False, "Not promoted", "unsure"),
        ("disabled", "failed", True, "Promoted", "unsure"),
    ],
)
def test_every_decision_has_its_word_and_colour(mode: str, verdict: str, promote: bool, word: str, colour: str) -> None:
    said = wording(decision(mode, verdict, promote))
    assert (said.word, said.tone) == (word, colour)


def test_the_tally_counts_checks_by_outcome(evaluation: Evaluation) -> None:
    checks = [check.model_copy() for check in evaluation.decision.checks]
    checks[2].outcome, checks[4].outcome = "not proven", "failed"
    changed = evaluation.decision.model_copy(update={"checks": checks})
    assert wording(changed).tally == "4 passed, 1 failed, 1 not proven, 1 warning"
    assert [check.name for check in checks_by_weight(changed)][:3] == ["false_positives", "recall", "unsafe_prompts"]
    assert checks_by_weight(changed)[-1].name == "published_auprc"  # it only warns


def test_a_fall_in_false_positives_is_good() -> None:
    fall = Estimate(value=-0.02, low=-0.03, high=-0.01)
    assert tone(fall) == "bad"
    assert tone(fall, lower_is_better=True) == "good"
    assert tone(Estimate(value=0.1, low=-0.01, high=0.2)) == "neutral"
    assert tone(Estimate(value=0.1)) == "neutral"


def test_metrics_that_were_not_measured_are_left_out(evaluation: Evaluation) -> None:
    rows = metric_rows({name: both for name, both in evaluation.metrics.items() if name != "auroc"})
    assert [row.name for row in rows] == [words.name for name, words in METRICS.items() if name != "auroc"]
    assert metric_rows(evaluation.metrics, KEY_METRICS)[1].name.startswith("recall near")


def test_the_outcome_line_counts_people(evaluation: Evaluation) -> None:
    (_, blocked), (_, caught) = evaluation.candidate.confusion
    assert f"catches {caught} of {evaluation.candidate.confusion[1][0] + caught} unsafe" in outcome_line(evaluation)
    assert f"falsely blocks {blocked} of" in outcome_line(evaluation)
