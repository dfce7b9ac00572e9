"""Where Kubeflow Pipelines is, who asks, and that nobody listens."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.ended import Ended
from support.kubeflow_server import KubeflowServer
from support.small_servers import authority_and_certificate

from guardloop.config import PlatformSettings
from guardloop.config.kubeflow import KubeflowSettings
from guardloop.core.errors import GuardLoopError
from launch.kubeflow import target
from launch.kubeflow.cluster import Cluster
from launch.kubeflow.target import find_target

Call = Callable[..., Ended]


def test_a_token_from_the_environment_or_a_file(
    guardloop: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with KubeflowServer(token="open-sesame") as server:
        assert guardloop("runs", "--host", server.url).code == 2
        monkeypatch.setenv("KF_PIPELINES_TOKEN", "open-sesame")
        assert guardloop("runs", "--host", server.url).code == 0
        monkeypatch.setenv("KF_PIPELINES_TOKEN", "wrong")
        refused = guardloop("runs", "--host", server.url)
        assert refused.code == 2 and "401 Unauthorized" in refused.err and "KF_PIPELINES_COOKIE" in refused.err
        monkeypatch.delenv("KF_PIPELINES_TOKEN")
        (tmp_path / "token").write_text("open-sesame\n")
        monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
        assert guardloop("runs", "--host", server.url).code == 0


def test_the_token_that_kubernetes_mounts_is_found_and_read_again_when_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "MOUNTED_TOKEN", tmp_path / "token")
    (tmp_path / "token").write_text("first")
    with KubeflowServer(token="first") as server:
        cluster = Cluster(find_target(PlatformSettings(kubeflow=KubeflowSettings(host=server.url))))
        cluster.check_access()
        server.token = "second"
        (tmp_path / "token").write_text("second")
        cluster.check_access()
        (tmp_path / "token").unlink()
        with pytest.raises(GuardLoopError, match="cannot read the token"):
            cluster.check_access()


def test_a_cookie(guardloop: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    with KubeflowServer(cookie="authservice_session=abc", login_page=True) as server:
        without = guardloop("runs", "--host", server.url)
        assert without.code == 2 and "does not know who asks (302" in without.err
        monkeypatch.setenv("KF_PIPELINES_COOKIE", "authservice_session=abc")
        assert guardloop("runs", "--host", server.url).code == 0


@pytest.mark.parametrize("command", [["runs"], ["schedule", "list"], ["cancel", "latest"]])
def test_a_login_page_in_place_of_an_answer_is_no_empty_list(
    guardloop: Call, server: KubeflowServer, command: list[str]
) -> None:
    for path in ("/runs", "/recurringruns"):
        server.fail("GET", path, 200, body="<html>Log in to your account</html>")

    ended = guardloop(*command, "--host", server.url)

    assert ended.code == 2 and "a login before it" in ended.err


def test_the_certificate_is_checked_against_the_named_authority(
    guardloop: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority, certificate = authority_and_certificate(tmp_path)
    with KubeflowServer(tls=certificate) as server:
        unknown = guardloop("runs", "--host", server.url)
        assert unknown.code == 2 and "is not trusted" in unknown.err and "KF_PIPELINES_CA_FILE" in unknown.err
        assert not server.requests and "trying again" not in unknown.err
        monkeypatch.setenv("KF_PIPELINES_CA_FILE", str(authority))
        assert guardloop("runs", "--host", server.url).code == 0
        monkeypatch.setenv("KF_PIPELINES_TOKEN", "t")
        assert guardloop("runs", "--host", server.url).code == 0
        other = guardloop("runs", "--host", server.url.replace("localhost", "127.0.0.1"))
        assert other.code == 2 and "mismatch" in other.err


def test_tls_asked_of_a_server_that_has_none(guardloop: Call, server: KubeflowServer) -> None:
    ended = guardloop("runs", "--host", server.url.replace("http:", "https:"))

    assert ended.code == 2 and "does not speak TLS" in ended.err


@pytest.mark.parametrize("content", [None, "not a certificate"])
def test_a_file_that_holds_no_certificates(
    guardloop: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "authority.pem"
    if content:
        path.write_text(content)
    monkeypatch.setenv("KF_PIPELINES_CA_FILE", str(path))

    ended = guardloop("runs", "--host", "https://localhost:9")

    assert ended.code == 2 and "authority.pem" in ended.err and "file of certificates" in ended.err


@pytest.mark.parametrize(
    "command", [["submit", "--platform", "minikube"], ["runs"], ["schedule", "list"], ["cancel", "x"]]
)
def test_without_a_host(guardloop: Call, command: list[str]) -> None:
    ended = guardloop(*command)

    assert ended.code == 2 and "KF_PIPELINES_ENDPOINT" in ended.err


@pytest.mark.parametrize("host", ["kubeflow.example.org", "ftp://host", "https://", "http://host:port", "//x", "a b"])
def test_hosts_that_are_none(guardloop: Call, host: str) -> None:
    ended = guardloop("runs", "--host", host)

    assert ended.code == 2 and "https://host or http://localhost:8080" in ended.err


def test_a_password_in_the_address_is_refused_and_not_shown(guardloop: Call) -> None:
    ended = guardloop("runs", "--host", "https://ada:hunter2@kubeflow.example.org")

    assert ended.code == 2 and "hunter2" not in ended.all and "KF_PIPELINES_TOKEN" in ended.err


def test_the_address_of_a_page_will_do(guardloop: Call, server: KubeflowServer) -> None:
    assert guardloop("runs", "--host", f"{server.url}/#/pipelines").code == 0


@pytest.mark.parametrize(
    ("host", "fine"),
    [
        ("https://kubeflow.example.org", True),
        ("http://localhost:8080", True),
        ("http://127.0.0.1:8080", True),
        ("http://ml-pipeline:8888", True),
        ("http://ml-pipeline.kubeflow.svc.cluster.local:8888", True),
        ("http://kubeflow.example.org", False),
        ("http://ml-pipeline.svc.example.org", False),
        ("http://10.0.0.7:8080", False),
    ],
)
def test_credentials_travel_encrypted(monkeypatch: pytest.MonkeyPatch, host: str, fine: bool) -> None:
    assert find_target(PlatformSettings(kubeflow=KubeflowSettings(host=host))).host == host
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "secret")
    if fine:
        assert "secret" not in repr(find_target(PlatformSettings(kubeflow=KubeflowSettings(host=host))))
    else:
        with pytest.raises(GuardLoopError, match="unencrypted"):
            find_target(PlatformSettings(kubeflow=KubeflowSettings(host=host)))


@pytest.mark.parametrize("token", ["  ", "one\ntwo", "smörgås"])
def test_a_token_that_no_header_can_hold(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("KF_PIPELINES_TOKEN", token)

    with pytest.raises(GuardLoopError, match="KF_PIPELINES_TOKEN is empty or not") as caught:
        find_target(PlatformSettings(kubeflow=KubeflowSettings(host="https://host")))
    assert token.strip() == "" or token not in str(caught.value)


def test_the_namespace_of_a_pod_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "MOUNTED_NAMESPACE", tmp_path / "namespace")
    (tmp_path / "namespace").write_text("ada")
    settings = PlatformSettings(kubeflow=KubeflowSettings(host="https://host"))

    assert find_target(settings).namespace == "ada"
    assert find_target(settings, namespace="bob").namespace == "bob"
