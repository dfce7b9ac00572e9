"""What the judged responses to a prompt show, and the target that follows: P(the prompt is unsafe) by votes."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from guardloop.core.records import SAID, WITHHELD, Row

MAX_SCORE = 60.0  # a score beyond is as sure


@dataclass(slots=True)
class Evidence:
    """The judged responses to one prompt that passed."""

    prompt: Row
    """The columns that describe the prompt."""
    score: float
    """The baseline's score for it."""
    responses: int = 0
    blocked: int = 0
    refusals: int = 0
    """Of the responses that were not blocked."""
    worst_response: Row | None = None
    """The response with the highest score."""
    votes: dict[str, float] = field(default_factory=dict)
    """By responder: P(unsafe) that the judge gave to the worst of its responses."""

    @property
    def prior(self) -> float:
        """The baseline's P(unsafe) for the prompt."""
        return probability(self.score)

    def add(self, response: Row) -> None:
        """Count one judged response."""
        self.responses += 1
        self.blocked += response["flagged"]
        self.refusals += response["refusal"] and not response["flagged"]
        responder = response["responder"]
        self.votes[responder] = max(self.votes.get(responder, 0.0), probability(response["score"]))
        if self.worst_response is None or response["score"] > self.worst_response["score"]:
            self.worst_response = response

    def is_positive(self, min_blocked_share: float) -> bool:
        """Whether enough of the responses were blocked."""
        # divided, not multiplied: 0.28 * 25 is more than 7 in floating point
        return bool(self.blocked) and self.blocked / self.responses >= min_blocked_share


@dataclass(frozen=True)
class Targets:
    """P(unsafe) that the candidate is trained on."""

    by_id: dict[str, float]
    """Of each judged prompt."""
    prior: Callable[[float], float]
    """P(unsafe) that a score of the baseline stands for, on the same scale."""


def is_judged(response: Row) -> bool:
    """Whether a response said something and has a verdict, or was withheld by its provider's filter, which is one."""
    if response.get("finish_reason") in WITHHELD:
        return True
    return response["score"] is not None and response.get("finish_reason", "stop") in SAID


def with_verdict(response: Row) -> Row:
    """`response` with its verdict: what its provider's filter withheld counts as blocked, as surely as can be."""
    if response.get("finish_reason") not in WITHHELD:
        return response
    return {**response, "response": None, "flagged": True, "score": MAX_SCORE, "refusal": False}


def gather(judged: Iterable[Row], prompts: Mapping[str, Row] | None = None) -> dict[str, Evidence]:
    """Evidence by prompt id, from judged responses in any order; those without a verdict are left out.

    `prompts` describes the prompts, by id; without it, each one's first response does.
    """
    evidence: dict[str, Evidence] = {}
    for row in map(with_verdict, filter(is_judged, judged)):
        if row["id"] not in evidence:
            evidence[row["id"]] = Evidence(prompts[row["id"]] if prompts else row, row["prompt_score"])
        evidence[row["id"]].add(row)
    return evidence


def vote(evidence: Mapping[str, Evidence], prior_strength: float) -> Targets:
    """The mean of one vote of each responder and `prior_strength` votes of the baseline's score.

    The prior's logits are shifted by one constant until their mean P(unsafe) equals the mean over prompts of the
    smallest vote: a score just below the threshold may stand for a P(unsafe) near 1, and would outvote the responders.
    """
    if not evidence:
        return Targets({}, probability)
    scores = np.array([e.score for e in evidence.values()])
    target_rate = fmean(min(e.votes.values()) for e in evidence.values())
    # at `lowest` the mean is 1, at `highest` 0: the root is bracketed
    lowest, highest = float(scores.min()) - 2 * MAX_SCORE, float(scores.max()) + 2 * MAX_SCORE
    shift = float(brentq(lambda by: expit(scores - by).mean() - target_rate, lowest, highest))

    def prior(score: float) -> float:
        return probability(score - shift)

    by_id = {
        id: (math.fsum(e.votes.values()) + prior_strength * prior(e.score)) / (len(e.votes) + prior_strength)
        for id, e in evidence.items()
    }
    return Targets(by_id, prior)


def probability(score: float) -> float:
    """The logistic function of a score."""
    return 1 / (1 + math.exp(-max(-MAX_SCORE, min(MAX_SCORE, score))))
