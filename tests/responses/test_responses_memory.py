"""Memory does not grow with the prompts, and a slow writer makes the engine wait."""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from responses.test_respond import Script
from support.tiny_responder import PROMPTS, screened, tiny_settings

from guardloop import stages
from guardloop.core.records import RESPONSE, SCREENED, Row, count_rows, write_table
from guardloop.responses import resume, work
from guardloop.responses.engine import Reply, Request
from guardloop.responses.engines.transformers import WINDOW_BATCHES, TransformersResponder
from guardloop.responses.resume import Parts

MANY = 80_000
GROWTH_MIB = 24  # all rows of MANY prompts, held as Python objects, are some hundred


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[float] = []

    class Cheap(Script):
        def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
            for number, request in enumerate(requests):
                if number % 2000 == 0:
                    measured.append(resident_mib())
                yield Reply(request.id, request.sample, request.prompt, "stop", 3)

    def rows() -> Iterator[Row]:
        (row,) = screened(["why is the sea so blue, and the moon so far away? " * 4])
        for number in range(MANY):
            yield {**row, "id": f"id-{number}", "group": f"group-{number}"}

    monkeypatch.setenv(work.PLACE, str(tmp_path / "work"))
    monkeypatch.setattr(resume, "build_responder", lambda one: Cheap())
    write_table(rows(), SCREENED, tmp_path / "screened")
    stages.generate_responses(tmp_path / "screened", tmp_path / "responses", [tiny_settings(samples=1).plain()])
    measured.append(resident_mib())
    assert count_rows(tmp_path / "responses") == MANY
    early = len(measured) // 5
    assert max(measured[early:]) - max(measured[:early]) < GROWTH_MIB


@pytest.mark.slow
def test_a_slow_writer_makes_the_engine_wait(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(samples=2, max_new_tokens=3)
    engine = TransformersResponder.of(settings, model, tokenizer, batch_size=4)
    read = written = most = 0

    def counted(rows: list[Row]) -> Iterator[Row]:
        nonlocal read, most
        for row in rows:
            read += 1
            most = max(most, read - written)
            yield row

    def slow(rows: list[Row], *rest: Any) -> int:
        nonlocal written
        time.sleep(0.02)
        written += len(rows) // settings.samples
        return write_table(rows, *rest)

    monkeypatch.setattr(resume, "PART_SECONDS", 0.0)
    monkeypatch.setattr(resume, "write_table", slow)
    parts = Parts(tmp_path, settings.samples)
    build: Callable[[], TransformersResponder] = lambda: engine  # noqa: E731
    monkeypatch.setattr(engine, "close", lambda: None)
    rows = screened(PROMPTS * 3)
    parts.fill(counted([{**row, "id": f"i{n}"} for n, row in enumerate(rows)]), build, settings)
    assert written == read == len(rows)
    assert sum(1 for _ in parts.rows()) == len(rows) * settings.samples
    assert most <= (WINDOW_BATCHES + 1) * 4 / settings.samples + 2  # what the engine reads ahead, and no more
    assert set(RESPONSE.names) == set(next(parts.rows()))
