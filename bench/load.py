"""How the stages without a model grow: rows per second and peak memory at several sizes, each in its own process.

Run: python -m bench.load [--rows 10000,100000] [--only mine]     prompts and scores are made up
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench.machine import machine
from bench.write import write_section
from guardloop import stages
from guardloop.core.records import JUDGED, SCREENED, Row, write_table

SAMPLES = 2
TEMPLATE_WORDS = 300
TEST_ROWS = 1000
FLAGGED, BLOCKED = 0.2, 0.05
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "la", "ren", "tos", "mik")]
METADATA = {"guard": "made up", "threshold": 0.0, "temperature": 1.0, "median_label_mass": 0.99, "unreadable": 0}


def main() -> None:
    """Measure every stage at every size and write the section of docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="10000,100000")
    parser.add_argument("--only", choices=WORK, default="")
    parser.add_argument("--measure", nargs=3, metavar=("STAGE", "ROWS", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        stage, rows, folder = options.measure
        print(json.dumps(measure(stage, int(rows), Path(folder))))  # noqa: T201
        return
    lines = ["| stage | rows | seconds | rows/s | peak memory, MiB |", "| --- | ---: | ---: | ---: | ---: |"]
    for stage in [options.only] if options.only else WORK:
        for rows in map(int, options.rows.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                measuring = [sys.executable, "-m", "bench.load", "--measure", stage, str(rows), folder]
                ended = subprocess.run(measuring, check=True, stdout=subprocess.PIPE, text=True)
            figures = json.loads(ended.stdout.splitlines()[-1])
            seconds, mib = figures["seconds"], figures["mib"]
            lines.append(f"| {stage} | {rows:,} | {seconds:.1f} | {rows / seconds:,.0f} | {mib:,.0f} |")
            print(lines[-1], flush=True)  # noqa: T201
    command = f"make bench-load ROWS={options.rows}"
    title = f"## Stages without a model, as the rows grow\n\n{machine()} Made-up rows; `{command}`"
    note = f"`mine_feedback` has {SAMPLES} judged responses to each prompt that passed; memory is the process's peak."
    if not options.only:
        write_section("load", f"{title}\n\n{note}\n\n" + "\n".join(lines))


def measure(stage: str, rows: int, folder: Path) -> dict[str, float]:
    """Make a stage's input in a process that is then gone, and run the stage: seconds and peak MiB."""
    make, work = WORK[stage]
    child = os.fork()
    if not child:
        make(rows, folder)
        os._exit(0)
    os.waitpid(child, 0)
    started = time.monotonic()
    work(folder)
    seconds = time.monotonic() - started
    return {"seconds": seconds, "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _prompts(rows: int, seed: int = 0) -> Iterator[Row]:
    """Rows with texts of some of the words, hardly any two alike."""
    draw = random.Random(seed)
    for i in range(rows):
        unsafe = draw.random() < FLAGGED
        text = " ".join(draw.choices(WORDS, k=draw.randint(6, 24)))
        yield {"id": f"{seed}-{i}", "prompt": text, "unsafe": unsafe, "source": "made up", "group": f"{seed}-{i}"}


def _templated(rows: int) -> Iterator[Row]:
    """Prompts on one template, of which each changes up to a tenth: what floods a search for near-duplicates."""
    draw = random.Random(5)
    template = draw.choices(WORDS, k=TEMPLATE_WORDS)
    for row in _prompts(rows):
        words = list(template)
        for place in draw.sample(range(TEMPLATE_WORDS), draw.randint(1, TEMPLATE_WORDS // 10)):
            words[place] = draw.choice(WORDS)
        yield {**row, "id": "same", "prompt": " ".join(words)}


def _make_raw(rows: int, folder: Path, traffic: Callable[[int], Iterator[Row]] = _prompts) -> None:
    for name, made in (("traffic", traffic(rows)), ("test", _prompts(TEST_ROWS, 1))):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for row in made:
                file.write(json.dumps({"id": row["id"], "prompt": row["prompt"], "label": int(row["unsafe"])}) + "\n")


def _prepare(folder: Path) -> None:
    sources = {name: {"kind": "file", "path": str(folder / f"{name}.jsonl")} for name in ("traffic", "test")}
    stages.prepare_data(sources, folder / "out", folder / "out-test")


def _verdict(score: float) -> Row:
    return {"score": score, "label_mass": 0.99, "flagged": score > 0, "truncated": False, "probability": 0.5}


def _make_mined(rows: int, folder: Path) -> None:
    draw = random.Random(2)
    screened = [{**row, **_verdict(draw.gauss(-2, 2.4))} for row in _prompts(rows)]
    write_table(screened, SCREENED, folder / "screened")

    def judged() -> Iterator[Row]:
        for row in screened:
            bad = draw.random() < BLOCKED
            for sample in range(SAMPLES if not row["flagged"] else 0):
                answer = {"response": row["prompt"], "prompt_score": row["score"], "sample": sample, "tokens": 9}
                answer |= {"responder": "made up", "finish_reason": "stop", "refusal": False}
                yield {**row, **answer, **_verdict(3.0 if bad else -3.0)}

    write_table(judged(), JUDGED, folder / "judged")


def _mine(folder: Path) -> None:
    stages.mine_feedback([folder / "screened"], [folder / "judged"], folder / "training_set", {})


def _make_scores(rows: int, folder: Path) -> None:
    for name, seed in (("baseline", 3), ("candidate", 4)):
        draw = random.Random(seed)
        scored = ({**row, **_verdict(draw.gauss(1.0 if row["unsafe"] else -2.0, 1.5))} for row in _prompts(rows))
        write_table(scored, SCREENED, folder / name, lambda: METADATA)
    few = folder / "few"
    few.mkdir()
    _make_mined(TEST_ROWS, few)
    _mine(few)


def _evaluate(folder: Path) -> None:
    tables = folder / "baseline", folder / "candidate", folder / "few" / "training_set", folder / "few", folder / "out"
    stages.evaluate(*tables, {}, {})


WORK: dict[str, tuple[Callable[[int, Path], None], Callable[[Path], None]]] = {
    "prepare_data": (_make_raw, _prepare),
    "prepare_data, one template": (partial(_make_raw, traffic=_templated), _prepare),
    "mine_feedback": (_make_mined, _mine),
    "evaluate": (_make_scores, _evaluate),
}

if __name__ == "__main__":
    main()
