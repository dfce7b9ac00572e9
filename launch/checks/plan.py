"""What a run will take, stage by stage: items, tokens, time and storage, before it is started.

Data is counted; what cannot be known before is estimated, and every such number says why it is rough.
"""

import random
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from guardloop.config import Settings
from guardloop.core.records import CONVERSATION, Row, write_table
from guardloop.data.settings import SourceSettings
from guardloop.data.sources import read_conversations
from launch.checks.doctor import needs_gpu
from launch.checks.rates import GUARDS, Past, Rate, recorded_rates

SAMPLE_ROWS = 200
BYTES_PER_TOKEN = 4
ROUGH_TOKENS = "four bytes of text are taken for a token; the guard's template, read once a batch, is left out"
GIB, MIB, KIB = 2**30, 2**20, 2**10


@dataclass(frozen=True)
class Number:
    """A figure of the plan. `rough` says why it is not exact ("": it was counted); None: it is not known, and why."""

    value: float | None
    rough: str = ""

    def times(self, factor: float | None, rough: str = "") -> "Number":
        """This number times another, which is rough for a reason of its own."""
        known = self.value is not None and factor is not None
        return Number(self.value * factor if known else None, self.rough or rough)  # type: ignore[operator]

    def plain(self) -> dict[str, Any]:
        """The number as JSON-ready values."""
        return {"value": self.value, "rough": self.rough}


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
        told = {name: getattr(self, name) for name in ("items", "tokens", "seconds", "bytes")}
        return {"stage": self.stage, **{name: number.plain() if number else None for name, number in told.items()}}


@dataclass(frozen=True)
class Rows:
    """One source of rows: how many there are, and what a sample of them is like."""

    rows: int
    tokens_per_row: float
    bytes_per_row: float


@dataclass(frozen=True)
class Plan:
    """The estimates of all stages, and where the rates come from."""

    device: str
    source: str
    stages: list[Estimate]

    def plain(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        stages = [stage.plain() for stage in self.stages]
        total = {name: self.total(name).plain() for name in ("seconds", "bytes")}
        return {"device": self.device, "rates": self.source, "stages": stages, "total": total}

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
    dataset = settings.dataset
    traffic = measure(dataset.traffic, dataset.seed, "dataset.traffic")
    tests = [
        measure(source, dataset.seed, "dataset.test") for source in (dataset.test, dataset.response_test) if source
    ]
    benchmarks = [
        measure(benchmark.source, 0, f"benchmark {benchmark.name}") for benchmark in settings.evaluation.benchmarks
    ]
    device = "gpu" if needs_gpu(settings) else "cpu"
    return Plan(
        device,
        f"the run {past.run}" if past else "docs/benchmarks.md, where a rate fits",
        _Estimator(settings, traffic, tests, benchmarks, past, device).stages(),
    )


def measure(source: SourceSettings, seed: int, where: str) -> Rows:
    """Count the rows of a source, and measure a sample of them."""
    draw, rows, sample = random.Random(seed), 0, list[Row]()
    for row in read_conversations(source.model_copy(update={"limit": None}), where=where):
        rows += 1
        if len(sample) < SAMPLE_ROWS:
            sample.append(row)
        elif (place := draw.randrange(rows)) < SAMPLE_ROWS:
            sample[place] = row
    texts = [f"{row['prompt']}{row['response'] or ''}".encode() for row in sample]
    size = max(1, len(sample))
    return Rows(
        min(rows, source.limit or rows), sum(map(len, texts)) / BYTES_PER_TOKEN / size, _bytes_on_disk(sample) / size
    )


def _bytes_on_disk(rows: list[Row]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sample.parquet")
        write_table(({**row, "group": row["id"]} for row in rows), CONVERSATION, path)
        return path.stat().st_size


class _Estimator:
    """The arithmetic of the loop: how much of each stage's work follows from the data and the settings."""

    def __init__(
        self,
        settings: Settings,
        traffic: Rows,
        tests: list[Rows],
        benchmarks: list[Rows],
        past: Past | None,
        device: str,
    ) -> None:
        self.settings, self.traffic, self.tests, self.benchmarks = settings, traffic, tests, benchmarks
        self.past, self.device = past, device
        self.rates = recorded_rates()

    def stages(self) -> list[Estimate]:
        """All stages, in the order of the pipeline."""
        settings, traffic = self.settings, self.traffic
        prompts = Number(traffic.rows)
        share, why = self._passed_share()
        passed = prompts.times(share, why)
        length, why_length = self._response_tokens()
        responses = passed.times(sum(one.samples for one in settings.responders))
        written = responses.times(length, why_length)
        read = responses.times(traffic.tokens_per_row, ROUGH_TOKENS)
        held_out = settings.mining.held_out
        lessons = (passed.value or 0) * (1 - held_out)
        replayed = lessons / 2 + min(lessons / 2, traffic.rows - (passed.value or 0))  # as guardloop.mining mines
        examples = Number(lessons + replayed, passed.rough)
        rounds = settings.training.epochs * settings.training.seeds
        test_rows = sum(table.rows for table in self.tests)
        test_tokens = sum(table.rows * table.tokens_per_row for table in self.tests)
        candidate = Number(test_rows + (passed.value or 0) * held_out, passed.rough)
        row, text = traffic.bytes_per_row, BYTES_PER_TOKEN
        test_bytes = sum(table.rows * table.bytes_per_row for table in self.tests)
        wide = "rows as large as the sample's, with what the stage adds"
        answers = (written.value or 0) * text + (responses.value or 0) * row
        make = self._estimate
        return [
            make("prepare_data", prompts, None, Number(traffic.rows * row + test_bytes, wide)),
            make("screen prompts", prompts, self._tokens(traffic), Number(traffic.rows * row, wide)),
            make("generate_responses", responses, written, Number(answers, why_length or wide)),
            make("screen responses", responses, _sum(read, written), Number(answers, why_length or wide)),
            make("mine_feedback", examples, None, examples.times(row, wide)),
            make("train_guard", examples, examples.times(rounds * traffic.tokens_per_row, ROUGH_TOKENS), NOT_SAID),
            make(
                "screen test (baseline)", Number(test_rows), Number(test_tokens, ROUGH_TOKENS), Number(test_bytes, wide)
            ),
            make("screen test (candidate)", candidate, Number(test_tokens, ROUGH_TOKENS), Number(test_bytes, wide)),
            *self._scored_benchmarks(),
            make("evaluate", Number(test_rows), None, Number(test_bytes, wide)),
        ]

    def _scored_benchmarks(self) -> list[Estimate]:
        """Both guards score every row."""
        if not self.benchmarks:
            return []
        why = "rows like something in the training set are left out"
        rows = sum(table.rows for table in self.benchmarks)
        tokens = sum(table.rows * table.tokens_per_row for table in self.benchmarks)
        size = sum(table.rows * table.bytes_per_row for table in self.benchmarks)
        scored = Number(rows).times(GUARDS, why)
        return [self._estimate("score_benchmarks", scored, Number(GUARDS * tokens, ROUGH_TOKENS), Number(size, why))]

    def _estimate(self, stage: str, items: Number, tokens: Number | None, size: Number) -> Estimate:
        took = self.past.stages.get(stage) if self.past else None
        if took and took.bytes is not None and took.items:
            whole = stage == "train_guard"  # an adapter is as large for one example as for many
            why = f"as large as in the run {self.past.run}" if self.past else ""
            size = Number(took.bytes, why) if whole else items.times(took.bytes / took.items, why)
        return Estimate(stage, items, tokens, self._seconds(stage, items, tokens), size)

    def _seconds(self, stage: str, items: Number, tokens: Number | None) -> Number:
        took = self.past.stages.get(stage) if self.past else None
        if took and took.items and self.past:
            factor = took.seconds / took.items
            if stage == "train_guard":
                before, now = self.past.settings.training, self.settings.training
                factor *= now.epochs * now.seeds / (before.epochs * before.seeds)
            return items.times(factor, f"as fast as in the run {self.past.run}, the loading of models included")
        rate = self._rate(stage)
        if rate is None:
            return Number(None, "where no rate is known, a first run here gives one")
        amount = tokens if rate.unit == "tokens" and tokens else items
        if rate.unit == "examples":
            amount = items.times(self.settings.training.epochs * self.settings.training.seeds)
        where = f"as fast as measured in docs/benchmarks.md ({rate.section}), without the loading of models"
        return amount.times(1 / rate.per_second, where)

    def _rate(self, stage: str) -> Rate | None:
        kind = "screen" if stage.startswith("screen") or stage == "score_benchmarks" else stage
        guard = self.settings.guard
        model = self.settings.responders[0].model if kind == "generate_responses" else guard.base
        several = kind == "generate_responses" and len(self.settings.responders) > 1
        quantization = "none" if kind == "generate_responses" else guard.quantization
        key = (kind, model, self.device, quantization)
        found = [rate for rate in self.rates if (rate.stage, rate.model, rate.device, rate.quantization) == key]
        return found[0] if found and not several else None

    def _tokens(self, table: Rows) -> Number:
        return Number(table.rows * table.tokens_per_row, ROUGH_TOKENS)

    def _passed_share(self) -> tuple[float, str]:
        if self.past and self.past.passed_share is not None:
            return self.past.passed_share, f"as large a share of the prompts passes as in the run {self.past.run}"
        return 1.0, "as if the guard let every prompt pass: an upper bound"

    def _response_tokens(self) -> tuple[float, str]:
        if self.past and self.past.tokens_per_response is not None:
            return self.past.tokens_per_response, f"responses as long as in the run {self.past.run}"
        responders = self.settings.responders
        mean = sum(one.samples * one.max_new_tokens for one in responders) / sum(one.samples for one in responders)
        return mean, "as if every response took its max_new_tokens: an upper bound"


NOT_SAID = Number(None, "the size of the adapter follows from the model: a first run tells it")


def _sum(*numbers: Number) -> Number:
    values = [number.value for number in numbers]
    rough = next((number.rough for number in numbers if number.rough), "")
    return Number(None if None in values else sum(value for value in values if value is not None), rough)


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
