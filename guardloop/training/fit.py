"""The training loop, on accelerate: one adapter, from examples in an order that depends on the seed alone.

Loss is taken at the answer's positions only. A template's keys and values are computed once per forward pass, with
gradient, and expanded to the rows behind it. A step's randomness depends on the seed and its number, so that a
training that was interrupted goes on from a checkpoint as if nothing had happened.
"""

import hashlib
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from guardloop.core.errors import GuardLoopError, first_line
from guardloop.guard.inference.forward import PrefixCache, behind, decoder_of, is_sharded, label_logits
from guardloop.guard.inference.packed import fits
from guardloop.guard.inference.packing import batches as within
from guardloop.guard.prompt.verdict import LabelTokens
from guardloop.models.loading import is_out_of_memory
from guardloop.training.checkpoint import (
    ADAPTER,
    BEST,
    OPTIMIZER,
    Checkpoints,
    optimizer_tensors,
    part,
    restore_optimizer,
)
from guardloop.training.loss import Encoded, batch_loss
from guardloop.training.packs import Packs
from guardloop.training.settings import TrainingSettings
from guardloop.training.watch import Step, flops_per_token, memory_gib, peak_flops

log = logging.getLogger("guardloop")
Prefixes = Sequence[Sequence[int]]
EXPLODED = 3.0  # times the loss of the first step, or of a guess among all tokens


@dataclass(frozen=True)
class Look:
    """What the held-out examples showed of the adapter as it was after `step`."""

    step: int
    auprc: float | None
    benign_fpr: float | None
    """Flagged share of the safe prompts, at the baseline's threshold."""

    def rank(self, fpr_limit: float) -> tuple[bool, float]:
        """Higher is better: within the limit first, then by AUPRC; beyond the limit, by the FPR."""
        within = (self.benign_fpr or 0.0) <= fpr_limit
        return within, (self.auprc or 0.0) if within else -(self.benign_fpr or 0.0)


@dataclass(frozen=True)
class Fitted:
    """How a training went."""

    steps: list[Step]
    best: Look | None
    """The look whose adapter was kept; None where nobody looked, and the last one is kept."""


def answer_hidden(
    model: Any, prefixes: Prefixes, lead: Sequence[int], batch: Sequence[Encoded]
) -> tuple[torch.Tensor, int]:
    """Hidden states `float[N, H]` at the answers' positions, example after example, and the tokens that it took.

    N is the sum of the examples' `positions`. Each of `prefixes` (one for each role) that occurs is computed once,
    with gradient. A prompt that starts with none of them is computed whole, as are all with gradient checkpointing,
    which knows no cache.
    """
    known = [] if decoder_of(model).gradient_checkpointing else prefixes
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, example in enumerate(batch):
        groups.setdefault(behind(known, example.tokens), []).append(index)
    parts: dict[int, torch.Tensor] = {}
    tokens = 0
    for prefix, indices in groups.items():
        group = [batch[index] for index in indices]
        rows = [[*e.tokens[len(prefix) :], *lead, *e.answer[:-1]] for e in group]
        hidden = _hidden_behind(model, prefix, rows)
        for place, (index, example) in enumerate(zip(indices, group, strict=True)):
            end = len(rows[place])
            parts[index] = hidden[place, end - example.positions : end]
        tokens += len(prefix) + sum(map(len, rows))
    return torch.cat([parts[index] for index in range(len(batch))]), tokens


def _hidden_behind(model: Any, prefix: Sequence[int], rows: Prefixes) -> torch.Tensor:
    """Hidden states `float[B, T, H]` of `rows`, each behind `prefix`."""
    past = PrefixCache(model, list(prefix)).expand(len(rows)) if prefix else None
    width = max(map(len, rows))
    # right padding: a causal model's real tokens never see what follows them, so no mask is needed
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
    positions = torch.arange(len(prefix), len(prefix) + width, device=model.device).expand(len(rows), -1)
    options = {"past_key_values": past, "use_cache": past is not None}
    hidden: torch.Tensor = decoder_of(model)(input_ids=ids, position_ids=positions, **options).last_hidden_state
    return hidden


class Learner(torch.nn.Module):
    """A guard that answers a batch with its summed loss: what accelerate wraps."""

    def __init__(
        self, model: Any, prefixes: Prefixes, labels: LabelTokens, category_weight: float, packs: Packs | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.prefixes = prefixes
        self.labels = labels
        self.category_weight = category_weight
        self.packs = packs
        self.tokens = 0

    def forward(self, batch: Sequence[Encoded]) -> torch.Tensor:
        """The examples' weighted losses, summed: `float32[]`."""
        done = self.packs.hidden(batch) if self.packs else None
        hidden, tokens = done or answer_hidden(self.model, self.prefixes, self.labels.lead, batch)
        self.tokens += tokens
        return batch_loss(label_logits(self.model, hidden), self.labels, batch, self.category_weight)


def fit(
    model: Any,
    prefixes: Prefixes,
    labels: LabelTokens,
    examples: Sequence[Encoded],
    settings: TrainingSettings,
    *,
    on_step: Callable[[Step], None] = lambda step: None,
    look: Callable[[int], Look] | None = None,
    checkpoints: Checkpoints | None = None,
) -> Fitted:
    """Train the trainable parameters of `model` in place, to those of the best `look`.

    Raises GuardLoopError where there are no examples, where the loss explodes or is not a number (naming the examples
    of that step), and where memory does not suffice for one example.
    """
    if not examples:
        raise GuardLoopError("training: there are no examples", "screen more traffic")
    training = Training(model, prefixes, labels, settings)
    per_epoch = math.ceil(len(examples) / settings.batch_size)
    total = max(1, math.ceil(per_epoch * settings.epochs))
    every = settings.eval_steps or per_epoch
    if checkpoints:
        training.resume(checkpoints)
    for number, batch in enumerate(batches(examples, settings, total), start=1):
        if number <= len(training.steps):
            continue
        if training.is_over():
            log.info("no better adapter in %d looks: training ends after step %d", settings.patience, number - 1)
            break
        step = training.take(batch, number, total)
        if look and (number % every == 0 or number == total):
            found = look(number)
            training.consider(found)
            step = replace(step, held_out_auprc=found.auprc, benign_fpr=found.benign_fpr)
        training.steps.append(step)
        if checkpoints and settings.checkpoint_steps and number % settings.checkpoint_steps == 0 and number < total:
            training.save(checkpoints)
        on_step(step)
    training.keep_best()
    model.eval()
    return Fitted(training.steps, training.best)


class Training:
    """A training under way: what a checkpoint holds, and how a step is taken."""

    def __init__(self, model: Any, prefixes: Prefixes, labels: LabelTokens, settings: TrainingSettings) -> None:
        half = model.dtype == torch.float16 and model.device.type == "cuda"  # needs its loss scaled
        self.accelerator = Accelerator(cpu=model.device.type == "cpu", mixed_precision="fp16" if half else "no")
        if self.accelerator.distributed_type not in (
            DistributedType.NO,
            DistributedType.MULTI_CPU,
            DistributedType.MULTI_GPU,
        ):
            raise GuardLoopError(
                f"training: {self.accelerator.distributed_type.value} is not supported",
                "unset ACCELERATE_USE_*; training.sharded splits a guard among the GPUs",
            )
        self.model = model
        self.settings = settings
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.packs = None
        if model.device.type == "cuda" and fits(model):
            share = settings.gradient_checkpointing
            self.packs = Packs(model, prefixes, labels.lead, largest=settings.pack_tokens, checkpointed=share)
        self.packs_work = False  # no step was taken with them yet
        # FSDP gathers a layer for one pass before each backward pass: a template by itself would be another one
        known = [] if is_sharded(model) else prefixes
        self.learner = Learner(model, known, labels, settings.category_weight, self.packs)
        # no DDP, which takes no sharded model: `_backward` sums the gradients
        self.wrapped = self.accelerator.prepare_model(self.learner, device_placement=False, evaluation_mode=True)
        rate, decay = settings.learning_rate, settings.weight_decay
        self.optimizer = self.accelerator.prepare_optimizer(
            torch.optim.AdamW(self.parameters.values(), lr=rate, weight_decay=decay), device_placement=False
        )
        self.processes = self.accelerator.num_processes
        self.micro_rows = settings.micro_rows or math.ceil(settings.batch_size / self.processes)
        self.flops = flops_per_token(model, settings.top_layers)
        self.peak = peak_flops(model.device)
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        self.steps: list[Step] = []
        self.best: Look | None = None
        self.best_adapter: dict[str, torch.Tensor] = {}
        self.looks_since_best = 0

    def take(self, batch: Sequence[Encoded], number: int, total: int) -> Step:
        """One optimizer step. Where memory runs out, the same step is taken in smaller pieces."""
        started = time.perf_counter()
        self.model.train()
        while (done := self._backward(batch, number)) is None:
            if self.processes > 1 or not self._halve():
                setting = "pack_tokens" if self.packs else "micro_rows"
                raise GuardLoopError(
                    f"training: out of memory with {self._most()} in a forward pass of each process",
                    f"set training.{setting} lower, or training.gradient_checkpointing to 1, or guard.quantization",
                )
            log.warning("out of memory: from here on %s in a forward pass", self._most())
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
        loss, tokens = done
        norm = float(self.accelerator.clip_grad_norm_(self.parameters.values(), self.settings.clip))
        self._check(loss, norm, number, batch)
        rate = self.settings.learning_rate * rate_at(number - 1, total, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        mfu = self.flops * tokens / seconds / self.peak / self.processes if self.peak else None
        memory = memory_gib(self.model.device)
        return Step(number, total, loss, norm, rate, len(batch), tokens, seconds, memory, mfu)

    def _halve(self) -> bool:
        """Compute less at once from here on; False where it is least already."""
        if self.packs:
            return self.packs.halve()
        before, self.micro_rows = self.micro_rows, math.ceil(self.micro_rows / 2)
        return self.micro_rows < before

    def _most(self) -> str:
        return f"a pack of {self.packs.largest} tokens" if self.packs else f"{self.micro_rows} examples"

    def _backward(self, batch: Sequence[Encoded], number: int) -> tuple[float, int] | None:
        """Gradients of the batch's weighted mean loss; the loss and the tokens computed, or None without the memory.

        Each process takes its share of the rows; their gradients are summed.
        """
        rank = self.accelerator.process_index
        torch.manual_seed(_seed_of(self.settings.seed, number, rank))
        weight = sum(e.weight for e in batch) or 1.0  # of a batch that counts for nothing, the loss is 0
        pieces = self._pieces(batch, rank)
        if is_sharded(self.model):  # each process makes as many passes as the one with the most
            most = max(len(self._pieces(batch, process)) for process in range(self.processes))
            pieces += [[replace(batch[0], weight=0.0)]] * (most - len(pieces))
        self.learner.tokens, value = 0, 0.0
        try:
            for piece in pieces:
                value += self._piece(piece, weight)
        except RuntimeError as error:
            self.optimizer.zero_grad(set_to_none=True)
            if is_out_of_memory(error):
                return None
            if not self.packs or self.packs_work:
                raise
            log.warning("packs: %s; training goes on without them, which is slower", first_line(error))
            self.packs = self.learner.packs = None
            pieces = []
        if not pieces:  # out of the handler, where the error still holds the tensors of its frames
            return self._backward(batch, number)
        self.packs_work = True
        if self.processes == 1:
            return value, self.learner.tokens
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        vector_to_parameters(self.accelerator.reduce(parameters_to_vector(gradients), "sum"), gradients)
        sums = torch.tensor([value, self.learner.tokens], dtype=torch.float64, device=self.model.device)
        loss, tokens = self.accelerator.reduce(sums, "sum").tolist()
        return loss, int(tokens)

    def _pieces(self, batch: Sequence[Encoded], process: int) -> list[list[Encoded]]:
        """The share of one process, in what it computes at once: at least one row, if need be of no weight."""
        share = list(batch[process :: self.processes]) or [replace(batch[0], weight=0.0)]
        if self.packs:
            return self.packs.pieces(share)
        lengths = [len(e.tokens) - len(behind(self.learner.prefixes, e.tokens)) for e in share]
        most, rows = self.settings.pack_tokens, self.micro_rows
        whole = max(lengths) * len(share) <= most  # and in its own order
        together = [range(len(share))] if whole else within(lengths, most)
        return [[share[i] for i in chosen[n : n + rows]] for chosen in together for n in range(0, len(chosen), rows)]

    def _piece(self, piece: Sequence[Encoded], weight: float) -> float:
        loss = self.wrapped(piece) / weight
        self.accelerator.backward(loss)
        return float(loss.item())

    def _check(self, loss: float, norm: float, number: int, batch: Sequence[Encoded]) -> None:
        usual = max(math.log(self.vocabulary), self.steps[0].loss if self.steps else loss)
        overflow = self.accelerator.scaler is not None and math.isfinite(loss)  # the scaler skips such a step
        if loss <= EXPLODED * usual and (math.isfinite(norm) or overflow):
            return
        raise GuardLoopError(
            f"training: the loss is {loss:.4g} and the norm of its gradient {norm:.4g} at step {number} "
            f"(examples {', '.join(e.id for e in batch)})",
            "lower training.learning_rate, or look at these examples",
        )

    def consider(self, look: Look) -> None:
        """Keep the adapter if it is the best so far; where there is nothing to rank by, the newest."""
        limit = self.settings.fpr_limit
        if self.best is None or look.auprc is None or look.rank(limit) > self.best.rank(limit):
            self.best, self.looks_since_best = look, 0
            self.best_adapter = {name: p.detach().clone() for name, p in self.parameters.items()}
        else:
            self.looks_since_best += 1

    def is_over(self) -> bool:
        """Whether so many looks found nothing better that it is time to stop."""
        return 0 < self.settings.patience <= self.looks_since_best

    @torch.no_grad()
    def keep_best(self) -> None:
        """Put the best adapter back."""
        for name, tensor in self.best_adapter.items():
            self.parameters[name].copy_(tensor)

    def save(self, checkpoints: Checkpoints) -> None:
        """Keep all that the next step depends on."""
        if not self.accelerator.is_main_process:
            return
        tensors = {f"{ADAPTER}{name}": p for name, p in self.parameters.items()}
        tensors |= {f"{BEST}{name}": p for name, p in self.best_adapter.items()}
        tensors |= {f"{OPTIMIZER}{name}": p for name, p in optimizer_tensors(self.optimizer).items()}
        state = {
            "steps": [asdict(step) for step in self.steps],
            "micro_rows": self.micro_rows,
            "best": asdict(self.best) if self.best else None,
            "looks_since_best": self.looks_since_best,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        checkpoints.save(tensors, state)

    @torch.no_grad()
    def resume(self, checkpoints: Checkpoints) -> None:
        """Go on from the newest checkpoint, if there is one."""
        if (found := checkpoints.load()) is None:
            return
        tensors, state = found
        for name, tensor in part(tensors, ADAPTER).items():
            self.parameters[name].copy_(tensor)
        restore_optimizer(self.optimizer, part(tensors, OPTIMIZER))
        self.best_adapter = {n: t.to(self.model.device) for n, t in part(tensors, BEST).items()}
        self.best = Look(**state["best"]) if state["best"] else None
        self.looks_since_best, self.micro_rows = state["looks_since_best"], state["micro_rows"]
        self.steps = [Step(**step) for step in state["steps"]]
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        log.info("going on after step %d, from %s", len(self.steps), checkpoints.uri)


def batches(examples: Sequence[Encoded], settings: TrainingSettings, total: int) -> Iterator[list[Encoded]]:
    """`total` batches, of examples of like length or of any, in an order that depends on the seed alone."""
    draw = random.Random(settings.seed)
    made = 0
    while made < total:
        alike = settings.order == "length"
        order = sorted(examples, key=lambda e: (len(e.tokens) // 16 if alike else 0, draw.random()))
        epoch = [order[i : i + settings.batch_size] for i in range(0, len(order), settings.batch_size)]
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


def _seed_of(seed: int, step: int, process: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{process}".encode()).digest()[:7], "big")
