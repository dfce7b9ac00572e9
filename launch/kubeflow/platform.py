"""What a cluster's settings do to a compiled pipeline: the one place where platform settings are applied.

A nested pipeline is flattened when it is compiled: one table of executors, one per component, and one graph per
pipeline. Pods are settled at the executors, retries at the graphs' tasks, so no nesting is missed.
"""

from types import SimpleNamespace
from typing import Any, cast

from kfp import kubernetes

from guardloop.config.cluster import ClusterSettings, StageSettings
from launch.images import image_of, stage_of
from launch.pipelines import Spec, tasks_of

RUN_ID_LABEL = "pipeline/runid"  # KFP puts it on every pod; its value is what PIPELINE_JOB_ID_PLACEHOLDER becomes
STAGE_LABEL = "app.kubernetes.io/component"
SHARED_MEMORY = "/dev/shm"
WAITING_SECONDS = 7 * 86400
COMPONENTS = "/opt/components.py"  # components/stages.py in every image
EXECUTOR = ["env", "_KFP_RUNTIME=true", "python3", "-m", "kfp.dsl.executor_main", "--component_module_path", COMPONENTS]
"""What stands in place of a component's source and the script that writes it to a file: each would travel in every pod,
and four times in the Workflow."""


def apply_cluster(spec: Spec, cluster: ClusterSettings, commit: str, configuration: str = "") -> Spec:
    """Change the pipeline `spec` (IR as JSON values) for `cluster`. Returns the platform spec that goes with it.

    `commit` is what the stages record as their version, and the tag of images for which `cluster` names none;
    `configuration` is the name that reports give the settings. Raises GuardLoopError if there is no tag.
    """
    recorded = {"GUARDLOOP_GIT_SHA": commit, "GUARDLOOP_CONFIGURATION": configuration}
    variables = {**cluster.environment, **{key: value for key, value in recorded.items() if value}}
    executors, stages = {}, {}
    for label, executor in spec["deploymentSpec"]["executors"].items():
        if "container" not in executor:  # an importer brings an artifact in, and has no pod of ours
            continue
        container = executor["container"]
        stages[label] = name = stage_of(container["image"])
        settings = cluster.stage(name)
        container["image"] = image_of(name, cluster.registry, cluster.tag or commit, gpu=settings.gpus > 0)
        container["command"] = EXECUTOR
        container["resources"] = _resources(settings)
        container["env"] = [{"name": key, "value": value} for key, value in sorted(variables.items())]
        executors[label] = _pod(name, settings, cluster)
    for _, component, task in tasks_of(spec):
        label = spec["components"][component].get("executorLabel")
        if label in stages and (policy := _retry_policy(cluster.stage(stages[label]))):
            task["retryPolicy"] = policy
    kept = {"resourceTtlOnCompletion": cluster.keep_finished_seconds}
    return {"platforms": {"kubernetes": {"deploymentSpec": {"executors": executors}, "pipelineConfig": kept}}}


def _resources(settings: StageSettings) -> Spec:
    resources: Spec = {
        "resourceCpuRequest": settings.cpu,
        "resourceCpuLimit": settings.cpu_limit,
        "resourceMemoryRequest": settings.memory,
        "resourceMemoryLimit": settings.memory_limit,
    }
    if settings.gpus:
        resources["accelerator"] = {"resourceType": settings.gpu_type, "resourceCount": str(settings.gpus)}
    return resources


def _pod(name: str, settings: StageSettings, cluster: ClusterSettings) -> Spec:
    """The executor's part of the platform spec, written by kfp-kubernetes."""
    # kfp-kubernetes reads and writes one attribute of a task, and the tasks are gone once a pipeline is built.
    task = cast(Any, SimpleNamespace(platform_config={}))
    spot = cluster.spot_nodes if settings.spot else None
    for key, value in {**settings.node_selector, **(spot.node_selector if spot else {})}.items():
        kubernetes.add_node_selector(task, key, value)
    for toleration in [*settings.tolerations, *(spot.tolerations if spot else [])]:
        kubernetes.add_toleration(task, **toleration.model_dump())
    for secret in _for_stage(name, cluster.secrets):
        kubernetes.use_secret_as_env(task, secret.name, secret.keys, optional=secret.optional)
    for config_map in _for_stage(name, cluster.config_maps):
        kubernetes.use_config_map_as_env(task, config_map.name, config_map.keys, optional=config_map.optional)
    for volume in _for_stage(name, cluster.volumes):
        kubernetes.mount_pvc(task, volume.claim, volume.path)
    if settings.shared_memory:
        kubernetes.empty_dir_mount(task, "shared-memory", SHARED_MEMORY, "Memory", settings.shared_memory)
    for key, value in {**cluster.labels, STAGE_LABEL: name}.items():
        kubernetes.add_pod_label(task, key, value)
    for key, value in cluster.annotations.items():
        kubernetes.add_pod_annotation(task, key, value)
    if cluster.pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(cluster.pull_secrets))
    kubernetes.set_image_pull_policy(task, cluster.pull_policy)
    kubernetes.set_security_context(task, run_as_user=cluster.run_as_user, run_as_non_root=True)
    kubernetes.set_timeout(task, settings.timeout_seconds)
    kubernetes.use_field_path_as_env(task, "GUARDLOOP_RUN_ID", f"metadata.labels['{RUN_ID_LABEL}']")
    return cast(Spec, _once(task.platform_config["kubernetes"]))


def _once(value: Any) -> Any:
    """The same without the second form in which kfp-kubernetes names secrets, config maps and claims."""
    if isinstance(value, dict):
        return {name: _once(part) for name, part in value.items() if not name.endswith("NameParameter")}
    return [_once(part) for part in value] if isinstance(value, list) else value


def _for_stage(name: str, parts: list[Any]) -> list[Any]:
    return [part for part in parts if not part.stages or name in part.stages]


def _retry_policy(settings: StageSettings) -> Spec | None:
    retries = settings.retries
    if not retries.count:
        return None
    # Argo counts from when the first attempt is asked for, waiting for a GPU included: KFP's default hour would leave a
    # long stage without a retry. What bounds the work is the count, and each pod's own deadline.
    every_attempt = (retries.count + 1) * settings.timeout_seconds
    pauses = sum(retries.wait_seconds * retries.factor**n for n in range(retries.count))
    return {
        "maxRetryCount": retries.count,
        "backoffDuration": f"{retries.wait_seconds}s",
        "backoffFactor": retries.factor,
        "backoffMaxDuration": f"{every_attempt + round(pauses) + WAITING_SECONDS}s",
    }
