"""Where a model or an adapter is: a hub id, a local folder, an embedded model, a bucket or the registry."""

import atexit
import shutil
from pathlib import Path
from tempfile import mkdtemp

from guardloop.core.errors import GuardLoopError
from guardloop.core.places import cache_folder
from guardloop.core.storage import fetch
from guardloop.models.embedded import EMBEDDED, embedded_model

REGISTERED = "models:/"


def locate(model: str) -> str:
    """The folder of a local or embedded model (made on first use), or the hub id unchanged."""
    if model.startswith(EMBEDDED):
        return str(embedded_model(model.removeprefix(EMBEDDED)))
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if Path(model).expanduser().is_dir():
        return str(Path(model).expanduser().absolute())
    if looks_local:
        raise GuardLoopError(f"no model folder at {model}", "give a folder with config.json and model.safetensors")
    return model


def fetch_adapter(adapter: str | None) -> Path | None:
    """The local folder of an adapter given as a folder, an `s3://` URI or a `models:/` URI.

    The last is looked up in MLflow at MLFLOW_TRACKING_URI and kept in the cache folder: a version never changes. What
    comes from `s3://` may, so its copy lasts as long as the process.
    """
    if adapter is None:
        return None
    if adapter.startswith(REGISTERED):
        from guardloop.models.registered import resolve_model  # noqa: PLC0415  (MLflow loads for seconds)

        return resolve_model(adapter, cache_folder() / "adapters")
    if adapter.startswith("s3://"):
        folder = Path(mkdtemp(prefix="adapter-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return fetch(adapter, folder)
    return Path(adapter).expanduser()
