"""Every benchmark, responder, guard family and stage has all of its parts; a part that was forgotten is named.

docs/extending says how to add one.
"""

import ast
import inspect
import re
from typing import get_args

import pytest
import yaml
from support import models
from support.root import ROOT

import components
import components.stages
import pipeline
from guardloop import stages
from guardloop.config.cluster import StageName
from guardloop.evaluation.settings import benchmark_names, read_benchmark_settings
from guardloop.guard.prompt.family import families
from guardloop.responses import build
from guardloop.responses.settings import ResponderSettings
from launch.images import STAGES
from scripts.docs.contracts import CONTENTS, artifact_names

KINDS = get_args(ResponderSettings.model_fields["kind"].annotation)
COMPONENTS = [name for name, one in vars(components.stages).items() if hasattr(one, "component_spec")]
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


# Benchmarks


@pytest.mark.parametrize("name", benchmark_names())
def test_benchmark(name: str) -> None:
    found = read_benchmark_settings(name)
    assert found.name == name, f"configs/benchmarks/{name}.yaml calls itself {found.name}"
    assert "# Licence: " in (ROOT / f"configs/benchmarks/{name}.yaml").read_text(), f"{name}: say its licence"
    assert re.search(rf"[ ,]{name}[ ,;]", page("evaluation.md")), f"name {name} in docs/evaluation.md"


# Responders


@pytest.mark.parametrize("kind", KINDS)
def test_responder(kind: str) -> None:
    module = f"guardloop/responses/engines/{kind}.py"
    assert (ROOT / module).is_file(), f"no {module}"
    assert f"from guardloop.responses.engines.{kind} import" in inspect.getsource(build.build_responder), (
        f"build_responder in guardloop/responses/build.py has no branch for {kind}"
    )
    tests = f"tests/responses/engines/test_responder_{kind}.py"
    assert (ROOT / tests).is_file(), f"no {tests}"
    assert f"| `{kind}` |" in page("responses.md"), f"name {kind} in the table of docs/responses.md"


# Guard families


@pytest.mark.parametrize("name", families())
def test_guard_family(name: str) -> None:
    family = families()[name]
    assert name in models.FAMILIES, f"add {name} to FAMILIES in tests/support/models.py, for the exactness tests"
    assert name in models.TEMPLATES or family.template, (
        f"add a small template of {name} to TEMPLATES in tests/support/models.py"
    )
    for folder, file in (("templates", family.template), ("policies", family.policy)):
        path = ROOT / "guardloop/guard/prompt" / folder / (file or "")
        assert file is None or path.is_file(), f"{name}: no {folder}/{file}"
    own = [bool(family.categories), family.policy is not None]
    assert sum(own) == 1, f"{name}: codes come either from `categories` or from `policy`"


def test_no_model_belongs_to_two_families() -> None:
    for name, family in families().items():
        for part in family.names:
            others = [one.name for one in families().values() if any(p.lower() in part.lower() for p in one.names)]
            assert others == [name], f"{part} is also part of a model name of {others}"


# Stages


@pytest.mark.parametrize("name", COMPONENTS)
def test_stage(name: str) -> None:
    component = getattr(components.stages, name)
    image = component.component_spec.implementation.container.image.rpartition("/")[2]
    used = {node.attr for node in ast.walk(ast.parse(inspect.getsource(pipeline))) if isinstance(node, ast.Attribute)}
    assert name in components.__all__, f"components/__init__.py does not export {name}"
    assert name in used, f"pipeline.py does not use {name}"
    assert hasattr(stages, name), f"guardloop/stages/__init__.py does not export {name}"
    assert image in get_args(StageName), f"guardloop/config/cluster.py: StageName lacks {image}"
    assert image in STAGES, f"launch/images.py: STAGES lacks {image}"
    assert f" AS {image}\n" in (ROOT / "images/Dockerfile").read_text(), f"images/Dockerfile: no target {image}"
    assert f'"{image}"' in (ROOT / "images/docker-bake.hcl").read_text(), f"images/docker-bake.hcl: no {image}"
    assert f"\n{image} = [" in (ROOT / "pyproject.toml").read_text(), f"pyproject.toml: no dependency group {image}"
    assert re.search(rf"\b{name}\b", TESTS.replace("-", "_")), f"no test names {name}"
    read, written = artifact_names()[name]
    unsaid = [artifact for artifact in (*read, *written) if artifact not in CONTENTS]
    assert not unsaid, f"scripts/docs/contracts.py: CONTENTS does not say what is in {', '.join(unsaid)}"


def test_nothing_is_left_of_a_stage_that_is_gone() -> None:
    images = {getattr(components.stages, name).component_spec.implementation.container.image for name in COMPONENTS}
    named = {image.rpartition("/")[2] for image in images}
    assert set(get_args(StageName)) == set(STAGES) == named
    for path in (ROOT / "configs/platform").glob("*.yaml"):
        cluster = yaml.safe_load(path.read_text()).get("cluster") or {}
        assert set(cluster.get("stages", {})) <= named, path.name
    used = {artifact for ends in artifact_names().values() for side in ends for artifact in side}
    assert set(CONTENTS) == used, "scripts/docs/contracts.py: CONTENTS tells of artifacts that are gone"
