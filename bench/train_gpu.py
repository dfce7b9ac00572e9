"""The GPU part of `make bench-train`: LLaMA-7B's geometry with random weights, LoRA r 16 on q, k, v and o.

Run alone: python -m bench.train_gpu [--tiny] [--page PAGE]

On several GPUs, whole copies of the guard against one that is split among them:
torchrun --nproc-per-node 2 -m bench.train_gpu --sharded [--tiny] [--page PAGE]
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import LoraConfig, get_peft_model
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import cross_entropy

from bench.machine import machine
from bench.workload import LLAMA_7B, SAFE, TINY, UNSAFE, Size, free, in_nf4, llama, peak_gib, prompts, seconds
from bench.write import PAGE, write_section
from guardloop.guard.inference import packed
from guardloop.guard.inference.forward import decoder_of, label_logits
from guardloop.guard.prompt.verdict import LabelTokens
from guardloop.training.examples import Encoded
from guardloop.training.processes import is_child
from guardloop.training.settings import TrainingSettings
from guardloop.training.sharding import shard
from guardloop.training.trainer import PACK_TOKENS, Trainer

LABELS = LabelTokens((), SAFE, UNSAFE)
Row = tuple[str, float | None, float]
"""A way, its examples per second (None: out of memory), and its peak memory in GiB."""


def measure(size: Size = LLAMA_7B, page: Path = PAGE) -> None:
    """Measure every way on one GPU."""
    _write("train-gpu", "### Training on one GPU", "make bench-train", rows(size), size, page)


def measure_sharded(size: Size = LLAMA_7B, page: Path = PAGE) -> None:
    """Measure both ways to hold the guard in the processes that torchrun started."""
    processes = PartialState(cpu=not torch.cuda.is_available())
    count = processes.num_processes
    command = f"torchrun --nproc-per-node {count} -m bench.train_gpu --sharded"
    found = shared_rows(size, processes)
    if processes.is_main_process:
        _write("train-gpus", f"### Training on {count} GPUs", command, found, size, page)
    else:
        list(found)
    processes.destroy_process_group()


def _write(name: str, title: str, command: str, found: Iterator[Row], size: Size, page: Path) -> None:
    """Print every way as it is measured, and write the section with all so far, the slowest first."""
    rows = list[Row]()
    for row in found:
        rows.append(row)
        print(_cells(row), flush=True)  # noqa: T201
        lines = [
            title,
            "",
            f"{size.layers} layers of {size.hidden}, random weights, LoRA r 16 on q, k, v, o; template of 720 tokens, "
            f"texts of 58 on average. `{command}`",
            "",
            "| way | examples/s | peak GiB |",
            "| --- | ---: | ---: |",
            *map(_cells, sorted(rows, key=lambda row: row[1] or 0.0)),
        ]
        write_section(name, "\n".join([*lines, "", machine()]), page)


def _cells(row: Row) -> str:
    way, rate, memory = row
    return f"| {way} | {'out of memory' if rate is None else f'{rate:.1f}'} | {memory:.0f} |"


def rows(size: Size) -> Iterator[Row]:
    """Every way, with a model of its own; this engine's first."""
    before, examples = _examples()
    batches = list(_filled(examples, PACK_TOKENS - len(before), len(before)))

    def engine(way: str, share: float, *, nf4: bool = False, compiled: bool = True, liger: bool = False) -> Row:
        model = _adapted(size, nf4)
        if liger:
            _use_liger(model)
        trainer = _trainer(model, before, share)
        if trainer.packs:
            trainer.packs.compiled = compiled
        return _steps(way, trainer, batches, size)

    yield engine("this engine, nf4, packs of 8k, 60% checkpointed", 0.6, nf4=True)
    yield engine("this engine, bf16, packs of 8k", 0.0)
    yield _padded("bf16, batch 8, padded, loss on the answer", size, examples, 8)
    yield _padded("nf4, batch 16, padded, checkpointing, loss on the answer", size, examples, 16, nf4=True)
    yield _padded(
        "nf4, batch 4, padded, checkpointing, loss on every token", size, examples, 4, nf4=True, everywhere=True
    )
    yield engine("this engine, nf4, packs of 8k, all checkpointed", 1.0, nf4=True)
    attention = torch.compile(flex_attention, dynamic=False)  # by itself it would hold every score
    with patch.object(packed, "flex_attention", attention):
        yield engine("this engine, bf16, packs of 8k, only attention compiled", 0.0, compiled=False)
        if torch.cuda.is_available() and find_spec("liger_kernel"):
            way = "this engine, bf16, packs of 8k, only attention compiled, RMSNorm and SwiGLU of liger-kernel"
            yield engine(way, 0.0, compiled=False, liger=True)


def shared_rows(size: Size, processes: PartialState) -> Iterator[Row]:
    """Both ways to hold the guard, with one pack for each process in a step; memory is that of the fullest GPU."""
    before, examples = _examples()
    filled = _filled(examples, PACK_TOKENS - len(before), len(before))
    steps = zip(*[filled] * processes.num_processes, strict=False)
    batches = [[example for row in zip(*packs, strict=False) for example in row] for packs in steps]

    def engine(way: str, *, sharded: bool) -> Row:
        model = _adapted(size, nf4=False)
        if sharded:
            shard(model, model.device)
        _, rate, memory = _steps(way, _trainer(model, before, 0.0), batches, size)
        return way, rate, max(gather_object([memory]))

    yield engine("this engine, bf16, packs of 8k, the guard whole on each GPU", sharded=False)
    yield engine("this engine, bf16, packs of 8k, the guard's layers split among the GPUs", sharded=True)


def _examples() -> tuple[list[int], list[Encoded]]:
    """The shared template, and examples that start with it."""
    before, many = prompts(2048)
    return before, [Encoded(str(n), tokens, float(n % 3 == 0), 1.0) for n, tokens in enumerate(many)]


def _trainer(model: Any, template: list[int], checkpointed: float) -> Trainer:
    settings = TrainingSettings(gradient_checkpointing=checkpointed)
    return Trainer(model, [template], LABELS, settings)


def _steps(way: str, trainer: Trainer, batches: Sequence[Sequence[Encoded]], size: Size) -> Row:
    taken = batches[:7] if size is LLAMA_7B else [batch[:16] for batch in batches[:3]]
    _, rate, memory = _timed(way, lambda n: trainer.step(taken[n], n + 1, 100, 1e-4), [len(batch) for batch in taken])
    if trainer.packs and trainer.max_tokens < PACK_TOKENS:  # memory ran out, and the step was taken in smaller ones
        way += f", halved to {trainer.max_tokens} tokens"
    return way, rate, memory


def _use_liger(model: Any) -> None:
    """Liger's kernels in the decoder's layers, in place of what is compiled elsewhere."""
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP  # noqa: PLC0415  (not among the requirements)

    for layer in decoder_of(model).layers:
        layer.mlp.forward = MethodType(LigerSwiGLUMLP.forward, layer.mlp)
        for name in ("input_layernorm", "post_attention_layernorm"):
            old = getattr(layer, name)
            norm = LigerRMSNorm(len(old.weight), old.variance_epsilon)
            norm.weight = old.weight
            setattr(layer, name, norm)


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
            hidden = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state[
                torch.arange(len(chosen)), last
            ]
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
    parser.add_argument("--sharded", action="store_true", help="compare both ways on several GPUs, under torchrun")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page that is written")
    options = parser.parse_args()
    if options.sharded and not is_child():
        parser.error("--sharded needs processes that torchrun started")
    (measure_sharded if options.sharded else measure)(TINY if options.tiny else LLAMA_7B, options.page)
