"""The compiled pipelines: what is in them, and what must not be."""

import json
from pathlib import Path

import pytest
import yaml
from kfp import dsl

from guardloop.config import load_settings
from launch.kubeflow.compile import compile_all
from launch.pipelines import parameters

STAGES = {
    "process": {"prepare-data", "screen", "generate-responses", "screen-2", "mine-feedback"},
    "train": {"train-guard"},
    "evaluate": {"screen", "screen-candidate", "evaluate", "register-model", "promote-model"},
}
STAGES["full"] = {"prepare-data", "generate-responses", "mine-feedback", "train-guard", *STAGES["evaluate"]}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("pipelines")
    return {path.stem: yaml.safe_load(path.read_text()) for path in compile_all(folder)}


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_is_in_the_pipeline(compiled: dict[str, dict], name: str) -> None:
    tasks = {task for dag in _dags(compiled[name]) for task in dag["tasks"]}

    assert STAGES[name] <= tasks


def test_promotion_and_training_hang_on_bools(compiled: dict[str, dict]) -> None:
    conditions = [
        task["triggerPolicy"]["condition"]
        for dag in _dags(compiled["full"])
        for task in dag["tasks"].values()
        if "triggerPolicy" in task and "condition" in task["triggerPolicy"]
    ]

    assert sorted(condition.rpartition("== ")[2] for condition in conditions) == ["false", "true", "true"]


def test_traffic_is_fanned_out_over_shards_and_collected(compiled: dict[str, dict]) -> None:
    loops = [t for dag in _dags(compiled["process"]) for t in dag["tasks"].values() if "parameterIterator" in t]

    assert len(loops) == 1


@pytest.mark.parametrize("name", STAGES)
def test_nothing_is_installed_at_run_time(compiled: dict[str, dict], name: str) -> None:
    text = json.dumps(compiled[name])

    assert "pip install" not in text
    assert ":latest" not in text


def test_only_a_fresh_pipeline_takes_nothing_from_the_cache(compiled: dict[str, dict], tmp_path: Path) -> None:
    (path,) = [path for path in compile_all(tmp_path, fresh=True) if path.stem == "full"]
    fresh = yaml.safe_load(path.read_text())

    for pipeline, caching in ((compiled["full"], True), (fresh, False)):
        tasks = [task for dag in _dags(pipeline) for task in dag["tasks"].values()]
        assert any(task.get("cachingOptions", {}).get("enableCache") for task in tasks) == caching


@pytest.mark.parametrize("name", STAGES)
def test_what_the_launcher_gives_is_what_the_pipeline_takes(compiled: dict[str, dict], name: str) -> None:
    takes = compiled[name]["root"]["inputDefinitions"]["parameters"]
    needed = {key for key, value in takes.items() if not value.get("isOptional") and not key.endswith("_uri")}

    assert needed <= set(parameters(name)) <= set(takes)


def test_sections_of_the_settings_are_the_parameters_of_the_form(compiled: dict[str, dict]) -> None:
    takes = set(compiled["full"]["root"]["inputDefinitions"]["parameters"])
    sections = set(load_settings(Path("configs/demo.yaml")).sections())

    assert sections <= takes
    assert len(takes) == len(sections) + 1  # shards


# What kfp.local lets pass, and Kubeflow's driver does not


@pytest.mark.parametrize("name", STAGES)
def test_parameters_arrive_with_the_type_that_is_asked_for(compiled: dict[str, dict], name: str) -> None:
    components, found = compiled[name]["components"], set()
    for part in (compiled[name]["root"], *components.values()):
        tasks = part.get("dag", {}).get("tasks", {})
        for label, task in tasks.items():
            takes = _parameters(components[task["componentRef"]["name"]], "inputDefinitions")
            for key, given in task.get("inputs", {}).get("parameters", {}).items():
                if "parameterExpressionSelector" in given:
                    continue
                if "componentInputParameter" in given:
                    source = _parameters(part, "inputDefinitions")[given["componentInputParameter"]]
                elif output := given.get("taskOutputParameter"):
                    producer = components[tasks[output["producerTask"]]["componentRef"]["name"]]
                    source = _parameters(producer, "outputDefinitions")[output["outputParameterKey"]]
                else:
                    continue
                found.add(key)
                assert source["parameterType"] == takes[key]["parameterType"], (label, key)
    assert name not in ("process", "full") or "shard" in found


@pytest.mark.parametrize("name", STAGES)
def test_no_default_holds_a_placeholder(compiled: dict[str, dict], name: str) -> None:
    for part in (compiled[name]["root"], *compiled[name]["components"].values()):
        defaults = [one.get("defaultValue") for one in _parameters(part, "inputDefinitions").values()]
        assert "{{$" not in json.dumps(defaults)


@pytest.mark.parametrize(
    ("name", "recorders"),
    [("evaluate", {"register-model"}), ("full", {"register-model", "record-mining"})],
)
def test_what_records_a_run_is_given_its_id_as_a_constant(
    compiled: dict[str, dict], name: str, recorders: set[str]
) -> None:
    given = {
        label: task["inputs"]["parameters"]["run_id"]
        for dag in _dags(compiled[name])
        for label, task in dag["tasks"].items()
        if "run_id" in task.get("inputs", {}).get("parameters", {})
    }

    assert given.keys() == recorders
    for source in given.values():
        assert source == {"runtimeValue": {"constant": dsl.PIPELINE_JOB_ID_PLACEHOLDER}}


def test_what_is_mined_opens_the_earlier_run_that_a_cached_shard_is_of(compiled: dict[str, dict]) -> None:
    (mining,) = (
        task for dag in _dags(compiled["process"]) for label, task in dag["tasks"].items() if label == "mine-feedback"
    )
    takes = compiled["process"]["components"][mining["componentRef"]["name"]]["inputDefinitions"]["artifacts"]
    alone = {key for key, one in takes.items() if not one.get("isArtifactList")}
    assert [mining["inputs"]["artifacts"][key]["taskOutputArtifact"]["producerTask"] for key in alone] == [
        "prepare-data"
    ]


def test_a_promotion_never_comes_from_the_cache(compiled: dict[str, dict]) -> None:
    promotions = [dag["tasks"]["promote-model"] for dag in _dags(compiled["full"]) if "promote-model" in dag["tasks"]]
    assert promotions and not any(task.get("cachingOptions", {}).get("enableCache") for task in promotions)


def _parameters(part: dict, definitions: str) -> dict[str, dict]:
    return part.get(definitions, {}).get("parameters", {})


def _dags(compiled: dict) -> list[dict]:
    parts = [compiled["root"], *compiled["components"].values()]
    return [part["dag"] for part in parts if "dag" in part]
