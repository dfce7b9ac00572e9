"""What is checked of endpoints before a run is submitted: whether the stage's pods could reach and use them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.kubeflow_server import KubeflowServer

from guardloop.config import PlatformSettings, Settings, load_platform
from guardloop.config.kubeflow import KubeflowSettings
from launch.checks.check import Check
from launch.checks.cluster import Package, check_all
from launch.kubeflow.cluster import Cluster
from launch.kubeflow.compile import compile_all
from launch.kubeflow.target import find_target

KEY = "RESPONDER_API_KEY"
EXECUTOR = "exec-generate-responses"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipelines for a platform that maps the key of an endpoint."""
    folder = tmp_path_factory.mktemp("compiled")
    compile_all(folder, load_platform("gpu-cluster"))
    return folder


def package(stage: str = EXECUTOR, pod: dict[str, Any] | None = None, **env: str) -> Package:
    container = {"image": "answer:abc", "env": [{"name": name, "value": value} for name, value in env.items()]}
    spec = {"pipelineInfo": {"name": "guardloop"}, "deploymentSpec": {"executors": {stage: {"container": container}}}}
    return Package(spec, {"platforms": {"kubernetes": {"deploymentSpec": {"executors": {stage: pod or {}}}}}})


def endpoint(url: str = "https://models.example.org/v1", key: str | None = None, model: str = "m") -> dict[str, Any]:
    return {"kind": "openai", "model": model, "base_url": url, "api_key_env": key}


def checked(server: KubeflowServer, of: Package, *responders: dict[str, Any]) -> dict[str, Check]:
    """The findings on responders, by their names."""
    cluster = Cluster(find_target(PlatformSettings(kubeflow=KubeflowSettings(host=server.url))))
    found = check_all(cluster, of, Settings.model_validate({"responders": responders}))
    return {check.name: check for check in found if check.name.startswith("responder")}


@pytest.mark.parametrize(
    "host", ["localhost:8000", "LOCALHOST", "127.0.0.1:8000", "127.1.2.3", "[::1]:80", "0.0.0.0:1"]
)
def test_an_endpoint_of_this_machine_is_the_pod_itself(server: KubeflowServer, host: str) -> None:
    check = checked(server, package(), endpoint(f"http://{host}/v1"))["responder m"]

    assert check.verdict == "failed" and "the pod itself" in check.found and "base_url" in check.remedy


def test_an_endpoint_elsewhere_is_not_called_ok(server: KubeflowServer) -> None:
    for url in ("https://models.example.org/v1", "http://vllm.models.svc:8000/v1", "http://10.0.0.7/v1"):
        assert checked(server, package(), endpoint(url))["responder m"].verdict == "not checked"


def test_a_key_that_the_stage_does_not_get(server: KubeflowServer) -> None:
    check = checked(server, package(OTHER="1"), endpoint(key=KEY))["responder m"]

    assert check.verdict == "failed" and KEY in check.found
    assert "cluster.secrets" in check.remedy and "generate-responses" in check.remedy


def test_a_key_that_the_stage_gets(server: KubeflowServer, compiled: Path) -> None:
    entry = [{"secretKey": "api-key", "envVar": KEY}]
    mapped = package(pod={"secretAsEnv": [{"secretName": "responder", "optional": True, "keyToEnv": entry}]})
    spec, platform = yaml.safe_load_all((compiled / "full.yaml").read_text("utf-8"))

    for of in (mapped, package(**{KEY: "x"}), Package(spec, platform)):
        assert checked(server, of, endpoint(key=KEY))["responder m"].verdict == "not checked"
    other = checked(server, Package(spec, platform), endpoint(key="OTHER_KEY"))
    assert other["responder m"].verdict == "failed"


def test_a_key_of_another_stage_does_not_help(server: KubeflowServer) -> None:
    of = package(**{KEY: "x"})
    of.spec["deploymentSpec"]["executors"]["exec-screen"] = of.spec["deploymentSpec"]["executors"][EXECUTOR]
    of.spec["deploymentSpec"]["executors"][EXECUTOR] = {"container": {"image": "answer:abc"}}

    assert checked(server, of, endpoint(key=KEY))["responder m"].verdict == "failed"


def test_every_responder_is_looked_at(server: KubeflowServer) -> None:
    others = [endpoint("http://localhost:1/v1", model="n"), {"kind": "vllm", "model": "org/plain"}]
    found = checked(server, package(), endpoint(), *others)

    assert {name: check.verdict for name, check in found.items()} == {
        "responder m": "not checked",
        "responder n": "failed",
    }


def test_pipelines_that_ask_no_endpoint(server: KubeflowServer) -> None:
    assert not checked(server, package("exec-train-guard"), endpoint("http://localhost:1/v1"))
