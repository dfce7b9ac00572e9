"""The one way in for data: rows of a sample, a hub dataset or files become conversations."""

import hashlib
import logging
import random
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from guardloop.core.errors import GuardLoopError
from guardloop.core.records import DAMAGED, Row
from guardloop.data.columns import Column, Mapping, mapping_of
from guardloop.data.files import DataFile, list_files
from guardloop.data.hub import hub_rows
from guardloop.data.labels import LabelCounts, as_word
from guardloop.data.settings import SourceSettings
from guardloop.data.tables import parquet_columns, read_rows
from guardloop.demo import SAMPLE

log = logging.getLogger("guardloop")

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
TRUE = frozenset({"1", "true", "yes"})
Placed = Iterator[tuple[str, Row]]
"""Rows with their places, as messages name them."""


def read_conversations(
    source: SourceSettings,
    seed: int = 0,
    where: str = "dataset",
    labels: LabelCounts | None = None,
    *,
    with_response: bool = True,
) -> Iterator[Row]:
    """Rows of `source` as conversations (core.records.CONVERSATION, without groups), sampled down to its limit.

    labels: counts the values of the label column; what has no label, or an unknown one, has `unsafe` None.
    with_response: whether responses are read; else they are None, whatever the table holds.

    Raises GuardLoopError, naming `where` and the row, for a missing file or column, or a malformed row.
    """
    mapping, counts = mapping_of(source), labels or LabelCounts()
    rows = (
        _conversation(row, place, source, mapping, counts, with_response)
        for place, row in _table(source, mapping, where)
        if _is_wanted(row, source, mapping, place)
    )
    return rows if source.limit is None else iter(_reservoir(rows, source.limit, seed))


def _table(source: SourceSettings, mapping: Mapping, where: str) -> Placed:
    if source.kind == "hub":
        for number, row in enumerate(hub_rows(source, where), start=1):
            yield f"{where}: {source.path}, row {number}", row
        return
    path = str(SAMPLE / f"{source.path}.jsonl") if source.kind == "sample" else source.path
    files = list_files(path, where)
    with ExitStack() as stack:
        paths = _fetched(files, stack)
        schemas = [_schema(file, local, where) for file, local in zip(files, paths, strict=True)]
        every = list(dict.fromkeys(name for schema in schemas for name in schema))
        if every:
            mapping.check(every, f"{where}: {source.path}")
        for file, local, schema in zip(files, paths, schemas, strict=True):
            lacking = [name for name in every if name in mapping.names and name not in schema]
            if lacking:  # a part that was written before the column was there
                log.warning("%s: %s has no column %s: taken as missing", where, file.uri, ", ".join(lacking))
            given = {**dict.fromkeys(lacking), **file.partitions}
            name = source.path if len(files) == 1 else file.uri
            for number, row in read_rows(local, file, where, mapping.names, source.delimiter):
                yield f"{where}: {name}, row {number}", {**given, **row}


def _fetched(files: list[DataFile], stack: ExitStack) -> list[Path]:
    """Where the files lie on this machine."""
    if not files[0].is_remote:
        return [Path(file.uri) for file in files]
    from guardloop.core.storage import fetch  # noqa: PLC0415  (boto3 is slow to import and rarely needed)

    folder = stack.enter_context(TemporaryDirectory())
    return [fetch(file.uri, Path(folder, str(number))) for number, file in enumerate(files)]


def _schema(file: DataFile, path: Path, where: str) -> list[str]:
    """The columns of a Parquet file; of others they are not known before they are read."""
    if file.kind != "parquet":
        return []
    try:
        return [*parquet_columns(path), *file.partitions]
    except DAMAGED as error:
        raise GuardLoopError(f"{where}: {file.uri} cannot be read: {error}", "check that the file is whole") from None


def _is_wanted(row: Row, source: SourceSettings, mapping: Mapping, place: str) -> bool:
    """Whether `source.where` keeps the row."""
    for name, wanted in source.where.items():
        value, negated = (wanted["not"], True) if isinstance(wanted, dict) else (wanted, False)
        if (str(mapping.where[name].value(row, place)).lower() == value.lower()) == negated:
            return False
    return True


def _conversation(
    row: Row, place: str, source: SourceSettings, mapping: Mapping, labels: LabelCounts, with_response: bool
) -> Row:
    """The row in our columns."""
    values: dict[str, Any] = {
        ours: _value(row, ours, mapping, place)
        for ours in ("prompt", "response", "id", "category", "source", "language", "jailbreak")
        if with_response or ours != "response"
    }
    for ours in ("prompt", "response"):
        value = values.setdefault(ours, None)
        if not isinstance(value, str) and not (ours == "response" and value is None):
            name = mapping.mapped.get(ours, [Column(ours)])[0].name
            raise GuardLoopError(
                f"{place}: {name} is {type(value).__name__}, not text", "mend the row, or map another column"
            )
    texts = {ours: _text(value) or None if _is_given(value) else None for ours, value in values.items()}
    return {
        **texts,
        "id": texts["id"] or _text_id(values["prompt"], texts["response"]),
        "prompt": _text(values["prompt"]),
        "source": texts["source"] or Path(source.path).name,
        "jailbreak": as_word(values["jailbreak"]) in TRUE if _is_given(values["jailbreak"]) else None,
        "unsafe": _label(row, source, mapping, labels, place),
    }


def _value(row: Row, ours: str, mapping: Mapping, place: str) -> Any:
    columns = mapping.mapped.get(ours)
    return columns[0].value(row, place) if columns else row.get(ours)


def _label(row: Row, source: SourceSettings, mapping: Mapping, labels: LabelCounts, place: str) -> bool | None:
    columns = mapping.mapped.get("label")
    values = [column.value(row, place) for column in columns] if columns else [row.get("label")]
    return labels.read_any(values, source, place.rpartition(", ")[2])


def _is_given(value: Any) -> bool:
    return value is not None and bool(str(value).strip())


def _text(value: Any) -> str:
    """`value` as text that can be written and shown: no halves of surrogate pairs, nothing that steers a terminal."""
    return CONTROL.sub("", str(value)).encode("utf-8", "replace").decode("utf-8")


def _text_id(prompt: str, response: str | None) -> str:
    text = prompt if response is None else f"{prompt}\0{response}"
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _reservoir(rows: Iterator[Row], size: int, seed: int) -> list[Row]:
    """A uniform sample of at most `size` rows in their own order (Vitter's algorithm R)."""
    draw = random.Random(seed)
    kept: list[tuple[int, Row]] = []
    for index, row in enumerate(rows):
        if index < size:
            kept.append((index, row))
        elif (place := draw.randint(0, index)) < size:
            kept[place] = (index, row)
    return [row for _, row in sorted(kept, key=lambda pair: pair[0])]
