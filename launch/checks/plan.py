"""What a run will take, stage by stage: items, tokens, time and storage, before it is started.

Data is counted; what cannot be known before is estimated, and every such number says why it is rough.
"""

import os
import random
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from guardloop.config import Settings
from guardloop.core.records import CONVERSATION, Row, write_table
from guardloop.data.settings import SourceSettings
from guardloop.data.sources import read_conversations
from guardloop.responses.settings import without_prefill
from launch.checks.doctor import find_gpus, needs_gpu
from launch.checks.rates import GUARDS, Past, Rate, recorded_rates

SAMPLE_ROWS = 200
BYTES_PER_TOKEN = 4
ROUGH_TOKENS = "four bytes of text are taken for a token; the guard's template, read once a batch, is left out"
ROUGH_BYTES = "rows as large as the sample's, with what the stage adds"
GIB, MIB, KIB = 2**30, 2**20, 2**10
Device = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Number:
    """A figure of the plan. `rough` says why it is not exact ("": it was counted); None: it is not known, and why."""

    value: float | None
    rough: str = ""

    def times(self, factor: float | None, rough: str = "") -> "Number":
        """This number times another, which is rough for a reason of its own."""
        known = self.value is not None and factor is not None
        return Number(self.value * factor if known else None, self.rough or rough)  # type: ignore[operator]

    def plus(self, other: "Number") -> "Number":
        """The sum of both; not known where one of them is not."""
        known = self.value is not None and other.value is not None
        return Number(self.value + other.value if known else None, self.rough or other.rough)  # type: ignore[operator]

    def plain(self) -> dict[str, Any]:
        """The number as JSON-ready values."""
        return {"value": self.value, "rough": self.rough}


UNKNOWN_SIZE = Number(None, "the size of the adapter follows from the model: a first run tells it")


@dataclass(frozen=True)
class Estimate:
    """What one stage will take."""

    stage: str
    items: Number
    tokens: Number | None
    seconds: Number
    bytes: Number

    def plain(self) -> dict[str, Any]:
        """The estimate as JSON-ready values."""
        numbers = {name: getattr(self, name) for name in ("items", "tokens", "seconds", "bytes")}
        return {"stage": self.stage, **{name: number.plain() if number else None for name, number in numbers.items()}}


@dataclass(frozen=True)
class Rows:
    """Tables of rows: how many there are, and by a sample of each how many tokens and how much disk they take."""

    rows: int = 0
    tokens: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Rows") -> "Rows":
        return Rows(self.rows + other.rows, self.tokens + other.tokens, self.bytes + other.bytes)


@dataclass(frozen=True)
class Work:
    """What one stage has to do."""

    stage: str
    items: Number
    tokens: Number | None
    bytes: Number


@dataclass(frozen=True)
class Plan:
    """The estimates of all stages, and where the rates come from."""

    device: str
    source: str
    stages: list[Estimate]
    notes: list[str] = field(default_factory=list)
    """What the configuration cannot do, in words."""

    def plain(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        stages = [stage.plain() for stage in self.stages]
        total = {name: self.total(name).plain() for name in ("seconds", "bytes")}
        plain = {"device": self.device, "rates": self.source, "notes": self.notes}
        return {**plain, "stages": stages, "total": total}

    def total(self, name: str) -> Number:
        """The sum over the stages of `seconds` or `bytes`; rough where a stage is not known."""
        numbers = [getattr(stage, name) for stage in self.stages]
        known = [number.value for number in numbers if number.value is not None]
        unknown = "stages without a known figure are left out" if len(known) < len(numbers) else ""
        rough = unknown or next((number.rough for number in numbers if number.rough), "")
        return Number(sum(known) if known else None, rough)

    def reasons(self) -> list[str]:
        """Why numbers are rough, each reason once."""
        numbers = [n for s in self.stages for n in (s.items, s.tokens, s.seconds, s.bytes) if n is not None]
        return list(dict.fromkeys(number.rough for number in numbers if number.rough))


def make_plan(settings: Settings, past: Past | None) -> Plan:
    """Estimate every stage of the whole pipeline. Raises GuardLoopError where the data cannot be read."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") != "" and find_gpus()
    device: Device = "gpu" if needs_gpu(settings) or visible else "cpu"
    source = f"the run {past.run}" if past else "docs/benchmarks.md, where a rate fits"
    stages = [_estimate(work, settings, past, device) for work in _works(settings, past)]
    return Plan(device, source, stages, list(filter(None, [without_prefill(settings.responders)])))


def measure(source: SourceSettings, where: str, seed: int = 0, *, with_response: bool = False) -> Rows:
    """Count the rows of a source, and measure a sample of them; responses only where they are judged."""
    draw, rows, sample = random.Random(seed), 0, list[Row]()
    whole = source.model_copy(update={"limit": None})
    for row in read_conversations(whole, where=where, with_response=with_response):
        rows += 1
        if len(sample) < SAMPLE_ROWS:
            sample.append(row)
        elif (place := draw.randrange(rows)) < SAMPLE_ROWS:
            sample[place] = row
    rows = min(rows, source.limit or rows)
    scale = rows / max(1, len(sample))
    text = sum(len(f"{row['prompt']}{row['response'] or ''}".encode()) for row in sample)
    return Rows(rows, text / BYTES_PER_TOKEN * scale, _bytes_on_disk(sample) * scale)


def _bytes_on_disk(rows: list[Row]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sample.parquet")
        write_table(({**row, "group": row["id"]} for row in rows), CONVERSATION, path)
        return path.stat().st_size


def _works(settings: Settings, past: Past | None) -> list[Work]:
    """What each stage has to do, in the order of the pipeline: how it follows from the data and the settings."""
    dataset = settings.dataset
    traffic = measure(dataset.traffic, "dataset.traffic", settings.seed)
    test = measure(dataset.test, "dataset.test", settings.seed)
    if dataset.response_test:
        test += measure(dataset.response_test, "dataset.response_test", settings.seed, with_response=True)
    share, why_share = _passed_share(past)
    length, why_length = _tokens_per_response(settings, past)
    passed = Number(traffic.rows).times(share, why_share)
    responses = passed.times(sum(one.samples for one in settings.responders))
    response_tokens = responses.times(length, why_length)
    prompt_tokens = responses.times(traffic.tokens / max(1, traffic.rows), ROUGH_TOKENS)
    examples = _examples(passed, traffic.rows, settings.mining.held_out)
    per_row = traffic.bytes / max(1, traffic.rows)
    response_bytes = (response_tokens.value or 0) * BYTES_PER_TOKEN + (responses.value or 0) * per_row
    held_out = Number(test.rows + (passed.value or 0) * settings.mining.held_out, passed.rough)
    rounds = settings.training.epochs * settings.training.seeds
    read = examples.times(rounds * traffic.tokens / max(1, traffic.rows), ROUGH_TOKENS)
    traffic_tokens, test_tokens = Number(traffic.tokens, ROUGH_TOKENS), Number(test.tokens, ROUGH_TOKENS)
    test_bytes = Number(test.bytes, ROUGH_BYTES)
    return [
        Work("prepare_data", Number(traffic.rows), None, Number(traffic.bytes + test.bytes, ROUGH_BYTES)),
        Work("screen prompts", Number(traffic.rows), traffic_tokens, Number(traffic.bytes, ROUGH_BYTES)),
        Work("generate_responses", responses, response_tokens, Number(response_bytes, why_length or ROUGH_BYTES)),
        Work("screen responses", responses, prompt_tokens.plus(response_tokens), Number(response_bytes, why_length)),
        Work("mine_feedback", examples, None, examples.times(per_row, ROUGH_BYTES)),
        Work("train_guard", examples, read, UNKNOWN_SIZE),
        Work("screen test (baseline)", Number(test.rows), test_tokens, test_bytes),
        Work("screen test (candidate)", held_out, test_tokens, test_bytes),
        *_benchmark_works(settings),
        Work("evaluate", Number(test.rows), None, test_bytes),
    ]


def _benchmark_works(settings: Settings) -> list[Work]:
    """Both guards score every row of the benchmarks, where there are any."""
    tables = [
        measure(benchmark.source, f"benchmark {benchmark.name}", with_response=benchmark.judged == "response")
        for benchmark in settings.evaluation.benchmarks
    ]
    if not tables:
        return []
    why, table = "rows like something in the training set are left out", sum(tables, Rows())
    tokens = Number(GUARDS * table.tokens, ROUGH_TOKENS)
    return [Work("score_benchmarks", Number(table.rows).times(GUARDS, why), tokens, Number(table.bytes, why))]


def _examples(passed: Number, rows: int, held_out: float) -> Number:
    """Training examples: the passed prompts that are not held out, and replayed ones, as guardloop.mining adds them."""
    own = (passed.value or 0) * (1 - held_out)
    return Number(own + own / 2 + min(own / 2, rows - (passed.value or 0)), passed.rough)


def _passed_share(past: Past | None) -> tuple[float, str]:
    if past and past.passed_share is not None:
        return past.passed_share, f"as large a share of the prompts passes as in the run {past.run}"
    return 1.0, "as if the guard let every prompt pass: an upper bound"


def _tokens_per_response(settings: Settings, past: Past | None) -> tuple[float, str]:
    if past and past.tokens_per_response is not None:
        return past.tokens_per_response, f"responses as long as in the run {past.run}"
    samples = sum(one.samples for one in settings.responders)
    mean = sum(one.samples * one.max_new_tokens for one in settings.responders) / samples
    return mean, "as if every response took its max_new_tokens: an upper bound"


def _estimate(work: Work, settings: Settings, past: Past | None, device: Device) -> Estimate:
    """The time that the work takes, and its storage as an earlier run wrote it."""
    took = past.stages.get(work.stage) if past else None
    size = work.bytes
    if past and took and took.bytes is not None and took.items:
        why = f"as large as in the run {past.run}"
        whole = work.stage == "train_guard"  # an adapter is as large for one example as for many
        size = Number(took.bytes, why) if whole else work.items.times(took.bytes / took.items, why)
    return Estimate(work.stage, work.items, work.tokens, _seconds(work, settings, past, device), size)


def _seconds(work: Work, settings: Settings, past: Past | None, device: Device) -> Number:
    training = settings.training
    took = past.stages.get(work.stage) if past else None
    if past and took and took.items:
        factor = took.seconds / took.items
        if work.stage == "train_guard":
            before = past.settings.training
            factor *= training.epochs * training.seeds / (before.epochs * before.seeds)
        return work.items.times(factor, f"as fast as in the run {past.run}, the loading of models included")
    rate = _rate(work.stage, settings, device)
    if rate is None:
        return Number(None, "where no rate is known, a first run here gives one")
    amount = work.tokens if rate.unit == "tokens" and work.tokens else work.items
    if rate.unit == "examples":
        amount = work.items.times(training.epochs * training.seeds)
    where = f"as fast as measured in docs/benchmarks.md ({rate.section}), without the loading of models"
    return amount.times(1 / rate.per_second, where)


def _rate(stage: str, settings: Settings, device: Device) -> Rate | None:
    """The measured rate of a stage with these models, or None."""
    kind = "screen" if stage.startswith("screen") or stage == "score_benchmarks" else stage
    model, quantization = settings.guard.base, settings.guard.quantization
    if kind == "generate_responses":
        if len(settings.responders) > 1:
            return None
        model, quantization = settings.responders[0].model, "none"
    key = (kind, model, device, quantization)
    fitting = (rate for rate in recorded_rates() if (rate.stage, rate.model, rate.device, rate.quantization) == key)
    return next(fitting, None)


def compare(plan: Plan, past: Past) -> list[dict[str, Any]]:
    """The plan beside what a run took: for each stage planned and taken items, seconds and bytes."""
    rows = []
    for stage in plan.stages:
        took = past.stages.get(stage.stage)
        planned = {name: getattr(stage, name).value for name in ("items", "seconds", "bytes")}
        taken = {name: getattr(took, name) if took else None for name in planned}
        rows.append({"stage": stage.stage, "planned": planned, "took": taken})
    return rows


def plan_table(plan: Plan) -> Table:
    """The plan for a terminal: `~` marks what is rough, `?` what is not known."""
    table = _table("stage", "items", "tokens", f"{plan.device.upper()} time", "storage")
    for stage in plan.stages:
        tokens = _shown(stage.tokens, _count) if stage.tokens else ""
        shown = (_shown(stage.items, _count), tokens, _shown(stage.seconds, duration), _shown(stage.bytes, size))
        table.add_row(stage.stage, *shown)
    total = (_shown(plan.total("seconds"), duration), _shown(plan.total("bytes"), size))
    table.add_row("whole run", "", "", *total, style="bold")
    return table


def compare_table(rows: Iterable[dict[str, Any]]) -> Table:
    """Planned and taken, side by side."""
    table = _table("stage", "items planned", "took", "time planned", "took", "storage planned", "took")
    forms = {"items": _count, "seconds": duration, "bytes": size}
    for row in rows:
        cells = [_shown(Number(row[side][name]), form) for name, form in forms.items() for side in ("planned", "took")]
        table.add_row(row["stage"], *cells)
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=None, pad_edge=False, header_style="bold")
    for name in others:
        table.add_column(name, justify="right")
    return table


def _shown(number: Number, form: Any) -> str:
    return "?" if number.value is None else f"{'~' if number.rough else ''}{form(number.value)}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds in the unit that people would say."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes in the unit that people would say."""
    unit, name = (GIB, "GiB") if count >= GIB else (MIB, "MiB") if count >= MIB else (KIB, "KiB")
    return f"{count / unit:,.1f} {name}"
