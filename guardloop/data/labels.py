"""What the values of a label column mean. A missing label is not safe, and neither is a value that nobody named."""

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from guardloop.core.errors import GuardLoopError
from guardloop.data.settings import SourceSettings

MISSING = frozenset({"", "null", "none", "nan", "nat", "n/a", "na", "<na>", "nil", "undefined"})
MAX_VALUES = 50  # that are counted by themselves: a column of texts is no label column
SHOWN = 5
OTHERS = "(other values)"


@dataclass
class LabelCounts:
    """Every value of a label column that was met, and what became of it."""

    unsafe: Counter[str] = field(default_factory=Counter)
    safe: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    """In no list."""
    missing_rows: list[str] = field(default_factory=list)
    """The first ones."""

    def read(self, value: Any, source: SourceSettings, row: str) -> bool | None:
        """Whether `value` means unsafe; None where it is missing or in no list. `row` names its place."""
        word = as_word(value)
        shown = _shown(value)
        if word in _words(*source.unsafe_labels):
            self._count(self.unsafe, shown)
            return True
        if word in _words(*source.safe_labels):
            self._count(self.safe, shown)
            return False
        if word in MISSING:
            self._count(self.missing, shown or "(empty)")
            if len(self.missing_rows) < SHOWN:
                self.missing_rows.append(row)
        else:
            self._count(self.unknown, shown)
        return None

    def read_any(self, values: Sequence[Any], source: SourceSettings, row: str) -> bool | None:
        """The same of several columns: unsafe if any is, else safe if any is; an unknown value is neither."""
        unsafe, safe = _words(*source.unsafe_labels), _words(*source.safe_labels)

        def rank(value: Any) -> int:
            word = as_word(value)
            return 0 if word in unsafe else 2 if word in safe else 3 if word in MISSING else 1

        return self.read(min(values, key=rank), source, row)

    def check(self, source: SourceSettings, where: str) -> None:
        """Raises GuardLoopError for values in no list, and for missing ones if `unlabelled` is refuse."""
        if self.unknown:
            values = ", ".join(f"{value!r} ({count:,})" for value, count in self.unknown.most_common(SHOWN))
            raise GuardLoopError(
                f"{where}: {self.unknown.total():,} labels are neither safe nor unsafe: {values}",
                "name each in the source's unsafe_labels or safe_labels, or leave such rows out with `where`",
            )
        if self.missing and source.unlabelled == "refuse":
            rows = ", ".join(self.missing_rows)
            raise GuardLoopError(
                f"{where}: {self.missing.total():,} rows have no label; the first: {rows}",
                "map their column (`columns: {label: NAME}`), label them, or have them dropped: `unlabelled: drop`",
            )

    def plain(self) -> dict[str, dict[str, int]]:
        """What each value became, with its count; for the data's summary."""
        parts = {"unsafe": self.unsafe, "safe": self.safe, "missing": self.missing, "unknown": self.unknown}
        return {name: dict(counts) for name, counts in parts.items() if counts}

    def sentence(self) -> str:
        """The same in words: `unsafe: '1' (30), 'yes' (2); safe: '0' (70); missing: '(empty)' (3)`."""
        if not (self.unsafe or self.safe or self.unknown):
            return "none"
        parts = []
        for name, counts in self.plain().items():
            values = ", ".join(f"{value!r} ({count:,})" for value, count in list(counts.items())[:SHOWN])
            more = f" and {len(counts) - SHOWN} more values" if len(counts) > SHOWN else ""
            parts.append(f"{name}: {values}{more}")
        return "; ".join(parts)

    def _count(self, counts: Counter[str], value: str) -> None:
        counts[value if value in counts or len(counts) < MAX_VALUES else OTHERS] += 1


@cache
def _words(*labels: str) -> frozenset[str]:
    return frozenset(map(as_word, labels))


def as_word(value: Any) -> str:
    """`value` as labels are compared: 1, 1.0 and "1" are one, whatever the case, spaces and invisible marks."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list | tuple | dict) and not value:
        return ""
    text = "".join(c for c in unicodedata.normalize("NFKC", str(value)) if unicodedata.category(c) not in ("Cf", "Cc"))
    return text.strip().lower().removesuffix(".0")


def _shown(value: Any) -> str:
    """The value as people read it: one short visible line."""
    text = "" if value is None else str(value)
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text[:40])
