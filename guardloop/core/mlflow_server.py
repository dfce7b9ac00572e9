"""Which MLflow servers will do, asked over HTTP: importing MLflow itself takes seconds."""

import re

import requests

from guardloop.core.errors import GuardLoopError
from guardloop.core.text import without_secrets

OLDEST = (3, 0)
"""The first with logged models, in which adapters are kept."""
TIMEOUT_SECONDS = 10


def server_version(uri: str) -> str:
    """The version that the server at an http(s) address says; empty where it is away or does not say."""
    try:
        answer = requests.get(f"{uri.rstrip('/')}/version", timeout=TIMEOUT_SECONDS)
    except (requests.RequestException, ValueError):
        return ""
    text = answer.text.strip() if answer.status_code == 200 else ""
    return text if re.fullmatch(r"\d+\.\d+\S{0,40}", text) else ""


def refuse_old_server(uri: str) -> None:
    """Raise GuardLoopError if an MLflow server at `uri` is too old to keep adapters. Databases are left to MLflow."""
    if not uri.startswith(("http://", "https://")):
        return
    version = server_version(uri)
    if version and tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise GuardLoopError(
            f"MLflow at {without_secrets(uri)} is version {version}, without logged models, which keep adapters",
            f"update the server to {needed} or newer (`mlflow db upgrade` brings its database along)",
        )
