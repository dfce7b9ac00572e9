"""The forward pass after a prefix whose keys and values are cached, expanded to the rows of a batch: for CPUs, for
small jobs on a GPU, and with gradient for training. `packed` does the same for many rows on a GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache

from guardloop.guard.prompt.verdict import LabelTokens


class PrefixCache:
    """Keys and values of a prefix, computed once: one `[1, heads, P, D]` pair per layer."""

    def __init__(self, model: Any, prefix: Sequence[int]) -> None:
        self.prefix = list(prefix)
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        if self.prefix:
            cache = DynamicCache()
            ids = torch.tensor([self.prefix], device=model.device)
            decoder_of(model)(input_ids=ids, past_key_values=cache, use_cache=True)
            self.layers = [(layer.keys, layer.values) for layer in cache.layers]

    def expand(self, batch: int) -> DynamicCache:
        """The same keys and values for each of `batch` rows."""
        cache = DynamicCache()
        for index, (keys, values) in enumerate(self.layers):
            cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), index)
        return cache


def label_hidden(model: Any, cache: PrefixCache, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Hidden states `float[B, H]` at the last token of each row; a row is what follows the cached prefix.

    Gradients flow, through the prefix too if the cache was made with gradient.
    """
    start, width = len(cache.prefix), max(map(len, rows))
    # right padding: a causal model's real tokens never see what follows them, so no mask is needed
    ids = torch.tensor([[*r, *[0] * (width - len(r))] for r in rows], device=model.device)
    positions = torch.arange(start, start + width, device=model.device).expand(len(rows), -1)
    past = cache.expand(len(rows)) if start else None
    hidden = decoder_of(model)(
        input_ids=ids, position_ids=positions, past_key_values=past, use_cache=past is not None
    ).last_hidden_state
    last = torch.tensor([len(r) - 1 for r in rows], device=model.device)
    at_labels: torch.Tensor = hidden[torch.arange(len(rows), device=model.device), last]
    return at_labels


def longest_prefix(prefixes: Sequence[Sequence[int]], tokens: Sequence[int]) -> tuple[int, ...]:
    """The longest of `prefixes` that `tokens` start with; empty if none."""
    matching = [tuple(p) for p in prefixes if list(tokens[: len(p)]) == list(p) and len(tokens) > len(p)]
    return max(matching, key=len, default=())


def label_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """All logits `float32[B, V]` of hidden states `[B, H]`, as the model itself gives them."""
    head: torch.Tensor = model.get_output_embeddings()(hidden)
    return _as_the_model(model, head.float())


def scores_of(model: Any, hidden: torch.Tensor, labels: LabelTokens) -> torch.Tensor:
    """logit(unsafe) - logit(safe), `float32[B]`: of the difference of the head's two rows, taken before rounding."""
    head = model.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    if _soft_cap(model) is None:
        scores: torch.Tensor = hidden.float() @ (weight[labels.unsafe].float() - weight[labels.safe].float())
        if bias is not None:
            scores = scores + (bias[labels.unsafe] - bias[labels.safe]).float()
        return _as_the_model(model, scores)
    pair = [labels.safe, labels.unsafe]
    logits = hidden.float() @ weight[pair].float().t()
    safe, unsafe = _as_the_model(model, logits if bias is None else logits + bias[pair].float()).unbind(-1)
    return unsafe - safe


def _soft_cap(model: Any) -> float | None:
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return float(cap) if cap else None


def _as_the_model(model: Any, logits: torch.Tensor) -> torch.Tensor:
    """What some architectures do to the head's outputs: divided (Granite), multiplied (Cohere), capped (Gemma 2)."""
    config, cap = model.config.get_text_config(), _soft_cap(model)
    logits = logits * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def is_sharded(model: Any) -> bool:
    """Whether the model's layers are split among processes (guardloop.training.sharding)."""
    return isinstance(decoder_of(model), FSDPModule)


def decoder_of(model: Any) -> Any:
    """The decoder without its output head, also inside an adapter."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner.get_decoder() if hasattr(inner, "get_decoder") else inner.model
