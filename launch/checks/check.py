"""What a check is, how checks are shown, and those that this machine and a cluster have in common.

Each check ends as ok, failed, or not checked: what could not be seen is never called ok.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Literal

import requests
from rich.markup import escape
from rich.table import Table

from guardloop.config import Settings
from guardloop.core.errors import GuardLoopError
from guardloop.core.mlflow_server import refuse_old_server
from guardloop.core.storage import exists
from guardloop.core.text import without_secrets
from launch.kubeflow.cluster import Cluster

Verdict = Literal["ok", "failed", "not checked"]
TIMEOUT = (5, 20)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what was found, and how to mend it."""

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""

    def plain(self) -> dict[str, str]:
        """The check as JSON-ready values."""
        return asdict(self)


def look(checks: Iterable[Callable[[], list[Check]]]) -> list[Check]:
    """Run all checks side by side, since each waits for another server; the findings in the order of the checks."""
    checks = list(checks)
    with ThreadPoolExecutor(len(checks)) as workers:
        return [check for found in workers.map(lambda check: check(), checks) for check in found]


def table(checks: Iterable[Check]) -> Table:
    """The findings, and how to mend what is not ok."""
    marks = {"ok": "[green]ok[/]", "failed": "[red]failed[/]", "not checked": "[yellow]not checked[/]"}
    shown = Table("check", "", box=None, pad_edge=False, header_style="bold")
    shown.add_column("found", overflow="fold")
    for check in checks:
        remedy = f"\n[dim]-> {escape(check.remedy)}[/]" if check.remedy and check.verdict != "ok" else ""
        shown.add_row(escape(check.name), marks[check.verdict], escape(check.found) + remedy)
    return shown


def failed(name: str, error: GuardLoopError) -> Check:
    """The check that ended with this error."""
    return Check(name, "failed", error.what, error.remedy)


def failures(checks: Iterable[Check]) -> list[str]:
    """The names of the checks that failed, each once."""
    return list(dict.fromkeys(check.name for check in checks if check.verdict == "failed"))


def kubeflow(cluster: Cluster) -> list[Check]:
    """Whether Kubeflow Pipelines answers, and lets us in."""
    name, access = "Kubeflow Pipelines", "access"
    try:
        about = cluster.about()
    except GuardLoopError as error:
        return [failed(name, error), Check(access, "not checked", "the host comes first")]
    users = "users kept apart" if about.multi_user else "single user"
    checks = [Check(name, "ok", f"{cluster.target.host}, version {about.version}, {users}")]
    try:
        cluster.check_access()
    except GuardLoopError as error:
        return [*checks, failed(access, error)]
    where = f" in {cluster.target.namespace}" if about.multi_user else ""
    return [*checks, Check(access, "ok", f"runs{where} can be listed with {cluster.target.credentials}")]


def hub_models(settings: Settings) -> list[Check]:
    """Whether this machine's hub token may read the models and data sets of the hub that the settings name."""
    repositories = dict.fromkeys(hub_repositories(settings))
    checks = [Check(f"hub {kind}", *_hub_access(kind, name)) for kind, name in repositories]
    return checks or [Check("hub", "ok", "no model or data set of the hub is used")]


def hub_repositories(settings: Settings) -> Iterator[tuple[str, str]]:
    """(model or dataset, id) of everything of the hub that the settings name."""
    models = [settings.guard.base, *(one.model for one in settings.responders if one.kind != "openai")]
    for model in models:
        if not model.startswith(("embedded:", ".", "/", "~")) and model.count("/") == 1:
            yield "model", model
    for _, source in settings.sources():
        if source.kind == "hub":
            yield "dataset", source.path


def _hub_access(kind: str, name: str) -> tuple[Verdict, str, str]:
    from httpx2 import HTTPError, InvalidURL  # noqa: PLC0415
    from huggingface_hub import HfApi  # noqa: PLC0415  (takes a second to import)
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError  # noqa: PLC0415

    page = f"huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    try:
        HfApi(endpoint=os.environ.get("HF_ENDPOINT")).auth_check(name, repo_type=kind)
    except GatedRepoError:
        remedy = f"accept its terms at {page} with the account of HF_TOKEN (on a cluster, of its secret's token)"
        return "failed", f"{name}: this machine's token has no access to it", remedy
    except RepositoryNotFoundError:
        return "failed", f"{name}: the hub has none, or hides it from this token", "check the id and HF_TOKEN"
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        return "not checked", f"{name}: the hub answered {status}", "check HF_TOKEN, or try again later"
    except (HTTPError, InvalidURL, OSError) as error:
        found = f"{name}: the hub cannot be reached from here ({type(error).__name__})"
        return "not checked", found, "check the network and HF_ENDPOINT"
    return "ok", f"{name} can be read with this machine's token", ""


def s3_object(where: str, uri: str, probe: Callable[[str], object] = exists) -> Check:
    """Whether `probe` finds something at an `s3://` address, with this machine's credentials."""
    if not has_s3_credentials():
        return Check(where, "not checked", f"{uri}: no S3 credentials on this machine", "set AWS_ACCESS_KEY_ID, ...")
    try:
        if probe(uri):
            return Check(where, "ok", f"{uri} is there")
    except GuardLoopError as error:
        return failed(where, error)
    return Check(where, "failed", f"there is nothing at {uri}", "check the address")


def has_s3_credentials() -> bool:
    """Whether boto3 finds credentials on this machine."""
    import boto3  # noqa: PLC0415
    from botocore.exceptions import BotoCoreError  # noqa: PLC0415

    try:
        return boto3.session.Session().get_credentials() is not None
    except BotoCoreError:
        return False


def mlflow_server(uri: str, from_cluster: str = "") -> Check:
    """Whether the MLflow server at an http(s) address answers.

    `from_cluster` is the command that asks from within the cluster whose stages use it: then a server that this machine
    cannot reach is not called failed, but not checked.
    """
    name, place = "MLflow", without_secrets(uri)
    verdict: Verdict = "not checked" if from_cluster else "failed"
    ask = f"ask from within: {from_cluster}"
    try:
        status = requests.get(f"{uri.rstrip('/')}/health", timeout=TIMEOUT).status_code
    except requests.exceptions.SSLError:
        remedy = ask if from_cluster else "set REQUESTS_CA_BUNDLE to the file of its authority"
        return Check(name, verdict, f"{place}: its TLS certificate is not trusted here", remedy)
    except (requests.RequestException, ValueError):
        remedy = ask if from_cluster else "check the address, and that the server runs"
        return Check(name, verdict, f"{place} does not answer here", remedy)
    try:
        refuse_old_server(uri)
    except GuardLoopError as error:
        return failed(name, error)
    known = {200: f"{place} answers", 401: f"{place} answers, and asks for a login"}  # the stages have their own
    remedy = "" if status in known else "check the address, and the server's log"
    return Check(name, "failed" if remedy else "ok", known.get(status, f"{place} answered {status} to /health"), remedy)
