"""The whole pipeline through kfp.local, on tiny random models: what is asserted is the flow, not the quality."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from rich.console import Console
from support.canaries import CANARIES, found_in
from support.workshop import Workshop

from guardloop.config import PlatformSettings, Settings
from guardloop.core.errors import GuardLoopError
from guardloop.core.records import read_table
from guardloop.guard.engine import Guard
from guardloop.guard.settings import GuardSettings
from guardloop.stages import SCORE_TABLE
from launch.checks.rates import find_alike, read_past
from launch.local import run as local
from launch.local import runs


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CANARIES.items():
            patch.setenv(name, value)
        yield Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.mark.slow
def test_too_little_to_train_on_ends_the_run_well(workshop: Workshop) -> None:
    ended = workshop.guardloop(shards=2)  # a threshold of 10 blocks nothing

    assert ended.returncode == 0, ended.stdout + ended.stderr
    summary = workshop.summary()
    assert summary["decision"] == "nothing to train on"
    assert "0 of 40 passed prompts" in summary["headline"]
    names = {stage["stage"] for stage in summary["stages"]}
    run = _recorded(workshop)
    assert run.data.tags["guardloop.gate_verdict"] == "nothing trained"
    assert run.data.metrics["mining_screened"] == 40 and float(run.data.params["mining.min_positives"]) == 1
    assert {"screen prompts [0]", "screen prompts [1]", "mine_feedback"} <= names
    assert "train_guard" not in names
    shards = list((workshop.latest / "artifacts").rglob("verdicts"))
    ids = [row["id"] for path in shards for row in read_table(path) if "sample" not in row]
    assert len(ids) == len(set(ids)) == 40


@pytest.mark.slow
def test_the_loop_runs_to_a_decision_and_its_parts_run_alone(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUARDLOOP_HOME", str(workshop.folder / "home"))
    loose = {"guard": {"threshold": workshop.middle_of_sample()}}
    whole = workshop.guardloop(**loose)

    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert not found_in(workshop.folder, whole.stdout, whole.stderr)  # logs, artifacts, settings and MLflow
    full = workshop.summary()
    assert full["decision"] == "not promoted"  # a random guard cannot prove anything
    assert full["headline"] in " ".join(whole.stdout.split()) or "Not promoted" in whole.stdout
    mining = full["evaluation"]["held_out"]
    held_out = [row for path in (workshop.latest / "artifacts").rglob("held_out") for row in read_table(path)]
    taught = [r for p in (workshop.latest / "artifacts").rglob("examples.parquet") for r in read_table(p)]
    assert held_out and {r["group"] for r in held_out}.isdisjoint(r["group"] for r in taught)
    told = [r for r in held_out if r["response_unsafe"] is not None]
    assert mining["prompts"] == len(told) if mining else len({r["response_unsafe"] for r in told}) < 2
    (benchmark,) = full["evaluation"]["benchmarks"]
    assert (benchmark["name"], benchmark["rows"], benchmark["unsafe"]) == ("fire-drill", 3, 3)
    assert _recorded(workshop).data.tags["guardloop.gate_verdict"] != "nothing trained"
    assert [s["stage"] for s in full["stages"]][-1] == "register_model"
    _check_that_each_side_was_scored_by_its_own_guard(workshop)

    past = read_past(workshop.latest.name)
    without_size = {name for name, took in past.stages.items() if not took.bytes}
    assert len(past.stages) >= 10 and without_size <= {"register_model", "screen held-out prompts"}
    assert past.tokens and past.tokens_per_response and 0 < past.passed_share < 1
    assert find_alike(past.settings).run == past.run

    alone = workshop.guardloop("--pipeline", "evaluate", "--from", "latest", "--json", **loose)

    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert json.loads(alone.stdout) == workshop.summary()
    assert workshop.summary()["evaluation"] == full["evaluation"]  # the same inputs, the same figures


def test_each_part_finds_what_the_parts_before_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARDLOOP_HOME", str(tmp_path))
    monkeypatch.setattr(local, "execute", lambda run, platform, console: run)

    def part(pipeline: str, *outputs: str) -> runs.Run:
        earlier = None if pipeline == "process" else runs.find_run("latest")
        run = local.run_local(pipeline, Settings(), PlatformSettings(), "demo.yaml", Console(), earlier)
        for name in outputs:
            (run.folder / "artifacts" / "task" / "stage" / name).mkdir(parents=True)
        return run

    processed, trained = part("process", "training_set", "test_set"), part("train", "adapter")
    arguments = json.loads((part("evaluate").folder / "run.json").read_text())["arguments"]

    assert arguments["training_set_uri"] == str(processed.artifact("training_set"))
    assert arguments["test_set_uri"] == str(processed.artifact("test_set"))
    assert arguments["adapter_uri"] == str(trained.artifact("adapter"))
    (processed.folder / "run.json").unlink()
    with pytest.raises(GuardLoopError, match=r"has no t.*_set"):
        part("evaluate")


@pytest.mark.slow
def test_a_stage_that_refuses_its_input_ends_with_code_2_and_no_traceback(workshop: Workshop) -> None:
    ended = workshop.guardloop(dataset={"traffic": {"path": "traffic"}, "test": {"path": "traffic"}})

    assert ended.returncode == 2
    assert "no prompt is left after cleaning" in ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr


def _check_that_each_side_was_scored_by_its_own_guard(workshop: Workshop) -> None:
    """The gate's two columns are the baseline's and the candidate's scores, and they differ."""
    (scores,), (adapter,) = (list((workshop.latest / "artifacts").rglob(name)) for name in (SCORE_TABLE, "adapter"))
    rows = list(read_table(scores))
    settings = GuardSettings(**workshop.settings["guard"])
    for column, own in (("baseline_score", None), ("candidate_score", adapter)):
        scores = [verdict.score for verdict in Guard.load(settings, own).score(rows)]
        assert [row[column] for row in rows] == pytest.approx(scores, abs=1e-5)
    assert max(abs(row["candidate_score"] - row["baseline_score"]) for row in rows) > 1e-3


def _recorded(workshop: Workshop) -> Run:
    client = MlflowClient(f"sqlite:///{workshop.folder}/home/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"tags.`guardloop.run_id` = '{workshop.latest.name}'")
    return run
