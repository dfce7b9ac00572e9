"""From settings to a guard's parts: its renderer, its weights, its adapter."""

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open

from guardloop.core.errors import GuardLoopError
from guardloop.guard.adapter_files import WEIGHTS, adapted_modules, check_adapter_files
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
        settings.max_text_tokens,
    )


def attach_adapter(model: Any, folder: Path, trainable: bool = False) -> Any:
    """`model` with the LoRA adapter in `folder`. Raises GuardLoopError if the folder does not hold one that fits."""
    check_adapter_files(folder, guard_metadata(folder))
    try:
        config = LoraConfig.from_pretrained(str(folder))
        if isinstance(config.target_modules, str):  # a pattern, or `all-linear`
            config.target_modules = adapted_modules(folder)
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, config=config)
        with safe_open(folder / WEIGHTS, "pt") as file:
            stored = set(file.keys())
        # else peft asks the hub for the base that the adapter names
        loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        # peft itself only warns where the adapter has other layers than the model
        if unmatched := stored.symmetric_difference(key for key in loaded if "lora_" in key):
            raise ValueError(f"{len(unmatched)} weights without counterpart, such as {min(unmatched)}")
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
