"""How many prompts a guard scores in a second, one way after another: `make bench-guard`.

On a GPU: LLaMA-7B's geometry with random weights, vLLM beside it where it is installed. On a CPU: the demo's model and
template. Writes its section of docs/benchmarks.md, again after each way.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console

from bench.machine import machine
from bench.workload import (
    LLAMA_7B,
    SAFE,
    TINY,
    UNSAFE,
    Size,
    config,
    free,
    in_nf4,
    llama,
    peak_gib,
    prompts,
    seconds,
    with_tiny_weights,
)
from bench.write import PAGE, write_section
from guardloop.guard.inference.float8 import to_float8
from guardloop.guard.inference.forward import decoder_of, scores_of
from guardloop.guard.inference.packed import PackedForward
from guardloop.guard.inference.packing import BLOCK
from guardloop.guard.inference.scorer import PACK_TOKENS, Scorer
from guardloop.guard.prompt.verdict import LabelTokens

LABELS = LabelTokens((), SAFE, UNSAFE)
MANY, CPU_PROMPTS = 8192, 128
TINY_WEIGHTS = ", all weights within .001"
BOTH_SIZES = 180  # prompts that fill a pack of each size, so that nothing is compiled while the clock runs
VLLM_SECONDS = 200  # in which vLLM must have started and answered
console = Console(highlight=False, soft_wrap=True, markup=False)
Row = tuple[str, float | None, str]


def main(
    only_vllm: Annotated[Path | None, typer.Option(hidden=True)] = None,
    weights: Annotated[Path | None, typer.Option(hidden=True)] = None,
    only_packs: Annotated[bool, typer.Option(help="This engine's packs alone, and nothing written.")] = False,
    tiny: Annotated[bool, typer.Option(help="Try the GPU part out with a tiny model, on any machine.")] = False,
    page: Annotated[Path, typer.Option(help="The page that is written.")] = PAGE,
) -> None:
    """Print prompts per second for each way of scoring them."""
    if only_vllm:
        only_vllm.write_text(json.dumps(vllm_rate(weights)), "utf-8")
    elif only_packs:
        prefix, many = prompts(MANY)
        list(map(shown, packed_ways(LLAMA_7B, prefix, many)))
    elif tiny or torch.cuda.is_available():
        report("guard-gpu", "one GPU", on_gpu(TINY if tiny else LLAMA_7B, 64 if tiny else MANY), page)
    else:
        report("guard-cpu", "a CPU", on_cpu(), page)


def report(name: str, place: str, results: Iterator[Row | str], page: Path) -> None:
    """Print rows and notes as they come, and write the section with all so far, the slowest way first."""
    rows, notes = list[Row](), list[str]()
    for item in results:
        if isinstance(item, str):
            notes.append(item)
            console.print(item)
        else:
            rows.append(shown(item))
        ordered = sorted(rows, key=lambda row: (row[1] is None, row[1] or 0.0))
        lines = [
            f"## Guard scoring on {place} (`make bench-guard`)",
            "",
            "| way | prompts/s | |",
            "| --- | ---: | --- |",
        ]
        lines += [f"| {way} | {'skipped' if r is None else f'{r:,.1f}'} | {note} |" for way, r, note in ordered]
        write_section(name, "\n".join([*lines, "", *(f"{note}\n" for note in [*notes, machine()])]), page)


def on_gpu(size: Size, count: int) -> Iterator[Row | str]:
    """Every way on one GPU, the fast ones first, with the largest differences between scores."""
    prefix, many = prompts(count)
    yield (
        f"{size.layers} layers of {size.hidden}, random weights; {len(many):,} prompts after a template of "
        f"{len(prefix)} tokens, {sum(map(len, many)) / len(many) - len(prefix):.0f} tokens more on average."
    )
    if size is LLAMA_7B:
        with tempfile.TemporaryDirectory() as folder:
            llama(size).save_pretrained(folder)
            free()
            yield vllm_row("vLLM, prefix caching, 1 token", Path(folder))
        yield vllm_row(f"vLLM, prefix caching, 1 token{TINY_WEIGHTS}", None)
    yield from packed_ways(size, prefix, many)
    model = llama(size)
    batched = Scorer(model, [prefix], LABELS, packed=False, batch_tokens=8192)
    yield "this engine, batches after the cached prefix", rate(batched.score, many[: count // 8], warm=64), ""
    yield "batch 32, one forward pass of the whole prompt", rate(lambda p: whole(model, p, 32), many[: count // 32]), ""
    yield "batch 32, generate 5 tokens", rate(lambda p: generate(model, p, 32), many[: count // 64]), ""
    yield "one by one, generate 5 tokens", rate(lambda p: generate(model, p, 1), many[:8]), ""
    sample = many[:24]
    plain, packed = whole(model, sample, 1), one_pack(model, prefix, sample)
    model.float()
    exact, exact_packed = whole(model, sample, 1), one_pack(model, prefix, sample)
    apart = difference(exact_packed, exact)
    yield f"float32 ({len(sample)} prompts): packs differ from whole prompts by {apart:.1e} at most."
    yield (
        f"bf16 against float32: whole prompts {difference(plain, exact):.3f} at most, packs "
        f"{difference(packed, exact):.3f}; scores spread over {exact.std():.2f} (standard deviation)."
    )


def on_cpu() -> Iterator[Row | str]:
    """The plain way and this engine's, with the demo's guard and template on its own traffic."""
    from guardloop.data.settings import SourceSettings  # noqa: PLC0415  (the GPU part needs none of these)
    from guardloop.data.sources import read_conversations  # noqa: PLC0415
    from guardloop.guard.engine import Guard  # noqa: PLC0415

    guard = Guard.load("embedded:guard")
    texts = [row["prompt"] for row in read_conversations(SourceSettings(path="traffic"))][:CPU_PROMPTS]
    tokens = [guard.renderer.render(text).tokens for text in texts]
    plain, ours = [], []
    for _ in range(3):  # in turn, so that whatever else the machine does falls on both
        plain.append(rate(lambda p: whole(guard.model, p, 32, guard.labels), tokens))
        ours.append(rate(lambda p: list(guard.score({"prompt": text} for text in p)), texts))
    reference = whole(guard.model, tokens, 1, guard.labels)
    scored = torch.tensor([v.score for v in guard.score({"prompt": text} for text in texts)])
    mean = sum(map(len, tokens)) / len(tokens)
    yield "batch 32, one forward pass of the whole prompt", sorted(plain)[1], ""
    yield "this engine (texts in, verdicts out)", sorted(ours)[1], f"{sorted(ours)[1] / sorted(plain)[1]:.1f} times"
    template = len(guard.renderer.prefixes[0])
    yield f"{len(texts)} prompts of the sample; {mean:.0f} tokens each, of which {template} are the shared template."
    yield (
        f"Scores differ from one-by-one passes by {difference(scored, reference):.1e} at most "
        f"({str(guard.model.dtype).removeprefix('torch.')})."
    )
    yield "Ways that need a GPU were skipped: there is none here."


def packed_ways(size: Size, prefix: list[int], many: list[list[int]]) -> Iterator[Row]:
    """This engine's packs: of a bf16 model, and of others with one thing changed."""
    yield engine("bf16", llama(size), prefix, many)
    yield engine(f"bf16{TINY_WEIGHTS}", with_tiny_weights(llama(size)), prefix, many)
    yield engine("bf16, twice as large", llama(size), prefix, many, times=2)
    yield engine("fp8", to_float8(llama(size)), prefix, many)
    adapted = get_peft_model(llama(size), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).eval()
    yield engine("bf16, LoRA adapter attached", adapted, prefix, many[: len(many) // 2])
    del adapted
    yield engine("nf4", in_nf4(llama(size)), prefix, many[: len(many) // 2])


def engine(form: str, model: Any, prefix: list[int], many: list[list[int]], times: int = 1) -> Row:
    """This engine's rate in packs `times` as large as by default, and how long it takes to start."""
    free()
    pack = times * (PACK_TOKENS if sum(map(len, many)) > 10 * PACK_TOKENS else 2048)
    scorer = Scorer(model, [prefix], LABELS, packed=True, pack_tokens=pack)
    cold = seconds(lambda: scorer.score(many[: times * BOTH_SIZES]))
    per_second = rate(scorer.score, many, warm=len(many) // 8)
    return f"this engine, packs, {form}", per_second, f"first packs after {cold:.0f} s; at most {peak_gib():.0f} GiB"


def shown(row: Row) -> Row:
    """The row, printed at once."""
    console.print(row[0], "skipped" if row[1] is None else f"{row[1]:,.1f}", row[2])
    return row


def rate(work: Callable[[Any], Any], work_on: Sequence[Any], warm: int = 0) -> float:
    """Items per second of `work`, after a first go at some of them."""
    work(work_on[: warm or min(len(work_on), 8)])
    return len(work_on) / seconds(lambda: work(work_on))


@torch.inference_mode()
def generate(model: Any, rows: Sequence[list[int]], batch: int) -> None:
    """Five tokens after each prompt, left-padded, as most scripts do it."""
    for start in range(0, len(rows), batch):
        chunk = rows[start : start + batch]
        width = max(map(len, chunk))
        ids = torch.tensor([[0] * (width - len(r)) + r for r in chunk], device=model.device)
        seen = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in chunk], device=model.device)
        model.generate(input_ids=ids, attention_mask=seen, max_new_tokens=5, min_new_tokens=5, do_sample=False)


@torch.inference_mode()
def whole(model: Any, rows: Sequence[list[int]], batch: int, labels: LabelTokens = LABELS) -> torch.Tensor:
    """Scores from full forward passes of whole prompts, right-padded."""
    scores = []
    for start in range(0, len(rows), batch):
        chunk = rows[start : start + batch]
        width = max(map(len, chunk))
        ids = torch.tensor([r + [0] * (width - len(r)) for r in chunk], device=model.device)
        last = torch.tensor([len(r) - 1 for r in chunk], device=model.device)
        hidden = decoder_of(model)(input_ids=ids).last_hidden_state[torch.arange(len(chunk), device=model.device), last]
        scores.append(scores_of(model, hidden, labels))
    return torch.cat(scores)


@torch.inference_mode()
def one_pack(model: Any, prefix: list[int], rows: Sequence[list[int]]) -> torch.Tensor:
    """Scores of whole prompts that are one pack."""
    after = [row[len(prefix) :] for row in rows]
    size = -(-sum(map(len, after)) // BLOCK) * BLOCK
    forward = PackedForward(model, prefix, size, compiled=model.device.type == "cuda")
    return scores_of(model, forward(after), LABELS)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference."""
    return float((one - other).abs().max())


def vllm_row(way: str, weights: Path | None) -> Row:
    """vLLM's rate, measured in a process of its own, while nothing else is on the GPU."""
    if not find_spec("vllm"):
        return way, None, "vLLM is not installed"
    with tempfile.TemporaryDirectory() as folder:
        log, result = Path(folder, "log"), Path(folder, "result.json")
        command = [sys.executable, "-m", "bench.guard", "--only-vllm", str(result)]
        command += ["--weights", str(weights)] if weights else []
        with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True) as process:
            try:
                process.wait(VLLM_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # vLLM computes in a process of its own, which would live on
        if not result.exists():
            console.print(log.read_text("utf-8", "replace")[-4000:])
            return way, None, f"vLLM failed, or had not answered after {VLLM_SECONDS} s"
        per_second, version = json.loads(result.read_text("utf-8"))
        return way, per_second, f"vLLM {version}"


def vllm_rate(weights: Path | None) -> tuple[float, str]:
    """Prompts per second of vLLM with the same geometry and prompts, and `weights`, or such as it makes up."""
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # it compiles for minutes where it is not installed whole
    import vllm  # noqa: PLC0415

    _, many = prompts(MANY)
    with tempfile.TemporaryDirectory() as folder:
        if not weights:
            config(LLAMA_7B).save_pretrained(folder)
        engine = vllm.LLM(
            model=str(weights or folder),
            load_format="auto" if weights else "dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=2048,
            enable_prefix_caching=True,
        )
    options = vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)

    def score(rows: list[list[int]]) -> None:
        engine.generate([{"prompt_token_ids": row} for row in rows], options, use_tqdm=False)

    score(many[:256])
    return MANY / seconds(lambda: score(many)), vllm.__version__


if __name__ == "__main__":
    typer.run(main)
