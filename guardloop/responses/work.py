"""Where unfinished work is kept, so that a stage that was killed and is tried again goes on where it was.

$GUARDLOOP_WORK says where: a folder, or an s3:// prefix for pods, which lose their disk. A stage that is tried again
finds the same inputs and settings, and so the same key; the place of its outputs may be another one.
"""

import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from guardloop import __version__
from guardloop.core.errors import GuardLoopError
from guardloop.core.places import cache_folder
from guardloop.responses.settings import ResponderSettings

log = logging.getLogger("guardloop")
PLACE = "GUARDLOOP_WORK"
KEY = re.compile(r"[0-9a-f]{32}")
KEEP_DAYS = 7.0
LOCK_SECONDS = 10.0  # a process that was killed a moment ago may not be gone yet
MOST_UNSENT = 2  # files on their way to the store; more make the engine wait
NEUTRAL = {"api_key_env", "extra_headers", "concurrency", "timeout_seconds"}
"""Settings that do not change a response: with other values, the same work goes on."""


def key_of(table: str | Path, settings: ResponderSettings, seed: int) -> str:
    """The name of the work of answering `table` with one responder: a hash of all that decides its result."""
    digest = blake2b(digest_size=16)
    with Path(table).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    plain = settings.model_dump(mode="json", exclude=NEUTRAL)
    digest.update(json.dumps([__version__, plain, seed, _weights(settings.model)], sort_keys=True).encode())
    return digest.hexdigest()


class Work:
    """The folder of one piece of work, as a context that one process of this machine can be in at a time."""

    def __init__(self, key: str) -> None:
        place = os.environ.get(PLACE, "")
        self._stack = ExitStack()
        self._store = f"{place.rstrip('/')}/{key}" if place.startswith("s3://") else ""
        self._root = Path(place).expanduser() if place and not self._store else cache_folder() / "responses"
        self._key = key
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="work")
        self._sending: deque[Future[None]] = deque()
        self._unsent: list[Path] = []
        self.folder = self._root / key

    def __enter__(self) -> Self:
        """Raises GuardLoopError where the folder or the store cannot be used, or another process is at it."""
        if self._store:
            from guardloop.core.storage import exists, fetch  # noqa: PLC0415  (boto3, which work on this disk does not need)

            parent = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="guardloop-")))
            self.folder = parent / self._key
            if exists(self._store):
                fetch(self._store, parent)
            self.folder.mkdir(exist_ok=True)
            return self
        try:
            _forget_old(self._root)
            self.folder.mkdir(parents=True, exist_ok=True)
            os.utime(self.folder)
            self._stack.enter_context(FileLock(self.folder / "lock").acquire(timeout=LOCK_SECONDS))
        except Timeout:
            raise GuardLoopError(
                f"another process is generating these responses, in {self.folder}",
                "wait until it has ended, or stop it",
            ) from None
        except OSError as error:
            raise GuardLoopError(
                f"cannot write {self.folder}: {error.strerror or error}", f"set {PLACE} to another folder"
            ) from error
        return self

    def keep(self, file: Path) -> None:
        """Copy a finished file of the folder to the store, if there is one; waits only if the store is far behind."""
        if self._store:
            self._sending.append(self._sender.submit(self._send, file))
            while len(self._sending) > MOST_UNSENT:
                self._sending.popleft().result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sender.shutdown()  # once all is sent
        self._stack.close()

    def _send(self, file: Path) -> None:
        """Send `file`, and what could not be sent before. A store that is away is no reason to stop."""
        from guardloop.core.storage import put  # noqa: PLC0415

        self._unsent.append(file)
        try:
            while self._unsent:
                put(self._unsent[0], f"{self._store}/{self._unsent[0].name}")
                self._unsent.pop(0)
        except GuardLoopError as error:
            log.warning("%d parts are not in the store yet, and lost if this stops: %s", len(self._unsent), error.what)


def _forget_old(root: Path) -> None:
    """Delete work that nobody has gone on with for KEEP_DAYS: it holds prompts and responses.

    Only folders named by a key are work: the place may be a folder that holds other things, too.
    """
    for folder in root.glob("*/"):
        if KEY.fullmatch(folder.name) and _is_old(folder):
            with suppress(Timeout), FileLock(folder / "lock").acquire(timeout=0):  # the clock may have jumped
                shutil.rmtree(folder, ignore_errors=True)


def _is_old(folder: Path) -> bool:
    try:
        return time.time() - folder.stat().st_mtime > KEEP_DAYS * 86400
    except FileNotFoundError:  # another process was faster
        return False


def _weights(model: str) -> list[tuple[str, int, int]]:
    """What tells a model in a local folder from another one that took its place there."""
    files = sorted(Path(model).expanduser().glob("*.safetensors")) if Path(model).expanduser().is_dir() else []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
