"""The training loop: one adapter, from examples in an order that depends on the seed alone."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from guardloop.core.errors import GuardLoopError
from guardloop.guard.prompt.verdict import LabelTokens
from guardloop.training.checkpoint import Checkpoints
from guardloop.training.examples import Encoded
from guardloop.training.settings import TrainingSettings
from guardloop.training.trainer import Prefixes, Trainer, ValidationResult
from guardloop.training.watch import Step

CHECKPOINT_STEPS = 50  # a checkpoint takes less time than a step, and a killed training loses no more than minutes
WARMUP = 0.03  # share of the steps in which the learning rate rises; then it falls to 0 as a cosine


@dataclass(frozen=True)
class Fitted:
    """How a training went."""

    steps: list[Step]
    best: ValidationResult | None
    """Of the adapter that was kept; None where nothing was validated, and the last one is kept."""


def fit(
    model: Any,
    prefixes: Prefixes,
    labels: LabelTokens,
    examples: Sequence[Encoded],
    settings: TrainingSettings,
    seed: int = 0,
    *,
    on_step: Callable[[Step], None] = lambda step: None,
    validate: Callable[[int], ValidationResult] | None = None,
    checkpoints: Checkpoints | None = None,
) -> Fitted:
    """Train the trainable parameters of `model` in place. Validated after each epoch, the best adapter is kept.

    Raises GuardLoopError where there are no examples, where the loss explodes or is not a number (naming the examples
    of that step), and where memory does not suffice for one example.
    """
    if not examples:
        raise GuardLoopError("training: there are no examples", "screen more traffic")
    trainer = Trainer(model, prefixes, labels, settings, seed)
    per_epoch, total = step_counts(len(examples), settings)
    if checkpoints:
        trainer.resume(checkpoints)
    for number, batch in enumerate(batches(examples, settings.batch_size, seed, total), start=1):
        if number <= len(trainer.steps):
            continue
        step = trainer.step(batch, number, total, settings.learning_rate * rate_at(number - 1, total))
        if validate and (number % per_epoch == 0 or number == total):
            result = validate(number)
            trainer.consider(result)
            step = replace(step, validation_auprc=result.auprc, benign_fpr=result.benign_fpr)
        trainer.steps.append(step)
        if checkpoints and number % CHECKPOINT_STEPS == 0 and number < total:
            trainer.save(checkpoints)
        on_step(step)
    trainer.keep_best()
    model.eval()
    return Fitted(trainer.steps, trainer.best)


def step_counts(examples: int, settings: TrainingSettings) -> tuple[int, int]:
    """Steps of one epoch, and of the whole training."""
    per_epoch = math.ceil(examples / settings.batch_size)
    return per_epoch, max(1, math.ceil(per_epoch * settings.epochs))


def batches(examples: Sequence[Encoded], size: int, seed: int, total: int) -> Iterator[list[Encoded]]:
    """`total` batches in random order, each epoch in another, which depends on the seed alone."""
    draw = random.Random(seed)
    made = 0
    while made < total:
        order = draw.sample(examples, len(examples))
        for start in range(0, len(order), size)[: total - made]:
            yield order[start : start + size]
            made += 1


def rate_at(step: int, total: int) -> float:
    """Factor on the learning rate at `step` of `total`: linear warm-up, then a cosine's fall to 0."""
    warmup = math.ceil(WARMUP * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
