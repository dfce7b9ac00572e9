"""The one place that reads a guard's answer: the label tokens, and the exact grammar of a written verdict."""

from dataclasses import dataclass
from typing import Literal

from guardloop.core.errors import GuardLoopError
from guardloop.guard.prompt.policy import parse_codes
from guardloop.guard.prompt.renderer import Renderer

SAFE, UNSAFE = "safe", "unsafe"


@dataclass(frozen=True)
class LabelTokens:
    """Where a guard's label is read: after the tokens `before` it, the choice between `safe` and `unsafe`."""

    before: tuple[int, ...]
    safe: int
    unsafe: int


def label_tokens(renderer: Renderer) -> LabelTokens:
    """The first tokens in which the answers `safe` and `unsafe` differ, and the tokens that both share before.

    Raises GuardLoopError if the tokenizer does not tell the answers apart.
    """
    safe, unsafe = renderer.answer(SAFE), renderer.answer(UNSAFE)
    position = next((i for i, (a, b) in enumerate(zip(safe, unsafe, strict=False)) if a != b), None)
    if position is None:
        raise GuardLoopError("guard: the tokenizer gives `safe` and `unsafe` no differing token")
    return LabelTokens(tuple(safe[:position]), safe[position], unsafe[position])


@dataclass(frozen=True)
class WrittenVerdict:
    """A verdict that a guard wrote out."""

    label: Literal["safe", "unsafe"]
    categories: tuple[str, ...] = ()


def parse_verdict(text: str, codes: list[str]) -> WrittenVerdict | None:
    """Read `safe`, or `unsafe`, newline, codes. None for anything else: a parse error, never "unsafe"."""
    lines = text.strip().split("\n")
    if lines == [SAFE]:
        return WrittenVerdict("safe")
    if lines[0] != UNSAFE or len(lines) != 2:
        return None
    try:
        found = parse_codes(lines[1], codes)
    except ValueError:
        return None
    return WrittenVerdict("unsafe", tuple(found)) if found else None
