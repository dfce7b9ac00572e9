"""The real images: the pipeline in containers decides as it does in processes. `make test-images` builds and runs."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from support.services import MlflowServer, S3Server
from support.workshop import Workshop

from guardloop.core.records import read_table
from launch.images import MODEL_STAGES, STAGES, image_of

TAG = os.environ.get("GUARDLOOP_TEST_IMAGES", "")
pytestmark = [pytest.mark.images, pytest.mark.skipif(not TAG, reason="`make test-images` builds the images first")]
DOCKER = {"runner": "docker", "docker": {"tag": TAG}}
GUARD = "guardloop-guard"
SECRETS = ("/etc/uv", "/etc/pip.conf", "/tmp/.cache", "/lock.txt", "/torch", "/dist")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Workshop]]:
    """One configuration, run by processes and by containers; these record at an MLflow server with an S3 store."""
    services = tmp_path_factory.mktemp("services")
    with S3Server(services) as store, MlflowServer(services, store) as server:
        runs = {}
        for name, runner in {"processes": {}, "containers": DOCKER}.items():
            runs[name] = workshop = Workshop(tmp_path_factory.mktemp(name))
            workshop.environment = {"MLFLOW_TRACKING_URI": server.url} if runner else {}
            workshop.unset = ("ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS")  # containers have the processor as it is
            ended = workshop.guardloop(runner=runner, guard={"threshold": workshop.middle_of_sample()})
            assert ended.returncode == 0, ended.stdout + ended.stderr
        yield runs


def test_the_decision_and_every_figure_are_the_same(both: dict[str, Workshop]) -> None:
    processes, containers = (both[name].summary() for name in ("processes", "containers"))

    assert containers["decision"] == processes["decision"] == "not promoted"
    assert containers["headline"] == processes["headline"]
    assert containers["mining"] == processes["mining"]
    ended = [sorted(s["stage"] for s in summary["stages"]) for summary in (containers, processes)]
    assert ended[0] == ended[1]  # those side by side end in any order
    assert flat(containers["evaluation"]) == pytest.approx(flat(processes["evaluation"]), abs=1e-5)


def test_every_score_is_the_same_to_the_fifth_place(both: dict[str, Workshop]) -> None:
    processes, containers = (scores(both[name]) for name in ("processes", "containers"))

    assert len(processes) > 150
    assert containers == pytest.approx(processes, abs=1e-5)
    verdicts = [{key: value > 0 for key, value in scores.items()} for scores in (processes, containers)]
    assert verdicts[0] == verdicts[1]


def test_the_training_set_is_the_same(both: dict[str, Workshop]) -> None:
    sets = [list(read_table(artifact(both[name], "training_set") / "examples.parquet")) for name in both]

    assert sets[0] == sets[1]
    assert len(sets[0]) > 10


def test_a_stage_that_fails_in_its_container_says_why(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)

    ended = workshop.guardloop(runner=DOCKER, dataset={"traffic": {"path": "traffic"}, "test": {"path": "traffic"}})

    assert ended.returncode == 2
    assert "no prompt is left after cleaning" in ended.stderr


def test_a_container_that_dies_before_its_stage_starts_fails_the_run(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)

    ended = workshop.guardloop(runner={"runner": "docker", "docker": {"tag": TAG, "user": "10001:10001"}})

    assert ended.returncode == 2  # that user may not write the run's folder
    assert "PermissionError" in ended.stderr + (workshop.latest / "run.log").read_text()
    assert not running()


@pytest.mark.parametrize("stage", STAGES)
def test_an_image_is_named_for_its_commit_and_runs_as_nobody(stage: str) -> None:
    config = json.loads(docker("image", "inspect", image(stage)))[0]["Config"]

    assert int(config["User"].split(":")[0]) > 0
    assert not config["Entrypoint"]
    labels = {key.rpartition(".")[2]: value for key, value in config["Labels"].items()}
    assert labels["title"] == f"guardloop/{stage}"
    assert labels["revision"] in TAG
    assert labels["version"]
    assert "OMP_WAIT_POLICY=PASSIVE" in config["Env"]


@pytest.mark.parametrize("stage", STAGES)
def test_an_image_holds_its_stage_and_nothing_to_install_with(stage: str) -> None:
    probe = (
        "import importlib.util, pathlib, sys\n"
        "import guardloop.stages, kfp.dsl.executor_main\n"
        f"left = [p for p in map(pathlib.Path, {SECRETS}) if p.is_file() or any(f.is_file() for f in p.rglob('*'))]\n"
        "found = {name: importlib.util.find_spec(name) is not None for name in ('pip', 'torch')}\n"
        "print(left, found, pathlib.Path('/opt/guardloop/bin/uv').exists())"
    )

    started = ("--rm", "--network", "none", "--user", "12345:0", "--env", "_KFP_RUNTIME=true")  # as KFP starts it
    closed = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true")
    printed = docker("run", *started, *closed, image(stage), "python", "-c", probe)

    assert printed.strip() == f"[] {{'pip': False, 'torch': {stage in MODEL_STAGES}}} False"


def test_a_second_round_goes_on_from_the_registered_guard(both: dict[str, Workshop]) -> None:
    """Last in this file, since it replaces the run that the others look at."""
    workshop = both["containers"]
    client = MlflowClient(workshop.environment["MLFLOW_TRACKING_URI"])
    (first,) = client.search_model_versions(f"name = '{GUARD}'")
    client.set_registered_model_alias(GUARD, "champion", first.version)

    ended = workshop.guardloop(runner=DOCKER, guard={"adapter": f"models:/{GUARD}@champion"})

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(client.search_model_versions(f"name = '{GUARD}'")) == 2


def image(stage: str) -> str:
    return image_of(stage, "guardloop", TAG)


def docker(*arguments: str) -> str:
    client = os.environ.get("DOCKER", "docker")
    return subprocess.run([client, *arguments], capture_output=True, text=True, check=True).stdout


def running() -> str:
    return docker("ps", "--quiet", "--filter", "label=io.guardloop.run")


def artifact(workshop: Workshop, name: str) -> Path:
    return next((workshop.latest / "artifacts").rglob(name))


def scores(workshop: Workshop) -> dict[str, float]:
    """Every score of a run, by stage, row and sample."""
    found = {}
    for path in sorted((workshop.latest / "artifacts").rglob("verdicts")):
        for row in read_table(path):
            found[f"{path.parent.name} {row['id']} {row.get('sample')}"] = row["score"]
    return found


def flat(value: object, name: str = "") -> dict[str, float]:
    """The numbers in nested values, by their place."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flat(part, f"{name}.{key}").items()}
    if isinstance(value, list):
        return {k: v for i, part in enumerate(value) for k, v in flat(part, f"{name}.{i}").items()}
    return {name: float(value)} if isinstance(value, int | float) else {}
