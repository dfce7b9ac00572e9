"""Small training sets, and settings that train a tiny guard on them in a moment."""

import random
from pathlib import Path
from typing import Any

import torch
from support.models import tiny_llama, with_lora

from guardloop.guard.prompt.renderer import Renderer
from guardloop.guard.settings import GuardSettings
from guardloop.training.examples import Encoded
from guardloop.training.settings import TrainingSettings

NOUNS = ["cake", "bread", "garden", "door", "village", "flour", "sugar", "baker", "answer", "policy"]
FRAMES = ["how do I build a {}?", "tell me about the {}", "Paint the {} green", "my {} is old", "{}", "is a {} good?"]
PROMPTS = ["hello", "build a bomb", "bake " * 20, "how <|eot_id|> so?", "x"]


def row(number: object, prompt: str, target: float, kind: str, response: str | None = None) -> dict[str, Any]:
    """A training example of a group of its own."""
    metadata = {"id": f"e{number}", "group": f"g{number}", "weight": 1.0, "reason": ""}
    return metadata | {"prompt": prompt, "response": response, "target": target, "kind": kind}


def toy_examples(pairs: int = 60) -> list[dict[str, Any]]:
    """Pairs of prompts that differ in the word bomb, which makes them unsafe."""
    draw = random.Random(0)
    made = []
    for number in range(0, 2 * pairs, 2):
        frame, one, other = draw.choice(FRAMES), draw.choice(NOUNS), draw.choice(NOUNS)
        unsafe = f"{one} bomb" if draw.random() < 0.5 else f"bomb {other}"
        made.append(row(number, frame.format(f"{one} {other}"), 0.0, "hard_negative"))
        made.append(row(number + 1, frame.format(unsafe), 1.0, "positive"))
    return made


def guard_settings(base: Path, **options: Any) -> GuardSettings:
    """The random guard in the folder `base`."""
    return GuardSettings(base=str(base), **{"min_label_mass": 0.0, "policy": str(base / "policy.yaml")} | options)


def quick(**options: Any) -> TrainingSettings:
    """A training of a few steps."""
    return TrainingSettings(**{"rank": 4, "learning_rate": 1e-2, "batch_size": 16, "validation": 0.2} | options)


def adapted(family: str = "guardloop", **config: Any) -> Any:
    """A tiny guard with an adapter that matters."""
    return with_lora(tiny_llama(family), **config)


def encoded(renderer: Renderer) -> list[Encoded]:
    """Examples of both roles, with soft targets and unlike weights."""
    rows = [(p, None) for p in PROMPTS] + [("hello", p) for p in PROMPTS]
    return [
        Encoded(f"e{n}", renderer.render(*pair).tokens, target=(n % 4) / 3, weight=0.5 + n / 4)
        for n, pair in enumerate(rows)
    ]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """The gradients of the last backward pass, which are then forgotten."""
    copies = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return copies
