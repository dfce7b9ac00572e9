"""Training examples: as tokens, split into training and validation, refused where they cannot teach a guard."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from guardloop.core.errors import GuardLoopError
from guardloop.core.records import Row
from guardloop.guard.prompt.renderer import Renderer

UNSAFE_TARGET = 0.5  # an example whose target is above it counts as unsafe where examples are ranked or counted


@dataclass(frozen=True)
class Encoded:
    """A training example as tokens `int[T]`, which end where the answer begins, with the wanted P(unsafe)."""

    id: str
    tokens: list[int]
    target: float
    weight: float


def encode(rows: Sequence[Row], renderer: Renderer) -> list[Encoded]:
    """Training examples as tokens, in order."""
    prompts = renderer.render_all([(row["prompt"], row["response"]) for row in rows])
    return [
        Encoded(row["id"], prompt.tokens, row["target"], row["weight"])
        for row, prompt in zip(rows, prompts, strict=True)
    ]


def split(examples: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and validation examples; a group falls wholly on one side, by a hash of its key and the seed."""

    def is_validation(row: Row) -> bool:
        digest = hashlib.sha256(f"{seed}/{row['group']}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 < share

    return [r for r in examples if not is_validation(r)], [r for r in examples if is_validation(r)]


def is_replay(row: Row) -> bool:
    """Whether an example only asks the guard to answer as the baseline did."""
    return str(row["kind"]).startswith("replay")


def unsafe_count(examples: Sequence[Row]) -> int:
    """How many examples are to be called unsafe."""
    return sum(row["target"] > UNSAFE_TARGET for row in examples)


def check_examples(examples: Sequence[Row]) -> None:
    """Raises GuardLoopError where there are none, or only safe or only unsafe ones."""
    if not examples:
        raise GuardLoopError("training: there are no examples", "screen more traffic")
    unsafe = unsafe_count(examples)
    if unsafe in (0, len(examples)):
        kind = "safe" if unsafe == 0 else "unsafe"
        raise GuardLoopError(
            f"training: every example is {kind}; such a training set makes a guard that says {kind} to everything",
            "mine both positives and negatives, with replay",
        )
