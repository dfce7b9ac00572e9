"""What is written into MLflow, as plain values: names of tags, parameters, metrics, and the text that people read."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from guardloop.core.errors import GuardLoopError
from guardloop.evaluation.result import Check, Estimate, Evaluation, GuardMetrics
from guardloop.models.registered import DIGEST

VERDICT = "guardloop.gate_verdict"
HEADLINE = "guardloop.headline"
METRICS = "guardloop.metrics"
FORCE_REASON = "guardloop.force_reason"
PROMOTED_AT = "guardloop.promoted_at"
REPLACED = "guardloop.replaced"
NOTE = "mlflow.note.content"  # shown as the run's description

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "guard.json")
KEY_METRICS = ("baseline_auprc", "candidate_auprc", "gain_auprc", "gain_recall_near_baseline_fpr", "gain_fpr")
PARAM_LIMIT = 6000
PARAM_NAME_LIMIT = 250
NOT_IN_PARAM_NAMES = re.compile(r"[^\w. :-]")
TABLE = {
    "auprc": "AUPRC",
    "auroc": "AUROC",
    "recall": "recall",
    "precision": "precision",
    "f1": "F1",
    "fpr": "false-positive rate",
    "accuracy": "accuracy",
    "brier": "Brier score",
    "ece": "calibration error",
}


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
    """`default_*`, `candidate_*` and `gain_*` with `_low` and `_high`, and the number of rows; finite values only."""
    metrics = {"rows": float(evaluation.rows), "unsafe": float(evaluation.unsafe)}
    for prefix, guard in (("baseline", evaluation.baseline), ("candidate", evaluation.candidate)):
        for name, value in _guard_values(guard):
            metrics |= _spread(f"{prefix}_{name}", value)
    for name, gain in evaluation.gains.items():
        metrics |= _spread(f"gain_{name}", gain)
    if evaluation.held_out:
        for name in ("caught", "newly_blocked", "control", "beyond_control"):
            metrics |= _spread(f"held_out_{name}", getattr(evaluation.held_out, name))
    for benchmark in evaluation.benchmarks:
        for both in benchmark.metrics:
            name = f"benchmark/{benchmark.name}/{both.metric}"
            for side, estimate in (("baseline", both.baseline), ("candidate", both.candidate), ("gain", both.gain)):
                metrics |= _spread(f"{name}_{side}", estimate)
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
    }


def description(origin: Origin, evaluation: Evaluation) -> str:
    """The version's page in the registry: headline, figures of both guards, the gate's checks, and the origin."""
    decision = evaluation.decision
    lines = [
        f"**{decision.verdict.upper()}**: {_cell(decision.headline)}",
        "",
        f"| metric | baseline | candidate | gain ({evaluation.interval}) |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, words in TABLE.items():
        baseline, candidate = getattr(evaluation.baseline, name), getattr(evaluation.candidate, name)
        gain = evaluation.gains.get(name)
        lines.append(f"| {words} | {baseline.value:.3f} | {candidate.value:.3f} | {_gain(gain)} |")
    if gain := evaluation.gains.get("recall_near_baseline_fpr"):
        lines.append(f"| recall near the baseline's false-positive rate | | | {_gain(gain)} |")
    lines += ["", f"Test set: {evaluation.rows:,} conversations, {evaluation.unsafe:,} of them unsafe."]
    if found := evaluation.held_out:
        lines += [
            "",
            f"Held-out prompts: {found.caught.value:.1%} of {found.response_unsafe:,} prompts that drew blocked "
            f"responses are caught at the input ({found.control.value:.1%} by a lower threshold of the baseline), "
            f"and {found.newly_blocked.value:.1%} of {found.never_unsafe:,} that never did are newly blocked.",
        ]
    if decision.checks:
        lines += ["", "| check | outcome | why |", "| --- | --- | --- |"]
        lines += [f"| {_cell(c.name)} | {_outcome(c)} | {_cell(c.explanation)} |" for c in decision.checks]
    lines += ["", *(f"- {name.replace('_', ' ')}: `{value}`" for name, value in origin if value)]
    return "\n".join(lines)


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


def _guard_values(guard: GuardMetrics) -> Iterator[tuple[str, Estimate | float]]:
    for name, value in guard:
        if isinstance(value, Estimate | float | int):
            yield name, value
        elif isinstance(value, dict):
            yield from ((f"{name}_{key}", estimate) for key, estimate in value.items())


def _spread(name: str, value: Estimate | float) -> dict[str, float]:
    if not isinstance(value, Estimate):
        return {name: float(value)}
    ends = {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
    return {end: figure for end, figure in ends.items() if figure is not None}


def _outcome(check: Check) -> str:
    return check.outcome if check.blocks or check.outcome == "passed" else f"warning: {check.outcome}"


def _gain(gain: Estimate | None) -> str:
    if gain is None:
        return ""
    interval = "" if gain.low is None or gain.high is None else f" ({gain.low:+.3f} to {gain.high:+.3f})"
    return f"{gain.value:+.3f}{interval}"


def _cell(text: str) -> str:
    """One line of plain text: it may name a category or source, which come from the data."""
    from guardloop.report.text import markdown  # noqa: PLC0415  (images that only read the registry have no report)

    return markdown(text)
