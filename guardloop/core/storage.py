"""Files by address: local paths and `s3://bucket/key`, on AWS or any S3-compatible store.

The store is the one that boto3 finds in the environment: AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, the usual
credentials, AWS_CA_BUNDLE. Failed requests are retried; large files travel in parts; the store checks their checksums.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    SSLError,
)
from botocore.exceptions import ConnectionError as StoreAway

from guardloop.core.errors import GuardLoopError
from guardloop.core.text import without_secrets

MISSING = {"404", "NoSuchKey", "NotFound"}
REFUSED = {"401", "403", "AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
CREDENTIALS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and that they may use this bucket"


def fetch(uri: str | Path, into: Path) -> Path:
    """The local copy of the file or folder at `uri`: under `into`, named as in `uri`; a local path stays where it is.

    A folder is every object under the prefix; it appears complete or not at all, in place of an older copy.
    Raises GuardLoopError if there is nothing, if access fails, or if a key would lead out of the folder.
    """
    bucket, key = _split(uri)
    if not bucket:
        return _existing(key)
    with _explained(uri):
        client = _client()
        target = into / _inside((key.rstrip("/") or bucket).rpartition("/")[2], uri)
        into.mkdir(parents=True, exist_ok=True)
        if _is_object(client, bucket, key):
            client.download_file(bucket, key, str(target))
            return target
        prefix = _as_prefix(key)
        keys = [found for found in _keys(client, bucket, prefix) if not found.endswith("/")]
        if not keys:
            raise _nothing_at(uri)
        places = {found: _inside(found.removeprefix(prefix), uri) for found in keys}
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=into) as partial:
            for found, place in places.items():
                local = Path(partial, "folder", place)
                local.parent.mkdir(parents=True, exist_ok=True)
                client.download_file(bucket, found, str(local))
            if target.is_dir():
                shutil.rmtree(target)
            Path(partial, "folder").rename(target)
    return target


def put(path: str | Path, uri: str | Path) -> None:
    """Copy the local file at `path` to `uri` (into it, if it ends with `/`), or the files of a folder to under `uri`.

    Raises GuardLoopError if there is no such path or the copy fails.
    """
    path = _existing(str(path))
    bucket, key = _split(uri)
    if path.is_file() and (not key or str(uri).endswith("/")):
        key = f"{_as_prefix(key)}{path.name}"
    with _explained(uri):
        if not bucket:
            _copy(path, Path(key))
            return
        client = _client()
        if path.is_file():
            _upload(client, path, bucket, key)
        else:
            for file in sorted(file for file in path.rglob("*") if file.is_file()):
                if not file.resolve().is_relative_to(path.resolve()):  # a link that would take another file along
                    raise GuardLoopError(f"{file} leads out of {path}", "put the file itself there, or remove the link")
                _upload(client, file, bucket, _as_prefix(key) + file.relative_to(path).as_posix())


def exists(uri: str | Path) -> bool:
    """Whether `uri` is a file, an object, or a folder with something in it. Raises GuardLoopError if access fails."""
    bucket, key = _split(uri)
    if not bucket:
        return Path(key).exists()
    with _explained(uri):
        client = _client()
        return _is_object(client, bucket, key) or next(_keys(client, bucket, _as_prefix(key)), None) is not None


def list_keys(uri: str) -> list[str]:
    """The names of the objects below an `s3://` prefix, relative to it; [""] where `uri` is an object itself.

    Raises GuardLoopError if access fails, or if a key would lead out of the prefix.
    """
    bucket, key = _split(uri)
    with _explained(uri):
        client = _client()
        if _is_object(client, bucket, key):
            return [""]
        prefix = _as_prefix(key)
        keys = [found.removeprefix(prefix) for found in _keys(client, bucket, prefix) if not found.endswith("/")]
    return [_inside(name, uri).as_posix() for name in keys]


def _split(uri: str | Path) -> tuple[str, str]:
    """Bucket and key; the bucket is empty for a local path."""
    text = str(uri)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return "", str(Path(text).expanduser())
    if scheme == "file":
        return "", rest
    if scheme != "s3":
        raise GuardLoopError(
            f"{without_secrets(text)}: cannot read or write {scheme}://", "give a local path or s3://bucket/key"
        )
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise GuardLoopError(f"{text}: names no bucket", "write s3://bucket/key")
    return bucket, key


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _client() -> Any:
    """A client with today's credentials: they may have been rotated since the last one."""
    endpoint = _endpoint()
    config = Config(retries={"mode": "standard"}, connect_timeout=10)
    if endpoint:
        # Stores other than AWS seldom have a host name per bucket, and many refuse boto3's checksum trailers;
        # a signed payload has its SHA-256 checked by all of them.
        compatible = Config(
            s3={"addressing_style": "path", "payload_signing_enabled": True},
            request_checksum_calculation="when_required",
        )
        config = config.merge(compatible)
    try:
        return boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)
    except ValueError:
        raise GuardLoopError(
            f"AWS_ENDPOINT_URL is not a URL: {without_secrets(str(endpoint))}", "write it as https://host:port"
        ) from None


def _as_prefix(key: str) -> str:
    return key if not key or key.endswith("/") else key + "/"


def _is_object(client: Any, bucket: str, key: str) -> bool:
    if not key or key.endswith("/"):
        return False
    try:
        client.head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["Error"]["Code"] in MISSING:
            return False
        raise
    return True


def _keys(client: Any, bucket: str, prefix: str) -> Iterator[str]:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        yield from (entry["Key"] for entry in page.get("Contents", []))


def _inside(key: str, uri: str | Path) -> Path:
    """`key` as a relative path that stays inside its folder: whoever writes to a bucket chooses its keys."""
    parts = key.split("/")
    if any(part in {"", ".", ".."} or "\0" in part for part in parts):
        raise GuardLoopError(
            f"{uri}: the key {key!r} leads out of the folder", "do not use this prefix; find out who wrote it"
        )
    return Path(*parts)


def _upload(client: Any, file: Path, bucket: str, key: str) -> None:
    with file.open("rb") as content:
        client.upload_fileobj(content, bucket, key)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    try:
        shutil.copyfile(source, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _existing(path: str) -> Path:
    found = Path(path).expanduser()
    if not found.exists():
        raise _nothing_at(path)
    return found


def _nothing_at(uri: str | Path) -> GuardLoopError:
    return GuardLoopError(
        f"no such file or folder: {uri}{_where(uri)}", "check the address, and that the stage that writes it ran"
    )


def _where(uri: str | Path) -> str:
    if not str(uri).startswith("s3://"):
        return ""
    return f" (at {without_secrets(_endpoint() or 'AWS S3')})"


@contextmanager
def _explained(uri: str | Path) -> Iterator[None]:
    """Turn what boto3 and the disk raise into what a person can act on. `from None`: their texts may hold secrets."""
    place = f"{uri}{_where(uri)}"
    try:
        yield
    except ClientError as error:
        raise _refusal(error, uri, place) from None
    except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError):
        raise GuardLoopError(
            f"{place}: no credentials found", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    except SSLError:
        raise GuardLoopError(
            f"{place}: the store's TLS certificate is not trusted", "set AWS_CA_BUNDLE to the file of its authority"
        ) from None
    except (StoreAway, HTTPClientError):
        raise GuardLoopError(
            f"{place}: the store does not answer", "check AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, and the network"
        ) from None
    except (BotoCoreError, Boto3Error) as error:
        raise GuardLoopError(
            f"{place}: {without_secrets(str(error))}", "check the address and the AWS settings"
        ) from None
    except OSError as error:
        raise GuardLoopError(f"{place}: {error.strerror or error}", "check the disk's space and permissions") from error


def _refusal(error: ClientError, uri: str | Path, place: str) -> GuardLoopError:
    code = str(error.response["Error"]["Code"])
    if code == "NoSuchBucket":
        return GuardLoopError(f"{place}: no such bucket", "check the name, or create the bucket")
    if code in MISSING:
        return _nothing_at(uri)
    if code in REFUSED:
        return GuardLoopError(f"{place}: access refused ({code})", CREDENTIALS)
    message = without_secrets(str(error.response["Error"].get("Message", "")))
    return GuardLoopError(
        f"{place}: the store answered {code} {message}".rstrip(), "look at the store's log, then try again"
    )
