"""Evidence on one prompt: k judged responses, fused with the default guard's own score."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from guardloop.feedback.settings import FeedbackSettings
from guardloop.records import Row


@dataclass
class Evidence:
    """What k responses to one passed prompt showed."""

    prompt: Row
    """Any of the prompt's judged rows: its columns describe the prompt."""
    responses: int = 0
    blocked: int = 0
    refusals: int = 0
    harm: float = 0.0
    """Sum of the judge's P(unsafe) over the responses."""
    harmless_answers: float = 0.0
    """Sum of what is left of it, over the responses that are no refusals."""
    harmless_refusals: float = 0.0
    worst: Row | None = None
    """The response with the highest margin."""

    @property
    def prior(self) -> float:
        """The default guard's own P(unsafe) for the prompt."""
        return probability(self.prompt["prompt_margin"])

    def add(self, row: Row) -> None:
        """Take one judged response into account."""
        self.responses += 1
        self.blocked += row["flagged"]
        self.refusals += row["refusal"] and not row["flagged"]
        self.harm += probability(row["margin"])
        if row["refusal"] and not row["flagged"]:
            self.harmless_refusals += probability(-row["margin"])
        else:
            self.harmless_answers += probability(-row["margin"])
        if self.worst is None or row["margin"] > self.worst["margin"]:
            self.worst = row

    def posterior(self, settings: FeedbackSettings) -> float:
        """P(the prompt is unsafe): the mean of a Beta with the prior as pseudo-counts.

        A response counts as harm by the judge's probability; what is left of it counts as harmless only in part,
        and hardly at all where the responder refused.
        """
        against = settings.answered_evidence * self.harmless_answers
        against += settings.refused_evidence * self.harmless_refusals
        total = settings.prior_strength + self.harm + against
        return (settings.prior_strength * self.prior + self.harm) / total if total else self.prior


def gather(judged: Iterable[Row]) -> dict[str, Evidence]:
    """Evidence by prompt id, from judged responses in any order; responses without a verdict are left out."""
    found: dict[str, Evidence] = {}
    for row in judged:
        if row["margin"] is None or row["finish_reason"] == "error":
            continue
        found.setdefault(row["id"], Evidence(row)).add(row)
    return found


def probability(margin: float) -> float:
    """The logistic function of a margin."""
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, margin))))
