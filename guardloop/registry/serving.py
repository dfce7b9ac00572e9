"""What MLflow calls to serve a registered guard: `mlflow models serve -m models:/NAME@champion --env-manager local`.

A request has the columns `prompt` and, to judge the response, `response`; the answer is a verdict for each row.
"""

from pathlib import Path
from threading import Lock
from typing import Any

from guardloop.core.settings import OLD, read_section
from guardloop.guard.settings import GuardSettings
from guardloop.models.registered import ADAPTER
from guardloop.registry.package import POLICY


class ServedGuard:
    """The guard behind MLflow's `predict`."""

    def __init__(self, guard: Any) -> None:
        self.guard = guard
        self._one_at_a_time = Lock()  # the server has threads; the model has one cache

    def predict(self, frame: Any, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """A verdict for each row of a DataFrame with `prompt` and perhaps `response`.

        `categories` are those of what is flagged; of a long message the worst part counts, and it is `truncated`.
        Where a row could not be judged, `score` and `probability` are null, `error` says why, and it is flagged.
        """
        rows = [
            {"prompt": row["prompt"], "response": _said(row.get("response"))}
            for row in frame.astype(object).where(frame.notna(), None).to_dict("records")
        ]
        with self._one_at_a_time:
            verdicts = list(self.guard.score(rows))
        return [
            {
                "score": verdict.score,
                "probability": verdict.probability,
                "flagged": verdict.flagged,
                "truncated": verdict.truncated,
                "categories": verdict.categories.split(",") if verdict.categories else None,
                "error": verdict.error,
            }
            for verdict in verdicts
        ]


def _said(response: Any) -> Any:
    """The response; none where it is blank, so that the prompt is judged."""
    return None if isinstance(response, str) and not response.strip() else response


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> ServedGuard:
    """MLflow's entry: the model in the folder `path`, with the guard's settings as its configuration."""
    from guardloop.guard.engine import Guard  # noqa: PLC0415  (torch loads for seconds)

    folder, values = Path(path), dict(model_config or {})
    if values.get("is_guard") is False:
        values["min_label_mass"] = 0
    values = {name: value for name, value in values.items() if f"guard.{name}" not in OLD}  # of earlier versions
    if (folder / POLICY).is_file():
        values["policy"] = str(folder / POLICY)
    settings = read_section(GuardSettings, values, "model_config")
    return ServedGuard(Guard.load(settings, folder / ADAPTER, categories=True))
