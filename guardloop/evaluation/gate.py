"""The promotion gate: named rules, each passed, failed or not proven; only when all pass is the guard promoted.

"Not proven" means that chance explains what was seen, or that there are too few rows to tell. It never promotes.
"""

from guardloop.evaluation.harm import harm_checks
from guardloop.evaluation.improvement import improvement_checks
from guardloop.evaluation.measurements import Measurements
from guardloop.evaluation.result import Decision, GateCheck, Outcome, worst
from guardloop.evaluation.settings import GateSettings
from guardloop.evaluation.soundness import soundness_checks


def decide(measured: Measurements, gate: GateSettings) -> Decision:
    """Apply every rule of `gate`. Promotes only in mode `enforce`, and only when every check passed."""
    if gate.mode == "disabled":
        headline = "The gate is disabled, so nothing was checked and the guard in use stays."
        return Decision(mode=gate.mode, promote=False, verdict="not proven", headline=headline, checks=[])
    checks = [*soundness_checks(measured, gate), *improvement_checks(measured), *harm_checks(measured, gate)]
    verdict = worst(check.outcome for check in checks if check.blocks)
    return Decision(
        mode=gate.mode,
        promote=gate.mode == "enforce" and verdict == "passed",
        verdict=verdict,
        headline=_headline(measured, gate, verdict, checks),
        checks=checks,
    )


def _headline(measured: Measurements, gate: GateSettings, verdict: Outcome, checks: list[GateCheck]) -> str:
    reports = gate.mode == "report_only"
    if verdict == "passed":
        ranking, recall = (measured.metrics[name].change.value for name in ("auprc", "recall_near_baseline_fpr"))
        end = "It passed every check, but the gate only reports" if reports else "It replaces the guard in use"
        return (
            f"It ranks prompts better (AUPRC {ranking:+.3f}) and catches more at the same false-positive rate "
            f"(recall {recall:+.3f}). {end}."
        )
    open_checks = [check for check in checks if check.blocks and check.outcome != "passed"]
    first = next(check for check in open_checks if check.outcome == verdict)
    ranks_better = any(check.name == "ranking" and check.outcome == "passed" for check in checks)
    others = len(open_checks) - 1
    sentences = [
        *(["It ranks prompts better."] if ranks_better else []),
        f"{first.answer.rstrip('.')}, so {'it would not be promoted' if reports else 'the guard in use stays'}.",
        *([f"{others} more check{'s' if others > 1 else ''} did not pass."] if others else []),
    ]
    return " ".join(sentences)
