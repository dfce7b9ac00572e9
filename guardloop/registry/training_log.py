"""Live training curves in MLflow. They are a convenience: whatever happens to them, training goes on."""

import logging
import math
import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from mlflow.entities import Metric

from guardloop.core.errors import GuardLoopError
from guardloop.core.tracking import Connection
from guardloop.registry.settings import RegistrySettings

log = logging.getLogger(__name__)

BATCH = 1000  # MLflow takes this many metrics at once
PATIENCE = 3  # failures in a row before it gives up


class TrainingLog:
    """Step metrics of the pipeline run `run_id`, in the MLflow run that `Registry.record_run` later completes.

    Does nothing where no tracking address is set; never raises.

        with TrainingLog(run_id, settings) as curves:
            curves.log(step, {"train_loss": loss})
    """

    def __init__(self, run_id: str, settings: RegistrySettings | None = None, every_seconds: float = 10) -> None:
        self.settings = settings or RegistrySettings()
        self.run_id = run_id
        self.every_seconds = every_seconds
        self._connection: Connection | None = None
        self._mlflow_run: str | None = None
        self._waiting: list[Metric] = []
        self._next = 0.0
        self._failures = 0

    def start(self) -> Self:
        """Open the run."""
        if os.environ.get("MLFLOW_TRACKING_URI"):
            try:
                self._connection = Connection(patience_seconds=0)
            except GuardLoopError as error:
                log.warning("no live training curves: %s", error)
            self._send("RUNNING")
        return self

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the finite ones of `metrics` for `step`; they are sent every few seconds."""
        if self._connection is None:
            return
        now = int(time.time() * 1000)
        self._waiting += [Metric(k, float(v), now, step) for k, v in metrics.items() if math.isfinite(v)]
        if time.monotonic() >= self._next:
            self._send()

    def end(self, succeeded: bool = True) -> None:
        """Send what is left and close the run."""
        self._send("FINISHED" if succeeded else "FAILED")
        self._connection = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(succeeded=kind is None)

    def _send(self, status: str | None = None) -> None:
        connection = self._connection
        if connection is None:
            return
        try:
            if self._mlflow_run is None:
                self._mlflow_run = str(
                    connection.run(self.settings.experiment, self.run_id, self.settings.tags).info.run_id
                )
            run = self._mlflow_run
            while self._waiting:
                connection.attempt(
                    "sending training metrics", lambda client: client.log_batch(run, metrics=self._waiting[:BATCH])
                )
                del self._waiting[:BATCH]
            if status:
                connection.attempt("updating the run", lambda client: client.update_run(run, status))
            self._failures = 0
        except GuardLoopError as error:
            self._failures += 1
            log.warning("training metrics not sent: %s", error.what)
            if self._failures >= PATIENCE:
                log.warning("no more live training curves; training goes on")
                self._connection = None
        self._next = time.monotonic() + self.every_seconds * (1 + 5 * self._failures)
