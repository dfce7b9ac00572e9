"""Rows of one file, as it is: JSON lines, a JSON array, CSV or Parquet."""

import bz2
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from guardloop.core.errors import GuardLoopError
from guardloop.core.records import DAMAGED, Row
from guardloop.data.files import DataFile

BATCH = 1024  # rows of a Parquet file in memory
DELIMITERS = ",;\t|"
PEEK = 4096  # bytes
UTF16 = (b"\xff\xfe", b"\xfe\xff")
MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet"}
Numbered = Iterator[tuple[int, Row]]


def parquet_columns(path: Path) -> list[str]:
    """The names of a Parquet file's columns."""
    return list(pq.read_schema(path).names)


def read_rows(
    path: Path, file: DataFile, where: str, wanted: Collection[str] = (), delimiter: str | None = None
) -> Numbered:
    """The rows with their place: the line in a text file, else the position in the table.

    path: where `file` lies on this machine.
    wanted: the columns that are needed; a Parquet file's others are not read.
    delimiter: of a CSV file; by default it is found from the header.

    Raises GuardLoopError, naming `where` and the row, where the file is damaged or a row malformed.
    """
    try:
        if file.kind == "parquet":
            yield from enumerate(_parquet(path, wanted), start=1)
            return
        with _opened(path, file.packing) as raw:
            lines = _utf8_lines(raw, path)
            yield from _json(lines, path) if file.kind == "json" else _csv(lines, path, wanted, delimiter)
    except (*DAMAGED, EOFError, zlib.error) as error:
        raise GuardLoopError(f"{where}: {path} cannot be read: {error}", "check that the file is whole") from None


def _parquet(path: Path, wanted: Collection[str]) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        names = [name for name in file.schema_arrow.names if name in wanted] if wanted else None
        binary = [field.name for field in file.schema_arrow if field.type in (pa.binary(), pa.large_binary())]
        for batch in file.iter_batches(batch_size=BATCH, columns=names):
            for row in batch.to_pylist():
                for name in binary:  # some programs write text without saying that it is text
                    if row.get(name) is not None:
                        row[name] = row[name].decode("utf-8", "replace")
                yield row


@contextmanager
def _opened(path: Path, packing: str | None) -> Iterator[Any]:
    """The unpacked bytes of a file, as a binary stream."""
    match packing:
        case "gzip":
            with gzip.open(path, "rb") as raw:
                yield raw
        case "bz2":
            with bz2.open(path, "rb") as raw:
                yield raw
        case "zstd":
            with pa.OSFile(str(path)) as packed, pa.CompressedInputStream(packed, "zstd") as stream:
                yield stream
        case _:
            with path.open("rb") as raw:
                yield raw


def _utf8_lines(raw: IO[bytes], path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text, which may begin with a byte order mark."""
    head = raw.read(PEEK)
    for magic, suffix in MAGIC.items():
        if head.startswith(magic):
            raise GuardLoopError(f"{path} is no text", f"its content is that of a {suffix} file: name it so")
    if head[:2] in UTF16 or 4 * max(head[::2].count(0), head[1::2].count(0)) > len(head):
        raise GuardLoopError(
            f"{path} is UTF-16 text, not UTF-8", "convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW, or export it as UTF-8"
        )
    text = io.TextIOWrapper(
        io.BufferedReader(_Rejoined(head, raw)), encoding="utf-8-sig", errors="surrogateescape", newline=""
    )
    for number, line in enumerate(text, start=1):
        try:
            line.encode("utf-8")
        except UnicodeEncodeError:
            raise GuardLoopError(f"{path}, row {number}: not UTF-8 text", "convert the file to UTF-8") from None
        yield line


class _Rejoined(io.RawIOBase):
    """A stream of which the first bytes were read already."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self.head, self.rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.head:
            self.head = self.rest.read(len(buffer))
        chunk, self.head = self.head[: len(buffer)], self.head[len(buffer) :]
        buffer[: len(chunk)] = chunk
        return len(chunk)


def _json(lines: Iterator[str], path: Path) -> Numbered:
    """One object a line, or one array of objects."""
    begun = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if not begun and line.lstrip().startswith("["):
            array = _parsed(line + "".join(lines), path, number)
            for position, row in enumerate(array, start=1):
                yield position, _object(row, path, position)
            return
        begun = True
        yield number, _object(_parsed(line, path, number), path, number)


def _parsed(text: str, path: Path, number: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GuardLoopError(
            f"{path}, row {number}: not JSON: {error}", "write one JSON object a line, or one array of objects"
        ) from None


def _object(row: Any, path: Path, number: int) -> Row:
    if not isinstance(row, dict):
        raise GuardLoopError(
            f"{path}, row {number}: not a JSON object", "write one JSON object a line, or one array of objects"
        )
    return row


def _csv(lines: Iterator[str], path: Path, wanted: Collection[str], delimiter: str | None) -> Numbered:
    header = next(lines, None)
    if header is None:
        return
    csv.field_size_limit(sys.maxsize)
    if header.lower().startswith("sep=") and len(header.strip()) == len("sep=;"):  # as Excel writes it
        delimiter, header = header.strip()[-1], next(lines, "")
    delimiter = delimiter or _delimiter(header, wanted)
    # strict, else an open quote swallows the rest of the file
    reader = csv.reader(chain([header], lines), delimiter=delimiter, strict=True)
    last = 1  # the line of the last whole row: an open quote swallows those that follow
    try:
        names = [name.strip() for name in next(reader)]
        if repeated := {name for name in names if names.count(name) > 1} & set(wanted):
            raise GuardLoopError(
                f"{path}: the header names {', '.join(sorted(repeated))} twice", "give each column a name of its own"
            )
        for fields in filter(None, reader):
            if len(fields) < len(names) or any(fields[len(names) :]):  # a line may end with a delimiter
                raise GuardLoopError(
                    f"{path}, row {reader.line_num}: {len(fields)} fields, and the header has {len(names)}",
                    f"quote fields that hold {delimiter!r}, or give the source's `delimiter`",
                )
            last = reader.line_num
            yield last, dict(zip(names, fields, strict=False))
    except csv.Error as error:
        raise GuardLoopError(f"{path}, row {last + 1}: {error}", "check the quoting") from None


def _delimiter(header: str, wanted: Collection[str]) -> str:
    """Of the usual delimiters, the one that finds most of the wanted columns in the header, then most at all."""

    def fit(delimiter: str) -> tuple[int, int]:
        names = next(csv.reader([header], delimiter=delimiter), [])
        return len(set(names) & set(wanted)), len(names)

    return max(DELIMITERS, key=fit)
