"""From examples to an adapter: split, train, choose its strength and threshold on what was held out, save."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from sklearn.metrics import average_precision_score

from guardloop.errors import GuardLoopError
from guardloop.guard.engine import Guard, attach_adapter, fetch_adapter, load_renderer, trunk
from guardloop.guard.facts import guard_facts
from guardloop.guard.settings import GuardSettings
from guardloop.guard.verdict import label_tokens
from guardloop.models import load_causal_lm, locate, pick_device, pick_dtype
from guardloop.records import Row
from guardloop.training.fit import Encoded, Step, fit
from guardloop.training.settings import TrainingSettings

LESSONS = ("positive", "hard_negative", "uncertain", "refused", "passed")
CONTRAST = 0.5  # targets above count as unsafe when the held-out examples are ranked


@dataclass(frozen=True)
class Trained:
    """What training made, beside the adapter itself."""

    examples: int
    held_out: int
    steps: int
    first_loss: float
    last_loss: float
    scale: float
    threshold: float
    held_out_auprc_default: float | None
    held_out_auprc: float | None
    trials: list[dict[str, float | None]]


def train(
    examples: Sequence[Row],
    guard: GuardSettings,
    settings: TrainingSettings,
    folder: Path,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Trained:
    """Train a LoRA adapter for the default guard on `examples` and save it in `folder`.

    The adapter's strength and threshold are chosen on held-out examples. Raises GuardLoopError if there are too few
    examples, or one kind only.
    """
    training, held_out = split(examples, settings.validation, settings.seed)
    _check(training, settings)
    device = pick_device(guard.device)
    base = locate(guard.base)
    own_adapter = fetch_adapter(guard.adapter)
    facts = {**guard_facts(base), **(guard_facts(own_adapter) if own_adapter else {})}
    renderer = load_renderer(guard)
    torch.manual_seed(settings.seed)
    model = load_causal_lm(base, guard.revision, pick_dtype(guard.dtype, device), device, guard.quantization)
    model = attach_adapter(model, own_adapter, trainable=True) if own_adapter else fresh_adapter(model, settings)
    default_threshold = guard.threshold if guard.threshold is not None else float(facts.get("threshold", 0.0))
    trained_guard = Guard(model, renderer, threshold=default_threshold, is_guard=False)
    default_margins = _margins(trained_guard, held_out)
    encoded = [
        Encoded(r["id"], renderer.render(r["prompt"], r["response"]).tokens, r["target"], r["weight"]) for r in training
    ]
    steps = fit(model, renderer.shared_prefix(), label_tokens(renderer), encoded, settings, on_step=on_step)
    trials, best = [], (-1.0, 1.0, np.zeros(0))
    for scale in settings.scales:
        with scaled(model, scale):
            margins = _margins(Guard(model, renderer, is_guard=False), held_out)
        quality = ranking(held_out, margins)
        trials.append({"scale": scale, "held_out_auprc": quality})
        if (quality or 0.0) > best[0]:
            best = (quality or 0.0, scale, margins)
    _, scale, margins = best
    threshold = operating_point(held_out, margins, default_margins, default_threshold, settings.max_newly_blocked)
    _save(model, scale, folder)
    trained = Trained(
        examples=len(training),
        held_out=len(held_out),
        steps=len(steps),
        first_loss=_mean_loss(steps[: max(1, len(steps) // 10)]),
        last_loss=_mean_loss(steps[-max(1, len(steps) // 10) :]),
        scale=scale,
        threshold=threshold,
        held_out_auprc_default=ranking(held_out, default_margins),
        held_out_auprc=ranking(held_out, margins),
        trials=trials,
    )
    _write_facts(folder, facts, guard, settings, trained)
    return trained


def split(examples: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and held-out examples; a group falls wholly on one side, by a hash of its key and the seed."""

    def held(row: Row) -> bool:
        digest = hashlib.sha256(f"{seed}/{row['group']}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 < share

    return [r for r in examples if not held(r)], [r for r in examples if held(r)]


def ranking(examples: Sequence[Row], margins: np.ndarray) -> float | None:
    """Average precision of `margins` on the lessons among `examples`, by their targets; None with one class only."""
    rows = [i for i, row in enumerate(examples) if row["kind"] in LESSONS]
    unsafe = np.array([examples[i]["target"] > CONTRAST for i in rows], dtype=bool)
    if unsafe.all() or not unsafe.any():
        return None
    return float(average_precision_score(unsafe, margins[rows]))


def operating_point(
    examples: Sequence[Row], margins: np.ndarray, default_margins: np.ndarray, default_threshold: float, share: float
) -> float:
    """The threshold above which at most `share` more of the held-out never-blocked prompts are flagged than before."""
    never = [i for i, row in enumerate(examples) if row["kind"] in ("hard_negative", "passed")]
    if not never:
        return default_threshold
    before = float((default_margins[never] > default_threshold).mean())
    return float(np.quantile(margins[never], 1 - min(1.0, before + share), method="higher"))


class scaled:  # noqa: N801  (reads as a verb: with scaled(model, .5))
    """The adapter at a part of its strength, for as long as the context lasts."""

    def __init__(self, model: Any, scale: float) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
        self.scale = scale

    def __enter__(self) -> None:
        self.before = [dict(layer.scaling) for layer in self.layers]
        for layer in self.layers:
            layer.scaling.update({name: value * self.scale for name, value in layer.scaling.items()})

    def __exit__(self, *_: object) -> None:
        for layer, scaling in zip(self.layers, self.before, strict=True):
            layer.scaling.update(scaling)


def fresh_adapter(model: Any, settings: TrainingSettings) -> PeftModel:
    """`model` with a new LoRA adapter, which changes nothing yet. Raises GuardLoopError for targets it has not got."""
    layers = model.config.num_hidden_layers
    first = layers - max(1, round(layers * settings.top_layers))
    targets = settings.targets
    if targets == "all-linear" and first:  # peft takes a choice of layers with names only
        inner = [n for n, m in trunk(model).named_modules() if isinstance(m, torch.nn.Linear)]
        targets = sorted({name.rpartition(".")[2] for name in inner})
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        layers_to_transform=list(range(first, layers)) if first else None,
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise GuardLoopError(
            f"training.targets: {str(error).splitlines()[0]}", "use all-linear, or names of the model's own layers"
        ) from error
    if isinstance(adapted.get_output_embeddings(), LoraLayer):
        raise GuardLoopError(
            "training.targets: the output head cannot have an adapter: margins are read from its weights",
            "leave the head out, or use all-linear",
        )
    return adapted


def _check(examples: Sequence[Row], settings: TrainingSettings) -> None:
    if len(examples) < settings.min_examples:
        raise GuardLoopError(
            f"training: {len(examples)} examples are too few (training.min_examples is {settings.min_examples})",
            "screen more traffic, or sample more responses per prompt",
        )
    unsafe = sum(row["target"] > CONTRAST for row in examples)
    if unsafe in (0, len(examples)):
        kind = "safe" if unsafe == 0 else "unsafe"
        raise GuardLoopError(
            f"training: every example is {kind}; such a training set makes a guard that says {kind} to everything",
            "mine both positives and negatives, with replay",
        )


def _margins(guard: Guard, rows: Sequence[Row]) -> np.ndarray:
    return np.array([v.margin if v.margin is not None else 0.0 for v in guard.score(rows)], dtype=np.float32)


def _mean_loss(steps: Sequence[Step]) -> float:
    return float(np.mean([step.loss for step in steps]))


def _save(model: Any, scale: float, folder: Path) -> None:
    """Save the adapter with its chosen strength in its configuration."""
    for config in model.peft_config.values():
        config.lora_alpha = config.lora_alpha * scale
        config.base_model_name_or_path = None
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)
    # guard.json names the base; peft writes a path of this machine, which means nothing elsewhere
    path = folder / "adapter_config.json"
    facts = json.loads(path.read_text("utf-8")) | {"base_model_name_or_path": None}
    path.write_text(json.dumps(facts, indent=2) + "\n", "utf-8")


def _write_facts(
    folder: Path, default_facts: dict[str, Any], guard: GuardSettings, settings: TrainingSettings, trained: Trained
) -> None:
    facts = {
        "family": default_facts.get("family", guard.family),
        "base": guard.base,
        "base_revision": guard.revision,
        "threshold": trained.threshold,
        "training": {**asdict(trained), "settings": settings.plain()},
    }
    (folder / "guard.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
