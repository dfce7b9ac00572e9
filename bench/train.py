"""How fast the training engine is, against the padded way, in the same run on the same examples.

Run: make bench-train    (or: python -m bench.train [--steps 4])

On a CPU: the demo's training settings on SmolLM2-135M. Each way takes the same steps of the same batches, in turn, so
that what else the machine does falls on all of them alike; the median step counts.
"""

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from bench import train_gpu
from bench.write import write_section
from guardloop.config import load_settings
from guardloop.data.settings import SourceSettings
from guardloop.data.sources import read_conversations
from guardloop.guard.inference.forward import decoder_of, label_logits
from guardloop.guard.loading import load_renderer
from guardloop.guard.prompt.verdict import LabelTokens, label_tokens
from guardloop.guard.settings import GuardSettings
from guardloop.models.loading import load_causal_lm, pick_device, pick_dtype
from guardloop.models.locate import locate
from guardloop.training.adapter import fresh_adapter
from guardloop.training.examples import Encoded
from guardloop.training.fit import batches
from guardloop.training.loss import batch_loss
from guardloop.training.settings import TrainingSettings
from guardloop.training.trainer import MAX_GRAD_NORM, Prefixes, label_states

GUARD = GuardSettings(base="embedded:smollm2", family="guardloop", min_label_mass=0.0)
PROMPTS, RESPONSES = 360, 148  # as the demo mines them
Forward = Callable[[Any, Prefixes, LabelTokens, Sequence[Encoded]], tuple[torch.Tensor, int]]


def packed(model: Any, prefixes: Prefixes, labels: LabelTokens, batch: Sequence[Encoded]) -> tuple[torch.Tensor, int]:
    """This engine: the template once, the head at the answers only."""
    hidden, tokens = label_states(model, prefixes, labels.before, batch)
    return label_logits(model, hidden), tokens


def padded(model: Any, prefixes: Prefixes, labels: LabelTokens, batch: Sequence[Encoded]) -> tuple[torch.Tensor, int]:
    """Whole prompts, padded to the longest, the head at the answers only."""
    ids, last = _padded(model, labels, batch)
    hidden = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    return label_logits(model, hidden[torch.arange(len(batch)), last]), ids.numel()


def usual(model: Any, prefixes: Prefixes, labels: LabelTokens, batch: Sequence[Encoded]) -> tuple[torch.Tensor, int]:
    """Whole prompts, padded to the longest, the head at every position, as most scripts have it."""
    ids, last = _padded(model, labels, batch)
    logits = model(input_ids=ids, use_cache=False).logits
    return logits[torch.arange(len(batch)), last].float(), ids.numel()


WAYS: dict[str, Forward] = {
    "padded prompts, head at every position": usual,
    "padded prompts, head at the answers": padded,
    "this engine: one template, head at the answers": packed,
}


@dataclass
class Timing:
    """The steps of one way."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def measure(steps: int, guard: GuardSettings, settings: TrainingSettings) -> dict[str, Timing]:
    """Time `steps` training steps of each way, after one to warm up."""
    device = pick_device()
    renderer = load_renderer(guard)
    model = load_causal_lm(locate(guard.base), guard.revision, pick_dtype(device), device)
    torch.manual_seed(0)
    model = fresh_adapter(model, settings, dropout=0.0).train()  # so that the losses can be compared
    labels, prefixes = label_tokens(renderer), renderer.prefixes
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0)  # the ways take turns on one adapter, which must not move
    timings = {name: Timing() for name in WAYS}
    for number, batch in enumerate(batches(examples(renderer), settings.batch_size, 0, steps + 1)):
        for name, forward in WAYS.items():
            started = time.perf_counter()
            logits, tokens = forward(model, prefixes, labels, batch)
            loss = batch_loss(logits, labels, batch) / len(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - started
            if number:
                timings[name].seconds.append(seconds)
                timings[name].tokens.append(tokens)
                timings[name].losses.append(loss.item())
    return timings


def examples(renderer: Any) -> list[Encoded]:
    """Prompts and judged responses of the sample, in the demo's numbers."""
    prompts = islice(read_conversations(SourceSettings(path="traffic")), PROMPTS)
    responses = islice(read_conversations(SourceSettings(path="judge")), RESPONSES)
    rows = [*prompts, *responses]
    return [
        Encoded(str(n), renderer.render(row["prompt"], row["response"]).tokens, float(bool(row["unsafe"])), 1.0)
        for n, row in enumerate(rows)
    ]


def _padded(model: Any, labels: LabelTokens, batch: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [[*e.tokens, *labels.before] for e in batch]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    return ids, torch.tensor([len(row) - 1 for row in rows], device=model.device)


def table(timings: dict[str, Timing], settings: TrainingSettings, machine: str) -> str:
    """The timings as markdown; rates count examples of the batch, and tokens that were computed."""
    slowest = max(median(t.seconds) for t in timings.values())
    lines = [
        f"{machine}. SmolLM2-135M, LoRA r {settings.rank} on the top {settings.top_layers:.0%} of the layers, batches "
        f"of {settings.batch_size}; median of {len(next(iter(timings.values())).seconds)} steps. `make bench-train`",
        "",
        "| way | examples/s | tokens per step | seconds per step | times |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, timing in timings.items():
        seconds = median(timing.seconds)
        lines.append(
            f"| {name} | {settings.batch_size / seconds:.1f} | {median(timing.tokens):,.0f} | {seconds:.2f} | "
            f"{slowest / seconds:.1f} |"
        )
    reference, *others = (t.losses for t in timings.values())
    apart = max(abs(a - b) / abs(a) for losses in others for a, b in zip(reference, losses, strict=True))
    lines += ["", f"The losses of the ways differ by {apart:.1e} at most, relative to the loss (dropout off)."]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    steps = parser.parse_args().steps
    console = Console()
    settings = load_settings("configs/demo.yaml").training
    guard = GUARD.model_copy(update={"device": "cpu"})
    dtype = str(pick_dtype(pick_device())).removeprefix("torch.")
    machine = f"CPU, {platform.machine()}, {torch.get_num_threads()} threads, {dtype}"
    console.print(f"Training on {machine} ...")
    markdown = "\n\n".join(["### Training on a CPU", table(measure(steps, guard, settings), settings, machine)])
    console.print(Markdown(markdown))
    write_section("train", markdown)
    if torch.cuda.is_available():
        train_gpu.measure()
    else:
        console.print("No GPU here: the rows for one are skipped.")


if __name__ == "__main__":
    main()
