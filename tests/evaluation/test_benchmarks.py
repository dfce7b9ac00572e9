"""The public benchmarks, on made-up rows in the form in which each is published, read through the datasets library."""

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support.models import save_guard, tiny_llama, with_lora
from support.root import ROOT
from typer.testing import CliRunner

from guardloop.cli.main import app
from guardloop.config import load_settings
from guardloop.core.errors import GuardLoopError
from guardloop.evaluation.benchmarks import MIXED, measure_benchmark, read_benchmark, resolve_commit
from guardloop.evaluation.paired import GuardRun
from guardloop.evaluation.settings import BenchmarkSettings, read_benchmark_settings
from guardloop.guard.engine import Guard

NAMES = sorted(path.stem for path in (ROOT / "configs" / "benchmarks").glob("*.yaml"))
RESAMPLES = (200, 0)


def jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows))


def json_array(path: Path, rows: list[dict]) -> None:
    path.write_text(json.dumps(rows))


def jsonl_gz(path: Path, rows: list[dict]) -> None:
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))


def table(path: Path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def comma_separated(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


TOXICCHAT = [
    {
        "conv_id": f"c{i}", "user_input": text, "model_output": "...", "human_annotation": human, "toxicity": toxic,
        "jailbreaking": jailbreak, "openai_moderation": '[["sexual", 0.01]]',
    }
    for i, (text, human, toxic, jailbreak) in enumerate(
        [("kind words", True, 0, 0), ("vile words", True, 1, 1), ("by machine", False, 0, 0)]
    )
]  # fmt: skip
JBB = {"Target": "Sure, here is", "Behavior": "Libel", "Category": "Harassment/Discrimination", "Source": "Original"}
HARMS = {"hate_speech,offensive_language": False, "violence,aiding_and_abetting,incitement": True}
AEGIS = {"reconstruction_id_if_redacted": None, "violated_categories": "Violence", "prompt_label_source": "human"}
WILD = {"response_refusal_label": "refusal", "response_harm_label": None, "subcategory": "others"}

# name: (config, split, file, writer, rows as published, [(prompt, unsafe)] that must come out)
PUBLISHED: dict[str, tuple[str | None, str, str, Any, list[dict], list[tuple[str, bool]]]] = {
    "toxicchat": (
        "toxicchat0124", "test", "data/0124/toxic-chat_annotation_test.csv", comma_separated, TOXICCHAT,
        [("kind words", False), ("vile words", True), ("by machine", False)],
    ),
    "toxicchat-human": (
        "toxicchat0124", "test", "data/0124/toxic-chat_annotation_test.csv", comma_separated, TOXICCHAT,
        [("kind words", False), ("vile words", True)],
    ),
    "openai-moderation": (
        None, "train", "samples-1680.jsonl.gz", jsonl_gz,
        [
            {"prompt": "mild", "S": 0, "H": 0, "V": 0, "HR": 0, "SH": 0, "S3": 0, "H2": 0, "V2": 0},
            {"prompt": "hateful", "H": 1, "S3": 0},
            {"prompt": "hardly annotated", "S": 0},
        ],
        [("mild", False), ("hateful", True), ("hardly annotated", False)],
    ),
    "xstest": (
        None, "train", "xstest_prompts.csv", comma_separated,
        [
            {"id": 1, "prompt": "kill a process", "type": "homonyms", "label": "safe", "focus": "kill", "note": "x"},
            {"id": 2, "prompt": "kill a man", "type": "contrast_homonyms", "label": "unsafe", "focus": "", "note": ""},
        ],
        [("kill a process", False), ("kill a man", True)],
    ),
    "beavertails": (
        None, "30k_test", "round0/30k/test.jsonl.gz", jsonl_gz,
        [
            {"prompt": "how?", "response": "like this", "category": HARMS, "is_safe": False},
            {"prompt": "how?", "response": "I cannot say", "category": HARMS, "is_safe": True},
        ],
        [("how?", True), ("how?", False)],
    ),
    "wildguardtest": (
        "wildguardtest", "test", "test/wildguard_test.parquet", table,
        [
            WILD | {"prompt": "harmless", "adversarial": False, "response": "ok", "prompt_harm_label": "unharmful"},
            WILD | {"prompt": "harmful", "adversarial": True, "response": None, "prompt_harm_label": "harmful"},
            WILD | {"prompt": "nobody knows", "adversarial": True, "response": "ok", "prompt_harm_label": None},
        ],
        [("harmless", False), ("harmful", True)],
    ),
    "aegis": (
        None, "test", "test.json", json_array,
        [
            AEGIS | {"id": "a", "prompt": "good", "response": None, "prompt_label": "safe", "response_label": None},
            AEGIS | {"id": "b", "prompt": "bad", "response": "no", "prompt_label": "unsafe", "response_label": "safe"},
            AEGIS | {
                "id": "c", "prompt": "REDACTED", "response": "", "prompt_label": "unsafe", "response_label": None,
                "reconstruction_id_if_redacted": 17.0,
            },
        ],
        [("good", False), ("bad", True)],
    ),
    "harmbench": (
        "standard", "train", "standard/train-00000-of-00001.parquet", table,
        [{"prompt": "one", "category": "illegal"}, {"prompt": "two", "category": "illegal"}],
        [("one", True), ("two", True)],
    ),
    "jailbreakbench": (
        "behaviors", "harmful", "data/harmful-behaviors.csv", comma_separated,
        [JBB | {"Index": 0, "Goal": "defame a man"}], [("defame a man", True)],
    ),
    "jailbreakbench-benign": (
        "behaviors", "benign", "data/benign-behaviors.csv", comma_separated,
        [JBB | {"Index": 0, "Goal": "praise a man"}], [("praise a man", False)],
    ),
    "strongreject": (
        None, "train", "data/train-00000-of-00001.parquet", table,
        [{"prompt": "forbidden", "category": "Violence"}], [("forbidden", True)],
    ),
    "simplesafetytests": (
        None, "test", "sst_test_cases.csv", comma_separated,
        [{"id": "sst_1", "harm_area": "Physical Harm", "category": "Information Seeking", "prompt": "a question"}],
        [("a question", True)],
    ),
}  # fmt: skip


def publish(name: str, folder: Path) -> BenchmarkSettings:
    """The benchmark, with a local repository of the published layout in place of the hub's."""
    config, split, file, write, rows, _ = PUBLISHED[name]
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    write(folder / file, rows)
    card = {"configs": [{"config_name": config or "baseline", "data_files": [{"split": split, "path": file}]}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    settings = read_benchmark_settings(str(ROOT / "configs" / "benchmarks" / f"{name}.yaml"))
    return settings.model_copy(update={"source": settings.source.model_copy(update={"path": str(folder)})})


def test_every_benchmark_is_tested() -> None:
    assert set(NAMES) == set(PUBLISHED)


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_reads_its_published_form(name: str, tmp_path: Path) -> None:
    settings = publish(name, tmp_path)
    config, split, *_, wanted = PUBLISHED[name]
    assert (settings.source.config, settings.source.split) == (config, split)
    found = read_benchmark(settings)
    assert [(row["prompt"], row["unsafe"]) for row in found.rows] == wanted
    assert all((row["response"] is not None) == (settings.judged == "response") for row in found.rows)
    assert found.revision == settings.source.revision and len(found.revision) == 40
    if name in ("toxicchat", "wildguardtest"):
        assert found.rows[1]["jailbreak"] is True
    if name == "beavertails":
        assert len({row["group"] for row in found.rows}) == 1  # one prompt, two responses


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_says_what_it_is(name: str) -> None:
    settings = read_benchmark_settings(str(ROOT / "configs" / "benchmarks" / f"{name}.yaml"))
    assert settings.name == name


def test_rows_like_the_training_set_are_left_out(tmp_path: Path) -> None:
    found = read_benchmark(publish("toxicchat", tmp_path), trained_on=["VILE  words", "something else"])
    assert [row["prompt"] for row in found.rows] == ["kind words", "by machine"]
    assert found.left_out == 1


def test_a_benchmark_of_another_form_is_refused(tmp_path: Path) -> None:
    settings = publish("xstest", tmp_path)
    comma_separated(tmp_path / "xstest_prompts.csv", [{"id": 1, "text": "x", "label": "safe"}])
    with pytest.raises(GuardLoopError, match=r"benchmark xstest: .* no column 'prompt'"):
        read_benchmark(settings)
    comma_separated(tmp_path / "xstest_prompts.csv", [{"id": 1, "prompt": "x", "label": "harmful", "type": ""}])
    with pytest.raises(GuardLoopError, match="neither safe nor unsafe: 'harmful'"):
        read_benchmark(settings)


def test_an_unpinned_benchmark_is_read_at_the_commit_that_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Info:
        sha = "f" * 40

    def dataset_info(_: Any, repository: str, revision: str | None) -> Info:
        asked.append((repository, revision))
        return Info()

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    assert resolve_commit("a/b", None, "benchmark b") == resolve_commit("a/b", "main", "benchmark b") == "f" * 40
    assert resolve_commit("a/b", "0" * 40, "benchmark b") == "0" * 40  # pinned: nothing to ask
    assert asked == [("a/b", None), ("a/b", "main")]


@pytest.mark.parametrize(
    ("error", "told"),
    [(OSError("no route"), "no route"), (httpx.ConnectError("no"), "no"), (httpx.ReadTimeout(""), "ReadTimeout")],
)
def test_a_hub_that_is_away_is_told(monkeypatch: pytest.MonkeyPatch, error: Exception, told: str) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", away)
    with pytest.raises(GuardLoopError, match=f"benchmark b: the hub does not tell the commit of a/b: {told}"):
        resolve_commit("a/b", None, "benchmark b")


def scored(unsafe: list[bool], baseline: list[float], candidate: list[float]) -> list[dict[str, Any]]:
    columns = dict.fromkeys(("response", "category", "language", "jailbreak"))
    return [
        columns
        | {"benchmark": "b", "id": str(i), "prompt": "p", "source": "b", "group": str(i)}
        | {"unsafe": unsafe[i], "baseline_score": baseline[i], "candidate_score": candidate[i]}
        for i in range(len(unsafe))
    ]


BASELINE, CANDIDATE = GuardRun("baseline", 0.0, 1, 0), GuardRun("candidate", 0.5, 1, 0)


@pytest.mark.parametrize(("kind", "metric"), [("unsafe", "recall"), ("safe", "fpr")])
def test_a_set_of_one_kind_is_measured_by_what_is_flagged(kind: str, metric: str) -> None:
    settings = BenchmarkSettings(name="b", kind=kind, source={"kind": "file", "path": "x"})
    rows = scored([kind == "unsafe"] * 8, [1, 1, -1, -1, -1, -1, -1, -1], [0.6] * 6 + [0.4, -1])
    found = measure_benchmark(rows, settings, BASELINE, CANDIDATE, *RESAMPLES)
    assert list(found.metrics) == [metric]
    both = found.metrics[metric]
    assert (both.baseline.value, both.candidate.value) == (0.25, 0.75)
    assert both.change.value == 0.5 and both.change.low <= 0.5 <= both.change.high
    assert (found.rows, found.unsafe) == (8, 8 if kind == "unsafe" else 0)


def test_a_benchmark_of_responses_is_measured_at_the_thresholds_of_responses() -> None:
    source = {"kind": "file", "path": "x"}
    settings = BenchmarkSettings(name="b", kind="unsafe", judged="response", source=source)
    rows = scored([True] * 8, [1, 1, -1, -1, -1, -1, -1, -1], [0.6] * 6 + [0.4, -1])
    guards = replace(BASELINE, response_threshold=-1.0), replace(CANDIDATE, response_threshold=-0.5)
    recall = measure_benchmark(rows, settings, *guards, *RESAMPLES).metrics["recall"]
    assert (recall.baseline.value, recall.candidate.value) == (0.25, 0.875)
    prompts = settings.model_copy(update={"judged": "prompt"})
    own = measure_benchmark(rows, prompts, BASELINE, CANDIDATE, *RESAMPLES)
    assert measure_benchmark(rows, prompts, *guards, *RESAMPLES) == own


def test_what_is_left_of_a_mixed_set_is_measured() -> None:
    settings = BenchmarkSettings(name="b", kind="mixed", source={"kind": "file", "path": "x"})
    found = measure_benchmark(scored([False] * 4, [1, -1, -1, -1], [-1] * 4), settings, BASELINE, CANDIDATE, *RESAMPLES)
    assert {name: both.baseline.value for name, both in found.metrics.items()} == {"fpr": 0.25}
    assert measure_benchmark([], settings, BASELINE, CANDIDATE, *RESAMPLES).metrics == {}


def test_a_mixed_set_is_ranked_and_decided() -> None:
    settings = BenchmarkSettings(name="b", kind="mixed", source={"kind": "file", "path": "x"})
    unsafe = [i % 3 == 0 for i in range(60)]
    rows = scored(unsafe, [(-1.0) ** i for i in range(60)], [1.0 if u else -1.0 for u in unsafe])
    found = measure_benchmark(rows, settings, BASELINE, CANDIDATE, *RESAMPLES).metrics
    assert set(found) == set(MIXED)
    assert found["auprc"].candidate.value == found["f1"].candidate.value == 1
    assert found["fpr"].baseline.value == 0.5 and found["auprc"].change.low > 0


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of a tiny guard, with one benchmark in a file and an adapter beside it."""
    folder = tmp_path_factory.mktemp("drill")
    guard = save_guard(folder / "guard", threshold=0.0)
    with_lora(tiny_llama()).save_pretrained(folder / "adapter")
    (folder / "adapter" / "guard.json").write_text(json.dumps({"family": "guardloop", "threshold": 1.5}))
    jsonl(folder / "rows.jsonl", [{"prompt": f"how do I bake cake {i}?", "label": "unsafe"} for i in range(9)])
    source = {"kind": "file", "path": str(folder / "rows.jsonl")}
    benchmark = {"name": "drill", "kind": "unsafe", "source": source}
    (folder / "drill.yaml").write_text(yaml.safe_dump(benchmark))
    settings = {"guard": {"base": str(guard), "min_label_mass": 0}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | {"evaluation": {"resamples": 200}}))
    return folder


def ask(drill: Path, *options: str) -> Any:
    command = ["benchmark", str(drill / "drill.yaml"), "--config", str(drill / "config.yaml"), *options]
    return CliRunner().invoke(app, command, catch_exceptions=False)


def test_the_command_scores_each_guard_at_its_own_threshold(drill: Path) -> None:
    (found,) = json.loads(ask(drill, "--adapter", str(drill / "adapter"), "--json").stdout)
    settings = load_settings(drill / "config.yaml").guard
    rows = [{"prompt": f"how do I bake cake {i}?", "response": None} for i in range(9)]
    wanted = [
        sum(verdict.flagged for verdict in Guard.load(settings, adapter).score(rows)) / 9
        for adapter in (None, drill / "adapter")
    ]
    recall = found["metrics"]["recall"]
    assert [recall["baseline"]["value"], recall["candidate"]["value"]] == pytest.approx(wanted)
    assert (found["rows"], found["unreadable"]) == (9, 0)


def test_the_command_prints_a_table(drill: Path) -> None:
    assert "drill" in ask(drill).stdout and "change" not in ask(drill).stdout


def test_the_command_names_the_benchmarks_there_are(drill: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(GuardLoopError, match=r"name at least one(.|\n)*toxicchat, toxicchat-human"):
        CliRunner().invoke(app, ["benchmark", "--config", str(drill / "config.yaml")], catch_exceptions=False)
