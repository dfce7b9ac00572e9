"""Models that cannot be had: what a person is told. The hub is a server on this machine that answers like it."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from guardloop.core.errors import GuardLoopError
from guardloop.guard.metadata import guard_metadata
from guardloop.models.loading import is_out_of_memory, load_tokenizer, pick_dtype
from guardloop.models.locate import locate

LOAD = """
from guardloop.core.errors import GuardLoopError
from guardloop.models.loading import load_tokenizer
try:
    load_tokenizer("meta-llama/LlamaGuard-7b")
except GuardLoopError as error:
    print(error)
"""

FIRST_COSINES = """
import os, sys
import torch
import guardloop.models.loading
angles = torch.tensor([i / 100 for i in range(40_000)])
wrong = 0
for _ in range(int(sys.argv[1])):
    if not (child := os.fork()):  # a process whose first cosine of many numbers this is, on two threads at once
        first = angles.cos()
        os._exit(not torch.equal(first, angles.cos()))
    wrong += os.waitpid(child, 0)[1] != 0
print(wrong)
"""


class Hub(BaseHTTPRequestHandler):
    """Refuses everything, for the reason that the server holds."""

    def do_GET(self) -> None:
        status, code = self.server.refusal  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "Access to this model is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815  (the name that http.server asks for)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("refusal", "told"),
    [
        ((403, "GatedRepo"), "accept its licence at huggingface.co/meta-llama/LlamaGuard-7b, then set HF_TOKEN"),
        ((404, "RepoNotFound"), "check the id and the revision"),
    ],
)
def test_a_refused_model_is_explained(
    hub: ThreadingHTTPServer, refusal: tuple[int, str], told: str, tmp_path: Path
) -> None:
    hub.refusal = refusal  # type: ignore[attr-defined]
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    environment.pop("HF_TOKEN", None)

    ended = subprocess.run(
        [sys.executable, "-c", LOAD], capture_output=True, text=True, env=environment, cwd=Path.cwd(), check=False
    )

    assert told in ended.stdout, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_missing_folder_is_not_taken_for_a_hub_id() -> None:
    with pytest.raises(GuardLoopError, match=r"no model folder at \./nowhere"):
        locate("./nowhere")


def test_an_unknown_embedded_model_is_named() -> None:
    with pytest.raises(GuardLoopError, match="embedded models: smollm2, guard"):
        locate("embedded:gard")


def test_a_damaged_guard_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "guard.json").write_text("{")

    with pytest.raises(GuardLoopError, match="not readable JSON"):
        guard_metadata(tmp_path)


@pytest.mark.parametrize(("generation", "format_"), [(7, torch.float16), (8, torch.bfloat16)])
def test_a_gpu_that_only_emulates_bfloat16_gets_float16(
    monkeypatch: pytest.MonkeyPatch, generation: int, format_: torch.dtype
) -> None:
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: SimpleNamespace(major=generation),
        "_check_bf16_tensor_supported": lambda device: True,
    }.items():
        monkeypatch.setattr(f"torch.cuda.{name}", value)

    assert pick_dtype(torch.device("cuda")) == format_


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_a_want_of_memory_is_known_by_who_reports_it(error, expected):
    assert is_out_of_memory(error) is expected


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_a_tokenizer_that_lost_its_merges_is_told_of(
    whole: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It spells every word, as that of Gemma did when transformers 5.17 converted it from GGUF."""
    load_tokenizer(locate("embedded:smollm2")).save_pretrained(tmp_path)
    plain = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    if not whole:
        plain["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain), "utf-8")

    load_tokenizer(str(tmp_path))

    told = [record.message for record in caplog.records if "tokenizer" in record.message]
    assert [f"{tmp_path}: its tokenizer makes 68 tokens of 68 characters" in message for message in told] == (
        [] if whole else [True]
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_computes_its_first_cosines_to_the_last_digit() -> None:
    """Else one process in a hundred computes a template's angles with three digits, where MKL has the fault."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}

    told = subprocess.run(
        [sys.executable, "-c", FIRST_COSINES, "300"],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip

    assert int(told.stdout) == 0
