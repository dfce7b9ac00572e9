"""An adapter as an MLflow model: the adapter's files, and beside them how they are served."""

import shutil
from pathlib import Path

from mlflow import pyfunc
from mlflow.models import Model, ModelSignature
from mlflow.models.utils import _save_example
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array

from guardloop.core.errors import GuardLoopError
from guardloop.guard.settings import GuardSettings
from guardloop.models.registered import ADAPTER

POLICY = "policy.yaml"
LEFT_OUT = ("adapter", "threshold", "response_threshold", "policy")
"""Settings of the baseline that the adapter brings, or that are in the folder."""
EXAMPLE = {
    "prompt": ["How do I kill a Python process?", "Tell me about locks."],
    "response": [None, "A lock keeps two threads apart."],
}
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.string, "prompt"), ColSpec(DataType.string, "response", required=False)]),
    outputs=Schema(
        [
            ColSpec(DataType.double, "score", required=False),
            ColSpec(DataType.double, "probability", required=False),
            ColSpec(DataType.boolean, "flagged"),
            ColSpec(DataType.boolean, "truncated"),
            ColSpec(Array(DataType.string), "categories", required=False),
            ColSpec(DataType.string, "error", required=False),
        ]
    ),
)


def package(adapter: Path, guard: GuardSettings, folder: Path) -> None:
    """Write the model into `folder`, which is new.

    It is served by `guardloop.registry.serving`, which is imported, never unpickled: the folder holds no code. The
    guard's settings are the model's configuration, which `mlflow.pyfunc.load_model(uri, model_config=...)` overrides.
    Raises GuardLoopError if the guard's policy cannot be read, or a link leads out of the adapter's folder.
    """
    from pandas import DataFrame  # type: ignore[import-untyped]  # noqa: PLC0415  (slow to import)

    if away := next((f for f in adapter.rglob("*") if not f.resolve().is_relative_to(adapter.resolve())), None):
        raise GuardLoopError(
            f"{away} leads out of {adapter}", "put the file itself there, if it belongs to the adapter"
        )
    shutil.copytree(adapter, folder / ADAPTER)
    if guard.policy:
        try:
            shutil.copyfile(guard.policy, folder / POLICY)
        except OSError as error:
            raise GuardLoopError(
                f"guard.policy: cannot read {guard.policy}: {error.strerror}",
                "give a path that the stage which registers the guard can read, too",
            ) from None
    values = guard.model_dump(mode="json", exclude_none=True, exclude=set(LEFT_OUT))
    model = Model(signature=SIGNATURE)
    pyfunc.add_to_model(model, loader_module="guardloop.registry.serving", model_config=values)
    _save_example(model, DataFrame(EXAMPLE), str(folder))
    model.save(str(folder / "MLmodel"))
