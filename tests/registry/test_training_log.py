from typing import Any

import pytest
from mlflow import MlflowClient
from support.registry_examples import origin

from guardloop.registry.registry import Registry
from guardloop.registry.settings import RegistrySettings
from guardloop.registry.training_log import TrainingLog

pytestmark = pytest.mark.slow


def run_of(registry: Registry) -> Any:
    return registry.connection.run(registry.settings.experiment, "run-1", {})


def test_without_an_address_nothing_happens(settings: RegistrySettings) -> None:
    with TrainingLog("run-1", settings) as curves:
        curves.log(1, {"loss": 0.5})


def test_curves_are_in_the_run_that_is_recorded_later(
    local: Registry, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    with TrainingLog("run-1", local.settings, every_seconds=0) as curves:
        for step in range(3):
            curves.log(step, {"train_loss": 1 / (step + 1), "grad_norm": float("inf")})
        assert run_of(local).info.status == "RUNNING"
    assert run_of(local).info.status == "FINISHED"
    run_id = local.record_run(origin(), {"training": {"rank": 16}})
    assert run_of(local).info.run_id == run_id
    history = MlflowClient(database).get_metric_history(run_id, "train_loss")
    assert [(point.step, point.value) for point in history] == [(0, 1), (1, 1 / 2), (2, 1 / 3)]
    assert set(run_of(local).data.metrics) == {"train_loss"}


def test_failed_training_is_marked(local: Registry, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    with pytest.raises(ZeroDivisionError), TrainingLog("run-1", local.settings) as curves:
        curves.log(0, {"loss": 1.0})
        raise ZeroDivisionError
    assert run_of(local).info.status == "FAILED"
    assert run_of(local).data.metrics == {"loss": 1.0}


def test_it_gives_up_where_mlflow_stays_away(
    settings: RegistrySettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with TrainingLog("run-1", settings, every_seconds=0) as curves:
        for step in range(5):
            curves.log(step, {"loss": 1.0})
    assert caplog.text.count("training metrics not sent") == 3
    assert "training goes on" in caplog.text
