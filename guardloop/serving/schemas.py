"""What is asked and answered, as the OpenAPI page shows it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from guardloop.serving.settings import MAX_MESSAGES


class Message(BaseModel):
    """A message of a conversation, as OpenAI's chat completions have it."""

    model_config = ConfigDict(extra="ignore")

    role: str
    content: Any = None


class CheckRequest(BaseModel):
    """A conversation to judge: `messages`, or a `prompt` and perhaps its `response`."""

    model_config = ConfigDict(extra="forbid")

    messages: list[Message] = Field(default=[], max_length=MAX_MESSAGES)
    prompt: str | None = None
    response: str | None = None
    scope: Literal["all", "last"] = "all"
    conversation: str | None = Field(default=None, max_length=200)
    """Your id of the conversation: requests with the same one belong together in the log."""

    @model_validator(mode="after")
    def _one_form(self) -> "CheckRequest":
        if bool(self.messages) == (self.prompt is not None):
            raise ValueError("send `messages`, or a `prompt` and perhaps its `response`")
        if self.response is not None and self.prompt is None:
            raise ValueError("`response` goes with a `prompt`")
        return self


class JudgedMessage(BaseModel):
    """The verdict on one message."""

    index: int
    role: str
    verdict: Literal["safe", "unsafe", "failed"]
    """`failed`: it could not be judged; `error` says why."""
    flagged: bool
    score: float | None
    """log P(unsafe) - log P(safe)."""
    threshold: float
    probability: float | None
    """P(unsafe), after the guard's calibration."""
    categories: list[str] = []
    truncated: bool = False
    """Whether a part of the message was left out, because it was too long."""
    error: str | None = None


class CheckResponse(BaseModel):
    """The worst verdict of a request, and each message's own."""

    id: str
    conversation: str
    flagged: bool
    verdict: Literal["safe", "unsafe", "failed"]
    score: float | None
    threshold: float
    categories: list[str]
    guard: str
    """The version that judged."""
    judged: list[JudgedMessage]


class ModerationRequest(BaseModel):
    """As OpenAI's moderations: a text, texts, or parts of type text."""

    model_config = ConfigDict(extra="ignore")

    input: str | list[Any]
    model: str | None = None


class ChatRequest(BaseModel):
    """As OpenAI's chat completions; the answer is the guard's verdict on the last message."""

    model_config = ConfigDict(extra="ignore")

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    model: str | None = None
    stream: bool = False
    user: str | None = Field(default=None, max_length=200)
