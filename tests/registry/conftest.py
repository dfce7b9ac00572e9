import os
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from support.mlflow_database import mlflow_database
from support.registry_examples import evaluation, origin
from support.services import MlflowServer, S3Server

from guardloop.evaluation.result import Outcome
from guardloop.registry.registry import Registry
from guardloop.registry.settings import RegistrySettings


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("MLFLOW_TRACKING", "AWS_"))]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path_factory.mktemp("mlflow"), s3_server) as server:
        yield server


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return mlflow_database(tmp_path_factory.mktemp("mlflow-local") / "deeper" / "guardloop.db")


@pytest.fixture
def settings() -> RegistrySettings:
    """Names of its own for every test."""
    name = uuid4().hex[:8]
    return RegistrySettings(experiment=f"experiment {name}", model=f"guard-{name}", tags={"team": "safety"})


@pytest.fixture
def local(settings: RegistrySettings, database: str) -> Registry:
    return Registry(settings, database, patience_seconds=1)


@pytest.fixture
def remote(settings: RegistrySettings, mlflow_server: MlflowServer) -> Registry:
    return Registry(settings, mlflow_server.url, patience_seconds=1)


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    def make(weights: str = "weights") -> Path:
        folder = tmp_path / f"adapter-{weights}"
        (folder / "tokenizer").mkdir(parents=True)
        for name, text in {
            "adapter_config.json": '{"r": 16}',
            "adapter_model.safetensors": weights,
            "guard.json": '{"threshold": 0.25}',
            "tokenizer/vocab.txt": "a b",
        }.items():
            (folder / name).write_text(text)
        return folder

    return make


@pytest.fixture
def register(adapter: Callable[..., Path]) -> Callable[..., int]:
    def one(registry: Registry, run: str, verdict: Outcome = "passed") -> int:
        return registry.register_adapter(adapter(run), origin(run), evaluation(verdict))

    return one
