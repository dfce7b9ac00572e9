"""Who may ask, and how often."""

import hmac
import time
from pathlib import Path

from guardloop.core.errors import GuardLoopError

MIN_KEY = 16


class Keys:
    """The API keys of a file, a line each: `NAME KEY`. A changed file is read again, so keys can be rotated."""

    def __init__(self, path: str) -> None:
        """Raises GuardLoopError for a file without a key, or with a short one."""
        self._path = Path(path).expanduser()
        self._changed = 0.0
        self._keys: dict[str, bytes] = {}
        self._read()

    def owner(self, key: str) -> str | None:
        """The name that `key` belongs to, or None. Every key is compared, in the same time whatever is in it."""
        self._read_again()
        given, found = key.encode(), None
        for name, known in self._keys.items():
            if hmac.compare_digest(given, known):
                found = name
        return found

    def _read_again(self) -> None:
        try:
            if self._path.stat().st_mtime != self._changed:
                self._read()
        except (OSError, GuardLoopError):  # it is being written: the keys of before hold
            return

    def _read(self) -> None:
        try:
            changed = self._path.stat().st_mtime
            lines = self._path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise GuardLoopError(f"cannot read the keys in {self._path}: {error}", "give a text file") from None
        keys = {}
        for number, line in enumerate(lines, start=1):
            if not (words := line.split()) or line.startswith("#"):
                continue
            if len(words) != 2 or len(words[1]) < MIN_KEY:
                raise GuardLoopError(
                    f"{self._path}, line {number}: not `NAME KEY`", f"keys have at least {MIN_KEY} characters"
                )
            keys[words[0]] = words[1].encode()
        if not keys:
            raise GuardLoopError(f"{self._path} has no key", "write a line `NAME KEY`")
        self._keys, self._changed = keys, changed


class Limit:
    """At most `per_minute` requests for each name: a bucket that refills steadily."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._left: dict[str, tuple[float, float]] = {}

    def wait(self, name: str) -> float:
        """Takes one request of `name`. 0 where it may be made, else the seconds until it may."""
        now = time.monotonic()
        left, last = self._left.get(name, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - last) * self._per_minute / 60)
        if left < 1:
            self._left[name] = left, now
            return (1 - left) * 60 / self._per_minute
        self._left[name] = left - 1, now
        return 0.0
