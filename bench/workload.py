"""What the benchmarks run on: LLaMA-7B's geometry with random weights, and prompts as long as real ones."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

PREFIX, SUFFIX, VOCABULARY = 640, 80, 32_000
SAFE, UNSAFE = 9109, 25110


@dataclass(frozen=True)
class Size:
    """A decoder's geometry."""

    hidden: int
    inner: int
    layers: int
    heads: int


LLAMA_7B = Size(4096, 11008, 32, 32)
TINY = Size(64, 192, 2, 4)
"""Tries a benchmark out in seconds, on a CPU too; its figures mean nothing."""


def prompts(count: int, seed: int = 0) -> tuple[list[int], list[list[int]]]:
    """The shared template's tokens, and `count` prompts: template, user text, end of the template.

    User texts are lognormal(3.6, 1) tokens long, cut to 4..512 (mean about 58), as in ToxicChat.
    """
    draw = np.random.default_rng(seed)
    prefix, suffix = (draw.integers(3, VOCABULARY, length).tolist() for length in (PREFIX, SUFFIX))
    lengths = np.clip(draw.lognormal(3.6, 1.0, count), 4, 512).astype(int)
    return prefix, [[*prefix, *draw.integers(3, VOCABULARY, n).tolist(), *suffix] for n in lengths]


def config(size: Size, **more: Any) -> LlamaConfig:
    """A model of the Llama form, with `more` values of its configuration."""
    values = {
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "attn_implementation": "sdpa",
        "architectures": ["LlamaForCausalLM"],
    }
    return LlamaConfig(**{**values, **more})


def llama(size: Size, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A random model of the Llama form, on the GPU if there is one."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config(size))
    torch.set_default_dtype(torch.float32)
    return model.eval()


@torch.no_grad()
def with_tiny_weights(model: Any) -> Any:
    """The model with weights such as vLLM makes up: what a GPU draws, and with it its clock, depends on them."""
    for parameter in model.parameters():
        parameter.uniform_(-1e-3, 1e-3)
    return model


def in_nf4(model: Any) -> Any:
    """The decoder's linear layers in 4-bit NormalFloat, in place."""
    import bitsandbytes as bnb  # noqa: PLC0415  (not needed without a GPU)

    decoder = model.get_decoder()
    for name, module in list(decoder.named_modules()):
        if type(module) is torch.nn.Linear:
            packed = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            packed.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            parent, _, child = name.rpartition(".")
            setattr(decoder.get_submodule(parent), child, packed.to(model.device))
    torch.cuda.empty_cache()
    return model


def seconds(work: Callable[[], Any]) -> float:
    """How long `work` takes, the GPU's part included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_gib() -> float:
    """The most GPU memory that was in use since the last call, in GiB; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def free() -> None:
    """Give the GPU memory of models that are gone back."""
    gc.collect()
    torch.cuda.empty_cache()
    peak_gib()
