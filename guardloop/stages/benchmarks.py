"""Both guards on public benchmarks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardloop.core.progress import Stage
from guardloop.core.records import BENCHMARKED, EXAMPLE, Row, read_table, write_table
from guardloop.core.settings import read_section
from guardloop.evaluation.result import BenchmarkResult
from guardloop.evaluation.settings import EvaluationSettings
from guardloop.guard.settings import GuardSettings
from guardloop.stages.files import EXAMPLES, Sections
from guardloop.stages.guard import load_guard


@dataclass(frozen=True)
class ScoredBenchmarks:
    """Rows of BENCHMARKED, what is to be told of each benchmark, and each guard's two thresholds."""

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
        taught = [row["prompt"] for row in read_table(Path(training_set) / EXAMPLES, EXAMPLE)]
        found = _score(stage, settings, read_section(GuardSettings, guard, "guard"), adapter, taught)
        count = write_table(found.rows, BENCHMARKED, scores, lambda: found.metadata)
        stage.done(count, ", ".join(f"{metadata['rows']} {name}" for name, metadata in found.metadata.items()))
    return {f"{name}_rows": float(metadata["rows"]) for name, metadata in found.metadata.items()}


def benchmark_guards(guard: GuardSettings, adapter: str | None, settings: EvaluationSettings) -> list[BenchmarkResult]:
    """Score and measure the guards on the benchmarks that `settings` names, without a pipeline.

    Without an adapter the baseline stands on both sides.
    """
    from guardloop.evaluation.paired import GuardRun
    from guardloop.guard.loading import fetch_adapter

    folder = fetch_adapter(adapter, guard.tracking_uri)
    with Stage("score_benchmarks") as stage:
        found = _score(stage, settings, guard, folder, [])
        stage.done(len(found.rows), ", ".join(found.metadata))
    runs = [
        GuardRun(name, prompt, 1.0, 0, response_threshold=response)
        for name, (prompt, response) in found.thresholds.items()
    ]
    return measured(found.metadata, found.rows, runs[0], runs[-1], settings)


def measured(
    metadata: dict[str, Row], rows: list[Row], baseline: Any, candidate: Any, settings: EvaluationSettings
) -> list[BenchmarkResult]:
    """Every benchmark, measured on its rows of BENCHMARKED."""
    from guardloop.evaluation.benchmarks import measure_benchmark

    found = []
    for benchmark in settings.benchmarks:
        own = [row for row in rows if row["benchmark"] == benchmark.name]
        result = measure_benchmark(own, benchmark, baseline, candidate, settings)
        found.append(result.model_copy(update=metadata[benchmark.name]))
    return found


def _score(
    stage: Stage, settings: EvaluationSettings, guard: GuardSettings, adapter: str | Path | None, taught: Sequence[str]
) -> ScoredBenchmarks:
    from guardloop.evaluation.benchmarks import read_benchmark

    stage.say(f"reading {', '.join(benchmark.name for benchmark in settings.benchmarks)}")
    read = [read_benchmark(benchmark, taught) for benchmark in settings.benchmarks]
    rows = [{**row, "benchmark": found.settings.name} for found in read for row in found.rows]
    thresholds: dict[str, tuple[float, float]] = {}
    for name, own in {"baseline": None, **({"candidate": adapter} if adapter else {})}.items():
        stage.say(f"loading the {name} guard")
        model = load_guard(guard, own)
        thresholds[name] = (model.threshold, model.response_threshold)
        scored = stage.track(zip(rows, model.score(rows), strict=True), len(rows), f"scoring, {name} guard")
        for row, verdict in scored:
            row[f"{name}_score"] = verdict.score
        del model  # two large guards need not fit at once
    metadata = {found.settings.name: {"revision": found.revision, "left_out": found.left_out} for found in read}
    whole = []
    for row in rows:
        row.setdefault("candidate_score", row["baseline_score"])
        if row["baseline_score"] is not None and row["candidate_score"] is not None:
            whole.append(row)
    for name, told in metadata.items():
        told["rows"] = sum(row["benchmark"] == name for row in whole)
        told["unreadable"] = sum(row["benchmark"] == name for row in rows) - told["rows"]
    return ScoredBenchmarks(whole, metadata, thresholds)
