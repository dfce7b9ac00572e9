"""How fast responses are generated: the stage's engines beside the plain ways, each in tokens per second.

Run: python -m bench.generate            on this machine: its CPU, and its GPU if it has one
     python -m bench.generate --gpu      the GPU only
Prints a table and writes a section of docs/benchmarks.md; on a GPU, again after each way.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.machine import machine
from bench.workload import LLAMA_7B, TINY, VOCABULARY, Size, config
from bench.write import PAGE, write_section
from guardloop.core.errors import GuardLoopError, first_line
from guardloop.core.progress import Stage
from guardloop.core.records import RESPONSE, SCREENED, Row, read_table, write_table
from guardloop.models.loading import load_causal_lm, load_tokenizer, pick_dtype
from guardloop.models.locate import locate
from guardloop.responses.chat import ChatRenderer
from guardloop.responses.engine import TOP_P, Request, sample_seed
from guardloop.responses.engines.transformers import TransformersResponder
from guardloop.responses.settings import ResponderSettings

SHARES = (*np.linspace(0, 0.95, 20), 0.99, 1)
TOXIC_CHAT_TOKENS = (4, 6, 7, 8, 9, 10, 10, 12, 13, 14, 16, 18, 21, 25, 31, 40, 55, 87, 145, 270, 400, 1270)
"""The lengths of ToxicChat's train prompts at SHARES, in tokens of SmolLM2."""
LONGEST = 512
GPU_PROMPTS, GPU_NEW_TOKENS = 1024, 256
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}<s>assistant:"
SAMPLING = {"temperature": 0.7, "top_p": TOP_P}
Result = dict[str, Any]
"""One row: the way, its tokens and responses per second, and what it took."""


def cpu(prompts: int, samples: int, new_tokens: int, rounds: int) -> list[Result]:
    """The embedded responder on this machine's CPU: both ways in turn, `rounds` times; medians."""
    settings = ResponderSettings(samples=samples, max_new_tokens=new_tokens, prefill="")
    device = torch.device("cpu")
    folder = locate(settings.model)
    model, tokenizer = load_causal_lm(folder, None, pick_dtype(device), device), load_tokenizer(folder)
    ours = TransformersResponder.of(settings, model, tokenizer)
    texts = toxic_chat_like(prompts, tokenizer)
    tokens = [ours.chat.encode(text) for text in texts]
    per_batch = ours.batch_size // samples

    def plain(round_: int) -> int:
        torch.manual_seed(round_)
        batches = [tokens[i : i + per_batch] for i in range(0, len(tokens), per_batch)]
        return sum(generate_padded(model, batch, samples, new_tokens, ours.ends) for batch in batches)

    def stage(round_: int) -> int:
        return sum(reply.tokens for reply in ours.generate(requests_of(texts, samples, round_)))

    plain_way = f"transformers.generate, batches of {ours.batch_size} rows, padded"
    ways: dict[str, Callable[[int], int]] = {plain_way: plain, "GuardLoop, kind: transformers": stage}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    per_processor: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(rounds):
        for way, run in ways.items():
            started, processor = time.perf_counter(), time.process_time()
            made = run(round_)
            seconds[way].append(time.perf_counter() - started)
            rates[way].append(made / seconds[way][-1])
            per_processor[way].append(made / (time.process_time() - processor))
            print(f"{way}: {made} tokens in {seconds[way][-1]:.1f} s", file=sys.stderr, flush=True)  # noqa: T201
    rows = [_result(way, median(rates[way]), prompts * samples / median(seconds[way]), seconds[way]) for way in ways]
    rows[1]["note"] = (
        f"{_ratio(*rates.values()):.2f} times the first; {_ratio(*per_processor.values()):.2f} times per second of "
        "processor time, which others on the machine do not change"
    )
    return rows


def generate_padded(model: Any, prompts: list[list[int]], samples: int, new_tokens: int, ends: frozenset[int]) -> int:
    """`transformers.generate` on one batch, padded on the left. Returns the tokens that it made, padding left out."""
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.inference_mode():
        made = model.generate(
            padded,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=new_tokens,
            num_return_sequences=samples,
            eos_token_id=sorted(ends) or None,
            pad_token_id=0,
            **SAMPLING,
        )[:, longest:].tolist()
    return sum(next((i for i, token in enumerate(row) if token in ends), len(row)) for row in made)


def gpu_transformers(folder: Path) -> list[Result]:
    """`transformers.generate` on the GPU at fixed batches."""
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16).eval()
    chat = ChatRenderer(load_tokenizer(str(folder)))
    tokens = [chat.encode(text) for text in plain_texts(128, seed=0)]
    generate_padded(model, tokens[:4], 1, 8, frozenset())
    rows = []
    for batch in (1, 32, 128):
        started = time.perf_counter()
        made = generate_padded(model, tokens[:batch], 1, 128, frozenset())
        seconds = time.perf_counter() - started
        rows.append(
            _result(f"transformers.generate, batch {batch}, 128 tokens", made / seconds, batch / seconds, [seconds])
        )
    return rows


def gpu_vllm(folder: Path) -> list[Result]:
    """vLLM by itself as it is by default: all prompts in one call of LLM.generate."""
    import vllm  # noqa: PLC0415

    settings = gpu_settings(folder)
    longest = settings.max_prompt_tokens + settings.max_new_tokens
    llm = vllm.LLM(model=str(folder), load_format="dummy", dtype="bfloat16", max_model_len=longest)
    chat = ChatRenderer(load_tokenizer(str(folder)), None, settings.max_prompt_tokens)
    generate_with_vllm(llm, chat, 9, prompts=64)
    return [generate_with_vllm(llm, chat, 1, way=f"vLLM, LLM.generate, {GPU_PROMPTS} x {GPU_NEW_TOKENS}")]


def gpu_stage(folder: Path) -> list[Result]:
    """The stage from the screened table to the table of responses, with the engine loaded before; and that engine."""
    from guardloop.responses import resume  # noqa: PLC0415
    from guardloop.responses.engines.vllm import VllmResponder  # noqa: PLC0415

    settings = gpu_settings(folder)
    engine = VllmResponder(settings, str(folder), load_format="dummy")
    generate_with_vllm(engine.llm, engine.chat, 9, prompts=64)
    own = "vLLM, LLM.generate, on the stage's own engine"
    rows = [generate_with_vllm(engine.llm, engine.chat, 3, way=own)]
    seconds, rates = list[float](), list[float]()
    for round_ in (4, 5):
        with tempfile.TemporaryDirectory() as place, patch.dict(os.environ, {"GUARDLOOP_WORK": place}):
            table = Path(place, "screened.parquet")
            write_table(screened(plain_texts(GPU_PROMPTS, round_)), SCREENED, table)
            with patch.object(resume, "build_responder", lambda _: engine), patch.object(engine, "close", lambda: None):
                started = time.perf_counter()
                write_table(
                    resume.answered(table, [settings], 0, 0.05, Stage("bench")), RESPONSE, Path(place, "responses")
                )
                seconds.append(time.perf_counter() - started)
            rows_made = list(read_table(Path(place, "responses")))
        good = [row["tokens"] for row in rows_made if row["finish_reason"] != "error"]
        if len(good) != GPU_PROMPTS:
            raise GuardLoopError(f"{len(good)} good responses", f"{GPU_PROMPTS} were wanted")
        rates.append(sum(good) / seconds[-1])
    engine.close()
    name = f"GuardLoop, the stage with kind: vllm, {GPU_PROMPTS} x {GPU_NEW_TOKENS}, a seed per response"
    return [*rows, _result(name, median(rates), GPU_PROMPTS / median(seconds), seconds)]


def generate_with_vllm(llm: Any, chat: ChatRenderer, seed: int, *, prompts: int = GPU_PROMPTS, way: str = "") -> Result:
    """Prompts that the engine has not seen, in one call of LLM.generate."""
    import vllm  # noqa: PLC0415

    tokens = [{"prompt_token_ids": chat.encode(text)} for text in plain_texts(prompts, seed)]
    parameters = vllm.SamplingParams(max_tokens=GPU_NEW_TOKENS, **SAMPLING)
    started = time.perf_counter()
    outputs = llm.generate(tokens, parameters, use_tqdm=False)
    seconds = time.perf_counter() - started
    made = sum(len(output.outputs[0].token_ids) for output in outputs)
    return _result(way, made / seconds, prompts / seconds, [seconds])


def gpu(folder: Path) -> Iterator[list[Result]]:
    """All ways that need a GPU, each in a process of its own, which gives its memory back; after each, all so far."""
    rows: list[Result] = []
    for way in (gpu_vllm, gpu_stage, gpu_transformers):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                found = pool.submit(way, folder).result()
            except Exception as error:  # noqa: BLE001  (a way that fails must not cost the others' figures)
                found = [{"way": f"{(way.__doc__ or '').splitlines()[0]} Failed: {first_line(error):.200}"}]
        rows += found
        plain = [row["tokens_per_second"] for row in rows if row["way"].startswith("vLLM") and "seconds" in row]
        for row in rows:
            if plain and row["way"].startswith("GuardLoop"):
                row["note"] = f"{row['tokens_per_second'] / max(plain):.1%} of vLLM's best"
        yield rows


def gpu_settings(folder: Path) -> ResponderSettings:
    """The stage's settings on the GPU."""
    return ResponderSettings(
        kind="vllm", model=str(folder), samples=1, max_new_tokens=GPU_NEW_TOKENS, max_prompt_tokens=768, prefill=""
    )


def save_llama(folder: Path, size: Size) -> None:
    """The configuration of a model of the Llama form, without weights, and a byte-level tokenizer of as many tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"Ġt{number}" for number in range(VOCABULARY - len(tokens))]  # never read, but written
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    config(size, max_position_embeddings=2048, dtype=torch.bfloat16, **ends).save_pretrained(folder)


def plain_texts(count: int, seed: int) -> list[str]:
    """Texts of random letters, one token each, of lengths lognormal(3.6, 1.0) within 4 to 512."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(3.6, 1.0, count), 4, LONGEST).astype(int)
    return ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), size=length)) for length in lengths]


def toxic_chat_like(count: int, tokenizer: Any) -> list[str]:
    """Texts of the sample's traffic, put together and cut to ToxicChat's lengths in tokens."""
    from guardloop.demo import SAMPLE  # noqa: PLC0415  (and what reads data sets, which a GPU needs not)

    rng = np.random.default_rng(0)
    lines = (SAMPLE / "traffic.jsonl").read_text("utf-8").splitlines()
    sample = [json.loads(line)["prompt"] for line in lines]
    lengths = np.exp(np.interp((np.arange(count) + 0.5) / count, SHARES, np.log(TOXIC_CHAT_TOKENS)))
    texts = []
    for length in rng.permutation(lengths).round().astype(int).clip(max=LONGEST):
        tokens: list[int] = []
        while len(tokens) < length:
            tokens += tokenizer(str(rng.choice(sample)) + " ")["input_ids"]
        texts.append(tokenizer.decode(tokens[:length]))
    return texts


def requests_of(texts: list[str], samples: int, seed: int) -> list[Request]:
    """`samples` requests for each text."""
    ids = [f"p{number}" for number in range(len(texts))]
    pairs = [(id, text) for id, text in zip(ids, texts, strict=True)]
    return [Request(id, text, k, sample_seed(seed, id, k)) for id, text in pairs for k in range(samples)]


def screened(texts: list[str]) -> list[Row]:
    """The texts as prompts that passed."""
    verdict = {"score": -1.0, "label_mass": 1.0, "flagged": False, "truncated": False}
    return [
        {"id": f"p{number}", "prompt": text, "source": "bench", "group": f"p{number}", **verdict}
        for number, text in enumerate(texts)
    ]


def _ratio(theirs: list[float], ours: list[float]) -> float:
    return median(our / their for their, our in zip(theirs, ours, strict=True))


def _result(way: str, tokens_per_second: float, responses_per_second: float, seconds: list[float]) -> Result:
    return {
        "way": way,
        "tokens_per_second": round(tokens_per_second, 1),
        "responses_per_second": round(responses_per_second, 2),
        "seconds": [round(one, 1) for one in seconds],
    }


def _cells(row: Result) -> tuple[str, str, str, str]:
    rate = f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "-"
    responses = f"{row['responses_per_second']:,.2f}" if "responses_per_second" in row else "-"
    return row["way"], rate, responses, row.get("note", "")


def show(section: str, found: dict[str, Any], page: Path) -> None:
    """Print the table, and write the section."""
    table = Table("way", "tokens/s", "responses/s", "", title=found["what"], title_justify="left")
    markdown = [f"## {found['title']}", "", found["what"], "", "| way | tokens/s | responses/s | |"]
    markdown += ["| --- | ---: | ---: | --- |"]
    for row in found["rows"]:
        table.add_row(*_cells(row))
        markdown.append(f"| {' | '.join(_cells(row))} |")
    Console(width=140).print(table)
    write_section(section, "\n".join(markdown), page)


def _measure_cpu(options: argparse.Namespace) -> dict[str, Any]:
    rows = cpu(options.prompts, options.samples, options.new_tokens, options.rounds)
    if not torch.cuda.is_available():
        needs = ("transformers.generate at batch 1, 32, 128", "vLLM by itself", "GuardLoop, the stage with kind: vllm")
        rows += [{"way": way, "note": "skipped: needs a GPU"} for way in needs]
    what = (
        f"SmolLM2-135M on {torch.get_num_threads()} threads of {_processor()}, torch {torch.__version__}; "
        f"{options.prompts} prompts of ToxicChat's lengths, {options.samples} responses of at most "
        f"{options.new_tokens} tokens to each; medians of {options.rounds} rounds, both ways in turn. "
        "`make bench-generate`"
    )
    return {"title": "Generating responses on a CPU", "what": what, "rows": rows}


def _measure_gpu(size: Size, page: Path) -> None:
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # it compiles for minutes where it is not installed whole
    what = (
        f"{size.layers} layers of {size.hidden}, random weights, bfloat16; prompts of random letters, lengths "
        f"lognormal(3.6, 1.0) within 4 to {LONGEST} tokens, other prompts in each row, temperature 0.7, top_p 0.9; all "
        f"rows of one run; engines loaded and warmed up before. {machine()} `python -m bench.generate --gpu`"
    )
    with tempfile.TemporaryDirectory() as folder:
        save_llama(Path(folder), size)
        for rows in gpu(Path(folder)):
            show("generate-gpu", {"title": "Generating responses on a GPU", "what": what, "rows": rows}, page)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Measure what this machine can, or read what another one measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="the ways that need a GPU, and no others")
    parser.add_argument("--tiny", action="store_true", help="with --gpu: try it out with a tiny model, on any machine")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page that is written")
    parser.add_argument("--prompts", type=int, default=32, help="of the CPU part")
    parser.add_argument("--samples", type=int, default=4, help="responses per prompt (CPU)")
    parser.add_argument("--new-tokens", type=int, default=32, help="at most, per response (CPU)")
    parser.add_argument("--rounds", type=int, default=3, help="of the CPU part")
    options = parser.parse_args()
    if options.gpu and not (options.tiny or torch.cuda.is_available()):
        sys.exit("bench.generate --gpu: there is no usable GPU here\n  -> run it on one, or leave --gpu out")
    if not options.gpu:
        show("generate", _measure_cpu(options), options.page)
    if options.tiny or torch.cuda.is_available():
        _measure_gpu(TINY if options.tiny else LLAMA_7B, options.page)


if __name__ == "__main__":
    main()
