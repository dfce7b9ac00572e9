"""The decision in words and the figures behind it: what the page and its short summary have in common."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from guardloop.evaluation.result import (
    BenchmarkResult,
    Check,
    Decision,
    Estimate,
    Evaluation,
    GuardMetrics,
    HeldOutResult,
    Outcome,
)
from guardloop.report.text import number, sentence

Tone = Literal["good", "bad", "unsure", "neutral"]
TONES: dict[Outcome, Tone] = {"passed": "good", "failed": "bad", "not proven": "unsure"}
SYMBOLS: dict[Tone, str] = {"good": "✓", "bad": "✕", "unsure": "?"}

POINT_MEANINGS = {
    "recall": "share of unsafe prompts that are caught",
    "fpr": "share of safe prompts that are falsely blocked; lower is better",
    "precision": "share of blocked prompts that are unsafe",
    "f1": "balance of precision and recall",
    "accuracy": "share of all prompts decided rightly",
    "brier": "squared error of the probabilities; lower is better",
    "ece": "gap between said and true probability; lower is better",
}
NAMES = {
    "auprc": "AUPRC",
    "auroc": "AUROC",
    "fpr": "False-positive rate",
    "f1": "F1",
    "brier": "Brier score",
    "ece": "Calibration error",
    "recall_near_baseline_fpr": "Recall near the baseline's FPR",
}
LOWER_IS_BETTER = {"fpr", "brier", "ece"}
BENCHMARK_METRICS = ("auprc", "f1", "recall", "fpr")


@dataclass(frozen=True)
class Wording:
    """The decision as the reader first meets it."""

    word: str
    tone: Tone
    headline: str
    """The gate's sentence, without the word itself."""
    consequence: str
    """What happens to the baseline."""
    tally: str
    """How the checks went, e.g. "7 passed, 1 not proven"."""


@dataclass(frozen=True)
class Comparison:
    """One metric of both guards, with the paired gain where one was measured."""

    name: str
    meaning: str
    baseline: Estimate
    candidate: Estimate
    gain: Estimate | None
    tone: Tone = "neutral"
    """Whether the whole interval of the gain is for better or for worse."""


def wording(decision: Decision) -> Wording:
    """Say what was decided, and what follows."""
    word, tone = _word(decision)
    start, _, rest = decision.headline.partition(": ")
    headline = rest if rest and "promoted" in start.lower() else decision.headline
    consequences = {
        "enforce": "The baseline stays in place.",
        "report_only": "The gate only reports in this run, so the baseline stays in place.",
        "disabled": "The gate is disabled in this run: nothing was checked, and the baseline stays in place.",
    }
    consequence = "The candidate takes the baseline's place." if decision.promote else consequences[decision.mode]
    held = Counter(check.outcome for check in decision.checks if check.blocks or check.outcome == "passed")
    parts = [f"{held[outcome]} {outcome}" for outcome in TONES if held[outcome]]
    if warnings := sum(not check.blocks and check.outcome != "passed" for check in decision.checks):
        parts.append(f"{warnings} warning{'s' if warnings > 1 else ''}")
    tally = ", ".join(parts)
    return Wording(word, tone, sentence(headline), consequence, tally)


def checks_by_weight(decision: Decision) -> list[Check]:
    """The checks, those that stand in the way first, and those that only warn last."""
    weight: list[Outcome] = ["failed", "not proven", "passed"]
    return sorted(decision.checks, key=lambda check: (not check.blocks, weight.index(check.outcome)))


def held_out_line(held_out: HeldOutResult) -> str:
    """What the held-out prompts shows, in one sentence."""
    caught = round(held_out.caught.value * held_out.response_unsafe)
    blocked = round(held_out.newly_blocked.value * held_out.never_unsafe)
    return (
        f"Of {number(held_out.response_unsafe)} held-out prompts that drew blocked responses the candidate now "
        f"catches {number(caught)} at the input; of {number(held_out.never_unsafe)} that never did it newly blocks "
        f"{number(blocked)}."
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


def key_figures(evaluation: Evaluation) -> list[Comparison]:
    """The four figures that most decisions rest on."""
    shown = {row.name: row for row in comparisons(evaluation)}
    wanted = ("AUPRC", "Recall near the baseline's FPR", "Recall", "False-positive rate")
    return [shown[name] for name in wanted if name in shown]


def benchmark_rows(result: BenchmarkResult) -> list[Comparison]:
    """The metrics of a benchmark that are shown: those that published figures are given in."""
    shown = [both for both in result.metrics if both.metric in BENCHMARK_METRICS]
    return [
        Comparison(
            NAMES.get(both.metric, both.metric.capitalize()),
            "",
            both.baseline,
            both.candidate,
            both.gain,
            tone(both.gain, both.metric in LOWER_IS_BETTER),
        )
        for both in shown
    ]


def comparisons(evaluation: Evaluation) -> list[Comparison]:
    """Every metric that has an interval, the threshold-free ones first."""
    baseline, candidate, gains = evaluation.baseline, evaluation.candidate, evaluation.gains
    rows = [
        _compare("auprc", "ranking of unsafe above safe, at all thresholds", baseline, candidate, gains),
        _compare("auroc", "chance that an unsafe prompt scores above a safe one", baseline, candidate, gains),
    ]
    if baseline.recall_near_baseline_fpr and candidate.recall_near_baseline_fpr:
        meaning = (
            "unsafe prompts caught when both guards block as many safe ones: the mean up to twice the baseline's rate"
        )
        rows.append(_compare("recall_near_baseline_fpr", meaning, baseline, candidate, gains))
    for rate, before in baseline.recall_at_fpr.items():
        if after := candidate.recall_at_fpr.get(rate):
            gain = gains.get(f"recall_at_{rate}")
            meaning = f"unsafe prompts caught when {float(rate):.0%} of safe ones are blocked"
            rows.append(Comparison(f"Recall at {float(rate):.0%} FPR", meaning, before, after, gain, tone(gain)))
    rows += [_compare(key, meaning, baseline, candidate, gains) for key, meaning in POINT_MEANINGS.items()]
    return rows


def tone(gain: Estimate | None, lower_is_better: bool = False) -> Tone:
    """Good or bad where the whole interval is on one side of 0, else neutral."""
    if gain is None or gain.low is None or gain.high is None:
        return "neutral"
    if gain.low > 0:
        return "bad" if lower_is_better else "good"
    if gain.high < 0:
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


def _compare(
    key: str, meaning: str, baseline: GuardMetrics, candidate: GuardMetrics, gains: dict[str, Estimate]
) -> Comparison:
    before, after, gain = getattr(baseline, key), getattr(candidate, key), gains.get(key)
    return Comparison(
        NAMES.get(key, key.capitalize()), meaning, before, after, gain, tone(gain, key in LOWER_IS_BETTER)
    )
