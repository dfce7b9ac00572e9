"""The pages: links lead somewhere, generated ones are as the code is, and the site has them all."""

from pathlib import Path

import pytest
import yaml
from support.pages import PAGES, ROOT, anchors, fenced, links, name

from guardloop.config import Settings, describe_fields, load_settings
from scripts.docs.__main__ import generated
from scripts.docs.flow import Node, compiled_graph, flow_picture


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
        section, _, rest = setting.partition(".")
        assert f"\n## {section}\n" in page and f"| `{rest}` |" in page and meaning.replace("|", "\\|") in page


def test_the_reference_tells_the_defaults_that_hold() -> None:
    told = {setting: default for setting, _, default, _ in describe_fields()}
    held = Settings()
    for setting, default in told.items():
        value: object = held
        for part in setting.split("."):
            value = getattr(value, part)
        assert default == repr(value), setting


def test_the_picture_has_every_task_of_the_pipeline() -> None:
    picture = flow_picture()
    shown = ("prepare_data", "screen prompts", "generate_responses", "screen responses", "mine_feedback", "train_guard")
    shown += ("screen test (baseline)", "screen test (candidate)", "score_benchmarks", "evaluate", "register_model")
    assert all(f">{task}</text>" in picture for task in (*shown, "promote_model", "record_mining"))
    drawn = {kind: picture.count(f'class="{kind}"') for kind in ("frame", "arrow")}
    assert drawn == {"frame": 6, "arrow": 12}, "look at the picture; if a stage came or went, change these numbers"


def test_in_the_picture_tasks_are_inside_their_frame_and_beside_each_other() -> None:
    graph = compiled_graph()
    flow_picture(graph)

    def check(frame: Node) -> None:
        for i, part in enumerate(frame.parts):
            assert frame.x < part.x and part.x + part.width < frame.x + frame.width, part.label
            assert frame.y < part.y and part.y + part.height < frame.y + frame.height, part.label
            for other in frame.parts[:i]:
                apart = part.x >= other.x + other.width or other.x >= part.x + part.width
                assert apart or part.y >= other.y + other.height or other.y >= part.y + part.height, part.label
            check(part)

    check(graph)


def test_the_configuration_in_the_readme_is_one(tmp_path: Path) -> None:
    (shown,) = [code for language, code in fenced(ROOT / "README.md") if language == "yaml"]
    (tmp_path / "ours.yaml").write_text(shown)
    assert load_settings(tmp_path / "ours.yaml").responder.model == "our-assistant"


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


@pytest.mark.parametrize("page", sorted((ROOT / "docs/extending").glob("*.md")), ids=name)
def test_how_to_extend_fits_a_screen(page: Path) -> None:
    assert len(page.read_text().splitlines()) <= 40


def test_every_decision_is_listed_and_has_its_parts() -> None:
    index = (ROOT / "docs/decisions/index.md").read_text()
    for path in sorted((ROOT / "docs/decisions").glob("0*.md")):
        text = path.read_text()
        assert f"]({path.name})" in index
        assert all(f"**{part}.**" in text for part in ("Context", "Decision", "Consequences")), path.name
