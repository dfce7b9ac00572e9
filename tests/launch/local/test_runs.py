"""The folders of runs: what counts as one, and what a run inherits from those before it."""

import json
from pathlib import Path

import pytest

from guardloop.core.errors import GuardLoopError
from launch.local.drawing import title
from launch.local.runs import find_run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GUARDLOOP_HOME", str(tmp_path))
    return tmp_path


def run(home: Path, name: str, **record: str) -> Path:
    folder = home / "runs" / name
    (folder / "artifacts").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"pipeline": "train", **record}))
    return folder


def test_an_artifact_is_inherited_over_several_runs(home: Path) -> None:
    made = run(home, "first") / "artifacts" / "pipeline" / "mine-feedback" / "training_set"
    made.mkdir(parents=True)
    run(home, "second", **{"from": "first"})
    run(home, "third", **{"from": "second"})

    assert find_run("third").inherited("training_set") == made
    assert find_run("third").inherited("adapter") is None


def test_origins_in_a_circle_end(home: Path) -> None:
    run(home, "itself", **{"from": "itself"})
    run(home, "one", **{"from": "other"})
    run(home, "other", **{"from": "one"})

    assert find_run("itself").inherited("adapter") is find_run("one").inherited("adapter") is None


@pytest.mark.parametrize("name", ["..", ".", "/etc", "../elsewhere", "a/b", "", "none"])
def test_a_path_is_no_run(home: Path, name: str) -> None:
    run(home, "a")
    run(home / "runs", "elsewhere")
    (home / "run.json").write_text("{}")

    with pytest.raises(GuardLoopError, match="no run"):
        find_run(name)
    run(home, "follows", **{"from": name})
    assert find_run("follows").inherited("adapter") is None


def test_stages_are_called_as_people_would(home: Path) -> None:
    assert [title(name) for name in ("prepare_data", "screen prompts [1]")] == [
        "prepare data",
        "screen prompts, part 2",
    ]
