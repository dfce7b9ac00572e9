"""A made-up evaluation and the origin of its run."""

from guardloop.evaluation.result import Comparison, Decision, Estimate, EvaluatedGuard, Evaluation, GateCheck, Outcome
from guardloop.evaluation.wording import METRICS
from guardloop.registry.contents import Origin


def origin(run_id: str = "run-1") -> Origin:
    return Origin(run_id=run_id, git_sha="abc123", data_hash="d" * 64, base_model="meta/guard", base_revision="r1")


def evaluation(verdict: Outcome = "passed", change: float = 0.05) -> Evaluation:
    check = GateCheck(
        name="ranking",
        question="Does it rank better?",
        value=change,
        low=change - 0.02,
        high=change + 0.02,
        limit=0,
        outcome=verdict,
        answer="It does.",
        explanation="a | b\nc",
    )
    headline = {"passed": "The candidate is better.", "failed": "It is worse.", "not proven": "Too few examples."}
    metrics = {name: compared(0.6, 0.0) for name in METRICS}
    metrics |= {
        "auprc": compared(0.6, change),
        "recall_near_baseline_fpr": compared(0.5, 0.1),
        "fpr": compared(0.05, 0.0),
    }
    metrics["ece"] = Comparison(**dict.fromkeys(("baseline", "candidate", "change"), Estimate(value=float("nan"))))
    return Evaluation(
        rows=1400,
        unsafe=300,
        response_rows=100,
        baseline=guard("baseline"),
        candidate=guard("candidate"),
        metrics=metrics,
        slices=[],
        decision=Decision(
            mode="enforce",
            promote=verdict == "passed",
            verdict=verdict,
            headline=headline[verdict],
            checks=[check],
        ),
    )


def compared(before: float, change: float) -> Comparison:
    """With intervals of .02 to either side."""
    values = {"baseline": before, "candidate": before + change, "change": change}
    return Comparison(**{name: Estimate(value=v, low=v - 0.02, high=v + 0.02) for name, v in values.items()})


def guard(name: str) -> EvaluatedGuard:
    return EvaluatedGuard(
        name=name, threshold=0.25, confusion=[[1000, 100], [90, 210]], median_label_mass=0.99, unreadable=0
    )
