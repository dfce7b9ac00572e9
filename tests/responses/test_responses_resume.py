import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_respond import Script
from tiny_responder import PROMPTS, screened, tiny_settings

from guardloop.errors import GuardLoopError
from guardloop.records import RESPONSE, Row, read_table
from guardloop.responses.responder import Reply, Request
from guardloop.responses.resume import generate_responses
from guardloop.responses.transformers import TransformersResponder

KILLS = 20


def contents(path: Path) -> list[tuple[Any, ...]]:
    return sorted(tuple(row[name] for name in ("id", "sample", *RESPONSE.names[1:])) for row in _comparable(path))


def _comparable(path: Path) -> Iterator[Row]:
    for row in read_table(path, RESPONSE):
        yield {name: "" if value is None else value for name, value in row.items()}


def finished(folder: Path) -> set[str]:
    return {row["id"] for part in folder.glob("part-*.parquet") for row in read_table(part)}


class Logged:
    """A responder that notes in a file which prompts it was asked for."""

    def __init__(self, responder: TransformersResponder, log: Path) -> None:
        self.responder, self.name, self.log = responder, responder.name, log

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        with self.log.open("a") as log:

            def noted() -> Iterator[Request]:
                for request in requests:
                    log.write(f"{request.id}\n")
                    log.flush()
                    yield request

            yield from self.responder.generate(noted())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_survives_being_killed_at_any_moment(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    torch.set_num_threads(1)  # a forked child must not wait for threads that only its parent has
    settings = tiny_settings(samples=2, batch_rows=4, max_new_tokens=8, max_error_share=0.2)
    rows = screened([*PROMPTS, "", *PROMPTS, "sea " * 500, *PROMPTS])
    responder = TransformersResponder.of(settings, model, tokenizer)
    started = time.monotonic()
    generate_responses(rows, responder, settings, tmp_path / "whole", tmp_path / "whole.parquet", part_seconds=0)
    seconds = time.monotonic() - started

    folder, output, log = tmp_path / "work", tmp_path / "out.parquet", tmp_path / "asked"
    fork = multiprocessing.get_context("fork")
    dice, kills, sizes = random.Random(0), 0, []
    while True:
        log.write_text("")
        before = finished(folder)
        child = fork.Process(
            target=generate_responses,
            args=(rows, Logged(responder, log), settings, folder, output),
            kwargs={"part_seconds": 0},
        )
        child.start()
        if kills < KILLS:
            child.join(dice.uniform(0, seconds / 6))
            if child.is_alive():
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)
        child.join(60)
        assert not before & set(log.read_text().split())
        sizes.append(len(before))
        if child.exitcode == 0 and kills >= KILLS:
            break
        kills += child.exitcode == -signal.SIGKILL
        if child.exitcode == 0:  # it was done before it could be killed: kill the rest of a new, half-done one
            for part in sorted(folder.glob("part-*.parquet"))[::2]:
                part.unlink()
    assert sizes[-1] > 0
    assert len(contents(output)) == len(rows) * 2
    assert contents(output) == contents(tmp_path / "whole.parquet")


def test_what_failed_is_tried_again(tmp_path: Path) -> None:
    rows, settings = screened(PROMPTS), tiny_settings(max_error_share=0.5)
    work, output = tmp_path / "work", tmp_path / "out.parquet"
    first, second, third = Script(("p1", "p2")), Script(("p2",)), Script(("p2",))
    for responder, asked in ((first, set(range(40))), (second, {1, 2}), (third, {2})):
        assert generate_responses(rows, responder, settings, work, output, part_seconds=0) == 120
        assert {r.id for r in responder.asked} == {f"p{i}" for i in asked}
    assert [row["id"] for row in read_table(output) if row["finish_reason"] == "error"] == ["p2"] * 3


def test_what_is_done_is_kept_when_too_much_fails(tmp_path: Path) -> None:
    rows, settings = screened(PROMPTS), tiny_settings(max_error_share=0.2)
    work, output = tmp_path / "work", tmp_path / "out.parquet"
    with pytest.raises(GuardLoopError, match="is kept"):
        generate_responses(rows, Script(tuple(f"p{i}" for i in range(20))), settings, work, output)
    assert not output.exists()
    again = Script()
    assert generate_responses(rows, again, settings, work, output) == 120
    assert {r.id for r in again.asked} == {f"p{i}" for i in range(20)}


def test_broken_parts_are_answered_again(tmp_path: Path) -> None:
    rows, settings = screened(PROMPTS), tiny_settings()
    work, output = tmp_path / "work", tmp_path / "out.parquet"
    generate_responses(rows, Script(), settings, work, output, part_seconds=0)
    parts = sorted(work.glob("part-*.parquet"))
    assert len(parts) > 10
    parts[3].write_bytes(parts[3].read_bytes()[:100])
    parts[5].write_bytes(b"")
    (work / "part-000099.parquet.partial").write_bytes(b"half")
    expected, again = contents(output), Script()
    output.unlink()
    generate_responses(rows, again, settings, work, output)
    assert 2 <= len({r.id for r in again.asked}) <= 8
    assert contents(output) == expected
    assert not list(work.glob("*.partial"))


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    class Nested(Script):
        def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
            with pytest.raises(GuardLoopError, match="another process"):
                generate_responses([], Script(), settings, tmp_path / "work", tmp_path / "other.parquet")
            yield from super().generate(requests)

    settings = tiny_settings()
    assert generate_responses(screened(["a"]), Nested(), settings, tmp_path / "work", tmp_path / "out.parquet") == 3


def test_nothing_passed_gives_an_empty_table(tmp_path: Path) -> None:
    assert generate_responses([], Script(), tiny_settings(), tmp_path / "work", tmp_path / "out.parquet") == 0
    assert list(read_table(tmp_path / "out.parquet", RESPONSE)) == []
