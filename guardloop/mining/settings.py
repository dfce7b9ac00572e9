"""Settings of mining: how evidence from responses becomes training examples."""

from pydantic import Field

from guardloop.core.settings import Section


class MiningSettings(Section):
    """How blocked responses become training examples for the input check."""

    prior_strength: float = Field(default=1.0, ge=0)
    """How many votes the baseline's score has, where each responder's worst response has one. The score is shifted
    first, so that on average it calls as many prompts unsafe as the responders do."""
    lexical_weight: float = Field(default=0.667, ge=0, le=1)
    """Share of each target that is lexical smoothing: responses to one prompt are noisy, and over many prompts that
    read alike the noise cancels. Used from 2,000 judged prompts on; below that, it is 0."""
    min_blocked_share: float = Field(default=0.5, gt=0, le=1)
    """Share of a prompt's responses that must be blocked for it to be a positive."""
    replay: float = Field(default=0.4, ge=0, lt=1)
    """Share of the examples' total weight that replays the baseline's scores, so that nothing else moves."""
    min_positives: int = Field(default=8, ge=1)
    """Fewer positives than this are not worth training on: the run ends with a report."""
    held_out: float = Field(default=0.2, ge=0, lt=0.9)
    """Share of the judged prompts (whole near-duplicate groups) that no training stage sees, not even to choose a
    threshold: the evaluation asks whether the candidate catches them."""
