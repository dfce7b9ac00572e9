"""What an evaluation found: the one object that the gate writes and the report, MLflow and the terminal read."""

from typing import Literal

from pydantic import BaseModel

Outcome = Literal["passed", "failed", "not proven"]


class Estimate(BaseModel):
    """A value with its 95% bootstrap interval; `low` and `high` are None where no interval applies."""

    value: float
    low: float | None = None
    high: float | None = None


class GuardMetrics(BaseModel):
    """One guard on the User-role test rows. Decision metrics hold at `threshold` (a margin)."""

    name: str
    threshold: float
    accuracy: Estimate
    precision: Estimate
    recall: Estimate
    f1: Estimate
    fpr: Estimate
    auprc: Estimate
    auroc: Estimate
    recall_at_fpr: dict[str, Estimate]
    """Recall at the FPRs "0.01", "0.02", "0.05"."""
    brier: float
    ece: float
    confusion: list[list[int]]
    """[[true safe, falsely blocked], [missed, caught]]"""
    median_label_mass: float
    unreadable: int
    """Rows that could not be judged."""


class SliceResult(BaseModel):
    """Both guards on one part of the test set."""

    dimension: str
    name: str
    rows: int
    unsafe: int
    metric: str
    """auprc where both classes have enough rows; else fpr or recall, of the class that has."""
    default: float
    improved: float
    gain: Estimate
    """improved - default, or default - improved for fpr: positive is better."""


class Check(BaseModel):
    """One rule of the gate."""

    name: str
    question: str
    """In plain words, for a reviewer."""
    value: float
    low: float | None = None
    high: float | None = None
    limit: float
    outcome: Outcome
    explanation: str


class Decision(BaseModel):
    """What the gate decided and why."""

    mode: Literal["enforce", "report_only", "disabled"]
    promote: bool
    verdict: Outcome
    headline: str
    """One sentence in plain words."""
    checks: list[Check]


class Evaluation(BaseModel):
    """Everything a reviewer needs, JSON-ready."""

    rows: int
    unsafe: int
    agent_rows: int
    default: GuardMetrics
    improved: GuardMetrics
    gains: dict[str, Estimate]
    """Paired improved - default: auprc, auroc, recall_at_default_fpr, recall_at_0.05, f1, fpr, accuracy, precision,
    recall."""
    slices: list[SliceResult]
    decision: Decision
    notes: list[str] = []
