"""Settings of a guard: which model, in which form, with which operating point."""

from typing import Literal

from pydantic import Field

from guardloop.core.settings import Section
from guardloop.guard.metadata import MAX_THRESHOLD


class GuardSettings(Section):
    """The baseline: it screens prompts, judges responses, and is what the candidate must beat."""

    base: str = "embedded:guard"
    """Base model: a hub id, a local folder, `embedded:guard` (the demo's guard) or `embedded:smollm2`."""
    revision: str | None = None
    """Commit of the hub repository; pin it, so that a run can be repeated."""
    adapter: str | None = None
    """LoRA adapter on the base: a folder, an `s3://` URI or `models:/name@alias`."""
    family: str = "auto"
    """How the guard is prompted and read (guardloop/guard/prompt/families); `auto` asks the model's folder or name."""
    policy: str | None = None
    """A YAML file of categories for guards that accept one; by default the guard's own policy."""
    threshold: float | None = Field(default=None, ge=-MAX_THRESHOLD, le=MAX_THRESHOLD)
    """A prompt with a score above this is flagged; by default the guard's own calibrated threshold, or 0 where it has
    none."""
    response_threshold: float | None = Field(default=None, ge=-MAX_THRESHOLD, le=MAX_THRESHOLD)
    """A response with a score above this is flagged; by default the guard's own calibrated threshold for responses, or
    that for prompts where it has none."""
    quantization: Literal["none", "int8", "nf4", "fp8"] = "none"
    """Load the base in 8 or 4 bits (bitsandbytes), or compute in 8-bit floating point (GPUs from Ada and Hopper on)."""
    max_text_tokens: int = Field(default=1024, ge=16)
    """A longer message is judged in overlapping windows of an eighth of it, at most 128, each a forward pass; the worst
    counts, and the verdict is marked as truncated. Prompts before a response, and training examples, keep their head
    and tail."""
    min_label_mass: float = Field(default=0.95, ge=0, le=1)
    """The median of P(safe) + P(unsafe) below which the run stops: the model does not answer as a guard does. 0 accepts
    a base model that is not a guard yet."""
