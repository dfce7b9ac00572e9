"""From screened traffic and judged responses to a training set that teaches without making the guard forget."""

import hashlib
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from sklearn import config_context
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors

from guardloop.core.records import Row
from guardloop.mining.evidence import Evidence, Weighed, gather, is_judged, probability, weigh
from guardloop.mining.lexical import by_words
from guardloop.mining.settings import MiningSettings

SHOWN = 40  # examples in the report
LEAST = 0.01  # how far a prompt's target counts as moved, where it did not
CHUNK_MIB = 64  # of distances at a time; scikit-learn would take a GiB, twice


@dataclass
class MiningResult:
    """What mining made of a round of traffic."""

    examples: list[Row]
    """The training set (guardloop.core.records.EXAMPLE)."""
    blocked_inputs: list[Row]
    """For people: the prompts that passed and whose responses were blocked, worst first."""
    shown: list[Row]
    """A few examples of each kind, for the report."""
    held_out: list[Row]
    """Judged prompts that are not in the training set (guardloop.core.records.HELD_OUT_PROMPT)."""
    screened: int
    passed: int
    responses: int
    refusals: int
    blocked: int
    counts: dict[str, int] = field(default_factory=dict)
    lexical_weight: float = 0.0
    """Share of each target that is lexical smoothing."""
    enough: bool = False
    reason: str = ""


def mine(screened: Iterable[Row], judged: Iterable[Row], settings: MiningSettings) -> MiningResult:
    """Turn evidence into examples. Every example has a kind and a reason; whole groups stay together by their key.

    A share of the judged prompts is held out: no example is made of them or of their responses.
    Only prompts that passed are lessons, and the order of the rows does not matter.
    An empty or small result is a normal outcome: `enough` is False and `reason` says why.
    """
    traffic = sorted((_prompt(row) for row in screened if row["score"] is not None), key=lambda row: str(row["id"]))
    passed = {row["id"]: row for row in traffic if not row["flagged"]}
    usable = (row for row in judged if row["id"] in passed and is_judged(row))
    judged_rows = sorted((_response(row, passed[row["id"]]) for row in usable), key=_place)
    everything = gather(judged_rows, passed)
    evidence = {k: e for k, e in everything.items() if not is_held_out(e.prompt["group"], settings)}
    hidden = {e.prompt["group"] for k, e in everything.items() if k not in evidence}
    screened_rest, judged_rest = ([r for r in rows if r["group"] not in hidden] for rows in (traffic, judged_rows))
    weighed = with_words(weigh(everything, settings), screened_rest, settings)
    finds = [e for e in everything.values() if e.is_positive(settings)]
    positives = [e for e in finds if e.prompt["id"] in evidence]
    never = [e for e in evidence.values() if not e.blocked]
    answered = [e for e in never if e.refusals < e.responses]
    hard = nearest(positives, answered, settings.hard_negatives_per_positive)
    hard_ids = {e.prompt["id"] for e in hard}
    lessons = [_lesson(e, "positive", f"{e.blocked} of {e.responses} responses blocked", weighed) for e in positives]
    lessons += [
        _lesson(e, "hard_negative", f"close to a positive, 0 of {e.responses} responses blocked", weighed) for e in hard
    ]
    taken = {e.prompt["id"] for e in positives} | hard_ids
    lessons += [_rest(e, weighed) for e in evidence.values() if e.prompt["id"] not in taken]
    replays = replay(screened_rest, judged_rest, lessons, settings, weighed)
    result = MiningResult(
        examples=lessons + replays,
        blocked_inputs=sorted((_for_people(e, weighed) for e in finds), key=lambda row: -row["target"]),
        shown=_shown(lessons, evidence),
        held_out=[_for_measuring(e, settings) for k, e in everything.items() if k not in evidence],
        screened=len(traffic),
        passed=len(passed),
        responses=len(judged_rows),
        refusals=sum(row["refusal"] for row in judged_rows),
        blocked=sum(row["flagged"] for row in judged_rows),
        lexical_weight=settings.lexical_weight,
        counts=dict(Counter(row["kind"] for row in lessons + replays)),
    )
    result.enough, result.reason = _verdict(len(positives), len(never), result, settings)
    return result


def is_held_out(group: str, settings: MiningSettings) -> bool:
    """Whether a near-duplicate group is held out, by a hash of its own.

    Training draws its own validation rows by hash, too; with one and the same, it would find none left.
    """
    digest = hashlib.sha256(f"held out/{settings.seed}/{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < settings.held_out


def with_words(weighed: Weighed, traffic: Sequence[Row], settings: MiningSettings) -> Weighed:
    """Take the share `settings.lexical_weight` of the targets of `traffic` from what the words of its prompts say.

    Prompts that the baseline blocked drew no responses, and teach their words by its own score.
    """
    rows = [row for row in traffic if row["flagged"] or row["id"] in weighed.targets]
    if not (rows and settings.lexical_weight):
        return weighed
    known = np.array([weighed.prior(row["score"]) if row["flagged"] else weighed.targets[row["id"]] for row in rows])
    told = by_words([row["prompt"] for row in rows], known, [row["group"] for row in rows], settings.seed)
    mixed = (1 - settings.lexical_weight) * known + settings.lexical_weight * told
    passed = {row["id"]: float(target) for row, target in zip(rows, mixed, strict=True) if not row["flagged"]}
    return replace(weighed, targets={**weighed.targets, **passed})


def nearest(positives: Sequence[Evidence], pool: Sequence[Evidence], per_positive: int) -> list[Evidence]:
    """Of `pool`, the `per_positive` times as many prompts that are nearest to the positives.

    Nearness is TF-IDF cosine on words and the baseline's score: a hard negative reads like a positive and
    scores like one.
    """
    wanted = min(len(pool), per_positive * len(positives))
    if not wanted:
        return []
    vectors = TfidfVectorizer(sublinear_tf=True, dtype=np.float32).fit(_texts([*positives, *pool]))
    index = NearestNeighbors(n_neighbors=1, metric="cosine").fit(vectors.transform(_texts(positives)))
    with config_context(working_memory=CHUNK_MIB):
        distance = index.kneighbors(vectors.transform(_texts(pool)))[0][:, 0]
    scores = np.array([e.score for e in pool])
    ranks = _ranks(distance) + _ranks(-scores)
    return [pool[i] for i in np.argsort(ranks, kind="stable")[:wanted]]


def replay(
    traffic: Sequence[Row],
    judged: Sequence[Row],
    lessons: Sequence[Row],
    settings: MiningSettings,
    weighed: Weighed,
) -> list[Row]:
    """Rows that teach the baseline's score, half on prompts that it blocked, half on judged responses.

    Of the responses, those to prompts whose targets are far from the own score are likelier to be drawn: what such a
    prompt teaches is nearest to them. All weights add up to the share `settings.replay` of the whole, or to less where
    the rows are few: none is above 1.
    """
    blocked = [row for row in traffic if row["flagged"]]
    most = max(1, len(lessons) // 2)
    prompts = random.Random(settings.seed).sample(blocked, min(len(blocked), most))
    responses: list[Row] = []
    if judged:
        scores = {row["id"]: row["prompt_score"] for row in judged}
        moved = {id: abs(weighed.targets[id] - weighed.prior(score)) + LEAST for id, score in scores.items()}
        chances = np.array([moved[row["id"]] for row in judged])
        drawn = np.random.default_rng(settings.seed).choice(
            len(judged), min(len(judged), most), replace=False, p=chances / chances.sum()
        )
        responses = [judged[n] for n in drawn]
    rows = [_replayed(row, "replay_blocked", "blocked by the baseline", weighed.prior) for row in prompts]
    rows += [_replayed(row, "replay_response", "a response, as the judge scored it") for row in responses]
    total = sum(row["weight"] for row in lessons)
    if rows and settings.replay:
        weight = total * settings.replay / (1 - settings.replay) / len(rows)
        return [{**row, "weight": min(weight, 1.0)} for row in rows]
    return []


def _prompt(row: Row) -> Row:
    """What mining needs of a screened prompt. Words that recur are kept once, since all traffic is in memory."""
    kept = {name: row[name] for name in ("id", "prompt", "unsafe", "jailbreak", "group", "score", "flagged")}
    words = ((name, row[name]) for name in ("category", "source", "language"))
    return kept | {name: word and sys.intern(word) for name, word in words}


def _response(row: Row, prompt: Row) -> Row:
    """What mining needs of a judged response, with its prompt's own texts."""
    kept = {name: row[name] for name in ("sample", "response", "prompt_score", "score", "flagged", "refusal")}
    return (
        kept | {name: prompt[name] for name in ("id", "prompt", "group")} | {"responder": sys.intern(row["responder"])}
    )


def _texts(evidence: Sequence[Evidence]) -> Iterator[str]:
    """The prompts, each with a word, so that none is empty."""
    return (found.prompt["prompt"] + " text" for found in evidence)


def _lesson(evidence: Evidence, kind: str, reason: str, weighed: Weighed, weight: float = 1.0) -> Row:
    prompt = evidence.prompt
    return {
        "id": prompt["id"],
        "prompt": prompt["prompt"],
        "response": None,
        "target": weighed.targets[prompt["id"]],
        "weight": weight,
        "kind": kind,
        "reason": sys.intern(reason),
        "group": prompt["group"],
    }


def _rest(evidence: Evidence, weighed: Weighed) -> Row:
    """Prompts that are neither: the evidence is weak, and so is the lesson's weight."""
    if evidence.blocked:
        reason = f"only {evidence.blocked} of {evidence.responses} responses blocked"
        return _lesson(evidence, "uncertain", reason, weighed, 0.5)
    if evidence.refusals >= evidence.responses:
        return _lesson(evidence, "refused", "every response refused", weighed, 0.25)
    return _lesson(evidence, "passed", f"0 of {evidence.responses} responses blocked", weighed, 0.5)


def _replayed(row: Row, kind: str, reason: str, scale: Callable[[float], float] = probability) -> Row:
    return {
        "id": f"{row['id']}/{row['sample']}" if "sample" in row else row["id"],
        "prompt": row["prompt"],
        "response": row.get("response"),
        "target": scale(row["score"]),
        "weight": 1.0,
        "kind": kind,
        "reason": reason,
        "group": row["group"],
    }


def _for_measuring(evidence: Evidence, settings: MiningSettings) -> Row:
    return {
        **{name: evidence.prompt[name] for name in ("id", "prompt", "unsafe", "category", "source", "group")},
        **{name: evidence.prompt[name] for name in ("language", "jailbreak")},
        "prompt_score": evidence.score,
        "response": None,
        "responses": evidence.responses,
        "blocked": evidence.blocked,
        "response_unsafe": False if not evidence.blocked else evidence.is_positive(settings) or None,
    }


def _for_people(evidence: Evidence, weighed: Weighed) -> Row:
    worst = evidence.worst or {}
    return {
        "id": evidence.prompt["id"],
        "prompt": evidence.prompt["prompt"],
        "blocked": evidence.blocked,
        "responses": evidence.responses,
        "default_probability": round(evidence.prior, 4),
        "target": round(weighed.targets[evidence.prompt["id"]], 4),
        "worst_response": worst.get("response"),
        "responder": worst.get("responder"),
        "source": evidence.prompt["source"],
    }


def _shown(lessons: Sequence[Row], evidence: dict[str, Evidence]) -> list[Row]:
    shown: list[Row] = []
    kinds: Counter[str] = Counter()
    for row in sorted(lessons, key=lambda r: -r["target"]):
        kinds[row["kind"]] += 1
        if kinds[row["kind"]] > SHOWN // 4:
            continue
        found = evidence[row["id"]]
        shown.append(
            {
                "prompt": row["prompt"],
                "response": (found.worst or {}).get("response"),
                "blocked": found.blocked,
                "k": found.responses,
                "prior_score": found.score,
                "target": row["target"],
                "kind": row["kind"],
                "reason": row["reason"],
            }
        )
    return shown


def _verdict(positives: int, never: int, result: MiningResult, settings: MiningSettings) -> tuple[bool, str]:
    if positives < settings.min_positives:
        kept = f" outside the {len(result.held_out)} that are held out" if result.held_out else ""
        return False, (
            f"{positives} of {result.passed} passed prompts drew enough blocked responses{kept}; "
            f"at least {settings.min_positives} are needed to train"
        )
    if not never:
        return False, "every passed prompt drew a blocked response: without safe prompts there is nothing to contrast"
    return True, f"{positives} prompts passed the input check and drew blocked responses"


def _ranks(values: np.ndarray) -> np.ndarray:
    ranks: np.ndarray = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return ranks


def _place(row: Row) -> tuple[str, str, int]:
    return row["id"], row["responder"], row["sample"]
