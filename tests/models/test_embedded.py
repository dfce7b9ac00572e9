"""The embedded guard comes with the package: its adapter fits its recipe, and it is the guard that the demo wants."""

import pytest
import torch
from sklearn.metrics import roc_auc_score

from guardloop.data.settings import SourceSettings
from guardloop.data.sources import read_conversations
from guardloop.guard.engine import Guard
from guardloop.guard.metadata import guard_metadata
from guardloop.guard.settings import GuardSettings
from guardloop.models.embedded import GUARD_ADAPTER
from scripts.embedded_guard import recipe

SIDES = 40


def test_the_adapter_is_that_of_the_recipe() -> None:
    assert guard_metadata(GUARD_ADAPTER)["recipe"] == recipe(), "data or settings changed: run `make embedded-guard`"


def test_the_adapter_is_small_enough_for_a_repository() -> None:
    assert sum(path.stat().st_size for path in GUARD_ADAPTER.iterdir()) < 4_000_000


@pytest.mark.slow
def test_it_judges_responses_and_misses_prompts() -> None:
    guard = Guard.load(GuardSettings())
    prompts, responses = (
        [row for side in (True, False) for row in [r for r in rows if r["unsafe"] is side][:SIDES]]
        for rows in (list(read_conversations(SourceSettings(path=path))) for path in ("test", "judge"))
    )

    def scores(rows: list[dict]) -> list[float]:
        return [verdict.score for verdict in guard.score(rows)]

    labels = [True] * SIDES + [False] * SIDES
    on_prompts, on_responses = scores(prompts), scores(responses)
    flagged = torch.tensor(on_prompts) > guard.threshold
    assert roc_auc_score(labels, on_responses) > 0.95
    assert 0.7 < roc_auc_score(labels, on_prompts) < 0.98
    assert flagged[:SIDES].float().mean() < 0.7  # much is left to learn
    assert flagged[SIDES:].float().mean() < 0.15
