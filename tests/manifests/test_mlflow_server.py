"""MLflow as the manifests start it, on this machine: only its database, its store and its port are others."""

import sys
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from support.overlays import Overlay
from support.services import MlflowServer

EXPERIMENT = "/api/2.0/mlflow/experiments/get?experiment_id=0"


class RenderedServer(MlflowServer):
    """The command and the environment of the rendered Deployment."""

    def command(self) -> list[str]:
        (container,) = Overlay("minikube").one("Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
        here = {"5000": str(self.port), "0.0.0.0": "127.0.0.1", "2": "1"}
        return [sys.executable, "-m", *(here.get(word, word) for word in container["args"])]

    def environment(self) -> dict[str, str]:
        return {
            **Overlay("minikube").one("ConfigMap", "mlflow")["data"],
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{self.folder / 'mlflow.db'}",
            "MLFLOW_ARTIFACTS_DESTINATION": str(self.folder / "artifacts"),
        }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RenderedServer]:
    with RenderedServer(tmp_path_factory.mktemp("mlflow")) as started:
        yield started


@pytest.mark.slow
@pytest.mark.parametrize("host", ["mlflow.guardloop:5000", "mlflow.guardloop.svc.cluster.local:5000", "localhost:5000"])
def test_it_answers_to_the_names_that_stages_and_people_use(server: RenderedServer, host: str) -> None:
    assert _ask(server, EXPERIMENT, host) == 200


@pytest.mark.slow
def test_it_answers_probes_by_address_and_refuses_other_names(server: RenderedServer) -> None:
    assert _ask(server, "/health", "10.244.0.7:5000") == 200
    assert _ask(server, EXPERIMENT, "evil.example.com") == 403


def _ask(server: RenderedServer, path: str, host: str) -> int:
    """The status of the answer to a request with this Host header."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(server.url + path, headers={"Host": host}), timeout=20
        ) as found:
            return int(found.status)
    except urllib.error.HTTPError as error:
        return error.code
