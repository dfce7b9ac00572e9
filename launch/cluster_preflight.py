"""What is checked before a run is submitted, so that it does not fail an hour later on the cluster.

Each check ends as ok, failed, or not checked: what cannot be seen from this machine is never called ok.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from urllib.parse import urlsplit

import requests
import yaml
from rich.markup import escape
from rich.table import Table

from guardloop.config import Settings
from guardloop.errors import GuardLoopError
from guardloop.storage import exists, put, without_secrets
from launch.cluster import Cluster
from launch.image_check import NotCheckedError, image_exists
from launch.namespace import Namespace, NoAccessError

Verdict = Literal["ok", "failed", "not checked"]
TIMEOUT = (5, 20)
MARKER = ".guardloop-preflight"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what was found, and how to mend it."""

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Package:
    """What a compiled pipeline needs of the cluster it runs on."""

    spec: dict[str, Any]
    platform: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Package":
        """Read a compiled pipeline, with its platform part where it has one."""
        spec, *rest = yaml.safe_load_all(path.read_text("utf-8"))
        return cls(spec, rest[0] if rest else {})

    @property
    def name(self) -> str:
        """The pipeline's name."""
        return str(self.spec["pipelineInfo"]["name"])

    def images(self) -> list[str]:
        """The images of its stages."""
        containers = [e.get("container", {}) for e in self.spec.get("deploymentSpec", {}).get("executors", {}).values()]
        return sorted({container["image"] for container in containers if container.get("image")})

    def variable(self, name: str) -> str | None:
        """The value of an environment variable of the stages, where it is written in the package."""
        for executor in self.spec.get("deploymentSpec", {}).get("executors", {}).values():
            for variable in executor.get("container", {}).get("env", []):
                if variable["name"] == name and variable.get("value"):
                    return str(variable["value"])
        return None

    def config_key(self, variable: str) -> tuple[str, str] | None:
        """The config map, and its key, that an environment variable of the stages comes from."""
        for executor in self._pods():
            for use in executor.get("configMapAsEnv", []):
                for entry in use.get("keyToEnv", []):
                    if entry.get("envVar") == variable and use.get("configMapName"):
                        return use["configMapName"], entry["configMapKey"]
        return None

    def objects(self) -> Iterator[tuple[str, str, set[str]]]:
        """(kind, name, keys) of the secrets, config maps and volumes without which a stage does not start."""
        for executor in self._pods():
            for kind, field, given, key in (
                ("secret", "secretAsEnv", "secretName", "secretKey"),
                ("secret", "secretAsVolume", "secretName", ""),
                ("secret", "imagePullSecret", "secretName", ""),
                ("config map", "configMapAsEnv", "configMapName", "configMapKey"),
                ("config map", "configMapAsVolume", "configMapName", ""),
                ("volume claim", "pvcMount", "constant", ""),
            ):
                for use in executor.get(field, []):
                    if use.get(given) and not use.get("optional"):
                        yield kind, use[given], {entry[key] for entry in use.get("keyToEnv", []) if key}

    def _pods(self) -> Iterable[dict[str, Any]]:
        kubernetes = self.platform.get("platforms", {}).get("kubernetes", {})
        return kubernetes.get("deploymentSpec", {}).get("executors", {}).values()


def check_all(cluster: Cluster, package: Package, settings: Settings) -> list[Check]:
    """Look at everything that the run will need. Nothing is raised: every finding is a Check."""
    checks: list[Callable[[], list[Check]]] = [
        lambda: _api(cluster),
        lambda: _images(package),
        lambda: _objects(cluster, package),
        lambda: _models(settings),
        lambda: _data(settings),
        lambda: [_artifacts(cluster)],
        lambda: [_mlflow(settings, package, cluster)],
    ]
    with ThreadPoolExecutor(len(checks)) as workers:  # each waits for another server
        return [check for found in workers.map(lambda check: check(), checks) for check in found]


def table(checks: list[Check]) -> Table:
    """The findings, and how to mend what is not ok."""
    marks = {"ok": "[green]ok[/]", "failed": "[red]failed[/]", "not checked": "[yellow]not checked[/]"}
    shown = Table("check", "", box=None, pad_edge=False, header_style="bold")
    shown.add_column("found", overflow="fold")
    for check in checks:
        remedy = f"\n[dim]-> {escape(check.remedy)}[/]" if check.remedy and check.verdict != "ok" else ""
        shown.add_row(escape(check.name), marks[check.verdict], escape(check.found) + remedy)
    return shown


def _failed(name: str, error: GuardLoopError) -> Check:
    return Check(name, "failed", error.what, error.remedy)


def _api(cluster: Cluster) -> list[Check]:
    name, access = "Kubeflow Pipelines", "access"
    try:
        about = cluster.about()
    except GuardLoopError as error:
        return [_failed(name, error), Check(access, "not checked", "the host comes first")]
    users = "users kept apart" if about.multi_user else "single user"
    checks = [Check(name, "ok", f"{cluster.target.host}, version {about.version}, {users}")]
    try:
        cluster.check_access()
    except GuardLoopError as error:
        return [*checks, _failed(access, error)]
    where = f" in {cluster.target.namespace}" if about.multi_user else ""
    return [*checks, Check(access, "ok", f"runs{where} can be listed with {cluster.target.credentials}")]


def _images(package: Package) -> list[Check]:
    present, missing, unknown = [], [], {}
    for image in package.images():
        try:
            (present if image_exists(image) else missing).append(image)
        except NotCheckedError as error:
            unknown.setdefault((error.what.replace(image, "an image"), error.remedy), []).append(image)
    checks = [Check("images", "ok", f"{len(present)} in the registry")] if present else []
    if missing:
        remedy = "`make images`, then `make push REGISTRY=...`, from the commit that is submitted"
        checks.append(Check("images", "failed", f"not in the registry: {_in_short(missing)}", remedy))
    for (why, remedy), images in unknown.items():
        checks.append(Check("images", "not checked", f"{why}: {_in_short(images)}", remedy))
    return checks


def _in_short(images: list[str]) -> str:
    """registry/{one,another}:tag where registry and tag are the same for all."""
    parts = [re.fullmatch(r"(.*/)([^/:@]+)(.*)", image) for image in images]
    alike = {(part[1], part[3]) for part in parts if part}
    if len(images) < 2 or not all(parts) or len(alike) > 1:
        return ", ".join(images)
    ((registry, tag),) = alike
    return f"{registry}{{{','.join(part[2] for part in parts if part)}}}{tag}"


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


def _models(settings: Settings) -> list[Check]:
    """Whether this machine's hub token may read the models and data sets of the hub that the settings name."""
    repositories = list(dict.fromkeys(_repositories(settings)))
    checks = []
    for kind, name in repositories:
        verdict, found, remedy = _hub_access(kind, name)
        checks.append(Check(f"hub {kind}", verdict, found, remedy))
    return checks or [Check("hub", "ok", "no model or data set of the hub is used")]


def _repositories(settings: Settings) -> Iterator[tuple[str, str]]:
    models = [settings.guard.base] + [settings.responder.model] * (settings.responder.kind != "openai")
    for model in models:
        if not model.startswith(("embedded:", ".", "/", "~")) and model.count("/") == 1:
            yield "model", model
    for _, source in _sources(settings):
        if source.kind == "hub":
            yield "dataset", source.path


def _hub_access(kind: str, name: str) -> tuple[Verdict, str, str]:
    from huggingface_hub import HfApi  # noqa: PLC0415  (takes a second to import)
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError  # noqa: PLC0415

    page = f"huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    try:
        HfApi(endpoint=os.environ.get("HF_ENDPOINT")).auth_check(name, repo_type=kind)
    except GatedRepoError:
        remedy = (
            f"accept its terms at {page} with the account whose token the cluster's secret holds; set HF_TOKEN here"
        )
        return "failed", f"{name}: this machine's token has no access to it", remedy
    except RepositoryNotFoundError:
        return "failed", f"{name}: the hub has none, or hides it from this token", "check the id and HF_TOKEN"
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        return "not checked", f"{name}: the hub answered {status}", "check HF_TOKEN, or try again later"
    except Exception as error:  # noqa: BLE001  (the hub's HTTP library has errors of its own kind for its network)
        return (
            "not checked",
            f"{name}: the hub cannot be reached from here ({type(error).__name__})",
            "check HF_ENDPOINT",
        )
    return "ok", f"{name} can be read with this machine's token", ""


def _sources(settings: Settings) -> Iterator[tuple[str, Any]]:
    for part in ("traffic", "test", "agent"):
        if (source := getattr(settings.dataset, part)) is not None:
            yield f"dataset.{part}", source


def _data(settings: Settings) -> list[Check]:
    """Files that the stages will read: those of this machine are not on the cluster."""
    checks = []
    paths = [(where, source.path) for where, source in _sources(settings) if source.kind == "file"]
    paths += [("guard.policy", settings.guard.policy)] if settings.guard.policy else []
    paths += [("guard.adapter", settings.guard.adapter)] if settings.guard.adapter else []
    for where, model in (("guard.base", settings.guard.base), ("responder.model", settings.responder.model)):
        paths += [(where, model)] if model.startswith((".", "/", "~")) else []
    for where, path in paths:
        if path.startswith("models:/"):
            continue
        if path.startswith("s3://"):
            checks.append(_object_exists(where, path))
        elif path.startswith("/"):
            remedy = "mount a volume with it into the stages, or put it on s3://"
            checks.append(Check(where, "not checked", f"{path} must be in the stages' containers", remedy))
        else:
            remedy = "put it on s3://, or name the place in the stages' containers where it is mounted"
            checks.append(Check(where, "failed", f"{path} is a place on this machine, not on the cluster", remedy))
    return checks


def _object_exists(where: str, uri: str) -> Check:
    if not _has_s3_credentials():
        return Check(where, "not checked", f"{uri}: no S3 credentials on this machine", "set AWS_ACCESS_KEY_ID, ...")
    try:
        if exists(uri):
            return Check(where, "ok", f"{uri} is there")
    except GuardLoopError as error:
        return _failed(where, error)
    return Check(where, "failed", f"there is nothing at {uri}", "check the address")


def _artifacts(cluster: Cluster) -> Check:
    """Whether the place of the artifacts can be written with this machine's credentials."""
    name, root = "artifact store", cluster.target.pipeline_root
    if not root:
        own = _config_value(cluster, "kfp-launcher", "defaultPipelineRoot") or "the cluster's own place"
        remedy = "name a place in kubeflow.pipeline_root to have it checked"
        return Check(name, "not checked", f"{own} is used, with the cluster's credentials", remedy)
    if not root.startswith("s3://"):
        return Check(name, "not checked", f"{root}: only s3:// can be checked from here")
    if not _has_s3_credentials():
        return Check(
            name, "not checked", f"{root}: no S3 credentials on this machine", "set AWS_ACCESS_KEY_ID and the others"
        )
    try:
        with TemporaryDirectory() as folder:
            marker = Path(folder, MARKER)
            marker.write_text("GuardLoop checked that this can be written.\n", "utf-8")
            put(marker, f"{root.rstrip('/')}/{MARKER}")
    except GuardLoopError as error:
        return _failed(name, error)
    return Check(name, "ok", f"{root} can be written with this machine's credentials")


def _config_value(cluster: Cluster, config_map: str, key: str) -> str | None:
    """A value of a config map in the runs' namespace, or None where it cannot be seen."""
    if not cluster.target.namespace:
        return None
    try:
        return Namespace(cluster.target.namespace).config_map(config_map).get(key)
    except NoAccessError:
        return None


def _has_s3_credentials() -> bool:
    import boto3  # noqa: PLC0415
    from botocore.exceptions import BotoCoreError  # noqa: PLC0415

    try:
        return boto3.session.Session().get_credentials() is not None
    except BotoCoreError:
        return False


def _mlflow(settings: Settings, package: Package, cluster: Cluster) -> Check:
    name, uri = "MLflow", settings.registry.tracking_uri or package.variable("MLFLOW_TRACKING_URI")
    if not uri and (source := package.config_key("MLFLOW_TRACKING_URI")):
        uri = _config_value(cluster, *source)
    if not uri:
        return Check(name, "not checked", "its address is the cluster's business", "name it in registry.tracking_uri")
    place = without_secrets(uri)
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        remedy = "set registry.tracking_uri to an MLflow server that the stages reach"
        return Check(name, "failed", f"{place}: the stages share no file or database of this machine", remedy)
    try:
        status = requests.get(f"{uri.rstrip('/')}/health", timeout=TIMEOUT).status_code
    except requests.exceptions.SSLError:
        remedy = "set REQUESTS_CA_BUNDLE to the file of its authority"
        return Check(name, "failed", f"{place}: its TLS certificate is not trusted", remedy)
    except (requests.RequestException, ValueError):
        host = parts.hostname or ""
        inside = host != "localhost" and ("." not in host or host.endswith((".svc", ".svc.cluster.local")))
        found = f"{place} {'is a service of the cluster, not reached from here' if inside else 'does not answer'}"
        remedy = "check the address, and that the server runs"
        return Check(name, "not checked" if inside else "failed", found, remedy)
    known = {200: f"{place} answers", 401: f"{place} answers, and asks for a login"}  # the stages have their own
    remedy = "" if status in known else "check the address, and the server's log"
    return Check(name, "failed" if remedy else "ok", known.get(status, f"{place} answered {status} to /health"), remedy)
