"""The one way in for data: rows of a sample, a hub dataset or a file become conversations."""

import csv
import gzip
import hashlib
import io
import json
import random
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq

from guardloop.core.errors import GuardLoopError, first_line
from guardloop.core.records import DAMAGED, Row
from guardloop.data.settings import SourceSettings
from guardloop.demo import SAMPLE

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
SUFFIXES = (".jsonl", ".csv", ".parquet")
Numbered = Iterator[tuple[int, Row]]


def read_conversations(source: SourceSettings, seed: int = 0, where: str = "dataset") -> Iterator[Row]:
    """Rows of `source` as conversations (core.records.CONVERSATION, without groups), sampled down to its limit.

    Raises GuardLoopError, naming `where` and the row, for a missing file or column, or a malformed row.
    """
    rows = (_conversation(row, number, source, where) for number, row in _table(source, where))
    kept = (row for row in rows if row is not None)
    if source.limit is None:
        return kept
    return iter(_reservoir(kept, source.limit, seed))


def local_path(text: str, where: str) -> Path:
    """`text` as a path, with `~` spelt out."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise GuardLoopError(f"{where}: {text} names no user's home folder", "write the whole path") from None


def _table(source: SourceSettings, where: str) -> Numbered:
    """The rows with their place: the line in a text file, else the position in the table."""
    if source.kind == "sample":
        yield from _file(SAMPLE / f"{source.path}.jsonl", where)
    elif source.kind == "hub":
        yield from enumerate(_hub(source, where), start=1)
    elif source.path.startswith("s3://"):
        from guardloop.core.storage import fetch  # noqa: PLC0415  (boto3 is slow to import and rarely needed)

        with TemporaryDirectory() as folder:
            yield from _file(fetch(source.path, Path(folder)), where)
    else:
        yield from _file(local_path(source.path, where), where)


def _hub(source: SourceSettings, where: str) -> Iterator[Row]:
    from datasets import load_dataset  # noqa: PLC0415  (slow to import; files do not need it)
    from httpx2 import HTTPError  # noqa: PLC0415  (what the hub's client raises where it has no answer)

    try:
        yield from load_dataset(
            source.path, source.config, split=source.split, revision=source.revision, streaming=True
        )
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        if "gated" in str(error).lower():
            raise GuardLoopError(
                f"{where}: access to the gated dataset {source.path} was refused",
                f"accept its terms at huggingface.co/datasets/{source.path}, then set HF_TOKEN",
            ) from error
        raise GuardLoopError(
            f"{where}: cannot read {source.path} from the hub: {first_line(error)}",
            "check the id, configuration, split and network; a local file works too (kind: file)",
        ) from error


def _file(path: Path, where: str) -> Numbered:
    if not path.is_file():
        raise GuardLoopError(
            f"{where}: no such file: {path}", "check the path; paths are relative to where you started"
        )
    names = path.suffixes
    packed = bool(names) and names[-1] == ".gz"
    kind = (names[:-1] if packed else names)[-1:] or [""]
    try:
        if kind[0] == ".parquet" and not packed:
            yield from enumerate(_parquet(path), start=1)
        elif kind[0] in (".jsonl", ".csv"):
            with gzip.open(path, "rb") if packed else path.open("rb") as raw:
                text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
                lines = _utf8_lines(text, path)
                yield from _json_lines(lines, path) if kind[0] == ".jsonl" else _csv(lines, path)
        else:
            raise GuardLoopError(f"{where}: {path} is not a kind of file that is read", f"use {', '.join(SUFFIXES)}")
    except (*DAMAGED, EOFError, zlib.error) as error:
        raise GuardLoopError(f"{where}: {path} cannot be read: {error}", "check that the file is whole") from None


def _parquet(path: Path) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


def _utf8_lines(text: io.TextIOWrapper, path: Path) -> Iterator[str]:
    for number, line in enumerate(text, start=1):
        try:
            line.encode("utf-8")
        except UnicodeEncodeError:
            raise GuardLoopError(f"{path}, row {number}: not UTF-8 text", "convert the file to UTF-8") from None
        yield line


def _json_lines(lines: Iterator[str], path: Path) -> Numbered:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise GuardLoopError(f"{path}, row {number}: not JSON: {error}", "write one JSON object a line") from None
        if not isinstance(row, dict):
            raise GuardLoopError(f"{path}, row {number}: not a JSON object", "write one JSON object a line")
        yield number, row


def _csv(lines: Iterator[str], path: Path) -> Numbered:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(lines, strict=True)  # else an open quote swallows the rest of the file
    try:
        for row in reader:
            if None in row or None in row.values():
                raise GuardLoopError(
                    f"{path}, row {reader.line_num}: the number of fields is not that of the header",
                    "quote fields that hold commas",
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise GuardLoopError(f"{path}, row {reader.line_num + 1}: {error}", "check the quoting") from None


def _conversation(row: Row, number: int, source: SourceSettings, where: str) -> Row | None:
    """The row in our columns; None where `source.where` leaves it out."""
    place = f"{where}: {source.path}, row {number}"
    for column, wanted in source.where.items():
        if column not in row:
            raise _no_column(place, column, row)
        value, negated = (wanted["not"], True) if isinstance(wanted, dict) else (wanted, False)
        if (str(row[column]).lower() == value.lower()) == negated:
            return None
    values: dict[str, Any] = {}
    for ours in ("prompt", "response", "label", "id", "category", "source", "language", "jailbreak"):
        theirs = source.columns.get(ours, ours)
        if isinstance(theirs, list):
            values[ours] = _any_label(row, theirs, source.unsafe_labels, place)
            continue
        if theirs not in row and (ours == "prompt" or ours in source.columns):
            raise _no_column(place, theirs, row)
        values[ours] = row.get(theirs)
    for ours in ("prompt", "response"):
        if not isinstance(values[ours], str) and not (ours == "response" and values[ours] is None):
            raise GuardLoopError(
                f"{place}: {source.columns.get(ours, ours)} is {type(values[ours]).__name__}, not text", "mend the row"
            )
    given = {ours: value for ours, value in values.items() if str(value).strip() and value is not None}
    texts = {ours: (_text(given[ours]) or None) if ours in given else None for ours in values}
    return {
        **{ours: text for ours, text in texts.items() if ours != "label"},
        "id": texts["id"] or _text_id(values["prompt"], texts["response"]),
        "prompt": _text(values["prompt"]),
        "source": texts["source"] or Path(source.path).name,
        "jailbreak": _truth(given["jailbreak"]) if "jailbreak" in given else None,
        "unsafe": _truth(given["label"], source.unsafe_labels) if "label" in given else None,
    }


def _any_label(row: Row, columns: list[str], unsafe_labels: list[str], place: str) -> str | None:
    """The first unsafe value of the label columns, else a safe one; None where all are empty."""
    for column in columns:
        if column not in row:
            raise _no_column(place, column, row)
    values = [str(row[column]) for column in columns if row[column] is not None and str(row[column]).strip()]
    unsafe = (value for value in values if _truth(value, unsafe_labels))
    return next(unsafe, values[0] if values else None)


def _no_column(place: str, column: str, row: Row) -> GuardLoopError:
    return GuardLoopError(
        f"{place}: no column {column!r}; the row has {', '.join(map(str, row))}",
        "map it with `columns: {prompt: <name in the table>}`",
    )


def _text(value: Any) -> str:
    """`value` as text that can be written and shown: no halves of surrogate pairs, nothing that steers a terminal."""
    return CONTROL.sub("", str(value)).encode("utf-8", "replace").decode("utf-8")


def _truth(value: Any, words: list[str] | None = None) -> bool:
    words = words or ["1", "true", "yes"]
    return _word(value) in map(_word, words)


def _word(value: Any) -> str:
    """`value` as labels are compared: 1, 1.0 and "1" are one."""
    return str(value).strip().lower().removesuffix(".0")


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
