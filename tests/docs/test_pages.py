"""The pages: links lead somewhere, generated ones are as the code is, and the site has them all."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import yaml
from support.pages import PAGES, ROOT, anchors, fenced, links, name

import components
import pipeline
from guardloop.config import Settings, describe_fields, load_settings
from guardloop.evaluation import harm, improvement, soundness
from scripts.docs.__main__ import generated
from scripts.docs.configuration import TOP_LEVEL

DRAWN = (ROOT / "README.md", ROOT / "docs/index.md")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name(page)}: nothing at {target}"
        assert not anchor or anchor in anchors(found), (
            f"{name(page)}: no heading for {target}; {sorted(anchors(found))}"
        )


def test_generated_pages_are_as_the_code_is() -> None:
    stale = [name(path) for path, text in generated().items() if path.read_text("utf-8") != text]
    assert not stale, f"run `make docs-generate`: {', '.join(stale)} are not as the code is any more"


def test_the_reference_has_every_setting() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    for setting, _, _, meaning in describe_fields():
        section, _, rest = setting.rpartition(".") if "." not in setting else setting.partition(".")
        section = section or TOP_LEVEL
        assert f"\n## {section}\n" in page and f"| `{rest}` |" in page and meaning.replace("|", "\\|") in page


def test_the_reference_tells_the_defaults_that_hold() -> None:
    told = {setting: default for setting, _, default, _ in describe_fields()}
    held = Settings()
    for setting, default in told.items():
        value: object = held
        for part in setting.split("."):
            value = getattr(value, part)
        assert default == repr(value), setting


def test_the_drawn_flow_has_the_stages_of_the_pipeline() -> None:
    (flow,), *others = ([c for language, c in fenced(page) if language == "mermaid"] for page in DRAWN)
    assert others == [[flow]]
    used = {node.attr for node in ast.walk(ast.parse(inspect.getsource(pipeline))) if isinstance(node, ast.Attribute)}
    assert set(re.findall(r"\w+", flow)) & set(components.__all__) == used & set(components.__all__)


def test_the_configuration_in_the_readme_is_one(tmp_path: Path) -> None:
    (shown,) = [code for language, code in fenced(ROOT / "README.md") if language == "yaml"]
    (tmp_path / "ours.yaml").write_text(shown)
    assert [one.model for one in load_settings(tmp_path / "ours.yaml").responders] == ["our-assistant"]


def test_the_site_has_every_page() -> None:
    def files(nav: object) -> list[str]:
        if isinstance(nav, str):
            return [nav]
        parts = nav.values() if isinstance(nav, dict) else nav
        return [file for part in parts for file in files(part)]  # type: ignore[attr-defined]

    text = (ROOT / "mkdocs.yml").read_text().replace("!!python/name:", "")
    listed = files(yaml.safe_load(text)["nav"])
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert set(listed) == pages and len(listed) == len(pages), "mkdocs.yml: nav lists each page of docs once"


def test_the_pages_stay_short() -> None:
    by_hand = [
        page for page in PAGES if page.name not in ("CHANGELOG.md", "configuration.md", "contracts.md", "benchmarks.md")
    ]
    assert sum(len(page.read_text().split()) for page in by_hand) <= 14_500 and len(by_hand) <= 22
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_glossary_is_a_line_for_each_term() -> None:
    lines = [line for line in (ROOT / "docs/glossary.md").read_text().splitlines() if line.startswith("| ")]
    assert len(lines) - 2 <= 30 and all(len(line) <= 120 for line in lines)


def test_the_gates_page_has_every_check() -> None:
    page = (ROOT / "docs/gate.md").read_text()
    named = set(re.findall(r'name="(\w+)"', "".join(inspect.getsource(one) for one in (harm, improvement, soundness))))
    named |= set(re.findall(r'_gain_check\(\s*"(\w+)"', inspect.getsource(improvement)))
    assert len(named) > 6 and not [name for name in named if not re.search(rf"^\| [^|]*\b{name}\b", page, re.M)]


def test_every_attack_of_the_page_is_tried_in_the_test_that_it_names() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs/security.md").read_text())
    assert len(named) > 10
    for file, test in named:
        assert f"def {test or 'test_'}" in (ROOT / file).read_text(), f"docs/security.md: no {file}::{test}"
    table = re.findall(r"^\|.*\|$", (ROOT / "docs/security.md").read_text(), re.M)[2:]
    assert all("`tests/" in row.split("|")[4] for row in table), "each row names the test that shows it"
