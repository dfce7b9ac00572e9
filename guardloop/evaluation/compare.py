"""The evaluation: both guards' margins on the locked test set in, one `Evaluation` out."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from guardloop.errors import GuardLoopError
from guardloop.evaluation.bootstrap import bootstrap, estimate
from guardloop.evaluation.gate import Changed, Collapse, Evidence, decide
from guardloop.evaluation.metrics import (
    Bools,
    Floats,
    auprc,
    auroc,
    brier,
    curve,
    decision_metrics,
    ece,
    rank,
    recall_at_fpr,
)
from guardloop.evaluation.result import Estimate, Evaluation, GuardMetrics
from guardloop.evaluation.settings import EvaluationSettings, GateSettings
from guardloop.evaluation.slices import measure, measure_slices
from guardloop.evaluation.table import Table, read_scores

FPRS = ("0.01", "0.02", "0.05")
GAINS = ("auprc", "auroc", "recall_at_default_fpr", "recall_at_0.05", "f1", "fpr", "accuracy", "precision", "recall")


@dataclass(frozen=True)
class GuardRun:
    """What is known of a guard besides its margins."""

    name: str
    threshold: float
    """A margin above it is flagged. Chosen on validation data, never on the test set."""
    median_label_mass: float
    """Median of P(safe) + P(unsafe) over the test rows."""
    unreadable: int
    """Test rows that it could not judge; they are not among the scores."""


def evaluate(
    scores: Iterable[Mapping[str, Any]],
    default: GuardRun,
    improved: GuardRun,
    settings: EvaluationSettings | None = None,
    gate: GateSettings | None = None,
) -> Evaluation:
    """Compare the improved with the default guard on rows of the SCORES contract, and decide on promotion.

    The headline is on User-role rows (no response); Agent-role rows are a slice of their own.
    Raises GuardLoopError when rows, labels or margins are missing, or the User-role rows hold one class only.
    """
    settings, gate = settings or EvaluationSettings(), gate or GateSettings()
    table = read_scores(scores)
    user, agent = _split(table)
    thresholds = (default.threshold, improved.threshold)
    statistic = _paired(user, thresholds)
    point = {name: float(value[0]) for name, value in statistic(np.ones((1, len(user)))).items()}
    samples = bootstrap(statistic, user.group, user.unsafe, settings.resamples, settings.seed)
    estimates = {name: estimate(value, samples[name], settings.confidence) for name, value in point.items()}
    gains = {
        name: estimate(
            point[f"improved/{name}"] - point[f"default/{name}"],
            samples[f"improved/{name}"] - samples[f"default/{name}"],
            settings.confidence,
        )
        for name in GAINS
    }
    slices, notes = measure_slices(user, thresholds, settings)
    agents = measure(agent, "role", "Agent", thresholds, settings) if len(agent) else None
    default_metrics = _guard_metrics("default", default, user, estimates, settings)
    improved_metrics = _guard_metrics("improved", improved, user, estimates, settings)
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
            agent_rows=len(agent),
            confidence=settings.confidence,
        ),
        gate,
    )
    return Evaluation(
        rows=len(user),
        unsafe=int(user.unsafe.sum()),
        agent_rows=len(agent),
        default=default_metrics,
        improved=improved_metrics,
        gains=gains,
        slices=[part.result for part in [*slices, *([agents] if agents else [])]],
        decision=decision,
        notes=[*notes, *_notes(user, agent, agents is None, default, gate)],
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


def _paired(table: Table, thresholds: tuple[float, float]) -> Callable[[Floats], dict[str, Floats]]:
    """Every headline metric of both guards, named "default/auprc" and so on, as a function of weights[B, N]."""
    guards = {
        name: (rank(margins, table.unsafe), margins > threshold)
        for (name, margins), threshold in zip(
            {"default": table.default, "improved": table.improved}.items(), thresholds, strict=True
        )
    }

    def statistic(weights: Floats) -> dict[str, Floats]:
        values: dict[str, Floats] = {}
        for name, (ranking, flagged) in guards.items():
            c = curve(ranking, weights)
            caught, blocked = flagged & table.unsafe, flagged & ~table.unsafe
            tp, fp = (weights @ np.stack([caught, blocked], axis=1).astype(weights.dtype)).T
            metrics = decision_metrics(tp, fp, c.unsafe, c.safe)
            metrics |= {"auprc": auprc(c), "auroc": auroc(c)}
            metrics |= {f"recall_at_{fpr}": recall_at_fpr(c, float(fpr)) for fpr in FPRS}
            values |= {f"{name}/{metric}": value for metric, value in metrics.items()}
            # both guards are read off their own curve, at the default's rate in the same resample
            values[f"{name}/recall_at_default_fpr"] = recall_at_fpr(c, values["default/fpr"].astype(np.float64))
        return values

    return statistic


def _guard_metrics(
    key: str, run: GuardRun, table: Table, estimates: dict[str, Estimate], settings: EvaluationSettings
) -> GuardMetrics:
    margins: Floats = getattr(table, key)
    flagged = margins > run.threshold
    return GuardMetrics(
        name=run.name,
        threshold=run.threshold,
        **{
            name: estimates[f"{key}/{name}"]
            for name in ("accuracy", "precision", "recall", "f1", "fpr", "auprc", "auroc")
        },
        recall_at_fpr={fpr: estimates[f"{key}/recall_at_{fpr}"] for fpr in FPRS},
        brier=brier(margins, table.unsafe),
        ece=ece(margins, table.unsafe, settings.calibration_bins),
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


def _notes(user: Table, agent: Table, no_agent: bool, default: GuardRun, gate: GateSettings) -> list[str]:
    notes = []
    shares = _collapse(user, user.default, default.threshold)
    if max(shares.same_score, shares.safe_blocked, shares.unsafe_passed) >= gate.collapsed_share:
        notes.append(
            "The default guard itself hardly tells safe from unsafe on this test set, so beating it means little."
        )
    if no_agent:
        notes.append(f"The Agent role was not measured: the test set has {len(agent)} Agent-role rows, too few.")
    if len(user) > (distinct := len(np.unique(user.group))):
        notes.append(
            f"{len(user)} User-role rows form {distinct} groups of near-duplicates; intervals count the groups."
        )
    return notes
