"""A guard made from a model that is none yet, by training on labelled conversations: what experiments start from."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import PeftModel

from guardloop.core.records import Row
from guardloop.guard.prompt.family import families
from guardloop.guard.prompt.renderer import Renderer
from guardloop.guard.prompt.verdict import label_tokens
from guardloop.models.loading import load_causal_lm, load_tokenizer, pick_device, pick_dtype
from guardloop.training.adapter import fresh_adapter
from guardloop.training.examples import encode
from guardloop.training.fit import fit
from guardloop.training.settings import TrainingSettings
from guardloop.training.watch import Step

OnStep = Callable[[Step], None]


def make_guard(
    base: str,
    family: str,
    rows: Sequence[Row],
    settings: TrainingSettings,
    folder: Path,
    *,
    seed: int = 0,
    max_text_tokens: int = 1024,
    on_step: OnStep = lambda step: None,
) -> None:
    """Make a guard in `folder`: the model `base` (a local folder or a hub id), trained on labelled conversations.

    Messages longer than `max_text_tokens` keep their head and tail.
    """
    dtype = pick_dtype(pick_device())
    model = train_on_labels(
        base, family, rows, settings, dtype, seed=seed, max_text_tokens=max_text_tokens, on_step=on_step
    )
    model.merge_and_unload().save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    metadata = {"family": family, "base": base, "threshold": 0.0}
    (folder / "guard.json").write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")


def train_on_labels(
    base: str,
    family: str,
    rows: Sequence[Row],
    settings: TrainingSettings,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    max_text_tokens: int = 1024,
    on_step: OnStep = lambda step: None,
) -> PeftModel:
    """The model `base` with an adapter that was trained, without dropout, on the conversations' labels."""
    renderer = Renderer(load_tokenizer(base), families()[family], max_text_tokens=max_text_tokens)
    torch.manual_seed(seed)
    model = fresh_adapter(load_causal_lm(base, None, dtype, pick_device()), settings, dropout=0.0)
    labelled = [{**row, "target": float(row["unsafe"]), "weight": 1.0} for row in rows]
    fit(model, renderer.prefixes, label_tokens(renderer), encode(labelled, renderer), settings, seed, on_step=on_step)
    return model
