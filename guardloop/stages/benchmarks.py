"""Both guards on public benchmarks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from guardloop.core.progress import Stage
from guardloop.core.records import BENCHMARKED, EXAMPLE, Row, read_table, write_table
from guardloop.core.settings import read_section
from guardloop.evaluation.result import BenchmarkResult
from guardloop.evaluation.settings import EvaluationSettings
from guardloop.guard.settings import GuardSettings
from guardloop.stages.files import EXAMPLES, Sections
from guardloop.stages.guard import load_guard

if TYPE_CHECKING:
    from guardloop.evaluation.paired import GuardRun


@dataclass(frozen=True)
class ScoredBenchmarks:
    """Rows of BENCHMARKED, what the report says of each benchmark, and each guard's two thresholds."""

    rows: list[Row]
    metadata: dict[str, Row]
    thresholds: dict[str, tuple[float, float]]


def score_benchmarks(
    training_set: str | Path, adapter: str | Path | None, guard: Sections, evaluation: Sections, scores: str | Path
) -> dict[str, float]:
    """Score both guards on the public benchmarks that `evaluation` names, and write a table of BENCHMARKED.

    Rows like something in the training set are left out. Without benchmarks the table is empty, and no guard is loaded.
    """
    settings = read_section(EvaluationSettings, evaluation, "evaluation")
    if not settings.benchmarks:
        write_table([], BENCHMARKED, scores)
        return {}
    with Stage("score_benchmarks") as stage:
        trained_on = [row["prompt"] for row in read_table(Path(training_set) / EXAMPLES, EXAMPLE)]
        scored = _score(stage, settings, read_section(GuardSettings, guard, "guard"), adapter, trained_on)
        count = write_table(scored.rows, BENCHMARKED, scores, lambda: scored.metadata)
        stage.done(count, ", ".join(f"{of['rows']} {name}" for name, of in scored.metadata.items()))
    return {f"{name}_rows": float(of["rows"]) for name, of in scored.metadata.items()}


def benchmark_guards(
    guard: GuardSettings, adapter: str | None, settings: EvaluationSettings, seed: int = 0
) -> list[BenchmarkResult]:
    """Score and measure the guards on the benchmarks that `settings` names, without a pipeline.

    Without an adapter the baseline is on both sides.
    """
    from guardloop.evaluation.paired import GuardRun
    from guardloop.models.locate import fetch_adapter

    folder = fetch_adapter(adapter)
    with Stage("score_benchmarks") as stage:
        scored = _score(stage, settings, guard, folder, [])
        stage.done(len(scored.rows), ", ".join(scored.metadata))
    runs = [
        GuardRun(name, prompt, 1.0, 0, response_threshold=response)
        for name, (prompt, response) in scored.thresholds.items()
    ]
    return measured(scored.metadata, scored.rows, runs[0], runs[-1], settings, seed)


def measured(
    metadata: dict[str, Row],
    rows: list[Row],
    baseline: "GuardRun",
    candidate: "GuardRun",
    settings: EvaluationSettings,
    seed: int,
) -> list[BenchmarkResult]:
    """Every benchmark, measured on its rows of BENCHMARKED."""
    from guardloop.evaluation.benchmarks import measure_benchmark

    results = []
    for benchmark in settings.benchmarks:
        own = [row for row in rows if row["benchmark"] == benchmark.name]
        result = measure_benchmark(own, benchmark, baseline, candidate, settings.resamples, seed)
        results.append(result.model_copy(update=metadata[benchmark.name]))
    return results


def _score(
    stage: Stage,
    settings: EvaluationSettings,
    guard: GuardSettings,
    adapter: str | Path | None,
    trained_on: Sequence[str],
) -> ScoredBenchmarks:
    from guardloop.evaluation.benchmarks import read_benchmark

    stage.say(f"reading {', '.join(benchmark.name for benchmark in settings.benchmarks)}")
    benchmarks = [read_benchmark(benchmark, trained_on) for benchmark in settings.benchmarks]
    rows = [{**row, "benchmark": benchmark.settings.name} for benchmark in benchmarks for row in benchmark.rows]
    thresholds: dict[str, tuple[float, float]] = {}
    for name, own in {"baseline": None, **({"candidate": adapter} if adapter else {})}.items():
        stage.say(f"loading the {name} guard")
        model = load_guard(guard, own)
        thresholds[name] = (model.threshold, model.response_threshold)
        scored = stage.track(zip(rows, model.score(rows), strict=True), len(rows), f"scoring, {name} guard")
        for row, verdict in scored:
            row[f"{name}_score"] = verdict.score
        del model  # two large guards need not fit at once
    judged = []
    for row in rows:
        row.setdefault("candidate_score", row["baseline_score"])
        if row["baseline_score"] is not None and row["candidate_score"] is not None:
            judged.append(row)
    metadata = {}
    for benchmark in benchmarks:
        name = benchmark.settings.name
        count = sum(row["benchmark"] == name for row in judged)
        metadata[name] = {
            "revision": benchmark.revision,
            "left_out": benchmark.left_out,
            "rows": count,
            "unreadable": len(benchmark.rows) - count,
        }
    return ScoredBenchmarks(judged, metadata, thresholds)
