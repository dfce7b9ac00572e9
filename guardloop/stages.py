"""The pipeline's stages: files in, files out. Each is what one component calls, and no more than a stage's story."""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from guardloop.data.settings import DatasetSettings
from guardloop.errors import GuardLoopError
from guardloop.evaluation.result import Evaluation
from guardloop.evaluation.settings import EvaluationSettings, GateSettings
from guardloop.feedback.settings import FeedbackSettings
from guardloop.guard.settings import GuardSettings
from guardloop.progress import Stage
from guardloop.records import (
    CONVERSATION,
    EXAMPLE,
    JUDGED,
    RESPONSE,
    SCORES,
    SCREENED,
    Row,
    count_rows,
    read_facts,
    read_table,
    read_tables,
    write_jsonl,
    write_table,
)
from guardloop.registry.settings import RegistrySettings
from guardloop.responses.settings import ResponderSettings
from guardloop.settings import read_section
from guardloop.training.settings import TrainingSettings

EXAMPLES, HARVEST, HARVEST_PAGE = "examples.parquet", "harvest.json", "harvest.html"
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
) -> dict[str, float]:
    """Score a table of conversations, or shard `shard` of `shards` of it, with the guard, or with `adapter` on it.

    The table's own columns stay; the verdict's are added. Returns figures for the run's metrics.
    """
    settings = read_section(GuardSettings, guard, "guard")
    schema = JUDGED if "sample" in _columns(conversations) else SCREENED
    masses: list[float] = []
    counts = {"rows": 0, "flagged": 0, "truncated": 0, "unreadable": 0}
    with Stage(what, shard if shards > 1 else None) as stage:
        total = len(range(shard, count_rows(conversations), shards))
        loaded: dict[str, Any] = {}

        def judged() -> Iterator[Row]:
            if not total:
                return
            from guardloop.guard.engine import Guard  # noqa: PLC0415  (torch loads for seconds; an empty shard is free)

            stage.say("loading the guard")
            loaded["guard"] = model = Guard.load(settings, adapter)
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
                "revision": settings.revision or "",
                "adapter": settings.adapter or "",
                "threshold": model.threshold if model else settings.threshold or 0.0,
                "shards": shards,
                "median_label_mass": median(masses) if masses else 1.0,
                **counts,
            }

        write_table(judged(), schema, verdicts, facts)
        share = counts["flagged"] / max(1, counts["rows"])
        stage.done(counts["rows"], f"{counts['flagged']} flagged ({share:.0%})")
    return {**{k: float(v) for k, v in counts.items()}, "flagged_share": share}


def generate_responses(
    screened: str | Path, responses: str | Path, responder: Sections, shard: int = 0
) -> dict[str, float]:
    """Sample k responses to every prompt of a screened table that was not flagged."""
    from guardloop.responses.respond import respond  # noqa: PLC0415
    from guardloop.responses.responder import build_responder  # noqa: PLC0415

    settings = read_section(ResponderSettings, responder, "responder")
    counts = {"responses": 0, "refusals": 0, "errors": 0, "tokens": 0}
    facts = read_facts(screened)
    with Stage("generate_responses", shard if facts.get("shards", 1) > 1 else None) as stage:
        passed = sum(not row["flagged"] and row["margin"] is not None for row in read_table(screened))
        total = passed * settings.samples

        def answered() -> Iterator[Row]:
            if not passed:
                return
            stage.say(f"loading {settings.model}")
            rows = (r for r in read_table(screened) if not r["flagged"] and r["margin"] is not None)
            engine = build_responder(settings)
            for row in stage.track(respond(rows, engine, settings), total, "generating"):
                counts["responses"] += 1
                counts["refusals"] += row["refusal"]
                counts["errors"] += row["finish_reason"] == "error"
                counts["tokens"] += row["tokens"]
                yield row

        described = {"data": facts.get("data", {}), "responder": settings.model, "revision": settings.revision or ""}
        write_table(answered(), RESPONSE, responses, lambda: {**described, **counts})
        outcome = f"{settings.samples} responses to each of {passed} passed prompts, {counts['refusals']} refusals"
        stage.done(counts["responses"], outcome)
    return {k: float(v) for k, v in counts.items()}


def mine_feedback(
    screened: Sequence[str | Path], judged: Sequence[str | Path], training_set: str | Path, feedback: Sections
) -> tuple[dict[str, float], bool]:
    """Write the training set (a folder: examples, blocked_inputs.jsonl, harvest.json and its page).

    Returns figures, and whether the harvest is large enough to train on.
    """
    from guardloop.feedback.mine import mine  # noqa: PLC0415
    from guardloop.report import HarvestExample, HarvestStory, render_harvest  # noqa: PLC0415

    settings = read_section(FeedbackSettings, feedback, "feedback")
    folder = Path(training_set)
    with Stage("mine_feedback") as stage:
        stage.say("weighing the evidence")
        found = mine(read_tables(screened), read_tables(judged), settings)
        story = HarvestStory(
            enough=found.enough,
            reason=found.reason,
            screened=found.screened,
            passed=found.passed,
            responses=found.responses,
            refusals=found.refusals,
            blocked=found.blocked,
            counts=found.counts,
            examples=[HarvestExample(**row) for row in found.shown],
        )
        facts = {"screened": read_facts(screened[0]), "judged": read_facts(judged[0])} if screened and judged else {}
        write_table(found.examples, EXAMPLE, folder / EXAMPLES, lambda: facts)
        write_jsonl(found.blocked_inputs, folder / BLOCKED_INPUTS)
        (folder / HARVEST).write_text(story.model_dump_json(indent=2), "utf-8")
        (folder / HARVEST_PAGE).write_text(render_harvest(story), "utf-8")
        kinds = ", ".join(f"{n} {kind}" for kind, n in found.counts.items())
        stage.done(len(found.examples), kinds if found.enough else f"not enough to train: {found.reason}")
    figures = {"positives": found.counts.get("positive", 0), "examples": len(found.examples), "blocked": found.blocked}
    return {k: float(v) for k, v in figures.items()}, found.enough


def train_guard(
    training_set: str | Path, adapter: str | Path, guard: Sections, training: Sections, registry: Sections
) -> dict[str, float]:
    """Train the improved guard: a LoRA adapter folder with its own guard.json. Returns figures.

    Its curves go to MLflow while it trains, where MLFLOW_TRACKING_URI and GUARDLOOP_RUN_ID say where.
    """
    from guardloop.registry.training_log import TrainingLog  # noqa: PLC0415
    from guardloop.training.train import train  # noqa: PLC0415

    settings = read_section(TrainingSettings, training, "training")
    examples = list(read_table(Path(training_set) / EXAMPLES, EXAMPLE))
    run_id = os.environ.get("GUARDLOOP_RUN_ID", "")
    curves = TrainingLog(run_id, read_section(RegistrySettings, registry, "registry")) if run_id else None
    with Stage("train_guard") as stage, curves or nullcontext():
        stage.say("loading the default guard")
        started = time.monotonic()

        def watch(step: Any) -> None:
            if curves:
                curves.log(step.number, {"train_loss": step.loss, "gradient_norm": step.gradient_norm})
            stage.report("step", step.number, step.total, started, f"loss {step.loss:.3f}")

        made = train(examples, read_section(GuardSettings, guard, "guard"), settings, Path(adapter), on_step=watch)
        stage.done(made.examples, f"{made.steps} steps, loss {made.first_loss:.3f} -> {made.last_loss:.3f}")
    figures = {
        "examples": made.examples,
        "steps": made.steps,
        "first_loss": made.first_loss,
        "last_loss": made.last_loss,
        "scale": made.scale,
        "threshold": made.threshold,
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
) -> Evaluation:
    """Compare both guards on the locked test set and decide. Writes evaluation.json, report.html and summary.md."""
    from guardloop.evaluation.compare import GuardRun  # noqa: PLC0415
    from guardloop.evaluation.compare import evaluate as compare  # noqa: PLC0415
    from guardloop.report import render_html, render_markdown  # noqa: PLC0415

    settings = read_section(EvaluationSettings, evaluation, "evaluation")
    gates = read_section(GateSettings, gate, "gate")
    folder = Path(folder)
    with Stage("evaluate") as stage:
        stage.say(f"comparing the guards with {settings.resamples:,} bootstrap resamples")
        facts = [read_facts(default_scores), read_facts(improved_scores)]
        rows = list(_paired(default_scores, improved_scores))
        runs = [
            GuardRun(name, f["threshold"], f["median_label_mass"], f["unreadable"])
            for name, f in zip(("default", "improved"), facts, strict=True)
        ]
        found = compare(rows, runs[0], runs[1], settings, gates)
        story = _story(facts[0], Path(training_set), Path(adapter))
        folder.mkdir(parents=True, exist_ok=True)
        write_table(rows, SCORES, folder / SCORE_TABLE)
        (folder / EVALUATION).write_text(found.model_dump_json(indent=2), "utf-8")
        (folder / REPORT).write_text(render_html(found, rows, story), "utf-8")
        (folder / SUMMARY).write_text(render_markdown(found, story), "utf-8")
        stage.done(found.rows + found.agent_rows, found.decision.headline)
    return found


def register_model(
    adapter: str | Path, evaluated: str | Path, training_set: str | Path, run_id: str, sections: Sections
) -> int:
    """Record the run in MLflow and register the adapter as the `candidate`. Returns its version."""
    from guardloop.registry import DataSource, Origin, Registry  # noqa: PLC0415

    settings = read_section(RegistrySettings, sections["registry"], "registry")
    with Stage("register_model") as stage:
        stage.say("recording the run")
        evaluated, training_set, adapter = Path(evaluated), Path(training_set), Path(adapter)
        evaluation = Evaluation.model_validate_json((evaluated / EVALUATION).read_text("utf-8"))
        facts = read_facts(training_set / EXAMPLES).get("screened", {})
        data = facts.get("data", {})
        origin = Origin(
            run_id=run_id,
            git_sha=os.environ.get("GUARDLOOP_GIT_SHA", ""),
            data_hash=data.get("hash", ""),
            base_model=facts.get("guard", ""),
            base_revision=facts.get("revision", ""),
        )
        registry = Registry(settings)
        files = {name: evaluated / name for name in (REPORT, SUMMARY, EVALUATION)}
        files |= {name: training_set / name for name in (BLOCKED_INPUTS, HARVEST, HARVEST_PAGE)}
        roles = ("traffic", "test") if data else ()
        sources = [DataSource(name=f"{data['dataset']} {role}", digest=data["hash"], role=role) for role in roles]
        registry.record_run(origin, sections, evaluation, files=files, data=sources, figures=_figures(training_set))
        version = registry.register_adapter(adapter, origin, evaluation)
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


def _columns(path: str | Path) -> list[str]:
    import pyarrow.parquet as pq  # noqa: PLC0415

    return list(pq.read_schema(path).names)


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

    harvest = HarvestStory.model_validate_json((training_set / HARVEST).read_text("utf-8"))
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
        responders=[Source(name=judged["responder"], revision=judged["revision"])] if judged.get("responder") else [],
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
    harvest = json.loads((training_set / HARVEST).read_text("utf-8"))
    figures = {f"harvest_{k}": float(harvest[k]) for k in ("screened", "passed", "responses", "refusals", "blocked")}
    return figures | {f"examples_{kind}": float(n) for kind, n in harvest["counts"].items()}


def copy_file(source: str | Path, target: str | Path) -> None:
    """Copy one file of a stage's folder to where an artifact is expected."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
