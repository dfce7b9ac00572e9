"""What an evaluation found: the one object that the gate writes and the report, MLflow and the terminal read."""

from typing import Literal

from pydantic import BaseModel

Outcome = Literal["passed", "failed", "not proven"]


class Estimate(BaseModel):
    """A value with its interval; `low` and `high` are None where no interval applies."""

    value: float
    low: float | None = None
    high: float | None = None


class GuardMetrics(BaseModel):
    """One guard on the User-role test rows. Decision metrics hold at `threshold` (a score)."""

    name: str
    threshold: float
    temperature: float = 1.0
    """By which scores are divided before they are read as log-odds; 1 where the guard was not calibrated."""
    accuracy: Estimate
    precision: Estimate
    recall: Estimate
    f1: Estimate
    fpr: Estimate
    auprc: Estimate
    auroc: Estimate
    recall_at_fpr: dict[str, Estimate]
    """Recall at the FPRs "0.01", "0.02", "0.05"."""
    recall_near_baseline_fpr: Estimate | None = None
    """Mean recall over false-positive rates from 0 to twice the baseline's own, read off this guard's curve; None
    in evaluations of earlier versions."""
    brier: Estimate
    """Mean squared error of sigmoid(score / temperature) as P(unsafe)."""
    ece: Estimate
    """Expected calibration error of the same probability; it is biased upwards where rows are few."""
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
    baseline: float
    candidate: float
    gain: Estimate
    """candidate - baseline, or baseline - candidate for fpr: positive is better."""


class Check(BaseModel):
    """One rule of the gate."""

    name: str
    question: str
    """In plain words, for a reviewer."""
    value: float | None
    """None where it was not measured."""
    low: float | None = None
    high: float | None = None
    limit: float
    outcome: Outcome
    explanation: str
    blocks: bool = True
    """False for a warning: it is shown, and does not hold promotion back."""


class Decision(BaseModel):
    """What the gate decided and why."""

    mode: Literal["enforce", "report_only", "disabled"]
    promote: bool
    verdict: Outcome
    headline: str
    """One sentence in plain words."""
    checks: list[Check]


class Compared(BaseModel):
    """One metric of both guards, and the paired change from the baseline to the candidate one."""

    metric: str
    baseline: Estimate
    candidate: Estimate
    gain: Estimate
    """candidate - baseline, whatever the metric."""


class HeldOutResult(BaseModel):
    """Both guards on traffic that was held out of the training set, labelled by its judged responses.

    All of these prompts passed the baseline's input check.
    """

    prompts: int
    response_unsafe: int
    """Prompts whose responses were blocked often enough to count as positives."""
    never_unsafe: int
    """Prompts none of whose responses was blocked."""
    caught: Estimate
    """Share of the response-unsafe prompts that the candidate blocks at the input."""
    newly_blocked: Estimate
    """Share of the never-unsafe prompts that the candidate blocks."""
    control: Estimate
    """Share of the response-unsafe prompts that the baseline would block, its threshold lowered until it newly
    blocks as many never-unsafe prompts."""
    beyond_control: Estimate
    """What the candidate catches beyond the control, both read off their curves at equal over-blocking."""
    auprc: Compared


class BenchmarkResult(BaseModel):
    """Both guards on one public benchmark, beside the locked test set."""

    name: str
    kind: Literal["mixed", "unsafe", "safe"]
    """mixed: ranked and decided. unsafe: every row is unsafe, recall counts. safe: over-blocking counts."""
    rows: int
    unsafe: int
    revision: str = ""
    """The commit that was read."""
    licence: str = ""
    left_out: int = 0
    """Rows like something in the training set, which would flatter the candidate."""
    unreadable: int = 0
    """Rows that one of the guards could not judge."""
    metrics: list[Compared]


class Evaluation(BaseModel):
    """Everything a reviewer needs, JSON-ready."""

    rows: int
    unsafe: int
    response_rows: int
    baseline: GuardMetrics
    candidate: GuardMetrics
    gains: dict[str, Estimate]
    """Paired candidate - baseline, of every metric of the guards."""
    slices: list[SliceResult]
    decision: Decision
    held_out: HeldOutResult | None = None
    """None where no traffic was held out, or too little of it."""
    benchmarks: list[BenchmarkResult] = []
    notes: list[str] = []
    confidence: float = 0.95
    """Of all intervals."""

    @property
    def interval(self) -> str:
        """What the intervals are called: `95% interval`."""
        return f"{self.confidence * 100:g}% interval"
