import hashlib
import ipaddress
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support.services import SECRET_KEY, S3Server

from guardloop.core.errors import GuardLoopError
from guardloop.core.storage import exists, fetch, put
from guardloop.core.text import without_secrets


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture
def s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    use(server, monkeypatch)
    return server


def use(server: S3Server, monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    quick = {"AWS_MAX_ATTEMPTS": "1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull}
    quick |= {"AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    for name, value in (quick | server.client_environment | changes).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "adapter"
    (root / "inner").mkdir(parents=True)
    (root / "adapter_config.json").write_text("{}")
    (root / "inner" / "größe.txt").write_text("ä")
    return root


def listing(root: Path) -> dict[str, bytes]:
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_the_copy_of_an_adapter_goes_with_its_process(s3: S3Server, folder: Path, tmp_path: Path) -> None:
    """A store's files may change, so they are fetched anew."""
    put(folder, "s3://guardloop/adapter")
    (tmp_path / "temporary").mkdir()
    code = (
        "from guardloop.models.locate import fetch_adapter\n"
        "print(sorted(path.name for path in fetch_adapter('s3://guardloop/adapter').iterdir()))\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['adapter_config.json', 'inner']"
    assert not list((tmp_path / "temporary").glob("adapter-*"))


def test_a_file_goes_there_and_back(s3: S3Server, tmp_path: Path) -> None:
    source = tmp_path / "weights.safetensors"
    source.write_bytes(os.urandom(20_000_000))  # three parts
    put(source, "s3://guardloop/one/weights.safetensors")
    back = fetch("s3://guardloop/one/weights.safetensors", tmp_path / "back")
    assert back == tmp_path / "back" / "weights.safetensors"
    assert hashlib.sha256(back.read_bytes()).digest() == hashlib.sha256(source.read_bytes()).digest()


def test_a_file_goes_into_a_uri_with_a_slash(s3: S3Server, folder: Path) -> None:
    put(folder / "adapter_config.json", "s3://guardloop/into/")
    assert exists("s3://guardloop/into/adapter_config.json")


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_folder_goes_there_and_back_and_replaces_an_older_copy(
    s3: S3Server, folder: Path, tmp_path: Path, slash: str
) -> None:
    put(folder, f"s3://guardloop/runs/7{slash}")
    stale = tmp_path / "back" / "7" / "stale.txt"
    stale.parent.mkdir(parents=True)
    stale.write_text("old")
    back = fetch(f"s3://guardloop/runs/7{slash}", tmp_path / "back")
    assert back == stale.parent
    assert listing(back) == listing(folder)
    assert [child.name for child in back.parent.iterdir()] == ["7"]


def test_addressing_is_path_style(s3: S3Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://localhost:{s3.port}")  # a host name could get a bucket prefix
    put(folder, "s3://guardloop/named")
    assert (s3.files / "guardloop" / "named" / "adapter_config.json").read_text() == "{}"


@pytest.mark.slow
def test_exists_tells_objects_folders_and_nothing_apart(s3: S3Server, folder: Path) -> None:
    put(folder, "s3://guardloop/there/adapter")
    assert exists("s3://guardloop/there/adapter/adapter_config.json")
    assert exists("s3://guardloop/there/adapter")
    assert exists("s3://guardloop/there/")
    assert exists("s3://guardloop")
    assert not exists("s3://guardloop/there/adap")
    assert not exists("s3://guardloop/nowhere/")


def test_local_paths(folder: Path, tmp_path: Path) -> None:
    assert fetch(folder, tmp_path / "unused") == folder
    assert fetch(f"file://{folder}", tmp_path / "unused") == folder
    put(folder, tmp_path / "copy")
    put(folder / "adapter_config.json", f"{tmp_path}/copy/inner/")
    assert listing(tmp_path / "copy") == listing(folder) | {"inner/adapter_config.json": b"{}"}
    assert exists(tmp_path / "copy")
    assert not exists(tmp_path / "nothing")
    assert not (tmp_path / "unused").exists()


@pytest.mark.slow
def test_nothing_there(s3: S3Server, tmp_path: Path) -> None:
    for uri in ("s3://guardloop/no/such", "s3://guardloop/no/", str(tmp_path / "no")):
        with pytest.raises(GuardLoopError, match="no such file or folder"):
            fetch(uri, tmp_path / "into")
    with pytest.raises(GuardLoopError, match=r"no such file or folder: s3://guardloop/no \(at http://127"):
        fetch("s3://guardloop/no", tmp_path / "into")
    with pytest.raises(GuardLoopError, match="no such bucket"):
        fetch("s3://other/key", tmp_path / "into")
    with pytest.raises(GuardLoopError, match="no such file"):
        put(tmp_path / "no", "s3://guardloop/x")


@pytest.mark.parametrize("uri", ["gs://bucket/key", "models:/name", "s3://", "s3:///key"])
def test_wrong_addresses(uri: str, tmp_path: Path) -> None:
    with pytest.raises(GuardLoopError):
        fetch(uri, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"AWS_SECRET_ACCESS_KEY": "not-the-secret"}, {"AWS_ACCESS_KEY_ID": "nobody-known"}]
)
def test_wrong_credentials(
    server: S3Server, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]
) -> None:
    use(server, monkeypatch, **changes)
    for action in (
        lambda: fetch("s3://guardloop/a", tmp_path / "into"),
        lambda: put(folder, "s3://guardloop/a"),
        lambda: exists("s3://guardloop/a"),
    ):
        with pytest.raises(GuardLoopError, match="access refused") as caught:
            action()
        assert "AWS_ACCESS_KEY_ID" in caught.value.remedy
        assert not any(secret in str(caught.value) for secret in [SECRET_KEY, *changes.values()])


def test_no_credentials(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(server, monkeypatch)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(GuardLoopError, match="no credentials"):
        fetch("s3://guardloop/a", tmp_path)


def test_endpoint_away_is_named_without_its_secrets(
    server: S3Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    use(server, monkeypatch, AWS_ENDPOINT_URL=f"http://user:hidden@127.0.0.1:{port}")
    for action in (lambda: fetch("s3://guardloop/a", folder), lambda: put(folder, "s3://guardloop/a")):
        with pytest.raises(GuardLoopError, match=f"at http://127.0.0.1:{port}.*does not answer") as caught:
            action()
        assert "hidden" not in str(caught.value)
        assert SECRET_KEY not in str(caught.value)


def test_endpoint_that_is_no_url(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(server, monkeypatch, AWS_ENDPOINT_URL="store:9000")
    with pytest.raises(GuardLoopError, match=r"not a URL: store:9000"):
        fetch("s3://guardloop/a", tmp_path)


def test_tls_needs_the_authority(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = self_signed(tmp_path)
    (folder / "weights").write_bytes(os.urandom(9_000_000))  # two parts
    with S3Server(tmp_path / "store", tls=certificate) as server:
        use(server, monkeypatch)
        with pytest.raises(GuardLoopError, match="certificate is not trusted") as caught:
            put(folder, "s3://guardloop/a")
        assert "AWS_CA_BUNDLE" in caught.value.remedy
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate[0]))
        put(folder, "s3://guardloop/a")
        assert listing(fetch("s3://guardloop/a", tmp_path)) == listing(folder)


@pytest.mark.parametrize("key", ["x/../../evil", "x//etc/evil", "x/./evil"])
def test_keys_that_lead_out_are_refused(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    with hostile_store(["x/good.txt", key]) as url:
        use(server, monkeypatch, AWS_ENDPOINT_URL=url)
        older = tmp_path / "into" / "x" / "older.txt"
        older.parent.mkdir(parents=True)
        older.write_text("kept")
        with pytest.raises(GuardLoopError, match="leads out of the folder"):
            fetch("s3://guardloop/x", tmp_path / "into")
    assert listing(tmp_path) == {"into/x/older.txt": b"kept"}


def test_an_interrupted_folder_leaves_the_older_copy(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hostile_store(["x/a.txt", "x/broken.txt"]) as url:
        use(server, monkeypatch, AWS_ENDPOINT_URL=url)
        older = tmp_path / "x" / "older.txt"
        older.parent.mkdir()
        older.write_text("kept")
        with pytest.raises(GuardLoopError):
            fetch("s3://guardloop/x", tmp_path)
    assert listing(tmp_path) == {"x/older.txt": b"kept"}


def test_secrets_leave_urls() -> None:
    assert without_secrets("to https://me:pass@host:1/a?b failed") == "to https://host:1/a?b failed"
    assert without_secrets("postgresql://me:p@ss@db/x and s3://b/a@b") == "postgresql://db/x and s3://b/a@b"


class hostile_store:  # noqa: N801  (used as a function)
    """A store that lists whatever keys it is given; objects called broken.txt fail."""

    def __init__(self, keys: list[str]) -> None:
        entries = "".join(f"<Contents><Key>{key}</Key><Size>1</Size></Contents>" for key in keys)
        page = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                found = self.path.endswith(".txt") and "broken" not in self.path
                self.answer(200 if found else 404, b"1" if found else b"", "Content-Length")

            def do_GET(self) -> None:
                self.answer(200, page if "list-type" in self.path else b"1", "Content-Length")

            def answer(self, status: int, body: bytes, header: str) -> None:
                self.send_response(status)
                self.send_header(header, str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> str:
        Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "guardloop test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))
    (folder / "key.pem").write_bytes(private)
    return folder / "cert.pem", folder / "key.pem"
