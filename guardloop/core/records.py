"""The data contracts: every table that one stage writes and another reads, and the one way in and out.

Bulk travels as Parquet, written in row groups so that memory does not grow with the number of rows.
A table is its own explanation: the screen stage adds the verdict's columns to the conversation it judged.
Each carries a checksum, which every read verifies, in a gap that other readers of Parquet skip:

    PAR1 | row groups | "guardloop.sha256" | digest[32] | footer | length of the footer[4] | PAR1

The digest is the SHA-256 of all bytes but itself and the magic before it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from guardloop.core.errors import GuardLoopError

Row = dict[str, Any]
M = TypeVar("M", bound=BaseModel)
ROW_GROUP = 1024
VERSION = "2"
"""Of the tables' columns: raised when one is renamed, removed or read in another way."""
METADATA = "guardloop"
VERSION_KEY, OLD_KEY = "guardloop.version", "guardloop.sealed"  # the latter instead in tables of version 1
CHECKSUM_MAGIC = b"guardloop.sha256"
CHECKSUM_BYTES = len(CHECKSUM_MAGIC) + hashlib.sha256().digest_size
TAIL_BYTES = 8  # the footer's length, and PAR1
DAMAGED = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError)
"""What pyarrow raises for a file that is cut off or changed."""

CONVERSATION = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("response", pa.string()),  # null: the prompt is judged; else the response
        pa.field("unsafe", pa.bool_()),  # human label of the last message; null where unknown
        pa.field("category", pa.string()),
        pa.field("source", pa.string(), nullable=False),
        pa.field("language", pa.string()),
        pa.field("jailbreak", pa.bool_()),
        pa.field("group", pa.string(), nullable=False),  # near-duplicates share a group
    ]
)
"""A prompt, with a response where it is the response that is judged."""

VERDICT_FIELDS = [
    pa.field("score", pa.float32()),  # logit(unsafe) - logit(safe); null where the row could not be judged
    pa.field("label_mass", pa.float32()),  # P(safe) + P(unsafe)
    pa.field("flagged", pa.bool_(), nullable=False),  # score above the guard's threshold, or none
    pa.field("truncated", pa.bool_(), nullable=False),
    pa.field("error", pa.string()),
    pa.field("probability", pa.float32()),  # P(unsafe) of the two labels, after the guard's temperature
    pa.field("categories", pa.string()),  # codes of a flagged message, with commas, where they were asked for
]
SCREENED = pa.schema([*CONVERSATION, *VERDICT_FIELDS])
"""A conversation with the guard's verdict."""

SAID = ("stop", "length")
"""How a response that says something to a user ends; the others have an empty text."""
WITHHELD = ("filtered", "prompt_filtered")
"""A provider's filter took the response back, or refused the prompt."""
RESPONSE = pa.schema(
    [
        *CONVERSATION,
        pa.field("prompt_score", pa.float32(), nullable=False),  # the baseline's score on the prompt alone
        pa.field("sample", pa.int32(), nullable=False),  # 0 .. k-1
        pa.field("responder", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),  # SAID, WITHHELD, thinking, tool_call, empty or error
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("refusal", pa.bool_(), nullable=False),
    ]
)
"""One sampled response to one passed prompt. `unsafe` keeps the prompt's label, for measuring only."""

JUDGED = pa.schema([*RESPONSE, *VERDICT_FIELDS])
"""A response with the frozen judge's verdict on it."""


def judged_schema(table: str | Path | pa.Schema) -> pa.Schema:
    """The columns of a table of conversations, or of a schema, with the verdict's added."""
    if not isinstance(table, pa.Schema):
        with _reading(table):
            table = pq.read_schema(table)
    return pa.schema([*table, *VERDICT_FIELDS])


EXAMPLE = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("response", pa.string()),
        pa.field("target", pa.float32(), nullable=False),  # wanted P(unsafe)
        pa.field("weight", pa.float32(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),  # positive, hard_negative, replay_...
        pa.field("reason", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
    ]
)
"""A training example of the candidate."""

HELD_OUT_PROMPT = pa.schema(
    [
        *CONVERSATION,
        pa.field("prompt_score", pa.float32(), nullable=False),  # the baseline's; it let the prompt pass
        pa.field("responses", pa.int32(), nullable=False),  # that the judge could judge
        pa.field("blocked", pa.int32(), nullable=False),
        pa.field("response_unsafe", pa.bool_()),  # true: enough were blocked; false: none was; null: in between
    ]
)
"""A prompt that was held out of the training set, with what became of it."""

SCORES = pa.schema(
    [
        *CONVERSATION,
        pa.field("baseline_score", pa.float32(), nullable=False),
        pa.field("candidate_score", pa.float32(), nullable=False),
    ]
)
"""A labelled test conversation with both guards' scores."""

BENCHMARKED = pa.schema([pa.field("benchmark", pa.string(), nullable=False), *SCORES])
"""A labelled row of a public benchmark with both guards' scores."""


def write_table(rows: Iterable[Row], schema: pa.Schema, path: str | Path, metadata: Callable[[], Row] = dict) -> int:
    """Stream `rows` into a Parquet file at `path`, all or nothing; missing keys become null. Returns the row count.

    `metadata` is called once all rows are written; what it returns is kept in the file (see `read_metadata`).
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    count = 0
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = pq.ParquetWriter(partial, schema)
    try:
        for chunk in chunks(rows, ROW_GROUP):
            table = pa.Table.from_pylist(chunk, schema=schema)
            with _writing(path):
                writer.write_table(table)
            count += len(chunk)
        stored = {METADATA: json.dumps(metadata()), VERSION_KEY: VERSION}
        with _writing(path):
            writer.add_key_value_metadata(stored)
            writer.close()
            _add_checksum(partial)
            partial.replace(path)
    finally:
        with suppress(OSError):
            writer.close()
        partial.unlink(missing_ok=True)
    return count


def read_table(path: str | Path, schema: pa.Schema | None = None) -> Iterator[Row]:
    """Stream the rows of the Parquet file at `path`; with `schema`, refuse a file that lacks one of its columns."""
    with _reading(path), pq.ParquetFile(path) as file:
        if schema is not None and (missing := set(schema.names) - set(file.schema_arrow.names)):
            raise GuardLoopError(
                f"{path} lacks the columns {', '.join(sorted(missing))}", "give the table that the stage before wrote"
            )
        for batch in file.iter_batches(batch_size=ROW_GROUP):
            yield from batch.to_pylist()


def read_tables(paths: Sequence[str | Path], schema: pa.Schema | None = None) -> Iterator[Row]:
    """The rows of several files, one after another: the shards of one table."""
    for path in paths:
        yield from read_table(path, schema)


def read_metadata(path: str | Path) -> Row:
    """The metadata that the writer of a table gave: where the data came from, which guard judged it."""
    with _reading(path):
        stored = pq.read_metadata(path).metadata or {}
        metadata: Row = json.loads(stored.get(METADATA.encode(), b"{}"))
    return metadata


def count_rows(path: str | Path) -> int:
    """Number of rows in a Parquet file, from its footer."""
    with _reading(path):
        return int(pq.read_metadata(path).num_rows)


def write_jsonl(rows: Iterable[Row], path: str | Path) -> int:
    """Write rows as JSON lines, for people. Returns the row count."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_json(path: str | Path, model: type[M]) -> M:
    """The JSON file at `path` as a `model`. Raises GuardLoopError where it is missing or damaged."""
    try:
        return model.model_validate_json(Path(path).read_bytes())
    except FileNotFoundError:
        raise GuardLoopError(f"no such file: {path}", "run the stage that writes it") from None
    except (OSError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise GuardLoopError(f"{path} cannot be read: {reason}", "run the stage that writes it again") from None


def chunks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Lists of at most `size` rows."""
    chunk: list[Row] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _add_checksum(path: Path) -> None:
    """Put the file's checksum between its rows and its footer, which readers find from the end."""
    with path.open("r+b") as file:
        start = _footer_offset(file)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").digest()
        file.seek(start)
        footer = file.read()
        file.seek(start)
        file.write(CHECKSUM_MAGIC + digest + footer)


def _verify(path: str | Path) -> None:
    """Raises ValueError for a table of ours whose bytes are not those that were written, GuardLoopError for an old one.

    What another program wrote has no checksum, and passes.
    """
    with Path(path).open("rb") as file:
        start = _footer_offset(file) - CHECKSUM_BYTES
        file.seek(max(0, start))
        checksum = file.read(CHECKSUM_BYTES)
        has_checksum = start >= 0 and checksum.startswith(CHECKSUM_MAGIC)
        if has_checksum:
            digest = hashlib.sha256()
            file.seek(0)
            while (place := file.tell()) < start:
                digest.update(file.read(min(2**20, start - place)))
            file.seek(start + CHECKSUM_BYTES)
            digest.update(file.read())
            if checksum != CHECKSUM_MAGIC + digest.digest():
                raise ValueError("its checksum differs from what was written")
    stored = pq.read_metadata(path).metadata or {}
    version = stored.get(VERSION_KEY.encode(), b"1" if OLD_KEY.encode() in stored else b"").decode("utf-8", "replace")
    if version and not has_checksum:
        raise ValueError("its checksum is missing")
    if version not in ("", VERSION):
        raise GuardLoopError(
            f"{path} is a table of version {version:.9}, and this GuardLoop reads version {VERSION}",
            "run the stage that writes it again, or use the GuardLoop that wrote it",
        )


def _footer_offset(file: BinaryIO) -> int:
    """Where the footer of a Parquet file begins."""
    end = file.seek(-TAIL_BYTES, os.SEEK_END)
    return max(0, end - int.from_bytes(file.read(4), "little"))


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    try:
        _verify(path)
        yield
    except FileNotFoundError:
        raise GuardLoopError(f"no such file: {path}", "run the stage that writes it") from None
    except DAMAGED as error:
        raise GuardLoopError(
            f"{path} is not a readable Parquet file: {error}", "run the stage that writes it again"
        ) from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GuardLoopError(
            f"cannot write {path}: {error.strerror or error}", "free disk space or choose another folder"
        ) from error
