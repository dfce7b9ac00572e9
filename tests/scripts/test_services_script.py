"""`make services`: what it starts works together, and ends with it."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.root import ROOT

SCRIPT = ROOT / "scripts/services.sh"
START_SECONDS = 180


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(home: Path, s3: int, mlflow: int) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_"))}
    environment |= {"GUARDLOOP_HOME": str(home), "PYTHON": sys.executable}
    environment |= {"S3_PORT": str(s3), "MLFLOW_PORT": str(mlflow)}
    return subprocess.Popen([SCRIPT], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, int, "subprocess.Popen[str]"]]:
    home, s3, mlflow = tmp_path_factory.mktemp("home"), free_port(), free_port()
    process = start(home, s3, mlflow)
    assert process.stdout
    for line in process.stdout:
        if line.startswith("Ctrl-C"):
            break
    assert process.poll() is None, "the services did not start"
    yield home / "services", s3, mlflow, process
    process.terminate()
    process.wait(START_SECONDS)


@pytest.mark.slow
def test_mlflow_keeps_artifacts_in_the_store_until_both_are_stopped(
    services: tuple[Path, int, int, "subprocess.Popen[str]"],
) -> None:
    folder, s3, mlflow, process = services
    use = "import mlflow\nwith mlflow.start_run(): mlflow.log_text('kept', 'a.txt')"
    command = ["bash", "-c", 'source "$1" && "$2" -c "$3"', "-", str(folder / "env"), sys.executable, use]
    subprocess.run(command, check=True, capture_output=True)

    assert [path.read_text() for path in (folder / "buckets/guardloop").rglob("a.txt")] == ["kept"]
    assert folder.joinpath("env").stat().st_mode & 0o077 == 0  # it holds the secret
    (secret,) = re.findall("^export AWS_SECRET_ACCESS_KEY=(.+)$", folder.joinpath("env").read_text(), re.M)
    assert secret not in subprocess.run(["ps", "-eo", "args"], check=True, capture_output=True, text=True).stdout

    taken = start(folder.parent, s3, free_port())
    assert taken.wait(START_SECONDS) == 2
    assert taken.stdout and f"Port {s3} is taken" in taken.stdout.read()

    process.send_signal(signal.SIGTERM)
    assert process.wait(START_SECONDS) == 0
    deadline = time.monotonic() + START_SECONDS
    while any(answers(port) for port in (s3, mlflow)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
