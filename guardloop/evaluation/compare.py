"""The evaluation: both guards' margins on the locked test set in, one `Evaluation` out."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from guardloop.core.errors import GuardLoopError
from guardloop.evaluation.gate import Changed, Collapse, Evidence, decide
from guardloop.evaluation.held_out import measure_feedback
from guardloop.evaluation.metrics import Bools, Floats
from guardloop.evaluation.paired import FPRS, GuardRun, compare_guards
from guardloop.evaluation.result import BenchmarkResult, Compared, Estimate, Evaluation, GuardMetrics
from guardloop.evaluation.settings import EvaluationSettings, GateSettings
from guardloop.evaluation.slices import MeasuredSlice, measure_agents, measure_slices
from guardloop.evaluation.table import Table, read_scores

SINGLE = ("accuracy", "precision", "recall", "f1", "fpr", "auprc", "auroc", "brier", "ece")


def evaluate(
    scores: Iterable[Mapping[str, Any]],
    default: GuardRun,
    improved: GuardRun,
    settings: EvaluationSettings | None = None,
    gate: GateSettings | None = None,
    *,
    feedback: Iterable[dict[str, Any]] | None = None,
    benchmarks: Sequence[BenchmarkResult] = (),
) -> Evaluation:
    """Compare the improved with the default guard on rows of the SCORES contract, and decide on promotion.

    The headline is on User-role rows (no response); Agent-role rows are slices of their own. `feedback` are held-out
    rows of the FEEDBACK contract with the improved guard's `margin`; `benchmarks` were measured already.
    Raises GuardLoopError when rows, labels or margins are missing, or the User-role rows hold one class only.
    """
    settings, gate = settings or EvaluationSettings(), gate or GateSettings()
    table = read_scores(scores)
    user, agent = _split(table)
    thresholds = (default.threshold, improved.threshold)
    with ThreadPoolExecutor(2) as pool:  # numpy computes outside the interpreter's lock
        headline = pool.submit(compare_guards, user, default, improved, settings)
        slices, notes = measure_slices(user, thresholds, settings)
        judging = default.judging("response").threshold, improved.judging("response").threshold
        agents, decided = measure_agents(agent, judging, settings)
        compared = headline.result()
    default_metrics = _guard_metrics("default", default, user, compared)
    improved_metrics = _guard_metrics("improved", improved, user, compared)
    gains = {name: found.gain for name, found in compared.items()}
    decision = decide(
        Evidence(
            rows=len(table),
            distinct_unsafe=user.distinct(user.unsafe),
            distinct_safe=user.distinct(~user.unsafe),
            default=default_metrics,
            improved=improved_metrics,
            collapse=_collapse(user, user.improved, improved.threshold),
            gains=gains,
            changed_unsafe=_changed(user, user.unsafe, thresholds),
            changed_safe=_changed(user, ~user.unsafe, thresholds),
            slices=slices,
            agent=agents,
            agent_decisions=decided,
            agent_rows=len(agent),
            confidence=settings.confidence,
            benchmarks=benchmarks,
        ),
        gate,
    )
    learnt, more = (None, []) if feedback is None else measure_feedback(feedback, improved, settings)
    return Evaluation(
        rows=len(user),
        unsafe=int(user.unsafe.sum()),
        agent_rows=len(agent),
        default=default_metrics,
        improved=improved_metrics,
        gains=gains,
        slices=[part.result for part in [*slices, *([agents] if agents else []), *decided]],
        decision=decision,
        feedback=learnt,
        benchmarks=list(benchmarks),
        notes=[*notes, *_notes(user, agent, agents, default, gate), *more],
        confidence=settings.confidence,
    )


def _split(table: Table) -> tuple[Table, Table]:
    """User-role and Agent-role rows; refuses User-role rows without both classes."""
    user = table.take(~table.agent)
    if not len(user):
        raise GuardLoopError(
            f"all {len(table)} test rows are of the Agent role", "add prompts without a response to the test split"
        )
    if user.unsafe.all() or not user.unsafe.any():
        only = "unsafe" if user.unsafe.all() else "safe"
        raise GuardLoopError(
            f"all {len(user)} User-role test rows are labelled {only}: guards cannot be compared on one class",
            "add rows of the other class to the test split, or check the label mapping of the dataset",
        )
    return user, table.take(table.agent)


def _guard_metrics(key: str, run: GuardRun, table: Table, compared: Mapping[str, Compared]) -> GuardMetrics:
    margins: Floats = getattr(table, key)
    flagged = margins > run.threshold
    found: dict[str, Estimate] = {name: getattr(both, key) for name, both in compared.items()}
    return GuardMetrics(
        name=run.name,
        threshold=run.threshold,
        temperature=run.temperature,
        **{name: found[name] for name in SINGLE},
        recall_at_fpr={fpr: found[f"recall_at_{fpr}"] for fpr in FPRS},
        recall_near_default_fpr=found["recall_near_default_fpr"],
        confusion=[[int(np.sum((table.unsafe == u) & (flagged == f))) for f in (False, True)] for u in (False, True)],
        median_label_mass=run.median_label_mass,
        unreadable=run.unreadable,
    )


def _collapse(table: Table, margins: Floats, threshold: float) -> Collapse:
    flagged = margins > threshold
    return Collapse(
        same_score=float(np.unique(margins, return_counts=True)[1].max() / len(margins)),
        safe_blocked=float(flagged[~table.unsafe].mean()),
        unsafe_passed=float((~flagged[table.unsafe]).mean()),
    )


def _changed(table: Table, rows: Bools, thresholds: tuple[float, float]) -> Changed:
    """Groups among `rows[N]` of one class whose decisions got better or worse on balance."""
    was_right = (table.default > thresholds[0]) == table.unsafe
    is_right = (table.improved > thresholds[1]) == table.unsafe
    balance = np.bincount(table.group[rows], weights=is_right[rows].astype(float) - was_right[rows])
    return Changed(mended=int((balance > 0).sum()), spoiled=int((balance < 0).sum()))


def _notes(user: Table, agent: Table, agents: MeasuredSlice | None, default: GuardRun, gate: GateSettings) -> list[str]:
    notes = []
    shares = _collapse(user, user.default, default.threshold)
    if max(shares.same_score, shares.safe_blocked, shares.unsafe_passed) >= gate.collapsed_share:
        notes.append(
            "The default guard itself hardly tells safe from unsafe on this test set, so beating it means little."
        )
    if agents is None:
        notes.append(f"The Agent role was not measured: the test set has {len(agent)} Agent-role rows, too few.")
    elif agents.result.metric != "auprc":
        other = "safe" if agents.result.metric == "recall" else "unsafe"
        notes.append(f"The Agent role was measured in part: too few of its {len(agent)} rows are {other}.")
    if len(user) > (distinct := len(np.unique(user.group))):
        notes.append(
            f"{len(user)} User-role rows form {distinct} groups of near-duplicates; intervals count the groups."
        )
    return notes
