"""Training on packs: on a GPU, the examples of a step share one copy of their template, with gradient."""

from collections.abc import Sequence
from typing import Any

import torch

from guardloop.guard.inference.forward import behind
from guardloop.guard.inference.packed import PackedForward
from guardloop.guard.inference.packing import BLOCK, bins, most_rows
from guardloop.training.loss import Encoded

SIZES = (4, 2, 1)  # packs of a quarter, a half and the whole of the largest: few, as each is compiled


class Packs:
    """The forward passes of training, of packs of `largest` tokens at most."""

    def __init__(
        self,
        model: Any,
        prefixes: Sequence[Sequence[int]],
        lead: Sequence[int],
        *,
        largest: int,
        checkpointed: float = 0.0,
        compiled: bool = True,
    ) -> None:
        self.model = model
        self.prefixes = prefixes
        self.lead = lead
        self.largest = largest
        self.checkpointed = checkpointed
        self.compiled = compiled
        self._forwards: dict[tuple[tuple[int, ...], int], PackedForward] = {}

    def pieces(self, examples: Sequence[Encoded]) -> list[list[Encoded]]:
        """The examples in packs, each behind one template; one that fits no pack is a piece by itself."""
        groups: dict[tuple[int, ...], list[Encoded]] = {}
        for example in examples:
            groups.setdefault(behind(self.prefixes, example.tokens), []).append(example)
        pieces = []
        for prefix, group in groups.items():
            read = most_rows(self.largest) // max(e.positions for e in group)
            lengths = [len(self._row(prefix, e)) for e in group]
            chosen = bins(lengths, self.largest - len(prefix), read) if prefix and read else []
            packed = {i for pack in chosen for i in pack}
            pieces += [[group[i] for i in pack] for pack in chosen]
            pieces += [[e] for i, e in enumerate(group) if i not in packed]
        return pieces

    def hidden(self, piece: Sequence[Encoded]) -> tuple[torch.Tensor, int] | None:
        """Hidden states at the answers' positions of one piece and the tokens it took; None where it is no pack."""
        prefix = behind(self.prefixes, piece[0].tokens)
        rows = [self._row(prefix, e) for e in piece]
        reads = [e.positions for e in piece]
        tokens = len(prefix) + sum(map(len, rows))
        sizes = (self.largest // part // BLOCK * BLOCK for part in SIZES)
        size = next((s for s in sizes if s >= tokens and most_rows(s) >= sum(reads)), None)
        if not prefix or size is None:
            return None
        if (prefix, size) not in self._forwards:
            self._forwards[prefix, size] = PackedForward(
                self.model, prefix, size, with_gradient=True, checkpointed=self.checkpointed, compiled=self.compiled
            )
        return self._forwards[prefix, size](rows, reads), tokens

    def halve(self) -> bool:
        """Use packs half as large from here on; False, with nothing changed, where they are small already."""
        half = self.largest // 2 // BLOCK * BLOCK
        if half < 8 * BLOCK:
            return False
        self.largest = half
        self._forwards.clear()
        return True

    def _row(self, prefix: Sequence[int], example: Encoded) -> list[int]:
        return [*example.tokens[len(prefix) :], *self.lead, *example.answer[:-1]]
