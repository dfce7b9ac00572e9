"""Settings of the training of the candidate. What no user has a reason to turn is a constant beside its code.

The defaults are the recipe that docs/results.md measured.
"""

from typing import Annotated, Self

from pydantic import Field, model_validator

from guardloop.core.settings import Section


class TrainingSettings(Section):
    """How the LoRA adapter is trained."""

    rank: int = Field(default=16, ge=1)
    """LoRA rank; alpha is twice as much."""
    top_layers: float = Field(default=1.0, gt=0, le=1)
    """Share of the decoder's layers, counted from the top, that get an adapter; fewer train faster."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate. Larger guards want less: 5e-5 from a billion weights on."""
    epochs: float = Field(default=1, gt=0)
    """Passes over the training set."""
    batch_size: int = Field(default=64, ge=1)
    """Examples in one step, over all processes."""
    validation: float = Field(default=0.1, gt=0, lt=0.9)
    """Share of the examples (whole near-duplicate groups) that is not trained on: it chooses between adapters and sets
    the threshold."""
    max_newly_blocked: float = Field(default=0.01, ge=0, lt=1)
    """The threshold is set so that at most this share of safe prompts is flagged beyond those that the baseline
    flagged: of the validation examples, and of these and the training examples together. Safe are those that never drew
    a blocked response, and in a second count all by their P(safe); the threshold holds for both. Keep it well below
    `gate.max_fpr_rise`."""
    scales: list[Annotated[float, Field(gt=0)]] = Field(default=[1.0], min_length=1)
    """Strengths of the adapter to try (0: the baseline, 1: as trained); the best on the validation examples is kept."""
    seeds: int = Field(default=1, ge=1)
    """Adapters to train, from as many seeds; the best on the validation examples is kept."""
    processes: int = Field(default=1, ge=1)
    """Processes that share each step, one for each GPU of the machine."""
    sharded: bool = False
    """Split the guard's layers among the GPUs of the processes, each gathered where it computes (FSDP): for guards too
    large to be trained on one GPU."""
    gradient_checkpointing: float = Field(default=0.0, ge=0, le=1)
    """Share of the layers whose activations are computed again in the backward pass: slower, in less memory. Guards
    that cannot be packed, and all on a CPU, do so in every layer if the share is not 0."""

    @model_validator(mode="after")
    def _sharded_among_several(self) -> Self:
        if self.sharded and self.processes == 1:
            raise ValueError("sharded: one process holds the whole guard; set processes to the number of GPUs")
        return self
