import random
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    confusion_matrix,
    precision_score,
    roc_auc_score,
)

from guardloop import stages
from guardloop.core.errors import GuardLoopError
from guardloop.core.records import SCORES, SCREENED, write_table
from guardloop.evaluation.compare import evaluate
from guardloop.evaluation.paired import GuardRun
from guardloop.evaluation.result import Evaluation
from guardloop.evaluation.settings import EvaluationSettings, GateSettings
from guardloop.evaluation.table import digest_of_test_set
from guardloop.evaluation.wording import METRICS
from guardloop.mining.mine import mine
from guardloop.mining.settings import MiningSettings

FAST = EvaluationSettings(resamples=200)
BASELINE, CANDIDATE = GuardRun("baseline", 0.0, 0.99, 0), GuardRun("candidate", 0.0, 0.99, 0)


def rows(count=300, response=None, **columns):
    rng = np.random.default_rng(0)
    unsafe = np.arange(count) % 3 == 0
    made = []
    for i in range(count):
        made.append(
            dict.fromkeys(SCORES.names)
            | {"id": str(i), "prompt": "a prompt", "response": response, "unsafe": bool(unsafe[i]), "source": "one"}
            | {"group": f"{response}{i}", "baseline_score": rng.normal() + unsafe[i], "candidate_score": rng.normal()}
            | {name: values[i % len(values)] for name, values in columns.items()}
        )
    return made


def slices(found, dimension):
    return {s.name: s for s in found.slices if s.dimension == dimension}


def test_the_headline_is_what_scikit_learn_finds_on_user_rows(drawn):
    scores, (baseline, candidate) = drawn(candidate_auprc=0.7)
    found = evaluate(scores, baseline, candidate, FAST)
    user = [row for row in scores if row["response"] is None]
    unsafe = np.array([row["unsafe"] for row in user])
    assert (found.rows, found.unsafe, found.response_rows) == (len(user), unsafe.sum(), len(scores) - len(user))
    for guard, run in (("baseline", baseline), ("candidate", candidate)):
        scores = np.array([row[f"{guard}_score"] for row in user])
        measured = {name: getattr(both, guard).value for name, both in found.metrics.items()}
        assert measured["auprc"] == pytest.approx(average_precision_score(unsafe, scores))
        assert measured["auroc"] == pytest.approx(roc_auc_score(unsafe, scores))
        assert getattr(found, guard).confusion == confusion_matrix(unsafe, scores > run.threshold).tolist()
        assert measured["precision"] == pytest.approx(precision_score(unsafe, scores > run.threshold))
    for both in found.metrics.values():
        assert both.change.value == pytest.approx(both.candidate.value - both.baseline.value)


def test_every_interval_holds_its_value_and_the_result_survives_json(drawn):
    scores, guards = drawn(candidate_auprc=0.7)
    found = evaluate(scores, *guards, FAST)
    assert Evaluation.model_validate_json(found.model_dump_json()) == found
    assert list(found.metrics) == list(METRICS)
    for both in found.metrics.values():
        assert both.baseline.low <= both.baseline.high and both.candidate.low <= both.candidate.high
    for change in [*(both.change for both in found.metrics.values()), *(s.gain for s in found.slices)]:
        assert change.low <= change.value <= change.high


def test_recall_near_the_baselines_rate_is_read_off_each_guards_own_curve():
    scores = [
        row | {"candidate_score": 0.0} for row in rows(baseline_score=[0.1 * (i * 7 % 31) - 1 for i in range(31)])
    ]
    found = evaluate(scores, BASELINE, CANDIDATE, FAST)
    both = found.metrics["recall_near_baseline_fpr"]
    assert both.candidate.value == 0  # it gives one score to all: nothing is caught before everything is blocked
    assert both.baseline.value > 0


def test_probabilities_are_read_at_each_guards_temperature(drawn):
    scores, (baseline, candidate) = drawn(candidate_auprc=0.7)
    plain = evaluate(scores, baseline, candidate, FAST)
    found = evaluate(scores, baseline, replace(candidate, temperature=4.0), FAST)
    user = [row for row in scores if row["response"] is None]
    chances = [1 / (1 + np.exp(-row["candidate_score"] / 4)) for row in user]
    assert found.metrics["brier"].candidate.value == pytest.approx(
        brier_score_loss([row["unsafe"] for row in user], chances), abs=1e-6
    )
    assert found.candidate.temperature == 4.0
    assert found.metrics["brier"].baseline == plain.metrics["brier"].baseline
    assert found.metrics["auprc"] == plain.metrics["auprc"]  # the order of scores stays


def test_the_order_of_rows_does_not_matter_and_the_seed_does(drawn):
    scores, guards = drawn()
    shuffled = random.Random(0).sample(scores, len(scores))
    one, same = evaluate(scores, *guards, FAST), evaluate(shuffled, *guards, FAST)
    low = one.metrics["auprc"].change.low
    assert low == pytest.approx(same.metrics["auprc"].change.low, abs=1e-5)
    assert one.decision.verdict == same.decision.verdict
    assert evaluate(scores, *guards, FAST, seed=1).metrics["auprc"].change.low != low


def test_swapped_guards_give_the_mirrored_gain(drawn):
    scores, (baseline, candidate) = drawn(candidate_auprc=0.7)
    swapped = [r | {"baseline_score": r["candidate_score"], "candidate_score": r["baseline_score"]} for r in scores]
    one, other = evaluate(scores, baseline, candidate, FAST), evaluate(swapped, candidate, baseline, FAST)
    for metric in ("auprc", "auroc", "fpr", "f1"):
        change, mirrored = one.metrics[metric].change, other.metrics[metric].change
        assert change.value == pytest.approx(-mirrored.value)
        assert change.low == pytest.approx(-mirrored.high, abs=1e-5)


def test_a_score_at_the_threshold_is_not_flagged():
    scores = [row | {"baseline_score": 0.1, "candidate_score": 0.1} for row in rows()]
    found = evaluate(scores, replace(BASELINE, threshold=0.1), replace(CANDIDATE, threshold=0.09), FAST)
    recall = found.metrics["recall"]
    assert (recall.baseline.value, recall.candidate.value) == (0, 1)


def test_slices_are_cut_by_every_column_and_the_whole_set_is_not_a_slice():
    scores = rows(
        900,
        category=["S1", None, None],
        language=["en"] * 6 + ["de"] * 3,
        jailbreak=[True, True, True, False, False, False],
        prompt=["x" * 100] * 5 + ["x" * 300] * 4,
        source=["one"],
    )
    found = evaluate([*scores, *rows(300, response="no")], BASELINE, CANDIDATE, FAST)
    assert slices(found, "category")["S1"].metric == "recall"
    assert {s.rows for s in slices(found, "language").values()} == {600, 300}
    assert set(slices(found, "jailbreak")) == {"yes", "no"}
    assert list(slices(found, "length")) == ["0 to 199 characters", "200 to 999 characters"]
    assert slices(found, "source") == {}
    assert slices(found, "role")["responses"].metric == "auprc"
    language = slices(found, "language")["de"]
    assert language.gain.value == pytest.approx(language.candidate - language.baseline)


def test_an_all_safe_slice_is_measured_by_its_false_positive_rate_and_a_rise_is_a_loss():
    scores = rows(900, source=["mixed", "benign", "mixed"])
    for row in scores:
        row["candidate_score"] = 1.0 if row["source"] == "benign" else -1.0
    found = slices(evaluate(scores, BASELINE, CANDIDATE, FAST), "source")["benign"]
    assert (found.metric, found.candidate, found.unsafe) == ("fpr", 1.0, 0)
    assert found.gain.value == pytest.approx(found.baseline - 1.0)


def test_small_slices_are_pooled_or_noted():
    many = [f"l{i}" for i in range(30)]
    pooled = evaluate(rows(900, language=["en"] * 30 + many), BASELINE, CANDIDATE, FAST)
    assert slices(pooled, "language")["other"].rows == 450
    few = evaluate(rows(300, language=["en"] * 99 + ["fr"]), BASELINE, CANDIDATE, FAST)
    assert "fr" not in slices(few, "language")
    assert any("language: fr" in note for note in few.notes)


def test_near_duplicates_do_not_make_a_slice_large_enough():
    scores = rows(900, language=["en", "en", "en", "de", "de", "de"])
    for row in scores:
        row["group"] = "one" if row["language"] == "de" else row["group"]
    found = evaluate(scores, BASELINE, CANDIDATE, FAST)
    assert "de" not in slices(found, "language")
    assert any("near-duplicates" in note for note in found.notes)


def test_a_group_with_both_labels_is_evaluated():
    scores = [row | {"group": str(i // 4)} for i, row in enumerate(rows(600))]
    found = evaluate(scores, BASELINE, CANDIDATE, FAST)
    auprc = found.metrics["auprc"].baseline
    assert auprc.low < auprc.value < auprc.high


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([], "no test rows"),
        (rows(10, unsafe=[True, False, None]), "3 of 10 test rows have no label"),
        (rows(10, unsafe=[True]), "all 10 test prompts are labelled unsafe"),
        (rows(10, unsafe=[False]), "labelled safe"),
        (rows(10, response="no"), "all 10 test rows are responses"),
        (rows(10, candidate_score=[float("nan"), 1.0]), "5 of 10 values of candidate_score"),
        (rows(10, baseline_score=[None, 1.0]), "5 of 10 values of baseline_score"),
        (rows(10, baseline_score=[float("inf"), 1.0]), "not finite"),
        ([{"id": "1", "unsafe": True}], "lack the columns prompt"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_with_the_reason(scores, message):
    with pytest.raises(GuardLoopError, match=message):
        evaluate(scores, BASELINE, CANDIDATE, FAST)


@pytest.mark.parametrize("other", [["a", "b"], ["a", "b", "c", "d"], ["a", "b", "x"]])
def test_scores_of_two_test_sets_are_refused(tmp_path, other):
    for name, ids in (("baseline", ["a", "b", "c"]), ("candidate", other)):
        columns = dict.fromkeys(SCREENED.names) | {"prompt": "p", "source": "s", "flagged": False, "truncated": False}
        write_table([columns | {"id": i, "group": i, "score": 1.0} for i in ids], SCREENED, tmp_path / name)
    with pytest.raises(GuardLoopError, match="not of the same test set"):
        stages.evaluate(tmp_path / "baseline", tmp_path / "candidate", tmp_path, tmp_path, tmp_path / "out", {}, {})


def test_what_is_decided_of_responses_is_measured_at_the_thresholds_that_the_guards_screened_with(tmp_path, drawn):
    scores, _ = drawn()
    metadata = {"threshold": 1.0, "median_label_mass": 1.0, "unreadable": 0}
    for name, limit in (("baseline", 0.5), ("candidate", 2.5)):
        columns = dict.fromkeys(SCREENED.names) | {"flagged": False, "truncated": False}
        table = [columns | {k: v for k, v in row.items() if k in SCREENED.names} for row in scores]
        table = [made | {"score": row[f"{name}_score"]} for made, row in zip(table, scores, strict=True)]
        write_table(table, SCREENED, tmp_path / name, lambda limit=limit: metadata | {"response_threshold": limit})
    stages.write_training_set(mine([], [], MiningSettings()), tmp_path / "training_set", {})
    folders = (tmp_path / name for name in ("baseline", "candidate", "training_set", "adapter", "out"))
    found = stages.evaluate(*folders, {"resamples": 200}, {})
    slices = {part.name: part for part in found.slices if part.dimension == "role"}
    for name, unsafe in (("unsafe responses", True), ("safe responses", False)):
        judged = [row for row in scores if row["response"] is not None and row["unsafe"] is unsafe]
        limits = {"baseline_score": 0.5, "candidate_score": 2.5}
        wanted = [np.mean([row[score] > limit for row in judged]) for score, limit in limits.items()]
        assert [slices[name].baseline, slices[name].candidate] == pytest.approx(wanted)


def test_a_test_set_is_known_by_its_texts_and_labels_whatever_their_order():
    scores = rows(20)
    digest = digest_of_test_set(scores)
    assert digest_of_test_set(reversed([row | {"baseline_score": 9.0} for row in scores])) == digest
    assert digest_of_test_set([scores[0] | {"unsafe": not scores[0]["unsafe"]}, *scores[1:]]) != digest
    assert digest_of_test_set(scores[1:]) != digest


def test_a_useless_baseline_is_noted():
    scores = [row | {"baseline_score": 5.0} for row in rows()]
    found = evaluate(scores, BASELINE, CANDIDATE, FAST, GateSettings())
    assert any("baseline itself" in note for note in found.notes)


@pytest.mark.parametrize("section", [EvaluationSettings, GateSettings])
def test_every_setting_is_explained(section):
    assert all(field.description for field in section.model_fields.values())
