"""How many prompts a guard scores in a second, one way after another: `make bench-guard`.

On a GPU: LLaMA-7B's geometry with random weights, vLLM beside it where it is installed. On a CPU: the demo's model and
template. Writes its section of docs/benchmarks.md.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table

from bench.machine import machine
from bench.workload import SAFE, UNSAFE, VOCABULARY, in_nf4, llama_7b, prompts, seconds
from bench.write import write_section
from guardloop.guard.float8 import to_float8
from guardloop.guard.forward import margins_of, trunk
from guardloop.guard.scorer import Scorer
from guardloop.guard.verdict import LabelTokens

LABELS = LabelTokens((), SAFE, UNSAFE)
MANY, CPU_PROMPTS = 4096, 128
BOTH_SIZES = 180  # prompts that fill a pack of each size, so that nothing is compiled while the clock runs
console = Console(highlight=False)
Row = tuple[str, float | None, str]
Rows = list[Row]


def main(
    only_vllm: Annotated[bool, typer.Option(hidden=True)] = False,
    only_packs: Annotated[bool, typer.Option(help="This engine's packs alone, and nothing written.")] = False,
    save: Annotated[bool, typer.Option(help="Write docs/benchmarks.md.")] = True,
) -> None:
    """Print prompts per second for each way of scoring them."""
    if only_vllm:
        print(json.dumps(vllm_rate()))  # noqa: T201
        return
    if only_packs:
        before, many = prompts(MANY)
        list(map(told, packed_ways(llama_7b(), before, many)))
        return
    rows, notes = on_gpu() if torch.cuda.is_available() else on_cpu()
    table = Table("way", "prompts/s", "", box=None)
    for way, rate, note in rows:
        table.add_row(way, "skipped" if rate is None else f"{rate:,.1f}", note)
    console.print(table, *notes, sep="\n")
    if save:
        name = "guard-gpu" if torch.cuda.is_available() else "guard-cpu"
        write_section(name, as_markdown(rows, notes))


def on_gpu() -> tuple[Rows, list[str]]:
    """Every way on one GPU, with the largest differences between margins."""
    before, many = prompts(MANY)
    few, sample = many[:12], many[:120]
    model = llama_7b()
    rows: Rows = [
        ("one by one, generate 5 tokens", rate(lambda p: generate(model, p, 1), few), ""),
        ("batch 32, generate 5 tokens", rate(lambda p: generate(model, p, 32), many[:96]), ""),
        ("batch 32, one forward pass of the whole prompt", rate(lambda p: whole(model, p, 32), many[:192]), ""),
    ]
    batched = Scorer(model, [before], LABELS, packed=False, batch_tokens=8192)
    rows.append(("this engine, batches behind the cached template", rate(batched.score, many[:1024], warm=64), ""))
    rows += packed_ways(model, before, many)
    plain = torch.cat([whole(model, [p], 1) for p in sample])
    packs = margins(Scorer(model, [before], LABELS, pack_tokens=8192), sample)
    exact, exact_packs = full_precision(model, before, sample[:24])
    notes = [
        f"float32 (24 prompts): packs differ from whole prompts by {difference(exact_packs, exact):.1e} at most.",
        f"bf16 against float32: whole prompts {difference(plain[:24], exact):.3f} at most, "
        f"packs {difference(packs[:24], exact):.3f}; margins spread over {exact.std():.2f} (standard deviation).",
    ]
    torch.cuda.empty_cache()
    rows.append(vllm_row())
    return rows, [*notes, machine()]


def on_cpu() -> tuple[Rows, list[str]]:
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
    scored = torch.tensor([v.margin for v in guard.score({"prompt": text} for text in texts)])
    mean = sum(map(len, tokens)) / len(tokens)
    rows: Rows = [
        ("batch 32, one forward pass of the whole prompt", sorted(plain)[1], ""),
        ("this engine (texts in, verdicts out)", sorted(ours)[1], f"{sorted(ours)[1] / sorted(plain)[1]:.1f} times"),
    ]
    template = len(guard.renderer.prefixes[0])
    notes = [
        f"{len(texts)} prompts of the sample; {mean:.0f} tokens each, of which {template} are the shared template.",
        f"Margins differ from one-by-one passes by {difference(scored, reference):.1e} at most "
        f"({str(guard.model.dtype).removeprefix('torch.')}).",
        "Ways that need a GPU were skipped: there is none here.",
        machine(),
    ]
    return rows, notes


def packed_ways(model: Any, before: list[int], many: list[list[int]]) -> Iterator[Row]:
    """This engine's packs: of the bf16 `model`, and of others with one thing changed."""
    yield engine("this engine, packs, bf16", model, before, many)
    yield engine("this engine, packs, fp8", to_float8(llama_7b()), before, many)
    adapted = get_peft_model(llama_7b(), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).eval()
    yield engine("this engine, packs, bf16, LoRA adapter attached", adapted, before, many[: MANY // 2])
    del adapted
    yield engine("this engine, packs, nf4", in_nf4(llama_7b()), before, many[: MANY // 2])


def engine(way: str, model: Any, before: list[int], many: list[list[int]]) -> Row:
    """This engine's rate, after a start of which the time is told."""
    torch.cuda.reset_peak_memory_stats()
    scorer = Scorer(model, [before], LABELS)
    cold = seconds(lambda: scorer.score(many[:BOTH_SIZES]))
    found = rate(scorer.score, many)
    memory = torch.cuda.max_memory_allocated() / 2**30
    return way, found, f"first packs after {cold:.0f} s; at most {memory:.0f} GiB"


def told(row: Row) -> Row:
    """The row, printed at once."""
    console.print(row[0], "skipped" if row[1] is None else f"{row[1]:,.1f}", row[2], soft_wrap=True)
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
    """Margins from full forward passes of whole prompts, right-padded."""
    found = []
    for start in range(0, len(rows), batch):
        chunk = rows[start : start + batch]
        width = max(map(len, chunk))
        ids = torch.tensor([r + [0] * (width - len(r)) for r in chunk], device=model.device)
        last = torch.tensor([len(r) - 1 for r in chunk], device=model.device)
        hidden = trunk(model)(input_ids=ids).last_hidden_state[torch.arange(len(chunk), device=model.device), last]
        found.append(margins_of(model, hidden, labels))
    return torch.cat(found)


def margins(scorer: Scorer, rows: Sequence[list[int]]) -> torch.Tensor:
    """The scorer's margins in the order of `rows`."""
    found = torch.zeros(len(rows), device=scorer.model.device)
    for indices, part, _ in scorer.score(rows):
        found[torch.tensor(indices, device=found.device)] = part
    return found


def full_precision(model: Any, before: list[int], sample: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Margins in float32: of whole prompts, and of packs. The model stays in float32."""
    model.float()
    torch.cuda.empty_cache()
    scorer = Scorer(model, [before], LABELS, pack_tokens=2048)
    return whole(model, sample, 1), margins(scorer, sample)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference."""
    return float((one - other).abs().max())


def vllm_row() -> Row:
    """vLLM's rate, measured in a process of its own."""
    way = "vLLM, prefix caching, 1 token"
    if not find_spec("vllm"):
        return way, None, "vLLM is not installed"
    done = subprocess.run(
        [sys.executable, "-m", "bench.guard", "--only-vllm"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return way, None, done.stderr.strip().splitlines()[-1][:200]
    found, version = json.loads(done.stdout.strip().splitlines()[-1])
    return way, found, f"vLLM {version}"


def vllm_rate() -> tuple[float, str]:
    """Prompts per second of vLLM with the same geometry and prompts."""
    import vllm  # noqa: PLC0415
    from transformers import LlamaConfig  # noqa: PLC0415

    _, many = prompts(MANY)
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            vocab_size=VOCABULARY,
            max_position_embeddings=4096,
            architectures=["LlamaForCausalLM"],
        )
        config.save_pretrained(folder)
        engine = vllm.LLM(
            model=folder,
            load_format="dummy",
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


def as_markdown(rows: Rows, notes: list[str]) -> str:
    """The section of docs/benchmarks.md."""
    place = "one GPU" if torch.cuda.is_available() else "a CPU"
    lines = [f"## Guard scoring on {place} (`make bench-guard`)", "", "| way | prompts/s | |", "| --- | ---: | --- |"]
    lines += [f"| {way} | {'skipped' if found is None else f'{found:,.1f}'} | {note} |" for way, found, note in rows]
    return "\n".join([*lines, "", *(f"{note}\n" for note in notes)])


if __name__ == "__main__":
    typer.run(main)
