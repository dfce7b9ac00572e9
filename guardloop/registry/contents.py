"""What is written into MLflow, as plain values: names of tags, parameters, metrics, and the text that people read."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import reduce
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from guardloop.core.errors import GuardLoopError
from guardloop.evaluation.result import Estimate, Evaluation
from guardloop.models.registered import DIGEST
from guardloop.report.markdown import render_markdown
from guardloop.report.story import RunStory, Source

VERDICT = "guardloop.gate_verdict"
HEADLINE = "guardloop.headline"
METRICS = "guardloop.metrics"
FORCE_REASON = "guardloop.force_reason"
PROMOTED_AT = "guardloop.promoted_at"
REPLACED = "guardloop.replaced"
EVALUATION_DIGEST = "guardloop.evaluation_sha256"
TEST_SET = "guardloop.test_set"
ALSO_RUNS = "guardloop.also_of_runs"
"""Of a version: later runs whose adapter and evaluation were the same."""
VERSION = "guardloop.version"
"""Of a run: the version that holds its adapter."""
NOTE = "mlflow.note.content"  # shown as the run's description

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "guard.json")
GUARDS = ("baseline", "candidate")
KEY_METRICS = ("baseline_auprc", "candidate_auprc", "change_auprc", "change_recall_near_baseline_fpr", "change_fpr")
MARKED_RUNS = 50
PARAM_LIMIT = 6000
PARAM_NAME_LIMIT = 250
NOT_IN_PARAM_NAMES = re.compile(r"[^\w. :-]")


class Origin(BaseModel):
    """What a run was made from. Every field becomes a tag."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    run_id: str
    """Identity of the pipeline run: what is recorded twice under one id is recorded once."""
    git_sha: str = ""
    """Commit of the code."""
    data_hash: str = ""
    """Hash of the prepared data."""
    base_model: str = ""
    base_revision: str = ""

    def tags(self) -> dict[str, str]:
        """The fields as MLflow tags, without the unknown ones."""
        return {f"guardloop.{name}": value for name, value in self if value}


class DataSource(BaseModel):
    """One data set that a run read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    digest: str
    """Hash of its content, or its pinned revision."""
    role: str = ""
    """What it was used for: traffic, training, test."""
    uri: str = ""


def params_of(sections: Mapping[str, Any]) -> dict[str, str]:
    """Settings by dotted name: `training.rank`. Lists become JSON; what MLflow cannot hold is cut."""
    named = ((NOT_IN_PARAM_NAMES.sub("_", name)[:PARAM_NAME_LIMIT], text) for name, text in _flat(sections, ""))
    return {name: text[:PARAM_LIMIT] for name, text in named}


def metrics_of(evaluation: Evaluation) -> dict[str, float]:
    """`baseline_*`, `candidate_*`, `change_*`, with `_low` and `_high`, and the number of rows; finite values only."""
    metrics = {"rows": float(evaluation.rows), "unsafe": float(evaluation.unsafe)}
    for guard in GUARDS:
        for name in ("threshold", "temperature", "median_label_mass", "unreadable"):
            metrics[f"{guard}_{name}"] = float(getattr(getattr(evaluation, guard), name))
    for name, both in evaluation.metrics.items():
        for side, estimate in both:
            metrics |= _ends(f"{side}_{name}", estimate)
    if evaluation.held_out:
        for name in ("caught", "newly_blocked", "control", "beyond_control"):
            metrics |= _ends(f"held_out_{name}", getattr(evaluation.held_out, name))
    for benchmark in evaluation.benchmarks:
        for name, both in benchmark.metrics.items():
            for side, estimate in both:
                metrics |= _ends(f"benchmark/{benchmark.name}/{name}_{side}", estimate)
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def version_tags(origin: Origin, evaluation: Evaluation, digest: str) -> dict[str, str]:
    """Tags of a registered version: where it comes from, what the gate said, and its key figures."""
    metrics = metrics_of(evaluation)
    kept = [name + end for name in KEY_METRICS for end in ("", "_low", "_high")]
    return origin.tags() | {
        VERDICT: evaluation.decision.verdict,
        HEADLINE: evaluation.decision.headline,
        METRICS: json.dumps({name: round(metrics[name], 6) for name in kept if name in metrics}),
        DIGEST: digest,
        EVALUATION_DIGEST: evaluation_digest(evaluation),
    }


def evaluation_digest(evaluation: Evaluation) -> str:
    """SHA-256 of an evaluation: the same where it came from a cache."""
    return sha256(evaluation.model_dump_json(exclude={"test_set_uses"}).encode()).hexdigest()


def mark(tags: Mapping[str, str], run_id: str) -> tuple[str, str]:
    """The tag by which a version is marked with one more run: the last ones, as many as a tag holds."""
    runs = [run for run in tags.get(ALSO_RUNS, "").split(", ") if run not in ("", run_id)]
    return ALSO_RUNS, ", ".join([*runs, run_id][-MARKED_RUNS:])


def key_metrics(tags: Mapping[str, str]) -> dict[str, float]:
    """What `version_tags` kept; earlier versions call the guards default and improved, and a change a gain."""
    kept: dict[str, float] = json.loads(tags.get(METRICS, "{}"))
    old = {"default_": "baseline_", "improved_": "candidate_", "gain_": "change_"}
    return {reduce(lambda n, pair: n.replace(*pair), old.items(), name): value for name, value in kept.items()}


def description(origin: Origin, evaluation: Evaluation) -> str:
    """The page of a run and of its version: decision, figures of both guards, the gate's checks, and the origin."""
    guard = Source(name=origin.base_model, revision=origin.base_revision)
    story = RunStory(run_id=origin.run_id, git_sha=origin.git_sha, data_hash=origin.data_hash, guard=guard)
    return render_markdown(evaluation, story)


def check_adapter(folder: Path) -> None:
    """Raise GuardLoopError if `folder` lacks one of an adapter's files."""
    if missing := [name for name in ADAPTER_FILES if not (folder / name).is_file()]:
        raise GuardLoopError(
            f"{folder} is not an adapter: it lacks {', '.join(missing)}", "give the folder that the train stage wrote"
        )


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, section in values.items():
        value = section.model_dump(mode="json") if isinstance(section, BaseModel) else section
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _ends(name: str, estimate: Estimate) -> dict[str, float]:
    ends = {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return {end: figure for end, figure in ends.items() if figure is not None}
