"""All that the gate looks at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

from guardloop.evaluation.result import BenchmarkResult, Comparison, EvaluatedGuard
from guardloop.evaluation.slices import MeasuredSlice


@dataclass(frozen=True)
class Collapse:
    """Shares of prompts by which a guard that no longer tells safe from unsafe is known."""

    same_score: float
    """Prompts that share the most frequent score."""
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
class Spread:
    """The variance of a change, by the class of prompts whose drawing causes it."""

    unsafe: float
    safe: float


@dataclass(frozen=True)
class Measurements:
    """Both guards on the test set. Distinct rows: near-duplicates count once."""

    rows: int
    """Test rows of both roles."""
    distinct_unsafe: int
    distinct_safe: int
    baseline: EvaluatedGuard
    candidate: EvaluatedGuard
    metrics: dict[str, Comparison]
    spreads: Callable[[], dict[str, Spread]]
    """Of the changes of some metrics, by name; only drawn where a check is not proven."""
    collapse: Collapse
    """Of the candidate."""
    changed_unsafe: Changed
    changed_safe: Changed
    slices: Sequence[MeasuredSlice]
    """Of prompts."""
    responses: Sequence[MeasuredSlice]
    """All responses, and where these can be ranked, what is decided of the unsafe and of the safe ones."""
    response_rows: int
    benchmarks: Sequence[BenchmarkResult] = ()
