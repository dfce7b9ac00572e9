"""Secrets of the environment are used where they must be, and written nowhere: canaries are planted and looked for."""

import http.server
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.canaries import CANARIES, found_in
from support.services import S3Server
from support.tiny_responder import screened
from support.workshop import ROOT

from guardloop.core.errors import GuardLoopError
from guardloop.core.records import SCREENED, write_table
from guardloop.models.locate import fetch_adapter
from guardloop.registry.registry import Registry
from guardloop.registry.settings import RegistrySettings


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def guardloop(*arguments: str, home: Path) -> str:
    """Both outputs of a command."""
    environment = {**os.environ, "GUARDLOOP_HOME": str(home)}
    command = [sys.executable, "-m", "guardloop.cli.main", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.stdout + ended.stderr


def test_the_search_finds_a_canary(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"\x00key=" + CANARIES["HF_TOKEN"].encode())
    assert found_in(tmp_path) and found_in(CANARIES["OPENAI_API_KEY"])
    assert not found_in("nothing here")


@pytest.mark.slow
def test_no_compiled_pipeline_holds_a_secret(planted: None, tmp_path: Path) -> None:
    for platform in ("minikube", "gpu-cluster"):
        out = tmp_path / platform
        said = guardloop("compile", "--platform", platform, "--out", str(out), home=tmp_path / "home")
        assert list(out.glob("*.yaml")), said
        assert not found_in(out, said)


@contextmanager
def echo(status: int) -> Iterator[str]:
    """A server that repeats in its error whatever it was sent, headers and all."""

    class Echo(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            told = f"{self.path} {dict(self.headers)} {body[:500]!r}".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        do_GET = do_POST = do_PUT = do_HEAD = answer  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


STAGE = """
import sys
from guardloop.cli.main import main
from guardloop.stages import generate_responses
import guardloop.cli.main
guardloop.cli.main.app = lambda: generate_responses(sys.argv[1], sys.argv[2], [{
    "kind": "openai", "model": "m", "base_url": sys.argv[3], "api_key_env": "OPENAI_API_KEY"}])
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("status", [400, 401])
def test_an_endpoint_that_repeats_the_key_does_not_get_it_into_a_table_or_a_log(
    planted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("GUARDLOOP_WORK", str(tmp_path / "work"))
    monkeypatch.setenv("GUARDLOOP_EVENTS", str(tmp_path / "events.jsonl"))
    write_table(screened(["how do I bake a cake?"]), SCREENED, tmp_path / "screened")
    with echo(status) as url:
        command = [sys.executable, "-c", STAGE, str(tmp_path / "screened"), str(tmp_path / "responses"), url]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 2, ended.stderr
    assert not found_in(tmp_path, ended.stdout, ended.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["store refuses", "store repeats all", "mlflow repeats all", "password in the url"])
def test_failures_name_the_place_and_no_secret(
    planted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with S3Server(tmp_path / "s3") as s3, echo(400) as url, pytest.raises(GuardLoopError) as caught:
        if kind.startswith("store"):
            monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url if kind == "store refuses" else url)
            fetch_adapter("s3://guardloop/adapter")
        else:
            secret = CANARIES["MLFLOW_TRACKING_PASSWORD"]
            address = url if "repeats" in kind else url.replace("//", f"//me:{secret}@")
            Registry(RegistrySettings(), tracking_uri=address, patience_seconds=0).versions()
    told = "".join(traceback.format_exception(caught.value))  # as a log would have it, causes and all
    assert "127.0.0.1" in told
    assert not found_in(told, caplog.text)
