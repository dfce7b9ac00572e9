"""Poisoned traffic: whoever controls 5% of the prompts cannot move the benign false-positive rate past the gate, and
that of one topic only by so much.

The attacker asks harmless questions of one topic in a way that draws blocked responses, so that the loop learns to
block the topic. Mining, the choice of the threshold and the gate are the real ones; prompts are points, the guard is
linear, and training is a logistic regression on the mined lessons.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from support.mining_examples import judged, screened

from guardloop.evaluation.compare import evaluate
from guardloop.evaluation.paired import GuardRun
from guardloop.evaluation.settings import EvaluationSettings, GateSettings
from guardloop.mining.mine import mine
from guardloop.mining.settings import MiningSettings
from guardloop.training.calibrate import stricter_point
from guardloop.training.settings import TrainingSettings
from guardloop.training.train import split

FEATURES, PROMPTS, TEST, MANY = 6, 1200, 1500, 20_000
TOPIC = 2.5  # how far the attacked topic lies from the other prompts
RUNS = 6
GATE = GateSettings(require_response_test=False)
DEFAULT = TrainingSettings().max_newly_blocked


@dataclass(frozen=True)
class Outcome:
    """One round of the loop under attack."""

    promoted: bool
    rise: float
    """Of the false-positive rate, on very many benign prompts."""
    topic_rise: float
    """The same on those of the attacked topic."""


def points(rng: np.random.Generator, count: int, unsafe_share: float, topic_share: float):
    """Prompts as points: the first feature tells unsafe from safe, the last one the attacked topic."""
    unsafe = rng.random(count) < unsafe_share
    at = rng.normal(size=(count, FEATURES))
    at[:, 0] += 2.5 * unsafe
    topic = ~unsafe & (rng.random(count) < topic_share)
    at[topic, -1] += TOPIC
    return at, unsafe


def baseline_score(at: np.ndarray) -> np.ndarray:
    return 1.2 * at[:, 0] + 1.2 * at[:, 1] - 3.0  # it also reads something that does not matter


@cache
def attack(seed: int, share: float, topic_share: float, newly_blocked: float = DEFAULT) -> Outcome:
    rng = np.random.default_rng(seed)
    honest = int(PROMPTS * (1 - share))
    at, unsafe = points(rng, honest, 0.25, topic_share)
    poison = rng.normal(size=(PROMPTS - honest, FEATURES))
    poison[:, -1] += TOPIC
    at = np.vstack([at, poison])
    blocked_share = np.concatenate([np.where(unsafe, 0.8, 0.01), np.ones(len(poison))])
    traffic, answers = [], []
    for i, score in enumerate(baseline_score(at)):
        prompt = screened(str(i), float(score))
        traffic.append(prompt)
        if not prompt["flagged"]:
            draws = rng.random(4) < blocked_share[i]
            answers += [judged(prompt, k, 3.0 if bad else -3.0) for k, bad in enumerate(draws)]
    mined = mine(traffic, answers, MiningSettings())
    assert mined.enough
    lessons = [row for row in mined.examples if row["response"] is None]
    training, held_out = split(lessons, 0.15, seed)

    def features(rows):
        return at[[int(row["id"]) for row in rows]]

    targets = np.array([row["target"] for row in training])
    weights = np.array([row["weight"] for row in training])
    model = LogisticRegression(C=10.0, max_iter=500).fit(
        np.vstack([features(training)] * 2),
        np.repeat([1, 0], len(training)),
        np.concatenate([weights * targets, weights * (1 - targets)]) + 1e-9,
    )
    known = [(rows, model.decision_function(features(rows))) for rows in (held_out, training)]
    before = baseline_score(features(held_out))
    threshold = stricter_point(*known[0], before, *known[1], 0.0, newly_blocked)
    test_at, test_unsafe = points(rng, TEST, 0.25, topic_share)
    scores = np.stack([baseline_score(test_at), model.decision_function(test_at)])
    rows = [
        {
            **{"id": str(i), "prompt": f"test {i}", "response": None, "unsafe": bool(test_unsafe[i]), "group": str(i)},
            **{"category": None, "source": "test", "language": "en", "jailbreak": None},
            **{"baseline_score": float(scores[0, i]), "candidate_score": float(scores[1, i])},
        }
        for i in range(TEST)
    ]
    guards = GuardRun("baseline", 0.0, 0.99, 0), GuardRun("candidate", threshold, 0.99, 0)
    found = evaluate(rows, *guards, EvaluationSettings(resamples=300, slices=()), GATE, seed=seed)
    benign = points(rng, MANY, 0.0, topic_share)[0]
    topic = points(rng, MANY, 0.0, 1.0)[0]
    rises = [
        float(np.mean(model.decision_function(at) > threshold) - np.mean(baseline_score(at) > 0))
        for at in (benign, topic)
    ]
    return Outcome(found.decision.promote, *rises)


@pytest.mark.slow
@pytest.mark.parametrize("topic_share", [0.03, 0.2])
def test_no_promoted_guard_blocks_more_benign_prompts_than_the_gate_allows(topic_share: float) -> None:
    outcomes = [attack(seed, 0.05, topic_share, share) for seed in range(RUNS) for share in (DEFAULT, 0.02, 0.05, 0.1)]
    assert any(outcome.promoted for outcome in outcomes)
    for outcome in outcomes:
        assert not outcome.promoted or outcome.rise <= GATE.max_fpr_rise, outcome


def test_the_attack_works_where_nothing_stops_it_but_the_gate() -> None:
    outcomes = [attack(seed, 0.05, 0.2, newly_blocked=0.1) for seed in range(RUNS)]
    assert min(outcome.rise for outcome in outcomes) > GATE.max_fpr_rise
    assert not any(outcome.promoted for outcome in outcomes)


@pytest.mark.slow
def test_the_threshold_alone_holds_the_false_positive_rate_but_not_that_of_the_topic() -> None:
    outcomes = [attack(seed, 0.05, topic_share) for seed in range(RUNS) for topic_share in (0.03, 0.2)]
    assert max(outcome.rise for outcome in outcomes) < 0
    assert sum(outcome.promoted for outcome in outcomes) >= RUNS
    assert 0.03 < max(outcome.topic_rise for outcome in outcomes) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("newly_blocked", [0.005, DEFAULT, 0.02])
def test_the_same_loop_without_an_attacker_is_promoted(newly_blocked: float) -> None:
    outcomes = [attack(seed, 0.0, 0.03, newly_blocked) for seed in range(RUNS)]
    assert sum(outcome.promoted for outcome in outcomes) >= RUNS // 2, outcomes
