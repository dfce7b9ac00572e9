"""The adapter: made, held at a part of its strength, and saved as one that works on the plain base.

Where the baseline has an adapter already, it stays frozen under the new one, and only the new one is trained and
scaled: W = W_baseline + scale (W_trained - W_baseline). Saved, both become one LoRA adapter whose rank is the sum.
"""

import json
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from guardloop.guard.inference.forward import decoder_of
from guardloop.training.settings import TrainingSettings

TRAINED = "trained"
ALPHA_PER_RANK = 2  # the update counts twice, whatever the rank
DROPOUT = 0.05
Layers = Iterator[tuple[str, Any]]


def fresh_adapter(model: Any, settings: TrainingSettings, dropout: float = DROPOUT) -> PeftModel:
    """`model` with a new LoRA adapter on its linear layers, which changes nothing yet.

    If the model has an adapter of its own, that stays, frozen, under the new one.
    """
    layers = model.config.num_hidden_layers
    first = layers - max(1, round(layers * settings.top_layers))
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=ALPHA_PER_RANK * settings.rank,
        lora_dropout=dropout,
        target_modules=linear_names(model),
        layers_to_transform=list(range(first, layers)) if first else None,
        task_type="CAUSAL_LM",
    )
    return _stacked(model, config) if isinstance(model, PeftModel) else get_peft_model(model, config, TRAINED)


def linear_names(model: Any) -> list[str]:
    """Last names of the decoder's linear layers, also of those that have an adapter."""
    adapted = {name for name, _ in lora_layers(decoder_of(model))}
    plain = {name for name, module in decoder_of(model).named_modules() if isinstance(module, torch.nn.Linear)}
    inside = {name for name in plain if any(name.startswith(f"{outer}.") for outer in adapted)}
    return sorted({name.rpartition(".")[2] for name in adapted | plain - inside})


def lora_layers(model: Any) -> Layers:
    """Layers with an adapter, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def restart(model: PeftModel, initial: dict[str, torch.Tensor], seed: int) -> None:
    """Make the trained adapter anew, as from `seed`; `initial` holds its parameters as they were made first."""
    put_back(model, initial)
    torch.manual_seed(seed)
    for _, layer in lora_layers(model):
        if TRAINED in layer.lora_A:
            layer.reset_lora_parameters(TRAINED, init_lora_weights=True)


def trained_tensors(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the trainable parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def put_back(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Set the parameters to `tensors`."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


class scaled:  # noqa: N801  (reads as a verb: with scaled(model, .5))
    """The trained adapter at a part of its strength, for as long as the context lasts.

    Its weights change, and not peft's `scaling`: that is a number in the compiled code, which a GPU would compile anew.
    """

    def __init__(self, model: Any, scale: float) -> None:
        self.weights = [layer.lora_B[TRAINED].weight for _, layer in lora_layers(model) if TRAINED in layer.lora_B]
        self.scale = scale

    @torch.no_grad()
    def __enter__(self) -> None:
        self.before = [weight.clone() for weight in self.weights]
        for weight in self.weights:
            weight.mul_(self.scale)

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for weight, before in zip(self.weights, self.before, strict=True):
            weight.copy_(before)


def save_adapter(model: PeftModel, scale: float, folder: Path) -> None:
    """Save the trained adapter at `scale`, joined with the baseline's own if there is one."""
    if len(model.peft_config) > 1:
        tensors, config = _joined(model, scale)
    else:
        tensors = get_peft_model_state_dict(model, adapter_name=TRAINED, save_embedding_layers=False)
        config = copy(model.peft_config[TRAINED])
        config.lora_alpha = config.lora_alpha * scale
    config.inference_mode = True
    config.base_model_name_or_path = None  # guard.json names the base; a path of this machine means nothing elsewhere
    metadata = config.to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")


def _stacked(model: PeftModel, config: LoraConfig) -> PeftModel:
    """`model` with a second, trainable adapter over its own."""
    (own,) = model.peft_config
    model.add_adapter(TRAINED, config)
    model.base_model.set_adapter([own, TRAINED])
    for layer in (layer for _, layer in lora_layers(model) if own in layer.lora_A):
        layer.lora_dropout[own] = torch.nn.Identity()  # the baseline answers in training as it does elsewhere
    for name, parameter in model.named_parameters():
        parameter.requires_grad = f".{TRAINED}." in name
    return model


def _joined(model: PeftModel, scale: float) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Both adapters as one: B A = [s1 B1, s2 B2] [A1; A2], exactly. Layers with one only are filled up with zeros."""
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, layer in lora_layers(model.get_base_model()):
        for adapter in layer.lora_A:
            strength = layer.scaling[adapter] * (scale if adapter == TRAINED else 1.0)
            down, up = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
            parts.setdefault(name, []).append((down, up * strength))
    rank = max(sum(len(down) for down, _ in pairs) for pairs in parts.values())
    tensors: dict[str, torch.Tensor] = {}
    for name, pairs in parts.items():
        down, up = torch.cat([d for d, _ in pairs]), torch.cat([u for _, u in pairs], 1)
        missing = rank - len(down)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.nn.functional.pad(down, (0, 0, 0, missing))
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.nn.functional.pad(up, (0, missing))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(parts), task_type="CAUSAL_LM")
    return tensors, config
