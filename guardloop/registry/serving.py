"""What MLflow calls to serve a registered guard: `mlflow models serve -m models:/NAME@champion --env-manager local`.

A request has the columns `prompt` and, to judge the Agent's message, `response`; the answer is a verdict for each row.
"""

from pathlib import Path
from threading import Lock
from typing import Any

from scipy.special import expit

from guardloop.core.settings import read_section
from guardloop.guard.metadata import guard_metadata
from guardloop.guard.settings import GuardSettings
from guardloop.models.registered import ADAPTER
from guardloop.registry.package import POLICY


class ServedGuard:
    """The guard behind MLflow's `predict`."""

    def __init__(self, guard: Any, temperature: float) -> None:
        self.guard = guard
        self.temperature = temperature
        self._one_at_a_time = Lock()  # the server has threads; the model has one cache

    def predict(self, frame: Any, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """A verdict for each row of a DataFrame with `prompt` and perhaps `response`.

        `categories` is null: the verdict is read from the label alone. `score` and `probability` are null, and
        `error` says why, where a row could not be judged.
        """
        rows = [
            {"prompt": row["prompt"], "response": row.get("response") or None}
            for row in frame.astype(object).where(frame.notna(), None).to_dict("records")
        ]
        with self._one_at_a_time:
            verdicts = list(self.guard.score(rows))
        return [
            {
                "score": verdict.score,
                "probability": None if verdict.score is None else float(expit(verdict.score / self.temperature)),
                "flagged": verdict.flagged,
                "categories": None,
                "error": verdict.error,
            }
            for verdict in verdicts
        ]


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> ServedGuard:
    """MLflow's entry: the model in the folder `path`, with the guard's settings as its configuration."""
    from guardloop.guard.engine import Guard  # noqa: PLC0415  (torch loads for seconds)

    folder = Path(path)
    policy = {"policy": str(folder / POLICY)} if (folder / POLICY).is_file() else {}
    settings = read_section(GuardSettings, {**(model_config or {}), **policy}, "model_config")
    temperature = float(guard_metadata(folder / ADAPTER).get("temperature", 1.0))
    return ServedGuard(Guard.load(settings, folder / ADAPTER), temperature)
