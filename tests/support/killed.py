"""The response stage as a process of its own, which a test may kill at any moment."""

import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from support.processes import start
from support.tiny_responder import PROMPTS, screened, tiny_settings

from guardloop import stages
from guardloop.core.records import RESPONSE, SCREENED, read_table, write_table
from guardloop.responses import resume
from guardloop.responses.build import build_responder
from guardloop.responses.engine import Reply, Request, Responder
from guardloop.responses.engines import transformers
from guardloop.responses.settings import ResponderSettings


class Logged:
    """A responder that notes in a file which prompts it was asked for."""

    def __init__(self, responder: Responder, log: Path) -> None:
        self.responder, self.name, self.log = responder, responder.name, log

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        with self.log.open("a") as log:

            def noted() -> Iterator[Request]:
                for request in requests:
                    log.write(f"{request.id}\n")
                    log.flush()
                    yield request

            yield from self.responder.generate(noted())

    def close(self) -> None:
        self.responder.close()


def generate(table: Path, output: Path, settings: ResponderSettings, model: Path, log: Path) -> None:
    """The stage, with a part for every prompt that is done, in batches of four."""
    transformers.BATCH_ROWS = 4
    resume.PART_SECONDS = 0.0
    resume.build_responder = lambda one: Logged(build_responder(one, load=str(model)), log)
    stages.generate_responses(table, output, [settings.plain()], max_error_share=0.2)


class Killer:
    """Runs the stage on a real tiny model in `folder`, and kills it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.settings = tiny_settings(samples=2, max_new_tokens=6)
        self.rows = screened([*PROMPTS, "", *PROMPTS[:20], "sea " * 500])
        self.table, self.log, self.whole, self.model = folder / "screened", folder / "asked", folder / "whole", model
        write_table(self.rows, SCREENED, self.table)
        self.log.touch()
        start(time.sleep, 0).join()  # the server is there then, and a run takes only its own time
        started = time.monotonic()
        assert self.kill_within(60, self.whole) == 0
        self.seconds = time.monotonic() - started

    def kill_within(self, seconds: float, output: Path, place: Path | None = None) -> int:
        """Run it for at most `seconds`, counted from its first new part at `place` if given; returns its exit code."""
        there = parts(place) if place else {}
        child = start(generate, self.table, output, self.settings, self.model, self.log)
        while place and child.is_alive() and not parts(place).keys() - there.keys():
            time.sleep(0.005)
        child.join(seconds)
        if child.is_alive():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
        child.join(60)
        assert child.exitcode is not None
        return child.exitcode


def contents(*paths: Path) -> list[tuple[Any, ...]]:
    """All responses in tables, in one order."""
    rows = (row for path in paths for row in read_table(path, RESPONSE))
    return sorted(tuple("" if row[name] is None else row[name] for name in RESPONSE.names) for row in rows)


def parts(place: Path) -> dict[Path, int]:
    """The parts of all work at `place`, and when each was written."""
    return {part: part.stat().st_mtime_ns for part in place.glob("*/part-*.parquet")}
