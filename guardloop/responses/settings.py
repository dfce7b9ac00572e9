"""Settings of the responders: which models answer the passed prompts, how often, and at what cost."""

from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from guardloop.core.settings import Section

ENDPOINT_ONLY = ("base_url", "api_key_env", "requests_per_minute", "tokenizer")


class OneResponder(Section):
    """One model that answers each passed prompt several times."""

    name: str | None = None
    """How its responses are tagged; by default the model's id."""
    kind: Literal["transformers", "vllm", "openai"] = "transformers"
    """Engine: `transformers` for a CPU, `vllm` for a GPU, `openai` for any OpenAI-compatible endpoint."""
    model: str = "embedded:smollm2"
    """A hub id, a local folder, `embedded:smollm2`, or the model's name at the endpoint."""
    revision: str | None = None
    """Commit of the hub repository; pin it, so that a run can be repeated."""
    samples: int = Field(default=4, ge=1, le=64)
    """Responses per prompt: one alone decides nothing."""
    max_new_tokens: int = Field(default=96, ge=1)
    """Responses are cut after this many tokens."""
    temperature: float = Field(default=0.7, ge=0, le=2)
    """Randomness of the responses; 0 always takes the likeliest token, so that all samples are the same."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Sample among the likeliest tokens that together have this probability."""
    system_prompt: str | None = None
    """The system's message before each prompt; by default the chat template's own."""
    prefill: str | None = Field(default=None, min_length=1)
    """Words that every response begins with, such as "Sure, here is": a responder that refuses or rambles then shows
    more of what a prompt can lead to. They are judged with the rest (transformers, vllm)."""
    batch_size: int | None = Field(default=None, ge=1)
    """Upper bound of responses made at the same time; by default 64 with transformers, and vLLM's own with vllm."""
    batch_tokens: int = Field(default=16384, ge=256)
    """Upper bound of tokens kept in the cache at the same time, prompts included (transformers)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; `auto` is bfloat16 where the hardware has it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the responder runs; `auto` takes a GPU when there is one (transformers)."""
    max_prompt_tokens: int = Field(default=2048, ge=16)
    """A prompt with more tokens, chat template included, is recorded as an error."""
    tokenizer: str | None = None
    """Model whose tokenizer counts a prompt's tokens; by default four bytes of text are taken for one (openai)."""
    base_url: str | None = None
    """Address of the endpoint, up to and with /v1 (openai)."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the endpoint's key; by default no key is sent (openai)."""
    concurrency: int = Field(default=8, ge=1, le=256)
    """Requests to the endpoint at the same time (openai)."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """A request that takes longer is tried again (openai)."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """Upper bound of requests per minute, retries included; by default none (openai)."""

    @property
    def tag(self) -> str:
        """What its responses are tagged with."""
        return self.name or self.model

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        address = urlsplit(value)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError("must start with http:// or https://, such as http://localhost:8000/v1")
        if address.username or address.password:
            raise ValueError("must not hold a password; put the key into an environment variable, see api_key_env")
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _variable_name(cls, value: str | None) -> str | None:
        if value is not None and not value.isidentifier():
            raise ValueError("must be the name of an environment variable, not the key itself")
        return value

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        if self.kind == "openai":
            if self.prefill is not None:
                raise ValueError("prefill: an endpoint cannot be told how to begin; leave it out")
            if self.base_url is None:
                raise ValueError("kind openai needs base_url, such as http://localhost:8000/v1")
            if self.model.startswith("embedded:"):
                raise ValueError("kind openai needs model, the model's name at the endpoint")
        elif given := [name for name in ENDPOINT_ONLY if getattr(self, name) is not None]:
            raise ValueError(f"{', '.join(given)}: only for kind openai; leave out, or set kind: openai")
        return self


class ResponderSettings(OneResponder):
    """The model behind the guard, or several whose responses are mixed, and what holds for all of them."""

    others: list[OneResponder] = []
    """More responders, each with all of its own settings; every one of them answers every passed prompt."""
    seed: int = 0
    """Seed of the sampling. Each response has its own, made of this, the prompt's id and the sample's number."""
    max_error_share: float = Field(default=0.05, ge=0, le=1)
    """The run stops when a larger share of one responder's responses could not be generated."""

    def each(self) -> list["ResponderSettings"]:
        """The settings of each responder by itself, the first one's first."""
        shared = {"seed": self.seed, "max_error_share": self.max_error_share}
        own = (one.model_dump(include=set(OneResponder.model_fields)) for one in (self, *self.others))
        return [ResponderSettings.model_validate({**one, **shared}) for one in own]

    @model_validator(mode="after")
    def _tags_differ(self) -> Self:
        tags = [self.tag, *(other.tag for other in self.others)]
        if twice := sorted({tag for tag in tags if tags.count(tag) > 1}):
            raise ValueError(f"two responders are called {twice[0]}; give one of them another name")
        return self
