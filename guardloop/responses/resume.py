"""Responses that survive a kill: finished prompts are kept as Parquet parts in a working folder.

A part is there as a whole or not at all, and holds whole prompts: all samples of each. Prompts with errors go into
parts of their own, which the next run throws away, so that what failed is tried again.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from guardloop.errors import GuardLoopError
from guardloop.records import RESPONSE, Row, count_rows, read_tables, write_table
from guardloop.responses.respond import Progress, respond
from guardloop.responses.responder import Responder
from guardloop.responses.settings import ResponderSettings

log = logging.getLogger("guardloop")
PART_SECONDS = 20.0  # a kill costs at most this much work
PART_ROWS = 4096


def generate_responses(
    rows: Iterable[Row],
    responder: Responder,
    settings: ResponderSettings,
    folder: str | Path,
    output: str | Path,
    *,
    progress: Progress = lambda responses, tokens: None,
    part_seconds: float = PART_SECONDS,
) -> int:
    """Write the responses to the screened `rows` that passed to the Parquet file `output`; returns their number.

    Can be killed at any moment and run again with the same `folder`, which must belong to these rows and settings
    alone: prompts that were finished are not answered again. `progress` counts what this run generates. Raises
    GuardLoopError as `respond` does, and when another process works in the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        with lock.acquire(timeout=0):
            parts = Parts(folder, settings.samples, part_seconds)
            if parts.answered:
                log.info("%d responses are there already; going on from there", parts.answered)
            parts.write(respond(parts.remaining(rows), responder, settings, progress=progress, answered=parts.answered))
            return parts.assemble(output)
    except Timeout:
        raise GuardLoopError(
            f"another process is generating responses in {folder}", "wait until it has ended, or stop it"
        ) from None


class Parts:
    """The parts of one run in `folder`: `part-*` of finished prompts, `error-*` of prompts to be tried again."""

    def __init__(
        self, folder: Path, samples: int, part_seconds: float = PART_SECONDS, part_rows: int = PART_ROWS
    ) -> None:
        self.folder = folder
        self.samples = samples
        self.part_seconds = part_seconds
        self.part_rows = part_rows
        for leftover in [*folder.glob("error-*"), *folder.glob("*.partial")]:
            leftover.unlink()
        kept = [path for path in self._paths() if _is_whole(path)]
        self.answered = sum(count_rows(path) for path in kept)
        self._next = 1 + max((int(path.stem.split("-")[1]) for path in kept), default=-1)
        ids = [_hashes(path) for path in kept]
        self._done = np.unique(np.concatenate(ids)) if ids else np.empty(0, np.int64)  # 8 bytes per prompt

    def remaining(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows whose prompts are not finished."""
        for row in rows:
            key = _hash(row["id"])
            place = np.searchsorted(self._done, key)
            if place == len(self._done) or self._done[place] != key:
                yield row

    def write(self, responses: Iterable[Row]) -> None:
        """Keep `responses` as they come, a prompt as soon as all of its samples are there."""
        open_prompts: dict[str, list[Row]] = {}
        good, bad = list[Row](), list[Row]()
        written = time.monotonic()
        try:
            for response in responses:
                samples = open_prompts.setdefault(response["id"], [])
                samples.append(response)
                if len(samples) < self.samples:
                    continue
                del open_prompts[response["id"]]
                failed = any(sample["finish_reason"] == "error" for sample in samples)
                (bad if failed else good).extend(samples)
                full = len(good) + len(bad) >= self.part_rows
                if full or time.monotonic() - written >= self.part_seconds:
                    self._flush(good, bad)
                    written = time.monotonic()
        finally:  # what is done is kept, also when the run is stopped by an error
            self._flush(good, bad)

    def assemble(self, output: str | Path) -> int:
        """Write all parts into the file `output`, all or nothing; returns the number of rows."""
        return write_table(self.rows(), RESPONSE, output)

    def rows(self) -> Iterator[Row]:
        """All responses that are there, of this run and of earlier ones."""
        return read_tables([*self._paths(), *self._paths("error")], RESPONSE)

    def _paths(self, kind: str = "part") -> list[Path]:
        return sorted(self.folder.glob(f"{kind}-*.parquet"))

    def _flush(self, good: list[Row], bad: list[Row]) -> None:
        for kind, rows in (("part", good), ("error", bad)):
            if rows:
                write_table(rows, RESPONSE, self.folder / f"{kind}-{self._next:06d}.parquet")
                rows.clear()
        self._next += 1


def _is_whole(path: Path) -> bool:
    """Whether a part can be read; one that a crash of the machine broke is thrown away."""
    try:
        pq.read_metadata(path)
    except (OSError, ValueError):
        log.warning("%s is broken; its prompts are answered again", path)
        path.unlink()
        return False
    return True


def _hash(id: str) -> int:
    return int.from_bytes(blake2b(id.encode(), digest_size=8).digest(), "big", signed=True)


def _hashes(path: Path) -> npt.NDArray[np.int64]:
    ids = pq.read_table(path, columns=["id"])["id"].unique().to_pylist()
    return np.array([_hash(id) for id in ids], np.int64)
