from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from support.tiny_responder import PROMPTS, screened, tiny_settings

from guardloop.core.errors import GuardLoopError
from guardloop.core.records import RESPONSE, read_table, write_table
from guardloop.responses.engine import Reply, Request, failure
from guardloop.responses.engines.transformers import TransformersResponder
from guardloop.responses.respond import respond


class Script:
    """A responder that answers from a function, the last of ten requests first."""

    name = "script"

    def __init__(self, fails: tuple[str, ...] = ()) -> None:
        self.fails = fails
        self.asked: list[Request] = []

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        held: list[Request] = []
        for request in requests:
            self.asked.append(request)
            held.append(request)
            if len(held) == 10:
                yield from self._answers(held)
        yield from self._answers(held)

    def close(self) -> None:
        pass

    def _answers(self, held: list[Request]) -> Iterator[Reply]:
        while held:
            r = held.pop()
            yield (
                failure(r, "no luck")
                if r.id in self.fails
                else Reply(r.id, r.sample, f"{r.prompt}/{r.seed}", "stop", 2)
            )


def test_rows_are_responses(tmp_path: Any) -> None:
    rows = screened(PROMPTS, unsafe=True)
    settings = tiny_settings(samples=2)
    seen: list[tuple[int, int]] = []
    made = list(respond(rows, Script(), settings, progress=lambda responses, tokens: seen.append((responses, tokens))))
    assert write_table(made, RESPONSE, tmp_path / "r.parquet") == 80
    assert seen[-1] == (80, 160)
    back = next(r for r in read_table(tmp_path / "r.parquet", RESPONSE) if (r["id"], r["sample"]) == ("p3", 1))
    assert back["response"].startswith(f"{PROMPTS[3]}/")
    assert back["prompt_score"] == -1.5
    assert (back["unsafe"], back["group"], back["responder"], back["finish_reason"]) == (True, "g3", "script", "stop")
    assert not back["refusal"]
    assert set(made[0]) == set(RESPONSE.names)


@pytest.mark.parametrize("prefill", ["", "Sure, here is", " Sure: "])
def test_refusals_are_tagged(prefill: str) -> None:
    class Refuser(Script):
        def _answers(self, held: list[Request]) -> Iterator[Reply]:
            text = f"{prefill} I'm sorry, but I can't help with that.".strip()
            while held:
                yield Reply(held[-1].id, held.pop().sample, text, "stop", 9)

    settings = tiny_settings(prefill=prefill)
    assert all(row["refusal"] for row in respond(screened(PROMPTS[:2]), Refuser(), settings))


def test_only_what_passed_is_answered() -> None:
    rows = [*screened(PROMPTS[:1]), *screened(["blocked"], flagged=True, id="x"), *screened(["?"], score=None, id="y")]
    assert {row["id"] for row in respond(rows, Script(), tiny_settings())} == {"p0"}


def test_bad_prompts_become_rows(model: Any, tokenizer: Any, tmp_path: Any) -> None:
    settings = tiny_settings()
    responder = TransformersResponder.of(settings, model, tokenizer, batch_size=8)
    rows = screened([*PROMPTS, "", "bad \ud800", "sea " * 500])
    made = list(respond(rows, responder, settings, max_error_share=0.1))
    assert write_table(made, RESPONSE, tmp_path / "r.parquet") == 43 * 3
    failed = [row for row in made if row["finish_reason"] == "error"]
    assert {row["id"] for row in failed} == {"p40", "p41", "p42"}
    assert all((row["response"], row["tokens"], row["refusal"]) == ("", 0, False) for row in failed)


def test_too_many_errors_stop_the_run() -> None:
    rows, fails = screened(PROMPTS), ("p1", "p2", "p3")
    assert len(list(respond(rows, Script(fails), tiny_settings(), max_error_share=0.08))) == 120
    with pytest.raises(GuardLoopError, match=r"9 of 120 responses could not be generated: no luck \(9\)(.|\n)*0\.07"):
        list(respond(rows, Script(fails), tiny_settings(), max_error_share=0.07))


def test_an_earlier_run_counts() -> None:
    rows = screened(PROMPTS[:10])
    settings = tiny_settings()
    assert len(list(respond(rows, Script(("p1",)), settings, max_error_share=0.02, answered=120))) == 30
    with pytest.raises(GuardLoopError, match="3 of 149"):
        list(respond(rows, Script(("p1",)), settings, max_error_share=0.02, answered=119))


def test_a_broken_responder_is_stopped_early() -> None:
    rows = screened(["sea"] * 2000)
    responder = Script(tuple(row["id"] for row in rows))
    with pytest.raises(GuardLoopError, match="could not be generated"):
        list(respond(rows, responder, tiny_settings()))
    assert len(responder.asked) < 500


def test_an_id_that_occurs_twice_is_told() -> None:
    with pytest.raises(GuardLoopError, match="p0 occurs twice"):
        list(respond(screened(["a"]) * 2, Script(), tiny_settings()))


def test_nothing_passed() -> None:
    assert list(respond([], Script(), tiny_settings())) == []
