"""From `models:/name@alias` to a local folder with the adapter."""

import hashlib
import logging
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException

from guardloop.core.errors import GuardLoopError
from guardloop.core.tracking import Connection

log = logging.getLogger(__name__)

ADAPTER = "adapter"
"""The folder of the adapter in a registered model."""
DIGEST = "guardloop.adapter_sha256"
"""The tag that holds the checksum of the adapter's files."""
URI = re.compile(r"models:/(?P<name>[^/:@'\"]+)(?:@(?P<alias>[\w.-]+)|/(?P<version>\d+))")
ABSENT = {"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE"}  # MLflow gives the last for an alias


def resolve_model(uri: str, into: Path, tracking_uri: str | None = None, patience_seconds: float = 60) -> Path:
    """The local folder of the adapter at `models:/name@alias` or `models:/name/3`, downloaded under `into`.

    A version never changes, so one that is under `into` already is taken from there. Its files are held against the
    checksum in the registry at every use, whoever made the folder, and fetched again where they differ.
    MLflow is at `tracking_uri`, else at the environment's MLFLOW_TRACKING_URI.
    Raises GuardLoopError if there is no such model, MLflow is away, or the files are not those that were registered.
    """
    connection = Connection(tracking_uri, patience_seconds)
    name, version, source = _find(connection, uri)
    digest = version.tags.get(DIGEST)
    if not digest:
        raise GuardLoopError(
            f"{uri}: version {version.version} has no checksum, so its files cannot be trusted",
            f"register the adapter with guardloop: it keeps the checksum in the tag {DIGEST}",
        )
    target = into / f"{name}-{version.version}-{digest[:12]}"
    if target.is_dir():
        if adapter_digest(target) == digest:
            return target
        log.warning("%s was changed since it was downloaded: it is fetched again", target)
        shutil.rmtree(target)

    def fetch(_: Any) -> None:
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=into) as partial:
            model = Path(download_artifacts(artifact_uri=source, dst_path=partial, tracking_uri=connection.uri))
            folder = model / ADAPTER
            if adapter_digest(folder) != digest:
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


def _find(connection: Connection, uri: str) -> tuple[str, Any, str]:
    """The name of the model, its version, and where the files are."""
    match = URI.fullmatch(uri.strip())
    if match is None:
        raise GuardLoopError(f"not a registered model: {uri!r}", "write models:/name@champion or models:/name/3")
    name, alias, number = match["name"], match["alias"], match["version"]

    def find(client: Any) -> tuple[str, Any, str]:
        try:
            version = (
                client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
            )
            return name, version, str(client.get_model_version_download_uri(name, version.version))
        except MlflowException as error:
            if error.error_code not in ABSENT:
                raise
            raise GuardLoopError(
                f"MLflow at {connection.place} has no {uri}",
                "promote a version to set its alias"
                if alias == "champion"
                else "check the name and the alias or version",
            ) from None

    return connection.attempt(f"finding {uri}", find)


def adapter_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of the folder's files."""
    total = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        total.update(f"{file.relative_to(folder).as_posix()}\0{digest}\n".encode())
    return total.hexdigest()
