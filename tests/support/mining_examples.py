"""Screened traffic and judged responses, made up: each prompt has a text and a score of its own."""

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from guardloop.core.records import JUDGED, SCREENED

Row = dict[str, Any]
TOPICS = ["bread", "locks", "garden", "python", "poem", "travel"]


@dataclass
class World:
    """One round of the loop before mining."""

    screened: list[Row]
    judged: list[Row]

    def texts(self, flagged: bool) -> list[str]:
        return [r["prompt"] for r in self.screened if r["flagged"] == flagged and r["score"] is not None]


def screened(identity: str, score: float | None, text: str = "") -> Row:
    found = {
        "id": identity,
        "prompt": text or f"prompt {identity}",
        "source": "made up",
        "group": f"group {identity}",
        "score": score,
        "label_mass": None if score is None else 1.0,
        "flagged": score is not None and score > 0,
        "truncated": False,
        "error": "unreadable" if score is None else None,
    }
    return dict.fromkeys(SCREENED.names) | found


def judged(prompt: Row, sample: int, score: float | None, refusal: bool = False, finish: str = "stop") -> Row:
    found = {
        "prompt_score": prompt["score"],
        "response": f"response {sample} to {prompt['id']}",
        "sample": sample,
        "responder": "made up",
        "finish_reason": finish,
        "tokens": 7,
        "refusal": refusal,
        "score": score,
        "flagged": score is not None and score > 0,
    }
    return dict.fromkeys(JUDGED.names) | prompt | found


def round_of(positives: int, answered: int, refused: int = 0, flagged: int = 0, samples: int = 4) -> World:
    """So many passed prompts of each kind, and so many that the guard flagged."""
    world = World([], [])
    kinds = [("positive", 3.0)] * positives + [("answered", -3.0)] * answered + [("refused", -5.0)] * refused
    for number, (kind, score) in enumerate(kinds):
        text = f"{TOPICS[number % len(TOPICS)]} {kind} number {number}"
        prompt = screened(f"{kind}-{number}", -1.0 - 0.1 * (number % 7), text)
        world.screened.append(prompt)
        world.judged += [judged(prompt, i, score + 0.1 * i, kind == "refused") for i in range(samples)]
    world.screened += [screened(f"flagged-{i}", 1.0 + i) for i in range(flagged)]
    return world


scores = st.floats(-12, 12, width=32).filter(lambda score: score != 0)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Any round, with unreadable rows and responses that failed."""
    world = World([], [])
    for number in range(draw(st.integers(0, 14))):
        text = " ".join([*draw(st.lists(st.sampled_from(TOPICS), max_size=5)), str(number)])
        prompt = screened(f"p{number}", draw(st.one_of(st.none(), scores, scores.map(lambda m: -abs(m)))), text)
        world.screened.append(prompt)
        if prompt["score"] is None or prompt["flagged"]:
            continue
        for sample in range(draw(st.integers(0, 5))):
            finish = draw(st.sampled_from(["stop", "stop", "length", "error"]))
            score = None if finish == "error" else draw(st.one_of(scores, scores, scores, st.none()))
            world.judged.append(judged(prompt, sample, score, draw(st.booleans()), finish))
    return world
