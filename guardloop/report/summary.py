"""The decision in words and the figures behind it: what the pages, the summary and the terminal have in common."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from guardloop.evaluation.result import Comparison, Decision, Estimate, Evaluation, GateCheck, HeldOutResult, Outcome
from guardloop.evaluation.wording import METRICS
from guardloop.report.text import number

Tone = Literal["good", "bad", "unsure", "neutral"]
TONES: dict[Outcome, Tone] = {"passed": "good", "failed": "bad", "not proven": "unsure"}
SYMBOLS: dict[Tone, str] = {"good": "✓", "bad": "✕", "unsure": "?"}
KEY_METRICS = ("auprc", "recall_near_baseline_fpr", "recall", "fpr")
"""What most decisions rest on."""
USES = "<!-- uses of the test set -->"
"""In a page: where it will say how often the test set was used, once the run is recorded."""
BENCHMARK_METRICS = ("auprc", "f1", "recall", "fpr")
"""What published figures are given in."""


@dataclass(frozen=True)
class Wording:
    """The decision as the reader first meets it."""

    word: str
    tone: Tone
    headline: str
    tally: str
    """How the checks went, e.g. "7 passed, 1 not proven"."""


@dataclass(frozen=True)
class MetricRow:
    """One metric of both guards, in words."""

    name: str
    meaning: str
    baseline: Estimate
    candidate: Estimate
    change: Estimate
    tone: Tone
    """Whether the whole interval of the change is for better or for worse."""


def wording(decision: Decision) -> Wording:
    """Say what was decided."""
    word, tone = _word(decision)
    outcomes = Counter(check.outcome for check in decision.checks if check.blocks or check.outcome == "passed")
    parts = [f"{outcomes[outcome]} {outcome}" for outcome in TONES if outcomes[outcome]]
    if warnings := len(decision.checks) - sum(outcomes.values()):
        parts.append(f"{warnings} warning{'s' if warnings > 1 else ''}")
    return Wording(word, tone, decision.headline, ", ".join(parts))


def checks_by_weight(decision: Decision) -> list[GateCheck]:
    """The checks, those that stand in the way first, and those that only warn last."""
    weight: list[Outcome] = ["failed", "not proven", "passed"]
    return sorted(decision.checks, key=lambda check: (not check.blocks, weight.index(check.outcome)))


def held_out_line(held_out: HeldOutResult | None) -> str:
    """What the held-out prompts show, in one sentence; empty where there are none."""
    if held_out is None:
        return ""
    caught = round(held_out.caught.value * held_out.response_unsafe)
    blocked = round(held_out.newly_blocked.value * held_out.never_unsafe)
    return (
        f"Of {number(held_out.response_unsafe)} held-out prompts that drew blocked responses the candidate catches "
        f"{number(caught)}; of {number(held_out.never_unsafe)} that never did it blocks {number(blocked)}."
    )


def outcome_line(evaluation: Evaluation) -> str:
    """What changes for the people behind the prompts, in one sentence."""
    (_, baseline_blocked), (_, baseline_caught) = evaluation.baseline.confusion
    (safe_passed, blocked), (missed, caught) = evaluation.candidate.confusion
    return (
        f"At its threshold the candidate catches {number(caught)} of {number(missed + caught)} unsafe prompts "
        f"(baseline: {number(baseline_caught)}) and falsely blocks {number(blocked)} of "
        f"{number(safe_passed + blocked)} safe ones (baseline: {number(baseline_blocked)})."
    )


def metric_rows(metrics: Mapping[str, Comparison], wanted: Iterable[str] = METRICS) -> list[MetricRow]:
    """The metrics that were measured, in the order of `wanted`."""
    rows = []
    for key in wanted:
        if both := metrics.get(key):
            name, meaning, lower_is_better = METRICS[key]
            colour = tone(both.change, lower_is_better)
            rows.append(MetricRow(name, meaning, both.baseline, both.candidate, both.change, colour))
    return rows


def tone(change: Estimate, lower_is_better: bool = False) -> Tone:
    """Good or bad where the whole interval is on one side of 0, else neutral."""
    if change.low is None or change.high is None:
        return "neutral"
    if change.low > 0:
        return "bad" if lower_is_better else "good"
    if change.high < 0:
        return "good" if lower_is_better else "bad"
    return "neutral"


def _word(decision: Decision) -> tuple[str, Tone]:
    if decision.promote:
        return "Promoted", "good" if decision.verdict == "passed" else "unsure"
    if decision.mode == "disabled":
        return "Not promoted", "unsure"
    if decision.verdict == "not proven":
        return "Not proven", "unsure"
    if decision.mode == "report_only":
        return ("Would be promoted", "good") if decision.verdict == "passed" else ("Would not be promoted", "bad")
    return "Not promoted", "bad" if decision.verdict == "failed" else "unsure"
