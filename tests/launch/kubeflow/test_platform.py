"""What a cluster's settings make of the pipelines."""

import ast
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp.kubernetes import kubernetes_executor_config_pb2
from support.root import ROOT

from guardloop.config import PlatformSettings, load_platform, load_settings
from guardloop.config.cluster import ClusterSettings, StageName, amount
from guardloop.core.errors import GuardLoopError
from guardloop.core.escaped import escape
from guardloop.core.records import read_table
from guardloop.core.settings import read_section
from launch.images import image_of, stage_of
from launch.kubeflow.compile import compile_all
from launch.kubeflow.platform import COMPONENTS, EXECUTOR
from launch.kubeflow.size import workflow_bytes

STAGES = StageName.__args__
PIPELINES = ("process", "train", "evaluate", "full")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Compiled = dict[str, tuple[dict[str, Any], dict[str, Any]]]


def compile_for(folder: Path, platform: PlatformSettings, commit: str = COMMIT, **options: Any) -> Compiled:
    """(pipeline, executors of the platform spec) by name."""
    compiled = {}
    for path in compile_all(folder, platform, commit, **options):
        spec, pods = yaml.safe_load_all(path.read_text("utf-8"))
        compiled[path.stem] = spec, pods["platforms"]["kubernetes"]
    return compiled


def cluster(**values: Any) -> PlatformSettings:
    return read_section(PlatformSettings, {"runner": "kubeflow", "shards": 3, "cluster": values}, "p.yaml")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Every stage with settings of its own, so that a mix-up shows."""
    stages = {name: {"memory_limit": f"{n + 10}Gi", "timeout_seconds": 100 + n} for n, name in enumerate(STAGES)}
    stages["screen"] |= {"gpus": 2, "gpu_type": "amd.com/gpu", "retries": {"count": 5, "wait_seconds": 7, "factor": 3}}
    stages["evaluate"] |= {"retries": {"count": 0}}
    stages["train-guard"] |= {
        "spot": True,
        "shared_memory": "4Gi",
        "node_selector": {"disk": "fast"},
        "tolerations": [{"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoExecute"}],
    }
    platform = cluster(
        registry="registry.example.com:5000/team/guardloop",
        pull_secrets=["pull-me"],
        run_as_user=1234,
        environment={"PLAIN": "value"},
        secrets=[{"name": "hub", "keys": {"token": "HF_TOKEN"}, "optional": True, "stages": ["screen", "train-guard"]}],
        config_maps=[{"name": "addresses", "keys": {"mlflow": "MLFLOW_TRACKING_URI"}}],
        volumes=[{"claim": "models", "path": "/models", "stages": ["screen"]}],
        labels={"team": "safety"},
        annotations={"note": "kept"},
        spot_nodes={"node_selector": {"spot": "true"}, "tolerations": [{"key": "spot"}]},
        defaults={"retries": {"count": 1}},
        stages=stages,
    )
    return compile_for(tmp_path_factory.mktemp("compiled"), platform)


def pods(compiled: Compiled, name: str) -> dict[str, tuple[str, dict[str, Any], dict[str, Any]]]:
    """(stage, container, platform settings) by executor."""
    spec, kubernetes = compiled[name]
    containers = {
        label: executor["container"]
        for label, executor in spec["deploymentSpec"]["executors"].items()
        if "container" in executor
    }
    settings = kubernetes["deploymentSpec"]["executors"]
    assert settings.keys() == containers.keys()
    return {label: (stage_of(c["image"]), c, settings[label]) for label, c in containers.items()}


@pytest.mark.parametrize("name", PIPELINES)
def test_every_executor_of_every_nested_pipeline_gets_its_stage_settings(compiled: Compiled, name: str) -> None:
    found = pods(compiled, name)
    for stage, container, settings in found.values():
        n = STAGES.index(stage)
        assert container["resources"]["resourceMemoryLimit"] == f"{n + 10}Gi"
        assert settings["activeDeadlineSeconds"] == str(100 + n)
        assert settings["securityContext"] == {"runAsNonRoot": True, "runAsUser": "1234"}
        assert settings["imagePullSecret"][0]["secretName"] == "pull-me"
        labels = {"team": "safety", "app.kubernetes.io/component": stage}
        assert settings["podMetadata"] == {"labels": labels, "annotations": {"note": "kept"}}
    if name == "full":
        assert {stage for stage, _, _ in found.values()} == set(STAGES)
        assert len(found) > len(STAGES)  # `screen` has several executors


def test_images_carry_registry_commit_and_flavour(compiled: Compiled) -> None:
    for stage, container, _ in pods(compiled, "full").values():
        flavour = "-gpu" if stage == "screen" else ""
        assert container["image"] == f"registry.example.com:5000/team/guardloop/{stage}:{COMMIT}{flavour}"


def test_only_stages_with_gpus_ask_for_them(compiled: Compiled) -> None:
    for stage, container, _ in pods(compiled, "full").values():
        asked = container["resources"].get("accelerator")
        assert asked == ({"resourceType": "amd.com/gpu", "resourceCount": "2"} if stage == "screen" else None)


def test_credentials_and_volumes_go_to_the_stages_that_are_named_and_to_no_other(compiled: Compiled) -> None:
    for stage, _, settings in pods(compiled, "full").values():
        assert ("secretAsEnv" in settings) == (stage in ("screen", "train-guard"))
        assert ("pvcMount" in settings) == (stage == "screen")
        assert settings["configMapAsEnv"][0]["keyToEnv"] == [
            {"configMapKey": "mlflow", "envVar": "MLFLOW_TRACKING_URI"}
        ]


def test_spot_selectors_tolerations_and_shared_memory(compiled: Compiled) -> None:
    for stage, _, settings in pods(compiled, "full").values():
        if stage != "train-guard":
            assert settings.keys().isdisjoint({"nodeSelector", "tolerations", "emptyDirMounts"})
            continue
        assert settings["nodeSelector"]["labels"] == {"disk": "fast", "spot": "true"}
        assert settings["tolerations"] == [
            {"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoExecute"},
            {"key": "spot", "operator": "Exists"},
        ]
        (memory,) = settings["emptyDirMounts"]
        assert (memory["mountPath"], memory["medium"], memory["sizeLimit"]) == ("/dev/shm", "Memory", "4Gi")


@pytest.mark.parametrize("name", PIPELINES)
def test_tasks_of_every_graph_are_retried_until_the_last_attempt_had_its_time(compiled: Compiled, name: str) -> None:
    spec, _ = compiled[name]
    seen = set()
    for part in (spec["root"], *spec["components"].values()):
        for task in part.get("dag", {}).get("tasks", {}).values():
            label = spec["components"][task["componentRef"]["name"]].get("executorLabel")
            if label not in pods(compiled, name):
                assert "retryPolicy" not in task  # a graph is not run again as a whole
                continue
            stage = pods(compiled, name)[label][0]
            seen.add(stage)
            policy, timeout = task.get("retryPolicy"), 100 + STAGES.index(stage)
            if stage == "evaluate":
                assert policy is None
                continue
            count, pause, factor = (5, 7, 3) if stage == "screen" else (1, 30, 2)
            assert (policy["maxRetryCount"], policy["backoffDuration"]) == (count, f"{pause}s")
            assert policy["backoffFactor"] == factor
            pauses = sum(pause * factor**n for n in range(count))
            week = 7 * 86400  # of waiting for nodes
            assert policy["backoffMaxDuration"] == f"{(count + 1) * timeout + pauses + week}s"
    assert seen == {stage for stage, _, _ in pods(compiled, name).values()}


def test_stages_are_told_the_run_the_commit_and_the_configuration(tmp_path: Path) -> None:
    settings = load_settings("configs/demo.yaml")
    spec, kubernetes = compile_for(tmp_path, cluster(), settings=settings, configuration="demo.yaml")["full"]
    for executor in spec["deploymentSpec"]["executors"].values():
        told = {v["name"]: v["value"] for v in executor["container"]["env"]}
        assert told == {"GUARDLOOP_GIT_SHA": COMMIT, "GUARDLOOP_CONFIGURATION": "demo.yaml"}
    for pod in kubernetes["deploymentSpec"]["executors"].values():
        assert pod["fieldPathAsEnv"] == [{"name": "GUARDLOOP_RUN_ID", "fieldPath": "metadata.labels['pipeline/runid']"}]
    assert kubernetes["pipelineConfig"] == {"resourceTtlOnCompletion": 86400}


def test_a_configuration_fills_the_form_that_kfp_shows(tmp_path: Path) -> None:
    settings = load_settings("configs/demo.yaml")
    spec, _ = compile_for(tmp_path, cluster(), settings=settings)["full"]
    form = spec["root"]["inputDefinitions"]["parameters"]

    assert form["shards"]["defaultValue"] == 3
    for name, section in settings.sections().items():
        assert form[name]["defaultValue"] == section and form[name]["isOptional"]


def test_what_is_written_for_pods_is_what_the_backend_reads(compiled: Compiled) -> None:
    from google.protobuf import json_format

    for _, _, settings in pods(compiled, "full").values():
        json_format.ParseDict(settings, kubernetes_executor_config_pb2.KubernetesExecutorConfig())


def test_components_know_nothing_of_the_platform(compiled: Compiled, tmp_path: Path) -> None:
    (plain,) = [p for p in compile_all(tmp_path) if p.stem == "full"]
    before = yaml.safe_load(plain.read_text("utf-8"))["deploymentSpec"]["executors"]
    for label, (_, container, _) in pods(compiled, "full").items():
        own = before[label]["container"]
        assert container["args"] == own["args"] and container["command"] == EXECUTOR
        assert own.keys() == {"command", "args", "image"}  # and compiling for one platform leaves the next alone


@pytest.mark.parametrize(("tag", "why"), [("", "no git checkout"), ("latest", "never moves")])
def test_an_image_without_a_tag_that_stays_is_refused(tag: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(GuardLoopError, match=why):
        image_of("screen", "guardloop", tag)
    with pytest.raises(GuardLoopError, match=why):
        compile_all(tmp_path, cluster(), tag)


# Settings that cannot work are refused before anything is compiled


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"tag": "latest"}, "moves"),
        ({"registry": "https://registry.example.com/team"}, "registry"),
        ({"registry": "registry.example.com/Team"}, "registry"),
        ({"defaults": {"cpu": "4", "cpu_limit": "2"}}, "cpu 4 is above cpu_limit 2"),
        ({"defaults": {"memory": "1.5Gi", "memory_limit": "1Gi"}}, "above memory_limit"),
        ({"defaults": {"memory": "lots"}}, "not a quantity"),
        ({"defaults": {"shared_memory": "3Gi"}}, "shared_memory 3Gi is above"),
        ({"defaults": {"cpu_limit": "1"}, "stages": {"screen": {"cpu": "1500m"}}}, "stages.screen: "),
        ({"stages": {"screen": {"spot": True}}}, "spot_nodes does not say"),
        ({"stages": {"screening": {}}}, "screening"),
        ({"stages": {"screen": {"gpu": 1}}}, "did you mean `gpus`?"),
        ({"defaults": {"retries": {"factor": 1.5}}}, "factor"),
        ({"defaults": {"tolerations": [{"key": "a", "operator": "Equal"}]}}, "Equal needs a value"),
        ({"secrets": [{"name": "Hub", "keys": {"a": "A"}}]}, "name"),
        ({"secrets": [{"name": "hub", "keys": {"a": "not a variable"}}]}, "keys"),
        ({"environment": {"1A": "x"}}, "environment"),
        ({"volumes": [{"claim": "models", "path": "models"}]}, "path"),
    ],
)
def test_a_wrong_cluster_setting_is_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(GuardLoopError) as caught:
        cluster(**values)
    assert says in caught.value.what


def test_a_cluster_section_belongs_to_the_runner_kubeflow() -> None:
    for values in ({"runner": "kubeflow"}, {"runner": "subprocess", "cluster": {}}):
        with pytest.raises(GuardLoopError, match="runner kubeflow"):
            read_section(PlatformSettings, values, "p.yaml")


def test_a_stage_changes_only_what_it_names() -> None:
    settings = read_section(
        ClusterSettings, {"defaults": {"memory": "2Gi", "gpus": 1}, "stages": {"screen": {"gpus": 0}}}, ""
    )

    assert (settings.stage("screen").gpus, settings.stage("screen").memory) == (0, "2Gi")
    assert settings.stage("evaluate") == settings.defaults


@pytest.mark.parametrize(
    ("quantity", "number"), [("500m", 0.5), ("2", 2.0), ("1.5", 1.5), ("16Gi", 16 * 2**30), ("3k", 3000), ("2M", 2e6)]
)
def test_quantities_are_read_as_kubernetes_reads_them(quantity: str, number: float) -> None:
    assert amount(quantity) == number


# Golden pipelines: what ships, as it is sent to KFP. The other pipelines are parts of `full`.


PLATFORMS = [path.stem for path in sorted(Path("configs/platform").glob("*.yaml"))]


@pytest.mark.parametrize("name", PLATFORMS)
def test_the_compiled_pipeline_is_the_golden_one(name: str, tmp_path: Path) -> None:
    platform = load_platform(name)
    (path,) = [p for p in compile_all(tmp_path, platform, COMMIT) if p.stem == "full"]
    same = {"docker": "local"}  # what the images run as processes is the same pipeline
    golden = ROOT / "tests" / "pipeline" / "golden" / f"{same.get(name, name)}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_bytes(path.read_bytes())
    found, expected = (list(yaml.safe_load_all(p.read_text("utf-8"))) for p in (path, golden))

    assert not (changed := sorted(_differences(expected, found))), (
        f"the pipeline for {name} is no longer the golden one. Changed:\n  " + "\n  ".join(changed[:20]) + "\n"
        "If this is what you meant, write it anew with `make golden`, and look at the diff before you commit it."
    )


def _differences(expected: Any, found: Any, place: str = "") -> list[str]:
    """Where two documents differ, with the values cut short."""
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = sorted(expected.keys() | found.keys())
        return [d for k in keys for d in _differences(expected.get(k), found.get(k), f"{place}.{k}".lstrip("."))]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return [d for n, (one, other) in pairs for d in _differences(one, other, f"{place}[{n}]")]
    if expected == found:
        return []
    return [f"{place}: {json.dumps(expected)[:60]} -> {json.dumps(found)[:60]}"]


# The form for a cluster


def test_the_images_copy_of_a_component_is_what_the_pipeline_was_compiled_from(tmp_path: Path) -> None:
    """KFP's executor in an image gets the function from components/stages.py; elsewhere from the compiled pipeline."""
    (plain,) = compile_all(tmp_path, only="full")
    program = "import sys, stages, inspect; print(inspect.getsource(getattr(stages, sys.argv[1])))"
    surroundings = {**os.environ, "_KFP_RUNTIME": "true", "PYTHONPATH": str(ROOT / "components")}
    spec = yaml.safe_load(plain.read_text("utf-8"))
    names = []
    for executor in spec["deploymentSpec"]["executors"].values():
        inline, arguments = executor["container"]["command"][-1], executor["container"]["args"]
        names.append(arguments[arguments.index("--function_to_execute") + 1])
        (compiled,) = [node for node in ast.parse(inline).body if isinstance(node, ast.FunctionDef)]
        baked = next(
            node
            for node in ast.parse((ROOT / "components/stages.py").read_text("utf-8")).body
            if isinstance(node, ast.FunctionDef) and node.name == names[-1]
        )
        baked.decorator_list = []
        assert ast.dump(compiled) == ast.dump(baked)
    loaded = subprocess.run(
        [sys.executable, "-c", program, names[0]], env=surroundings, capture_output=True, text=True, check=True
    )
    assert f"def {names[0]}(" in loaded.stdout


def test_every_image_holds_the_components() -> None:
    dockerfile = (ROOT / "images/Dockerfile").read_text("utf-8")
    assert dockerfile.count("cp /dist/components.py /opt/") == dockerfile.count("/dist/*.whl") == 8
    assert f"/opt/{Path(COMPONENTS).name}" == COMPONENTS


RECORDED = Path(__file__).parent / "recordings" / "workflow-4-shards.json.gz"


def test_the_size_of_a_workflow_is_reckoned_as_it_was_measured() -> None:
    """On what a cluster made of a run with four shards, before the pipelines were made smaller."""
    with gzip.open(RECORDED, "rt", encoding="utf-8") as file:
        recorded = json.load(file)

    size = workflow_bytes(recorded["spec"], recorded["platform"], recorded["arguments"], 4)

    assert size == pytest.approx(recorded["bytes"], rel=0.05) and recorded["bytes"] > 2**20


def test_more_shards_than_a_workflow_can_hold_are_refused_with_the_number_that_fits(tmp_path: Path) -> None:
    settings, platform = load_settings("configs/llama-guard-7b.yaml"), load_platform("gpu-cluster")
    assert compile_all(tmp_path, platform, "abc", settings, only="full")  # as it is shipped

    many = platform.model_copy(update={"shards": 64})
    with pytest.raises(GuardLoopError, match="64 shards make a workflow of about") as refused:
        compile_all(tmp_path, many, "abc", settings, only="full")
    largest = int(re.search(r"set shards to (\d+)", str(refused.value))[1])

    assert compile_all(tmp_path, platform.model_copy(update={"shards": largest}), "abc", settings, only="full")
    with pytest.raises(GuardLoopError):
        compile_all(tmp_path, platform.model_copy(update={"shards": largest + 1}), "abc", settings, only="full")


@pytest.mark.slow
def test_kfps_executor_runs_a_stage_from_the_images_copy(tmp_path: Path) -> None:
    """With strings that Kubernetes and Kubeflow would replace, as they arrive in the pod."""
    outputs = {"traffic": "system.Dataset", "test_set": "system.Dataset", "metrics": "system.Metrics"}
    artifacts = {
        name: {"artifacts": [{"name": name, "type": {"schemaTitle": kind}, "uri": str(tmp_path / name)}]}
        for name, kind in outputs.items()
    }
    dataset = {"traffic": {"kind": "sample", "path": "traffic", "limit": 20, "where": {"id": {"not": "$(HOME) {{x}}"}}}}
    given = {
        "inputs": {"parameterValues": {"dataset": escape(dataset), "seed": 0, "shards": 2}},
        "outputs": {
            "artifacts": artifacts,
            "parameters": {"Output": {"outputFile": str(tmp_path / "Output")}},
            "outputFile": str(tmp_path / "executor_output.json"),
        },
    }
    command = [part.replace(COMPONENTS, str(ROOT / "components/stages.py")) for part in EXECUTOR]
    command[command.index("python3")] = sys.executable
    arguments = ["--executor_input", json.dumps(given), "--function_to_execute", "prepare_data"]

    ended = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)

    assert ended.returncode == 0, ended.stderr
    written = json.loads((tmp_path / "executor_output.json").read_text("utf-8"))
    assert written["parameterValues"]["Output"] == [0, 1]
    assert len(list(read_table(tmp_path / "traffic"))) == 20
