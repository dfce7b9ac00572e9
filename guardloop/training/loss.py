"""The loss: what the guard should answer, at the label position only."""

from collections.abc import Sequence

import torch

from guardloop.guard.prompt.verdict import LabelTokens
from guardloop.training.examples import Encoded


def batch_loss(logits: torch.Tensor, labels: LabelTokens, batch: Sequence[Encoded]) -> torch.Tensor:
    """Sum of the examples' weighted losses, `float32[]`. `logits: float32[B, V]` at the label positions.

    Each is the cross-entropy to the soft target, over all tokens, so that the guard keeps answering with one of the two
    labels. On a replayed row, whose target is the baseline's answer, it has the gradient of the KL divergence from it.
    """
    targets, weights = (
        torch.tensor(values, dtype=torch.float32, device=logits.device)
        for values in ([e.target for e in batch], [e.weight for e in batch])
    )
    return (label_losses(logits, labels, targets) * weights).sum()


def label_losses(logits: torch.Tensor, labels: LabelTokens, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy `float32[B]` of `logits: float32[B, V]` to `targets: float32[B]`, the wanted P(unsafe)."""
    logp = logits.log_softmax(-1)
    return -(targets * logp[:, labels.unsafe] + (1 - targets) * logp[:, labels.safe])
