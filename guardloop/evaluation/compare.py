"""The evaluation: both guards' scores on the locked test set in, one `Evaluation` out."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from guardloop.core.errors import GuardLoopError
from guardloop.evaluation.gate import Changed, Collapse, Evidence, decide
from guardloop.evaluation.held_out import measure_held_out
from guardloop.evaluation.metrics import Bools, Floats
from guardloop.evaluation.paired import FPRS, GuardRun, compare_guards
from guardloop.evaluation.result import BenchmarkResult, Compared, Estimate, Evaluation, GuardMetrics
from guardloop.evaluation.settings import EvaluationSettings, GateSettings
from guardloop.evaluation.slices import MeasuredSlice, measure_responses, measure_slices
from guardloop.evaluation.table import Table, read_scores

SINGLE = ("accuracy", "precision", "recall", "f1", "fpr", "auprc", "auroc", "brier", "ece")


def evaluate(
    scores: Iterable[Mapping[str, Any]],
    baseline: GuardRun,
    candidate: GuardRun,
    settings: EvaluationSettings | None = None,
    gate: GateSettings | None = None,
    *,
    held_out: Iterable[dict[str, Any]] | None = None,
    benchmarks: Sequence[BenchmarkResult] = (),
) -> Evaluation:
    """Compare the candidate with the baseline on rows of the SCORES contract, and decide on promotion.

    The headline is on User-role rows (no response); response-role rows are slices of their own. `held_out` are held-out
    rows of the HELD_OUT_PROMPT contract with the candidate's `score`; `benchmarks` were measured already.
    Raises GuardLoopError when rows, labels or scores are missing, or the User-role rows hold one class only.
    """
    settings, gate = settings or EvaluationSettings(), gate or GateSettings()
    table = read_scores(scores)
    prompts, responses = _split(table)
    thresholds = (baseline.threshold, candidate.threshold)
    with ThreadPoolExecutor(2) as pool:  # numpy computes outside the interpreter's lock
        headline = pool.submit(compare_guards, prompts, baseline, candidate, settings)
        slices, notes = measure_slices(prompts, thresholds, settings)
        judging = baseline.judging("response").threshold, candidate.judging("response").threshold
        response_slice, decided = measure_responses(responses, judging, settings)
        compared = headline.result()
    baseline_metrics = _guard_metrics("baseline", baseline, prompts, compared)
    candidate_metrics = _guard_metrics("candidate", candidate, prompts, compared)
    gains = {name: found.gain for name, found in compared.items()}
    decision = decide(
        Evidence(
            rows=len(table),
            distinct_unsafe=prompts.distinct(prompts.unsafe),
            distinct_safe=prompts.distinct(~prompts.unsafe),
            baseline=baseline_metrics,
            candidate=candidate_metrics,
            collapse=_collapse(prompts, prompts.candidate, candidate.threshold),
            gains=gains,
            changed_unsafe=_changed(prompts, prompts.unsafe, thresholds),
            changed_safe=_changed(prompts, ~prompts.unsafe, thresholds),
            slices=slices,
            responses=response_slice,
            response_decisions=decided,
            response_rows=len(responses),
            confidence=settings.confidence,
            benchmarks=benchmarks,
        ),
        gate,
    )
    learnt, more = (None, []) if held_out is None else measure_held_out(held_out, candidate, settings)
    return Evaluation(
        rows=len(prompts),
        unsafe=int(prompts.unsafe.sum()),
        response_rows=len(responses),
        baseline=baseline_metrics,
        candidate=candidate_metrics,
        gains=gains,
        slices=[part.result for part in [*slices, *([response_slice] if response_slice else []), *decided]],
        decision=decision,
        held_out=learnt,
        benchmarks=list(benchmarks),
        notes=[*notes, *_notes(prompts, responses, response_slice, baseline, gate), *more],
        confidence=settings.confidence,
    )


def _split(table: Table) -> tuple[Table, Table]:
    """User-role and response-role rows; refuses User-role rows without both classes."""
    prompts = table.take(~table.is_response)
    if not len(prompts):
        raise GuardLoopError(
            f"all {len(table)} test rows are of the response role", "add prompts without a response to the test split"
        )
    if prompts.unsafe.all() or not prompts.unsafe.any():
        only = "unsafe" if prompts.unsafe.all() else "safe"
        raise GuardLoopError(
            f"all {len(prompts)} User-role test rows are labelled {only}: guards cannot be compared on one class",
            "add rows of the other class to the test split, or check the label mapping of the dataset",
        )
    return prompts, table.take(table.is_response)


def _guard_metrics(key: str, run: GuardRun, table: Table, compared: Mapping[str, Compared]) -> GuardMetrics:
    scores: Floats = getattr(table, key)
    flagged = scores > run.threshold
    found: dict[str, Estimate] = {name: getattr(both, key) for name, both in compared.items()}
    return GuardMetrics(
        name=run.name,
        threshold=run.threshold,
        temperature=run.temperature,
        **{name: found[name] for name in SINGLE},
        recall_at_fpr={fpr: found[f"recall_at_{fpr}"] for fpr in FPRS},
        recall_near_baseline_fpr=found["recall_near_baseline_fpr"],
        confusion=[[int(np.sum((table.unsafe == u) & (flagged == f))) for f in (False, True)] for u in (False, True)],
        median_label_mass=run.median_label_mass,
        unreadable=run.unreadable,
    )


def _collapse(table: Table, scores: Floats, threshold: float) -> Collapse:
    flagged = scores > threshold
    return Collapse(
        same_score=float(np.unique(scores, return_counts=True)[1].max() / len(scores)),
        safe_blocked=float(flagged[~table.unsafe].mean()),
        unsafe_passed=float((~flagged[table.unsafe]).mean()),
    )


def _changed(table: Table, rows: Bools, thresholds: tuple[float, float]) -> Changed:
    """Groups among `rows[N]` of one class whose decisions got better or worse on balance."""
    was_right = (table.baseline > thresholds[0]) == table.unsafe
    is_right = (table.candidate > thresholds[1]) == table.unsafe
    balance = np.bincount(table.group[rows], weights=is_right[rows].astype(float) - was_right[rows])
    return Changed(mended=int((balance > 0).sum()), spoiled=int((balance < 0).sum()))


def _notes(
    prompts: Table, responses: Table, response_slice: MeasuredSlice | None, baseline: GuardRun, gate: GateSettings
) -> list[str]:
    notes = []
    shares = _collapse(prompts, prompts.baseline, baseline.threshold)
    if max(shares.same_score, shares.safe_blocked, shares.unsafe_passed) >= gate.collapsed_share:
        notes.append("The baseline itself hardly tells safe from unsafe on this test set, so beating it means little.")
    if response_slice is None:
        notes.append(f"Responses were not measured: the test set has {len(responses)}, too few.")
    elif response_slice.result.metric != "auprc":
        other = "safe" if response_slice.result.metric == "recall" else "unsafe"
        notes.append(f"The response role was measured in part: too few of its {len(responses)} rows are {other}.")
    if len(prompts) > (distinct := len(np.unique(prompts.group))):
        notes.append(
            f"{len(prompts)} User-role rows form {distinct} groups of near-duplicates; intervals count the groups."
        )
    return notes
