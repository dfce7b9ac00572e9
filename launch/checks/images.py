"""Whether container images exist, asked of their registries (OCI distribution API, version 2)."""

import base64
import json
import os
import re
from pathlib import Path

import requests

from guardloop.core.errors import GuardLoopError

TIMEOUT = (5, 20)
MANIFESTS = ", ".join(
    [
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    ]
)


class NotCheckedError(GuardLoopError):
    """The registry could not be asked: the image may exist or not."""


def image_exists(image: str) -> bool:
    """Whether `image` (registry/name:tag, or @digest) can be pulled with this machine's registry credentials.

    Raises NotCheckedError where that cannot be told: no registry in the name, or one that does not answer or refuses.
    """
    registry, name, reference = split_image(image)
    if not registry:
        raise NotCheckedError(
            f"{image} names no registry: it must be on the cluster's nodes", "`make load`, or push it"
        )
    scheme = "http" if re.match(r"(localhost|127\.0\.0\.1|\[::1\])(:|$)", registry) else "https"
    address = f"{scheme}://{registry}/v2/{name}/manifests/{reference}"
    headers = {"Accept": MANIFESTS}
    try:
        reply = requests.head(address, headers=headers, timeout=TIMEOUT, allow_redirects=True)
        if reply.status_code == 401:
            headers["Authorization"] = _authorization(reply.headers.get("WWW-Authenticate", ""), registry)
            reply = requests.head(address, headers=headers, timeout=TIMEOUT, allow_redirects=True)
    except requests.exceptions.SSLError:
        raise NotCheckedError(
            f"{registry}: its TLS certificate is not trusted", "set REQUESTS_CA_BUNDLE to the file of its authority"
        ) from None
    except (requests.RequestException, ValueError) as error:
        raise NotCheckedError(f"{registry} does not answer ({type(error).__name__})", "check the network") from None
    if reply.status_code in (200, 404):
        return reply.status_code == 200
    if reply.status_code in (401, 403):
        raise NotCheckedError(f"{registry} refuses access to {name}", f"docker login {registry}")
    raise NotCheckedError(f"{registry} answered {reply.status_code}", "look at the registry's log")


def split_image(image: str) -> tuple[str, str, str]:
    """Registry (empty where none is named), name, and tag or digest."""
    first, slash, rest = image.partition("/")
    named = bool(slash) and ("." in first or ":" in first or first == "localhost")
    registry, path = (first, rest) if named else ("", image)
    if "@" in path:
        name, _, reference = path.partition("@")
        return registry, name.partition(":")[0], reference
    name, _, tag = path.partition(":")
    return ("registry-1.docker.io" if registry == "docker.io" else registry), name, tag or "latest"


def _authorization(challenge: str, registry: str) -> str:
    """What the registry asks for: a token of its token server, or the user's name and password."""
    scheme, _, rest = challenge.partition(" ")
    login = _docker_login(registry)
    if scheme.lower() != "bearer":
        return f"Basic {login}" if login else ""
    asked = dict(re.findall(r'(\w+)="([^"]*)"', rest))
    realm = asked.pop("realm", "")
    reply = requests.get(
        realm, params=asked, headers={"Authorization": f"Basic {login}"} if login else {}, timeout=TIMEOUT
    )
    told = reply.json() if reply.ok else {}
    return f"Bearer {told.get('token') or told.get('access_token') or ''}"


def _docker_login(registry: str) -> str | None:
    """The login that `docker login` left for the registry, as base64; None where there is none or a helper keeps it."""
    folder = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
    try:
        logins = json.loads((folder / "config.json").read_text("utf-8")).get("auths", {})
        login = logins.get("https://index.docker.io/v1/" if registry == "registry-1.docker.io" else registry, {})
        if "auth" in login:
            base64.b64decode(login["auth"], validate=True)
            return str(login["auth"])
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    return None
