import json
import logging
import time
from collections.abc import Callable
from itertools import count, islice
from pathlib import Path

import pytest

from guardloop.core import progress
from guardloop.core.errors import GuardLoopError
from guardloop.core.progress import Stage, short


@pytest.fixture
def events(tmp_path: Path, monkeypatch) -> Callable[[], list[dict]]:
    """The events so far."""
    path = tmp_path / "events.jsonl"
    path.touch()
    monkeypatch.setenv("GUARDLOOP_EVENTS", str(path))
    return lambda: [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_stage_tells_its_story(events, caplog):
    with caplog.at_level(logging.INFO, "guardloop"), Stage("screen") as stage:
        stage.say("loading the guard")
        assert list(stage.track("abc", 3, "scoring")) == ["a", "b", "c"]
        stage.done(3, "1 flagged")
    told = events()
    assert told[0]["event"] == "start" and told[1]["doing"] == "loading the guard"
    assert told[-2] | {"doing": "scoring", "done": 3, "total": 3} == told[-2] and told[-2]["rate"] > 0
    assert told[-1] | {"event": "done", "items": 3, "outcome": "1 flagged"} == told[-1]
    assert {event["stage"] for event in told} == {"screen"} and told[-1]["seconds"] >= 0
    assert "screen: started" in caplog.text and "screen: 3 items in" in caplog.text and "1 flagged" in caplog.text


def test_a_shard_has_a_name_of_its_own(events):
    with Stage("screen", 2):
        pass
    assert {event["stage"] for event in events()} == {"screen [2]"}


def test_a_failure_is_told_and_passed_on(events, caplog):
    with pytest.raises(GuardLoopError, match="no rows"), Stage("prepare_data"):
        raise GuardLoopError("no rows", "check the path")
    failed = events()[-1]
    assert failed["event"] == "failed" and failed["known"] == "GuardLoopError" and "check the path" in failed["error"]
    assert "prepare_data: failed after" in caplog.text


def test_rows_pass_through_one_by_one(events):
    with Stage("screen") as stage:
        assert list(islice(stage.track(count(), None, "scoring"), 3)) == [0, 1, 2]
        assert list(stage.track([], None, "scoring")) == []
    assert events()[-1]["event"] == "done"


def test_the_rows_own_error_is_passed_on(events):
    def rows():
        yield 1
        raise ValueError("row 2")

    with pytest.raises(ValueError, match="row 2"), Stage("screen") as stage:
        list(stage.track(rows(), 2, "scoring"))
    assert events()[-1]["known"] == "ValueError"


def test_many_rows_give_few_events_and_few_lines(events, caplog, monkeypatch):
    clock = count(1000.0, 0.001)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, "guardloop"), Stage("screen") as stage:
        list(stage.track(range(20_000), 20_000, "scoring"))
    reported = [event for event in events() if event["event"] == "progress"]
    seconds = (next(clock) - 1000.0) / progress.EVENT_SECONDS
    assert seconds / 2 < len(reported) < seconds + 3
    assert [event["done"] for event in reported] == sorted(event["done"] for event in reported)
    assert len(caplog.messages) < 8 and "s left" in caplog.text


def test_without_a_file_for_events_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("GUARDLOOP_EVENTS", raising=False)
    monkeypatch.chdir(tmp_path)
    with Stage("screen") as stage:
        stage.done(1, "fine")
    assert list(tmp_path.iterdir()) == []


def test_stages_side_by_side_share_the_file(events):
    with Stage("screen", 0) as one, Stage("screen", 1) as other:
        one.say("a")
        other.say("b")
    assert [event["stage"] for event in events()].count("screen [0]") == 3


def test_paths_are_told_as_people_type_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert short(tmp_path / "work/runs/log") == "runs/log"
    assert short(tmp_path / ".cache/guardloop") == "~/.cache/guardloop"
    assert short(Path("/elsewhere/log")) == "/elsewhere/log"
