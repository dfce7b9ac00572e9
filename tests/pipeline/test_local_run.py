"""The whole pipeline through kfp.local, on tiny random models: what is asserted is the flow, not the quality."""

import pytest
from workshop import Workshop

from guardloop.records import read_table


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.mark.slow
def test_a_harvest_that_is_too_small_ends_the_run_well(workshop: Workshop) -> None:
    ended = workshop.guardloop(shards=2)  # a threshold of 10 blocks nothing

    assert ended.returncode == 0, ended.stdout + ended.stderr
    summary = workshop.summary()
    assert summary["decision"] == "nothing to train on"
    assert "0 of 40 passed prompts" in summary["headline"]
    names = {stage["stage"] for stage in summary["stages"]}
    assert {"screen prompts [0]", "screen prompts [1]", "mine_feedback"} <= names
    assert "train_guard" not in names
    shards = list((workshop.latest / "artifacts").rglob("verdicts"))
    ids = [row["id"] for path in shards for row in read_table(path) if "sample" not in row]
    assert len(ids) == len(set(ids)) == 40


@pytest.mark.slow
def test_the_loop_runs_to_a_decision_and_its_parts_run_alone(workshop: Workshop) -> None:
    loose = {"guard": {"threshold": workshop.middle_margin()}}
    whole = workshop.guardloop(**loose)

    assert whole.returncode == 0, whole.stdout + whole.stderr
    full = workshop.summary()
    assert full["decision"] == "not promoted"  # a random guard cannot prove anything
    assert full["headline"] in " ".join(whole.stdout.split()) or "Not promoted" in whole.stdout
    assert [s["stage"] for s in full["stages"]][-1] == "register_model"

    alone = workshop.guardloop("--pipeline", "evaluate", "--from", "latest", **loose)

    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert workshop.summary()["evaluation"] == full["evaluation"]  # the same inputs, the same figures


@pytest.mark.slow
def test_a_stage_that_refuses_its_input_ends_with_code_2_and_no_traceback(workshop: Workshop) -> None:
    ended = workshop.guardloop(dataset={"traffic": {"path": "traffic"}, "test": {"path": "traffic"}})

    assert ended.returncode == 2
    assert "overlaps with the training data" in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
