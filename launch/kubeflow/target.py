"""Which Kubeflow Pipelines to talk to, and as whom: options, then the environment, then the platform's file."""

import ipaddress
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from guardloop.config import PlatformSettings
from guardloop.core.errors import GuardLoopError
from guardloop.core.text import without_secrets

HOST, NAMESPACE, EXPERIMENT = "KF_PIPELINES_ENDPOINT", "KF_PIPELINES_NAMESPACE", "KF_PIPELINES_DEFAULT_EXPERIMENT_NAME"
UI_HOST, CA_FILE = "KF_PIPELINES_UI_ENDPOINT", "KF_PIPELINES_CA_FILE"
TOKEN, TOKEN_FILE, COOKIE = "KF_PIPELINES_TOKEN", "KF_PIPELINES_SA_TOKEN_PATH", "KF_PIPELINES_COOKIE"
MOUNTED_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")  # where Kubeflow's notebooks have one
MOUNTED_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class Target:
    """One Kubeflow Pipelines and how to use it. What is secret does not show in its text."""

    host: str
    ui_host: str
    namespace: str | None
    experiment: str
    service_account: str | None = None
    pipeline_root: str | None = None
    ca_file: str | None = None
    token_file: Path | None = None
    fixed_token: str | None = field(default=None, repr=False)
    cookie: str | None = field(default=None, repr=False)

    @property
    def credentials(self) -> str:
        """What is sent to prove who asks, in words."""
        if self.token_file:
            return f"the token in {self.token_file}"
        parts = [f"the token in {TOKEN}"] * bool(self.fixed_token) + [f"the cookie in {COOKIE}"] * bool(self.cookie)
        return " and ".join(parts) or "no token and no cookie"

    def token(self) -> str | None:
        """The token of this moment. Raises GuardLoopError if its file cannot be read."""
        if self.token_file is None:
            return self.fixed_token
        try:
            return _header(self.token_file.read_text("utf-8"), str(self.token_file))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise GuardLoopError(
                f"cannot read the token in {self.token_file}: {reason}", f"give a readable file, or set {TOKEN}"
            ) from None

    def run_page(self, run_id: str) -> str:
        """The page of a run."""
        return f"{self.ui_host}/#/runs/details/{run_id}"


def find_target(
    platform: PlatformSettings, host: str | None = None, namespace: str | None = None, experiment: str | None = None
) -> Target:
    """The target that the options (of which None is not given), the environment and the platform name.

    Raises GuardLoopError if there is no host, or if it or a credential cannot be used.
    """
    settings = platform.kubeflow
    named = _get(host, HOST, settings.host)
    if not named:
        raise GuardLoopError(
            "no Kubeflow Pipelines is named",
            f"give --host https://..., or set {HOST}, or kubeflow.host in the platform",
        )
    address = _address(named, "host")
    ca_file = _get(None, CA_FILE, settings.ca_file) or os.environ.get("REQUESTS_CA_BUNDLE") or None
    if ca_file:
        _check_certificates(ca_file)
    fixed = os.environ.get(TOKEN)
    token_file = None if fixed else _get(None, TOKEN_FILE, settings.token_file)
    if not fixed and not token_file and MOUNTED_TOKEN.is_file():
        token_file = str(MOUNTED_TOKEN)
    target = Target(
        host=address,
        ui_host=_address(_get(None, UI_HOST, settings.ui_host) or address, "ui_host"),
        namespace=_get(namespace, NAMESPACE, settings.namespace) or _mounted_namespace(),
        experiment=_get(experiment, EXPERIMENT, settings.experiment) or "guardloop",
        service_account=platform.cluster.service_account if platform.cluster else None,
        pipeline_root=settings.pipeline_root,
        ca_file=ca_file,
        token_file=Path(token_file).expanduser() if token_file else None,
        fixed_token=_header(fixed, TOKEN) if fixed else None,
        cookie=_header(os.environ[COOKIE], COOKIE) if os.environ.get(COOKIE) else None,
    )
    if (target.token() or target.cookie) and not _is_private(address):
        raise GuardLoopError(
            f"{address}: {target.credentials} would travel unencrypted", "use the https:// address of the host"
        )
    return target


def _get(option: str | None, variable: str, setting: str | None) -> str | None:
    return option or os.environ.get(variable) or setting


def _address(text: str, what: str) -> str:
    """`text` without a trailing slash or a copied page's `#/...`. Raises GuardLoopError if it is no http address."""
    text = text.partition("#")[0].rstrip("/")
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise GuardLoopError(
            f"{what}: not an address of Kubeflow Pipelines: {without_secrets(text)!r}",
            "write https://host or http://localhost:8080",
        )
    if parts.username or parts.password:
        raise GuardLoopError(f"{what} holds a password: {without_secrets(text)}", f"set {TOKEN} or {COOKIE} instead")
    return text


def _check_certificates(path: str) -> None:
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:  # of which ssl.SSLError is one
        reason = "no such file" if isinstance(error, FileNotFoundError) else "not certificates in PEM format"
        raise GuardLoopError(f"not a file of certificates: {path}: {reason}", f"mend {CA_FILE}") from None


def _is_private(address: str) -> bool:
    """Whether others cannot listen: TLS, this machine, or a service of the cluster that this process runs in."""
    parts = urlsplit(address)
    name = parts.hostname or ""
    try:
        loopback = ipaddress.ip_address(name).is_loopback
    except ValueError:
        loopback = name == "localhost"
    in_cluster = ("." not in name and ":" not in name) or name.endswith((".kubeflow", ".svc", ".svc.cluster.local"))
    return parts.scheme == "https" or loopback or in_cluster


def _header(text: str, where: str) -> str:
    """`text` as the value of a header. Raises GuardLoopError, without showing it, if it is none."""
    value = text.strip()
    if not value or not value.isascii() or not value.isprintable():
        raise GuardLoopError(f"{where} is empty or not one line of plain text", "write the token or cookie into it")
    return value


def _mounted_namespace() -> str | None:
    try:
        return MOUNTED_NAMESPACE.read_text("utf-8").strip() or None
    except OSError:
        return None
