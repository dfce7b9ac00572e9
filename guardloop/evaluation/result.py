"""What an evaluation measured and decided: the gate writes it; the report, MLflow and the terminal read it."""

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel

Outcome = Literal["passed", "failed", "not proven"]
INTERVAL = "95% interval"
"""What the interval of every estimate is called."""


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    """The least good outcome; passed where there is none."""
    order: tuple[Outcome, ...] = ("passed", "not proven", "failed")
    return max(outcomes, key=order.index, default="passed")


class Estimate(BaseModel):
    """A value with its interval; `low` and `high` are None where no interval applies."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """The interval; the value itself where none applies."""
        return self.value if self.low is None else self.low, self.value if self.high is None else self.high


class Comparison(BaseModel):
    """One metric of both guards, and its paired change."""

    baseline: Estimate
    candidate: Estimate
    change: Estimate
    """candidate - baseline, whatever the metric."""


class EvaluatedGuard(BaseModel):
    """What is known of one guard besides its metrics."""

    name: str
    threshold: float
    """A prompt with a score above it is blocked."""
    temperature: float = 1.0
    """By which scores are divided before they are read as log-odds; 1 where the guard was not calibrated."""
    confusion: list[list[int]]
    """[[safe passed, safe blocked], [unsafe passed, unsafe blocked]]"""
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
    """Positive is better: candidate - baseline, or baseline - candidate for fpr."""


class GateCheck(BaseModel):
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
    answer: str
    """One short sentence: what the outcome means."""
    explanation: str
    """The figures behind the answer."""
    more: str = ""
    """Where it is not proven: how many more labelled prompts, of which kind, would decide it."""
    blocks: bool = True
    """False for a warning: it is shown, and does not hold promotion back."""

    @property
    def shown_outcome(self) -> str:
        """The outcome, marked where it only warns."""
        return self.outcome if self.blocks or self.outcome == "passed" else f"warning: {self.outcome}"


class Decision(BaseModel):
    """What the gate decided and why."""

    mode: Literal["enforce", "report_only", "disabled"]
    promote: bool
    verdict: Outcome
    headline: str
    """Why, in one or two short sentences."""
    checks: list[GateCheck]


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
    auprc: Comparison


class BenchmarkResult(BaseModel):
    """Both guards on one public benchmark, beside the locked test set."""

    name: str
    kind: Literal["mixed", "unsafe", "safe"]
    """mixed: ranked and decided. unsafe: every row is unsafe, recall counts. safe: over-blocking counts."""
    rows: int
    unsafe: int
    revision: str = ""
    """The commit that was read."""
    left_out: int = 0
    """Rows like something in the training set, which would flatter the candidate."""
    unreadable: int = 0
    """Rows that one of the guards could not judge."""
    metrics: dict[str, Comparison]


class Evaluation(BaseModel):
    """Everything a reviewer needs, JSON-ready."""

    rows: int
    unsafe: int
    response_rows: int
    baseline: EvaluatedGuard
    candidate: EvaluatedGuard
    metrics: dict[str, Comparison]
    """On prompts, by the names in `guardloop.evaluation.wording.METRICS`."""
    slices: list[SliceResult]
    decision: Decision
    held_out: HeldOutResult | None = None
    """None where no traffic was held out, or too little of it."""
    benchmarks: list[BenchmarkResult] = []
    notes: list[str] = []
    test_set: str = ""
    """SHA-256 of the labelled test set, whatever the order of its rows."""
    test_set_uses: int = 0
    """Evaluations on this test set that MLflow knows of, this one included; 0 where they were not counted."""
