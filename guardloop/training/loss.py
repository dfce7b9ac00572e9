"""The loss: what the guard should answer, at the answer's positions only."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from guardloop.guard.prompt.verdict import LabelTokens


@dataclass(frozen=True)
class Encoded:
    """A training example as tokens `int[T]`, which end where the answer begins, with the wanted P(unsafe)."""

    id: str
    tokens: list[int]
    target: float
    weight: float
    answer: tuple[int, ...] = ()
    """The written answer from its label token to its end, where its categories are trusted."""
    replayed_mass: float | None = None
    """On a replayed row: P(safe) + P(unsafe) of the frozen baseline, whose P(unsafe) is the target."""

    @property
    def positions(self) -> int:
        """At how many positions the loss is taken: the label, and what is written after it."""
        return max(1, len(self.answer))


def batch_loss(
    logits: torch.Tensor, labels: LabelTokens, batch: Sequence[Encoded], category_weight: float
) -> torch.Tensor:
    """Sum of the examples' weighted losses, `float32[]`. `logits: float32[N, V]`, N = sum of `positions`.

    A lesson costs the cross-entropy to its soft target; a replayed row the KL divergence from the baseline's
    answer, as computed when it was screened. A trusted answer adds the mean cross-entropy of what follows its label,
    times `category_weight` and the wanted P(unsafe).
    """
    counts = torch.tensor([e.positions for e in batch])
    starts = (counts.cumsum(0) - counts).to(logits.device)
    targets, weights, masses = (
        torch.tensor(values, dtype=torch.float32, device=logits.device)
        for values in (
            [e.target for e in batch],
            [e.weight for e in batch],
            [1.0 if e.replayed_mass is None else e.replayed_mass for e in batch],
        )
    )
    replayed = torch.tensor([e.replayed_mass is not None for e in batch], device=logits.device)
    losses = label_losses(logits[starts], labels, targets, masses)
    losses = losses - torch.where(replayed, _entropy(targets, masses), 0.0)
    total = (losses * weights).sum()
    for start, example in zip(starts.tolist(), batch, strict=True):
        if written := example.answer[1:]:
            wanted = torch.tensor(written, device=logits.device)
            cost = F.cross_entropy(logits[start + 1 : start + 1 + len(written)], wanted)
            total = total + category_weight * example.weight * example.target * cost
    return total


def label_losses(
    logits: torch.Tensor, labels: LabelTokens, targets: torch.Tensor, masses: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy `float32[B]` at the label position, to `safe`, `unsafe` and, where the mass is not 1, the rest.

    `logits: float32[B, V]`, `targets: float32[B]` (wanted P(unsafe) of the two), `masses: float32[B]` (wanted sum of
    the two). The softmax runs over all tokens, so that the label mass stays where it is wanted, near 1.
    """
    logp = logits.log_softmax(-1)
    losses = -masses * (targets * logp[:, labels.unsafe] + (1 - targets) * logp[:, labels.safe])
    if bool((masses < 1).any()):
        both = torch.tensor([labels.safe, labels.unsafe], device=logits.device)
        rest = logp.index_fill(1, both, -torch.inf).logsumexp(-1)
        losses = losses - (1 - masses) * rest
    return losses


def _entropy(targets: torch.Tensor, masses: torch.Tensor) -> torch.Tensor:
    shares = torch.stack([masses * targets, masses * (1 - targets), 1 - masses])
    entropy: torch.Tensor = -torch.xlogy(shares, shares).sum(0)
    return entropy
