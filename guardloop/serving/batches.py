"""Requests in, verdicts out: what waits while the guard is at work is judged together in its next pass.

Nothing waits for company: a lone request is judged at once. One thread computes, so every request is judged by one
version of the guard, which its answer names.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from guardloop.serving.settings import MAX_BATCH

log = logging.getLogger("guardloop")


class QueueFullError(Exception):
    """The queue is full. `retry_after` are the seconds after which there should be room."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("too many requests are waiting")
        self.retry_after = retry_after


class LateError(Exception):
    """The request's time was over before the guard came to it."""


@dataclass(frozen=True)
class Answer:
    """The verdicts on a request's messages, in order, and the version that gave them. None: it could not be judged."""

    verdicts: list[Any]
    version: str
    guard: Any


@dataclass(eq=False)
class _Job:
    rows: Sequence[dict[str, Any]]
    deadline: float
    future: "asyncio.Future[Answer]"
    loop: asyncio.AbstractEventLoop

    def end(self, answer: Answer | None, error: Exception | None = None) -> None:
        """Hand the answer to the request's event loop, unless nobody waits for it any more."""

        def settle() -> None:
            if self.future.done():
                return
            if answer is not None:
                self.future.set_result(answer)
            else:
                self.future.set_exception(error or LateError())

        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(settle)


class Batches:
    """The queue before a guard. `current` gives (version, guard); it is asked once for each pass."""

    def __init__(
        self,
        current: Callable[[], tuple[str, Any]],
        max_waiting: int,
        report: Callable[[int, float], None] | None = None,
    ) -> None:
        """`report(messages, seconds)` is called after each pass."""
        self._current = current
        self._max_waiting = max_waiting
        self._report = report or (lambda messages, seconds: None)
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._rate = 100.0  # messages a second, until it is measured
        self.waiting = 0
        """Messages in the queue."""
        self._thread = threading.Thread(target=self._work, name="guard", daemon=True)
        self._thread.start()

    async def judge(self, rows: Sequence[dict[str, Any]], timeout_seconds: float) -> Answer:
        """The verdicts on `rows`. Raises QueueFullError, or LateError where the time is over.

        Cancelled, it leaves the queue: a client that is gone costs nothing more.
        """
        loop = asyncio.get_running_loop()
        job = _Job(rows, time.monotonic() + timeout_seconds, loop.create_future(), loop)
        with self._changed:
            if self._closing or self.waiting + len(rows) > self._max_waiting:
                raise QueueFullError(max(1.0, self.waiting / self._rate))
            self._jobs.append(job)
            self.waiting += len(rows)
            self._changed.notify()
        try:
            return await asyncio.wait_for(job.future, timeout_seconds)
        except TimeoutError:
            raise LateError from None

    def close(self) -> None:
        """Answer what waits, then end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _next(self) -> list[_Job]:
        """The jobs of the next pass, the oldest first; waits for one. Empty: all is done and the service closes."""
        with self._changed:
            while not self._jobs and not self._closing:
                self._changed.wait()
            chosen: list[_Job] = []
            size = 0
            while self._jobs and (not chosen or size + len(self._jobs[0].rows) <= MAX_BATCH):
                job = self._jobs.popleft()
                self.waiting -= len(job.rows)
                if job.future.done():  # its client is gone
                    continue
                if job.deadline < time.monotonic():
                    job.end(None)
                    continue
                chosen.append(job)
                size += len(job.rows)
            if not chosen and self._jobs:
                return self._next()
            return chosen

    def _work(self) -> None:
        while True:
            jobs = self._next()
            if not jobs:
                with self._changed:
                    if self._closing and not self._jobs:
                        return
                continue
            version, guard = self._current()
            started = time.monotonic()
            verdicts = self._score(guard, [row for job in jobs for row in job.rows])
            seconds = time.monotonic() - started
            count = len(verdicts)
            self._rate = 0.8 * self._rate + 0.2 * count / max(seconds, 1e-6)
            self._report(count, seconds)
            start = 0
            for job in jobs:
                job.end(Answer(verdicts[start : start + len(job.rows)], version, guard))
                start += len(job.rows)

    def _score(self, guard: Any, rows: list[dict[str, Any]]) -> list[Any]:
        """A verdict for each row; where the pass fails, each row is tried by itself, so that one harms no other."""
        try:
            return list(guard.score(rows))
        except Exception:
            if len(rows) == 1:
                log.exception("a message could not be judged")
                return [None]
            return [verdict for row in rows for verdict in self._score(guard, [row])]
