"""The keys and values of the rows that are being generated, each row at positions of its own.

Row r's token t lies at [r, :, t]. Active rows are always the first `rows`: a finished row's place is taken by the
last one, so that a step computes active rows only, and rows of any length stand side by side without padding tokens.
"""

import torch
from torch import Tensor
from transformers import Cache

STEP = 64  # widths are multiples of this, so that memory is laid out anew only now and then


def width_for(longest: int) -> int:
    """Places that a row of at most `longest` tokens takes up."""
    return -(-longest // STEP) * STEP


class Slots(Cache):  # type: ignore[misc]  # transformers has no types
    """A cache that a model's forward pass of one token per row reads and extends."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.rows = 0
        self.width = 0
        self._store: list[tuple[Tensor, Tensor]] = []  # per layer: keys, values [capacity, H, width, D]
        self._index = torch.empty(0, dtype=torch.int64)
        self._positions = self._index
        self._seen = 0

    def admit(self, prefill: Cache, lengths: list[int], copies: list[int], longest: int) -> None:
        """Append rows: prompt i of `prefill`, with `lengths[i]` tokens, `copies[i]` times.

        `longest` is the length that any row can still grow to; `prefill` is a DynamicCache [P, H, T, D].
        """
        layers = [(layer.keys, layer.values) for layer in prefill.layers]
        self._reserve(self.rows + sum(copies), longest, layers)
        for stored, new in zip(self._store, layers, strict=True):
            for store, source in zip(stored, new, strict=True):
                row = self.rows
                for i, (length, count) in enumerate(zip(lengths, copies, strict=True)):
                    store[row : row + count, :, :length] = source[i, :, :length]
                    row += count
        self.rows += sum(copies)

    def drop(self, finished: list[int]) -> list[tuple[int, int]]:
        """Free the `finished` rows. Returns the moves (from, to) that keep the active rows together."""
        gone = set(finished)
        left = self.rows - len(gone)
        holes = sorted(row for row in gone if row < left)
        moves = list(zip((row for row in range(left, self.rows) if row not in gone), holes, strict=True))
        self.rows = left
        if moves:
            source, target = (torch.tensor(rows, device=self._store[0][0].device) for rows in zip(*moves, strict=True))
            for stored in self._store:
                for store in stored:
                    store[target] = store[source]
        return moves

    def place(self, positions: Tensor) -> None:
        """Say where the next token of each active row goes: `positions: int64[rows]`."""
        self._positions = positions
        self._index = torch.arange(self.rows, device=positions.device)
        self._seen = int(positions.max()) + 1

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What each row's next token may look at, to be added to the scores: [rows, 1, 1, seen]."""
        hidden = torch.arange(self._seen, device=self._positions.device) > self._positions[:, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None, :]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store one token per row ([rows, H, 1, D]); returns the layer's keys and values [rows, H, seen, D]."""
        keys, values = self._store[layer_idx]
        keys[self._index, :, self._positions] = key_states[:, :, 0]
        values[self._index, :, self._positions] = value_states[:, :, 0]
        return keys[: self.rows, :, : self._seen], values[: self.rows, :, : self._seen]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that the longest row has so far."""
        return max(self._seen - 1, 0)

    def _reserve(self, rows: int, longest: int, layers: list[tuple[Tensor, Tensor]]) -> None:
        """Make room for `rows` rows of `longest` tokens; give room back when far less is needed."""
        width = width_for(longest)
        capacity = len(self._store[0][0]) if self._store else 0
        if rows <= capacity and width <= self.width <= 2 * width:
            return
        kept = min(width, self.width)
        if not self._store:
            self._store = [(keys[:0], values[:0]) for keys, values in layers]
        for index, pair in enumerate(self._store):  # layer by layer, so that only one layer is held twice
            fresh = [old.new_zeros(rows, old.shape[1], width, old.shape[3]) for old in pair]
            for new, old in zip(fresh, pair, strict=True):
                new[: self.rows, :, :kept] = old[: self.rows, :, :kept]
            self._store[index] = (fresh[0], fresh[1])
        self.width = width
