"""The evaluation: both guards' scores on the locked test set in, one `Evaluation` out."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

from guardloop.core.errors import GuardLoopError
from guardloop.evaluation.gate import decide
from guardloop.evaluation.held_out import measure_held_out
from guardloop.evaluation.measurements import Changed, Collapse, Measurements
from guardloop.evaluation.metrics import Bools, Floats
from guardloop.evaluation.paired import GuardRun, change_spreads, compare_guards
from guardloop.evaluation.result import BenchmarkResult, EvaluatedGuard, Evaluation
from guardloop.evaluation.settings import EvaluationSettings, GateSettings
from guardloop.evaluation.slices import MeasuredSlice, measure_responses, measure_slices
from guardloop.evaluation.soundness import COLLAPSED
from guardloop.evaluation.table import Table, read_scores


def evaluate(
    scores: Iterable[Mapping[str, Any]],
    baseline: GuardRun,
    candidate: GuardRun,
    settings: EvaluationSettings | None = None,
    gate: GateSettings | None = None,
    *,
    seed: int = 0,
    held_out: Iterable[dict[str, Any]] | None = None,
    benchmarks: Sequence[BenchmarkResult] = (),
) -> Evaluation:
    """Compare the candidate with the baseline on rows of the SCORES contract, and decide on promotion.

    The metrics are on prompts; judged responses are slices of their own. `seed` is of the bootstrap. `held_out` are
    rows of the HELD_OUT_PROMPT contract with the candidate's `score`; `benchmarks` were measured already.
    Raises GuardLoopError when rows, labels or scores are missing, or the prompts are all safe or all unsafe.
    """
    settings, gate = settings or EvaluationSettings(), gate or GateSettings()
    table = read_scores(scores)
    prompts, responses = _split(table)
    thresholds = baseline.threshold, candidate.threshold
    judging = baseline.judging("response").threshold, candidate.judging("response").threshold
    with ThreadPoolExecutor(2) as pool:  # numpy computes outside the interpreter's lock
        headline = pool.submit(compare_guards, prompts, baseline, candidate, settings.resamples, seed)
        slices, notes = measure_slices(prompts, thresholds, settings, seed)
        response_slices = measure_responses(responses, judging, settings.resamples, seed)
        metrics = headline.result()
    guards = [
        _evaluated(run, prompts, scored)
        for run, scored in ((baseline, prompts.baseline), (candidate, prompts.candidate))
    ]
    decision = decide(
        Measurements(
            rows=len(table),
            distinct_unsafe=prompts.distinct(prompts.unsafe),
            distinct_safe=prompts.distinct(~prompts.unsafe),
            baseline=guards[0],
            candidate=guards[1],
            metrics=metrics,
            spreads=cache(lambda: change_spreads(prompts, baseline, candidate, seed)),
            collapse=_collapse(prompts, prompts.candidate, candidate.threshold),
            changed_unsafe=_changed(prompts, prompts.unsafe, thresholds),
            changed_safe=_changed(prompts, ~prompts.unsafe, thresholds),
            slices=slices,
            responses=response_slices,
            response_rows=len(responses),
            benchmarks=benchmarks,
        ),
        gate,
    )
    on_held_out, more = (
        (None, []) if held_out is None else measure_held_out(held_out, candidate, settings.resamples, seed)
    )
    return Evaluation(
        rows=len(prompts),
        unsafe=int(prompts.unsafe.sum()),
        response_rows=len(responses),
        baseline=guards[0],
        candidate=guards[1],
        metrics=metrics,
        slices=[part.result for part in (*slices, *response_slices)],
        decision=decision,
        held_out=on_held_out,
        benchmarks=list(benchmarks),
        notes=[*notes, *_notes(prompts, responses, response_slices, baseline), *more],
    )


def _split(table: Table) -> tuple[Table, Table]:
    """Prompts and responses; refuses prompts of one class."""
    prompts = table.take(~table.is_response)
    if not len(prompts):
        raise GuardLoopError(
            f"all {len(table)} test rows are responses", "add prompts without a response to the test set"
        )
    if prompts.unsafe.all() or not prompts.unsafe.any():
        only = "unsafe" if prompts.unsafe.all() else "safe"
        raise GuardLoopError(
            f"all {len(prompts)} test prompts are labelled {only}: guards cannot be compared on one class",
            "add rows of the other class to the test set, or check the label mapping of the dataset",
        )
    return prompts, table.take(table.is_response)


def _evaluated(run: GuardRun, table: Table, scores: Floats) -> EvaluatedGuard:
    flagged = scores > run.threshold
    return EvaluatedGuard(
        name=run.name,
        threshold=run.threshold,
        temperature=run.temperature,
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


def _notes(prompts: Table, responses: Table, measured: list[MeasuredSlice], baseline: GuardRun) -> list[str]:
    notes = []
    shares = _collapse(prompts, prompts.baseline, baseline.threshold)
    if max(shares.same_score, shares.safe_blocked, shares.unsafe_passed) >= COLLAPSED:
        notes.append("The baseline itself hardly tells safe from unsafe on this test set, so beating it means little.")
    if not measured:
        notes.append(f"Responses were not measured: the test set has {len(responses)}, too few.")
    elif measured[0].result.metric != "auprc":
        other = "safe" if measured[0].result.metric == "recall" else "unsafe"
        notes.append(f"Responses were measured in part: too few of the {len(responses)} are {other}.")
    if len(prompts) > (distinct := len(np.unique(prompts.group))):
        notes.append(f"{len(prompts)} prompts form {distinct} groups of near-duplicates; intervals count the groups.")
    return notes
