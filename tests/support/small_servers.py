# ruff: noqa: N815  (http.server wants names such as do_GET)
"""Small servers for the preflight and the logs: a Docker engine, a model hub, Kubernetes; and certificates."""

import base64
import json
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Reply = tuple[int, dict[str, str], Any]


class SmallServer:
    """Answers what `reply` says, on a port of its own."""

    def __init__(self) -> None:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet

            def do_GET(self) -> None:
                address = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(address.query).items()}
                status, headers, body = server.reply(unquote(address.path), query, dict(self.headers))
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def reply(self, path: str, query: dict[str, str], headers: dict[str, str]) -> Reply:
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()


class DockerEngine(SmallServer):
    """A Docker engine's answers on `images` in registries, those behind a `login` (name:password) included."""

    def __init__(self, images: set[str], login: str | None = None, status: int | None = None) -> None:
        super().__init__()
        self.images, self.login, self.status = images, login, status

    def reply(self, path: str, query: dict[str, str], headers: dict[str, str]) -> Reply:
        if path == "/version":
            return 200, {}, {"ApiVersion": "1.47", "MinAPIVersion": "1.24"}
        if self.status:
            return self.status, {}, {"message": f"the registry answered {self.status}"}
        image = path.partition("/distribution/")[2].removesuffix("/json")
        given = json.loads(base64.urlsafe_b64decode(headers.get("X-Registry-Auth", "") or b"e30="))
        if self.login and f"{given.get('username')}:{given.get('password')}" != self.login:
            return 401, {}, {"message": "unauthorized"}
        known = {"Descriptor": {"digest": "sha256:00"}, "Platforms": []}
        return (200, {}, known) if image in self.images else (404, {}, {"message": "manifest unknown"})


class Hub(SmallServer):
    """The model hub's answer to `may I read this?`: a set of what `token` may, and a set of what is gated."""

    def __init__(self, readable: set[str], gated: set[str], token: str) -> None:
        super().__init__()
        self.readable, self.gated, self.token = readable, gated, token

    def reply(self, path: str, query: dict[str, str], headers: dict[str, str]) -> Reply:
        name = path.removeprefix("/api/").removesuffix("/auth-check").partition("/")[2]
        if name in self.readable and headers.get("authorization") == f"Bearer {self.token}":
            return 200, {}, {}
        if name in self.gated | self.readable:
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"}, {}
        return 404, {"X-Error-Code": "RepoNotFound"}, {}


class Kubernetes(SmallServer):
    """The core API of one namespace: `objects` by kind and name, pods with logs. `status` refuses everything."""

    def __init__(self, namespace: str = "guardloop") -> None:
        super().__init__()
        self.namespace = namespace
        self.objects: dict[str, dict[str, dict[str, Any]]] = {}
        self.pod_logs: dict[str, str] = {}
        self.status = 200

    def add(self, kind: str, name: str, **content: Any) -> None:
        self.objects.setdefault(kind, {})[name] = {"metadata": {"name": name}, **content}

    def add_pod(self, name: str, run_id: str, node: str, log: str | None) -> None:
        metadata = {
            "name": name,
            "labels": {"pipeline/runid": run_id},
            "annotations": {"workflows.argoproj.io/node-name": node},
            "creationTimestamp": f"2026-01-01T10:00:{len(self.objects.get('pods', {})):02d}Z",
        }
        self.objects.setdefault("pods", {})[name] = {"metadata": metadata}
        if log is not None:
            self.pod_logs[name] = log

    def kubeconfig(self, path: Path) -> Path:
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "test",
                    "contexts": [{"name": "test", "context": {"cluster": "c", "user": "u"}}],
                    "clusters": [{"name": "c", "cluster": {"server": self.url}}],
                    "users": [{"name": "u", "user": {"token": "t"}}],
                }
            )
        )
        return path

    def reply(self, path: str, query: dict[str, str], headers: dict[str, str]) -> Reply:
        if self.status != 200:
            return self.status, {}, {"kind": "Status", "message": "refused"}
        rest = path.removeprefix(f"/api/v1/namespaces/{self.namespace}/").split("/")
        kind = self.objects.get(rest[0], {})
        if len(rest) == 1:
            key, _, value = query.get("labelSelector", "").partition("=")
            items = [one for one in kind.values() if one["metadata"].get("labels", {}).get(key) == value]
            return 200, {}, {"kind": "List", "items": items}
        if rest[-1] == "log":
            return (
                (200, {"Content-Type": "text/plain"}, self.pod_logs[rest[1]])
                if rest[1] in self.pod_logs
                else (404, {}, {})
            )
        return (200, {}, kind[rest[1]]) if rest[1] in kind else (404, {}, {"kind": "Status", "message": "not found"})


def authority_and_certificate(folder: Path) -> tuple[Path, tuple[Path, Path]]:
    """An authority's certificate, and a certificate for localhost that it signed, with its key."""
    now = datetime.now(UTC)

    def build(subject: x509.Name, issuer: x509.Name, key: Any, signer: Any, is_authority: bool) -> x509.Certificate:
        names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
        return (
            x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(names, critical=False)
            .sign(signer, hashes.SHA256())
        )

    root, leaf = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("Test CA", "localhost"))
    root_key, leaf_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(build(root, root, root_key, root_key, True).public_bytes(pem))
    (folder / "cert.pem").write_bytes(build(leaf, root, leaf_key, root_key, False).public_bytes(pem))
    secret = leaf_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(secret)
    return folder / "ca.pem", (folder / "cert.pem", folder / "key.pem")
