"""The picture of the flow, drawn from the compiled pipeline: what stands in README.md is what is executed."""

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler

import pipeline

LETTER, LINE, PAD, GAP = 7.2, 34, 14, 30  # pixels: a letter's width, a box's height, room inside and between
TITLE = 24
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2937 }
.title { font-size: 12px; fill: #57606a }
.box { fill: #eef2ff; stroke: #4f5bd5 }
.frame { fill: #4f5bd5; fill-opacity: .04; stroke: #9aa4b2; stroke-dasharray: 4 3 }
.arrow { fill: none; stroke: #57606a; stroke-width: 1.4; marker-end: url(#head) }
"""


@dataclass
class Node:
    """A task, or with `parts` a frame around the tasks of a pipeline, loop or condition; where it is, in pixels."""

    name: str
    label: str
    after: list[str]
    """Names of the tasks beside it that it waits for, without those that others of them wait for."""
    parts: "list[Node]" = field(default_factory=list)
    x: float = 0
    y: float = 0
    width: float = 0
    height: float = 0


def compiled_graph() -> Node:
    """The whole pipeline as Kubeflow gets it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "full.yaml")
        compiler.Compiler().compile(pipeline.full, str(path))
        spec = next(iter(yaml.safe_load_all(path.read_text("utf-8"))))
    return Node("root", "", [], _tasks(spec["components"], spec["root"]["dag"]))


def flow_picture(graph: Node | None = None) -> str:
    """The pipeline as SVG, which loads nothing: a box for each task, a frame for each pipeline, loop and condition."""
    graph = graph or compiled_graph()
    _measure(graph, down=True)
    _place(graph, 0, 0, down=True)
    lines: list[str] = []
    _draw(graph.parts, lines, down=True)
    size = f"{graph.width:.0f} {graph.height:.0f}"
    head = '<path d="M0 0 8 4 0 8z" fill="#57606a"/>'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{graph.width:.0f}" role="img">',
            "<title>The pipeline, drawn from what is compiled for Kubeflow</title>",
            f"<style>{STYLE}</style>",
            f'<defs><marker id="head" markerWidth="8" markerHeight="8" refX="8" refY="4" orient="auto">{head}</marker>'
            "</defs>",
            f'<rect width="{graph.width:.0f}" height="{graph.height:.0f}" rx="8" fill="#fff"/>',
            *lines,
            "</svg>\n",
        ]
    )


def _tasks(components: dict[str, Any], dag: dict[str, Any]) -> list[Node]:
    """The tasks of one level, each after all that it waits for; else by name."""
    tasks, nodes = dag["tasks"], []
    ordered: list[str] = []
    while len(ordered) < len(tasks):
        ready = (n for n in sorted(tasks) if n not in ordered and set(_waits(tasks[n])) <= set(ordered))
        ordered.append(next(ready))
    for name in ordered:
        inner = components[tasks[name]["componentRef"]["name"]].get("dag")
        passed = {far for near in _waits(tasks[name]) for far in _waits(tasks[near])}
        after = [near for near in _waits(tasks[name]) if near not in passed]
        nodes.append(Node(name, _label(tasks[name]), after, _tasks(components, inner) if inner else []))
    return nodes


def _waits(task: dict[str, Any]) -> list[str]:
    found: list[str] = task.get("dependentTasks", [])
    return found


def _label(task: dict[str, Any]) -> str:
    """What a task is called: its own words where it has some, else the stage's name."""
    if "parameterIterator" in task:
        return "for each shard"
    said = task.get("inputs", {}).get("parameters", {}).get("what", {}).get("runtimeValue", {}).get("constant")
    title: str = said or task["taskInfo"]["name"]
    if "triggerPolicy" in task:
        return f"if {title}" if title.endswith("to train on") else "if it won"
    return title if said else re.sub(r"^guardloop-", "", title).replace("-", "_")


def _layers(parts: Sequence[Node]) -> list[list[Node]]:
    """The tasks by how many others they wait for, one after another."""
    depth: dict[str, int] = {}
    for part in parts:
        depth[part.name] = 1 + max((depth[name] for name in part.after), default=-1)
    return [[part for part in parts if depth[part.name] == level] for level in range(max(depth.values()) + 1)]


def _measure(node: Node, down: bool = False) -> None:
    """Widths and heights; layers go from left to right, those of the outermost level `down` the page."""
    if not node.parts:
        node.width, node.height = len(node.label) * LETTER + 2 * PAD, LINE
        return
    for part in node.parts:
        _measure(part)
    for layer in _layers(node.parts):
        for part in layer:  # boxes below each other are equally wide
            part.width = part.width if down or part.parts else max(p.width for p in layer if not p.parts)
    along, across = ("height", "width") if down else ("width", "height")
    layers = _layers(node.parts)
    long = sum(max(getattr(part, along) for part in layer) for layer in layers) + GAP * (len(layers) - 1)
    wide = max(sum(getattr(part, across) for part in layer) + PAD * (len(layer) - 1) for layer in layers)
    size = {along: long, across: wide}
    node.width = max(size["width"], len(node.label) * LETTER) + 2 * PAD
    node.height = size["height"] + 2 * PAD + (TITLE - PAD if node.label else 0)


def _place(node: Node, x: float, y: float, down: bool = False) -> None:
    node.x, node.y = x, y
    if not node.parts:
        return
    left, top = x + PAD, y + (TITLE if node.label else PAD)
    inside = node.height - (top - y) - PAD
    for layer in _layers(node.parts):
        if down:
            at = left
            for part in layer:
                _place(part, at, top)
                at += part.width + PAD
            top += max(part.height for part in layer) + GAP
            continue
        at = top + (inside - sum(part.height for part in layer) - PAD * (len(layer) - 1)) / 2
        for part in layer:
            _place(part, left, at)
            at += part.height + PAD
        left += max(part.width for part in layer) + GAP


def _draw(parts: Sequence[Node], lines: list[str], down: bool = False) -> None:
    named = {part.name: part for part in parts}
    for part in parts:
        kind = "frame" if part.parts else "box"
        corner = f'x="{part.x:.0f}" y="{part.y:.0f}" width="{part.width:.0f}" height="{part.height:.0f}"'
        lines.append(f'<rect class="{kind}" {corner} rx="6"/>')
        if part.parts:
            lines.append(f'<text class="title" x="{part.x + 10:.0f}" y="{part.y + 16:.0f}">{escape(part.label)}</text>')
            _draw(part.parts, lines)
        else:
            middle = f'x="{part.x + part.width / 2:.0f}" y="{part.y + part.height / 2 + 4.5:.0f}"'
            lines.append(f'<text {middle} text-anchor="middle">{escape(part.label)}</text>')
        lines += (_arrow(named[name], part, down) for name in part.after)


def _arrow(start: Node, end: Node, down: bool) -> str:
    x, y = start.x + start.width, start.y + start.height / 2
    to, level = end.x, end.y + end.height / 2
    middle = (x + to) / 2
    if down and end.x > x:
        path = f"M{x:.0f} {y:.0f} H{end.x + end.width / 2:.0f} V{end.y:.0f}"
    elif down:
        path = f"M{end.x + min(start.width, end.width) / 2:.0f} {start.y + start.height:.0f} V{end.y:.0f}"
    else:
        path = f"M{x:.0f} {y:.0f} C{middle:.0f} {y:.0f} {middle:.0f} {level:.0f} {to:.0f} {level:.0f}"
    return f'<path class="arrow" d="{path}"/>'
