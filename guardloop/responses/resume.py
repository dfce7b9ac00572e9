"""Responses that survive a kill: finished prompts are kept as Parquet parts in a working folder.

A part is there as a whole or not at all, and holds whole prompts: all samples of each. Prompts with errors go into
parts of their own, which the next run throws away, so that what failed is tried again.
"""

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from hashlib import blake2b
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from guardloop.core.errors import GuardLoopError
from guardloop.core.progress import Stage
from guardloop.core.records import RESPONSE, Row, count_rows, read_table, read_tables, write_table
from guardloop.responses.build import build_responder
from guardloop.responses.engine import Responder
from guardloop.responses.respond import Progress, passed, respond
from guardloop.responses.settings import ResponderSettings
from guardloop.responses.work import Work, key_of

log = logging.getLogger("guardloop")
PART_SECONDS = 20.0  # a kill costs at most this much work
PART_ROWS = 4096


def answered(
    table: str | Path, responders: Sequence[ResponderSettings], seed: int, max_error_share: float, stage: Stage
) -> Iterator[Row]:
    """Responses (records.RESPONSE) of every responder to the prompts of the screened `table` that passed.

    First all that is missing is generated, then all is read back: also what earlier runs on the same table with the
    same settings kept, up to the moment at which they were killed. Raises GuardLoopError as `respond` and `Work` do.
    """
    prompts = sum(passed(row) for row in read_table(table))
    if not prompts:
        return
    with ExitStack() as stack:
        everyone = []
        for one in responders:
            work = stack.enter_context(Work(key_of(table, one, seed)))
            everyone.append((one, Parts(work.folder, one.samples, work.keep)))
        there = sum(parts.answered for _, parts in everyone)
        if there:
            stage.say(f"{there} responses are there already; going on from there")
        total = prompts * sum(one.samples for one, _ in everyone) - there
        started, done = time.monotonic(), 0

        def progress(_made: int, _tokens: int) -> None:
            nonlocal done
            done += 1
            stage.report("generating", done, total, started)

        for one, parts in everyone:
            parts.fill(read_table(table), partial(_load, one, stage), one, seed, max_error_share, progress)
        for _, parts in everyone:
            yield from parts.rows()


class Parts:
    """The parts of one responder's work in `folder`: `part-*` of finished prompts, `error-*` of those to try again.

    `keep` is called with each finished part.
    """

    def __init__(self, folder: Path, samples: int, keep: Callable[[Path], None] = lambda part: None) -> None:
        self.folder = folder
        self.samples = samples
        self._keep = keep
        for leftover in {*folder.glob("error-*"), *folder.glob("*.partial")}:
            leftover.unlink()
        kept, self._done = _distinct([path for path in self._paths() if _is_whole(path)])
        self.answered = sum(count_rows(path) for path in kept)
        self._next = 1 + max((int(path.stem.split("-")[1]) for path in kept), default=-1)

    def fill(
        self,
        rows: Iterable[Row],
        load: Callable[[], Responder],
        settings: ResponderSettings,
        seed: int = 0,
        max_error_share: float = 0.05,
        progress: Progress = lambda responses, tokens: None,
    ) -> None:
        """Answer those of the screened `rows` that passed and are not finished; `load` is called if there are any."""
        missing = (row for row in rows if passed(row) and not self._finished(row["id"]))
        first = next(missing, None)
        if first is not None:
            with closing(load()) as responder:
                self.write(
                    respond(
                        chain([first], missing),
                        responder,
                        settings,
                        seed,
                        max_error_share,
                        progress=progress,
                        answered=self.answered,
                    )
                )

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
                if len(good) + len(bad) >= PART_ROWS or time.monotonic() - written >= PART_SECONDS:
                    self._flush(good, bad)
                    written = time.monotonic()
        finally:  # what is done is kept, also when the run is stopped by an error
            self._flush(good, bad)

    def rows(self) -> Iterator[Row]:
        """All responses that are there, of this run and of earlier ones."""
        return read_tables([*self._paths(), *self._paths("error")], RESPONSE)

    def _finished(self, id: str) -> bool:
        key = _hash(id)
        place = np.searchsorted(self._done, key)
        return bool(place < len(self._done) and self._done[place] == key)

    def _paths(self, kind: str = "part") -> list[Path]:
        return sorted(self.folder.glob(f"{kind}-*.parquet"))

    def _flush(self, good: list[Row], bad: list[Row]) -> None:
        # The random end keeps two pods that do the same work from overwriting each other's parts in the store.
        name = f"{self._next:06d}-{secrets.token_hex(4)}.parquet"
        if good:
            write_table(good, RESPONSE, self.folder / f"part-{name}")
            self._keep(self.folder / f"part-{name}")
        if bad:
            write_table(bad, RESPONSE, self.folder / f"error-{name}")
        good.clear()
        bad.clear()
        self._next += 1


def _load(settings: ResponderSettings, stage: Stage) -> Responder:
    stage.say(f"loading {settings.model}")
    return build_responder(settings)


def _is_whole(path: Path) -> bool:
    """Whether a part is as it was written; one that a crash of the machine or its disk broke is thrown away."""
    try:
        count_rows(path)
    except GuardLoopError:
        log.warning("%s is broken; its prompts are answered again", path)
        path.unlink()
        return False
    return True


def _distinct(paths: list[Path]) -> tuple[list[Path], npt.NDArray[np.int64]]:
    """The parts without those that repeat a prompt of a part that is kept, and the sorted hashes of their prompts' ids.

    Two pods may have done the same work at the same time. Eight bytes per prompt are held.
    """
    hashes = [_hashes(path) for path in paths]
    if not hashes:
        return [], np.empty(0, np.int64)
    every, times = np.unique(np.concatenate(hashes), return_counts=True)
    repeated = every[times > 1]
    taken: set[int] = set()  # those of the repeated that are in a part that is kept
    kept = list[int]()
    for index, (path, ids) in enumerate(zip(paths, hashes, strict=True)):
        shared = set(np.intersect1d(ids, repeated).tolist())
        if shared & taken:
            log.warning("%s repeats prompts of another part; it is not used", path)
            path.unlink()
        else:
            taken |= shared
            kept.append(index)
    return [paths[i] for i in kept], np.sort(np.concatenate([hashes[i] for i in kept]))


def _hash(id: str) -> int:
    return int.from_bytes(blake2b(id.encode(), digest_size=8).digest(), "big", signed=True)


def _hashes(path: Path) -> npt.NDArray[np.int64]:
    ids = pq.read_table(path, columns=["id"])["id"].unique().to_pylist()
    return np.array([_hash(id) for id in ids], np.int64)
