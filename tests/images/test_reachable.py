"""Each stage's image can import all that the stage's code reaches, within functions, too: read from the code."""

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

import components.stages
from launch.images import MODEL_STAGES, STAGES, stage_of
from scripts.locked import members, normalize, read_lock, select

DISTRIBUTIONS = packages_distributions()
TOP = ""
"""For a name: what a module runs when it is imported."""
ALL = "*"
"""For a name: all of a module, whose names are used as its attributes."""
NOT_REACHED = {  # imported where a setting asks for it, which is refused in the CPU images
    "vllm": "responders of kind vllm have an image of their own",
}


@pytest.mark.parametrize("stage", STAGES)
def test_an_image_has_all_that_its_stage_reaches(stage: str) -> None:
    groups = ["stage", stage, *(["model"] if stage in MODEL_STAGES else [])]
    held = {package.name for package in select(read_lock(), members(groups), members(["executor"]))}
    held |= {"torch"} if stage in MODEL_STAGES else set()

    reached = {name: why for name, why in reached_by(stage).items() if not owners(name) & held}
    assert {name: why for name, why in reached.items() if name not in NOT_REACHED} == {}


def reached_by(stage: str) -> dict[str, str]:
    """The modules of others that the stage's code may import, and where it does."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = entries(stage)
    while waiting:
        module, name = waiting.pop()
        if (module, name) in seen:
            continue
        seen.add((module, name))
        if "." in module:
            waiting.append((module.rpartition(".")[0], TOP))  # its package runs, too
        others, more = code_of(module).reached_from(name)
        waiting += more
        found |= {other.partition(".")[0]: module for other in others}
    return found


def entries(stage: str) -> list[tuple[str, str]]:
    """The functions that the stage's components call, in the module that exports them."""
    return [
        (node.module, alias.name)
        for component in vars(components.stages).values()
        if hasattr(component, "component_spec")
        and stage_of(component.component_spec.implementation.container.image) == stage
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(component.python_func))))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("guardloop")
        for alias in node.names
    ]


class Code:
    """A module's source: what its top level runs, and what each of its functions and classes refers to."""

    def __init__(self, module: str) -> None:
        spec = find_spec(module)
        assert spec and spec.origin, module
        self.module = module
        self.tree = ast.parse(Path(spec.origin).read_text("utf-8"))
        self.defined: dict[str, ast.AST] = {}
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.defined[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                self.defined |= {target.id: node for target in targets if isinstance(target, ast.Name)}
        self.imported = {own: where for node in walk(self.tree, into_functions=False) for own, where in bound(node)}

    def reached_from(self, name: str) -> tuple[list[str], list[tuple[str, str]]]:
        """Modules of others, and (module, name) of ours, that `name` (or the top level) leads to."""
        used: set[str] = set()
        if name in (TOP, ALL):
            nodes = list(walk(self.tree, into_functions=name == ALL))
        elif name in self.defined:
            nodes = list(walk(self.defined[name], into_functions=True))
            used = {node.id for node in nodes if isinstance(node, ast.Name)} - {name}
        else:
            nodes, used = [], {name}  # of another module, exported here
        targets = [where for node in nodes for _, where in bound(node)]
        targets += [self.imported[one] for one in used & self.imported.keys()]
        ours = [(module, one) for module, one in targets if module.partition(".")[0] == "guardloop"]
        others = [module for module, _ in targets if module.partition(".")[0] != "guardloop"]
        # the top level of a module that is imported at the top level is all that runs of it
        ours = [(module, TOP) for module, _ in ours] if name == TOP else ours
        return others, [*ours, (self.module, TOP), *((self.module, one) for one in used & self.defined.keys())]


@cache
def code_of(module: str) -> Code:
    return Code(module)


def walk(node: ast.AST, into_functions: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if into_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from walk(child, into_functions)


def bound(node: ast.AST) -> Iterator[tuple[str, tuple[str, str]]]:
    """The names that an import binds, each with the (module, name) behind it; the standard library's are left out."""
    if isinstance(node, ast.Import):
        found = [(alias.asname or alias.name.partition(".")[0], (alias.name, ALL)) for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        found = [(alias.asname or alias.name, (node.module, alias.name)) for alias in node.names]
        found = [
            (
                own,
                (f"{module}.{name}", ALL)
                if module.startswith("guardloop") and is_module(f"{module}.{name}")
                else where,
            )
            for own, where in found
            for module, name in [where]
        ]
    else:
        found = []
    yield from ((own, where) for own, where in found if where[0].partition(".")[0] not in sys.stdlib_module_names)


@cache
def is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def owners(module: str) -> set[str]:
    return {normalize(name) for name in DISTRIBUTIONS.get(module, [module])}
