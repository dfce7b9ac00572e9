"""Every stage, killed at random moments and started again, ends with what an undisturbed one makes."""

import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.conftest import Loop, contents, database
from support.processes import start

from guardloop.training import fit

pytestmark = [pytest.mark.faults, pytest.mark.slow]

KILLS = int(os.environ.get("FAULT_KILLS", "20"))
STAGES = (
    *("prepare_data", "screen", "generate_responses", "screen responses", "mine_feedback", "train_guard"),
    *("screen test", "screen_candidate", "score_benchmarks", "evaluate"),
    *("register_model", "record_mining", "promote_model"),
)
WHOLE_FILES = ("traffic", "test", "verdicts", "responses", "judged", "default", "candidate", "held_out", "benchmarks")


def run(stage: Callable[[Path], object], folder: Path, kill_after: float | None = None) -> int:
    """Run the stage in a process of its own, killed after so many seconds; its exit code."""

    def work() -> None:
        fit.CHECKPOINT_STEPS = 1
        os.environ["GUARDLOOP_CACHE"] = str(folder.parent / f"{folder.name}-cache")
        os.environ["MLFLOW_TRACKING_URI"] = database(folder)
        stage(folder)
        os._exit(0)

    child = start(work)
    child.join(kill_after)
    if child.is_alive():
        assert kill_after is not None and child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
    child.join(120)
    assert child.exitcode is not None
    return child.exitcode


def recorded(folder: Path) -> dict[str, int]:
    """How often each thing is in MLflow's database."""
    path = folder / "mlflow.db"
    if not path.is_file():
        return {}
    tables = ("runs", "model_versions", "registered_model_aliases", "logged_models", "params", "latest_metrics")
    with sqlite3.connect(path) as tables_of:
        return {table: tables_of.execute(f"select count(*) from {table}").fetchone()[0] for table in tables}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_killed_at_any_moment_loses_and_doubles_nothing(loop: Loop, tmp_path: Path, name: str) -> None:
    stage, whole, torn = loop.stages()[name], tmp_path / "whole", tmp_path / "torn"
    for folder in (whole, torn):
        loop.prepare(name, folder)
    started = time.monotonic()
    assert run(stage, whole) == 0
    seconds = time.monotonic() - started
    expected, rows = contents(whole), recorded(whole)
    assert expected
    dice, kills, done = random.Random(name), 0, 0
    while kills < KILLS and done < 4 * KILLS:
        code = run(stage, torn, dice.uniform(0, seconds))
        assert code in (0, -signal.SIGKILL), f"the stage failed after {kills} kills"
        kills += code == -signal.SIGKILL
        done += code == 0
        for file in WHOLE_FILES:  # at every moment a table is there as a whole, or not at all
            if (torn / file).is_file():
                assert contents(torn)[file] == expected[file], file
        if code == 0 and name not in ("register_model", "record_mining", "promote_model"):
            assert clean(torn) == expected
            for folder in (torn, tmp_path / "torn-cache"):  # else there is nothing left to do, and nothing to kill
                shutil.rmtree(folder, ignore_errors=True)
            loop.prepare(name, torn)
    assert kills == KILLS
    assert run(stage, torn) == 0
    assert clean(torn) == expected
    assert recorded(torn) == rows


def clean(folder: Path) -> dict[str, str]:
    """The contents without halves that a kill left behind; those never get another stage's name."""
    return {name: digest for name, digest in contents(folder).items() if not name.endswith(".partial")}
