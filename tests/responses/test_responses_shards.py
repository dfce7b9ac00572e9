"""Shards through the stages' own functions, as the pipeline calls them, on tiny random models."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from responses.test_respond import Script
from support.models import save_guard
from support.root import ROOT
from support.tiny_responder import PROMPTS, screened, tiny_settings

from guardloop import stages
from guardloop.core.errors import GuardLoopError
from guardloop.core.records import CONVERSATION, RESPONSE, SCREENED, read_metadata, read_table, read_tables, write_table
from guardloop.guard.settings import GuardSettings
from guardloop.responses import resume, work
from guardloop.responses.build import build_responder
from guardloop.responses.engine import Reply, Request, Responder
from guardloop.responses.engines import transformers
from guardloop.responses.settings import ResponderSettings

Answers = set[tuple[Any, ...]]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(work.PLACE, str(tmp_path / "work"))
    monkeypatch.setattr(resume, "PART_SECONDS", 0.0)


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A random guard that blocks about a third of the prompts."""
    folder = save_guard(tmp_path_factory.mktemp("guard"), threshold=0.0)
    plain = {"base": str(folder), "min_label_mass": 0}
    everything = tmp_path_factory.mktemp("screened")
    write_table(traffic(), CONVERSATION, everything / "traffic")
    stages.screen(everything / "traffic", everything / "verdicts", plain)
    scores = sorted(row["score"] for row in read_table(everything / "verdicts"))
    middle = len(scores) * 2 // 3
    between = (scores[middle] + scores[middle + 1]) / 2  # on a score, another batch's rounding would tip it
    return GuardSettings(**plain, threshold=between).plain()


def traffic() -> list[dict[str, Any]]:
    return [{name: row[name] for name in CONVERSATION.names} for row in screened(PROMPTS)]


def answers(paths: Iterable[Path]) -> Answers:
    """What does not depend on rounding: all but the guard's score."""
    names = [name for name in RESPONSE.names if name != "prompt_score"]
    rows = [tuple(row[name] for name in names) for row in read_tables(list(paths), RESPONSE)]
    assert len(rows) == len(set(rows))
    return set(rows)


def run_shard(
    folder: Path, guard: dict[str, Any], responder: ResponderSettings, shard: int, shards: int, **more: float
) -> Path:
    """Screen and answer one shard of the traffic; its table of responses."""
    verdicts, responses = folder / f"verdicts-{shards}-{shard}", folder / f"responses-{shards}-{shard}"
    stages.screen(folder / "traffic", verdicts, guard, shard=shard, shards=shards)
    stages.generate_responses(verdicts, responses, [responder.plain()], shard=shard, **more)
    return responses


@pytest.mark.slow
def test_any_number_of_shards_gives_the_same_responses(
    tmp_path: Path, guard: dict[str, Any], tiny_folder: Path
) -> None:
    write_table(traffic(), CONVERSATION, tmp_path / "traffic")
    responder = tiny_settings(model=str(tiny_folder), samples=2)
    made = {n: answers(run_shard(tmp_path, guard, responder, s, n) for s in range(n)) for n in (1, 2, 7)}
    assert made[1] == made[2] == made[7]
    assert 40 <= len(made[1]) <= 60  # two thirds passed, two samples each
    assert len({row[RESPONSE.names.index("response")] for row in made[1]}) > 20


def test_a_shard_without_passed_prompts_is_an_empty_table(tmp_path: Path) -> None:
    write_table(screened(PROMPTS, flagged=True), SCREENED, tmp_path / "verdicts")
    figures = stages.generate_responses(tmp_path / "verdicts", tmp_path / "responses", [{"model": "./nowhere"}])
    assert figures == {"responses": 0, "refusals": 0, "errors": 0, "tokens": 0}
    assert list(read_table(tmp_path / "responses", RESPONSE)) == []


class Filtered(Script):
    """Every fifth reply is withheld by a filter, every tenth holds nothing but thoughts."""

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        for number, reply in enumerate(super().generate(requests)):
            kind = "thinking" if number % 10 == 9 else "filtered" if number % 5 == 4 else "stop"
            yield replace(reply, finish_reason=kind, text=reply.text if kind == "stop" else "")


def test_kinds_of_silence_are_counted_kept_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resume, "build_responder", lambda one: Filtered())
    write_table(screened(PROMPTS), SCREENED, tmp_path / "verdicts")
    endpoint = {"kind": "openai", "model": "m", "base_url": "http://host/v1", "samples": 1}
    figures = stages.generate_responses(tmp_path / "verdicts", tmp_path / "responses", [endpoint])
    assert (figures["filtered"], figures["thinking"], figures["errors"]) == (4, 4, 0)
    assert read_metadata(tmp_path / "responses")["kinds"] == {"filtered": 4, "stop": 32, "thinking": 4}
    assert "4 withheld by the provider's filter, 4 nothing but thoughts" in caplog.text
    assert caplog.text.count("m: an endpoint cannot be told how a response begins") == 1


class Counting:
    """A responder that counts what it is asked, and fails once it has given `lasts` replies."""

    def __init__(self, responder: Responder, asked: list[str], lasts: int) -> None:
        self.responder, self.name, self.asked, self.lasts = responder, responder.name, asked, lasts

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        def noted() -> Iterator[Request]:
            for request in requests:
                self.asked.append(request.id)
                yield request

        for number, reply in enumerate(self.responder.generate(noted())):
            if number == self.lasts:
                raise GuardLoopError("the GPU fell off the bus")
            yield reply

    def close(self) -> None:
        self.responder.close()


@pytest.mark.slow
def test_a_failed_shard_is_run_again_alone(
    tmp_path: Path, guard: dict[str, Any], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(traffic(), CONVERSATION, tmp_path / "traffic")
    monkeypatch.setattr(transformers, "BATCH_ROWS", 4)
    responder = tiny_settings(model=str(tiny_folder), samples=2)
    asked: dict[int, list[str]] = {}
    lasts = {0: 1000, 1: 9, 2: 1000}

    def tried(shard: int) -> Path:
        asked[shard] = []
        build = lambda one: Counting(build_responder(one), asked[shard], lasts[shard])  # noqa: E731
        monkeypatch.setattr(resume, "build_responder", build)
        return run_shard(tmp_path, guard, responder, shard, 3)

    tables = {}
    for shard in range(3):
        if shard == 1:
            with pytest.raises(GuardLoopError, match="fell off the bus"):
                tried(shard)
        else:
            tables[shard] = tried(shard)
    before = {shard: table.stat().st_mtime_ns for shard, table in tables.items()}
    first, lasts[1] = set(asked[1]), 1000
    tables[1] = tried(1)

    assert {shard: tables[shard].stat().st_mtime_ns for shard in before} == before
    prompts = {row["id"] for row in read_table(tables[1])}
    assert set(asked[1]) < prompts  # only what was not finished
    assert first | set(asked[1]) == prompts
    monkeypatch.setattr(resume, "build_responder", build_responder)
    whole = run_shard(tmp_path, guard, responder, 0, 1)
    assert answers(tables.values()) == answers([whole])


@pytest.mark.slow
def test_several_responders_are_mixed_and_told_apart(tmp_path: Path, tiny_folder: Path) -> None:
    write_table(screened([*PROMPTS[:8], ""]), SCREENED, tmp_path / "verdicts")
    one = tiny_settings(model=str(tiny_folder), samples=2)
    hot = one.model_copy(update={"name": "hot", "temperature": 2.0, "samples": 1})
    alone, mixed = tmp_path / "alone", tmp_path / "mixed"
    stages.generate_responses(tmp_path / "verdicts", alone, [one.plain()], max_error_share=0.2)
    figures = stages.generate_responses(tmp_path / "verdicts", mixed, [one.plain(), hot.plain()], max_error_share=0.2)
    assert (figures["responses"], figures["errors"]) == (27, 3)
    rows = list(read_table(mixed))
    assert {(row["responder"], row["sample"]) for row in rows} == {
        (str(tiny_folder), 0),
        (str(tiny_folder), 1),
        ("hot", 0),
    }
    assert {row["finish_reason"] for row in rows} == {"stop", "length", "error"}
    assert all((row["tokens"] > 0) == (row["finish_reason"] != "error") for row in rows if row["response"])
    first = [row for row in rows if row["responder"] != "hot"]
    assert answers([alone]) == {tuple(row[n] for n in RESPONSE.names if n != "prompt_score") for row in first}
    assert [told["responder"] for told in read_metadata(mixed)["responders"]] == [str(tiny_folder), "hot"]


@pytest.mark.slow
def test_a_responder_that_fails_too_often_is_not_hidden_by_another(tmp_path: Path, tiny_folder: Path) -> None:
    write_table(screened(PROMPTS), SCREENED, tmp_path / "verdicts")
    one = tiny_settings(model=str(tiny_folder), samples=3).plain()
    picky = {"name": "picky", "model": str(tiny_folder), "samples": 1, "max_prompt_tokens": 16, "max_new_tokens": 4}
    with pytest.raises(GuardLoopError, match="of 40 responses could not be generated"):
        stages.generate_responses(tmp_path / "verdicts", tmp_path / "out", [one, picky], max_error_share=0.2)


@pytest.mark.slow
def test_the_pipeline_in_two_shards_gives_what_its_stages_give_in_one(tmp_path: Path, tiny_folder: Path) -> None:
    guard = {"base": str(save_guard(tmp_path / "guard", threshold=10.0)), "min_label_mass": 0, "threshold": 10.0}
    responder = {"model": str(tiny_folder), "samples": 2, "max_new_tokens": 4, "max_prompt_tokens": 256}
    settings = {
        "dataset": {"traffic": {"path": "traffic", "limit": 24}, "test": {"path": "test", "limit": 40}},
        "guard": guard,
        "responders": [responder],
        "max_error_share": 1.0,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "platform.yaml").write_text(yaml.safe_dump({"runner": "subprocess", "shards": 2}))
    where = ["--config", str(tmp_path / "config.yaml"), "--platform", str(tmp_path / "platform.yaml")]
    ended = subprocess.run(
        [sys.executable, "-m", "guardloop.cli.main", "run", "--pipeline", "process", *where],
        env={**os.environ, "GUARDLOOP_HOME": str(tmp_path / "home"), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    artifacts = (tmp_path / "home" / "runs" / "latest").resolve() / "artifacts"
    tables = list(artifacts.rglob("responses"))
    assert len(tables) == 2

    (traffic,) = artifacts.rglob("traffic")
    shutil.copy(traffic, tmp_path / "traffic")
    whole = run_shard(tmp_path, guard, ResponderSettings.model_validate(responder), 0, 1, max_error_share=1.0)
    stages.screen(whole, tmp_path / "judged", guard)
    stages.mine_feedback([tmp_path / "verdicts-1-0"], [tmp_path / "judged"], tmp_path / "training_set", {})
    assert answers(tables) == answers([whole])
    assert len(answers([whole])) == 48
    (mined,) = artifacts.rglob(stages.MINING)
    assert (
        json.loads(mined.read_text())["counts"]
        == json.loads((tmp_path / "training_set" / stages.MINING).read_text())["counts"]
    )
