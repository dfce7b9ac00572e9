"""Train the embedded guard's adapter anew: `make embedded-guard`, after a change to its recipe.

It comes with the package, so that nobody has to wait for it and it is the same on every machine. The one that comes
was made with the settings below when steps still held examples of like length, and the learning rate rose for a tenth
of the steps; a new one comes out a little different.
"""

import hashlib
import json
import time
from pathlib import Path

import torch

from guardloop.core.progress import Stage
from guardloop.data.settings import SourceSettings
from guardloop.data.sources import read_conversations
from guardloop.demo import SAMPLE
from guardloop.guard.adapter_files import CHECKSUM, checksum
from guardloop.guard.prompt.renderer import TEMPLATES
from guardloop.models.embedded import GUARD_ADAPTER, embedded_model
from guardloop.training.adapter import save_adapter
from guardloop.training.settings import TrainingSettings
from guardloop.training.supervised import train_on_labels

FAMILY = "guardloop"
SETTINGS = TrainingSettings(rank=8, top_layers=0.5, learning_rate=1e-3, epochs=2, batch_size=8)
HARMFUL_PROMPTS = 8  # with none it flags next to nothing, with all a fifth of what is harmless


def make_embedded_guard(folder: Path) -> None:
    """Write the adapter. It has learnt judged responses, and hardly seen a harmful prompt alone."""
    sources = (
        SourceSettings(path="judge"),
        SourceSettings(path="seed_prompts", where={"label": "safe"}),
        SourceSettings(path="seed_prompts", where={"label": "unsafe"}, limit=HARMFUL_PROMPTS),
    )
    rows = [row for source in sources for row in read_conversations(source)]
    base = str(embedded_model("smollm2"))
    with Stage("embedded guard") as stage:
        started = time.monotonic()
        model = train_on_labels(
            *(base, FAMILY, rows, SETTINGS, torch.float32),
            on_step=lambda step: stage.report("step", step.number, step.total, started),
        )
        save_adapter(model.to(torch.bfloat16), 1.0, folder)
        metadata = {
            "family": FAMILY,
            "base": "embedded:smollm2",
            "threshold": 0.0,
            "recipe": recipe(),
        }
        metadata[CHECKSUM] = checksum(folder, metadata)
        (folder / "guard.json").write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")
        stage.done(len(rows), f"adapter in {folder}")


def recipe() -> str:
    """Changes with the settings above, the data and the template: then the embedded guard is to be made anew."""
    settings = json.dumps(SETTINGS.model_dump(exclude_unset=True), sort_keys=True)
    digest = hashlib.sha256(f"{settings} {HARMFUL_PROMPTS}".encode())
    for path in (SAMPLE / "judge.jsonl", SAMPLE / "seed_prompts.jsonl", TEMPLATES / "guardloop.jinja"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


if __name__ == "__main__":
    make_embedded_guard(GUARD_ADAPTER)
