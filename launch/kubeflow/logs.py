"""What the stages of a run on a cluster have printed: from their pods, or from Kubeflow Pipelines."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from guardloop.core.errors import GuardLoopError
from launch.kubeflow.cluster import Cluster
from launch.kubeflow.namespace import NODE_NAME, RUN_LABEL, Namespace, NoAccessError
from launch.kubeflow.tasks import stage_of, titles_of

TAIL = 12
LAUNCHER = re.compile(r"[IWEF]\d{4} [\d:.]+ +\d+ \S+\.go:\d+\]|time=\S+ level=|Error: exit status \d+$")
EXECUTOR = re.compile(r"\[KFP Executor \d{4}-\d\d-\d\d ([\d:]+),\d+ [A-Z]+\]: ?(.*)")
EXECUTORS_OWN = re.compile(r"Looking for component|Loading KFP component|Got executor_input|Wrote executor output")
ERROR = re.compile(r"(\S+\.)?\w*(Error|Exception)\b.*|error: .*")


@dataclass(frozen=True)
class StageLog:
    """The log of one pod of a stage; a stage has several where it ran for several shards or was tried again."""

    stage: str
    shard: int | None
    pod: str
    text: str

    @property
    def own(self) -> str:
        """Without the lines of Kubeflow's launcher and executor and of Argo."""
        return own_lines(self.text)


def stage_logs(cluster: Cluster, run: Any, stage: str | None = None) -> list[StageLog]:
    """The logs of a run, of one stage or all. Raises GuardLoopError if there are none to be had, and says why."""
    titles = titles_of(cluster.version_of(run))
    if stage is not None and titles and stage not in titles:
        raise GuardLoopError(f"the run has no stage {stage!r}", f"its stages: {', '.join(sorted(titles))}")
    namespace = cluster.target.namespace or "kubeflow"
    try:
        logs = list(_from_pods(Namespace(namespace), run.run_id, titles))
        why = f"its pods are gone from namespace {namespace}, or have not started"
    except NoAccessError as error:
        logs, why = [], error.what
    logs = logs or list(_from_kubeflow(cluster, run, titles))
    wanted = [log for log in logs if stage in (None, log.stage)]
    if not wanted:
        what = f"stage {stage}" if stage else "any stage"
        raise GuardLoopError(
            f"no log of {what} of run {run.run_id}: {why}",
            f"with access to the cluster: kubectl -n {namespace} logs -c main -l {RUN_LABEL}={run.run_id} --prefix",
        )
    return wanted


def own_lines(text: str) -> str:
    """What a stage printed, without the lines of Kubeflow's launcher and executor and of Argo."""
    kept, skipping = [], False
    for line in text.splitlines():
        executor = EXECUTOR.match(line)
        if skipping and line == "}":  # the end of what the launcher or the executor printed over several lines
            skipping = False
        elif LAUNCHER.match(line):
            skipping = line.endswith("{")
        elif executor and EXECUTORS_OWN.match(executor[2]):
            skipping = executor[2].startswith("Got executor_input")
        elif not skipping:
            kept.append(f"{executor[1]} {executor[2]}" if executor else line)
    return "\n".join(kept)


def last_words(cluster: Cluster, run: Any, stage: str, shard: int | None = None) -> list[str]:
    """Why a stage failed, from its log: the error and what mends it, else the end; [] where the log cannot be had."""
    try:
        logs = stage_logs(cluster, run, stage)
    except GuardLoopError:
        return []
    of_shard = [log for log in logs if log.shard == shard]
    return error_in((of_shard or logs)[-1].text)


def error_in(text: str) -> list[str]:
    """The last error of a log with its remedy, in the stage's own words; else the log's end."""
    lines = own_lines(text).rstrip().splitlines()
    errors = [number for number, line in enumerate(lines) if ERROR.match(line)]
    if not errors:
        return lines[-TAIL:]
    first = re.sub(r"^(\S+\.)?GuardLoopError: ", "", lines[errors[-1]])
    return [first, *lines[errors[-1] + 1 :]][:TAIL]


def outcome_in(text: str, stage: str) -> str:
    """What a stage said when it ended well: `evaluate: 684 items in 2.1 s: OUTCOME`; empty where it is not there."""
    outcomes = re.findall(rf"{stage}: \d+ items in [\d.]+ s: (.*)", text)
    return str(outcomes[-1]) if outcomes else ""


def _from_pods(namespace: Namespace, run_id: str, titles: dict[str, str]) -> Iterator[StageLog]:
    for pod in namespace.pods(f"{RUN_LABEL}={run_id}"):
        stage = stage_of((pod.metadata.annotations or {}).get(NODE_NAME, ""), titles)
        if stage and not stage.from_driver and (text := namespace.log(pod.metadata.name)):
            yield StageLog(stage.task, stage.shard, pod.metadata.name, text)


def _from_kubeflow(cluster: Cluster, run: Any, titles: dict[str, str]) -> Iterator[StageLog]:
    """For each stage, what Kubeflow Pipelines has of the pods that it names."""
    tasks = (run.run_details.task_details if run.run_details else None) or []
    for task in tasks:
        stage = stage_of(task.display_name or "", titles)
        pods = [task.pod_name, *(child.pod_name for child in task.child_tasks or [])]
        for pod in filter(None, pods):
            if stage and not stage.from_driver and (text := cluster.log(run.run_id, pod)):
                yield StageLog(stage.task, stage.shard, pod, text)
