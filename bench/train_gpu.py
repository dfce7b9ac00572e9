"""The GPU part of `make bench-train`: LLaMA-7B's geometry with random weights, LoRA r 16 on q, k, v and o."""

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from bench.machine import machine
from bench.workload import SAFE, UNSAFE, in_nf4, llama_7b, prompts, seconds
from guardloop.guard.forward import label_logits, trunk
from guardloop.guard.verdict import LabelTokens
from guardloop.training.fit import Training
from guardloop.training.loss import Encoded
from guardloop.training.settings import TrainingSettings

LABELS = LabelTokens((), SAFE, UNSAFE)
PACK = 8192
Row = tuple[str, float | None, float | None]
"""A way, its examples per second, and its peak memory in GiB."""


def rows() -> Iterator[Row]:
    """Every way in turn, each with a model of its own."""
    before, many = prompts(2048)
    examples = [Encoded(str(n), tokens, float(n % 3 == 0), 1.0) for n, tokens in enumerate(many)]
    yield _padded("nf4, batch 4, padded, checkpointing, loss on every token", examples, 4, nf4=True, everywhere=True)
    yield _padded("nf4, batch 16, padded, checkpointing, loss on the answer", examples, 16, nf4=True)
    yield _padded("bf16, batch 8, padded, loss on the answer", examples, 8, nf4=False)
    yield _engine("this engine, bf16, packs of 8k", before, examples, nf4=False, share=0.0)
    yield _engine("this engine, nf4, packs of 8k, 60% checkpointed", before, examples, nf4=True, share=0.6)
    yield _engine("this engine, nf4, packs of 8k, all checkpointed", before, examples, nf4=True, share=1.0)


def table() -> str:
    """The rows as markdown."""
    lines = [
        "### Training on one GPU",
        "",
        "LLaMA-7B's geometry, random weights, LoRA r 16 on q, k, v, o; template of 720 tokens, texts of 58 on average.",
        "",
        "| way | examples/s | peak GiB |",
        "| --- | ---: | ---: |",
    ]
    for way, rate, memory in rows():
        lines.append(f"| {way} | {'out of memory' if rate is None else f'{rate:.1f}'} | {memory or 0:.0f} |")
        print(lines[-1], flush=True)  # noqa: T201  (kept if a later way takes too long)
    return "\n".join([*lines, "", machine()])


def _adapted(nf4: bool) -> Any:
    model = llama_7b()
    model.requires_grad_(False)
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    return get_peft_model(in_nf4(model) if nf4 else model, config).train()


def _engine(way: str, before: list[int], examples: Sequence[Encoded], *, nf4: bool, share: float) -> Row:
    """This engine's own steps, one full pack each."""
    settings = TrainingSettings(gradient_checkpointing=share, pack_tokens=PACK)
    training = Training(_adapted(nf4), [before], LABELS, settings)
    batches = list(_filled(examples, PACK - len(before), len(before)))
    return _timed(way, lambda number: training.take(batches[number], number + 1, 100), [len(b) for b in batches[:7]])


def _filled(examples: Sequence[Encoded], room: int, template: int) -> Iterator[list[Encoded]]:
    """Examples as they come, as many as fill a pack."""
    batch, used = list[Encoded](), 0
    for example in examples:
        length = len(example.tokens) - template
        if used + length > room:
            yield batch
            batch, used = [], 0
        batch.append(example)
        used += length


def _padded(way: str, examples: Sequence[Encoded], batch: int, *, nf4: bool, everywhere: bool = False) -> Row:
    """Whole prompts, padded to the longest of the batch, in autograd's plain way."""
    model = _adapted(nf4)
    if nf4:
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step(number: int) -> None:
        chosen = examples[number * batch : (number + 1) * batch]
        width = max(len(e.tokens) for e in chosen)
        ids = torch.tensor([e.tokens + [0] * (width - len(e.tokens)) for e in chosen], device="cuda")
        if everywhere:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        else:
            last = torch.tensor([len(e.tokens) - 1 for e in chosen], device="cuda")
            hidden = trunk(model)(input_ids=ids, use_cache=False).last_hidden_state[torch.arange(len(chosen)), last]
            targets = torch.tensor([UNSAFE if e.target else SAFE for e in chosen], device="cuda")
            loss = cross_entropy(label_logits(model, hidden), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return _timed(way, step, [batch] * 4)


def _timed(way: str, step: Callable[[int], Any], counts: Sequence[int]) -> Row:
    """Examples per second over the steps after the first two."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        step(0)
        step(1)
        taken = seconds(lambda: [step(number) for number in range(2, len(counts))])
    except torch.OutOfMemoryError:
        return way, None, None
    return way, sum(counts[2:]) / taken, torch.cuda.max_memory_allocated() / 2**30


if __name__ == "__main__":
    print(table())  # noqa: T201
