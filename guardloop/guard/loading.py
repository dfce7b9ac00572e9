"""From settings to a guard's parts: its renderer, its weights, its adapter."""

import atexit
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open

from guardloop.core.errors import GuardLoopError
from guardloop.core.places import cache_folder
from guardloop.guard.adapter_files import WEIGHTS, check_adapter_files
from guardloop.guard.metadata import guard_metadata
from guardloop.guard.prompt.family import family_of
from guardloop.guard.prompt.policy import read_policy
from guardloop.guard.prompt.renderer import Renderer
from guardloop.guard.settings import GuardSettings
from guardloop.models.loading import load_tokenizer
from guardloop.models.locate import locate


def load_renderer(settings: GuardSettings) -> Renderer:
    """The renderer of the guard that `settings` names, without its weights."""
    location = locate(settings.base)
    family_name = settings.family
    if family_name == "auto":
        family_name = str(guard_metadata(location).get("family", "auto"))
    return Renderer(
        load_tokenizer(location, settings.revision),
        family_of(family_name, settings.base),
        read_policy(settings.policy) if settings.policy else None,
        settings.excluded_categories,
        settings.max_text_tokens,
    )


def fetch_adapter(adapter: str | None, tracking_uri: str | None = None) -> Path | None:
    """The local folder of an adapter given as a folder, an `s3://` URI or a `models:/` URI.

    The last is looked up in MLflow at `tracking_uri`, else at MLFLOW_TRACKING_URI, and kept in the cache folder: a
    version never changes. What comes from `s3://` may, so its copy lasts as long as the process.
    """
    if adapter is None:
        return None
    if adapter.startswith("models:/"):
        from guardloop.models.registered import resolve_model  # noqa: PLC0415  (MLflow is slow to import and rarely needed here)

        return resolve_model(adapter, cache_folder() / "adapters", tracking_uri)
    if adapter.startswith("s3://"):
        from guardloop.core.storage import fetch  # noqa: PLC0415

        folder = Path(mkdtemp(prefix="adapter-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return fetch(adapter, folder)
    return Path(adapter).expanduser()


def attach_adapter(model: Any, folder: Path, trainable: bool = False) -> Any:
    """`model` with the LoRA adapter in `folder`. Raises GuardLoopError if the folder does not hold one that fits."""
    check_adapter_files(folder, guard_metadata(folder))
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        with safe_open(folder / WEIGHTS, "pt") as file:
            stored = {key for key in file.keys() if "lora_" in key}  # noqa: SIM118  (a file, not a dict)
        # else peft asks the hub for the base that the adapter names
        loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        # peft itself only warns where the adapter has other layers than the model
        if odd := stored.symmetric_difference(key for key in loaded if "lora_" in key):
            raise ValueError(f"{len(odd)} weights without counterpart, such as {min(odd)}")
    except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise GuardLoopError(
            f"the adapter in {folder} does not fit the base model: {' '.join(str(error).split())[:300]}",
            "use the base that its guard.json names",
        ) from error
    if changes_vocabulary(adapted):
        raise GuardLoopError(
            f"the adapter in {folder} changes the embeddings or the output head, from whose weights scores are read",
            "use an adapter on the decoder's layers only",
        )
    return adapted


def changes_vocabulary(model: Any) -> bool:
    """Whether an adapter is on the embeddings or the output head: many models hold one weight for both."""
    return any(isinstance(x, LoraLayer) for x in (model.get_input_embeddings(), model.get_output_embeddings()))
