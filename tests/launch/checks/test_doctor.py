"""guardloop doctor: what it finds on this machine, in services that are there, away or wrong, and what it advises."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.ended import Ended
from support.kubeflow_server import KubeflowServer
from support.services import S3Server
from support.small_servers import Hub, Reply, SmallServer

from guardloop.core.storage import put
from launch.checks import doctor

Doctor = Callable[..., tuple[int, dict[str, dict[str, str]]]]
GATED = {"guard": {"base": "meta-llama/Llama-Guard-3-1B"}}


class HubWithAccounts(Hub):
    """Also tells whose the token is."""

    def reply(self, path: str, query: dict[str, str], headers: dict[str, str]) -> Reply:
        if path == "/api/whoami-v2":
            known = headers.get("authorization") == f"Bearer {self.token}"
            return (200, {}, {"name": "ada"}) if known else (401, {}, {"error": "Invalid credentials"})
        return super().reply(path, query, headers)


class Mlflow(SmallServer):
    status = 200

    def reply(self, path: str, query: dict[str, str], headers: dict[str, str]) -> Reply:
        return (self.status if path == "/health" else 404), {}, "OK"


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GUARDLOOP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))


@pytest.fixture
def examine(guardloop: Callable[..., Ended], tmp_path: Path) -> Doctor:
    """Run the doctor on settings; its exit code, and the checks by name."""

    def examine(settings: dict[str, Any] | None = None, *more: str) -> tuple[int, dict[str, dict[str, str]]]:
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(settings or {}))
        ended = guardloop("doctor", "--config", str(path), "--json", *more)
        return ended.code, {check["name"]: check for check in json.loads(ended.out)}

    return examine


def test_the_embedded_default_needs_nothing_but_this_machine(examine: Doctor, guardloop: Callable[..., Ended]) -> None:
    code, found = examine()
    shown = guardloop("doctor")

    assert code == shown.code == 0
    assert {check["verdict"] for check in found.values()} == {"ok"}
    asked = {"machine", "Python", "packages", "memory", "disk", "GPU", "torch", "configuration", "hub", "S3", "MLflow"}
    assert asked <= set(found) and all(name in shown.out for name in asked)
    assert "demo.yaml: nothing failed" in shown.out


def test_what_failed_has_a_remedy_and_the_exit_code_is_1(examine: Doctor) -> None:
    code, found = examine({"dataset": {"traffic": {"kind": "file", "path": "nothing.jsonl"}}})

    assert code == 1
    assert found["configuration"]["verdict"] == "failed" and "nothing.jsonl" in found["configuration"]["found"]
    assert all(check["remedy"] for check in found.values() if check["verdict"] == "failed")


def test_a_wrong_configuration_is_refused_before_anything_is_checked(guardloop: Callable[..., Ended]) -> None:
    ended = guardloop("doctor", "--config", "configs/dmo.yaml")
    assert ended.code == 2 and "did you mean configs/demo.yaml?" in ended.err and not ended.out


# The machine


def put_in_path(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.skipif(doctor.find_gpus() is not None, reason="there is a GPU")
def test_a_gpu_that_torch_was_not_built_for(examine: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put_in_path(tmp_path, monkeypatch, "echo NVIDIA H100 80GB HBM3, 570.86.15, 81559 MiB")
    code, found = examine({"guard": {"quantization": "fp8"}})

    assert code == 1
    assert found["GPU"]["verdict"] == "ok" and "driver 570.86.15" in found["GPU"]["found"]
    assert found["torch"]["verdict"] == "failed" and "TORCH_INDEX" in found["torch"]["remedy"]


@pytest.mark.skipif(doctor.find_gpus() is not None, reason="there is a GPU")
def test_a_gpu_without_a_compiler_for_its_code(
    examine: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CC", raising=False)
    put_in_path(tmp_path, monkeypatch, "echo NVIDIA H100 80GB HBM3, 580.95.05, 81559 MiB")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    without = examine()[1]["C compiler"]
    (tmp_path / "bin" / "gcc").symlink_to("/bin/true")
    found = examine()[1]["C compiler"]
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    headless = examine()[1]["C compiler"]

    assert without["verdict"] == headless["verdict"] == "failed" and "gcc" in without["remedy"]
    assert "Python.h" in headless["found"] and found["found"] == f"{tmp_path}/bin/gcc"


@pytest.mark.skipif(doctor.find_gpus() is not None, reason="there is a GPU")
def test_a_driver_that_does_not_answer_is_no_gpu(
    examine: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put_in_path(tmp_path, monkeypatch, "echo NVIDIA-SMI has failed; exit 9")
    _, found = examine({"guard": {"quantization": "fp8"}})

    assert found["GPU"]["verdict"] == "failed" and "guard.quantization: fp8 needs one" in found["GPU"]["found"]


def test_a_package_that_only_the_configuration_asks_for(examine: Doctor) -> None:
    if doctor._version("vllm"):
        pytest.skip("vllm is installed")
    code, found = examine({"responders": [{"kind": "vllm", "model": "./models/mine"}]})

    assert code == 1 and found["packages"]["found"] == "not installed: vllm"
    assert "kind: vllm needs one" in found["GPU"]["found"]


def test_another_version_than_the_lock_has(examine: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "lock.txt").write_text("typer==0.0.1 \\\n")
    monkeypatch.setattr(doctor, "LOCK", tmp_path / "lock.txt")
    found = examine()[1]["packages"]

    assert found["verdict"] == "failed" and "(lock: 0.0.1)" in found["found"] and found["remedy"] == "make setup"


def test_the_memory_that_a_container_leaves(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    free = doctor._free_memory(tmp_path / "meminfo", tmp_path)
    (tmp_path / "memory.max").write_text("2048000\n")
    (tmp_path / "memory.current").write_text("48000\n")
    limited = doctor._free_memory(tmp_path / "meminfo", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")

    assert (free, limited) == (4_096_000, 2_000_000)
    assert doctor._free_memory(tmp_path / "meminfo", tmp_path) == free
    assert doctor._free_memory(tmp_path / "nothing", tmp_path / "nothing") is None


def test_a_home_that_cannot_be_written(examine: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GUARDLOOP_HOME", str(tmp_path / "file" / "home"))
    code, found = examine()

    assert code == 1 and "GUARDLOOP_HOME" in found["disk"]["remedy"]


# The services


@pytest.mark.parametrize(
    ("token", "account", "access"),
    [("good", "of ada", "ok"), ("stale", "does not know it", "failed"), ("", "none", "failed")],
)
def test_the_hub(examine: Doctor, monkeypatch: pytest.MonkeyPatch, token: str, account: str, access: str) -> None:
    name = GATED["guard"]["base"]
    with HubWithAccounts({name}, {name}, "good") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        code, found = examine(GATED)

    assert code == (0 if access == "ok" else 1)
    assert account in found["hub token"]["found"]
    assert found["hub model"]["verdict"] == access
    if access == "failed":
        assert f"huggingface.co/{name}" in found["hub model"]["remedy"]


def test_a_hub_that_is_away_is_not_checked(examine: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "good")
    code, found = examine(GATED)

    assert code == 0
    assert found["hub token"]["verdict"] == found["hub model"]["verdict"] == "not checked"


def test_s3(examine: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = {
        "dataset": {part: {"kind": "file", "path": f"s3://guardloop/{part}.jsonl"} for part in ("traffic", "test")}
    }
    stranger = examine(settings)[1]
    with S3Server(tmp_path / "s3") as s3:
        for name, value in s3.client_environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("MLFLOW_S3_ENDPOINT_URL")
        (tmp_path / "traffic.jsonl").write_text("{}")
        put(tmp_path / "traffic.jsonl", "s3://guardloop/traffic.jsonl")
        code, found = examine(settings)

    assert stranger["S3, dataset.traffic"]["verdict"] == "not checked"
    assert code == 1 and found["S3, dataset.traffic"]["verdict"] == "ok"
    assert found["S3, dataset.test"]["verdict"] == "failed"


def test_mlflow(examine: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    with Mlflow() as mlflow:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow.url)
        answers = examine()
        mlflow.status = 503
        ill = examine()
    away = examine()

    assert answers[0] == 0 and answers[1]["MLflow"]["verdict"] == "ok"
    assert ill[0] == away[0] == 1 and "503" in ill[1]["MLflow"]["found"]


def test_kubeflow(examine: Doctor, monkeypatch: pytest.MonkeyPatch, server: KubeflowServer) -> None:
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
    code, found = examine()
    assert code == 0 and found["Kubeflow Pipelines"]["verdict"] == found["access"]["verdict"] == "ok"

    with KubeflowServer(token="t") as closed:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", closed.url)
        code, found = examine()
    assert code == 1 and found["access"]["verdict"] == "failed" and found["access"]["remedy"]


def test_kubeflow_of_a_platform(examine: Doctor, server: KubeflowServer, tmp_path: Path) -> None:
    (tmp_path / "platform.yaml").write_text(yaml.safe_dump({"kubeflow": {"host": server.url}}))
    found = examine(None, "--platform", str(tmp_path / "platform.yaml"))[1]
    assert server.url in found["Kubeflow Pipelines"]["found"]
