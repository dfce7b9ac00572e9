"""`guardloop serve` as a process: it answers, and when it is stopped it has answered and logged all."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from support.models import save_guard
from support.root import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_answers_until_it_is_stopped_and_loses_nothing(tmp_path: Path, number: int) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(f"guard: {{base: {save_guard(tmp_path / 'guard')}, min_label_mass: 0}}\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "guardloop.cli", "serve", "--guard", "baseline", "--config", str(config)]
    command += ["--port", str(port), "--log", str(tmp_path / "log")]
    environment = {**os.environ, "GUARDLOOP_HOME": str(tmp_path / "home")}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                assert requests.get(f"{address}/health/ready", timeout=5).json()["guard"] == "baseline"
                break
            except requests.ConnectionError:
                time.sleep(0.2)
        answers = [requests.post(f"{address}/v1/check", json={"prompt": f"q{n}"}, timeout=20).json() for n in range(5)]
        process.send_signal(number)
        assert process.wait(timeout=30) in (0, 130, -number)
    logged = [json.loads(line) for file in (tmp_path / "log").rglob("*.jsonl") for line in file.open()]
    assert {row["id"] for row in logged} == {answer["id"] for answer in answers}


def test_serve_says_what_is_wrong_before_it_listens(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "guardloop.cli", "serve", "--guard", "baseline", "--keys", str(tmp_path / "none")]
    config = tmp_path / "small.yaml"
    config.write_text(f"guard: {{base: {save_guard(tmp_path / 'guard')}, min_label_mass: 0}}\n")
    ended = subprocess.run([*command, "--config", str(config)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "cannot read the keys" in ended.stderr
    assert "Traceback" not in ended.stderr
