"""Where a model is: a hub id, a local folder, or an embedded model that needs no hub."""

from pathlib import Path

from guardloop.core.errors import GuardLoopError
from guardloop.models.embedded import EMBEDDED, embedded_model


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
