"""Settings of a guard: which model, in which form, with which operating point."""

from typing import Literal

from pydantic import Field, field_validator

from guardloop.core.settings import Section, without_credentials


class GuardSettings(Section):
    """The baseline: it screens prompts, judges responses, and is what the candidate must beat."""

    base: str = "embedded:guard"
    """Base model: a hub id, a local folder, `embedded:guard` (the demo's guard) or `embedded:smollm2`."""
    revision: str | None = None
    """Commit of the hub repository; pin it, so that a run can be repeated."""
    adapter: str | None = None
    """LoRA adapter on the base: a folder, an `s3://` URI or `models:/name@alias`."""
    tracking_uri: str | None = None
    """MLflow where a `models:/` adapter is found; by default registry.tracking_uri, else MLFLOW_TRACKING_URI."""
    family: str = "auto"
    """How the guard is prompted and read (guardloop/guard/prompt/families); `auto` asks the model's folder or name."""
    policy: str | None = None
    """A YAML file of categories for guards that accept one; by default the guard's own policy."""
    excluded_categories: list[str] = []
    """Category codes left out of the policy, for guards that accept it."""
    threshold: float | None = None
    """A prompt with a score above this is flagged; by default the guard's own calibrated threshold, or 0 where it has
    none."""
    response_threshold: float | None = None
    """A response with a score above this is flagged; by default the guard's own calibrated threshold for responses, or
    that for prompts where it has none."""
    quantization: Literal["none", "int8", "nf4", "fp8"] = "none"
    """Load the base in 8 or 4 bits (bitsandbytes), or compute in 8-bit floating point (GPUs from Ada and Hopper on)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; `auto` is bfloat16 where the hardware has it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the guard runs; `auto` takes a GPU when there is one."""
    max_text_tokens: int = Field(default=1024, ge=16)
    """Longer messages keep their head and tail; the verdict is marked as truncated."""
    batch_tokens: int | None = Field(default=None, ge=256)
    """Upper bound of message tokens in one forward pass; by default 512 on a CPU, 4096 on a GPU. Halved by itself where
    memory runs out."""
    pack_tokens: int = Field(default=20992, ge=1024, multiple_of=512)
    """Tokens of one pack of conversations on a GPU; memory is bounded by it. The default fills an H100's 132
    multiprocessors evenly. Halved by itself where memory runs out."""
    categories: bool = False
    """Also read the categories of flagged messages, in a second pass over these."""
    min_label_mass: float = Field(default=0.95, ge=0, le=1)
    """The median of P(safe) + P(unsafe) below which the run stops: the prompt was rendered wrongly."""
    is_guard: bool = True
    """False for a base model that is not a guard yet: a low label mass is then reported, not refused."""

    @field_validator("tracking_uri")
    @classmethod
    def _no_password(cls, uri: str | None) -> str | None:
        return without_credentials(uri, "guard.tracking_uri")
