"""From screened traffic and judged responses to a training set."""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from guardloop.core.records import Row
from guardloop.mining.evidence import Evidence, Targets, gather, is_judged, vote, with_verdict
from guardloop.mining.examples import prompt_examples, replay
from guardloop.mining.lexical import ngram_targets
from guardloop.mining.settings import MiningSettings

SHOWN_PER_KIND = 10  # examples in the report
SMOOTHED_FROM = 2000  # judged prompts; with fewer, n-grams are learnt from too few blocked responses


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
    lexical_weight: float
    """Share of each target that is lexical smoothing."""
    smoothing: str
    """The same in words, with the reason where it is 0."""
    counts: dict[str, int] = field(default_factory=dict)
    """Examples by kind."""
    enough: bool = False
    reason: str = ""
    """Why it is or is not enough to train on."""


def mine(screened: Iterable[Row], judged: Iterable[Row], settings: MiningSettings, seed: int = 0) -> MiningResult:
    """Turn evidence into examples. Every example has a kind and a reason; whole groups stay together by their key.

    A share of the judged prompts is held out: no example is made of them or of their responses.
    Only prompts that passed become examples, and the order of the rows does not matter.
    Too little to train on is a normal outcome: `enough` is False and `reason` says why.
    """
    traffic = sorted((_prompt(row) for row in screened if row["score"] is not None), key=lambda row: str(row["id"]))
    passed = {row["id"]: row for row in traffic if not row["flagged"]}
    usable = (with_verdict(row) for row in judged if row["id"] in passed and is_judged(row))
    responses = sorted((_response(row, passed[row["id"]]) for row in usable), key=_place)
    evidence = gather(responses, passed)

    groups = {e.prompt["group"] for e in evidence.values()}
    hidden = {group for group in groups if is_held_out(group, settings.held_out, seed)}
    train_evidence = {id: e for id, e in evidence.items() if e.prompt["group"] not in hidden}
    train_traffic, train_responses = ([r for r in rows if r["group"] not in hidden] for rows in (traffic, responses))

    # votes are counted over held-out prompts, too: they use no labels, and blocked_inputs shows their targets
    targets = vote(evidence, settings.prior_strength)
    weight, smoothing = _lexical_weight(settings, len(evidence))
    targets = smooth(targets, train_traffic, weight, seed)

    examples = prompt_examples(train_evidence, targets, settings)
    said = [row for row in train_responses if row["response"] is not None]  # what a filter withheld cannot be replayed
    replayed = replay(train_traffic, said, examples, targets, settings.replay, seed)
    positives = [e for e in evidence.values() if e.is_positive(settings.min_blocked_share)]
    result = MiningResult(
        examples=examples + replayed,
        blocked_inputs=sorted((_blocked_input(e, targets) for e in positives), key=lambda row: -row["target"]),
        shown=_shown(examples, train_evidence),
        held_out=[_held_out(e, settings) for id, e in evidence.items() if id not in train_evidence],
        screened=len(traffic),
        passed=len(passed),
        responses=len(responses),
        refusals=sum(row["refusal"] for row in responses),
        blocked=sum(row["flagged"] for row in responses),
        lexical_weight=weight,
        smoothing=smoothing,
        counts=dict(Counter(row["kind"] for row in examples + replayed)),
    )
    result.enough, result.reason = _is_enough(result, train_evidence, settings)
    return result


def is_held_out(group: str, share: float, seed: int = 0) -> bool:
    """Whether a near-duplicate group is held out, by a hash of its own.

    Training draws its own validation rows by hash, too; with one and the same, it would find none left.
    """
    digest = hashlib.sha256(f"held out/{seed}/{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def smooth(targets: Targets, traffic: Sequence[Row], weight: float, seed: int = 0) -> Targets:
    """Take the share `weight` of the targets of `traffic` from the targets of the prompts that read alike.

    Prompts that the baseline blocked drew no responses; for them, the prior is the target to learn from.
    """
    rows = [row for row in traffic if row["flagged"] or row["id"] in targets.by_id]
    if not (rows and weight):
        return targets
    own = np.array([targets.prior(row["score"]) if row["flagged"] else targets.by_id[row["id"]] for row in rows])
    smoothed = ngram_targets([row["prompt"] for row in rows], own, [row["group"] for row in rows], seed)
    mixed = (1 - weight) * own + weight * smoothed
    passed = {row["id"]: float(target) for row, target in zip(rows, mixed, strict=True) if not row["flagged"]}
    return replace(targets, by_id={**targets.by_id, **passed})


def _lexical_weight(settings: MiningSettings, judged_prompts: int) -> tuple[float, str]:
    """The weight that is used, and a sentence on it."""
    if not settings.lexical_weight:
        return 0.0, "No lexical smoothing of the targets: lexical_weight is 0."
    if judged_prompts < SMOOTHED_FROM:
        return 0.0, (
            f"No lexical smoothing of the targets: it is used from {SMOOTHED_FROM:,} judged prompts on, and there are "
            f"{judged_prompts:,}."
        )
    return settings.lexical_weight, (
        f"{settings.lexical_weight:.0%} of each target is lexical smoothing, learnt from the targets of the other "
        f"prompts ({judged_prompts:,} were judged)."
    )


def _prompt(row: Row) -> Row:
    """What mining needs of a screened prompt. Words that recur are kept once, since all traffic is in memory."""
    kept = {name: row[name] for name in ("id", "prompt", "unsafe", "jailbreak", "group", "score", "flagged")}
    words = ((name, row[name]) for name in ("category", "source", "language"))
    return kept | {name: word and sys.intern(word) for name, word in words}


def _response(row: Row, prompt: Row) -> Row:
    """What mining needs of a judged response, with its prompt's own texts."""
    kept = {name: row[name] for name in ("sample", "response", "prompt_score", "score", "flagged", "refusal")}
    kept |= {name: prompt[name] for name in ("id", "prompt", "group")}
    return kept | {"responder": sys.intern(row["responder"])}


def _held_out(evidence: Evidence, settings: MiningSettings) -> Row:
    positive = evidence.is_positive(settings.min_blocked_share)
    return {
        **{name: evidence.prompt[name] for name in ("id", "prompt", "unsafe", "category", "source", "group")},
        **{name: evidence.prompt[name] for name in ("language", "jailbreak")},
        "prompt_score": evidence.score,
        "response": None,
        "responses": evidence.responses,
        "blocked": evidence.blocked,
        "response_unsafe": False if not evidence.blocked else positive or None,
    }


def _blocked_input(evidence: Evidence, targets: Targets) -> Row:
    worst = evidence.worst_response or {}
    return {
        "id": evidence.prompt["id"],
        "prompt": evidence.prompt["prompt"],
        "blocked": evidence.blocked,
        "responses": evidence.responses,
        "baseline_probability": round(evidence.prior, 4),
        "target": round(targets.by_id[evidence.prompt["id"]], 4),
        "worst_response": worst.get("response"),
        "responder": worst.get("responder"),
        "source": evidence.prompt["source"],
    }


def _shown(examples: Sequence[Row], evidence: Mapping[str, Evidence]) -> list[Row]:
    """The examples of each kind with the highest targets, with their worst responses."""
    shown: list[Row] = []
    kinds: Counter[str] = Counter()
    for row in sorted(examples, key=lambda row: -row["target"]):
        kinds[row["kind"]] += 1
        if kinds[row["kind"]] > SHOWN_PER_KIND:
            continue
        e = evidence[row["id"]]
        shown.append(
            {name: row[name] for name in ("prompt", "target", "kind", "reason")}
            | {"response": (e.worst_response or {}).get("response"), "blocked": e.blocked, "k": e.responses}
            | {"prior_score": e.score}
        )
    return shown


def _is_enough(result: MiningResult, evidence: Mapping[str, Evidence], settings: MiningSettings) -> tuple[bool, str]:
    positives = result.counts.get("positive", 0)
    if positives < settings.min_positives:
        besides = f" outside the {len(result.held_out)} that are held out" if result.held_out else ""
        return False, (
            f"{positives} of {result.passed} passed prompts drew enough blocked responses{besides}; "
            f"at least {settings.min_positives} are needed to train"
        )
    if all(e.blocked for e in evidence.values()):
        return False, "every passed prompt drew a blocked response: without safe prompts there is nothing to contrast"
    return True, f"{positives} prompts passed the input check and drew blocked responses"


def _place(row: Row) -> tuple[str, str, int]:
    return row["id"], row["responder"], row["sample"]
