"""From `models:/name@alias` to a local folder with the adapter."""

import hashlib
import re
import tempfile
from pathlib import Path
from typing import Any

from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException

from guardloop.core.errors import GuardLoopError
from guardloop.core.tracking import Connection

ADAPTER = "adapter"
"""The folder of the adapter in a registered model."""
DIGEST = "guardloop.adapter_sha256"
"""The tag that holds the checksum of the adapter's files."""
URI = re.compile(r"models:/(?P<name>[^/:@'\"]+)(?:@(?P<alias>[\w.-]+)|/(?P<version>\d+))")
ABSENT = {"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE"}  # MLflow gives the last for an alias


def resolve_model(
    uri: str, into: Path | None = None, tracking_uri: str | None = None, patience_seconds: float = 60
) -> Path:
    """The local folder of the model at `models:/name@alias` or `models:/name/3`, downloaded under `into`.

    A version never changes, so one that is under `into` already is taken from there. Without `into` the folder is
    a new temporary one. MLflow is at `tracking_uri`, else at MLFLOW_TRACKING_URI.
    Raises GuardLoopError if there is no such model, MLflow is away, or the files are not those that were registered.
    """
    return download(Connection(tracking_uri, patience_seconds), uri, into)


def download(connection: Connection, uri: str, into: Path | None = None) -> Path:
    """`resolve_model` over a connection."""
    match = URI.fullmatch(uri.strip())
    if match is None:
        raise GuardLoopError(f"not a registered model: {uri!r}", "write models:/name@champion or models:/name/3")
    name, alias, number = match["name"], match["alias"], match["version"]

    def find(client: Any) -> tuple[Any, str]:
        try:
            version = (
                client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
            )
            return version, str(client.get_model_version_download_uri(name, version.version))
        except MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            raise GuardLoopError(
                f"MLflow at {connection.place} has no {uri}",
                "promote a version to set its alias"
                if alias == "champion"
                else "check the name and the alias or version",
            ) from None

    version, source = connection.attempt(f"finding {uri}", find)
    digest = version.tags.get(DIGEST)
    into = into or Path(tempfile.mkdtemp(prefix="guardloop-model-"))
    target = into / f"{name}-{version.version}-{(digest or str(version.creation_timestamp))[:12]}"
    if target.is_dir():
        return target

    def fetch(_: Any) -> None:
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=into) as partial:
            model = Path(download_artifacts(artifact_uri=source, dst_path=partial, tracking_uri=connection.uri))
            folder = model / ADAPTER
            if digest and adapter_digest(folder) != digest:
                raise GuardLoopError(
                    f"{uri}: the files in the artifact store are not those that were registered",
                    "find out who changed them; promote another version, or register the adapter again",
                )
            try:
                folder.rename(target)
            except OSError:
                if not target.is_dir():  # another process was faster
                    raise

    try:
        into.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GuardLoopError(
            f"cannot write {uri} to {into}: {error.strerror or error}",
            "choose a folder that can be written; guards that are used are kept in GUARDLOOP_CACHE",
        ) from None
    connection.attempt(f"downloading {uri}", fetch)
    return target


def adapter_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of the folder's files."""
    total = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        total.update(f"{file.relative_to(folder).as_posix()}\0{digest}\n".encode())
    return total.hexdigest()
