"""What is checked before a run is submitted, so that it does not fail an hour later on the cluster."""

import ipaddress
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from guardloop.config import Settings
from guardloop.core.errors import GuardLoopError
from guardloop.core.storage import put
from guardloop.core.text import without_secrets
from launch.checks.check import (
    Check,
    failed,
    has_s3_credentials,
    hub_models,
    kubeflow,
    look,
    mlflow_server,
    s3_object,
)
from launch.checks.images import check_images
from launch.kubeflow.cluster import Cluster
from launch.kubeflow.namespace import Namespace, NoAccessError
from launch.kubeflow.package import Package

MARKER = ".guardloop-preflight"
STORE_ADDRESS = "AWS_ENDPOINT_URL_S3"
THEIR_STORE = (
    f"to have it checked, set {STORE_ADDRESS} and its keys here; `kubectl port-forward` reaches a store within"
)


def check_all(cluster: Cluster, package: Package, settings: Settings) -> list[Check]:
    """Look at everything that the run will need. Nothing is raised: every finding is a Check."""
    return look(
        [
            lambda: kubeflow(cluster),
            lambda: check_images(package.images()),
            lambda: _objects(cluster, package),
            lambda: hub_models(settings),
            lambda: _endpoints(settings, package, cluster),
            lambda: _data(settings, _other_store(package, cluster)),
            lambda: [_artifacts(cluster, _other_store(package, cluster))],
            lambda: [_mlflow(package, cluster)],
        ]
    )


def _objects(cluster: Cluster, package: Package) -> list[Check]:
    needed: dict[tuple[str, str], set[str]] = {}
    for kind, name, keys in package.objects():
        needed.setdefault((kind, name), set()).update(keys)
    account = cluster.target.service_account
    if account:
        needed["service account", account] = set()
    if not needed:
        return [Check("secrets, volumes", "ok", "the stages ask for none")]
    words = ", ".join(f"{kind} {name}" for kind, name in needed)
    if not cluster.target.namespace:
        return [Check("secrets, volumes", "not checked", f"no namespace is named: {words}", "give --namespace")]
    try:
        namespace = Namespace(cluster.target.namespace)
        checks = [_object(namespace, kind, name, keys) for (kind, name), keys in needed.items()]
    except NoAccessError as error:
        return [Check("secrets, volumes", "not checked", f"{error.what}: {words}", error.remedy)]
    wrong = [check for check in checks if check.verdict != "ok"]
    return wrong or [Check("secrets, volumes", "ok", f"{words} in {namespace.name} ({namespace.context})")]


def _object(namespace: Namespace, kind: str, name: str, keys: set[str]) -> Check:
    place = f"namespace {namespace.name} ({namespace.context})"
    problem = ""
    if kind == "volume claim":
        phase = namespace.claim_phase(name)
        if phase not in ("Bound", "Pending"):  # a claim may wait for its first pod
            problem = f"{name} is {phase} in {place}" if phase else f"no {name} in {place}"
    elif kind == "service account":
        problem = "" if namespace.has_service_account(name) else f"no {name} in {place}"
    else:
        there = namespace.keys(kind, name)
        lacking = ", ".join(sorted(keys - (there or set())))
        problem = f"no {name} in {place}" if there is None else f"{name} in {place} lacks {lacking}" if lacking else ""
    if problem:
        return Check(kind, "failed", problem, "create or mend it: manifests/ has an example")
    return Check(kind, "ok", name)


def _data(settings: Settings, other_store: str) -> list[Check]:
    """Files that the stages will read: those of this machine are not on the cluster."""
    checks = []
    paths = [(where, source.path) for where, source in settings.sources() if source.kind == "file"]
    paths += [("guard.policy", settings.guard.policy)] if settings.guard.policy else []
    paths += [("guard.adapter", settings.guard.adapter)] if settings.guard.adapter else []
    models = [("guard.base", settings.guard.base)]
    models += [(f"responders: {one.tag}", one.model) for one in settings.responders if one.kind != "openai"]
    paths += [(where, model) for where, model in models if model.startswith((".", "/", "~"))]
    for where, path in paths:
        if path.startswith("models:/"):
            continue
        if path.startswith("s3://") and other_store:
            checks.append(Check(where, "not checked", f"{path}: {other_store}", THEIR_STORE))
        elif path.startswith("s3://"):
            checks.append(s3_object(where, path))
        elif path.startswith("/"):
            remedy = "mount a volume with it into the stages, or put it on s3://"
            checks.append(Check(where, "not checked", f"{path} must be in the stages' containers", remedy))
        else:
            remedy = "put it on s3://, or name the place in the stages' containers where it is mounted"
            checks.append(Check(where, "failed", f"{path} is a place on this machine, not on the cluster", remedy))
    return checks


def _endpoints(settings: Settings, package: Package, cluster: Cluster) -> list[Check]:
    """Endpoints as the pods that ask them see them."""
    stage = "generate-responses"
    if not package.runs(stage):
        return []
    checks = []
    for one in settings.responders:
        if one.kind != "openai":
            continue
        name = f"responder {one.tag}"
        missing = [key for key in one.variables() if not package.gives(stage, key)]
        if _is_pod_itself(urlsplit(str(one.base_url)).hostname or ""):
            remedy = "name the endpoint in the responder's base_url as the cluster's pods reach it"
            checks.append(Check(name, "failed", f"{one.base_url}: that is the pod itself", remedy))
        elif missing:
            key = missing[0]
            remedy = f"map the key of a secret to {key} for {stage}, in cluster.secrets of the platform"
            checks.append(Check(name, "failed", f"{stage} gets no {key}, which holds the endpoint's key", remedy))
        else:
            remedy = f"ask from within: {_from_cluster(package, cluster, f'{one.base_url}/models')}"
            checks.append(Check(name, "not checked", f"{one.base_url} is asked from the cluster", remedy))
    return checks


def _is_pod_itself(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f".{host.rstrip('.')}".endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _artifacts(cluster: Cluster, other_store: str) -> Check:
    """Whether the place of the artifacts can be written with this machine's credentials."""
    name, root = "artifact store", cluster.target.pipeline_root
    if not root:
        own = _config_value(cluster, "kfp-launcher", "defaultPipelineRoot") or "the cluster's own place"
        remedy = "name a place in kubeflow.pipeline_root to have it checked"
        return Check(name, "not checked", f"{own} is used, with the cluster's credentials", remedy)
    if not root.startswith("s3://"):
        return Check(name, "not checked", f"{root}: only s3:// can be checked from here")
    if other_store:
        return Check(name, "not checked", f"{root}: {other_store}", THEIR_STORE)
    if not has_s3_credentials():
        return Check(
            name, "not checked", f"{root}: no S3 credentials on this machine", "set AWS_ACCESS_KEY_ID and the others"
        )
    try:
        with TemporaryDirectory() as folder:
            marker = Path(folder, MARKER)
            marker.write_text("GuardLoop checked that this can be written.\n", "utf-8")
            put(marker, f"{root.rstrip('/')}/{MARKER}")
    except GuardLoopError as error:
        return failed(name, error)
    return Check(name, "ok", f"{root} can be written with this machine's credentials")


def _other_store(package: Package, cluster: Cluster) -> str:
    """In words, that the stages use another object store than this machine; empty where it is the same one."""
    uri = package.variable(STORE_ADDRESS)
    source = package.config_key(STORE_ADDRESS)
    if not uri and not source:
        return ""
    uri = uri or (source and _config_value(cluster, *source))
    here = os.environ.get(STORE_ADDRESS) or os.environ.get("AWS_ENDPOINT_URL")
    if uri == here or (uri is None and here):
        return ""
    return f"the stages use the store {f'at {without_secrets(uri)}' if uri else 'that their config map names'}"


def _from_cluster(package: Package, cluster: Cluster, url: str) -> str:
    """The command that asks a server from a pod of the cluster, in an image of ours."""
    image = next(iter(package.images()), "python:3.11")
    program = f"import urllib.request as u; print(u.urlopen('{without_secrets(url)}', timeout=20).status)"
    kubectl = f"kubectl -n {cluster.target.namespace or 'kubeflow'} run guardloop-ask --rm -i --restart=Never"
    return f'{kubectl} --image={image} -- python3 -c "{program}"'


def _config_value(cluster: Cluster, config_map: str, key: str) -> str | None:
    """A value of a config map in the runs' namespace, or None where it cannot be seen."""
    if not cluster.target.namespace:
        return None
    try:
        return Namespace(cluster.target.namespace).config_map(config_map).get(key)
    except NoAccessError:
        return None


def _mlflow(package: Package, cluster: Cluster) -> Check:
    name, uri = "MLflow", package.variable("MLFLOW_TRACKING_URI")
    if not uri and (source := package.config_key("MLFLOW_TRACKING_URI")):
        uri = _config_value(cluster, *source)
    if not uri:
        return Check(
            name,
            "not checked",
            "its address is the cluster's business",
            "set MLFLOW_TRACKING_URI in the platform's `environment`",
        )
    if urlsplit(uri).scheme not in ("http", "https"):
        remedy = "set MLFLOW_TRACKING_URI in the platform's `environment` to a server that stages reach"
        return Check(
            name, "failed", f"{without_secrets(uri)}: the stages share no file or database of this machine", remedy
        )
    return mlflow_server(uri, _from_cluster(package, cluster, f"{uri.rstrip('/')}/health"))
