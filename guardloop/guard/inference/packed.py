"""The forward pass of whole packs, for GPUs: FlexAttention under the pack's mask, each layer compiled, and in the last
layer only the rows that are read.

Guards of the Llama form only (`fits`): a layer is written out here, with the model's own modules in it, so that
adapters and quantized weights work as they do elsewhere.
"""

import os
from collections import deque
from collections.abc import Sequence
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention
from torch.nn.functional import embedding, pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from guardloop.core.places import cache_folder
from guardloop.guard.inference.forward import PrefixCache, decoder_of
from guardloop.guard.inference.packing import BLOCK, Layout, blocks_of, lay_out, most_rows
from guardloop.guard.inference.products import FirstProducts, add_product, is_plain, product_behind

SIDE = 64  # of the squares of the mask for HOPPER_TILES without a gradient; else BLOCK
HOPPER_TILES: dict[int, Any] = {  # by the side of the squares, in half precision; measured on it
    SIDE: {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3},
    BLOCK: {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3},
}
AHEAD = 2
FORMS = ("llama", "mistral")
BLOCK_TENSORS = [
    f"{full}{side}_{what}" for full in ("", "full_") for side in ("kv", "q") for what in ("num_blocks", "indices")
]
Pair = tuple[torch.Tensor, torch.Tensor]
States = tuple[torch.Tensor, torch.Tensor | None]


def fits(model: Any) -> bool:
    """Whether the model's layers have the form that is written out here."""
    config = decoder_of(model).config
    return config.model_type in FORMS and not getattr(config, "sliding_window", None)


def is_tuned(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether HOPPER_TILES are used; elsewhere PyTorch chooses tiles, which may be as large as BLOCK."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def side_of(device: torch.device, dtype: torch.dtype, with_gradient: bool) -> int:
    """The side of the squares of the mask: whole tiles must fill one."""
    return SIDE if is_tuned(device, dtype) and not with_gradient else BLOCK


class PackedForward:
    """Hidden states at the label positions of packs of one fixed size, behind one template."""

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

        With gradient, the template is part of each pack; else its keys and values are computed here, once, and the
        first layer's products may be looked up in `first`. `checkpointed` is the share of the layers whose activations
        are computed again in the backward pass.
        """
        self.model = model
        self.decoder = decoder_of(model)
        self.prefix = list(prefix)
        self.size = size
        self.first = first
        self.read = most_rows(size)
        self.checkpointed = round(checkpointed * len(self.decoder.layers))
        self.cached: list[Pair] | None = None
        if not with_gradient:
            with torch.no_grad():
                self.cached = [_padded(pair) for pair in PrefixCache(model, self.prefix).layers] or None
        self.own = self.prefix if with_gradient else []
        self.room = size - len(self.own)
        function = _compiled(layer) if compiled else layer
        self._layers = [_of(module, function) for module in self.decoder.layers]
        side = side_of(model.device, model.dtype, with_gradient)
        self._masks = Masks(self._lay_out([[0]]), model.device, side)
        self._ends = deque[torch.cuda.Event]()

    def __call__(self, rows: Sequence[Sequence[int]], reads: Sequence[int] = ()) -> torch.Tensor:
        """Hidden states `float[B, H]` at the last token of each row; a row is what follows the template.

        With `reads`, at so many last tokens of each row. The rows must fit: `room` tokens, of which `read` are read.
        A call's backward pass must run before the next call.
        """
        layout = self._lay_out(rows, reads)
        self._wait()
        masks = self._masks.update(layout)
        tokens = _sent(layout.tokens, self.model.device)[None]
        hidden = self.decoder.embed_tokens(tokens)
        angles = self.decoder.rotary_emb(hidden, _sent(layout.positions, self.model.device)[None])
        # a second summand from the start, where there will be one: each layer is compiled for one form
        states: States = hidden, None if _adds_in_place(self.decoder.layers[0]) else torch.zeros_like(hidden)
        last = len(self._layers) - 1
        for index, run in enumerate(self._layers):
            template = self.cached[index] if self.cached else None
            mask, read = (masks.labels, masks.rows) if index == last else (masks.tokens, None)
            if index < self.checkpointed and torch.is_grad_enabled():
                states = checkpoint(run, states, angles, template, mask, read, use_reentrant=False)
            elif index == 0 and self.first:
                states = run(states, angles, template, mask, read, tokens, self.first)
            else:
                states = run(states, angles, template, mask, read)
        picked: torch.Tensor = self.decoder.norm(_sum(states)[0, : sum(reads) or len(rows)])
        if picked.device.type == "cuda":
            self._ends.append(torch.cuda.current_stream(picked.device).record_event())
        return picked

    def _wait(self) -> None:
        """Be no more than AHEAD packs ahead of the GPU, so that the page-locked memory of packs stays bounded."""
        while len(self._ends) > AHEAD:
            self._ends.popleft().synchronize()

    def _lay_out(self, rows: Sequence[Sequence[int]], reads: Sequence[int] = ()) -> Layout:
        return lay_out(rows, self.size, self.read, len(self.prefix), self.own, reads)


def _compiled(function: Any) -> Any:
    """`function` compiled, with the code kept for later processes.

    It is a copy, since torch compiles a function for a few models only and then runs it as it is, which would take
    more memory than a GPU has. It is compiled in this process: torch's pool of compilers is larger than the few kernels
    need, and a process may wait for it for ever (pytorch#189290).
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    return torch.compile(copy, dynamic=False, options={"compile_threads": 1})


def _of(module: Any, function: Any) -> Any:
    """`function` of the module; where its weights are sharded (FSDP), they are gathered for each call."""
    module.packed = MethodType(function, module)
    register_fsdp_forward_method(module, "packed")
    return module.__dict__.pop("packed")


class Masks:
    """The masks of a pack's tokens and of its label rows, in tensors that stay: compiled code sees the same objects."""

    def __init__(self, layout: Layout, device: torch.device, side: int) -> None:
        self.side = side
        self.rows = _sent(layout.rows, device)
        self._seen = [Seen(layout, queries, device) for queries in _queries(layout)]
        self.tokens, self.labels = (
            self._block_mask(layout, queries, seen).to(device)
            for queries, seen in zip(_queries(layout), self._seen, strict=True)
        )

    def update(self, layout: Layout) -> "Masks":
        """The masks of another layout of the same sizes."""
        _write(self.rows, layout.rows)
        for mask, queries, seen in zip((self.tokens, self.labels), _queries(layout), self._seen, strict=True):
            seen.update(layout, queries)
            new = self._block_mask(layout, queries, seen)
            for name in BLOCK_TENSORS:
                _write(getattr(mask, name), getattr(new, name))
        return self

    def _block_mask(self, layout: Layout, queries: np.ndarray, seen: "Seen") -> BlockMask:
        squares = blocks_of(layout, queries, self.side)
        parts = (squares.partial_count, squares.partial, squares.full_count, squares.full)
        partial_count, partial, full_count, full = (torch.from_numpy(part)[None, None] for part in parts)
        sizes = len(queries), layout.offset + len(layout.tokens)
        return BlockMask.from_kv_blocks(
            partial_count, partial, full_count, full, BLOCK_SIZE=self.side, mask_mod=seen.mask, seq_lengths=sizes
        )


class Seen:
    """Which keys each of some queries sees: the template's, and those of its own conversation up to itself."""

    def __init__(self, layout: Layout, queries: np.ndarray, device: torch.device) -> None:
        first, last = self.ends = [_sent(end, device) for end in _own_keys(layout, queries)]
        template = layout.template

        def mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return ((key < template) | (key >= first[query])) & (key <= last[query])

        self.mask = mask

    def update(self, layout: Layout, queries: np.ndarray) -> None:
        """The same of another layout."""
        for old, new in zip(self.ends, _own_keys(layout, queries), strict=True):
            _write(old, new)


def _own_keys(layout: Layout, queries: np.ndarray) -> list[np.ndarray]:
    """The first and the last key that each query sees of its own conversation, `int32[Q]` each."""
    return [np.asarray(tokens + layout.offset, np.int32) for tokens in (layout.start[queries], queries)]


def _queries(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """All tokens, and those that are read."""
    return np.arange(len(layout.tokens)), layout.rows


def _sent(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device; nothing waits for a GPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.clone()


def _write(old: torch.Tensor, new: np.ndarray | torch.Tensor) -> None:
    """Other values in a tensor that stays; nothing waits for a GPU."""
    fresh = torch.from_numpy(new) if isinstance(new, np.ndarray) else new
    old.copy_(fresh.pin_memory() if old.device.type == "cuda" else fresh, non_blocking=True)


def _padded(pair: Pair) -> Pair:
    """Keys and values, `[1, P, heads, D]`, with P filled up to whole squares; the mask hides the filling."""
    missing = -pair[0].shape[-2] % BLOCK
    keys, values = (pad(x.transpose(1, 2), (0, 0, 0, 0, 0, missing)).contiguous() for x in pair)
    return keys, values


def layer(
    module: Any,
    states: States,
    angles: Pair,
    template: Pair | None,
    mask: BlockMask,
    rows: torch.Tensor | None,
    tokens: torch.Tensor | None = None,
    first: FirstProducts | None = None,
) -> States:
    """One decoder layer of the Llama form, of all tokens `[1, N, H]`, or from the attention on of `rows` only.

    Keys and values are needed of all tokens, all else of the rows that are read. The first layer's are looked up by
    `tokens[1, N]` where `first` has them. Where the layer's matrices are plain, states are changed in place. Else they
    come and go as two summands: their sum is taken where it is used next, in one kernel with the norm.
    """
    attention, mlp = module.self_attn, module.mlp
    hidden = _sum(states)
    if first is not None and tokens is not None:
        queries, keys, values = (embedding(tokens, table) for table in first)
        values = values if template is None else torch.cat([template[1].flatten(2), values], 1)
        queries = queries if rows is None else queries[:, rows]
    else:
        normed = module.input_layernorm(hidden)
        keys, values = attention.k_proj(normed), _values(attention.v_proj, normed, template)
        queries = attention.q_proj(normed if rows is None else normed[:, rows])
    keys, values = _rotated(_heads(keys, attention.head_dim), angles), _heads(values, attention.head_dim)
    if template is not None:
        keys = torch.cat([template[0], keys], 1)
    if rows is not None:
        hidden, angles = hidden[:, rows], (angles[0][:, rows], angles[1][:, rows])
    queries = _rotated(_heads(queries, attention.head_dim), angles)
    seen = _attend(queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), mask, attention.scaling)
    seen = seen.transpose(1, 2).flatten(2)
    if not _adds_in_place(module):
        hidden = hidden + attention.o_proj(seen)
        return hidden, mlp(module.post_attention_layernorm(hidden))
    add_product(hidden, seen, attention.o_proj.weight)
    normed = module.post_attention_layernorm(hidden)
    add_product(hidden, mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed), mlp.down_proj.weight)
    return hidden, None


def _values(module: Any, normed: torch.Tensor, template: Pair | None) -> torch.Tensor:
    """Values `[1, N, heads * D]`, behind the template's where there are any."""
    values: torch.Tensor
    if template is None:
        values = module(normed)
    elif is_plain(module):
        values = product_behind(template[1].flatten(2), normed, module.weight)
    else:
        values = torch.cat([template[1].flatten(2), module(normed)], 1)
    return values


def _adds_in_place(module: Any) -> bool:
    """Whether a layer's sums are taken in place; a gradient would need the summands."""
    return is_plain(module.self_attn.o_proj) and is_plain(module.mlp.down_proj)


def _sum(states: States) -> torch.Tensor:
    first, second = states
    return first if second is None else first + second


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
