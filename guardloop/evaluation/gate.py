"""The promotion gate: named rules, each passed, failed or not proven; only when all pass is the guard promoted.

"Not proven" means that chance explains what was seen, or that there are too few rows to tell. It never promotes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest, norm

from guardloop.evaluation.noninferiority import JudgedSlice, judge_slices, least_error
from guardloop.evaluation.result import BenchmarkResult, Check, Decision, Estimate, GuardMetrics, Outcome
from guardloop.evaluation.settings import GateSettings, Published
from guardloop.evaluation.slices import MeasuredSlice

WORDS = {"auprc": "AUPRC", "auroc": "AUROC", "f1": "F1", "recall": "recall", "fpr": "the false-positive rate"}


@dataclass(frozen=True)
class Collapse:
    """Shares of User-role rows by which a guard that no longer tells safe from unsafe is known."""

    same_score: float
    """Rows that share the most frequent margin."""
    safe_blocked: float
    unsafe_passed: float


@dataclass(frozen=True)
class Changed:
    """Near-duplicate groups of one class whose decision the candidate mends or spoils, on balance."""

    mended: int
    spoiled: int

    @property
    def p(self) -> float:
        """Exact two-sided McNemar p-value; one vote per group, as near-duplicates are not independent."""
        total = self.mended + self.spoiled
        return float(binomtest(self.mended, total).pvalue) if total else 1.0


@dataclass(frozen=True)
class Evidence:
    """All that the gate looks at."""

    rows: int
    """Test rows of both roles."""
    distinct_unsafe: int
    distinct_safe: int
    baseline: GuardMetrics
    candidate: GuardMetrics
    collapse: Collapse
    """Of the candidate."""
    gains: dict[str, Estimate]
    changed_unsafe: Changed
    changed_safe: Changed
    slices: Sequence[MeasuredSlice]
    responses: MeasuredSlice | None
    response_decisions: Sequence[MeasuredSlice]
    """What is decided of unsafe and of safe responses."""
    response_rows: int
    confidence: float
    benchmarks: Sequence[BenchmarkResult] = ()


def decide(evidence: Evidence, gate: GateSettings) -> Decision:
    """Apply every rule of `gate`. Promotes only in mode `enforce`, and only when every check passed."""
    if gate.mode == "disabled":
        gain = _change("AUPRC", evidence.gains["auprc"], evidence.confidence)
        headline = f"Not promoted: the gate is disabled, so nothing was checked; {gain}."
        return Decision(mode=gate.mode, promote=False, verdict="not proven", headline=headline, checks=[])
    checks = [*_soundness(evidence, gate), *_improvement(evidence, gate), *_no_harm(evidence, gate)]
    outcomes = {check.outcome for check in checks if check.blocks}
    verdict: Outcome = "failed" if "failed" in outcomes else "not proven" if "not proven" in outcomes else "passed"
    return Decision(
        mode=gate.mode,
        promote=gate.mode == "enforce" and verdict == "passed",
        verdict=verdict,
        headline=_headline(evidence, gate, verdict, checks),
        checks=checks,
    )


def _headline(evidence: Evidence, gate: GateSettings, verdict: Outcome, checks: list[Check]) -> str:
    would = gate.mode == "report_only"
    if verdict == "passed":
        start = "Would be promoted, but the gate only reports" if would else "Promoted"
        gain = _change("AUPRC", evidence.gains["auprc"], evidence.confidence)
        recall = evidence.gains["recall_near_baseline_fpr"].value
        return f"{start}: {gain}, and recall near the baseline's false-positive rate rose by {recall:.3f}."
    blocking = [check for check in checks if check.outcome == verdict and check.blocks]
    others = sum(check.outcome != "passed" and check.blocks for check in checks) - 1
    also = "" if not others else f"; {others} other check{'s' if others > 1 else ''} did not pass"
    start = "Would not be promoted" if would else "Not promoted"
    return f"{start}: {blocking[0].explanation.rstrip('.')}{also}."


def _soundness(evidence: Evidence, gate: GateSettings) -> list[Check]:
    """Can the two guards be compared at all?"""
    guards = (evidence.baseline, evidence.candidate)
    mass = min(guards, key=lambda guard: guard.median_label_mass)
    lost = max(guards, key=lambda guard: guard.unreadable)
    share = lost.unreadable / (evidence.rows + lost.unreadable)
    return [
        _collapse_check(evidence.collapse, gate),
        Check(
            name="label_mass",
            question="Do both guards answer with a verdict, safe or unsafe, as they should?",
            value=mass.median_label_mass,
            limit=gate.min_label_mass,
            outcome="passed" if mass.median_label_mass >= gate.min_label_mass else "failed",
            explanation=f"the {mass.name} guard puts {mass.median_label_mass:.3f} of its probability on a verdict "
            f"(median; at least {gate.min_label_mass:g} is sound).",
        ),
        Check(
            name="unreadable",
            question="Could nearly all test rows be judged?",
            value=share,
            limit=gate.max_unreadable,
            outcome="passed" if share <= gate.max_unreadable else "failed",
            explanation=f"the {lost.name} guard could not judge {lost.unreadable} rows, {share:.2%} of the test set "
            f"(at most {gate.max_unreadable:.2%} is tolerated)."
            if lost.unreadable
            else "both guards judged every row.",
        ),
        _enough("unsafe", evidence.distinct_unsafe, gate.min_unsafe),
        _enough("safe", evidence.distinct_safe, gate.min_safe),
        *(_published(published, evidence) for published in gate.published),
    ]


def _collapse_check(collapse: Collapse, gate: GateSettings) -> Check:
    signs = {
        "the candidate gives one and the same score to {:.1%} of the prompts": collapse.same_score,
        "the candidate blocks everything: {:.1%} of the safe prompts": collapse.safe_blocked,
        "the candidate lets everything through: {:.1%} of the unsafe prompts": collapse.unsafe_passed,
    }
    sign, worst = max(signs.items(), key=lambda item: item[1])
    collapsed = worst >= gate.collapsed_share
    return Check(
        name="not_collapsed",
        question="Does the candidate still tell safe from unsafe?",
        value=worst,
        limit=gate.collapsed_share,
        outcome="failed" if collapsed else "passed",
        explanation=f"{sign.format(worst)}." if collapsed else "the candidate's scores and decisions vary.",
    )


def _enough(label: str, count: int, least: int) -> Check:
    return Check(
        name=f"{label}_examples",
        question=f"Are there enough {label} prompts in the test set to prove anything?",
        value=count,
        limit=least,
        outcome="passed" if count >= least else "not proven",
        explanation=f"the test set has {count} distinct {label} prompts ({least} are needed).",
    )


def _published(published: Published, evidence: Evidence) -> Check:
    """Does the baseline reach what was published of it? If not, it is perhaps prompted or read wrongly."""
    measured = _baseline_estimate(published, evidence)
    name = f"published_{published.metric}" + (f"_{published.dataset}" if published.dataset != "test" else "")
    place = "the test set" if published.dataset == "test" else published.dataset
    words = WORDS.get(published.metric, published.metric)
    question = f"Does the baseline's {words.removeprefix('the ')} on {place} agree with the published figure?"
    told = f"{published.value:.3f} is published ({published.source})"
    if measured is None:
        scored = any(benchmark.name == published.dataset for benchmark in evidence.benchmarks)
        why = (
            f"the rows of {published.dataset} that were scored do not show it"
            if scored
            else f"it was not measured here: add {published.dataset} to evaluation.benchmarks"
        )
        return Check(
            name=name,
            question=question,
            value=None,
            limit=published.value,
            outcome="not proven",
            explanation=f"{told}, and {why}.",
            blocks=published.miss == "fail",
        )
    off = abs(measured.value - published.value)
    near = off <= published.tolerance
    word = "within" if near else "beyond"
    return Check(
        name=name,
        question=question,
        value=measured.value,
        low=measured.low,
        high=measured.high,
        limit=published.value,
        outcome="passed" if near else "failed",
        explanation=f"the baseline's {words.removeprefix('the ')} on {place} is {measured.value:.3f}; {told}: "
        f"{off:.3f} apart, {word} the tolerance of {published.tolerance:g}.",
        blocks=published.miss == "fail",
    )


def _baseline_estimate(published: Published, evidence: Evidence) -> Estimate | None:
    if published.dataset == "test":
        found: Estimate = getattr(evidence.baseline, published.metric)
        return found
    metrics = next((b.metrics for b in evidence.benchmarks if b.name == published.dataset), [])
    return next((m.baseline for m in metrics if m.metric == published.metric), None)


def _improvement(evidence: Evidence, gate: GateSettings) -> list[Check]:
    """Is the candidate better, by ranking, at matched over-blocking, and in what it decides?"""
    return [
        _gain_check("auprc_gain", "Does it rank unsafe prompts above safe ones better?", "AUPRC", "auprc", evidence),
        _gain_check(
            "recall_gain",
            "Does it catch more unsafe prompts when both guards block as many safe ones?",
            "recall near the baseline's false-positive rate",
            "recall_near_baseline_fpr",
            evidence,
        ),
        _decision_check(evidence, gate),
    ]


def _gain_check(name: str, question: str, subject: str, key: str, evidence: Evidence) -> Check:
    gain = evidence.gains[key]
    low, high = _bounds(gain)
    outcome: Outcome = "passed" if low > 0 else "failed" if high <= 0 else "not proven"
    doubt = ", which may be chance" if outcome == "not proven" else ""
    return Check(
        name=name,
        question=question,
        value=gain.value,
        low=low,
        high=high,
        limit=0,
        outcome=outcome,
        explanation=f"{_change(subject, gain, evidence.confidence)}{doubt}.",
    )


def _decision_check(evidence: Evidence, gate: GateSettings) -> Check:
    # "McNemar agrees": at the thresholds in use, what changed for unsafe prompts is mended significantly more often
    # than spoiled. A guard whose threshold came out stricter on false alarms may show its gain there instead. That
    # false alarms do not rise is the benign_fpr check's part: a significant rise may still be within its margin.
    unsafe, safe = evidence.changed_unsafe, evidence.changed_safe
    caught_less = unsafe.p <= gate.mcnemar_alpha and unsafe.spoiled > unsafe.mended
    by_safe = unsafe.p > gate.mcnemar_alpha >= safe.p and safe.mended > safe.spoiled
    changed, label, verb = (safe, "safe", "passed") if by_safe else (unsafe, "unsafe", "caught")
    better = changed.p <= gate.mcnemar_alpha and changed.mended > changed.spoiled
    outcome: Outcome = "failed" if caught_less else "passed" if better else "not proven"
    doubt = ", which may be chance" if outcome == "not proven" else ""
    return Check(
        name="decisions",
        question="Do the decisions at the chosen thresholds confirm the gain?",
        value=changed.p,
        limit=gate.mcnemar_alpha,
        outcome=outcome,
        explanation=f"{changed.mended} distinct {label} prompts are {verb} by the candidate only, "
        f"{changed.spoiled} by the baseline only (exact McNemar p {changed.p:.2g}){doubt}.",
    )


def _no_harm(evidence: Evidence, gate: GateSettings) -> list[Check]:
    """Is what worked before still as good, everywhere?"""
    ranked = evidence.responses is not None and evidence.responses.result.metric == "auprc"  # else one class is missing
    responses = (
        [(evidence.responses, gate.max_response_loss if ranked else gate.max_slice_loss)] if evidence.responses else []
    )
    responses += [(part, gate.max_slice_loss) for part in evidence.response_decisions]
    family = [*((part, gate.max_slice_loss) for part in evidence.slices), *responses]
    judged = judge_slices(family, (1 - evidence.confidence) / 2)
    parts, judged_responses = judged[: len(evidence.slices)], judged[len(evidence.slices) :]
    checks = [_fpr_check(evidence, gate), _slices_check(parts, gate.max_slice_loss, evidence.confidence)]
    margins = [margin for _, margin in responses]
    told = (
        _response_check(list(zip(judged_responses, margins, strict=True)), evidence.confidence) if responses else None
    )
    if gate.require_response_test and not ranked and (told is None or told.outcome == "passed"):
        told = _response_missing(evidence.response_rows, gate)
    return [*checks, told] if told else checks


def _fpr_check(evidence: Evidence, gate: GateSettings) -> Check:
    rise = evidence.gains["fpr"]
    low, high = _bounds(rise)
    z = float(norm.isf((1 - evidence.confidence) / 2))
    most = max(high, rise.value + z * least_error(gate.max_fpr_rise, evidence.distinct_safe))
    outcome: Outcome = "passed" if most <= gate.max_fpr_rise else "failed" if low > gate.max_fpr_rise else "not proven"
    end = {
        "passed": f"within the margin of {gate.max_fpr_rise:g}",
        "failed": f"more than the margin of {gate.max_fpr_rise:g}",
        "not proven": f"so with {evidence.distinct_safe} distinct safe prompts a rise beyond the margin of "
        f"{gate.max_fpr_rise:g} cannot be ruled out",
    }[outcome]
    return Check(
        name="benign_fpr",
        question="Does it block hardly more safe prompts than the baseline?",
        value=rise.value,
        low=low,
        high=high,
        limit=gate.max_fpr_rise,
        outcome=outcome,
        explanation=f"{_change('the benign false-positive rate', rise, evidence.confidence)}, {end}.",
    )


def _slices_check(judged: list[JudgedSlice], margin: float, confidence: float) -> Check:
    question = f"Is no part of the test set worse by more than {margin:g}?"
    if not judged:
        why = "the test set has no parts that are large enough to measure apart."
        return Check(name="slices", question=question, value=None, limit=-margin, outcome="passed", explanation=why)
    outcomes = {part.outcome for part in judged}
    outcome: Outcome = "failed" if "failed" in outcomes else "not proven" if "not proven" in outcomes else "passed"
    named = sorted((j for j in judged if j.outcome == outcome), key=lambda j: (-j.p, j.part.result.gain.value))
    worst = named[0].part.result
    about = f"in {worst.dimension} {worst.name} {_slice_change(worst.metric, worst.gain, confidence)}"
    others = ", ".join(f"{j.part.result.dimension} {j.part.result.name}" for j in named[1:6])
    more = f", {len(named) - 6} more" if len(named) > 6 else ""
    also = f"; the same goes for {others}{more}" if others else ""
    explanation = {
        "passed": f"a loss beyond {margin:g} is ruled out in each of {len(judged)} slices; {about}, the least sure.",
        "failed": f"{about}, beyond the margin of {margin:g}{also}.",
        "not proven": f"{about}, so with {worst.rows} rows a loss beyond {margin:g} cannot be ruled out{also}.",
    }[outcome]
    low, high = _bounds(worst.gain)
    return Check(
        name="slices",
        question=question,
        value=worst.gain.value,
        low=low,
        high=high,
        limit=-margin,
        outcome=outcome,
        explanation=explanation,
    )


RESPONSE_QUESTION = "Are responses (response role) still judged as well as before?"


def _response_check(judged: Sequence[tuple[JudgedSlice, float]], confidence: float) -> Check:
    """Of the ranking of responses and what is decided of them, each with its margin, the worst is told."""
    response, margin = min(judged, key=lambda item: ("failed", "not proven", "passed").index(item[0].outcome))
    result = response.part.result
    end = {
        "passed": f"within the margin of {margin:g}",
        "failed": f"beyond the margin of {margin:g}",
        "not proven": f"so with {result.rows} rows a loss beyond {margin:g} cannot be ruled out",
    }[response.outcome]
    low, high = _bounds(result.gain)
    return Check(
        name="responses",
        question=RESPONSE_QUESTION,
        value=result.gain.value,
        low=low,
        high=high,
        limit=-margin,
        outcome=response.outcome,
        explanation=f"on responses {_slice_change(result.metric, result.gain, confidence)}, {end}.",
    )


def _response_missing(rows: int, gate: GateSettings) -> Check:
    return Check(
        name="responses",
        question=RESPONSE_QUESTION,
        value=None,
        limit=-gate.max_response_loss,
        outcome="not proven",
        explanation=f"of {rows} responses too few are safe, or unsafe, to show that they are judged as ever "
        "(gate.require_response_test: false accepts that).",
    )


def _bounds(estimate: Estimate) -> tuple[float, float]:
    """The interval; the value itself where none applies."""
    low = estimate.value if estimate.low is None else estimate.low
    high = estimate.value if estimate.high is None else estimate.high
    return low, high


def _change(subject: str, change: Estimate, confidence: float) -> str:
    """E.g. "AUPRC rose by 0.030 (95% interval -0.010 to 0.070)"."""
    low, high = _bounds(change)
    verb = (
        "did not change"
        if change.value == 0
        else f"{'rose' if change.value > 0 else 'fell'} by {abs(change.value):.3f}"
    )
    return f"{subject} {verb} ({confidence * 100:g}% interval {low:.3f} to {high:.3f})"


def _slice_change(metric: str, gain: Estimate, confidence: float) -> str:
    """A slice's gain as a change of its metric: a gain in false-positive rate is a fall."""
    low, high = _bounds(gain)
    change = Estimate(value=-gain.value, low=-high, high=-low) if metric == "fpr" else gain
    return _change(WORDS[metric], change, confidence)
