"""What pipeline.py holds: its pipelines, what each of them takes, and the stages in their compiled form."""

from collections.abc import Iterator
from functools import cache
from typing import Any

from guardloop.core.errors import GuardLoopError

ARTIFACT = "_uri"  # how the parameters end that take an artifact of an earlier run
Spec = dict[str, Any]
"""A compiled pipeline (KFP's IR), as JSON values."""


@cache
def pipelines() -> dict[str, Any]:
    """The pipelines by name."""
    from pipeline import PIPELINES  # noqa: PLC0415  (kfp takes a second to import)

    return dict(PIPELINES)


def parameters(pipeline: str) -> list[str]:
    """What a pipeline takes: sections of the settings and single values. Raises GuardLoopError if it is not known."""
    return [name for name in _inputs(pipeline) if not name.endswith(ARTIFACT)]


def artifacts(pipeline: str) -> list[str]:
    """The outputs of an earlier run that a pipeline starts from. Raises GuardLoopError if it is not known."""
    return [name.removesuffix(ARTIFACT) for name in _inputs(pipeline) if name.endswith(ARTIFACT)]


def _inputs(pipeline: str) -> list[str]:
    if pipeline not in pipelines():
        raise GuardLoopError(f"no pipeline {pipeline!r}", f"pipelines: {', '.join(pipelines())}")
    return sorted(pipelines()[pipeline].pipeline_spec.root.input_definitions.parameters)


def tasks_of(spec: Spec) -> Iterator[tuple[str, str, Spec]]:
    """(name, component, task) of every task in every graph of a compiled pipeline."""
    for part in (spec.get("root", {}), *spec.get("components", {}).values()):
        for name, task in part.get("dag", {}).get("tasks", {}).items():
            yield name, task["componentRef"]["name"], task


def stage_titles(spec: Spec) -> dict[str, str]:
    """What each stage calls itself in logs and summaries, by the name of its task; {} where the spec is not known.

    A stage is a task that runs a container; one that serves several times says in its constant `what` which it is.
    """
    titles, executors = {}, spec.get("deploymentSpec", {}).get("executors", {})
    for name, component, task in tasks_of(spec):
        label = spec["components"].get(component, {}).get("executorLabel")
        if "container" in executors.get(label, {}):  # an importer has none
            what = task.get("inputs", {}).get("parameters", {}).get("what", {})
            titles[name] = what.get("runtimeValue", {}).get("constant") or name.replace("-", "_")
    return titles
