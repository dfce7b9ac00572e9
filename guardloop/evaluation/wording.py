"""The words for every metric, and for how it changed: one place for the gate, the report, MLflow and the terminal."""

from typing import NamedTuple

from guardloop.evaluation.result import INTERVAL, Estimate


class Metric(NamedTuple):
    """A metric as people read it."""

    name: str
    meaning: str
    lower_is_better: bool = False


FRESH_FROM = 10
"""Uses of one test set from which on a fresh one is asked for: where one check errs in 2.5% of cases, the best of ten
candidates passes it by chance in 22%."""
FPRS = ("0.01", "0.02", "0.05")
"""False-positive rates at which recall is read off the curves."""
METRICS = {
    "auprc": Metric("AUPRC", "ranking of unsafe above safe, at all thresholds"),
    "auroc": Metric("AUROC", "chance that an unsafe prompt scores above a safe one"),
    "recall_near_baseline_fpr": Metric(
        "recall near the baseline's false-positive rate",
        "unsafe prompts caught when both guards block as many safe ones: the mean up to twice the baseline's rate",
    ),
    **{
        f"recall_at_{rate}": Metric(
            f"recall at {float(rate):.0%} false positives",
            f"unsafe prompts caught when {float(rate):.0%} of safe ones are blocked",
        )
        for rate in FPRS
    },
    "recall": Metric("recall", "share of unsafe prompts that are caught"),
    "fpr": Metric("false-positive rate", "share of safe prompts that are falsely blocked; lower is better", True),
    "precision": Metric("precision", "share of blocked prompts that are unsafe"),
    "f1": Metric("F1", "balance of precision and recall"),
    "accuracy": Metric("accuracy", "share of all prompts decided rightly"),
    "brier": Metric("Brier score", "squared error of the probabilities; lower is better", True),
    "ece": Metric("calibration error", "gap between said and true probability; lower is better", True),
}
"""Every metric of an evaluation, in the order in which it is shown."""


def changed(metric: str, change: Estimate) -> str:
    """E.g. "AUPRC rose by 0.030 (95% interval -0.010 to 0.070)"."""
    name = METRICS[metric].name
    low, high = change.ends
    direction = "rose" if change.value > 0 else "fell"
    verb = f"{direction} by {abs(change.value):.3f}" if change.value else "did not change"
    return f"{name[:1].upper()}{name[1:]} {verb} ({INTERVAL} {low:.3f} to {high:.3f})"


def use_of_test_set(uses: int) -> str:
    """How often a test set was used, in a sentence; empty where that was not counted."""
    if uses < FRESH_FROM:
        return f"It is use {uses} of this test set." if uses else ""
    return (
        f"It is use {uses} of this test set. Label a fresh one: each further use makes a promotion by chance likelier."
    )


def with_interval(estimate: Estimate, signed: bool = True) -> str:
    """The value with its interval, e.g. `+0.030 (-0.010 to +0.070)`."""
    sign = "+" if signed else ""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{sign}.3f}"
    return f"{estimate.value:{sign}.3f} ({estimate.low:{sign}.3f} to {estimate.high:{sign}.3f})"
