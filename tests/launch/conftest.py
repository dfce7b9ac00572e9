import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from support.ended import Ended
from support.kubeflow_server import KubeflowServer
from support.root import ROOT
from support.shared import shared

from guardloop.cli import main as cli
from guardloop.config import load_platform
from launch.kubeflow import calls, follow, submit, target
from launch.kubeflow.compile import compile_all

read_once = cache(submit.Package.read)  # reading YAML takes longer than a test


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled pipelines: made once, for compiling takes longer than a test."""

    def make(folder: Path) -> None:
        compile_all(folder, load_platform("minikube"))
        compile_all(folder / "fresh", load_platform("minikube"), fresh=True)

    return shared(tmp_path_factory, "packages", make)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, packages: Path) -> None:
    """No credentials and no services but the test's; waiting in milliseconds."""
    names = ("KF_PIPELINES", "AWS_", "MLFLOW_", "HF_", "KUBE", "REQUESTS_CA", "DOCKER_CONFIG", "HTTP", "http")
    for name in [name for name in os.environ if name.startswith(names)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "no-kubeconfig"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(calls, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.005)
    monkeypatch.setattr(target, "MOUNTED_TOKEN", tmp_path / "no-token")
    monkeypatch.setattr(target, "MOUNTED_NAMESPACE", tmp_path / "no-namespace")
    monkeypatch.setattr(submit.Package, "read", read_once)

    def compiled(*given: object) -> list[Path]:
        return [packages / ("fresh" if given[-2] else "") / f"{given[-1]}.yaml"]

    monkeypatch.setattr(submit, "compile_all", compiled)


@pytest.fixture
def server() -> Iterator[KubeflowServer]:
    with KubeflowServer() as running:
        yield running


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up soon."""
    monkeypatch.setattr(calls, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(follow, "PATIENCE_SECONDS", 0.3)


@pytest.fixture
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for an answer less long than the server sleeps; calls are still repeated."""
    monkeypatch.setattr(calls, "READ_SECONDS", 0.3)


@pytest.fixture
def guardloop(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Call the command line in this process."""

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["guardloop", *arguments])
        capsys.readouterr()
        code: int | None = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code  # type: ignore[assignment]
        written = capsys.readouterr()
        assert "Traceback" not in written.out + written.err
        return Ended(code or 0, written.out, written.err)

    return call


@pytest.fixture
def submits(guardloop: Callable[..., Ended], server: KubeflowServer) -> Callable[..., Ended]:
    """Submit the demo to the server."""
    return lambda *more: guardloop("submit", "--platform", "minikube", "--host", server.url, *more)
