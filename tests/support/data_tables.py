"""Rows as the bytes of a file."""

import csv
import gzip
import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def as_bytes(rows: list[dict[str, Any]], suffix: str) -> bytes:
    if suffix.endswith(".gz"):
        return gzip.compress(as_bytes(rows, suffix.removesuffix(".gz")), mtime=0)
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()
