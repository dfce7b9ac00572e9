"""The training loop: soft cross-entropy on the label tokens, behind the template's shared keys and values.

Loss is taken at the label position only. The template's keys and values are computed once per step, with gradient,
and expanded to the rows of the batch.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from guardloop.errors import GuardLoopError
from guardloop.guard.forward import PrefixCache, behind, label_hidden, label_logits
from guardloop.guard.verdict import LabelTokens
from guardloop.training.settings import TrainingSettings


@dataclass(frozen=True)
class Encoded:
    """A training example as tokens `int[T]`, ending at the label position, with the wanted P(unsafe)."""

    id: str
    tokens: list[int]
    target: float
    weight: float


@dataclass(frozen=True)
class Step:
    """What one optimizer step did."""

    number: int
    total: int
    loss: float
    gradient_norm: float
    learning_rate: float
    examples: int
    tokens: int
    seconds: float


def label_loss(logits: torch.Tensor, labels: LabelTokens, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean soft cross-entropy over the whole vocabulary at the label position.

    `logits: float32[B, V]`, `targets: float32[B]` (wanted P(unsafe)), `weights: float32[B]`. The softmax runs over all
    tokens, so that the label mass stays near 1.
    """
    logp = logits.log_softmax(-1)
    losses = -(targets * logp[:, labels.unsafe] + (1 - targets) * logp[:, labels.safe])
    return (losses * weights).sum() / weights.sum()


def fit(
    model: Any,
    prefixes: Sequence[Sequence[int]],
    labels: LabelTokens,
    examples: Sequence[Encoded],
    settings: TrainingSettings,
    *,
    on_step: Callable[[Step], None] = lambda step: None,
) -> list[Step]:
    """Train the trainable parameters of `model` in place. Returns every step.

    Raises GuardLoopError where the loss is no longer finite, naming the examples of that step.
    """
    torch.manual_seed(settings.seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    per_epoch = math.ceil(len(examples) / settings.batch_rows)
    total = max(1, math.ceil(per_epoch * settings.epochs))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, total, settings))
    steps: list[Step] = []
    model.train()
    for number, drawn in enumerate(batches(examples, settings, total), start=1):
        started = time.perf_counter()
        batch, hidden = hidden_of(model, prefixes, labels, drawn)
        targets = torch.tensor([e.target for e in batch], device=model.device)
        weights = torch.tensor([e.weight for e in batch], device=model.device)
        loss = label_loss(label_logits(model, hidden), labels, targets, weights)
        loss.backward()  # type: ignore[no-untyped-call]
        value, norm = loss.item(), float(clip_grad_norm_(parameters, settings.clip))
        if not math.isfinite(value) or not math.isfinite(norm):
            raise GuardLoopError(
                f"training: the loss is {value} at step {number} (examples {', '.join(e.id for e in batch)})",
                "lower training.learning_rate, or look at these examples",
            )
        rate = float(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        tokens = sum(len(e.tokens) for e in batch)
        step = Step(number, total, value, norm, rate, len(batch), tokens, time.perf_counter() - started)
        steps.append(step)
        on_step(step)
    model.eval()
    return steps


def hidden_of(
    model: Any, prefixes: Sequence[Sequence[int]], labels: LabelTokens, batch: Sequence[Encoded]
) -> tuple[list[Encoded], torch.Tensor]:
    """Hidden states `float[B, H]` at the label positions of `batch`, and the batch in the order they are in.

    Each of `prefixes` that occurs passes through the model once, with gradient.
    """
    groups: dict[tuple[int, ...], list[Encoded]] = {}
    for example in batch:
        groups.setdefault(behind(prefixes, example.tokens), []).append(example)
    hidden = [
        label_hidden(model, PrefixCache(model, prefix), [[*e.tokens[len(prefix) :], *labels.lead] for e in group])
        for prefix, group in groups.items()
    ]
    return [e for group in groups.values() for e in group], torch.cat(hidden)


def batches(examples: Sequence[Encoded], settings: TrainingSettings, total: int) -> Iterator[list[Encoded]]:
    """`total` batches of like length, in an order that depends on the seed alone."""
    draw = random.Random(settings.seed)
    made = 0
    while made < total:
        order = sorted(examples, key=lambda e: (len(e.tokens) // 16, draw.random()))
        epoch = [order[i : i + settings.batch_rows] for i in range(0, len(order), settings.batch_rows)]
        draw.shuffle(epoch)
        for batch in epoch[: total - made]:
            yield batch
            made += 1


def rate_at(step: int, total: int, settings: TrainingSettings) -> float:
    """Factor on the learning rate at `step` of `total`: linear warm-up, then the schedule's fall to 0."""
    warmup = math.ceil(settings.warmup * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1, total - warmup)
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    return 1 - share if settings.schedule == "linear" else 1.0
