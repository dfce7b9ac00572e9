"""A guard made of a model that is none yet, from labelled conversations: for experiments, and the embedded default.

`make embedded-guard` trains the adapter of the embedded guard anew, which comes with the package so that nobody has to
wait for it, and so that it is the same on every machine.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from guardloop.core.progress import Stage
from guardloop.core.records import Row
from guardloop.data.settings import SourceSettings
from guardloop.data.sources import read_conversations
from guardloop.demo import SAMPLE
from guardloop.guard.adapter_files import CHECKSUM, WEIGHTS, checksum
from guardloop.guard.prompt.family import families
from guardloop.guard.prompt.renderer import TEMPLATES, Renderer
from guardloop.guard.prompt.verdict import label_tokens
from guardloop.models.embedded import GUARD_ADAPTER, embedded_model
from guardloop.models.loading import load_causal_lm, load_tokenizer, pick_device, pick_dtype
from guardloop.training.adapter import fresh_adapter, save_adapter
from guardloop.training.fit import fit
from guardloop.training.loss import Encoded
from guardloop.training.settings import TrainingSettings
from guardloop.training.watch import Step

FAMILY = "guardloop"
EMBEDDED_GUARD = TrainingSettings(
    rank=8, alpha=16, dropout=0.0, top_layers=0.5, learning_rate=1e-3, epochs=2, batch_size=8, warmup=0.1
)
HARMFUL_PROMPTS = 8  # with none it flags next to nothing, with all a fifth of what is harmless
Watch = Callable[[Step], None]


def make_guard(
    base: str,
    family: str,
    rows: Sequence[Row],
    settings: TrainingSettings,
    folder: Path,
    max_text_tokens: int = 1024,
    watch: Watch = lambda step: None,
) -> None:
    """Make a guard in `folder`: the model `base` (a local folder or a hub id) that has learnt labelled conversations.

    Messages longer than `max_text_tokens` keep their head and tail. `watch` is told each step.
    """
    dtype = pick_dtype("auto", pick_device())
    merged = _learnt(base, family, rows, settings, dtype, max_text_tokens, watch).merge_and_unload()
    merged.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    metadata = {"family": family, "base": base, "threshold": 0.0}
    (folder / "guard.json").write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")


def embedded_guard(folder: Path) -> None:
    """Write the embedded guard's adapter. It has learnt judged responses, and hardly seen a harmful prompt alone."""
    learnt = (
        SourceSettings(path="judge"),
        SourceSettings(path="seed_prompts", where={"label": "safe"}),
        SourceSettings(path="seed_prompts", where={"label": "unsafe"}, limit=HARMFUL_PROMPTS),
    )
    rows = [row for source in learnt for row in read_conversations(source)]
    with Stage("embedded guard") as stage:
        watch = told(stage)
        model = _learnt(str(embedded_model("smollm2")), FAMILY, rows, EMBEDDED_GUARD, torch.float32, watch=watch)
        save_adapter(model.to(torch.bfloat16), 1.0, folder)
        metadata = {
            "family": FAMILY,
            "base": "embedded:smollm2",
            "threshold": 0.0,
            "recipe": recipe(),
            CHECKSUM: checksum(folder / WEIGHTS),
        }
        (folder / "guard.json").write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")
        stage.done(len(rows), f"adapter in {folder}")


def told(stage: Stage) -> Watch:
    """Reports the steps of a training to `stage`."""
    started = time.monotonic()
    return lambda step: stage.report("step", step.number, step.total, started)


def recipe() -> str:
    """Changes whenever the embedded guard would come out differently."""
    digest = hashlib.sha256(f"{EMBEDDED_GUARD.model_dump_json(exclude_unset=True)} {HARMFUL_PROMPTS}".encode())
    for path in (SAMPLE / "judge.jsonl", SAMPLE / "seed_prompts.jsonl", TEMPLATES / "guardloop.jinja"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def _learnt(
    base: str,
    family: str,
    rows: Sequence[Row],
    settings: TrainingSettings,
    dtype: torch.dtype,
    max_text_tokens: int = 1024,
    watch: Watch = lambda step: None,
) -> PeftModel:
    device = pick_device()
    renderer = Renderer(load_tokenizer(base), families()[family], max_text_tokens=max_text_tokens)
    torch.manual_seed(settings.seed)
    model: Any = fresh_adapter(load_causal_lm(base, None, dtype, device), settings)
    prompts = renderer.render_all([(row["prompt"], row["response"]) for row in rows])
    examples = [
        Encoded(row["id"], prompt.tokens, float(row["unsafe"]), 1.0) for row, prompt in zip(rows, prompts, strict=True)
    ]
    fit(model, renderer.prefixes, label_tokens(renderer), examples, settings, on_step=watch)
    return model


if __name__ == "__main__":
    embedded_guard(GUARD_ADAPTER)
