"""MLflow killed amid a registration or a training, and started again: one run, one version, the same adapter."""

import random
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from faults.conftest import Loop, contents
from support.services import MlflowServer

from guardloop import stages

pytestmark = [pytest.mark.faults, pytest.mark.slow]
DRILLS = 5


def counts(server: MlflowServer) -> dict[str, int]:
    with sqlite3.connect(server.folder / "mlflow.db") as tables:
        names = ("runs", "model_versions", "params")
        return {name: tables.execute(f"select count(*) from {name}").fetchone()[0] for name in names}


def test_registrations_survive_a_server_that_is_killed_and_started_again(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, dice = loop.folder, random.Random(0)
    with MlflowServer(tmp_path / "mlflow") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)

        def register(run: str) -> float:
            started = time.monotonic()
            stages.register_model(done / "adapter", done / "evaluated", done / "training_set", run, loop.sections)
            return time.monotonic() - started

        seconds = register("undisturbed")
        one = counts(server)
        for number in range(DRILLS):

            def disturb() -> None:
                time.sleep(dice.uniform(0, seconds))
                server.stop()
                server.start()

            disturber = threading.Thread(target=disturb)
            disturber.start()
            register(f"disturbed-{number}")
            disturber.join()
            found = counts(server)
            runs = number + 2
            assert found == {name: count * runs for name, count in one.items()}


def test_a_training_does_not_notice_that_mlflow_dies(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUARDLOOP_RUN_ID", "a-run")
    monkeypatch.setenv("GUARDLOOP_CACHE", str(tmp_path / "cache"))
    done, s = loop.folder, loop.sections
    with MlflowServer(tmp_path / "mlflow") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        killer = threading.Timer(1.0, server.stop)
        killer.start()
        stages.train_guard(done / "training_set", tmp_path / "adapter", s["guard"], s["training"], s["registry"])
        killer.join()
    assert contents(tmp_path / "adapter") == contents(done / "adapter")
