"""What the stages' containers see of this machine."""

import os
from pathlib import Path
from typing import Any

import pytest

from guardloop.config import load_platform
from guardloop.config.docker import DockerSettings
from guardloop.core.errors import GuardLoopError
from launch.local.containers import FILES_NAMED_BY, docker_runner, ready


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("GUARDLOOP_CACHE", "HF_HOME", "MLFLOW_TRACKING_URI", *FILES_NAMED_BY):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def options(home: Path, settings: DockerSettings | None = None, **arguments: Any) -> dict:
    return docker_runner("run-1", home, arguments, settings or DockerSettings()).container_run_args


def seen(found: dict) -> dict[str, bool]:
    """Path -> whether it may be written; every path is the same inside and outside."""
    assert all(mount["Source"] == mount["Target"] for mount in found["mounts"])
    return {mount["Target"]: not mount["ReadOnly"] for mount in found["mounts"]}


def test_stages_write_to_runs_and_caches_and_read_what_the_configuration_names(home: Path, tmp_path: Path) -> None:
    (tmp_path / "guard").mkdir()
    for name in ("second", "benchmark.jsonl", "prompts.csv"):
        (tmp_path / name).touch()
    benchmark = {"name": "b", "source": {"kind": "file", "path": str(tmp_path / "benchmark.jsonl")}}
    found = options(
        home,
        dataset={
            "traffic": {"kind": "file", "path": str(tmp_path / "prompts.csv")},
            "test": {"kind": "file", "path": "s3://bucket/test.csv"},
        },
        guard={"base": str(tmp_path / "guard"), "policy": None},
        responders=[{"model": "hub/model"}, {"model": str(tmp_path / "second")}],
        evaluation={"benchmarks": [benchmark]},
    )

    assert seen(found) == {
        str(home): True,
        str(tmp_path / "me/.cache/guardloop"): True,
        str(tmp_path / "me/.cache/huggingface"): True,
        str(tmp_path / "prompts.csv"): False,
        str(tmp_path / "benchmark.jsonl"): False,
        str(tmp_path / "second"): False,
        str(tmp_path / "guard"): False,
    }


def test_a_database_of_mlflow_is_seen(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/team/mlflow.db")

    assert seen(options(home))[str(tmp_path / "team")]


def test_stages_get_their_own_variables_and_no_others(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:5001", "AWS_ACCESS_KEY_ID": "key", "MY_KEY": "secret"}
    for name, value in {**given, "GUARDLOOP_RUN_ID": "run-1", "OTHER_TOKEN": "secret"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "ca.pem").touch()
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "ca.pem"))

    found = options(
        home, responders=[{"kind": "openai", "model": "m", "base_url": "http://host/v1", "api_key_env": "MY_KEY"}]
    )

    assert found["environment"].items() >= {**given, "GUARDLOOP_RUN_ID": "run-1"}.items()
    assert not {"OTHER_TOKEN", "PATH", "PYTHONPATH"} & set(found["environment"])
    assert seen(found)[str(tmp_path / "ca.pem")] is False


def test_containers_run_as_the_user_with_what_the_platform_gives(home: Path) -> None:
    found = options(home, DockerSettings(gpus=2, shared_memory="4g", network="bridge"))

    assert found["user"] == f"{os.getuid()}:{os.getgid()}"
    assert (found["shm_size"], found["network_mode"]) == ("4g", "bridge")
    assert [request["Count"] for request in found["device_requests"]] == [2]
    assert options(home)["device_requests"] == []


def test_without_an_engine_the_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")

    with pytest.raises(GuardLoopError, match="no Docker engine answers"):
        ready(DockerSettings(tag="abc"))


def test_the_docker_platform_is_one_of_ours_and_latest_is_refused(tmp_path: Path) -> None:
    assert load_platform("docker").runner == "docker"
    (tmp_path / "p.yaml").write_text("runner: docker\ndocker: {tag: latest}\n")

    with pytest.raises(GuardLoopError, match="name a commit"):
        load_platform(str(tmp_path / "p.yaml"))
