"""The interface of all engines: requests go in, replies come out, in any order and as a stream."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, Protocol

from guardloop.models.locate import locate
from guardloop.responses.settings import ResponderSettings

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Request:
    """One response wanted: the `sample`-th to `prompt`. Requests for one prompt follow each other."""

    id: str
    prompt: str
    sample: int
    seed: int


@dataclass(frozen=True)
class Reply:
    """One response. `tokens` counts what was generated; with finish_reason error, `error` says why there is no text."""

    id: str
    sample: int
    text: str
    finish_reason: FinishReason
    tokens: int
    error: str | None = None


class Responder(Protocol):
    """An engine that answers prompts, until it is closed."""

    name: str
    """What its responses are tagged with."""

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """One reply per request, in any order. Reads ahead a bounded number of requests.

        What is wrong with one request becomes a reply with finish_reason error; what is wrong with all of them
        raises GuardLoopError.
        """
        ...

    def close(self) -> None:
        """Give back what the engine holds: memory, processes, connections."""
        ...


def sample_seed(seed: int, id: str, sample: int) -> int:
    """The seed of one response: 31 bits, the same in whatever shard, batch or order it is generated."""
    digest = blake2b(f"{seed}\0{sample}\0{id}".encode("utf-8", "replace"), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF


def failure(request: Request, reason: str) -> Reply:
    """The reply to a request that cannot be answered."""
    return Reply(request.id, request.sample, "", "error", 0, reason)


def build_responder(settings: ResponderSettings, load: str | None = None) -> Responder:
    """The engine that `settings` asks for. Raises GuardLoopError if it cannot work here.

    `load` is the folder to load the model from, where the caller has it already; by default it is located.
    """
    if settings.kind == "openai":
        from guardloop.responses.engines.openai import OpenAIResponder  # noqa: PLC0415  (each engine has its own dependencies)

        return OpenAIResponder(settings)
    if settings.kind == "vllm":
        from guardloop.responses.engines.vllm import VllmResponder  # noqa: PLC0415

        return VllmResponder(settings, load or locate(settings.model))
    from guardloop.responses.engines.transformers import TransformersResponder  # noqa: PLC0415

    return TransformersResponder(settings, load or locate(settings.model))
