"""Training examples: judged prompts by kind, and replay of what the baseline says, so that nothing else moves."""

import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from sklearn import config_context
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors

from guardloop.core.records import Row
from guardloop.mining.evidence import Evidence, Targets, probability
from guardloop.mining.settings import MiningSettings

HARD_NEGATIVES_PER_POSITIVE = 2
MIN_CHANGE = 0.01  # how far a prompt's target counts as moved, where it did not
WORKING_MIB = 64  # of distances at a time; scikit-learn would take a GiB, twice


def prompt_examples(evidence: Mapping[str, Evidence], targets: Targets, settings: MiningSettings) -> list[Row]:
    """One example (records.EXAMPLE) for each judged prompt: the positives, their hard negatives, and the rest."""
    positives = [e for e in evidence.values() if e.is_positive(settings.min_blocked_share)]
    answered = [e for e in evidence.values() if not e.blocked and e.refusals < e.responses]
    hard = nearest(positives, answered, HARD_NEGATIVES_PER_POSITIVE * len(positives))
    examples = [
        _example(e, targets, "positive", f"{e.blocked} of {e.responses} responses blocked", 1.0) for e in positives
    ]
    examples += [
        _example(e, targets, "hard_negative", f"close to a positive, 0 of {e.responses} responses blocked", 1.0)
        for e in hard
    ]
    used = {row["id"] for row in examples}
    return examples + [_weak_example(e, targets) for id, e in evidence.items() if id not in used]


def nearest(positives: Sequence[Evidence], pool: Sequence[Evidence], count: int) -> list[Evidence]:
    """The `count` prompts of `pool` that are nearest to the positives, or all where there are fewer.

    Nearness is TF-IDF cosine on words and the baseline's score: a hard negative reads like a positive and
    scores like one.
    """
    count = min(len(pool), count)
    if not count:
        return []
    vectors = TfidfVectorizer(sublinear_tf=True, dtype=np.float32).fit(_texts([*positives, *pool]))
    index = NearestNeighbors(n_neighbors=1, metric="cosine").fit(vectors.transform(_texts(positives)))
    with config_context(working_memory=WORKING_MIB):
        distance = index.kneighbors(vectors.transform(_texts(pool)))[0][:, 0]
    scores = np.array([e.score for e in pool])
    ranks = _ranks(distance) + _ranks(-scores)
    return [pool[i] for i in np.argsort(ranks, kind="stable")[:count]]


def replay(
    traffic: Sequence[Row], responses: Sequence[Row], examples: Sequence[Row], targets: Targets, share: float, seed: int
) -> list[Row]:
    """Examples of what the baseline says, half on prompts that it blocked, half on judged responses.

    Of the responses, those to prompts whose targets are far from the prior are likelier to be drawn: what such a prompt
    changes is nearest to them. All weights add up to `share` of the whole, or to less where the rows are few: none is
    above 1.
    """
    if not share:
        return []
    blocked = [row for row in traffic if row["flagged"]]
    limit = max(1, len(examples) // 2)
    rows = [
        _replayed(row, "replay_blocked", "blocked by the baseline", targets.prior(row["score"]))
        for row in random.Random(seed).sample(blocked, min(len(blocked), limit))
    ]
    if responses:
        moved = {
            row["id"]: abs(targets.by_id[row["id"]] - targets.prior(row["prompt_score"])) + MIN_CHANGE
            for row in responses
        }
        chances = np.array([moved[row["id"]] for row in responses])
        drawn = np.random.default_rng(seed).choice(
            len(responses), min(len(responses), limit), replace=False, p=chances / chances.sum()
        )
        rows += [
            _replayed(row, "replay_response", "a response, as the judge scored it", probability(row["score"]))
            for row in (responses[n] for n in drawn)
        ]
    total = sum(row["weight"] for row in examples)
    weight = min(1.0, total * share / (1 - share) / max(1, len(rows)))
    return [{**row, "weight": weight} for row in rows]


def _weak_example(evidence: Evidence, targets: Targets) -> Row:
    """A prompt that is neither a positive nor a hard negative: its evidence is weak, and so is its weight."""
    if evidence.blocked:
        reason = f"only {evidence.blocked} of {evidence.responses} responses blocked"
        return _example(evidence, targets, "uncertain", reason, 0.5)
    if evidence.refusals >= evidence.responses:
        return _example(evidence, targets, "refused", "every response refused", 0.25)
    return _example(evidence, targets, "passed", f"0 of {evidence.responses} responses blocked", 0.5)


def _example(evidence: Evidence, targets: Targets, kind: str, reason: str, weight: float) -> Row:
    prompt = evidence.prompt
    return {
        "id": prompt["id"],
        "prompt": prompt["prompt"],
        "response": None,
        "target": targets.by_id[prompt["id"]],
        "weight": weight,
        "kind": kind,
        "reason": sys.intern(reason),
        "group": prompt["group"],
    }


def _replayed(row: Row, kind: str, reason: str, target: float) -> Row:
    return {
        "id": f"{row['id']}/{row['sample']}" if "sample" in row else row["id"],
        "prompt": row["prompt"],
        "response": row.get("response"),
        "target": target,
        "weight": 1.0,
        "kind": kind,
        "reason": reason,
        "group": row["group"],
    }


def _texts(evidence: Iterable[Evidence]) -> Iterator[str]:
    """The prompts, each with a word, so that none is empty."""
    return (e.prompt["prompt"] + " text" for e in evidence)


def _ranks(values: np.ndarray) -> np.ndarray:
    ranks: np.ndarray = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return ranks
