"""Steps of an experiment: each is kept by what it is made from, and they run side by side where there are workers."""

import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from guardloop.core.errors import GuardLoopError


class UnfinishedError(GuardLoopError):
    """A step is not done yet, and none is to be done now."""


class Kept:
    """Folders of finished steps, named by what they are made from."""

    def __init__(self, root: Path, *, only_finished: bool = False) -> None:
        self.root = root
        self.only_finished = only_finished

    def make(self, name: str, key: Any, build: Callable[[Path], None]) -> Path:
        """The folder of step `name`, built first unless one with this `key` (JSON values) is there.

        Raises UnfinishedError instead of building it if `only_finished`.
        """
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:12]
        folder = self.root / f"{name}-{digest}"
        if not folder.is_dir():
            if self.only_finished:
                raise UnfinishedError(f"experiment: the step {folder} is not done yet", "leave out --finished")
            partial_folder = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial_folder, ignore_errors=True)
            partial_folder.mkdir(parents=True)
            try:
                build(partial_folder)
            finally:  # the others need the memory
                gc.collect()
                torch.cuda.empty_cache()
            partial_folder.rename(folder)
        return folder


class Workers:
    """Does the same to many things: in this process, or in `count` processes that share the GPUs evenly."""

    def __init__(self, count: int) -> None:
        self.pool: ProcessPoolExecutor | None = None
        if count > 1:
            context = get_context("spawn")
            places: Queue[str] = context.Queue()
            for number in range(count):
                places.put(_gpus()[number % len(_gpus())])
            self.pool = ProcessPoolExecutor(count, context, _settle, (places, max(1, (os.cpu_count() or 1) // count)))

    def map(self, function: Callable[..., Any], items: Iterable[Any]) -> list[Any]:
        """`function` of each item, in order.

        What fails beside others is done again by itself when they are done, as the memory of a GPU may not have
        sufficed for all at once. The first error that comes again is raised.
        """
        if not self.pool:
            return [function(item) for item in items]
        begun = [(item, self.pool.submit(function, item)) for item in items]
        wait([future for _, future in begun])
        return [
            future.result() if future.exception() is None else self.pool.submit(function, item).result()
            for item, future in begun
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES can say for one process."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named is not None else [str(n) for n in range(torch.cuda.device_count())] or [""]


def _settle(places: "Queue[str]", threads: int) -> None:
    """Take a GPU, before CUDA starts, and a share of the cores."""
    os.environ["CUDA_VISIBLE_DEVICES"] = places.get()
    torch.set_num_threads(threads)
