"""A made-up evaluation and the origin of its run."""

from guardloop.evaluation.result import Check, Decision, Estimate, Evaluation, GuardMetrics, Outcome
from guardloop.registry import Origin


def origin(run_id: str = "run-1") -> Origin:
    return Origin(run_id=run_id, git_sha="abc123", data_hash="d" * 64, base_model="meta/guard", base_revision="r1")


def evaluation(verdict: Outcome = "passed", gain: float = 0.05) -> Evaluation:
    check = Check(
        name="AUPRC gain",
        question="Does it rank better?",
        value=gain,
        low=gain - 0.02,
        high=gain + 0.02,
        limit=0,
        outcome=verdict,
        explanation="a | b\nc",
    )
    headline = {"passed": "The candidate is better.", "failed": "It is worse.", "not proven": "Too few examples."}
    return Evaluation(
        rows=1400,
        unsafe=300,
        response_rows=100,
        default=guard("default", 0.6),
        candidate=guard("candidate", 0.6 + gain),
        gains={
            "auprc": Estimate(value=gain, low=gain - 0.02, high=gain + 0.02),
            "recall_near_baseline_fpr": Estimate(value=0.1, low=0.04, high=0.16),
            "fpr": Estimate(value=0.0, low=-0.01, high=0.01),
        },
        slices=[],
        decision=Decision(
            mode="enforce",
            promote=verdict == "passed",
            verdict=verdict,
            headline=headline[verdict],
            checks=[check],
        ),
    )


def guard(name: str, level: float) -> GuardMetrics:
    with_interval = Estimate(value=level, low=level - 0.02, high=level + 0.02)
    plain = Estimate(value=level)
    return GuardMetrics(
        name=name,
        threshold=0.25,
        accuracy=plain,
        precision=plain,
        recall=plain,
        f1=plain,
        fpr=Estimate(value=0.05),
        auprc=with_interval,
        auroc=plain,
        recall_at_fpr={"0.01": plain, "0.05": with_interval},
        brier=Estimate(value=0.1),
        ece=Estimate(value=float("nan")),
        confusion=[[1000, 100], [90, 210]],
        median_label_mass=0.99,
        unreadable=0,
    )
