"""Temperature and top-p sampling in which each row's random numbers are its own, whatever rows it is batched with."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

HEAD = 256  # a full sort of the vocabulary costs more than the model's forward pass; the nucleus is nearly always in it


def uniforms(seed: int, count: int) -> npt.NDArray[np.float32]:
    """The random numbers of one response, one per token: `float32[count]` in [0, 1)."""
    return np.random.Generator(np.random.Philox(seed)).random(count, dtype=np.float32)


def choose_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """The next token of each row.

    logits: [R, V]; uniform: float32[R] in [0, 1), one random number per row; returns int64[R].
    Temperature 0 takes the likeliest token. Else the token at `uniform` of the mass of the nucleus: the likeliest
    tokens that together have the probability `top_p`.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    log_total = logits.logsumexp(-1, keepdim=True)
    values, tokens = logits.topk(min(HEAD, logits.shape[-1]))
    probabilities = (values - log_total).exp()
    chosen = tokens.gather(-1, _pick(probabilities, uniform, top_p)[:, None])[:, 0]
    flat = (probabilities.sum(-1) < top_p).nonzero()[:, 0]
    if len(flat) and values.shape[-1] < logits.shape[-1]:
        values, tokens = logits[flat].sort(-1, descending=True)
        picked = _pick((values - log_total[flat]).exp(), uniform[flat], top_p)
        chosen[flat] = tokens.gather(-1, picked[:, None])[:, 0]
    return chosen


def _pick(probabilities: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """Index at `uniform` of the mass of each row's nucleus; rows are sorted, likeliest first."""
    mass = probabilities.cumsum(-1)
    last = (mass < top_p).sum(-1).clamp_(max=mass.shape[-1] - 1)
    target = uniform * mass.gather(-1, last[:, None])[:, 0]
    return torch.minimum((mass <= target[:, None]).sum(-1), last)
