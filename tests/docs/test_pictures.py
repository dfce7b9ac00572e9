"""The pictures that pages show are there, small, and remade by `make screenshots`; none of them names a machine."""

import json
import re
from pathlib import Path

import pytest
from support.pages import PAGES, ROOT, name, prose

from launch.local.runs import Run
from scripts import screenshots

IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
MADE = (screenshots.TERMINAL, screenshots.REPORT_PAGE, screenshots.REGISTRY_PAGE)
PLOTS = screenshots.PICTURES.parent / "results"  # made by `make experiment`
LARGEST = 150_000
SHOWN = [(page, *found) for page in PAGES for found in IMAGE.findall(prose(page))]


@pytest.mark.parametrize(("page", "words", "target"), SHOWN, ids=[f"{name(p)}: {t}" for p, _, t in SHOWN])
def test_a_picture_is_there_and_told_in_words(page: Path, words: str, target: str) -> None:
    assert (page.parent / target).is_file(), f"{name(page)}: nothing at {target}; `make screenshots`"
    assert len(words) > 20, f"{name(page)}: say in words what {target} shows"


def test_every_picture_is_made_shown_and_small() -> None:
    plots = set(PLOTS.glob("*.svg"))
    there = plots | {screenshots.PICTURES / name for name in MADE}
    assert there == plots | set(screenshots.PICTURES.iterdir()) == {(page.parent / t).resolve() for page, _, t in SHOWN}
    assert all(0 < path.stat().st_size < LARGEST for path in there)


def test_the_terminals_picture_loads_nothing_and_names_no_machine() -> None:
    drawn = (screenshots.PICTURES / screenshots.TERMINAL).read_text()
    assert not re.search(r"@font-face|url\(\"?http|<image|<script", drawn)
    assert not re.search(r"/(root|home|tmp|work|Users)/", drawn)


def test_the_terminals_picture_is_of_the_run(tmp_path: Path) -> None:
    event = {"event": "done", "stage": "screen prompts", "items": 360, "seconds": 27.3, "outcome": "60 flagged"}
    (tmp_path / "events.jsonl").write_text(json.dumps({"event": "start"}) + "\n" + json.dumps(event) + "\n")
    (tmp_path / "summary.json").write_text('{"seconds": 41.5}')
    drawn = screenshots.terminal(Run("20260101-000000-process", "process", tmp_path)).replace("&#160;", " ")
    assert "screen prompts" in drawn and "60 flagged" in drawn and "41.5" in drawn
    assert "@font-face" not in drawn and ROOT.name not in drawn.partition("<style>")[0]
