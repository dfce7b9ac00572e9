"""Evidence on one prompt: k judged responses, fused with the baseline's score."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from guardloop.core.records import Row
from guardloop.mining.latent_class import Channel, Counts, fuse
from guardloop.mining.settings import MiningSettings

FARTHEST = 60.0  # a score beyond is as sure


@dataclass(slots=True)
class Tally:
    """What one responder's responses to one prompt showed."""

    responses: int = 0
    refusals: int = 0
    harm: float = 0.0
    """Sum of the judge's P(unsafe) over the responses that are no refusals."""
    worst: float = 0.0
    """The highest P(unsafe) that the judge gave to one of its responses."""


@dataclass(slots=True)
class Evidence:
    """What k responses to one passed prompt showed."""

    prompt: Row
    """The columns that describe the prompt."""
    score: float
    """The baseline's score for it."""
    responses: int = 0
    blocked: int = 0
    refusals: int = 0
    harm: float = 0.0
    """Sum of the judge's P(unsafe) over the responses."""
    harmless_answers: float = 0.0
    """Sum of what is left of it, over the responses that are no refusals."""
    harmless_refusals: float = 0.0
    worst: Row | None = None
    """The response with the highest score."""
    tallies: dict[str, Tally] = field(default_factory=dict)
    """By responder."""

    @property
    def prior(self) -> float:
        """The baseline's P(unsafe) for the prompt."""
        return probability(self.score)

    def add(self, row: Row) -> None:
        """Take one judged response into account."""
        self.responses += 1
        self.blocked += row["flagged"]
        self.refusals += row["refusal"] and not row["flagged"]
        self.harm += probability(row["score"])
        tally = self.tallies.setdefault(row["responder"], Tally())
        tally.responses += 1
        tally.worst = max(tally.worst, probability(row["score"]))
        if row["refusal"] and not row["flagged"]:
            self.harmless_refusals += probability(-row["score"])
            tally.refusals += 1
        else:
            self.harmless_answers += probability(-row["score"])
            tally.harm += probability(row["score"])
        if self.worst is None or row["score"] > self.worst["score"]:
            self.worst = row

    def is_positive(self, settings: MiningSettings) -> bool:
        """Whether enough of the responses were blocked."""
        # divided, not multiplied: 0.28 * 25 is more than 7 in floating point
        return bool(self.blocked) and self.blocked / self.responses >= settings.min_blocked_share

    def votes(self) -> list[float]:
        """One vote of each responder: the judge's P(unsafe) of its worst response."""
        return [tally.worst for tally in self.tallies.values()]

    def posterior(self, settings: MiningSettings) -> float:
        """P(the prompt is unsafe): the mean of a Beta with the prior as pseudo-counts.

        A response counts as harm by the judge's probability; what is left of it counts as harmless only in part,
        and hardly at all where the responder refused.
        """
        against = settings.answered_evidence * self.harmless_answers
        against += settings.refused_evidence * self.harmless_refusals
        total = settings.prior_strength + self.harm + against
        return (settings.prior_strength * self.prior + self.harm) / total if total else self.prior


def is_judged(row: Row) -> bool:
    """Whether a response was given, and has a verdict."""
    return row["score"] is not None and row.get("finish_reason") != "error"


def gather(judged: Iterable[Row], prompts: Mapping[str, Row] | None = None) -> dict[str, Evidence]:
    """Evidence by prompt id, from judged responses in any order; those without a verdict are left out.

    `prompts` describes the prompts, by id; without it, each one's first response does.
    """
    found: dict[str, Evidence] = {}
    for row in filter(is_judged, judged):
        if row["id"] not in found:
            found[row["id"]] = Evidence(prompts[row["id"]] if prompts else row, row["prompt_score"])
        found[row["id"]].add(row)
    return found


@dataclass(frozen=True)
class Weighed:
    """What the evidence amounts to."""

    targets: dict[str, float]
    """P(unsafe) by prompt id."""
    prior: Callable[[float], float]
    """P(unsafe) that the baseline's score stands for, on the targets' scale."""
    channels: list[Channel]
    """What each responder's responses were found to tell (fusion mixture)."""


def weigh(evidence: Mapping[str, Evidence], settings: MiningSettings) -> Weighed:
    """What each prompt's responses, and the baseline's score, say of it, in the way of `settings.fusion`."""
    if settings.fusion == "votes" and evidence:
        return _by_votes(evidence, settings.prior_strength)
    if settings.fusion == "beta" or not evidence:
        return Weighed({id: found.posterior(settings) for id, found in evidence.items()}, probability, [])
    scores = np.array([found.score for found in evidence.values()])
    counts = _counts(list(evidence.values()))
    fitted = fuse(scores, counts, settings.seed)
    posterior = fitted.posterior(scores, counts)
    targets = dict(zip(evidence, map(float, posterior), strict=True))
    return Weighed(targets, lambda score: float(fitted.prior(np.array([score]))[0]), fitted.channels)


def _by_votes(evidence: Mapping[str, Evidence], strength: float) -> Weighed:
    """The mean of the responders' votes and `strength` votes of the baseline's score.

    The own score is moved by the same amount for all prompts, so that it calls as many unsafe as the responders do
    together, each by its least: a score just below the threshold may stand for a P(unsafe) near 1, and would outvote
    them.
    """
    votes = {id: found.votes() for id, found in evidence.items()}
    scores = np.array([found.score for found in evidence.values()])
    share = fmean(min(each) for each in votes.values())
    lowest, highest = float(scores.min()) - 2 * FARTHEST, float(scores.max()) + 2 * FARTHEST
    moved = float(brentq(lambda by: expit(scores - by).mean() - share, lowest, highest))

    def prior(score: float) -> float:
        return probability(score - moved)

    targets = {
        id: (math.fsum(each) + strength * prior(evidence[id].score)) / (len(each) + strength)
        for id, each in votes.items()
    }
    return Weighed(targets, prior, [])


def _counts(evidence: list[Evidence]) -> list[Counts]:
    """Of each responder, what was harmful of its answers, and what was a refusal."""
    names = sorted({name for found in evidence for name in found.tallies})
    counts = []
    for name in names:
        tallies = [found.tallies.get(name, Tally()) for found in evidence]
        responses, refusals, harm = (
            np.array([getattr(tally, part) for tally in tallies], dtype=float)
            for part in ("responses", "refusals", "harm")
        )
        counts.append(Counts(f"{name}: harmful", np.minimum(harm, responses - refusals), responses - refusals))
        if refusals.any():
            counts.append(Counts(f"{name}: refused", refusals, responses))
    return counts


def probability(score: float) -> float:
    """The logistic function of a score."""
    return 1 / (1 + math.exp(-max(-FARTHEST, min(FARTHEST, score))))
