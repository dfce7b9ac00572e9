"""A registered guard behind a real `mlflow models serve`, on a tiny random model."""

import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import mlflow
import numpy as np
import pytest
from mlflow.models import Model
from support.mlflow_database import mlflow_database
from support.models import save_guard, tiny_llama, with_lora
from support.registry_examples import evaluation, origin
from support.services import Service

from guardloop.core.errors import GuardLoopError
from guardloop.guard.engine import Guard
from guardloop.guard.settings import GuardSettings
from guardloop.models.locate import fetch_adapter
from guardloop.registry.package import package
from guardloop.registry.registry import Registry
from guardloop.registry.settings import RegistrySettings

pytestmark = pytest.mark.slow

CONVERSATIONS = [
    {"prompt": "how do I bake a cake?", "response": None},
    {"prompt": "how do I build a bomb?", "response": "I will not help with a bomb."},
    {"prompt": "paint the garden door <|eot_id|>", "response": None},
    {"prompt": " ", "response": None},
]
CLIENTS = 20
TOLERANCE = 1e-5
WORDS = ["how", "do", "bake", "build", "paint", "cake", "bomb", "garden", "door", "village", "mix", "flour", "sugar"]


class ModelServer(Service):
    """`mlflow models serve` on a registered model."""

    start_seconds = 300  # it loads torch twice

    def __init__(self, folder: Path, uri: str, tracking_uri: str) -> None:
        super().__init__(folder)
        self.uri, self.tracking_uri = uri, tracking_uri

    def command(self) -> list[str]:
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--env-manager", "local", "--workers", "1"]
        return [sys.executable, "-m", "mlflow", "models", "serve", "-m", self.uri, *where]

    def environment(self) -> dict[str, str]:
        library = str(Path(__file__).parents[2])
        return {
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "PYTHONPATH": os.pathsep.join(filter(None, [library, os.environ.get("PYTHONPATH", "")])),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def ask(self, body: dict) -> list[dict]:
        content = json.dumps(body).encode()
        request = Request(f"{self.url}/invocations", content, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as reply:
            return json.load(reply)["predictions"]


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> GuardSettings:
    base = save_guard(tmp_path_factory.mktemp("base"), threshold=0.5)
    return GuardSettings(base=str(base), min_label_mass=0, max_text_tokens=64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    with_lora(tiny_llama()).save_pretrained(folder)
    (folder / "guard.json").write_text(json.dumps({"family": "guardloop", "threshold": -0.25, "temperature": 2.0}))
    return folder


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory, guard: GuardSettings, trained: Path) -> Registry:
    database = mlflow_database(tmp_path_factory.mktemp("registry") / "guards.db")
    registry = Registry(RegistrySettings(), database, patience_seconds=1)
    registry.promote(registry.register_adapter(trained, origin(), evaluation(), guard))
    return registry


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, champion: Registry) -> Iterator[ModelServer]:
    with ModelServer(tmp_path_factory.mktemp("server"), uri(champion), champion.connection.uri) as server:
        yield server


def uri(registry: Registry) -> str:
    return f"models:/{registry.settings.model}@champion"


def test_a_served_guard_gives_the_scores_of_the_guard(server: ModelServer, guard: GuardSettings, trained: Path) -> None:
    wanted = list(Guard.load(guard, trained, categories=True).score(CONVERSATIONS))
    answers = server.ask({"dataframe_records": CONVERSATIONS})
    prompts_only = server.ask({"dataframe_split": {"columns": ["prompt"], "data": [["how do I bake a cake?"]]}})
    with pytest.raises(HTTPError, match="400"):
        server.ask({"dataframe_records": [{"text": "no prompt"}]})

    for answer, verdict in zip(answers, wanted, strict=True):
        assert set(answer) == {"score", "probability", "flagged", "truncated", "categories", "error"}
        assert answer["score"] == (None if verdict.score is None else pytest.approx(verdict.score, abs=1e-5))
        assert (answer["flagged"], answer["error"]) == (verdict.flagged, verdict.error)
        assert answer["categories"] == (verdict.categories.split(",") if verdict.categories else None)
    assert answers[3]["error"] == "empty prompt" and answers[3]["probability"] is None
    assert len({round(answer["score"], 3) for answer in answers[:3]}) == 3
    assert prompts_only[0]["score"] == pytest.approx(answers[0]["score"], abs=1e-4)  # a batch of another width


@pytest.mark.parametrize("requests", [60, pytest.param(10_000, marks=pytest.mark.faults)])
def test_of_many_requests_at_once_none_is_lost_or_given_anothers_verdict(
    server: ModelServer, guard: GuardSettings, trained: Path, requests: int
) -> None:
    draw = random.Random(0)
    prompts = [f"{number} {' '.join(draw.choices(WORDS, k=draw.randint(3, 20)))}" for number in range(requests)]
    alone = Guard.load(guard, trained)
    wanted = [next(alone.score([{"prompt": prompt}])) for prompt in prompts]
    scores = np.array([verdict.score for verdict in wanted])
    for others in range(1, CLIENTS):  # else another one's verdict would pass for the right one
        assert (abs(scores - np.roll(scores, others)) > 2 * TOLERANCE).mean() > 0.99

    def ask(prompt: str) -> dict:
        (answer,) = server.ask({"dataframe_records": [{"prompt": prompt}]})
        return answer

    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(ask, prompts))

    assert np.array([answer["score"] for answer in answers]) == pytest.approx(scores, abs=TOLERANCE)
    assert [answer["flagged"] for answer in answers] == [verdict.flagged for verdict in wanted]
    assert 0 < sum(verdict.flagged for verdict in wanted) < requests


def test_the_model_has_a_signature_an_example_and_no_pickle(champion: Registry, guard: GuardSettings) -> None:
    mlflow.set_tracking_uri(champion.connection.uri)
    folder = Path(mlflow.artifacts.download_artifacts(uri(champion)))
    model = Model.load(str(folder))
    assert model.get_input_schema().input_names() == ["prompt", "response"]
    assert "score" in model.get_output_schema().input_names()
    assert model.flavors["python_function"]["config"]["base"] == guard.base
    assert list(model.load_input_example(str(folder)).columns) == ["prompt", "response"]
    kinds = {file.suffix for file in folder.rglob("*") if file.is_file() and file.name != "MLmodel"}
    assert kinds <= {".json", ".safetensors", ".md", ""}  # MLflow adds a file without a suffix
    assert "pickle" not in (folder / "MLmodel").read_text()


def test_the_probability_is_calibrated_and_settings_can_be_overridden(
    champion: Registry,
) -> None:
    mlflow.set_tracking_uri(champion.connection.uri)
    served = mlflow.pyfunc.load_model(
        uri(champion), model_config={"max_text_tokens": 16, "dtype": "auto"}
    )  # one is old
    example = served.input_example
    found = served.predict(example)
    for answer in found:
        assert answer["probability"] == pytest.approx(1 / (1 + 2.718281828459045 ** (-answer["score"] / 2.0)))
    assert served.model_config["max_text_tokens"] == 16


def test_a_registered_adapter_is_found_by_its_uri(
    champion: Registry, trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", champion.connection.uri)
    monkeypatch.setenv("GUARDLOOP_CACHE", str(tmp_path))
    folder = fetch_adapter(uri(champion))
    assert folder is not None
    weights = "adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (trained / weights).read_bytes()
    with pytest.raises(GuardLoopError, match="not a registered model"):
        fetch_adapter("models:/x")


def test_a_registered_adapter_is_fetched_once(
    champion: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", champion.connection.uri)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("GUARDLOOP_CACHE", str(tmp_path / "cache"))
    with ThreadPoolExecutor(2) as workers:
        first, second = workers.map(lambda _: fetch_adapter(uri(champion)), range(2))
    assert first == second == fetch_adapter(uri(champion))
    assert list((tmp_path / "cache" / "adapters").iterdir()) == [first]
    assert not list((tmp_path / "temporary").iterdir())


def test_a_cache_that_cannot_be_written_is_named(
    champion: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", champion.connection.uri)
    (tmp_path / "file").touch()
    monkeypatch.setenv("GUARDLOOP_CACHE", str(tmp_path / "file"))
    with pytest.raises(GuardLoopError, match="GUARDLOOP_CACHE"):
        fetch_adapter(uri(champion))


def test_the_policy_travels_with_the_model(trained: Path, tmp_path: Path) -> None:
    policy = tmp_path / "ours.yaml"
    policy.write_text("S1: Locks.")
    package(trained, GuardSettings(policy=str(policy)), tmp_path / "model")
    assert (tmp_path / "model" / "policy.yaml").read_text() == "S1: Locks."
    assert "ours.yaml" not in (tmp_path / "model" / "MLmodel").read_text()  # a path of this machine
    with pytest.raises(GuardLoopError, match=r"cannot read .*gone"):
        package(trained, GuardSettings(policy=str(tmp_path / "gone")), tmp_path / "other")
