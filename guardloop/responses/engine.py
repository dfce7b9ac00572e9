"""The interface of all engines: requests go in, replies come out, in any order and as a stream."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, Protocol

TOP_P = 0.9  # of every response: the likeliest tokens that together have this probability
FinishReason = Literal["stop", "length", "filtered", "prompt_filtered", "thinking", "tool_call", "empty", "error"]
"""How a response ended. stop, length: it says something. All others have no text that a user would have seen:
filtered: the provider's filter withheld it; prompt_filtered: it refused the prompt; thinking: nothing but thoughts;
tool_call: nothing but a call of a tool; empty: nothing, for no reason given; error: it could not be generated."""


@dataclass(frozen=True)
class Request:
    """One response wanted: the `sample`-th to `prompt`. Requests for one prompt follow each other."""

    id: str
    prompt: str
    sample: int
    seed: int


@dataclass(frozen=True)
class Reply:
    """One response. `tokens` counts what was generated; with finish_reason error, `error` says why there is no text.

    `refused` is set where the endpoint itself calls the text a refusal.
    """

    id: str
    sample: int
    text: str
    finish_reason: FinishReason
    tokens: int
    error: str | None = None
    refused: bool = False


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
