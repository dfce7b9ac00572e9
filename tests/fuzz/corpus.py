"""What the readers are fed: whole files of each kind, changed byte by byte, and what must hold whatever is in them.

A case is known by its target and a number, from which all its changes follow. `python -m fuzz` (make fuzz) goes
through many numbers; those that once found something are kept in SEEDS and run with the other tests.
"""

import json
import random
import shutil
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from support.data_tables import as_bytes
from support.models import save_guard, tiny_llama, with_lora
from support.root import ROOT

from guardloop.config import load_platform, load_settings
from guardloop.core.errors import GuardLoopError
from guardloop.core.records import CONVERSATION, SAID, count_rows, read_metadata, read_table, write_table
from guardloop.core.text import UNSEEN, clean, without_secrets
from guardloop.data.settings import SourceSettings
from guardloop.data.sources import read_conversations
from guardloop.guard.adapter_files import check_adapter_files
from guardloop.guard.loading import attach_adapter, load_renderer
from guardloop.guard.metadata import guard_metadata
from guardloop.guard.prompt.policy import read_policy
from guardloop.guard.settings import GuardSettings
from guardloop.responses.engines.completion import OPTIONAL, BrokenAnswer, ProviderError, read_completion, read_error

SLOW_SECONDS = 10.0
HOSTILE = [
    *(b'"', b"'", b"\n", b"\r", b"\x00", b"\xff", b"\xef\xbb\xbf", b"{}", b"[[", b"]", b"}", b",", b":", b"- ", b"  "),
    *(b"\\ud800", b"1e999", b"NaN", b"-1", b"0", b"null", b"true", b"99999999999999999999", b"PAR1", b"[" * 2000),
    *(b"&a [*a, *a]", b"*a", b"!!python/object/apply:os.system ['true']", b"!!binary x", b"<<: ", b"? ", b"%YAML 9"),
    *(b"{% for i in range(9) %}", b"{{ ''.__class__.__mro__ }}", b"{% raw %}", b"../../etc/passwd", b"(a+)+$"),
]


@dataclass(frozen=True)
class Target:
    """A reader with a file that it reads; `make` writes whole files into a new folder, one of `files` is changed."""

    make: Callable[[Path], None]
    files: tuple[str, ...]
    read: Callable[[Path], object]
    share: int
    """Parts of 1000 of the cases: slow readers get fewer."""


def mutate(content: bytes, draw: random.Random) -> bytes:
    """One to four changes: a byte, a bit, a hole, a repeat, a swap, something hostile put in, or the end cut off."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(data) + 1)
        end = min(len(data), start + draw.choice([1, 2, 8, 100]))
        change = draw.randrange(8)
        if change == 0:
            data[start:end] = draw.randbytes(end - start)
        elif change == 1:
            del data[start:end]
        elif change == 2:
            data[start:start] = data[start:end] * draw.choice([1, 1, 50])
        elif change in (3, 4):
            data[start : end if change == 4 else start] = draw.choice(HOSTILE)
        elif change == 5 and start < len(data):
            data[start] ^= 1 << draw.randrange(8)
        elif change == 6:
            other = draw.randrange(len(data) + 1)
            data[start:end] = data[other : other + end - start]
        elif draw.random() < 0.3:
            del data[start:]
    return bytes(data)


def try_case(name: str, number: int, scratch: Path) -> str:
    """Run one case; `read` or `refused`. Raises AssertionError, naming the case, for whatever else happens."""
    target, draw = TARGETS[name], random.Random(zlib.crc32(f"{name}/{number}".encode()))
    folder = scratch / name
    if not folder.is_dir():
        folder.mkdir(parents=True)
        target.make(folder)
    file = folder / draw.choice(target.files)
    whole = file.read_bytes()
    file.write_bytes(mutate(whole, draw))
    started = time.monotonic()
    try:
        target.read(folder)
        outcome = "read"
    except GuardLoopError as error:
        assert error.what.strip() and error.remedy.strip(), f"{name} {number}: no remedy: {error}"
        assert "Traceback" not in str(error), f"{name} {number}: {error}"
        outcome = "refused"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        kept = scratch / f"{name}-{number}-{file.name}"
        shutil.copyfile(file, kept)
        raise AssertionError(f"{name} {number} ({kept}): {type(error).__name__}: {error}"[:600]) from error
    finally:
        file.write_bytes(whole)
    assert time.monotonic() - started < SLOW_SECONDS, f"{name} {number}: took {time.monotonic() - started:.0f} s"
    return outcome


ROWS = [
    {"id": str(i), "prompt": f"Prompt {i}, with 'quotes' and ümläuts", "label": i % 2, "jailbreak": i % 3 == 0}
    for i in range(12)
]


def _table(kind: str, share: int) -> Target:
    def read(folder: Path) -> None:
        for row in read_conversations(SourceSettings(kind="file", path=str(folder / f"rows{kind}"))):
            assert isinstance(row["prompt"], str) and row["id"] and row["unsafe"] in (True, False, None)
            row["prompt"].encode()

    return Target(
        lambda f: (f / f"rows{kind}").write_bytes(as_bytes(ROWS, kind)) and None, (f"rows{kind}",), read, share
    )


def _copy(source: Path, name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        shutil.copyfile(source, folder / name)

    return make


def _record_table(folder: Path) -> None:
    rows = [{"id": r["id"], "prompt": r["prompt"], "source": "s", "group": r["id"], "unsafe": None} for r in ROWS]
    write_table(rows, CONVERSATION, folder / "table", lambda: {"threshold": 0.5, "data": {"hash": "abc"}})


def _read_records(folder: Path) -> None:
    table = folder / "table"
    rows = list(read_table(table, CONVERSATION))
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in ROWS], "other rows than were written"
    assert read_metadata(table) == {"threshold": 0.5, "data": {"hash": "abc"}}, "other metadata than were written"
    assert count_rows(table) == len(rows)


@cache
def _base() -> object:
    return tiny_llama()


def _adapter(folder: Path) -> None:
    with_lora(tiny_llama()).save_pretrained(folder)
    (folder / "guard.json").write_text(json.dumps({"family": "guardloop", "threshold": 0.5, "temperature": 1.2}))


def _check_adapter(folder: Path) -> None:
    check_adapter_files(folder, guard_metadata(folder))


def _attach(folder: Path) -> None:
    guard_metadata(folder)
    adapted = attach_adapter(_base(), folder)
    adapted.unload()


def _guard(folder: Path) -> None:
    save_guard(folder, "llama-guard-3", threshold=0.0)
    (folder / "model.safetensors").unlink()


def _render(folder: Path) -> None:
    settings = GuardSettings(base=str(folder), min_label_mass=0, max_text_tokens=64)
    tokens = load_renderer(settings).render("how do I bake a cake?", "mix flour").tokens
    assert tokens and all(isinstance(token, int) for token in tokens)


ANSWER = {
    "error": None,
    "choices": [
        {
            "finish_reason": "length",
            "content_filter_results": {"hate": {"filtered": False}},
            "message": {
                "content": [{"type": "text", "text": "<think>hm</think>"}, "yes"],
                "refusal": None,
                "reasoning_content": "hm",
                "tool_calls": [{"function": {"name": "f"}}],
            },
        }
    ],
    "usage": {"completion_tokens": 3, "completion_tokens_details": {"reasoning_tokens": 1}},
}
REFUSAL = {
    "error": {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'", "param": "max_tokens"}
}


def _read_answer(folder: Path) -> None:
    """As an answer and as an error; only the two exceptions that the engine expects."""
    for name in ("answer.json", "error.json"):
        content = (folder / name).read_bytes()
        with suppress(BrokenAnswer, ProviderError):
            answer = read_completion(content)
            assert bool(answer.text) == (answer.kind in SAID) and not answer.text.startswith("<think>")
        assert read_error(400, content).parameter in ("", *OPTIONAL)


def _write_answer(folder: Path) -> None:
    (folder / "answer.json").write_text(json.dumps(ANSWER))
    (folder / "error.json").write_text(json.dumps(REFUSAL))


def _read_text(folder: Path) -> None:
    """What is shown of a text has nothing in it that a terminal acts on, and nothing that the filter knows."""
    shown = clean((folder / "message.txt").read_bytes().decode("utf-8", "surrogateescape"))
    assert not UNSEEN.search(shown)
    assert len(shown) > 1000 or without_secrets(shown) == shown


def _write_text(folder: Path) -> None:
    lines = (
        "no answer of https://me:hunter2@host.example.org:8443/v1?token=hunter2",
        "\x1b[31mred\x1b[0m",
        "s3://K:hunter2@b",
    )
    (folder / "message.txt").write_text("\n".join(lines))


TARGETS = {
    "text": Target(_write_text, ("message.txt",), _read_text, 50),
    "endpoint": Target(_write_answer, ("answer.json", "error.json"), _read_answer, 150),
    "jsonl": _table(".jsonl", 180),
    "jsonl.gz": _table(".jsonl.gz", 60),
    "csv": _table(".csv", 150),
    "csv.gz": _table(".csv.gz", 60),
    "parquet": _table(".parquet", 100),
    "records": Target(_record_table, ("table",), _read_records, 80),
    "configuration": Target(
        _copy(ROOT / "configs" / "demo.yaml", "c.yaml"), ("c.yaml",), lambda f: load_settings(f / "c.yaml"), 30
    ),
    "platform": Target(
        _copy(ROOT / "configs" / "platform" / "minikube.yaml", "p.yaml"),
        ("p.yaml",),
        lambda f: load_platform(str(f / "p.yaml")),
        30,
    ),
    "policy": Target(
        _copy(ROOT / "guardloop" / "guard" / "prompt" / "policies" / "guardloop.yaml", "p.yaml"),
        ("p.yaml",),
        lambda f: read_policy(f / "p.yaml"),
        20,
    ),
    "adapter_config": Target(_adapter, ("adapter_config.json", "guard.json"), _check_adapter, 75),
    "adapter": Target(
        _adapter, ("adapter_config.json", "adapter_model.safetensors", "adapter_model.safetensors"), _attach, 6
    ),
    "tokenizer": Target(_guard, ("tokenizer.json", "tokenizer_config.json", "config.json", "guard.json"), _render, 9),
}
"""By the name that a case has."""

SEEDS: dict[str, tuple[int, ...]] = {
    "records": (335, 868, 880),  # other rows than were written, before tables had a checksum
    "tokenizer": (150, 156, 219, 266),  # an exception of the tokenizer's own
}
"""Cases that once went wrong."""
