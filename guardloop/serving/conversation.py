"""From the messages of a request to what the guard judges.

The guard judges a prompt, or a response to a prompt. So each user message is judged as a prompt, and each assistant
message as the response to the user message before it. What a system, developer or tool message says is the product's
own and not judged. Any other role is refused: nothing is dropped unseen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from guardloop.core.errors import GuardLoopError

JUDGED = {"user", "assistant"}
PRODUCT = {"system", "developer", "tool", "function"}
Scope = Literal["all", "last"]


@dataclass(frozen=True)
class Judged:
    """A message to judge."""

    index: int
    """Its place in the request."""
    role: str
    row: dict[str, Any]
    """`prompt`, and `response` where the message is one: what `Guard.score` takes."""


def text_of(content: Any) -> str:
    """The text of a message's content: a string, nothing, or a list of parts. Raises GuardLoopError for other parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [content]:
        if not isinstance(part, dict) or not isinstance(text := part.get("text", part.get("refusal")), str):
            kind = str(part.get("type")) if isinstance(part, dict) else type(part).__name__
            raise GuardLoopError(f"content of type {kind[:40]!r} cannot be judged", "send text only")
        texts.append(text)
    return "\n".join(texts)


def to_judge(messages: Sequence[tuple[str, Any]], scope: Scope = "all") -> list[Judged]:
    """The messages, given as (role, content), that the guard is to judge; with scope `last` only the last of them.

    Raises GuardLoopError for an unknown role, for content that is no text, and where there is nothing to judge.
    """
    prompt, found = "", []
    for index, (role, content) in enumerate(messages):
        if role not in JUDGED | PRODUCT:
            known = ", ".join(sorted(JUDGED | PRODUCT))
            raise GuardLoopError(f"messages[{index}]: unknown role {role[:40]!r}", f"roles: {known}")
        if role in PRODUCT:
            continue
        text = text_of(content)
        if role == "user":
            prompt = text
            found.append(Judged(index, role, {"prompt": text, "response": None}))
        elif text.strip():  # an assistant message without text is a tool call
            found.append(Judged(index, role, {"prompt": prompt, "response": text}))
    if not found:
        raise GuardLoopError("there is no message to judge", "send at least one of role user or assistant")
    return found[-1:] if scope == "last" else found
