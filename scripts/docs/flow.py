"""The picture of the flow, drawn from the compiled pipeline: what stands in README.md is what is executed."""

import re
import tempfile
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler

import pipeline

START, END = "<!-- flow: `make docs-generate` draws it from pipeline.py -->", "<!-- /flow -->"


def flow_picture() -> str:
    """The whole pipeline as a Mermaid flowchart: a box for each task, a frame for each pipeline, loop and condition."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "full.yaml")
        compiler.Compiler().compile(pipeline.full, str(path))
        spec = next(iter(yaml.safe_load_all(path.read_text("utf-8"))))
    lines = ["flowchart TB"]
    _draw(spec["components"], spec["root"]["dag"], "", 1, lines)
    return "\n".join(lines)


def with_picture(text: str, picture: str) -> str:
    """`text` with the picture between its marks. Raises ValueError if they are not there."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"no place for the picture: {START} ... {END}")
    return f"{before}{START}\n\n```mermaid\n{picture}\n```\n\n{END}{after}"


def _draw(components: dict[str, Any], dag: dict[str, Any], place: str, depth: int, lines: list[str]) -> None:
    """The tasks of one level, each before those that wait for it, then what waits for what."""
    indent = "  " * depth
    tasks = _in_order(dag["tasks"])
    for name, task in tasks.items():
        inner = components[task["componentRef"]["name"]].get("dag")
        key = _key(place, name)
        if inner is None:
            lines.append(f'{indent}{key}["{_label(name, task)}"]')
            continue
        lines.append(f'{indent}subgraph {key}["{_label(name, task)}"]')
        lines.append(f"{indent}  direction LR")
        _draw(components, inner, key, depth + 1, lines)
        lines.append(f"{indent}end")
    for name, task in tasks.items():
        for earlier in _nearest(task.get("dependentTasks", []), tasks):
            lines.append(f"{indent}{_key(place, earlier)} --> {_key(place, name)}")


def _in_order(tasks: dict[str, Any]) -> dict[str, Any]:
    """The tasks, each after all that it waits for; else by name."""
    ordered: dict[str, Any] = {}
    while len(ordered) < len(tasks):
        ready = [
            n for n in sorted(tasks) if n not in ordered and set(tasks[n].get("dependentTasks", [])) <= set(ordered)
        ]
        ordered[ready[0]] = tasks[ready[0]]
    return ordered


def _nearest(earlier: list[str], tasks: dict[str, Any]) -> list[str]:
    """Those of `earlier` that no other of them waits for: the arrows that say something."""
    passed = {far for name in earlier for far in tasks[name].get("dependentTasks", [])}
    return [name for name in earlier if name not in passed]


def _key(place: str, name: str) -> str:
    return "_".join(filter(None, (place, name.replace("-", "_"))))


def _label(name: str, task: dict[str, Any]) -> str:
    """What a task is called: its own words where it has some, else the stage's name."""
    if "parameterIterator" in task:
        return "for each shard"
    said = task.get("inputs", {}).get("parameters", {}).get("what", {}).get("runtimeValue", {}).get("constant")
    title = said or task["taskInfo"]["name"]
    if "triggerPolicy" in task:
        return f"if {title}" if title.startswith("harvest") else "if it won"
    return re.sub(r"^guardloop-", "", title).replace("-", "_") if not said else title
