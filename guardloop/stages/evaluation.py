"""Both guards on the locked test set, the decision, and its report."""

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from guardloop.core.errors import GuardLoopError
from guardloop.core.progress import Stage
from guardloop.core.records import BENCHMARKED, SCORES, SCREENED, Row, read_json, read_metadata, read_table, write_table
from guardloop.core.settings import read_section
from guardloop.evaluation.result import Evaluation
from guardloop.evaluation.settings import EvaluationSettings, GateSettings
from guardloop.stages.benchmarks import measured
from guardloop.stages.files import EVALUATION, EXAMPLES, MINING, REPORT, SCORE_TABLE, SUMMARY, Sections

if TYPE_CHECKING:
    from guardloop.report.story import RunStory


def evaluate(
    baseline_scores: str | Path,
    candidate_scores: str | Path,
    training_set: str | Path,
    adapter: str | Path,
    folder: str | Path,
    evaluation: Sections,
    gate: Sections,
    seed: int = 0,
    *,
    held_out: str | Path | None = None,
    benchmarks: str | Path | None = None,
) -> Evaluation:
    """Compare both guards on the locked test set and decide. Writes evaluation.json, report.html and summary.md.

    `held_out` is the table of held-out prompts as the candidate scored them; `benchmarks` what score_benchmarks wrote.
    """
    from guardloop.evaluation.compare import evaluate as compare
    from guardloop.evaluation.paired import GuardRun
    from guardloop.evaluation.table import digest_of_test_set
    from guardloop.report.markdown import render_markdown
    from guardloop.report.render import render_html

    settings = read_section(EvaluationSettings, evaluation, "evaluation")
    gates = read_section(GateSettings, gate, "gate")
    folder = Path(folder)
    with Stage("evaluate") as stage:
        stage.say(f"comparing the guards with {settings.resamples:,} bootstrap resamples")
        metadata = [read_metadata(baseline_scores), read_metadata(candidate_scores)]
        rows = list(_paired(baseline_scores, candidate_scores))
        runs = [
            GuardRun(
                name,
                f["threshold"],
                f["median_label_mass"],
                f["unreadable"],
                f.get("temperature", 1.0),
                f.get("response_threshold"),
            )
            for name, f in zip(("baseline", "candidate"), metadata, strict=True)
        ]
        results = []
        if benchmarks and (described := read_metadata(benchmarks)):
            results = measured(described, list(read_table(benchmarks, BENCHMARKED)), runs[0], runs[1], settings, seed)
        judged = read_table(held_out) if held_out else None
        result = compare(rows, runs[0], runs[1], settings, gates, seed=seed, held_out=judged, benchmarks=results)
        result.test_set = digest_of_test_set(read_table(baseline_scores, SCREENED))
        story = _story(metadata[0], Path(training_set), Path(adapter))
        folder.mkdir(parents=True, exist_ok=True)
        write_table(rows, SCORES, folder / SCORE_TABLE)
        (folder / EVALUATION).write_text(result.model_dump_json(indent=2), "utf-8")
        (folder / REPORT).write_text(render_html(result, rows, story), "utf-8")
        (folder / SUMMARY).write_text(render_markdown(result, story), "utf-8")
        stage.done(result.rows + result.response_rows, result.decision.headline)
    return result


def curves_of(scores: str | Path, guard: str) -> tuple[list[float], list[float], list[float]]:
    """ROC curve of `guard` (baseline or candidate) on the User-role rows: FPRs, recalls, thresholds, thinned out."""
    from sklearn.metrics import roc_curve

    rows = [row for row in read_table(scores, SCORES) if row["response"] is None]
    fpr, recall, thresholds = roc_curve([r["unsafe"] for r in rows], [r[f"{guard}_score"] for r in rows])
    step = max(1, len(fpr) // 200)
    return fpr[1::step].tolist(), recall[1::step].tolist(), thresholds[1::step].tolist()


def _paired(baseline_scores: str | Path, candidate_scores: str | Path) -> Iterator[Row]:
    """Rows that both guards could judge, with both scores."""
    nothing: Row = {}  # beyond the end of the shorter table
    pairs = zip_longest(
        read_table(baseline_scores, SCREENED), read_table(candidate_scores, SCREENED), fillvalue=nothing
    )
    for baseline, candidate in pairs:
        if baseline.get("id") != candidate.get("id"):
            raise GuardLoopError(
                "evaluate: the two score tables are not of the same test set", "screen one test set with both guards"
            )
        if baseline["score"] is not None and candidate["score"] is not None:
            yield {**baseline, "baseline_score": baseline["score"], "candidate_score": candidate["score"]}


def _story(metadata: Row, training_set: Path, adapter: Path) -> "RunStory":
    """How the run went, for the report."""
    from guardloop.guard.metadata import guard_metadata
    from guardloop.report.story import MiningSummary, RunStory, Source

    mined = read_json(training_set / MINING, MiningSummary)
    judged = read_metadata(training_set / EXAMPLES).get("judged", {}).get("data", {})
    trained = guard_metadata(adapter).get("training", {})
    data = metadata.get("data", {})
    return RunStory(
        run_id=os.environ.get("GUARDLOOP_RUN_ID", ""),
        created=datetime.now(UTC),
        configuration=os.environ.get("GUARDLOOP_CONFIGURATION", ""),
        dataset=Source(name=data.get("dataset", ""), revision=data.get("revision", "")),
        guard=Source(name=metadata.get("guard", ""), revision=metadata.get("revision", "")),
        responders=[Source(name=r["responder"], revision=r["revision"]) for r in judged.get("responders", [])],
        git_sha=os.environ.get("GUARDLOOP_GIT_SHA", ""),
        data_hash=data.get("hash", ""),
        data_notes=data.get("notes", []),
        counts=mined.stage_counts(),
        training={k: v for k, v in trained.items() if isinstance(v, int | float)},
    )
