"""The files around the code: they agree with it and with each other, and the tools that read them can."""

import json
import re
import tomllib

import pytest
import yaml
from support.root import ROOT

from guardloop import __version__

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = {name for names in re.findall(r"^([a-z][a-z -]*):", MAKEFILE, re.M) for name in names.split()}
LONGEST, LONGEST_TEST = 400, 650
MAKE = re.compile(r"\bmake ([a-z][a-z -]*)")


def yaml_of(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def test_one_version():
    citation = yaml_of("CITATION.cff")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})$", (ROOT / "CHANGELOG.md").read_text(), re.M)

    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    assert PROJECT["version"] == __version__ == citation["version"]
    assert released[0] == (__version__, citation["date-released"]), "CHANGELOG.md and CITATION.cff: the newest release"


def test_the_changelog_keeps_its_form():
    sections = re.findall(r"^### (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert set(sections) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_one_licence():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == yaml_of("CITATION.cff")["license"] == "Apache-2.0"
    assert PROJECT["license-files"] == ["LICENSE"]
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_hooks_download_nothing():
    config = yaml_of(".pre-commit-config.yaml")
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    assert {hook["language"] for hook in hooks} == {"system"}


def test_workflow_and_forms_are_read_as_meant():
    workflow = yaml_of(".github/workflows/ci.yml")
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert workflow["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())
    assert all(re.search(r"@[0-9a-f]{40}$", step["uses"]) for step in steps if "uses" in step)  # a tag may be moved
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml"):
        content = yaml.safe_load(form.read_text())
        assert {"name", "description", "body"} <= set(content), form.name
        assert all(part["attributes"]["label"] and part["id"] for part in content["body"])


@pytest.mark.parametrize(
    "name",
    [".pre-commit-config.yaml", ".github/workflows/ci.yml", ".devcontainer/devcontainer.json", ".ci/run"],
)
def test_only_targets_that_exist_are_called(name: str):
    called = {word for words in MAKE.findall((ROOT / name).read_text()) for word in words.split()}
    assert called and called <= TARGETS


def test_the_development_container_is_json():
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    assert container["image"].startswith("python:3.11")


def test_phony_targets_are_those_that_make_no_file():
    phony = set(re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", MAKEFILE, re.M)[1].replace("\\\n", " ").split())
    assert phony == TARGETS


def test_no_file_is_long():
    for folder in ("guardloop", "components", "launch", "scripts", "bench", "tests"):
        most = LONGEST_TEST if folder == "tests" else LONGEST
        long = [str(path) for path in (ROOT / folder).rglob("*.py") if path.read_text().count("\n") > most]
        assert not long, f"over {most} lines: split it"
