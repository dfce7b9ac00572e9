"""What is laid over KFP's own manifests. They come from its repository, so a sketch of the parts that are changed
stands in for them here."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from support.overlays import MANIFESTS, PLATFORM_OF, ROOT, VERSIONS, Overlay, render

from scripts.locked import read_lock

KFP = MANIFESTS / "kfp"
SECRET = "mlpipeline-minio-artifact"
KEY_FORMAT = (  # of KFP 2.17's controller
    "private-artifacts/{{workflow.namespace}}/{{workflow.name}}/{{workflow.creationTimestamp.Y}}"
    "/{{workflow.creationTimestamp.m}}/{{workflow.creationTimestamp.d}}/{{pod.name}}"
)


def _deployment(name: str, container: str, **env: str) -> dict[str, Any]:
    variables = [{"name": key, "value": value} for key, value in env.items()]
    pod = {"metadata": {"labels": {"app": name}}, "spec": {"containers": [{"name": container, "env": variables}]}}
    spec = {"selector": {"matchLabels": {"app": name}}, "template": pod}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": spec}


def _named(api: str, kind: str, name: str, **values: Any) -> dict[str, Any]:
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name, "namespace": "kubeflow"}, **values}


SKETCH = [
    _deployment(
        "ml-pipeline", "ml-pipeline-api-server", COMPILED_PIPELINE_SPEC_PATCH="{}", OBJECTSTORECONFIG_PORT="9000"
    ),
    _deployment("ml-pipeline-ui", "ml-pipeline-ui", MINIO_HOST="seaweedfs"),
    {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "workflow-controller-configmap"},
        "data": {
            "executor": "imagePullPolicy: Always",
            "artifactRepository": f"s3: {{keyFormat: '{KEY_FORMAT}'}}",
            "workflowDefaults": "spec: {}",
        },
    },
    {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "pipeline-install-config"},
        "data": {"bucketName": "mlpipeline", "appName": "kept"},
    },
    _named("v1", "ConfigMap", "kfp-launcher", data={"defaultPipelineRoot": ""}),
    _named("apps/v1", "Deployment", "seaweedfs", spec={}),
    *(_named("v1", kind, "seaweedfs") for kind in ("Service", "ServiceAccount")),
    _named("v1", "PersistentVolumeClaim", "seaweedfs-pvc"),
    _named("networking.k8s.io/v1", "NetworkPolicy", "seaweedfs"),
    _named("v1", "Secret", SECRET, stringData={"accesskey": "minio"}),
]


@pytest.fixture(scope="module", params=["minikube", "cluster"])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """(name, objects by kind/name) of KFP as manifests/kfp/NAME installs it, on the sketch."""
    folder = tmp_path_factory.mktemp("kfp")
    shutil.copytree(KFP, folder / "kfp")
    (folder / "sketch.yaml").write_text(yaml.safe_dump_all(SKETCH))
    path = folder / "kfp" / request.param / "kustomization.yaml"
    kustomization = yaml.safe_load(path.read_text())
    shutil.copy(folder / "sketch.yaml", path.parent)
    path.write_text(yaml.safe_dump({**kustomization, "resources": ["sketch.yaml"]}))
    return request.param, {f"{o['kind']}/{o['metadata']['name']}": o for o in render(path.parent)}


def test_the_release_is_that_of_the_sdk() -> None:
    version = next(package.version for package in read_lock() if package.name == "kfp")
    for path in KFP.glob("*/kustomization.yaml"):
        (remote,) = yaml.safe_load(path.read_text())["resources"]
        assert f"?ref={version}&" in remote, path


def test_what_is_changed_stays_valid(installed: tuple[str, dict[str, Any]]) -> None:
    changed = [o for key, o in installed[1].items() if key.startswith(("ConfigMap/", "Deployment/ml-pipeline"))]

    assert len(changed) == 4
    for found in changed:
        for version in VERSIONS:
            kubernetes_validate.validate(found, version, strict=True)


def test_no_retries_are_laid_round_every_driver_and_graph(installed: tuple[str, dict[str, Any]]) -> None:
    data = installed[1]["ConfigMap/workflow-controller-configmap"]["data"]
    spec = yaml.safe_load(data["workflowDefaults"])["spec"]

    assert "templateDefaults" not in spec  # half of a workflow's size; stages have their own


def test_argos_own_containers_are_small_and_restricted(installed: tuple[str, dict[str, Any]]) -> None:
    executor = yaml.safe_load(installed[1]["ConfigMap/workflow-controller-configmap"]["data"]["executor"])
    context = executor["securityContext"]

    assert executor["resources"].keys() == {"requests", "limits"}  # the quota of the runs refuses pods without
    assert context["runAsNonRoot"] and not context["allowPrivilegeEscalation"]
    assert context["capabilities"] == {"drop": ["ALL"]} and context["seccompProfile"] == {"type": "RuntimeDefault"}


def test_finished_workflows_and_pods_are_cleared_away(installed: tuple[str, dict[str, Any]]) -> None:
    data = installed[1]["ConfigMap/workflow-controller-configmap"]["data"]
    spec = yaml.safe_load(data["workflowDefaults"])["spec"]

    assert spec["ttlStrategy"]["secondsAfterCompletion"] > 3600  # KFP's agent has long recorded the end by then
    assert spec["podGC"]["strategy"] == "OnWorkflowCompletion"


def test_runs_get_a_priority_that_comes_with_the_patch_and_pushes_nothing_out(
    installed: tuple[str, dict[str, Any]],
) -> None:
    priority = installed[1][f"PriorityClass/{_patch(installed[1])['podPriorityClassName']}"]

    assert priority["preemptionPolicy"] == "Never" and not priority.get("globalDefault")
    for version in VERSIONS:
        kubernetes_validate.validate(priority, version, strict=True)
    for overlay in map(Overlay, PLATFORM_OF):
        (services,) = overlay.all("PriorityClass")  # the other one has an owner already
        assert priority["value"] < services["value"] and priority["metadata"]["name"] != services["metadata"]["name"]


def test_each_object_has_one_owner_whatever_is_applied_last(installed: tuple[str, dict[str, Any]]) -> None:
    name, kfp = installed
    ours = {f"{found['kind']}/{found['metadata']['name']}" for found in Overlay(name).objects}

    assert "ConfigMap/kfp-launcher" in ours
    assert not ours & kfp.keys()


def test_pods_of_a_run_meet_the_restricted_standard_with_a_read_only_root(
    installed: tuple[str, dict[str, Any]],
) -> None:
    """The recorded pod of a stage, as KFP 2.17 makes it, under the patch and what our compiled pipeline asks for."""
    recorded = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    recorded["seccompProfile"] = {"type": "RuntimeDefault"}
    patch = json.loads(_patch(installed[1])["podSpecPatch"])
    (main,) = patch["containers"]
    context = recorded | {"runAsNonRoot": True, "runAsUser": 10001} | main["securityContext"]
    container = {"name": "main", "image": "a/b:1", "securityContext": context, "volumeMounts": main["volumeMounts"]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}}
    pod["spec"] = {"containers": [container], "volumes": patch["volumes"]}

    assert "{{" not in json.dumps(patch, separators=(",", ":"))  # Argo would read it as a variable
    assert context["readOnlyRootFilesystem"] is True
    assert [mount["mountPath"] for mount in main["volumeMounts"]] == ["/tmp"]  # the images' HOME
    for version in VERSIONS:
        kubernetes_validate.validate(pod, version, strict=True)


def test_kfps_own_mlflow_plugin_stays_off(installed: tuple[str, dict[str, Any]]) -> None:
    texts = [json.dumps(found) for found in (*installed[1].values(), *Overlay(installed[0]).objects)]

    assert not [text for text in texts if "plugins.mlflow" in text.lower() or "PLUGINS_MLFLOW" in text]


def test_the_ui_looks_for_logs_where_the_controller_archives_them(installed: tuple[str, dict[str, Any]]) -> None:
    name, objects = installed
    ui = _environment(objects["Deployment/ml-pipeline-ui"])
    argo = yaml.safe_load(objects["ConfigMap/workflow-controller-configmap"]["data"]["artifactRepository"])["s3"]

    assert ui["ARGO_KEYFORMAT"] == argo["keyFormat"]
    if name == "cluster":
        assert (ui["ARGO_ARCHIVE_ARTIFACTORY"], ui["ARGO_ARCHIVE_BUCKETNAME"]) == ("s3", argo["bucket"])


def test_an_existing_s3_is_named_alike_in_all_its_places(installed: tuple[str, dict[str, Any]]) -> None:
    name, objects = installed
    if name == "minikube":
        assert "Deployment/seaweedfs" in objects and f"Secret/{SECRET}" in objects
        return
    overlay = Overlay("cluster")
    launcher = overlay.one("ConfigMap", "kfp-launcher")["data"]
    store = yaml.safe_load(launcher["providers"])["s3"]["default"]
    api = _environment(objects["Deployment/ml-pipeline"])
    ui = _environment(objects["Deployment/ml-pipeline-ui"])
    argo = yaml.safe_load(objects["ConfigMap/workflow-controller-configmap"]["data"]["artifactRepository"])["s3"]
    install = objects["ConfigMap/pipeline-install-config"]["data"]

    assert {store["endpoint"]} == {api["OBJECTSTORECONFIG_HOST"], argo["endpoint"], ui["AWS_S3_ENDPOINT"]}
    assert {store["region"]} == {api["OBJECTSTORECONFIG_REGION"], argo["region"], ui["AWS_REGION"]}
    assert api["OBJECTSTORECONFIG_SECURE"] == ui["AWS_SSL"] == "true"
    assert not argo["insecure"] and not store["disableSSL"]
    assert api["OBJECTSTORECONFIG_PORT"] == "443"
    assert launcher["defaultPipelineRoot"] == install["defaultPipelineRoot"]
    assert (
        launcher["defaultPipelineRoot"].startswith(f"s3://{argo['bucket']}/")
        and install["bucketName"] == argo["bucket"]
    )
    assert argo["accessKeySecret"]["name"] == ui["AWS_ACCESS_KEY_ID"]["secretKeyRef"]["name"] == SECRET
    assert not [key for key in objects if "seaweedfs" in key or key == f"Secret/{SECRET}"]


def test_the_lifecycle_rule_clears_artifacts_and_logs_and_spares_mlflow(overlay: Overlay) -> None:
    rules = json.loads((KFP / "bucket-lifecycle.json").read_text())["Rules"]
    prefixes = {rule["Filter"]["Prefix"] for rule in rules}
    bucket, _, root = (
        overlay.one("ConfigMap", "kfp-launcher")["data"]["defaultPipelineRoot"].partition("://")[2].partition("/")
    )
    mlflow = overlay.one("ConfigMap", "mlflow")["data"]["MLFLOW_ARTIFACTS_DESTINATION"].removeprefix("s3://")

    assert prefixes == {f"{root}/", "private-artifacts/"}
    assert all(rule["Expiration"]["Days"] >= 90 for rule in rules)
    assert not any(f"{mlflow}/".startswith(f"{bucket}/{prefix}") for prefix in prefixes)


def test_git_ignores_filled_in_secrets() -> None:
    path = Path("manifests/overlays/cluster/secrets.yaml")
    done = subprocess.run(["git", "check-ignore", str(path)], cwd=ROOT, capture_output=True, check=False)

    assert done.returncode == 0


def test_the_page_makes_each_namespace_before_the_secrets_in_it() -> None:
    steps = re.findall(r"kubectl apply -[fk] (manifests/\S+)", (ROOT / "docs" / "kubernetes.md").read_text())
    before = steps[: steps.index("manifests/overlays/cluster/secrets.yaml")]
    made = {o["metadata"]["name"] for step in before if step.endswith(".yaml") for o in _objects(ROOT / step)}
    made |= {"kubeflow"} if "manifests/kfp/cluster-scoped" in before else set()  # KFP's own makes it

    assert {secret["metadata"]["namespace"] for secret in Overlay("cluster").examples} <= made


def _objects(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text("utf-8")))


def _patch(objects: dict[str, Any]) -> dict[str, Any]:
    """What KFP merges into the spec of every workflow."""
    return json.loads(_environment(objects["Deployment/ml-pipeline"])["COMPILED_PIPELINE_SPEC_PATCH"])


def _environment(deployment: dict[str, Any]) -> dict[str, Any]:
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return {v["name"]: v.get("value", v.get("valueFrom")) for v in container["env"]}
