"""The forward pass of whole packs, for GPUs: FlexAttention under the pack's mask, each layer compiled, and in the last
layer only the label positions.

Guards of the Llama form only (`fits`): a layer is written out here, with the model's own modules in it, so that
adapters and quantized weights work as they do elsewhere.
"""

import os
from collections import deque
from collections.abc import Sequence
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention
from torch.nn.functional import embedding, pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from guardloop.core.places import cache_folder
from guardloop.guard.inference.forward import PrefixCache, decoder_of
from guardloop.guard.inference.packing import BLOCK, Layout, blocks_of, lay_out
from guardloop.guard.inference.products import FirstProducts, add_product, is_plain, product_after

SIDE = 64  # of the blocks of the mask for HOPPER_TILES without a gradient; else BLOCK
HOPPER_TILES: dict[int, Any] = {  # by the side of the blocks, in half precision; measured on it
    SIDE: {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3},
    BLOCK: {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3},
}
MAX_QUEUED = 2  # packs that wait for the GPU
FORMS = ("llama", "mistral")
BLOCK_TENSORS = [
    f"{full}{side}_{what}" for full in ("", "full_") for side in ("kv", "q") for what in ("num_blocks", "indices")
]
Pair = tuple[torch.Tensor, torch.Tensor]


class Residual(NamedTuple):
    """The residual stream `[1, N, H]`, and what is not yet added to it: the sum is taken where it is used next, in one
    kernel with the norm. Nothing is pending where layers add in place.
    """

    stream: torch.Tensor
    pending: torch.Tensor | None


def fits(model: Any) -> bool:
    """Whether the model's layers have the form that is written out here."""
    config = decoder_of(model).config
    return config.model_type in FORMS and not getattr(config, "sliding_window", None)


def is_tuned(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether HOPPER_TILES are used; elsewhere PyTorch chooses tiles, which may be as large as BLOCK."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def side_of(device: torch.device, dtype: torch.dtype, with_gradient: bool) -> int:
    """The side of the blocks of the mask: whole tiles must fill one."""
    return SIDE if is_tuned(device, dtype) and not with_gradient else BLOCK


class PackedForward:
    """Hidden states at the label positions of packs of one fixed size, after one prefix."""

    def __init__(
        self,
        model: Any,
        prefix: Sequence[int],
        size: int,
        *,
        with_gradient: bool = False,
        checkpointed: float = 0.0,
        compiled: bool = True,
        first: FirstProducts | None = None,
    ) -> None:
        """Packs of `size` tokens (a multiple of 128).

        With gradient, the prefix is part of each pack; else its keys and values are computed here, once, and the
        first layer's products may be looked up in `first`. `checkpointed` is the share of the layers whose activations
        are computed again in the backward pass.
        """
        self.model = model
        self.decoder = decoder_of(model)
        self.prefix = list(prefix)
        self.size = size
        self.first = first
        self.checkpointed = round(checkpointed * len(self.decoder.layers))
        self.prefix_kv: list[Pair] | None = None
        if not with_gradient:
            with torch.no_grad():
                self.prefix_kv = [_padded(pair) for pair in PrefixCache(model, self.prefix).layers] or None
        self.prefix_tokens = self.prefix if with_gradient else []
        function = _fresh_compile(layer) if compiled else layer
        self._layers = [_bind_layer_forward(module, function) for module in self.decoder.layers]
        side = side_of(model.device, model.dtype, with_gradient)
        self._masks = Masks(self._lay_out([[0]]), model.device, side)
        self._ends = deque[torch.cuda.Event]()

    def __call__(self, conversations: Sequence[Sequence[int]]) -> torch.Tensor:
        """Hidden states `float[B, H]` at the last token of each conversation, given as its tokens after the prefix.

        They must fit the pack. A call's backward pass must run before the next call.
        """
        layout = self._lay_out(conversations)
        self._wait()
        masks = self._masks.update(layout)
        tokens = _sent(layout.tokens, self.model.device)[None]
        hidden = self.decoder.embed_tokens(tokens)
        angles = self.decoder.rotary_emb(hidden, _sent(layout.positions, self.model.device)[None])
        # something pending from the start, where there will be: each layer is compiled for one form
        pending = None if _adds_in_place(self.decoder.layers[0]) else torch.zeros_like(hidden)
        residual = Residual(hidden, pending)
        last = len(self._layers) - 1
        for index, run in enumerate(self._layers):
            prefix_kv = self.prefix_kv[index] if self.prefix_kv else None
            mask, positions = (masks.labels, masks.label_positions) if index == last else (masks.tokens, None)
            if index < self.checkpointed and torch.is_grad_enabled():
                residual = checkpoint(run, residual, angles, prefix_kv, mask, positions, use_reentrant=False)
            elif index == 0 and self.first:
                residual = run(residual, angles, prefix_kv, mask, positions, tokens, self.first)
            else:
                residual = run(residual, angles, prefix_kv, mask, positions)
        read: torch.Tensor = self.decoder.norm(_sum(residual)[0, : len(conversations)])
        if read.device.type == "cuda":
            self._ends.append(torch.cuda.current_stream(read.device).record_event())
        return read

    def _wait(self) -> None:
        """Be no more than MAX_QUEUED packs ahead of the GPU, so that the page-locked memory of packs stays bounded."""
        while len(self._ends) > MAX_QUEUED:
            self._ends.popleft().synchronize()

    def _lay_out(self, conversations: Sequence[Sequence[int]]) -> Layout:
        return lay_out(conversations, self.size, len(self.prefix), self.prefix_tokens)


def _fresh_compile(function: Any) -> Any:
    """`function` compiled, with the compiled code kept on disk for later processes.

    Compiled in this process: torch's pool of compilers is larger than the few kernels need, and a process may wait for
    it for ever (pytorch#189290).
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
    # dynamo counts recompilations by code object and then runs it as it is, which takes more memory than a GPU has:
    # a new code object has a count of its own
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    return torch.compile(copy, dynamic=False, options={"compile_threads": 1})


def _bind_layer_forward(module: Any, function: Any) -> Any:
    """`function` as a method of the layer; where its weights are sharded (FSDP), they are gathered for each call."""
    module.packed = MethodType(function, module)
    register_fsdp_forward_method(module, "packed")  # wraps an attribute of the module, and nothing else
    return module.__dict__.pop("packed")  # taken off again: each size of packs binds its own


class Masks:
    """The masks of a pack's tokens and of its labels, in tensors that stay: compiled code sees the same objects."""

    def __init__(self, layout: Layout, device: torch.device, side: int) -> None:
        self.side = side
        self.label_positions = _sent(layout.label_positions, device)
        self._visible = [VisibleKeys(layout, queries, device) for queries in _queries(layout)]
        self.tokens, self.labels = (
            self._block_mask(layout, queries, visible).to(device)
            for queries, visible in zip(_queries(layout), self._visible, strict=True)
        )

    def update(self, layout: Layout) -> "Masks":
        """The masks of another layout of the same sizes."""
        _write(self.label_positions, layout.label_positions)
        for mask, queries, visible in zip((self.tokens, self.labels), _queries(layout), self._visible, strict=True):
            visible.update(layout, queries)
            new = self._block_mask(layout, queries, visible)
            for name in BLOCK_TENSORS:
                _write(getattr(mask, name), getattr(new, name))
        return self

    def _block_mask(self, layout: Layout, queries: np.ndarray, visible: "VisibleKeys") -> BlockMask:
        blocks = blocks_of(layout, queries, self.side)
        parts = (blocks.partial_count, blocks.partial, blocks.full_count, blocks.full)
        partial_count, partial, full_count, full = (torch.from_numpy(part)[None, None] for part in parts)
        sizes = len(queries), layout.offset + len(layout.tokens)
        return BlockMask.from_kv_blocks(
            partial_count, partial, full_count, full, BLOCK_SIZE=self.side, mask_mod=visible.mask, seq_lengths=sizes
        )


class VisibleKeys:
    """Which keys each of some queries sees: the prefix's, and those of its own conversation up to itself."""

    def __init__(self, layout: Layout, queries: np.ndarray, device: torch.device) -> None:
        first, last = self.ends = [_sent(end, device) for end in _own_keys(layout, queries)]
        prefix = layout.prefix_length

        def mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return ((key < prefix) | (key >= first[query])) & (key <= last[query])

        self.mask = mask

    def update(self, layout: Layout, queries: np.ndarray) -> None:
        """The same of another layout."""
        for old, new in zip(self.ends, _own_keys(layout, queries), strict=True):
            _write(old, new)


def _own_keys(layout: Layout, queries: np.ndarray) -> list[np.ndarray]:
    """The first and the last key that each query sees of its own conversation, `int32[Q]` each."""
    return [np.asarray(tokens + layout.offset, np.int32) for tokens in (layout.start[queries], queries)]


def _queries(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """All tokens, and those at labels."""
    return np.arange(len(layout.tokens)), layout.label_positions


def _sent(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device; nothing waits for a GPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.clone()


def _write(old: torch.Tensor, new: np.ndarray | torch.Tensor) -> None:
    """Other values in a tensor that stays; nothing waits for a GPU."""
    fresh = torch.from_numpy(new) if isinstance(new, np.ndarray) else new
    old.copy_(fresh.pin_memory() if old.device.type == "cuda" else fresh, non_blocking=True)


def _padded(pair: Pair) -> Pair:
    """Keys and values, `[1, P, heads, D]`, with P filled up to whole blocks; the mask hides the filling."""
    missing = -pair[0].shape[-2] % BLOCK
    keys, values = (pad(x.transpose(1, 2), (0, 0, 0, 0, 0, missing)).contiguous() for x in pair)
    return keys, values


def layer(
    module: Any,
    residual: Residual,
    angles: Pair,
    prefix_kv: Pair | None,
    mask: BlockMask,
    label_positions: torch.Tensor | None,
    tokens: torch.Tensor | None = None,
    first: FirstProducts | None = None,
) -> Residual:
    """One decoder layer of the Llama form, of all tokens `[1, N, H]`; with `label_positions`, of these alone.

    Their keys and values are those of all tokens. The first layer's products are looked up by `tokens[1, N]` where
    `first` has them.
    """
    attention, size = module.self_attn, module.self_attn.head_dim
    hidden = _sum(residual)
    if first is not None and tokens is not None:
        queries, keys, values = _looked_up(first, tokens, prefix_kv, label_positions)
    else:
        queries, keys, values = _projected(attention, module.input_layernorm(hidden), prefix_kv, label_positions)
    keys, values = _rotated(_heads(keys, size), angles), _heads(values, size)
    if prefix_kv is not None:
        keys = torch.cat([prefix_kv[0], keys], 1)
    cosine, sine = (_at(part, label_positions) for part in angles)
    queries = _rotated(_heads(queries, size), (cosine, sine))
    attended = _attend(queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), mask, attention.scaling)
    return _added(module, _at(hidden, label_positions), attended.transpose(1, 2).flatten(2))


def _projected(
    attention: Any, normed: torch.Tensor, prefix_kv: Pair | None, label_positions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (of the labels, where they are given), keys, and values after the prefix's: `[1, N, heads * D]`."""
    keys, values = attention.k_proj(normed), _values(attention.v_proj, normed, prefix_kv)
    return attention.q_proj(_at(normed, label_positions)), keys, values


def _looked_up(
    first: FirstProducts, tokens: torch.Tensor, prefix_kv: Pair | None, label_positions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same, from the first layer's table."""
    queries, keys, values = (embedding(tokens, table) for table in first)
    values = values if prefix_kv is None else torch.cat([prefix_kv[1].flatten(2), values], 1)
    return _at(queries, label_positions), keys, values


def _added(module: Any, hidden: torch.Tensor, attended: torch.Tensor) -> Residual:
    """What attention and MLP add to the stream: in place where the matrices are plain."""
    attention, mlp = module.self_attn, module.mlp
    if not _adds_in_place(module):
        hidden = hidden + attention.o_proj(attended)
        return Residual(hidden, mlp(module.post_attention_layernorm(hidden)))
    add_product(hidden, attended, attention.o_proj.weight)
    normed = module.post_attention_layernorm(hidden)
    add_product(hidden, mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed), mlp.down_proj.weight)
    return Residual(hidden, None)


def _values(module: Any, normed: torch.Tensor, prefix_kv: Pair | None) -> torch.Tensor:
    """Values `[1, N, heads * D]`, after the prefix's where there are any."""
    values: torch.Tensor
    if prefix_kv is None:
        values = module(normed)
    elif is_plain(module):
        values = product_after(prefix_kv[1].flatten(2), normed, module.weight)
    else:
        values = torch.cat([prefix_kv[1].flatten(2), module(normed)], 1)
    return values


def _adds_in_place(module: Any) -> bool:
    """Whether a layer's sums are taken in place; a gradient would need the summands."""
    return is_plain(module.self_attn.o_proj) and is_plain(module.mlp.down_proj)


def _sum(residual: Residual) -> torch.Tensor:
    stream, pending = residual
    return stream if pending is None else stream + pending


def _at(states: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """`[1, N, ...]` at `positions`; all of it without."""
    return states if positions is None else states[:, positions]


def _attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: BlockMask, scale: float
) -> torch.Tensor:
    """Attention under the mask: `[1, heads, Q, D]`."""
    grouped = queries.shape[1] != keys.shape[1]
    if queries.device.type == "cpu":  # where FlexAttention has no backward pass
        dense = create_mask(mask.mask_mod, None, None, queries.shape[2], keys.shape[2], device="cpu")
        return scaled_dot_product_attention(
            queries, keys, values, attn_mask=dense[0, 0], scale=scale, enable_gqa=grouped
        )
    options = HOPPER_TILES[mask.BLOCK_SIZE[0]] if is_tuned(queries.device, queries.dtype) else None
    seen: torch.Tensor = flex_attention(
        queries, keys, values, block_mask=mask, scale=scale, enable_gqa=grouped, kernel_options=options
    )
    return seen


def _heads(states: torch.Tensor, size: int) -> torch.Tensor:
    """`[1, N, heads * size]` to `[1, N, heads, size]`."""
    return states.view(*states.shape[:2], -1, size)


def _rotated(states: torch.Tensor, angles: Pair) -> torch.Tensor:
    """Rotary position embedding (Su et al., RoFormer, 2021), halves paired as in Llama."""
    cosine, sine = (part[:, :, None] for part in angles)
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat([-second, first], -1) * sine
