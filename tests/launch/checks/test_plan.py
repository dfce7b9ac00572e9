"""guardloop plan: what is counted, what is estimated and said to be, and how it compares with what a run took."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import cases
from support.root import ROOT

from guardloop.cli import main as cli
from guardloop.config import Settings
from guardloop.core.records import RESPONSE, write_table
from launch.checks.plan import duration, make_plan, size
from launch.checks.rates import read_past, recorded_rates

STAGES = {"prepare_data": (10, 2.0), "generate_responses": (32, 64.0), "screen responses": (32, 16.0)}
STAGES |= {"train_guard": (12, 24.0), "evaluate": (6, 1.0), "screen test (baseline)": (6, 3.0)}
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("GUARDLOOP_HOME", str(tmp_path / "home"))

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["guardloop", "plan", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        written = capsys.readouterr()
        return int(ended.value.code or 0), written.out, written.err

    return call


ON_A_GPU = [{"kind": "vllm", "model": "mistralai/Mistral-7B-Instruct-v0.3"}]


def data(folder: Path, rows: int, **more: Any) -> dict[str, Any]:
    """Settings whose traffic is a file of so many prompts of eight bytes."""
    path = folder / f"{rows}.jsonl"
    path.write_text("".join(json.dumps({"id": f"{i}", "prompt": f"{i:08d}"}) + "\n" for i in range(rows)))
    test = {"kind": "sample", "path": "test", "limit": 6}
    dataset = {"traffic": {"kind": "file", "path": str(path)}, "test": test}
    return {"dataset": dataset, "responders": [{}], **more}


def finished_run(home: Path, name: str, settings: dict[str, Any], **changes: Any) -> None:
    """A run's folder as `guardloop run` leaves it: of ten prompts eight passed; 32 responses of five tokens."""
    folder = home / "runs" / name
    stages = [{"stage": "screen prompts [0]", "items": 6, "seconds": 3.0, "outcome": ""}]
    stages += [{"stage": "screen prompts [1]", "items": 4, "seconds": 2.0, "outcome": ""}]
    stages += [{"stage": k, "items": n, "seconds": s, "outcome": ""} for k, (n, s) in STAGES.items()]
    output = folder / "artifacts" / "guardloop-1" / "for-loop-1-iteration-0" / "generate-responses"
    write_table([], RESPONSE, output / "responses", lambda: {"tokens": 160})
    (output / "executor_output.json").write_text("{}")
    mining = {"screened": 10, "passed": 8, "responses": 32}
    (folder / "summary.json").write_text(json.dumps({"stages": stages, "mining": mining} | changes))
    (folder / "settings.yaml").write_text(yaml.safe_dump(Settings.model_validate(settings).sections()))
    (folder / "run.json").write_text(json.dumps({"pipeline": "full"}))


def write_config(folder: Path, values: dict[str, Any]) -> str:
    (folder / "mine.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "mine.yaml")


# Before the first run


def test_data_is_counted_and_the_rest_is_called_rough(tmp_path: Path) -> None:
    plan = make_plan(Settings.model_validate(data(tmp_path, 50)), None)
    stages = {stage.stage: stage for stage in plan.stages}

    assert (stages["prepare_data"].items.value, stages["prepare_data"].items.rough) == (50, "")
    assert stages["screen prompts"].tokens.value == 50 * 8 / 4 and stages["screen prompts"].tokens.rough
    assert stages["generate_responses"].items.value == 50 * 4
    assert "upper bound" in stages["generate_responses"].items.rough
    assert stages["screen test (baseline)"].items.value == 6
    assert stages["screen prompts"].seconds.value is None and "first run" in stages["screen prompts"].seconds.rough
    assert plan.device == "cpu" and "left out" in plan.total("seconds").rough


def test_a_limit_counts_and_all_of_the_data_is_read(tmp_path: Path) -> None:
    values = data(tmp_path, 300)
    values["dataset"]["traffic"]["limit"] = 120
    plan = make_plan(Settings.model_validate(values), None)
    assert plan.stages[0].items.value == 120


def test_a_gpu_where_the_configuration_needs_one(tmp_path: Path) -> None:
    values = data(tmp_path, 327, guard={"base": "meta-llama/LlamaGuard-7b"})
    values["responders"] = ON_A_GPU
    plan = make_plan(Settings.model_validate(values), None)
    seconds = {stage.stage: stage.seconds.value for stage in plan.stages}

    assert plan.device == "gpu"
    assert seconds["screen prompts"] == pytest.approx(327 / 335.1)
    assert seconds["generate_responses"] is None


def test_a_rate_of_one_quantization_is_not_taken_for_another(tmp_path: Path) -> None:
    guard = {"base": "meta-llama/LlamaGuard-7b", "quantization": "int8"}
    plan = make_plan(Settings.model_validate(data(tmp_path, 20, guard=guard, responders=ON_A_GPU)), None)
    assert next(stage for stage in plan.stages if stage.stage == "screen prompts").seconds.value is None


def test_every_rate_stands_in_the_benchmarks() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text()
    for rate in recorded_rates():
        section = re.search(rf"<!-- {rate.section} -->(.*)<!-- /{rate.section} -->", page, re.S)
        assert section, f"launch/checks/rates.yaml: docs/benchmarks.md has no section {rate.section}"
        cells = {cell.strip(" *+") for line in section[1].splitlines() for cell in line.split("|")}
        assert {f"{rate.per_second:g}", f"{rate.per_second:.1f}"} & cells, (
            f"{rate.stage} of {rate.model}: {rate.per_second:g} is not in that section any more (rates.yaml)"
        )


def test_both_guards_score_every_row_of_a_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "benchmark.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i:012d}", "label": "safe"}) + "\n" for i in range(30)))
    source = {"kind": "file", "path": str(path)}
    benchmark = {"name": "ours", "kind": "safe", "source": source}
    guard = {"base": "meta-llama/LlamaGuard-7b"}
    values = data(tmp_path, 10, guard=guard, responders=ON_A_GPU, evaluation={"benchmarks": [benchmark]})
    stages = {stage.stage: stage for stage in make_plan(Settings.model_validate(values), None).stages}
    scored = stages["score_benchmarks"]

    assert scored.items.value == 60 and scored.tokens and scored.tokens.value == 60 * 12 / 4
    assert scored.seconds.value == pytest.approx(60 / 335.1) and scored.bytes.value
    without = make_plan(Settings.model_validate(data(tmp_path, 10)), None)
    assert "score_benchmarks" not in [stage.stage for stage in without.stages]


@settings(max_examples=cases(20), deadline=None)
@given(samples=st.integers(1, 8), epochs=st.integers(1, 4))
def test_work_grows_with_what_causes_it(tmp_path_factory: pytest.TempPathFactory, samples: int, epochs: int) -> None:
    folder = tmp_path_factory.mktemp("plan")
    values = data(folder, 20, responders=[{"samples": samples}], training={"epochs": epochs})
    stages = {stage.stage: stage for stage in make_plan(Settings.model_validate(values), None).stages}

    assert stages["generate_responses"].items.value == stages["screen responses"].items.value == 20 * samples
    assert stages["train_guard"].seconds.value == pytest.approx(epochs * stages["train_guard"].items.value / 3.1)


# After a run


def test_rates_and_shares_of_a_run_like_it(call: Call, tmp_path: Path) -> None:
    finished_run(tmp_path / "home", "20260101-000000-full", data(tmp_path, 10))
    code, out, _ = call(write_config(tmp_path, data(tmp_path, 100)), "--json")
    planned = json.loads(out)
    stages = {stage["stage"]: stage for stage in planned["stages"]}

    assert code == 0 and planned["rates"] == "the run 20260101-000000-full"
    assert stages["screen prompts"]["seconds"]["value"] == pytest.approx(100 * 5.0 / 10)  # both shards
    assert stages["generate_responses"]["items"]["value"] == pytest.approx(100 * 0.8 * 4)
    assert stages["generate_responses"]["tokens"]["value"] == pytest.approx(320 * 5)
    assert stages["generate_responses"]["seconds"]["value"] == pytest.approx(320 * 2)


def test_a_row_of_a_benchmark_that_a_run_scored_counts_for_both_guards(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GUARDLOOP_HOME", str(tmp_path))
    finished_run(
        tmp_path, "one", data(tmp_path, 10), stages=[{"stage": "score_benchmarks", "items": 9, "seconds": 6.0}]
    )
    assert read_past("one").stages["score_benchmarks"].items == 18


def test_a_run_of_another_guard_says_nothing(call: Call, tmp_path: Path) -> None:
    finished_run(tmp_path / "home", "20260101-000000-full", data(tmp_path, 10, guard={"quantization": "nf4"}))
    assert json.loads(call(write_config(tmp_path, data(tmp_path, 10)), "--json")[1])["rates"].startswith("docs/")


def test_a_run_that_went_through_is_preferred(call: Call, tmp_path: Path) -> None:
    finished_run(tmp_path / "home", "20260101-000000-full", data(tmp_path, 10))
    early = [{"stage": "generate_responses", "items": 1, "seconds": 1.0}]
    finished_run(tmp_path / "home", "20260102-000000-full", data(tmp_path, 10), stages=early)
    assert "20260101" in json.loads(call(write_config(tmp_path, data(tmp_path, 10)), "--json")[1])["rates"]


def test_compared_with_what_a_run_took(call: Call, tmp_path: Path) -> None:
    finished_run(tmp_path / "home", "20260101-000000-full", data(tmp_path, 10))
    config = write_config(tmp_path, data(tmp_path, 10))
    compared = json.loads(call(config, "--past", "20260101-000000-full", "--json")[1])
    rows = {row["stage"]: row for row in compared["past"]["stages"]}

    assert compared["rates"].startswith("docs/"), "a run is not compared with a plan that was made from it"
    assert rows["generate_responses"]["took"]["seconds"] == 64.0
    assert rows["screen prompts"]["took"]["items"] == 10
    assert rows["screen test (candidate)"]["took"]["seconds"] is None
    code, out, _ = call(config, "--past", "20260101-000000-full")
    assert code == 0 and "beside the run 20260101-000000-full" in out


def test_it_says_what_is_rough(call: Call, tmp_path: Path) -> None:
    code, out, _ = call(write_config(tmp_path, data(tmp_path, 10)))
    assert code == 0 and re.search(r"generate_responses +~40 ", out) and re.search(r"screen prompts +10 ", out)
    assert "upper bound" in out and "?" in out


def test_what_is_refused(call: Call, tmp_path: Path) -> None:
    missing = {"dataset": {"traffic": {"kind": "file", "path": "nothing.jsonl"}}}
    finished_run(tmp_path / "home", "stopped", data(tmp_path, 10))
    (tmp_path / "home/runs/stopped/summary.json").unlink()
    for arguments, words in (
        ((write_config(tmp_path, missing),), "nothing.jsonl"),
        (("configs/demo.yaml", "--past", "yesterday"), "no run 'yesterday'"),
        (("configs/demo.yaml", "--past", "stopped"), "did not end"),
    ):
        code, out, err = call(*arguments)
        assert code == 2 and not out and words in err and "  -> " in err


def test_a_run_knows_its_shards_and_what_it_wrote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GUARDLOOP_HOME", str(tmp_path))
    finished_run(tmp_path, "one", data(tmp_path, 10))
    past = read_past("one")
    assert (past.stages["screen prompts"].items, past.stages["screen prompts"].seconds) == (10, 5.0)
    assert past.stages["generate_responses"].bytes > 0 and past.stages["evaluate"].bytes is None
    assert (past.passed_share, past.tokens_per_response) == (0.8, 5.0)


def test_units() -> None:
    assert [duration(s) for s in (0, 119, 600, 7200)] == ["0 s", "119 s", "10 min", "2.0 h"]
    assert [size(b) for b in (512, 3 * 2**20, 5 * 2**30)] == ["0.5 KiB", "3.0 MiB", "5.0 GiB"]
