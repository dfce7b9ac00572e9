"""What is checked before a run is submitted: it is ok, it failed, or it says that it was not checked."""

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.ended import Ended
from support.kubeflow_server import KubeflowServer
from support.services import S3Server
from support.small_servers import DockerEngine, Hub, Kubernetes, SmallServer

from guardloop.config import PlatformSettings, Settings
from guardloop.config.cluster import ClusterSettings
from guardloop.config.kubeflow import KubeflowSettings
from guardloop.core.storage import put
from launch.checks.check import Check, hub_models
from launch.checks.cluster import check_all
from launch.checks.images import registry_of
from launch.kubeflow.cluster import Cluster
from launch.kubeflow.package import Package
from launch.kubeflow.target import find_target

Look = Callable[..., dict[str, Check]]


def package(image: str = "r.example/guardloop/screen:abc", pods: dict[str, Any] | None = None, **env: str) -> Package:
    container = {"image": image, "env": [{"name": name, "value": value} for name, value in env.items()]}
    spec = {
        "pipelineInfo": {"name": "guardloop"},
        "deploymentSpec": {"executors": {"exec-screen": {"container": container}}},
    }
    return Package(spec, {"platforms": {"kubernetes": {"deploymentSpec": {"executors": {"exec-screen": pods or {}}}}}})


@pytest.fixture
def look(server: KubeflowServer) -> Look:
    """Check a package and settings; the findings by name."""

    def look(
        of: Package | None = None, settings: dict[str, Any] | None = None, account: str = "", **kubeflow: str
    ) -> dict[str, Check]:
        places = {"kubeflow": KubeflowSettings(host=server.url, **kubeflow)}
        pods = {"runner": "kubeflow", "cluster": ClusterSettings(service_account=account)} if account else {}
        cluster = Cluster(find_target(PlatformSettings(**places, **pods)))
        of = of or package("screen:abc")
        return {check.name: check for check in check_all(cluster, of, Settings.model_validate(settings or {}))}

    return look


# The whole


def test_a_failed_check_keeps_the_run_back_unless_forced(
    server: KubeflowServer, guardloop: Callable[..., Ended], tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("dataset: {traffic: {kind: file, path: mine.jsonl}}")
    call = ("submit", "--platform", "minikube", "--host", server.url, "--config", str(tmp_path / "mine.yaml"))

    kept = guardloop(*call)
    forced = guardloop(*call, "--force")

    assert kept.code == 2 and "nothing was submitted: dataset.traffic" in kept.err and "--force" in kept.err
    assert "-> put it on s3://" in kept.words
    assert forced.code == 0 and len(server.runs) == 1 and "these failed: dataset.traffic" in forced.out


def test_force_does_not_help_without_access(guardloop: Callable[..., Ended]) -> None:
    with KubeflowServer(token="t") as server:
        ended = guardloop("submit", "--platform", "minikube", "--host", server.url, "--force")

    assert ended.code == 2 and "--force" not in ended.err and "nothing was submitted: access" in ended.err


def test_what_cannot_be_seen_is_not_called_ok(look: Look) -> None:
    found = look()

    assert found["Kubeflow Pipelines"].found.endswith("version 2.17.0, single user")
    assert [name for name, check in found.items() if check.verdict == "not checked"] == [
        "images",
        "artifact store",
        "MLflow",
    ]
    assert all(check.remedy for check in found.values() if check.verdict != "ok")


# Images

IMAGE = "r.example/guardloop/screen:abc"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[DockerEngine]:
    with DockerEngine({IMAGE}) as running:
        monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{running.port}")
        yield running


def test_images_in_the_registry(look: Look, engine: DockerEngine) -> None:
    missing = look(package("r.example/guardloop/screen:abd"))["images"]

    assert look(package(IMAGE))["images"] == Check("images", "ok", "1 in the registry")
    assert missing.verdict == "failed" and "screen:abd" in missing.found and "make push" in missing.remedy


def test_a_registry_that_asks_for_a_login(look: Look, engine: DockerEngine, tmp_path: Path) -> None:
    engine.login = "ada:secret"
    stranger = look(package(IMAGE))["images"]
    login = {"auth": base64.b64encode(b"ada:secret").decode()}
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"r.example": login}}))
    known = look(package(IMAGE))["images"]

    assert stranger.verdict == "not checked" and stranger.remedy == "docker login r.example"
    assert known.verdict == "ok"


@pytest.mark.parametrize("config", ["{", "[]", '{"auths": 3}', '{"auths": {"127.0.0.1:1": 4}}'])
def test_a_login_file_that_is_damaged(look: Look, engine: DockerEngine, config: str, tmp_path: Path) -> None:
    engine.login = "ada:secret"
    (tmp_path / "config.json").write_text(config)

    assert look(package(IMAGE))["images"].verdict == "not checked"


@pytest.mark.parametrize("status", [500, 429])
def test_a_registry_that_fails_says_nothing_of_its_images(look: Look, engine: DockerEngine, status: int) -> None:
    engine.status = status
    failing = look(package(IMAGE))["images"]

    assert failing.verdict == "not checked" and str(status) in failing.found


def test_without_an_engine_nothing_is_known(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:9")
    check = look(package(IMAGE))["images"]

    assert check.verdict == "not checked" and "no Docker engine" in check.found


def test_registries_in_names_of_images() -> None:
    names = ["r.example:5000/a/b:tag", "localhost/a:1", "docker.io/guardloop/screen:1", "guardloop/screen:1", "screen"]

    assert [registry_of(name) for name in names] == ["r.example:5000", "localhost", "docker.io", "", ""]


# Kubernetes

PODS = {
    "secretAsEnv": [
        {"secretName": "s3", "keyToEnv": [{"secretKey": "accesskey", "envVar": "A"}, {"secretKey": "secretkey"}]},
        {"secretName": "perhaps", "optional": True, "keyToEnv": [{"secretKey": "x"}]},
    ],
    "imagePullSecret": [{"secretName": "pull"}],
    "configMapAsEnv": [{"configMapName": "settings", "keyToEnv": [{"configMapKey": "a"}]}],
    "pvcMount": [{"constant": "models", "mountPath": "/models"}],
}


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubernetes]:
    with Kubernetes() as running:
        monkeypatch.setenv("KUBECONFIG", str(running.kubeconfig(tmp_path / "kubeconfig")))
        running.add("secrets", "s3", data={"accesskey": "QQ==", "secretkey": "Qg=="})
        running.add("secrets", "pull", data={".dockerconfigjson": "e30="})
        running.add("configmaps", "settings", data={"a": "1"})
        running.add("persistentvolumeclaims", "models", status={"phase": "Bound"})
        running.add("serviceaccounts", "runner")
        yield running


def test_secrets_and_volumes_that_are_there(look: Look, kubernetes: Kubernetes) -> None:
    found = look(package(pods=PODS), namespace="guardloop", account="runner")["secrets, volumes"]

    assert found.verdict == "ok" and "kubectl's context test" in found.found
    assert all(name in found.found for name in ("s3", "pull", "settings", "models", "runner"))
    assert "perhaps" not in found.found


@pytest.mark.parametrize(
    ("kind", "name", "content", "words"),
    [
        ("secrets", "s3", None, "no s3 in namespace guardloop"),
        ("secrets", "s3", {"data": {"accesskey": "QQ=="}}, "lacks secretkey"),
        ("secrets", "pull", None, "no pull"),
        ("configmaps", "settings", {"data": None}, "lacks a"),
        ("persistentvolumeclaims", "models", None, "no models"),
        ("persistentvolumeclaims", "models", {"status": {"phase": "Lost"}}, "models is Lost"),
        ("serviceaccounts", "runner", None, "no runner"),
    ],
)
def test_what_is_missing_is_named(
    look: Look, kubernetes: Kubernetes, kind: str, name: str, content: dict[str, Any] | None, words: str
) -> None:
    del kubernetes.objects[kind][name]
    if content is not None:
        kubernetes.add(kind, name, **content)

    found = look(package(pods=PODS), namespace="guardloop", account="runner")
    (failed,) = [check for check in found.values() if check.verdict == "failed"]

    assert words in failed.found and "QQ==" not in str(found)


def test_kubernetes_that_cannot_be_asked(
    look: Look, kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kubernetes.status = 403
    forbidden = look(package(pods=PODS), namespace="guardloop")["secrets, volumes"]
    nowhere = look(package(pods=PODS))["secrets, volumes"]
    (tmp_path / "kubeconfig").write_text("contexts: 3")
    damaged = look(package(pods=PODS), namespace="guardloop")["secrets, volumes"]
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    unknown = look(package(pods=PODS), namespace="guardloop")["secrets, volumes"]

    assert {c.verdict for c in (forbidden, nowhere, damaged, unknown)} == {"not checked"}
    assert "answered 403" in forbidden.found and "no namespace" in nowhere.found
    assert "no Kubernetes credentials" in unknown.found and "secret s3" in unknown.found


# Models and data


def hub_checks(settings: dict[str, Any]) -> list[Check]:
    return hub_models(Settings.model_validate(settings))


def test_access_to_gated_models_and_data(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "guard": {"base": "meta-llama/LlamaGuard-7b", "family": "llama-guard-1"},
        "responders": [{"model": "ada/no-such-model"}],
        "dataset": {"traffic": {"kind": "hub", "path": "lmsys/toxic-chat"}},
        "evaluation": {"benchmarks": ["wildguardtest", "xstest"]},
    }
    gated = {"meta-llama/LlamaGuard-7b", "allenai/wildguardmix"}
    with Hub({"lmsys/toxic-chat", "Paul/XSTest"}, gated, "hf_ada") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_ada")
        found = hub_checks(settings)

    by_words = {check.found.replace(":", " ").split()[0]: check for check in found}
    assert by_words["meta-llama/LlamaGuard-7b"].verdict == "failed"
    assert "huggingface.co/meta-llama/LlamaGuard-7b" in by_words["meta-llama/LlamaGuard-7b"].remedy
    assert by_words["ada/no-such-model"].verdict == by_words["allenai/wildguardmix"].verdict == "failed"
    assert by_words["Paul/XSTest"].verdict == "ok"
    assert by_words["lmsys/toxic-chat"].verdict == "ok" and by_words["lmsys/toxic-chat"].name == "hub dataset"


def test_a_hub_that_is_away_says_nothing_of_access(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"guard": {"base": "meta-llama/LlamaGuard-7b", "family": "llama-guard-1"}}
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:9")
    (away,) = hub_checks(settings)

    class Failing(SmallServer):
        def reply(self, *_: Any) -> tuple[int, dict[str, str], Any]:
            return 418, {}, {}

    with Failing() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        (failing,) = hub_checks(settings)

    assert away.verdict == failing.verdict == "not checked"
    assert "cannot be reached" in away.found and "418" in failing.found


def test_models_that_no_hub_has_are_not_asked_for(look: Look) -> None:
    settings = {"responders": [{"kind": "openai", "model": "org/model", "base_url": "https://host/v1"}]}

    assert look(settings=settings)["hub"].verdict == "ok"


def test_files_of_this_machine_are_not_on_the_cluster(look: Look) -> None:
    traffic = {"kind": "file", "path": "prompts.jsonl"}
    test = {"kind": "file", "path": "/data/test.jsonl"}
    benchmark = {"name": "ours", "kind": "safe", "source": {"kind": "file", "path": "safe.csv"}}
    found = look(
        settings={
            "dataset": {"traffic": traffic, "test": test},
            "guard": {"base": "./my-guard"},
            "responders": [{"model": "./my-responder"}],
            "evaluation": {"benchmarks": [benchmark]},
        }
    )

    places = ("dataset.traffic", "guard.base", "responders: ./my-responder", "benchmark ours")
    assert {found[place].verdict for place in places} == {"failed"}
    assert found["dataset.test"].verdict == "not checked" and "s3://" in found["dataset.traffic"].remedy


# Addresses that only the cluster reaches


def test_what_only_the_cluster_reaches_does_not_keep_a_run_back(look: Look, kubernetes: Kubernetes) -> None:
    """The documented way on minikube: MLflow and the store are services of the cluster."""
    kubernetes.add("configmaps", "places", data={"mlflow": "http://mlflow.guardloop:9", "s3": "http://seaweedfs:9000"})
    places = {"mlflow": "MLFLOW_TRACKING_URI", "s3": "AWS_ENDPOINT_URL_S3"}
    keys = [{"configMapKey": key, "envVar": variable} for key, variable in places.items()]
    stages = package(pods={"configMapAsEnv": [{"configMapName": "places", "keyToEnv": keys}]})
    data = {"kind": "file", "path": "s3://guardloop/traffic.jsonl"}

    found = look(stages, {"dataset": {"traffic": data}}, namespace="guardloop", pipeline_root="s3://guardloop/runs")

    names = ("MLflow", "dataset.traffic", "artifact store")
    assert {found[name].verdict for name in names} == {"not checked"}
    assert "kubectl -n guardloop run guardloop-ask" in found["MLflow"].remedy
    assert "http://mlflow.guardloop:9/health" in found["MLflow"].remedy
    assert "http://seaweedfs:9000" in found["artifact store"].found
    assert "port-forward" in found["dataset.traffic"].remedy
    assert not [check for check in found.values() if check.verdict == "failed"]


# Stores


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as running:
        yield running


def test_the_artifact_store_is_written_to(look: Look, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = look(pipeline_root="s3://guardloop/runs")["artifact store"]
    for name, value in s3.client_environment.items():
        monkeypatch.setenv(name, value)
    fine = look(pipeline_root="s3://guardloop/runs")["artifact store"]
    missing = look(pipeline_root="s3://no-such-bucket/runs")["artifact store"]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused = look(pipeline_root="s3://guardloop/runs")["artifact store"]

    assert (unknown.verdict, fine.verdict) == ("not checked", "ok")
    assert missing.verdict == refused.verdict == "failed"
    assert "no such bucket" in missing.found and "access refused" in refused.found
    assert (s3.files / "guardloop" / "runs").is_dir()


@pytest.mark.slow
def test_data_on_s3(look: Look, s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in s3.client_environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "there.jsonl").write_text("{}")
    put(tmp_path / "there.jsonl", "s3://guardloop/there.jsonl")
    parts = {part: {"kind": "file", "path": f"s3://guardloop/{part}.jsonl"} for part in ("traffic", "test")}
    parts["traffic"]["path"] = "s3://guardloop/there.jsonl"

    found = look(settings={"dataset": parts})

    assert found["dataset.traffic"].verdict == "ok"
    assert (
        found["dataset.test"].verdict == "failed"
        and "nothing at s3://guardloop/test.jsonl" in found["dataset.test"].found
    )


class Mlflow(SmallServer):
    status = 200

    def reply(self, path: str, query: dict[str, str], headers: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        return (self.status if path == "/health" else 404), {}, "OK"


def test_mlflow(look: Look) -> None:
    with Mlflow() as mlflow:
        stages = package("screen:abc", MLFLOW_TRACKING_URI=mlflow.url)
        well = look(stages)["MLflow"]
        mlflow.status = 401
        login = look(stages)["MLflow"]
        mlflow.status = 503
        ill = look(stages)["MLflow"]
    away = look(stages)["MLflow"]
    inside = look(package("screen:abc", MLFLOW_TRACKING_URI="http://mlflow.guardloop.svc:5000"))["MLflow"]
    file = look(package("screen:abc", MLFLOW_TRACKING_URI="sqlite:///mine.db"))["MLflow"]

    assert well.verdict == login.verdict == "ok"
    assert file.verdict == "failed" and "a server that stages reach" in file.remedy
    assert ill.verdict == "failed" and "503" in ill.found
    assert away.verdict == inside.verdict == "not checked" and "ask from within: kubectl" in away.remedy


def test_what_the_cluster_says_of_its_own_services(look: Look, kubernetes: Kubernetes) -> None:
    kubernetes.add("configmaps", "kfp-launcher", data={"defaultPipelineRoot": "minio://mlpipeline/v2/artifacts"})
    keys = [{"configMapKey": "tracking", "envVar": "MLFLOW_TRACKING_URI"}]
    pods = {"configMapAsEnv": [{"configMapName": "places", "keyToEnv": keys}]}
    with Mlflow() as mlflow:
        kubernetes.add("configmaps", "places", data={"tracking": mlflow.url})
        found = look(package("screen:abc", pods), namespace="guardloop")
        hidden = look(package("screen:abc", pods))

    assert "minio://mlpipeline/v2/artifacts" in found["artifact store"].found
    assert found["artifact store"].verdict == hidden["MLflow"].verdict == "not checked"
    assert found["MLflow"] == Check("MLflow", "ok", f"{mlflow.url} answers")
