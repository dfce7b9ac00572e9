"""What a stage is doing: events that a terminal can draw, and log lines that an operator can follow.

Where $GUARDLOOP_EVENTS names a file, each event is a JSON line there; else progress goes to the log now and then.
"""

import errno
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from guardloop.core.errors import GuardLoopError
from guardloop.core.text import clean, indented

log = logging.getLogger("guardloop")
T = TypeVar("T")
EVENT_SECONDS = 0.5
LOG_SECONDS = 20.0


class Stage:
    """One stage's work, as a context: how far it is, and in the end what came out."""

    def __init__(self, name: str, shard: int | None = None) -> None:
        self.name = name if shard is None else f"{name} [{shard}]"
        self.items = 0
        self.outcome = ""
        self._started = time.monotonic()
        self._last_event = self._last_log = 0.0

    def __enter__(self) -> "Stage":
        show_clean_text()
        if not logging.getLogger().handlers:
            logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
        log.setLevel(logging.INFO)
        log.info("%s: started", self.name)
        self._emit("start")
        return self

    def track(self, rows: Iterable[T], total: int | None, doing: str) -> Iterator[T]:
        """Pass `rows` through, reporting `doing`, rate and time left."""
        started, done = time.monotonic(), 0
        for done, row in enumerate(rows, start=1):
            yield row
            self.report(doing, done, total, started)
        self._emit("progress", doing=doing, done=done, total=total or done, rate=done / max(1e-9, _since(started)))

    def report(self, doing: str, done: int, total: int | None, started: float, note: str = "") -> None:
        """Say how far the work is; `started` is a time.monotonic()."""
        rate = done / max(1e-9, _since(started))
        now = time.monotonic()
        if now - self._last_event >= EVENT_SECONDS:
            self._last_event = now
            self._emit("progress", doing=doing, done=done, total=total, rate=rate, note=note)
        if now - self._last_log >= LOG_SECONDS:
            self._last_log = now
            left = f", {(total - done) / rate:.0f} s left" if total and rate else ""
            log.info("%s: %s %d/%s, %.1f/s%s %s", self.name, doing, done, total or "?", rate, left, note)

    def say(self, doing: str) -> None:
        """Say what begins now, where there is nothing to count."""
        log.info("%s: %s", self.name, doing)
        self._emit("progress", doing=doing)

    def done(self, items: int, outcome: str) -> None:
        """What came out: the number of items, and a few words for the summary table."""
        self.items, self.outcome = items, outcome

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        seconds = _since(self._started)
        if error is not None:
            full = _disk_full(error)
            error = full or error
            log.error("%s: failed after %.1f s: %s", self.name, seconds, error)
            self._emit("failed", seconds=seconds, error=str(error), known=type(error).__name__)
            if full:
                raise full
            return
        log.info("%s: %d items in %.1f s: %s", self.name, self.items, seconds, self.outcome)
        self._emit("done", seconds=seconds, items=self.items, outcome=self.outcome)

    def _emit(self, event: str, **values: Any) -> None:
        path = os.environ.get("GUARDLOOP_EVENTS")
        if path:
            with suppress(OSError), Path(path).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"event": event, "stage": self.name, "at": time.time(), **values}) + "\n")


def show_clean_text() -> None:
    """From here on every log line and traceback of this process is written without secrets and control characters."""
    make = logging.getLogRecordFactory()
    if getattr(make, "is_clean", False):
        return

    def make_clean(*args: Any, **values: Any) -> logging.LogRecord:
        record = make(*args, **values)
        record.msg, record.args = indented(record.getMessage()), None
        return record

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(clean("".join(traceback.format_exception(kind, error, trace))))

    make_clean.is_clean = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_clean)
    sys.excepthook = show


def short(path: Path) -> str:
    """A path as people type it: from here, or from their home folder."""
    if path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def _disk_full(error: BaseException) -> GuardLoopError | None:
    """The error to raise instead where the disk is full, whichever library noticed."""
    if isinstance(error, GuardLoopError) or not (
        getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)
    ):
        return None
    place = getattr(error, "filename", None)
    return GuardLoopError(
        f"the disk is full{f': cannot write {place}' if place else ''}",
        "free disk space, then run this again: stages take up work that was kept",
    )


def _since(started: float) -> float:
    return time.monotonic() - started
