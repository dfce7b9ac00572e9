"""What the stages of a run on a cluster have printed: from their pods, or from Kubeflow Pipelines."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from guardloop.core.errors import GuardLoopError
from launch.kubeflow.cluster import Cluster
from launch.kubeflow.namespace import Namespace, NoAccessError
from launch.kubeflow.tasks import stage_of, stages_of

RUN_LABEL = "pipeline/runid"
NODE_NAME = "workflows.argoproj.io/node-name"
TAIL = 12


@dataclass(frozen=True)
class StageLog:
    """The log of one pod of a stage; a stage has several where it ran for several shards or was tried again."""

    stage: str
    pod: str
    text: str


def stage_logs(cluster: Cluster, run: Any, stage: str | None = None) -> list[StageLog]:
    """The logs of a run, of one stage or all. Raises GuardLoopError if there are none to be had, and says why."""
    stages = stages_of(cluster.version_of(run))
    if stage is not None and stages and stage not in stages:
        raise GuardLoopError(f"the run has no stage {stage!r}", f"its stages: {', '.join(sorted(stages))}")
    namespace = cluster.target.namespace or "kubeflow"
    try:
        found = list(_from_pods(Namespace(namespace), run.run_id, stages))
        why = f"its pods are gone from namespace {namespace}, or have not started"
    except NoAccessError as error:
        found, why = [], error.what
    found = found or list(_from_kubeflow(cluster, run, stages))
    logs = [log for log in found if stage in (None, log.stage)]
    if not logs:
        what = f"stage {stage}" if stage else "any stage"
        raise GuardLoopError(
            f"no log of {what} of run {run.run_id}: {why}",
            f"with access to the cluster: kubectl -n {namespace} logs -c main -l {RUN_LABEL}={run.run_id} --prefix",
        )
    return logs


def last_words(cluster: Cluster, run: Any, stage: str) -> list[str]:
    """The end of a stage's log, from its last error on; [] where the log cannot be had."""
    try:
        lines = stage_logs(cluster, run, stage)[-1].text.rstrip().splitlines()
    except GuardLoopError:
        return []
    errors = [number for number, line in enumerate(lines) if re.match(r"(\S+\.)?\w*(Error|Exception)\b|error:", line)]
    return lines[errors[-1] :][:TAIL] if errors else lines[-TAIL:]


def _from_pods(namespace: Namespace, run_id: str, stages: frozenset[str]) -> Iterator[StageLog]:
    for pod in namespace.pods(f"{RUN_LABEL}={run_id}"):
        node = (pod.metadata.annotations or {}).get(NODE_NAME, "")
        stage = _stage_of_node(node, stages)
        if stage and (text := namespace.log(pod.metadata.name)):
            yield StageLog(stage, pod.metadata.name, text)


def _stage_of_node(node: str, stages: frozenset[str]) -> str | None:
    """The stage of an Argo node such as `guardloop-x.root.screen.executor`; None for a driver or what else there is."""
    parts = [part for part in node.split(".") if not part.startswith("executor")]
    return stage_of(parts[-1], stages) if parts and not parts[-1].endswith("-driver") else None


def _from_kubeflow(cluster: Cluster, run: Any, stages: frozenset[str]) -> Iterator[StageLog]:
    """For each stage, what Kubeflow Pipelines has of the pods that it names."""
    tasks = (run.run_details.task_details if run.run_details else None) or []
    for task in tasks:
        stage = stage_of(task.display_name or "", stages)
        pods = [task.pod_name, *(child.pod_name for child in task.child_tasks or [])]
        for pod in filter(None, pods):
            if stage and (text := cluster.log(run.run_id, pod)):
                yield StageLog(stage, pod, text)
