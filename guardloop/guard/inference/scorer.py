"""From prompts as tokens to scores: one forward pass each, after a prefix whose keys and values are cached.

On a GPU, prompts are packed (`packed`); on a CPU, and for a few prompts, batched (`forward`). The score is taken in
float32 from the label position's hidden state, so that scores of half-precision models do not collapse into ties.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from guardloop.core.errors import GuardLoopError, first_line
from guardloop.guard.inference.forward import (
    PrefixCache,
    decoder_of,
    is_sharded,
    label_hidden,
    label_logits,
    longest_prefix,
    scores_of,
)
from guardloop.guard.inference.packed import PackedForward, fits
from guardloop.guard.inference.packing import packs, padded_batches
from guardloop.guard.inference.products import FirstProducts, first_products
from guardloop.guard.prompt.verdict import LabelTokens
from guardloop.models.loading import is_out_of_memory

log = logging.getLogger("guardloop")
BATCH_TOKENS = {"cpu": 512, "gpu": 4096}  # a CPU's caches hold no more: larger batches take half as long again
PACK_TOKENS = 20992
"""Tokens of one pack on a GPU, which bound its memory: these fill an H100's 132 multiprocessors evenly."""
MIN_PACK_TOKENS, MIN_BATCH_TOKENS, PACK_STEP = 1024, 256, 512
Prefix = tuple[int, ...]
Item = tuple[int, Sequence[int]]
"""A prompt's index, and its tokens after the prefix."""
Result = TypeVar("Result")
Scored = tuple[list[int], torch.Tensor, torch.Tensor]
"""Indices of prompts, with their scores and label masses, `float32[B]` each, on the model's device."""


class Scorer:
    """A guard model, and the `prefixes` with which its prompts start.

    Where memory runs out, packs and batches are halved for good. GuardLoopError is raised where that cannot help.
    """

    def __init__(
        self,
        model: Any,
        prefixes: Sequence[Sequence[int]],
        labels: LabelTokens,
        *,
        batch_tokens: int | None = None,
        pack_tokens: int = PACK_TOKENS,
        packed: bool | None = None,
    ) -> None:
        """`packed`: whether prompts are packed; by default on a GPU, for models that can be.

        `batch_tokens`: tokens of prompts in one forward pass of a batch; by default BATCH_TOKENS.
        """
        self.model = model
        self.prefixes = prefixes
        self.labels = labels
        self.batch_tokens = batch_tokens or BATCH_TOKENS["cpu" if model.device.type == "cpu" else "gpu"]
        self.pack_tokens = pack_tokens
        self.packed = (model.device.type == "cuda" if packed is None else packed) and fits(model)
        self._caches: dict[Prefix, PrefixCache] = {}
        self._packs: dict[tuple[Prefix, int], PackedForward] = {}
        self._first: FirstProducts | None = None
        self._packs_work = False  # none was computed yet

    @torch.inference_mode()
    def score(self, prompts: Sequence[Sequence[int]]) -> list[Scored]:
        """Scores and label masses at the end of each prompt, in packs or batches; nothing is waited for on a GPU."""
        return self._halving(lambda: [self._scored(*batch) for batch in self._hidden(prompts)])

    @torch.inference_mode()
    def next_tokens(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """The likeliest token after each prompt."""

        def work() -> list[int]:
            tokens = [0] * len(prompts)
            for indices, hidden in self._hidden(prompts):
                for index, token in zip(indices, label_logits(self.model, hidden).argmax(-1).tolist(), strict=True):
                    tokens[index] = token
            return tokens

        return self._halving(work)

    def _halving(self, work: Callable[[], Result]) -> Result:
        """What `work` returns; where memory runs out or packs fail, it is done again with less at once."""
        while True:
            try:
                return work()
            except RuntimeError as error:
                if is_out_of_memory(error):
                    remedy = self._halve
                elif self.packed and not self._packs_work:
                    log.warning("packs: %s; from here on batches, which are slower", first_line(error))
                    remedy = self._unpack
                else:
                    raise
            remedy()  # outside the handler, where the error's traceback would keep the failed pass's tensors alive

    def _unpack(self) -> None:
        """Do without packs, as where a GPU or its compiler cannot do them."""
        self.packed, self._packs, self._first = False, {}, None

    def _halve(self) -> None:
        if is_sharded(self.model) or (self.pack_tokens <= MIN_PACK_TOKENS and self.batch_tokens <= MIN_BATCH_TOKENS):
            raise GuardLoopError(
                f"scoring: out of memory with packs of {self.pack_tokens} and batches of {self.batch_tokens} tokens",
                "free the GPU from other work, set guard.quantization, or guard.max_text_tokens lower",
            )
        self.pack_tokens = min(self.pack_tokens, max(MIN_PACK_TOKENS, self.pack_tokens // 2 // PACK_STEP * PACK_STEP))
        self.batch_tokens = min(self.batch_tokens, max(MIN_BATCH_TOKENS, self.batch_tokens // 2))
        self._caches, self._packs, self._first = {}, {}, None
        log.warning(
            "out of memory: from here on packs of %d and batches of %d tokens", self.pack_tokens, self.batch_tokens
        )
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _scored(self, indices: list[int], hidden: torch.Tensor) -> Scored:
        logits = label_logits(self.model, hidden)
        pair = torch.stack([logits[:, self.labels.safe], logits[:, self.labels.unsafe]], -1)  # a list would wait
        masses = (pair - logits.logsumexp(-1, keepdim=True)).exp().sum(-1)
        return indices, scores_of(self.model, hidden, self.labels), masses

    def _hidden(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Hidden states at each prompt's last token, with indices into `prompts`."""
        by_prefix: dict[Prefix, list[Item]] = {}
        for index, prompt in enumerate(prompts):
            prefix = longest_prefix(self.prefixes, prompt)
            by_prefix.setdefault(prefix, []).append((index, prompt[len(prefix) :]))
        for prefix, items in by_prefix.items():
            sizes = [self.pack_tokens, self.pack_tokens // 4]
            packed, rest = packs(items, sizes, _length) if self.packed and prefix else ([], items)
            for size, pack in packed:
                hidden = self._packed(prefix, size)([tokens for _, tokens in pack])
                self._packs_work = True
                yield [index for index, _ in pack], hidden
            for batch in padded_batches(rest, self.batch_tokens, _length):
                hidden = label_hidden(self.model, self._cache(prefix), [tokens for _, tokens in batch])
                yield [index for index, _ in batch], hidden

    def _cache(self, prefix: Prefix) -> PrefixCache:
        if prefix not in self._caches:
            self._caches[prefix] = PrefixCache(self.model, prefix)
        return self._caches[prefix]

    def _packed(self, prefix: Prefix, size: int) -> PackedForward:
        if (prefix, size) not in self._packs:
            compiled = self.model.device.type == "cuda"
            if not is_sharded(self.model):
                self._first = self._first or first_products(decoder_of(self.model))
            self._packs[prefix, size] = PackedForward(self.model, prefix, size, compiled=compiled, first=self._first)
        return self._packs[prefix, size]


def _length(item: Item) -> int:
    return len(item[1])
