"""Training on packed sequences: on a GPU, the examples of a step share one copy of their template, with gradient."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from guardloop.guard.inference.forward import longest_prefix
from guardloop.guard.inference.packed import PackedForward
from guardloop.guard.inference.packing import BLOCK, bins, max_labels
from guardloop.training.examples import Encoded

PARTS = (4, 2, 1)  # packs of a quarter, a half and the whole of the largest: few, as each is compiled
MIN_TOKENS = 8 * BLOCK


class Packs:
    """The forward passes of training, of packs of `max_tokens` tokens at most."""

    def __init__(
        self,
        model: Any,
        prefixes: Sequence[Sequence[int]],
        lead: Sequence[int],
        *,
        max_tokens: int,
        checkpointed: float = 0.0,
        compiled: bool = True,
    ) -> None:
        self.model = model
        self.prefixes = prefixes
        self.lead = lead
        self.max_tokens = max_tokens
        self.checkpointed = checkpointed
        self.compiled = compiled
        self._forwards: dict[tuple[tuple[int, ...], int], PackedForward] = {}

    def micro_batches(self, examples: Sequence[Encoded]) -> list[list[Encoded]]:
        """The examples in packs, each after one prefix; one that fits no pack is a micro-batch by itself."""
        groups: dict[tuple[int, ...], list[Encoded]] = {}
        for example in examples:
            groups.setdefault(longest_prefix(self.prefixes, example.tokens), []).append(example)
        found = []
        for prefix, group in groups.items():
            room, length = self.max_tokens - len(prefix), partial(self._length, prefix)
            packs, alone = bins(group, room, max_labels(self.max_tokens), length) if prefix else ([], group)
            found += [*packs, *([example] for example in alone)]
        return found

    def hidden(self, batch: Sequence[Encoded]) -> tuple[torch.Tensor, int] | None:
        """Hidden states `float[B, H]` at the label positions of one micro-batch and the tokens it took.

        None where it is no pack.
        """
        prefix = longest_prefix(self.prefixes, batch[0].tokens)
        rows = [self._row(prefix, e) for e in batch]
        tokens = len(prefix) + sum(map(len, rows))
        sizes = (self.max_tokens // part // BLOCK * BLOCK for part in PARTS)
        size = next((s for s in sizes if s >= tokens and max_labels(s) >= len(rows)), None)
        if not prefix or size is None:
            return None
        if (prefix, size) not in self._forwards:
            self._forwards[prefix, size] = PackedForward(
                self.model, prefix, size, with_gradient=True, checkpointed=self.checkpointed, compiled=self.compiled
            )
        return self._forwards[prefix, size](rows), tokens

    def resize(self, max_tokens: int) -> None:
        """Use packs of at most `max_tokens` tokens from here on."""
        self.max_tokens = max_tokens
        self._forwards.clear()

    def _length(self, prefix: Sequence[int], example: Encoded) -> int:
        return len(self._row(prefix, example))

    def _row(self, prefix: Sequence[int], example: Encoded) -> list[int]:
        return [*example.tokens[len(prefix) :], *self.lead]
