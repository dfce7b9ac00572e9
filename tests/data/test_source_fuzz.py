"""Damaged files: whatever is in them, the reader ends, with rows or with an error that a person can act on."""

import random
import zlib

import pytest
from support.data_tables import as_bytes

from guardloop.core.errors import GuardLoopError
from guardloop.data.settings import SourceSettings
from guardloop.data.sources import read_conversations

FILES = 60
HOSTILE = [
    b'"',
    b"\n",
    b"\r",
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"{}",
    b"[[",
    b"\\ud800",
    b",",
    b"1e999",
    b"NaN",
    b"PAR1",
]


def mutate(content: bytes, draw: random.Random) -> bytes:
    """One to four changes: a byte, a hole, a repeat, something hostile put in, or the end cut off."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(data) + 1)
        end = min(len(data), start + draw.choice([1, 2, 8, 100]))
        change = draw.randrange(5)
        if change == 0:
            data[start:end] = draw.randbytes(end - start)
        elif change == 1:
            del data[start:end]
        elif change == 2:
            data[start:start] = data[start:end]
        elif change == 3:
            data[start:start] = draw.choice(HOSTILE)
        else:
            del data[start:]
    return bytes(data)


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".jsonl.gz", ".csv.gz", ".parquet"])
def test_a_damaged_file_never_ends_in_a_traceback(tmp_path, kind):
    rows = [
        {"id": str(i), "prompt": f"Prompt {i}, with 'quotes' and ümläuts", "label": i % 2, "jailbreak": i % 3 == 0}
        for i in range(30)
    ]
    whole, path = as_bytes(rows, kind), tmp_path / f"rows{kind}"
    source = SourceSettings(kind="file", path=str(path))
    refused = 0
    for number in range(FILES):
        path.write_bytes(mutate(whole, random.Random(zlib.crc32(f"{kind}{number}".encode()))))
        try:
            for row in read_conversations(source):
                assert isinstance(row["prompt"], str) and row["id"] and row["unsafe"] in (True, False, None)
                row["prompt"].encode()
        except GuardLoopError as error:
            assert error.remedy
            refused += 1
    assert refused > FILES / 4
