"""The GPU part of `make bench-train`: LLaMA-7B's geometry with random weights, LoRA r 16 on q, k, v and o.

Run alone: python -m bench.train_gpu [--tiny] [--page PAGE]
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from bench.machine import machine
from bench.workload import LLAMA_7B, SAFE, TINY, UNSAFE, Size, free, in_nf4, llama, peak_gib, prompts, seconds
from bench.write import PAGE, write_section
from guardloop.guard.forward import label_logits, trunk
from guardloop.guard.verdict import LabelTokens
from guardloop.training.fit import Training
from guardloop.training.loss import Encoded
from guardloop.training.settings import TrainingSettings

LABELS = LabelTokens((), SAFE, UNSAFE)
PACK = 8192
Row = tuple[str, float | None, float]
"""A way, its examples per second (None: out of memory), and its peak memory in GiB."""


def measure(size: Size = LLAMA_7B, page: Path = PAGE) -> None:
    """Print every way as it is measured, and write the section with all so far, the slowest first."""
    found = list[Row]()
    for row in rows(size):
        found.append(row)
        print(_cells(row), flush=True)  # noqa: T201
        ordered = sorted(found, key=lambda row: row[1] or 0.0)
        lines = [
            "### Training on one GPU",
            "",
            f"{size.layers} layers of {size.hidden}, random weights, LoRA r 16 on q, k, v, o; template of 720 tokens, "
            "texts of 58 on average. `make bench-train`",
            "",
            "| way | examples/s | peak GiB |",
            "| --- | ---: | ---: |",
            *map(_cells, ordered),
        ]
        write_section("train-gpu", "\n".join([*lines, "", machine()]), page)


def _cells(row: Row) -> str:
    way, rate, memory = row
    return f"| {way} | {'out of memory' if rate is None else f'{rate:.1f}'} | {memory:.0f} |"


def rows(size: Size) -> Iterator[Row]:
    """Every way, with a model of its own; this engine's first."""
    before, many = prompts(2048)
    examples = [Encoded(str(n), tokens, float(n % 3 == 0), 1.0) for n, tokens in enumerate(many)]

    def engine(way: str, share: float, *, nf4: bool = False) -> Row:
        settings = TrainingSettings(gradient_checkpointing=share, pack_tokens=PACK)
        training = Training(_adapted(size, nf4), [before], LABELS, settings)
        batches = list(_filled(examples, PACK - len(before), len(before)))
        steps = 7 if size is LLAMA_7B else 3
        return _timed(way, lambda n: training.take(batches[n], n + 1, 100), [len(b) for b in batches[:steps]])

    yield engine("this engine, nf4, packs of 8k, 60% checkpointed", 0.6, nf4=True)
    yield engine("this engine, bf16, packs of 8k", 0.0)
    yield _padded("bf16, batch 8, padded, loss on the answer", size, examples, 8)
    yield _padded("nf4, batch 16, padded, checkpointing, loss on the answer", size, examples, 16, nf4=True)
    yield _padded(
        "nf4, batch 4, padded, checkpointing, loss on every token", size, examples, 4, nf4=True, everywhere=True
    )
    yield engine("this engine, nf4, packs of 8k, all checkpointed", 1.0, nf4=True)


def _adapted(size: Size, nf4: bool) -> Any:
    free()
    model = llama(size)
    model.requires_grad_(False)
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    return get_peft_model(in_nf4(model) if nf4 else model, config).train()


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


def _padded(
    way: str, size: Size, examples: Sequence[Encoded], batch: int, *, nf4: bool = False, everywhere: bool = False
) -> Row:
    """Whole prompts, padded to the longest of the batch, in autograd's plain way."""
    model = _adapted(size, nf4)
    if nf4:
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step(number: int) -> None:
        chosen = examples[number * batch : (number + 1) * batch]
        width = max(len(e.tokens) for e in chosen)
        ids = torch.tensor([e.tokens + [0] * (width - len(e.tokens)) for e in chosen], device=model.device)
        if everywhere:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        else:
            last = torch.tensor([len(e.tokens) - 1 for e in chosen], device=model.device)
            hidden = trunk(model)(input_ids=ids, use_cache=False).last_hidden_state[torch.arange(len(chosen)), last]
            targets = torch.tensor([UNSAFE if e.target else SAFE for e in chosen], device=model.device)
            loss = cross_entropy(label_logits(model, hidden), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return _timed(way, step, [batch] * 4)


def _timed(way: str, step: Callable[[int], Any], counts: Sequence[int]) -> Row:
    """Examples per second over the steps after the first two."""
    peak_gib()
    try:
        step(0)
        step(1)
        taken = seconds(lambda: [step(number) for number in range(2, len(counts))])
    except torch.OutOfMemoryError:
        return way, None, peak_gib()
    return way, sum(counts[2:]) / taken, peak_gib()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="try it out with a tiny model, on any machine")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page that is written")
    options = parser.parse_args()
    measure(TINY if options.tiny else LLAMA_7B, options.page)
