"""The log of requests: JSON lines by date, in a folder or under an `s3://` prefix. It is the next round's traffic.

An answer never waits for the log: rows go into a bounded queue, a thread writes them. A file is `.partial` while it
grows; complete, it gets its name, or goes to the store. What a killed process left is taken up by the next.
"""

import fcntl
import hashlib
import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from guardloop.core.errors import GuardLoopError
from guardloop.core.places import home
from guardloop.core.storage import put

log = logging.getLogger("guardloop")
Row = dict[str, Any]
MAX_QUEUED = 10_000
FILE_ROWS, FILE_SECONDS = 10_000, 60.0
PARTIAL = ".partial"


class RequestLog:
    """Writes rows to `place`, a folder or an `s3://` prefix, as `date=YYYY-MM-DD/TIME-ID.jsonl`."""

    def __init__(
        self,
        place: str,
        share: float = 1.0,
        text: bool = True,
        lost: Callable[[int], None] | None = None,
        file_seconds: float = FILE_SECONDS,
    ) -> None:
        """`share`: of the conversations that are logged. `text` False: hashes instead of messages.

        `lost(count)` is called for rows that could not be kept. Raises GuardLoopError where nothing can be written.
        """
        self.place = place.rstrip("/")
        self._remote = self.place.startswith("s3://")
        self._folder = home() / "serving" if self._remote else Path(self.place).expanduser()
        self._share, self._text, self._file_seconds = share, text, file_seconds
        self._lost = lost or (lambda count: None)
        self._queue: queue.Queue[Row | None] = queue.Queue(MAX_QUEUED)
        self._file: BinaryIO | None = None
        self._path = Path()
        self._rows, self._opened = 0, 0.0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._take_up()
        except OSError as error:
            raise GuardLoopError(f"cannot write the log to {self._folder}: {error}", "choose another place") from None
        self._thread = threading.Thread(target=self._work, name="request-log", daemon=True)
        self._thread.start()

    def add(self, row: Row, always: bool) -> None:
        """Log a request, if its conversation is among those chosen, or `always`. Never waits."""
        if not always and _draw(row["conversation"]) >= self._share:
            return
        try:
            self._queue.put_nowait(row)
        except queue.Full:
            self._lost(1)

    def close(self) -> None:
        """Write what waits, then end."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        ended = False
        while not ended:
            rows = []
            try:
                rows.append(self._queue.get(timeout=1.0))
                while len(rows) < FILE_ROWS:
                    rows.append(self._queue.get_nowait())
            except queue.Empty:
                pass
            ended = None in rows
            kept = [row for row in rows if row is not None]
            try:
                if kept:
                    self._write(kept)
                if self._file and (
                    ended or self._rows >= FILE_ROWS or time.monotonic() - self._opened > self._file_seconds
                ):
                    self._finish()
            except OSError as error:
                log.error("the log of requests: %s: %d rows lost", error, len(kept))
                self._lost(len(kept))
                self._drop()

    def _write(self, rows: list[Row]) -> None:
        if self._file is None:
            now = datetime.now(UTC)
            self._path = self._folder / f"date={now:%Y-%m-%d}" / f"{now:%H%M%S}-{uuid4().hex[:8]}.jsonl{PARTIAL}"
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=0)
            fcntl.flock(self._file, fcntl.LOCK_EX)  # tells a living writer's file from one that was left
            self._rows, self._opened = 0, time.monotonic()
        lines = "".join(json.dumps(self._shown(row), ensure_ascii=False) + "\n" for row in rows).encode()
        if (written := self._file.write(lines)) != len(lines):
            raise OSError(f"only {written} of {len(lines)} bytes were written")
        self._rows += len(rows)

    def _shown(self, row: Row) -> Row:
        if self._text:
            return row
        hidden = [{**m, "content": _hash(m["content"])} for m in row["messages"]]
        hashes = {name: _hash(row[name]) if row[name] is not None else None for name in ("prompt", "response")}
        return {**row, "messages": hidden, **hashes}

    def _finish(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None
        self._hand_over(self._path)

    def _hand_over(self, path: Path) -> None:
        """Give a complete file its name, or send it to the store; where that is away, it is tried again later."""
        done = path.with_name(path.name.removesuffix(PARTIAL))
        path.rename(done)
        if not self._remote:
            return
        for file in sorted(self._folder.rglob("*.jsonl")):  # also what could not be sent before
            try:
                put(file, f"{self.place}/{file.relative_to(self._folder).as_posix()}")
            except GuardLoopError as error:
                log.warning("the log stays on this machine for now: %s", error.what)
                return
            file.unlink()

    def _drop(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _take_up(self) -> None:
        """Finish the files that a killed process left: their complete lines stay."""
        for path in sorted(self._folder.rglob(f"*.jsonl{PARTIAL}")):
            with path.open("r+b") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    continue  # another process writes it
                content = file.read()
                file.truncate(content.rfind(b"\n") + 1)
            if path.stat().st_size == 0:
                path.unlink()
            else:
                self._hand_over(path)


def _draw(conversation: str) -> float:
    """A number from 0 to 1 that is the same for each request of a conversation."""
    return int.from_bytes(hashlib.sha256(conversation.encode()).digest()[:8]) / 2**64


def _hash(text: Any) -> str:
    return hashlib.sha256(json.dumps(text).encode() if not isinstance(text, str) else text.encode()).hexdigest()
