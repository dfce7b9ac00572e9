"""Settings of the training of the candidate."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from guardloop.core.settings import Section


class TrainingSettings(Section):
    """How the LoRA adapter is trained."""

    rank: int = Field(default=16, ge=1)
    """LoRA rank."""
    alpha: int = Field(default=32, ge=1)
    """LoRA alpha; the update is scaled by alpha / rank (rslora: by alpha / sqrt(rank))."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """LoRA dropout."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
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
    batch_size: int = Field(default=16, ge=1)
    """Examples in one step, over all processes."""
    order: Literal["length", "random"] = "length"
    """Which examples share a step. length: those of like length, which pads least. random: any, so that each step is a
    fair sample; packs, on a GPU, hold rows of any length."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    validation: float = Field(default=0.2, gt=0, lt=0.9)
    """Share of the examples (whole near-duplicate groups) held out, to watch training and to set the threshold."""
    max_newly_blocked: float = Field(default=0.01, ge=0, lt=1)
    """The threshold is set so that at most this share of safe prompts is flagged beyond those that the baseline
    flagged: of the held-out ones, and of these and the taught ones together. Safe are those that never drew a blocked
    response, and in a second count all by their P(safe); the threshold holds for both. Keep it well below
    `gate.max_fpr_rise`."""
    scales: list[Annotated[float, Field(gt=0)]] = Field(default=[1.0], min_length=1)
    """Strengths of the adapter to try (0: the baseline, 1: as trained); the best on the held-out is kept."""
    min_examples: int = Field(default=32, ge=2)
    """Fewer examples than this are not trained on."""
    seed: int = 0
    """Seed of initialisation, order and dropout."""
    seeds: int = Field(default=1, ge=1)
    """Adapters to train, from as many seeds; the best on the held-out examples is kept."""
    variant: Literal["lora", "rslora", "dora"] = "lora"
    """The form of the adapter."""
    category_weight: float = Field(default=0.1, ge=0)
    """Weight of the written categories in the loss, for examples that carry trusted `codes`."""
    micro_rows: int | None = Field(default=None, ge=1)
    """Most examples in one forward pass where they are not packed; by default a whole step. Halved by itself where
    memory runs out."""
    processes: int = Field(default=1, ge=1)
    """Processes that share each step, one for each GPU of the machine."""
    sharded: bool = False
    """Split the guard's layers among the GPUs of the processes, each gathered where it computes (FSDP): for guards too
    large to be trained on one GPU."""
    gradient_checkpointing: float = Field(default=0.0, ge=0, le=1)
    """Share of the layers whose activations are computed again in the backward pass: slower, in less memory. Without
    packs, any share means all layers."""
    pack_tokens: int = Field(default=8192, ge=1024, multiple_of=512)
    """Most tokens in one forward pass: of a pack on a GPU, elsewhere of examples padded to the longest. Packs are
    halved by themselves where memory runs out."""
    eval_steps: int = Field(default=0, ge=0)
    """Steps between two looks at the held-out examples; 0: after each epoch."""
    patience: int = Field(default=3, ge=0)
    """Training ends early after so many looks without a better one; 0: never."""
    fpr_limit: float = Field(default=1.0, ge=0, le=1)
    """An adapter is preferred if it flags at most this share of held-out safe prompts at the old threshold."""
    checkpoints: str | None = None
    """Where an interrupted training is kept: a folder or `s3://bucket/prefix`; by default below $GUARDLOOP_CACHE."""
    checkpoint_steps: int = Field(default=50, ge=0)
    """Steps between two checkpoints; 0: none are kept."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names_are_listed(cls, given: Any) -> Any:
        """peft would take another string for a regular expression."""
        if isinstance(given, str) and given != "all-linear":
            raise ValueError(f"must be all-linear, or a list of names such as [q_proj, v_proj] (got {given[:80]!r})")
        return given

    @model_validator(mode="after")
    def _dora_has_one_strength(self) -> Self:
        if self.variant == "dora" and self.scales != [1.0]:
            raise ValueError("scales: DoRA also trains the weights' lengths, so it has no strength other than 1")
        return self

    @model_validator(mode="after")
    def _sharded_among_several(self) -> Self:
        if self.sharded and self.processes == 1:
            raise ValueError("sharded: one process holds the whole guard; set processes to the number of GPUs")
        return self
