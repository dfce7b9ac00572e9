"""What the benchmarks run on: LLaMA-7B's geometry with random weights, and prompts as long as real ones."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

BEFORE, AFTER, VOCABULARY = 640, 80, 32_000
SAFE, UNSAFE = 9109, 25110


def prompts(count: int, seed: int = 0) -> tuple[list[int], list[list[int]]]:
    """The shared template's tokens, and `count` prompts: template, user text, end of the template.

    User texts are lognormal(3.6, 1) tokens long, cut to 4..512 (mean about 58), as in ToxicChat.
    """
    draw = np.random.default_rng(seed)
    before, after = draw.integers(3, VOCABULARY, BEFORE).tolist(), draw.integers(3, VOCABULARY, AFTER).tolist()
    lengths = np.clip(draw.lognormal(3.6, 1.0, count), 4, 512).astype(int)
    return before, [[*before, *draw.integers(3, VOCABULARY, n).tolist(), *after] for n in lengths]


def llama_7b(dtype: torch.dtype = torch.bfloat16, layers: int = 32) -> Any:
    """A random model of LLaMA-7B's geometry on the GPU."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device("cuda"):
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=layers,
                num_attention_heads=32,
                num_key_value_heads=32,
                vocab_size=VOCABULARY,
                max_position_embeddings=4096,
                attn_implementation="sdpa",
            )
        )
    torch.set_default_dtype(torch.float32)
    return model.eval()


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
            setattr(decoder.get_submodule(parent), child, packed.cuda())
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
