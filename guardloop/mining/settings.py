"""Settings of mining: how evidence from responses becomes training examples."""

from typing import Literal

from pydantic import Field

from guardloop.core.settings import Section


class MiningSettings(Section):
    """How blocked responses become lessons for the input check."""

    fusion: Literal["beta", "mixture", "votes"] = "beta"
    """How responses and the baseline's score become one target. beta: its score as pseudo-counts of a Beta
    distribution, with what responses count fixed below. mixture: what each responder's harm and refusals count, and
    what the score does, is learnt from the traffic itself, without labels; it wants some hundreds of judged prompts.
    votes: the mean of one vote for each responder, its worst response, and of the own score, moved so that it calls as
    many prompts unsafe as the responders do together, each prompt by its least vote; it wants a responder that
    complies."""
    prior_strength: float = Field(default=2.0, ge=0)
    """The baseline's score counts as this many responses (beta), or as this many votes (votes)."""
    answered_evidence: float = Field(default=0.5, ge=0, le=1)
    """What one unblocked answer counts, where a blocked one counts 1: a harmless answer proves little (beta)."""
    refused_evidence: float = Field(default=0.1, ge=0, le=1)
    """What one refusal counts: a responder that refuses tells little of the prompt (beta)."""
    lexical_weight: float = Field(default=0.0, ge=0, le=1)
    """Share of each target that is what the prompt's words say, learnt from the targets of the prompts that read like
    it: responses to one prompt are noisy, and over many the noise cancels. It wants some thousands of prompts."""
    min_blocked_share: float = Field(default=0.5, gt=0, le=1)
    """Share of a prompt's responses that must be blocked for it to be a positive."""
    hard_negatives_per_positive: int = Field(default=2, ge=0)
    """Never-blocked prompts nearest to the positives, taught as hard negatives."""
    replay: float = Field(default=0.5, ge=0, lt=1)
    """Share of the examples' total weight that replays the baseline's scores, so that nothing else moves."""
    min_positives: int = Field(default=8, ge=1)
    """Fewer positives than this are not worth training on: the run ends with a report."""
    held_out: float = Field(default=0.2, ge=0, lt=0.9)
    """Share of the judged prompts (whole near-duplicate groups) that no training stage sees, not even to choose a
    threshold: the evaluation asks whether the candidate catches them."""
    seed: int = Field(default=0, ge=0)
    """Seed of what is held out, of the sampling of replay rows, and of the folds in which words are learnt."""
