"""One adapter under training: how an optimizer step is taken, within the memory there is, and what a checkpoint holds.

The loss is taken at the label position only. A template's keys and values are computed once per forward pass, with
gradient, and expanded to the rows that follow it. A step's randomness depends on the seed and its number, so that a
training that was interrupted goes on from a checkpoint as if nothing had happened.
"""

import hashlib
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from guardloop.core.errors import GuardLoopError, first_line
from guardloop.guard.inference.forward import (
    PrefixCache,
    decoder_of,
    is_sharded,
    label_hidden,
    label_logits,
    longest_prefix,
)
from guardloop.guard.inference.packed import fits
from guardloop.guard.inference.packing import BLOCK, padded_batches
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
from guardloop.training.examples import Encoded
from guardloop.training.loss import batch_loss
from guardloop.training.packs import MIN_TOKENS, Packs
from guardloop.training.settings import TrainingSettings
from guardloop.training.watch import Step, flops_per_token, memory_gib, peak_flops

log = logging.getLogger("guardloop")
Prefixes = Sequence[Sequence[int]]
PACK_TOKENS = 8192
"""Most tokens in one forward pass: of a pack on a GPU, elsewhere of examples padded to the longest. Halved by itself
where memory runs out."""
MAX_GRAD_NORM = 1.0
EXPLODED = 3.0  # times the loss of the first step, or of a guess among all tokens


@dataclass(frozen=True)
class ValidationResult:
    """What the validation examples showed of the adapter as it was after `step`."""

    step: int
    auprc: float | None
    benign_fpr: float | None
    """Flagged share of the safe prompts, at the baseline's threshold."""


def label_states(
    model: Any, prefixes: Prefixes, lead: Sequence[int], batch: Sequence[Encoded]
) -> tuple[torch.Tensor, int]:
    """Hidden states `float[B, H]` at the label positions, in order, and the tokens that it took.

    Each of `prefixes` (one for each role) that occurs is computed once, with gradient. A prompt that starts with none
    of them is computed whole.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, example in enumerate(batch):
        groups.setdefault(longest_prefix(prefixes, example.tokens), []).append(index)
    parts, order, tokens = list[torch.Tensor](), list[int](), 0
    for prefix, indices in groups.items():
        rows = [[*batch[index].tokens[len(prefix) :], *lead] for index in indices]
        parts.append(label_hidden(model, PrefixCache(model, prefix), rows))
        order += indices
        tokens += len(prefix) + sum(map(len, rows))
    return torch.cat(parts)[torch.tensor(order).argsort()], tokens


class Learner(torch.nn.Module):
    """A guard that answers a micro-batch with its summed loss: what accelerate wraps."""

    def __init__(self, model: Any, prefixes: Prefixes, labels: LabelTokens, packs: Packs | None = None) -> None:
        super().__init__()
        self.model = model
        self.prefixes = prefixes
        self.labels = labels
        self.packs = packs
        self.tokens = 0

    def forward(self, batch: Sequence[Encoded]) -> torch.Tensor:
        """The examples' weighted losses, summed: `float32[]`."""
        packed = self.packs.hidden(batch) if self.packs else None
        hidden, tokens = packed or label_states(self.model, self.prefixes, self.labels.before, batch)
        self.tokens += tokens
        return batch_loss(label_logits(self.model, hidden), self.labels, batch)


class Trainer:
    """A training under way."""

    def __init__(
        self, model: Any, prefixes: Prefixes, labels: LabelTokens, settings: TrainingSettings, seed: int = 0
    ) -> None:
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
        self.seed = seed
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.max_tokens = PACK_TOKENS
        self.packs = None
        if model.device.type == "cuda" and fits(model):
            share = settings.gradient_checkpointing
            self.packs = Packs(model, prefixes, labels.before, max_tokens=self.max_tokens, checkpointed=share)
        self.packs_work = False  # no step was taken with them yet
        # FSDP gathers a layer for one pass before each backward pass: a template by itself would be another one.
        # Gradient checkpointing knows no cached keys.
        whole = is_sharded(model) or decoder_of(model).gradient_checkpointing
        self.learner = Learner(model, [] if whole else prefixes, labels, self.packs)
        # no DDP, which takes no sharded model: `_over_processes` sums the gradients
        self.wrapped = self.accelerator.prepare_model(self.learner, device_placement=False, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare_optimizer(
            torch.optim.AdamW(self.parameters.values(), lr=settings.learning_rate, weight_decay=0.0),
            device_placement=False,
        )
        self.processes = self.accelerator.num_processes
        self.flops = flops_per_token(model, settings.top_layers)
        self.peak = peak_flops(model.device)
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        self.steps: list[Step] = []
        self.best: ValidationResult | None = None
        self.best_adapter: dict[str, torch.Tensor] = {}

    def step(self, batch: Sequence[Encoded], number: int, total: int, rate: float) -> Step:
        """Take optimizer step `number` of `total` at the learning rate `rate`.

        Raises GuardLoopError where the loss explodes or is not a number, and where memory does not suffice.
        """
        started = time.perf_counter()
        self.model.train()
        loss, tokens = self._gradients(batch, number)
        norm = float(self.accelerator.clip_grad_norm_(self.parameters.values(), MAX_GRAD_NORM))
        self._check(loss, norm, number, batch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        mfu = self.flops * tokens / seconds / self.peak / self.processes if self.peak else None
        return Step(number, total, loss, norm, rate, len(batch), tokens, seconds, memory_gib(self.model.device), mfu)

    def _gradients(self, batch: Sequence[Encoded], number: int) -> tuple[float, int]:
        """Gradients of the batch's weighted mean loss, over all processes; the loss and the tokens computed.

        Where memory runs out, or packs cannot be computed, it begins anew with less at once, or without packs.
        """
        rank = self.accelerator.process_index
        weight = sum(e.weight for e in batch) or 1.0  # of a batch that counts for nothing, the loss is 0
        while True:
            torch.manual_seed(_seed_of(self.seed, number, rank))
            micro_batches = self._micro_batches(batch, rank)
            self.learner.tokens = 0
            try:
                loss = sum((self._backward(rows, weight) for rows in micro_batches), 0.0)
                break
            except RuntimeError as error:
                out_of_memory = is_out_of_memory(error)
                if not out_of_memory and (not self.packs or self.packs_work):
                    raise
                reason = first_line(error)
            # out of the handler, where the error still holds the tensors of its frames
            self.optimizer.zero_grad(set_to_none=True)
            if out_of_memory:
                self._halve(micro_batches)
            else:
                self._unpack(reason)
        self.packs_work = True
        return self._over_processes(loss, self.learner.tokens)

    def _backward(self, batch: Sequence[Encoded], weight: float) -> float:
        loss = self.wrapped(batch) / weight
        self.accelerator.backward(loss)
        return float(loss.item())

    def _over_processes(self, loss: float, tokens: int) -> tuple[float, int]:
        """Sum the gradients, the loss and the tokens of all processes."""
        if self.processes == 1:
            return loss, tokens
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        vector_to_parameters(self.accelerator.reduce(parameters_to_vector(gradients), "sum"), gradients)
        sums = torch.tensor([loss, tokens], dtype=torch.float64, device=self.model.device)
        loss, tokens = self.accelerator.reduce(sums, "sum").tolist()
        return loss, int(tokens)

    def _micro_batches(self, batch: Sequence[Encoded], process: int) -> list[list[Encoded]]:
        """The share of one process, in what it computes at once: at least one row, if need be of no weight."""
        shares = [list(batch[n :: self.processes]) or [replace(batch[0], weight=0.0)] for n in range(self.processes)]
        if not is_sharded(self.model):
            return self._fitting(shares[process])
        found = [self._fitting(share) for share in shares]  # each process makes as many passes as the one with the most
        missing = max(map(len, found)) - len(found[process])
        return found[process] + [[replace(batch[0], weight=0.0)]] * missing

    def _fitting(self, examples: list[Encoded]) -> list[list[Encoded]]:
        """Micro-batches within `max_tokens`: packs, or all at once in the given order, or rows of like length."""
        if self.packs:
            return self.packs.micro_batches(examples)
        if self._padded_tokens(examples) <= self.max_tokens:
            return [examples]
        return list(padded_batches(examples, self.max_tokens, self._length))

    def _length(self, example: Encoded) -> int:
        return len(example.tokens) - len(longest_prefix(self.learner.prefixes, example.tokens))

    def _padded_tokens(self, examples: Sequence[Encoded]) -> int:
        return max(map(self._length, examples)) * len(examples)

    def _halve(self, tried: Sequence[Sequence[Encoded]]) -> None:
        """Compute half as much at once from here on as the largest of what was `tried`."""
        if self.packs:
            half, least = self.max_tokens // 2 // BLOCK * BLOCK, MIN_TOKENS
        else:
            half, least = max((self._padded_tokens(rows) for rows in tried if len(rows) > 1), default=0) // 2, 1
        if self.processes > 1 or half < least:
            what = f"packs of {self.max_tokens} tokens" if self.packs else f"{max(map(len, tried))} examples at once"
            ways = ["training.gradient_checkpointing: 1", "guard.quantization", "a lower guard.max_text_tokens"]
            ways += ["a smaller training.batch_size"] if self.processes > 1 else []
            raise GuardLoopError(f"training: out of memory with {what}", f"set {' or '.join(ways)}")
        self._bound(half)
        log.warning("out of memory: from here on at most %d tokens in a forward pass", half)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _bound(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        if self.packs:
            self.packs.resize(max_tokens)

    def _unpack(self, reason: str) -> None:
        log.warning("packed sequences: %s; training goes on without packing, which is slower", reason)
        self.packs = self.learner.packs = None

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

    def consider(self, result: ValidationResult) -> None:
        """Keep the adapter if it ranks best so far; where there is nothing to rank by, the newest."""
        if self.best is None or result.auprc is None or result.auprc > (self.best.auprc or 0.0):
            self.best = result
            self.best_adapter = {name: p.detach().clone() for name, p in self.parameters.items()}

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
            "max_tokens": self.max_tokens,
            "best": asdict(self.best) if self.best else None,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        checkpoints.save(tensors, state)

    @torch.no_grad()
    def resume(self, checkpoints: Checkpoints) -> None:
        """Go on from the newest checkpoint, if there is one."""
        if (stored := checkpoints.load()) is None:
            return
        tensors, state = stored
        for name, tensor in part(tensors, ADAPTER).items():
            self.parameters[name].copy_(tensor)
        restore_optimizer(self.optimizer, part(tensors, OPTIMIZER))
        self.best_adapter = {n: t.to(self.model.device) for n, t in part(tensors, BEST).items()}
        self.best = ValidationResult(**state["best"]) if state["best"] else None
        self._bound(state["max_tokens"])
        self.steps = [Step(**step) for step in state["steps"]]
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        log.info("training goes on after step %d, from %s", len(self.steps), checkpoints.uri)


def _seed_of(seed: int, step: int, process: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{process}".encode()).digest()[:7], "big")
