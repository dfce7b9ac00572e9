"""A source's columns: which of a table's columns are needed, and how a row's values are found in them."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import jmespath
from jmespath.exceptions import JMESPathError

from guardloop.core.errors import GuardLoopError
from guardloop.core.records import Row
from guardloop.data.settings import COLUMNS, SourceSettings

MARKS = ".[|@(&*"  # of an expression; a name without them is a column's


@dataclass(frozen=True)
class Column:
    """A table's column, or a JMESPath expression that leads into one."""

    name: str
    expression: Any = None
    root: str = ""
    """The column that the expression leads into."""

    def value(self, row: Row, place: str) -> Any:
        """The row's value. Raises GuardLoopError, naming `place`, where the row has no such column."""
        if self.name in row:  # a name that is a column is taken as it is
            return row[self.name]
        if self.expression is not None and self.root in row:
            return self.expression.search(row)
        raise self.missing(row, place)

    def missing(self, names: Iterable[str], place: str) -> GuardLoopError:
        """The error of a table that has other columns."""
        return GuardLoopError(
            f"{place}: no column {self.name!r}; there are {', '.join(map(str, names))}",
            "map it with `columns: {prompt: <name in the table>}`",
        )


@dataclass(frozen=True)
class Mapping:
    """The columns that a source needs."""

    mapped: dict[str, list[Column]] = field(default_factory=dict)
    """Those that it must have, by our name."""
    where: dict[str, Column] = field(default_factory=dict)

    @property
    def needed(self) -> list[Column]:
        """All that a table must have."""
        return [column for columns in self.mapped.values() for column in columns] + list(self.where.values())

    @property
    def names(self) -> set[str]:
        """All names that are read of a table, with ours for columns that are not mapped."""
        names = {name for column in self.needed for name in (column.name, column.root) if name}
        return names | {ours for ours in COLUMNS if ours not in self.mapped}

    def check(self, names: Collection[str], place: str) -> None:
        """Raises GuardLoopError if a table with these columns lacks one."""
        for column in self.needed:
            if not {column.name, column.root} & set(names):
                raise column.missing(names, place)


def mapping_of(source: SourceSettings) -> Mapping:
    """The columns of a source; the prompt is always among those that it must have."""
    mapped = {ours: [theirs] if isinstance(theirs, str) else theirs for ours, theirs in source.columns.items()}
    mapped.setdefault("prompt", ["prompt"])
    return Mapping(
        {ours: [_column(name) for name in names] for ours, names in mapped.items()},
        {name: _column(name) for name in source.where},
    )


def _column(name: str) -> Column:
    if not any(mark in name for mark in MARKS):
        return Column(name)
    try:
        expression = jmespath.compile(name)
    except JMESPathError:
        return Column(name)
    return Column(name, expression, _root(expression.parsed))


def _root(node: dict[str, Any]) -> str:
    """The first field of an expression; "" where there is none."""
    if node["type"] == "field":
        return str(node["value"])
    return next(filter(None, map(_root, node["children"])), "")
