"""How large the Workflow of a run grows on the cluster, reckoned from the compiled pipeline before it is submitted.

Argo keeps a run's graph in one Kubernetes object, and compresses it above a megabyte; Kubeflow Pipelines then shows the
state before that for ever. Most of it is the patch of each stage's pod, which stands in the nodes of its driver, its
graph, its retries and its pod. The constants below are those of KFP 2.17 and Argo 4.0.
"""

import json
from collections.abc import Iterator
from typing import Any

from guardloop.core.errors import GuardLoopError
from launch.pipelines import Spec

LIMIT = 2**20
MARGIN = 0.97  # of the limit: the reckoning is off by less
FIXED = 25_000  # the object itself, its shared templates, the first nodes
TASK_TEMPLATE, GRAPH_NODES = 2_200, 6_600  # a task in a template; a graph's node, its driver's and their inputs
DRIVER_NODE, STAGE_NODES, RETRY_NODE = 1_400, 2_070, 1_020  # beside the patch and the inputs that stand in them
URI = "minio://mlpipeline/v2/artifacts/guardloop/" + "0" * 36 + "/generate-responses/" + "0" * 36 + "/"
STORE = {
    "Provider": "minio",
    "Params": {
        "accessKeyKey": "accesskey",
        "disableSSL": "true",
        "endpoint": "seaweedfs.kubeflow:9000",
        "forcePathStyle": "true",
        "fromEnv": "false",
        "maxRetries": "5",
        "region": "us-east-1",
        "secretKeyKey": "secretkey",
        "secretName": "mlpipeline-minio-artifact",
    },
}
LAUNCHER = ["0" * 620]  # the launcher's own arguments: the run, the pod, the servers


def check_size(spec: Spec, platform: Spec, arguments: dict[str, Any], shards: int) -> int:
    """Bytes that the Workflow grows to. Raises GuardLoopError if too many, with the number of shards that fits."""
    size = workflow_bytes(spec, platform, arguments, shards)
    if size <= MARGIN * LIMIT:
        return size
    base = workflow_bytes(spec, platform, arguments, 0)
    largest = int((MARGIN * LIMIT - base) / ((size - base) / shards)) if shards and size > base else 0
    remedy = "shorten the settings: not even one shard fits"
    if largest > 0:
        remedy = f"set shards to {largest} or fewer in the platform"
    raise GuardLoopError(
        f"{shards} shards make a workflow of about {size / 1000:,.0f} kB, and Kubeflow Pipelines loses sight of one "
        f"above {LIMIT / 1000:,.0f} kB",
        remedy,
    )


def workflow_bytes(spec: Spec, platform: Spec, arguments: dict[str, Any], shards: int) -> int:
    """Bytes of the Workflow when a run of the compiled pipeline ends. `arguments` are the pipeline's parameters."""
    executors = spec.get("deploymentSpec", {}).get("executors", {})
    pods = platform.get("platforms", {}).get("kubernetes", {}).get("deploymentSpec", {}).get("executors", {})
    size = FIXED + sum(_escaped(part) + 60 for part in (spec["root"], *spec["components"].values()))
    size += sum(_escaped(executor.get("container", {})) for executor in executors.values())
    size += sum(_escaped(pod) for pod in pods.values())
    for task, times, in_loop in _tasks(spec, spec["root"], shards):
        component = spec["components"][task["componentRef"]["name"]]
        size += 0 if in_loop else TASK_TEMPLATE
        label = component.get("executorLabel")
        if "container" not in executors.get(label, {}):
            size += times * GRAPH_NODES
            continue
        container, pod = executors[label]["container"], pods.get(label, {})
        patch = _escaped(_patch(component, task, container, pod, arguments, shards))
        inputs = sum(_escaped(part) for part in (component, task, container, pod))
        marks = pod.get("podMetadata", {})
        pairs = [*marks.get("labels", {}).items(), *marks.get("annotations", {}).items()]
        metadata = sum(len(key) + len(value) + 75 for key, value in pairs)  # inputs of each node but the driver's
        nodes = DRIVER_NODE + inputs + STAGE_NODES + 3 * patch + 2 * metadata
        size += times * (nodes + (RETRY_NODE + patch + metadata if "retryPolicy" in task else 0))
    return size


def _tasks(spec: Spec, part: Spec, shards: int, times: int = 1, loop: bool = False) -> Iterator[tuple[Spec, int, bool]]:
    """(task, how often it runs, whether its template is counted already) of a graph and of those in it."""
    for task in part["dag"]["tasks"].values():
        if "== false" in task.get("triggerPolicy", {}).get("condition", ""):
            continue  # the other branch is the larger one
        looped = "parameterIterator" in task
        often = times * shards if looped else times
        yield task, often, loop
        component = spec["components"][task["componentRef"]["name"]]
        if "dag" in component:
            yield from _tasks(spec, component, shards, often, loop)


def _patch(
    component: Spec, task: Spec, container: Spec, pod: Spec, arguments: dict[str, Any], shards: int
) -> dict[str, Any]:
    """The patch of a stage's pod, as its driver writes it."""
    takes, gives = component.get("inputDefinitions", {}), component.get("outputDefinitions", {})
    one = {
        "name": "100",
        "uri": f"{URI}artifact",
        "metadata": {"display_name": "x" * 9, "store_session_info": _text(STORE)},
    }
    lists = {name: shards if of.get("isArtifactList") else 1 for name, of in takes.get("artifacts", {}).items()}
    made = {"type": {"schemaTitle": "system.Dataset", "schemaVersion": "0.0.1"}}
    written = {name: {"artifacts": [{"name": name, **made, "uri": URI + name}]} for name in gives.get("artifacts", {})}
    executor_input = {
        "inputs": {
            "artifacts": {name: {"artifacts": [one] * count} for name, count in lists.items()},
            "parameterValues": _values(task, takes, arguments),
        },
        "outputs": {
            "artifacts": written | {"executor-logs": {"artifacts": [{**made, "uri": URI + "executor-logs"}]}},
            "parameters": {name: {"outputFile": f"/tmp/kfp/outputs/{name}"} for name in gives.get("parameters", {})},
            "outputFile": URI.replace(":/", "") + "output_metadata.json",
        },
    }
    return {
        "volumes": [{"name": v["constant"], "persistentVolumeClaim": {}} for v in pod.get("pvcMount", [])],
        "containers": [
            {
                "name": "main",
                "image": container["image"],
                "command": [*LAUNCHER, _text(executor_input), _text(component)],
                "args": [*container.get("command", []), *container.get("args", [])],
                "env": [*container.get("env", []), *_variables(pod)],
                "resources": container.get("resources", {}),
                "volumeMounts": pod.get("pvcMount", []),
                "securityContext": {"capabilities": {"drop": ["ALL"]}, "runAsNonRoot": True},
            }
        ],
        "nodeSelector": pod.get("nodeSelector", {}),
        "tolerations": pod.get("tolerations", []),
    }


def _values(task: Spec, takes: Spec, arguments: dict[str, Any]) -> dict[str, Any]:
    """The parameters that a task gets, where they are known before the run."""
    values = {}
    for name, source in task.get("inputs", {}).get("parameters", {}).items():
        argument = source.get("componentInputParameter", "").removeprefix("pipelinechannel--")
        default = takes.get("parameters", {}).get(name, {}).get("defaultValue", 0)
        values[name] = source.get("runtimeValue", {}).get("constant", arguments.get(argument, default))
    return values


def _variables(pod: Spec) -> list[dict[str, Any]]:
    """The environment that comes from secrets, config maps and the pod itself."""
    variables = []
    for field, reference, name, key in (
        ("secretAsEnv", "secretKeyRef", "secretName", "secretKey"),
        ("configMapAsEnv", "configMapKeyRef", "configMapName", "configMapKey"),
    ):
        for use in pod.get(field, []):
            for entry in use.get("keyToEnv", []):
                source = {"name": use.get(name), "key": entry.get(key), "optional": False}
                variables.append({"name": entry["envVar"], "valueFrom": {reference: source}})
    for use in pod.get("fieldPathAsEnv", []):
        variables.append({"name": use["name"], "valueFrom": {"fieldRef": {"fieldPath": use["fieldPath"]}}})
    return variables


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _escaped(value: Any) -> int:
    """Bytes of a value that stands as a JSON string within JSON."""
    return len(_text(_text(value)).encode())
