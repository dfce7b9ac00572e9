"""The pipeline's stages: files in, files out. Each is what one component calls, and no more than a stage's story."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from guardloop.data.settings import DatasetSettings
from guardloop.errors import GuardLoopError
from guardloop.evaluation.result import BenchmarkResult, Evaluation
from guardloop.evaluation.settings import EvaluationSettings, GateSettings
from guardloop.feedback.settings import FeedbackSettings
from guardloop.guard.settings import GuardSettings
from guardloop.progress import Stage
from guardloop.records import (
    BENCHMARKED,
    CONVERSATION,
    EXAMPLE,
    FEEDBACK,
    RESPONSE,
    SCORES,
    SCREENED,
    Row,
    count_rows,
    judged_schema,
    read_facts,
    read_json,
    read_table,
    read_tables,
    write_jsonl,
    write_table,
)
from guardloop.registry.settings import RegistrySettings
from guardloop.responses.settings import ResponderSettings
from guardloop.settings import read_section
from guardloop.training.processes import is_child, train_in_processes
from guardloop.training.settings import TrainingSettings

EXAMPLES, HELD_OUT = "examples.parquet", "held_out.parquet"
HARVEST, HARVEST_PAGE = "harvest.json", "harvest.html"
BLOCKED_INPUTS = "blocked_inputs.jsonl"
EVALUATION, REPORT, SUMMARY, SCORE_TABLE = "evaluation.json", "report.html", "summary.md", "scores.parquet"
Sections = Mapping[str, Any]


def prepare_data(dataset: Sections, traffic: str | Path, test: str | Path) -> dict[str, float]:
    """Write the cleaned traffic and the locked test set. Returns the counts of what was kept and dropped."""
    from guardloop.data.clean import fingerprint, prepare  # noqa: PLC0415

    settings = read_section(DatasetSettings, dataset, "dataset")
    with Stage("prepare_data") as stage:
        stage.say(f"reading {settings.name}")
        rows, test_rows, report = prepare(settings)
        facts = {
            "dataset": settings.name,
            "revision": settings.traffic.revision or "",
            "hash": fingerprint([*rows, *test_rows]),
            "counts": report.plain(),
        }
        write_table(rows, CONVERSATION, traffic, lambda: facts)
        write_table(test_rows, CONVERSATION, test, lambda: facts)
        dropped = report.read - report.kept
        stage.done(report.read, f"{report.kept} prompts to screen, {dropped} dropped; {len(test_rows)} test rows")
    return {name: float(value) for name, value in report.plain().items()}


def screen(
    conversations: str | Path,
    verdicts: str | Path,
    guard: Sections,
    *,
    adapter: str | Path | None = None,
    shard: int = 0,
    shards: int = 1,
    what: str = "screen",
    load: Callable[[], Any] | None = None,
) -> dict[str, float]:
    """Score a table of conversations, or shard `shard` of `shards` of it, with the guard, or with `adapter` on it.

    The table's own columns stay; the verdict's are added. `load` gives the guard where the caller has it already.
    Returns figures for the run's metrics.
    """
    settings = read_section(GuardSettings, guard, "guard")
    schema = judged_schema(conversations)
    masses: list[float] = []
    counts = {"rows": 0, "flagged": 0, "truncated": 0, "unreadable": 0}
    with Stage(what, shard if shards > 1 else None) as stage:
        total = len(range(shard, count_rows(conversations), shards))
        loaded: dict[str, Any] = {}

        def judged() -> Iterator[Row]:
            if not total:
                return
            stage.say("loading the guard")
            loaded["guard"] = model = load() if load else _load_guard(settings, adapter)
            rows, again = _shard(conversations, shard, shards), _shard(conversations, shard, shards)
            for row, verdict in stage.track(zip(rows, model.score(again), strict=True), total, "scoring"):
                counts["rows"] += 1
                counts["flagged"] += verdict.flagged
                counts["truncated"] += verdict.truncated
                counts["unreadable"] += verdict.margin is None
                if verdict.label_mass is not None:
                    masses.append(verdict.label_mass)
                yield {**row, **verdict.__dict__}

        def facts() -> Row:
            model = loaded.get("guard")
            return {
                "data": read_facts(conversations),
                "guard": settings.base,
                "revision": _base_revision(settings, model),
                "adapter": settings.adapter or "",
                "threshold": model.threshold if model else settings.threshold or 0.0,
                "temperature": _temperature(settings, adapter) if model else 1.0,
                "shards": shards,
                "median_label_mass": median(masses) if masses else 1.0,
                **counts,
            }

        write_table(judged(), schema, verdicts, facts)
        share = counts["flagged"] / max(1, counts["rows"])
        stage.done(counts["rows"], f"{counts['flagged']} flagged ({share:.0%})")
    return {**{k: float(v) for k, v in counts.items()}, "flagged_share": share}


def screen_improved(
    conversations: str | Path,
    training_set: str | Path,
    verdicts: str | Path,
    held_out: str | Path,
    guard: Sections,
    adapter: str | Path,
    what: str = "screen",
) -> dict[str, float]:
    """Score the test set, and the feedback that was held out of `training_set`, with the improved guard."""
    settings = read_section(GuardSettings, guard, "guard")
    load = cache(lambda: _load_guard(settings, adapter))
    kept = Path(training_set) / HELD_OUT
    if kept.is_file():
        screen(kept, held_out, guard, adapter=adapter, what="screen held-out feedback", load=load)
    else:  # a training set from elsewhere
        write_table([], judged_schema(FEEDBACK), held_out)
    return screen(conversations, verdicts, guard, adapter=adapter, what=what, load=load)


def generate_responses(
    screened: str | Path, responses: str | Path, responder: Sections, shard: int = 0
) -> dict[str, float]:
    """Sample k responses of each responder to every prompt of a screened table that was not flagged.

    Killed and run again on the same table with the same settings, it goes on where it was.
    """
    from guardloop.responses.resume import answered  # noqa: PLC0415

    settings = read_section(ResponderSettings, responder, "responder")
    counts = {"responses": 0, "refusals": 0, "errors": 0, "tokens": 0}
    facts = read_facts(screened)
    with Stage("generate_responses", shard if facts.get("shards", 1) > 1 else None) as stage:

        def counted() -> Iterator[Row]:
            for row in answered(screened, settings, stage):
                counts["responses"] += 1
                counts["refusals"] += row["refusal"]
                counts["errors"] += row["finish_reason"] == "error"
                counts["tokens"] += row["tokens"]
                yield row

        everyone = [{"responder": one.tag, "revision": one.revision or ""} for one in settings.each()]
        described = {"data": facts.get("data", {}), "responders": everyone}
        write_table(counted(), RESPONSE, responses, lambda: {**described, **counts})
        samples = sum(one.samples for one in settings.each())
        prompts = counts["responses"] // samples
        outcome = f"{samples} responses to each of {prompts} passed prompts, {counts['refusals']} refusals"
        stage.done(counts["responses"], outcome)
    return {k: float(v) for k, v in counts.items()}


def mine_feedback(
    screened: Sequence[str | Path], judged: Sequence[str | Path], training_set: str | Path, feedback: Sections
) -> tuple[dict[str, float], bool]:
    """Write the training set (a folder: examples, blocked_inputs.jsonl, harvest.json and its page).

    Returns figures, and whether the harvest is large enough to train on.
    """
    from guardloop.feedback.mine import mine  # noqa: PLC0415

    settings = read_section(FeedbackSettings, feedback, "feedback")
    folder = Path(training_set)
    with Stage("mine_feedback") as stage:
        stage.say("weighing the evidence")
        found = mine(read_tables(screened), read_tables(judged), settings)
        facts = {"screened": read_facts(screened[0]), "judged": read_facts(judged[0])} if screened and judged else {}
        write_harvest(found, folder, facts)
        kinds = ", ".join(f"{n} {kind}" for kind, n in found.counts.items())
        stage.done(len(found.examples), kinds if found.enough else f"not enough to train: {found.reason}")
    figures = {"positives": found.counts.get("positive", 0), "examples": len(found.examples), "blocked": found.blocked}
    return {k: float(v) for k, v in figures.items()}, found.enough


def write_harvest(found: Any, folder: Path, facts: Row, examples: list[Row] | None = None) -> None:
    """Write a training set: the harvest's examples, or others in their place, and what it tells people."""
    from guardloop.report import ChannelStory, HarvestExample, HarvestStory, render_harvest  # noqa: PLC0415

    story = HarvestStory(
        enough=found.enough,
        reason=found.reason,
        screened=found.screened,
        passed=found.passed,
        responses=found.responses,
        refusals=found.refusals,
        blocked=found.blocked,
        held_out=len(found.held_out),
        counts=found.counts,
        channels=[ChannelStory(**vars(channel)) for channel in found.channels],
        examples=[HarvestExample(**row) for row in found.shown],
    )
    write_table(found.examples if examples is None else examples, EXAMPLE, folder / EXAMPLES, lambda: facts)
    write_table(found.held_out, FEEDBACK, folder / HELD_OUT, lambda: facts)
    write_jsonl(found.blocked_inputs, folder / BLOCKED_INPUTS)
    (folder / HARVEST).write_text(story.model_dump_json(indent=2), "utf-8")
    (folder / HARVEST_PAGE).write_text(render_harvest(story), "utf-8")


def train_guard(
    training_set: str | Path, adapter: str | Path, guard: Sections, training: Sections, registry: Sections
) -> dict[str, float]:
    """Train the improved guard: a LoRA adapter folder with its own guard.json. Returns figures.

    Its curves go to MLflow while it trains, where MLFLOW_TRACKING_URI and GUARDLOOP_RUN_ID say where.
    """
    settings = read_section(TrainingSettings, training, "training")
    if settings.processes > 1 and not is_child():
        arguments = {"training_set": str(training_set), "adapter": str(adapter)}
        sections = {"guard": guard, "training": training, "registry": registry}
        return train_in_processes(settings.processes, arguments | sections)
    from guardloop.registry.training_log import TrainingLog  # noqa: PLC0415
    from guardloop.training.train import train  # noqa: PLC0415

    examples = list(read_table(Path(training_set) / EXAMPLES, EXAMPLE))
    run_id = os.environ.get("GUARDLOOP_RUN_ID", "")
    curves = TrainingLog(run_id, read_section(RegistrySettings, registry, "registry")) if run_id else None
    with Stage("train_guard") as stage, curves or nullcontext():
        stage.say("loading the default guard")
        started = time.monotonic()

        def watch(seed: int, step: Any) -> None:
            metrics = step.metrics()
            name = "" if settings.seeds == 1 else f"seed_{seed}/"
            if curves:
                curves.log(step.number, {f"{name}{metric}": value for metric, value in metrics.items()})
            note = f"loss {step.loss:.3f}, {metrics['examples_per_second']:.1f} examples/s"
            stage.report(f"{name}step", step.number, step.total, started, note)

        made = train(examples, read_section(GuardSettings, guard, "guard"), settings, Path(adapter), on_step=watch)
        stage.done(made.examples, f"{made.steps} steps, loss {made.first_loss:.3f} -> {made.last_loss:.3f}")
    figures = {
        "examples": made.examples,
        "steps": made.steps,
        "first_loss": made.first_loss,
        "last_loss": made.last_loss,
        "scale": made.scale,
        "threshold": made.threshold,
        "temperature": made.temperature,
        "held_out_auprc": made.held_out_auprc or 0.0,
    }
    return {k: float(v) for k, v in figures.items()}


def evaluate(
    default_scores: str | Path,
    improved_scores: str | Path,
    training_set: str | Path,
    adapter: str | Path,
    folder: str | Path,
    evaluation: Sections,
    gate: Sections,
    *,
    held_out: str | Path | None = None,
    benchmarks: str | Path | None = None,
) -> Evaluation:
    """Compare both guards on the locked test set and decide. Writes evaluation.json, report.html and summary.md.

    `held_out` is the held-out feedback as the improved guard scored it; `benchmarks` what score_benchmarks wrote.
    """
    from guardloop.evaluation.compare import evaluate as compare  # noqa: PLC0415
    from guardloop.evaluation.paired import GuardRun  # noqa: PLC0415
    from guardloop.report import render_html, render_markdown  # noqa: PLC0415

    settings = read_section(EvaluationSettings, evaluation, "evaluation")
    gates = read_section(GateSettings, gate, "gate")
    folder = Path(folder)
    with Stage("evaluate") as stage:
        stage.say(f"comparing the guards with {settings.resamples:,} bootstrap resamples")
        facts = [read_facts(default_scores), read_facts(improved_scores)]
        rows = list(_paired(default_scores, improved_scores))
        runs = [
            GuardRun(name, f["threshold"], f["median_label_mass"], f["unreadable"], f.get("temperature", 1.0))
            for name, f in zip(("default", "improved"), facts, strict=True)
        ]
        told = read_facts(benchmarks) if benchmarks else {}
        scored = list(read_table(benchmarks, BENCHMARKED)) if benchmarks and told else []
        measured = _measured(told, scored, runs[0], runs[1], settings) if told else []
        learnt = read_table(held_out) if held_out else None
        found = compare(rows, runs[0], runs[1], settings, gates, feedback=learnt, benchmarks=measured)
        story = _story(facts[0], Path(training_set), Path(adapter))
        folder.mkdir(parents=True, exist_ok=True)
        write_table(rows, SCORES, folder / SCORE_TABLE)
        (folder / EVALUATION).write_text(found.model_dump_json(indent=2), "utf-8")
        (folder / REPORT).write_text(render_html(found, rows, story), "utf-8")
        (folder / SUMMARY).write_text(render_markdown(found, story), "utf-8")
        stage.done(found.rows + found.agent_rows, found.decision.headline)
    return found


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
        found = _score_benchmarks(stage, settings, read_section(GuardSettings, guard, "guard"), adapter, taught)
        count = write_table(found.rows, BENCHMARKED, scores, lambda: found.facts)
        stage.done(count, ", ".join(f"{facts['rows']} {name}" for name, facts in found.facts.items()))
    return {f"{name}_rows": float(facts["rows"]) for name, facts in found.facts.items()}


def benchmark_guards(guard: GuardSettings, adapter: str | None, settings: EvaluationSettings) -> list[BenchmarkResult]:
    """Score and measure the guards on the benchmarks that `settings` names, without a pipeline.

    Without an adapter the default guard stands on both sides.
    """
    from guardloop.evaluation.paired import GuardRun  # noqa: PLC0415
    from guardloop.guard.loading import fetch_adapter  # noqa: PLC0415

    folder = fetch_adapter(adapter, guard.tracking_uri)
    with Stage("score_benchmarks") as stage:
        found = _score_benchmarks(stage, settings, guard, folder, [])
        stage.done(len(found.rows), ", ".join(found.facts))
    runs = [GuardRun(name, threshold, 1.0, 0) for name, threshold in found.thresholds.items()]
    return _measured(found.facts, found.rows, runs[0], runs[-1], settings)


def record_harvest(training_set: str | Path, run_id: str, sections: Sections) -> None:
    """Record in MLflow a run that ended early, since its harvest was too small to train on."""
    from guardloop.registry import Registry  # noqa: PLC0415

    settings = read_section(RegistrySettings, sections["registry"], "registry")
    with Stage("record_harvest") as stage:
        training_set = Path(training_set)
        origin, data = _origin(training_set, run_id, sections)
        Registry(settings).record_run(
            origin, sections, files=_harvest_files(training_set), data=data, figures=_figures(training_set)
        )
        stage.done(1, "recorded a run that trained nothing")


def register_model(
    adapter: str | Path, evaluated: str | Path, training_set: str | Path, run_id: str, sections: Sections
) -> int:
    """Record the run in MLflow and register the adapter as the `candidate`. Returns its version."""
    from guardloop.registry import Registry  # noqa: PLC0415

    settings = read_section(RegistrySettings, sections["registry"], "registry")
    with Stage("register_model") as stage:
        stage.say("recording the run")
        evaluated, training_set, adapter = Path(evaluated), Path(training_set), Path(adapter)
        evaluation = read_json(evaluated / EVALUATION, Evaluation)
        origin, data = _origin(training_set, run_id, sections)
        registry = Registry(settings)
        files = {name: evaluated / name for name in (REPORT, SUMMARY, EVALUATION)} | _harvest_files(training_set)
        registry.record_run(origin, sections, evaluation, files=files, data=data, figures=_figures(training_set))
        guard = read_section(GuardSettings, sections["guard"], "guard")
        version = registry.register_adapter(adapter, origin, evaluation, guard)
        stage.done(1, f"{settings.model} version {version} is the candidate")
    return version


def promote_model(version: int, registry: Sections) -> None:
    """Make the version the champion; the one before is kept as `previous`."""
    from guardloop.registry import Registry  # noqa: PLC0415

    settings = read_section(RegistrySettings, registry, "registry")
    with Stage("promote_model") as stage:
        before = Registry(settings).promote(version)
        was = f"; version {before} is kept as previous" if before else ""
        stage.done(1, f"{settings.model} version {version} is the champion{was}")


def curves_of(scores: str | Path, guard: str) -> tuple[list[float], list[float], list[float]]:
    """ROC curve of `guard` (default or improved) on the User-role rows: FPRs, recalls, thresholds, thinned out."""
    from sklearn.metrics import roc_curve  # noqa: PLC0415

    rows = [row for row in read_table(scores, SCORES) if row["response"] is None]
    fpr, recall, thresholds = roc_curve([r["unsafe"] for r in rows], [r[f"{guard}_margin"] for r in rows])
    step = max(1, len(fpr) // 200)
    return fpr[1::step].tolist(), recall[1::step].tolist(), thresholds[1::step].tolist()


def _load_guard(settings: GuardSettings, adapter: str | Path | None) -> Any:
    from guardloop.guard.engine import Guard  # noqa: PLC0415  (torch loads for seconds; an empty shard is free)

    return Guard.load(settings, adapter)


def _temperature(settings: GuardSettings, adapter: str | Path | None) -> float:
    """The temperature in the guard's guard.json, fitted on held-out data; 1 where there is none."""
    from guardloop.guard.facts import guard_facts  # noqa: PLC0415
    from guardloop.guard.loading import fetch_adapter  # noqa: PLC0415
    from guardloop.models import locate  # noqa: PLC0415

    folder = Path(adapter) if adapter else fetch_adapter(settings.adapter, settings.tracking_uri)
    facts = {**guard_facts(locate(settings.base)), **(guard_facts(folder) if folder else {})}
    return float(facts.get("temperature", 1.0))


def _base_revision(settings: GuardSettings, guard: Any) -> str:
    """The commit of the guard's base: as it was pinned, else as the hub gave it; an embedded model's recipe."""
    from guardloop.models import EMBEDDED, locate  # noqa: PLC0415

    if settings.base.startswith(EMBEDDED) and guard is not None:
        return Path(locate(settings.base)).name.rpartition("-")[2]
    config = getattr(getattr(guard, "model", None), "config", None)
    return settings.revision or getattr(config, "_commit_hash", None) or ""


@dataclass(frozen=True)
class ScoredBenchmarks:
    """Rows of BENCHMARKED, what is to be told of each benchmark, and the guards' thresholds."""

    rows: list[Row]
    facts: dict[str, Row]
    thresholds: dict[str, float]


def _score_benchmarks(
    stage: Stage,
    settings: EvaluationSettings,
    guard: GuardSettings,
    adapter: str | Path | None,
    taught: Sequence[str],
) -> ScoredBenchmarks:
    from guardloop.evaluation.benchmarks import read_benchmark  # noqa: PLC0415

    stage.say(f"reading {', '.join(benchmark.name for benchmark in settings.benchmarks)}")
    read = [read_benchmark(benchmark, taught) for benchmark in settings.benchmarks]
    rows = [{**row, "benchmark": found.settings.name} for found in read for row in found.rows]
    thresholds: dict[str, float] = {}
    for name, own in {"default": None, **({"improved": adapter} if adapter else {})}.items():
        stage.say(f"loading the {name} guard")
        model = _load_guard(guard, own)
        thresholds[name] = model.threshold
        scored = stage.track(zip(rows, model.score(rows), strict=True), len(rows), f"scoring, {name} guard")
        for row, verdict in scored:
            row[f"{name}_margin"] = verdict.margin
        del model  # two large guards need not fit at once
    facts = {found.settings.name: {"revision": found.revision, "left_out": found.left_out} for found in read}
    whole = []
    for row in rows:
        row.setdefault("improved_margin", row["default_margin"])
        if row["default_margin"] is not None and row["improved_margin"] is not None:
            whole.append(row)
    for name, told in facts.items():
        told["rows"] = sum(row["benchmark"] == name for row in whole)
        told["unreadable"] = sum(row["benchmark"] == name for row in rows) - told["rows"]
    return ScoredBenchmarks(whole, facts, thresholds)


def _measured(
    facts: dict[str, Row], rows: list[Row], default: Any, improved: Any, settings: EvaluationSettings
) -> list[BenchmarkResult]:
    """Every benchmark, measured on its rows of BENCHMARKED."""
    from guardloop.evaluation.benchmarks import measure_benchmark  # noqa: PLC0415

    found = []
    for benchmark in settings.benchmarks:
        own = [row for row in rows if row["benchmark"] == benchmark.name]
        result = measure_benchmark(own, benchmark, default, improved, settings)
        found.append(result.model_copy(update=facts[benchmark.name]))
    return found


def _origin(training_set: Path, run_id: str, sections: Sections) -> tuple[Any, list[Any]]:
    """What a run was made from, and the data that it read."""
    from guardloop.registry import DataSource, Origin  # noqa: PLC0415

    facts = read_facts(training_set / EXAMPLES).get("screened", {})
    data = facts.get("data", {})
    origin = Origin(
        run_id=run_id,
        git_sha=os.environ.get("GUARDLOOP_GIT_SHA", ""),
        data_hash=data.get("hash", ""),
        base_model=facts.get("guard", ""),
        base_revision=facts.get("revision", ""),
    )
    sources = []
    for role in ("traffic", "test") if data else ():
        source = sections.get("dataset", {}).get(role, {})
        uri = ":".join(filter(None, (source.get("kind"), source.get("path"), source.get("revision"))))
        sources.append(DataSource(name=f"{data['dataset']} {role}", digest=data["hash"], role=role, uri=uri))
    return origin, sources


def _harvest_files(training_set: Path) -> dict[str, Path]:
    return {name: training_set / name for name in (BLOCKED_INPUTS, HARVEST, HARVEST_PAGE)}


def _shard(path: str | Path, shard: int, shards: int) -> Iterator[Row]:
    return (row for index, row in enumerate(read_table(path)) if index % shards == shard)


def _paired(default_scores: str | Path, improved_scores: str | Path) -> Iterator[Row]:
    """Rows that both guards could judge, with both margins."""
    pairs = zip(read_table(default_scores, SCREENED), read_table(improved_scores, SCREENED), strict=True)
    for default, improved in pairs:
        if default["id"] != improved["id"]:
            raise GuardLoopError(
                "evaluate: the two score tables are not of the same test set", "screen one test set with both guards"
            )
        if default["margin"] is not None and improved["margin"] is not None:
            yield {**default, "default_margin": default["margin"], "improved_margin": improved["margin"]}


def _story(facts: Row, training_set: Path, adapter: Path) -> Any:
    """What the report tells of the run besides the evaluation."""
    from guardloop.guard.facts import guard_facts  # noqa: PLC0415
    from guardloop.report import HarvestStory, RunStory, Source, StageCounts  # noqa: PLC0415

    harvest = read_json(training_set / HARVEST, HarvestStory)
    mined = read_facts(training_set / EXAMPLES)
    trained = guard_facts(adapter).get("training", {})
    data = facts.get("data", {})
    judged = mined.get("judged", {}).get("data", {})
    return RunStory(
        run_id=os.environ.get("GUARDLOOP_RUN_ID", ""),
        created=datetime.now(UTC),
        configuration=os.environ.get("GUARDLOOP_CONFIGURATION", ""),
        dataset=Source(name=data.get("dataset", ""), revision=data.get("revision", "")),
        guard=Source(name=facts.get("guard", ""), revision=facts.get("revision", "")),
        responders=[Source(name=r["responder"], revision=r["revision"]) for r in judged.get("responders", [])],
        git_sha=os.environ.get("GUARDLOOP_GIT_SHA", ""),
        data_hash=data.get("hash", ""),
        counts=StageCounts(
            prompts=harvest.screened,
            flagged=harvest.screened - harvest.passed,
            passed=harvest.passed,
            responses=harvest.responses,
            refusals=harvest.refusals,
            blocked=harvest.blocked,
            positives=harvest.counts.get("positive", 0),
            hard_negatives=harvest.counts.get("hard_negative", 0),
            replay=sum(n for kind, n in harvest.counts.items() if kind.startswith("replay")),
        ),
        training={k: v for k, v in trained.items() if isinstance(v, int | float)},
    )


def _figures(training_set: Path) -> dict[str, float]:
    from guardloop.report import HarvestStory  # noqa: PLC0415

    harvest = read_json(training_set / HARVEST, HarvestStory)
    names = ("screened", "passed", "responses", "refusals", "blocked")
    figures = {f"harvest_{name}": float(getattr(harvest, name)) for name in names}
    return figures | {f"examples_{kind}": float(n) for kind, n in harvest.counts.items()}


def copy_file(source: str | Path, target: str | Path) -> None:
    """Copy one file of a stage's folder to where an artifact is expected."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
