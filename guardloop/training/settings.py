"""Settings of the training of the improved guard."""

from typing import Annotated, Literal

from pydantic import Field

from guardloop.settings import Section


class TrainingSettings(Section):
    """How the LoRA adapter is trained."""

    rank: int = Field(default=16, ge=1)
    """LoRA rank."""
    alpha: int = Field(default=32, ge=1)
    """LoRA alpha; the update is scaled by alpha / rank."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """LoRA dropout."""
    targets: str | list[str] = "all-linear"
    """Modules that get an adapter: names, or all-linear."""
    top_layers: float = Field(default=1.0, gt=0, le=1)
    """Share of the decoder's layers, counted from the top, that get an adapter; fewer train faster."""
    learning_rate: float = Field(default=5e-5, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    epochs: float = Field(default=2, gt=0)
    """Passes over the training set."""
    batch_rows: int = Field(default=16, ge=1)
    """Examples in one step."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    validation: float = Field(default=0.2, gt=0, lt=0.9)
    """Share of the examples (whole near-duplicate groups) held out, to watch training and to set the threshold."""
    max_newly_blocked: float = Field(default=0.02, ge=0, lt=1)
    """The threshold is set so that this share of held-out never-blocked prompts is flagged at most."""
    scales: list[Annotated[float, Field(gt=0)]] = Field(default=[1.0], min_length=1)
    """Strengths of the adapter to try (1: as trained); the best on the held-out examples is kept."""
    min_examples: int = Field(default=32, ge=2)
    """Fewer examples than this are not trained on."""
    seed: int = 0
    """Seed of initialisation, order and dropout."""
