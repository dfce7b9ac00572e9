import numpy as np
import pytest
import torch
from torch import Tensor

from guardloop.responses import sampling
from guardloop.responses.sampling import choose_tokens, uniforms


def nucleus(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """The distribution to sample from, the plain way: float64[V]."""
    probabilities = (logits.double() / temperature).softmax(-1)
    ordered, tokens = probabilities.sort(descending=True)
    kept = (ordered.cumsum(-1) - ordered) < top_p
    result = torch.zeros_like(probabilities)
    result[tokens[kept]] = ordered[kept]
    return result / result.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.9), (1.0, 0.5), (1.5, 0.99), (0.3, 0.05), (2.0, 0.999)])
@pytest.mark.parametrize("head", [4, 256])
def test_tokens_follow_the_distribution(
    temperature: float, top_p: float, head: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "HEAD", head)  # 4: the nucleus is larger, the full sort is used
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 2
    draws = 20_000
    uniform = (torch.arange(draws) + 0.5) / draws  # evenly spaced: the counts are exact but for rounding
    tokens = choose_tokens(logits.expand(draws, -1), uniform, temperature, top_p)
    shares = torch.bincount(tokens, minlength=50).double() / draws
    assert (shares - nucleus(logits, temperature, top_p)).abs().max() < 2 / draws


def test_temperature_zero_is_the_likeliest() -> None:
    logits = torch.randn(7, 30)
    assert torch.equal(choose_tokens(logits, torch.rand(7), 0.0, 0.9), logits.argmax(-1))


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_range_are_in_the_nucleus(uniform: float) -> None:
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(2)) * 3
    for row, token in zip(logits, choose_tokens(logits, torch.full((64,), uniform), 0.7, 0.9), strict=True):
        assert nucleus(row, 0.7, 0.9 + 1e-5)[token] > 0  # single precision may tip its edge


def test_rows_do_not_depend_on_each_other() -> None:
    logits, uniform = torch.randn(20, 1000) * torch.linspace(0, 4, 20)[:, None], torch.rand(20)
    together = choose_tokens(logits, uniform, 0.7, 0.9)
    alone = [int(choose_tokens(logits[i : i + 1], uniform[i : i + 1], 0.7, 0.9)) for i in range(20)]
    assert together.tolist() == alone


def test_random_numbers_belong_to_the_seed() -> None:
    assert np.array_equal(uniforms(5, 10), uniforms(5, 12)[:10])
    assert not np.array_equal(uniforms(5, 10), uniforms(6, 10))
    assert 0 <= uniforms(5, 1000).min() < uniforms(5, 1000).max() < 1
