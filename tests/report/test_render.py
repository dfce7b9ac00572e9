import base64
import functools
import hashlib
import html
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from guardloop.evaluation.result import Evaluation
from guardloop.report.markdown import render_markdown
from guardloop.report.render import render_html, render_mining
from guardloop.report.story import MiningSummary, RunStory
from guardloop.report.text import NOTHING

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BROWSER_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
]  # fmt: skip
HOSTILE = [
    "<script>document.title='owned'</script>",
    "<img src='http://127.0.0.1:{port}/img' onerror='document.title=1'>",
    '"><svg onload=alert(1)>',
    "</svg></style></title></details></blockquote><h1>free</h1>",
    "<!-- <iframe src=http://127.0.0.1:{port}/frame> -->",
    "{{{{ 7 * 7 }}}} {{% raw %}}",
    "javascript:alert(1)\x00<b>",
    "\u202etxt.exe\u2066 \ud800 \x1b[31m",
    "W" * 30_000,
    "' autofocus onfocus=alert(1) x='",
    "&lt;script&gt;&#60;b&#62;",
    "a\u0301" + "\u0301" * 400,
]


class Outline(HTMLParser):
    """The tags and attribute names of a page, in order, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    return parser


def hostile(port: int = 9) -> Iterator[str]:
    while True:
        for text in HOSTILE:
            yield text.format(port=port)


def spoil(scores: list[dict[str, Any]], texts: Iterator[str]) -> list[dict[str, Any]]:
    """Every text of every row, hostile."""
    keys = ("prompt", "category", "source", "language")
    return [row | {key: next(texts) if row[key] else row[key] for key in keys} for row in scores]


def spoil_evaluation(evaluation: Evaluation, texts: Iterator[str]) -> Evaluation:
    """Every free text of the evaluation, hostile."""
    spoilt = evaluation.model_copy(deep=True)
    spoilt.notes = [next(texts) for _ in spoilt.notes]
    spoilt.decision.headline = next(texts)
    for part in spoilt.slices:
        part.name = next(texts)
    for check in spoilt.decision.checks:
        check.name, check.question, check.answer, check.explanation = (next(texts) for _ in range(4))
    for guard in (spoilt.baseline, spoilt.candidate):
        guard.name = next(texts)
    for benchmark in spoilt.benchmarks:
        benchmark.name = next(texts)
        benchmark.revision = benchmark.revision and next(texts)
    return spoilt


def spoil_story(story: RunStory, texts: Iterator[str]) -> RunStory:
    spoilt = story.model_copy(deep=True)
    for name in ("title", "run_id", "configuration", "git_sha", "data_hash"):
        setattr(spoilt, name, next(texts))
    for source in filter(None, [spoilt.dataset, spoilt.guard, *spoilt.responders]):
        source.name, source.revision = next(texts), next(texts) if source.revision else ""
    return spoilt


def spoil_mining(mined: MiningSummary, texts: Iterator[str]) -> MiningSummary:
    spoilt = mined.model_copy(deep=True)
    spoilt.reason = next(texts)
    for example in spoilt.examples:
        example.prompt, example.reason = next(texts), next(texts)
        example.response = example.response and next(texts)
    return spoilt


@pytest.fixture
def page(evaluation: Evaluation, scores: list[dict[str, Any]], story: RunStory) -> str:
    return render_html(evaluation, scores, story)


def test_the_page_opens_with_the_decision_in_words(page: str) -> None:
    words = " ".join(" ".join(outline(page).words).split())
    assert words.index("Promoted") < words.index("Key figures") < words.index("Checks of the gate")
    assert "Checks: 6 passed, 1 warning." in words


@pytest.mark.parametrize(("verdict", "word"), [("failed", "Not promoted"), ("not proven", "Not proven")])
def test_other_decisions_are_worded_and_coloured(
    evaluation: Evaluation, scores: list[dict[str, Any]], verdict: str, word: str
) -> None:
    decided = evaluation.decision.model_copy(update={"promote": False, "verdict": verdict})
    page = render_html(evaluation.model_copy(update={"decision": decided}), scores, RunStory())
    assert f'<p class="word">{word}</p>' in page


def test_the_page_shows_checks_slices_notes_and_lineage(page: str, evaluation: Evaluation, story: RunStory) -> None:
    words = "".join(outline(page).words)
    for check in evaluation.decision.checks:
        assert check.question in words
    for part in evaluation.slices:
        assert part.name in words
    for told in [*evaluation.notes, story.run_id, story.git_sha, story.data_hash, "19,652", "hard negatives"]:
        assert told in words


def test_the_page_is_well_formed(page: str) -> None:
    opened: list[str] = []

    class Balance(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag != "meta":
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in {"div", "span", "p"}

    Balance().feed(page)
    assert opened == []


def test_the_page_asks_for_nothing_and_runs_nothing(page: str, mined: MiningSummary) -> None:
    for text in (page, render_mining(mined)):
        tags = outline(text).tags
        assert {"script", "link", "img", "iframe", "form", "object"}.isdisjoint(tag for tag, _ in tags)
        names = {name for _, attributes in tags for name in attributes}
        assert {"href", "src", "style", "xlink:href"}.isdisjoint(names)
        assert not [name for name in names if name.startswith("on")]
        style = re.search(r"<style>(.*)</style>", text, re.DOTALL)
        assert style and "url(" not in style[1] and "@import" not in style[1]


def test_the_policy_allows_this_very_stylesheet_and_nothing_else(page: str) -> None:
    style = re.search(r"<style>(.*)</style>", page, re.DOTALL)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert style and policy
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy[1] == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert page.index("Content-Security-Policy") < page.index("<style>")


def test_hostile_text_never_becomes_markup(
    evaluation: Evaluation, scores: list[dict[str, Any]], story: RunStory
) -> None:
    """The outline of the page is the same whatever the texts say."""
    benign = (text for text in iter(lambda: "plain words", None))
    wanted = render_html(spoil_evaluation(evaluation, benign), spoil(scores, benign), spoil_story(story, benign))
    texts = hostile()
    page = render_html(spoil_evaluation(evaluation, texts), spoil(scores, texts), spoil_story(story, texts))
    assert outline(page).tags == outline(wanted).tags
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
    page.encode()


def test_hostile_examples_never_become_markup(mined: MiningSummary) -> None:
    benign = (text for text in iter(lambda: "plain words", None))
    wanted = render_mining(spoil_mining(mined, benign))
    assert outline(render_mining(spoil_mining(mined, hostile()))).tags == outline(wanted).tags


def test_the_text_of_examples_is_shown_as_it_was_written(evaluation: Evaluation, scores: list[dict[str, Any]]) -> None:
    rows = [row | {"prompt": "<b>bold</b> & {{ 7 * 7 }}"} for row in scores]
    assert "<b>bold</b> & {{ 7 * 7 }}" in "".join(outline(render_html(evaluation, rows, RunStory())).words)


def test_example_text_is_veiled_until_opened_and_long_text_is_cut(
    evaluation: Evaluation, scores: list[dict[str, Any]]
) -> None:
    rows = [row | {"prompt": "secret" * 10_000} for row in scores]
    page = render_html(evaluation, rows, RunStory())
    assert len(page) < 200_000 and "more characters" in page
    assert "<details open" not in page
    for shown in re.findall(r'<span class="veil"[^>]*>(.*?)</span>', page):
        assert shown.startswith("secret")
    closed = re.sub(r"<details.*?</details>", "", page, flags=re.DOTALL)
    assert "secret" not in closed


def test_rows_that_cannot_be_plotted_are_left_out(
    evaluation: Evaluation, scores: list[dict[str, Any]], page: str
) -> None:
    odd = [scores[0] | {"unsafe": None}, scores[1] | {"candidate_score": float("nan")}]
    assert render_html(evaluation, iter([*scores, *odd]), RunStory()).count("1,245 labelled prompts") == 1


@pytest.mark.parametrize("kept", [slice(0, 0), slice(0, 1)])
def test_a_page_without_plots_still_tells_the_decision(
    evaluation: Evaluation, scores: list[dict[str, Any]], kept: slice
) -> None:
    bare = evaluation.model_copy(update={"slices": [], "notes": []})
    page = render_html(bare, scores[kept], RunStory())
    assert "Promoted" in page and "No curves" in page and "nan" not in page


def test_figures_that_are_no_numbers_are_shown_as_unknown(evaluation: Evaluation, scores: list[dict[str, Any]]) -> None:
    odd = evaluation.model_copy(deep=True)
    precision = odd.metrics["precision"]
    precision.candidate.value = precision.change.value = odd.slices[0].gain.value = float("nan")
    odd.decision.checks[0].value = float("nan")
    page = render_html(odd, scores, RunStory())
    assert not re.search(r'="[^"]*\bnan\b', page)
    assert ">nan<" not in page


def test_the_same_input_gives_the_same_page(
    page: str, evaluation: Evaluation, scores: list[dict[str, Any]], story: RunStory
) -> None:
    assert render_html(evaluation, scores, story) == page


def test_what_was_not_measured_has_no_value(evaluation: Evaluation, scores: list[dict[str, Any]]) -> None:
    check = evaluation.decision.checks[0].model_copy(update={"value": None, "low": None, "high": None})
    decided = evaluation.decision.model_copy(update={"checks": [check]})
    page = render_html(evaluation.model_copy(update={"decision": decided}), scores, RunStory())
    assert f'<td class="figure" data-name="Value">{NOTHING}</td>' in page


def test_the_summary_has_the_decision_the_metrics_and_the_checks(evaluation: Evaluation, story: RunStory) -> None:
    summary = render_markdown(evaluation, story)
    lines = summary.splitlines()
    assert lines[:3] == ["# Llama Guard 3 8B, round 2", "", f"**Promoted.** {lines[2].split('** ', 1)[1]}"]
    assert any(line.startswith("| AUPRC | 0.786 | 0.927 | +0.140 (+0.119 to +0.161) |") for line in lines)
    assert sum("| ✓ passed |" in line for line in lines) == len(evaluation.decision.checks) - 1
    assert sum("| ✕ warning: failed |" in line for line in lines) == 1
    assert "catches 50; of 230 that never did it blocks 6." in summary
    assert f"run {story.run_id}" in summary


def test_hostile_text_never_breaks_the_summary(evaluation: Evaluation, story: RunStory) -> None:
    benign = (text for text in iter(lambda: "plain words", None))
    wanted = render_markdown(spoil_evaluation(evaluation, benign), spoil_story(story, benign)).splitlines()
    texts = hostile()
    summary = render_markdown(spoil_evaluation(evaluation, texts), spoil_story(story, texts))
    assert "<" not in summary and "://" not in summary
    assert len(summary.splitlines()) == len(wanted)
    for line, plain in zip(summary.splitlines(), wanted, strict=True):
        assert len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"(?<!\\)\|", plain))


def test_a_page_of_too_little_says_that_nothing_was_trained(mined: MiningSummary) -> None:
    words = "".join(outline(render_mining(mined)).words)
    assert "Too little to train on" in words and mined.reason in words and "nothing was trained" in words
    for told in ("900", "812", "3,248", "704 are refusals", "3 of 4", "Hard negative", "replay traffic"):
        assert told in words


def test_a_page_of_enough_says_that_it_is_enough(mined: MiningSummary, story: RunStory) -> None:
    enough = mined.model_copy(
        update={"enough": True, "reason": "412 positives were found.", "smoothing": "No lexical smoothing."}
    )
    words = "".join(outline(render_mining(enough, story)).words)
    assert "Enough to train on" in words and "nothing was trained" not in words and story.title in words
    assert "No lexical smoothing." in words


def test_what_became_of_the_labels_is_on_the_page(
    evaluation: Evaluation, scores: list[dict[str, Any]], story: RunStory
) -> None:
    note = "labels of dataset.test: unsafe: '1' (30); safe: '0' (70)"
    noted = story.model_copy(update={"data_notes": [note]})
    assert note in "".join(outline(render_html(evaluation, scores, noted)).words)


def test_mining_that_found_nothing_has_a_page_too() -> None:
    words = "".join(outline(render_mining(MiningSummary(enough=False, reason="No prompt was let through."))).words)
    assert "No example was found." in words


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome binary on the PATH")
def test_a_browser_sees_no_hostile_markup_and_asks_for_nothing(
    evaluation: Evaluation, scores: list[dict[str, Any]], story: RunStory, tmp_path: Path
) -> None:
    asked: list[str] = []

    class Listener(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Listener, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        texts = hostile(server.server_port)
        page = render_html(spoil_evaluation(evaluation, texts), spoil(scores, texts), spoil_story(story, texts))
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        assert CHROMIUM is not None
        seen = subprocess.run(
            [CHROMIUM, *BROWSER_FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
             f"http://127.0.0.1:{server.server_port}/page.html"],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        server.shutdown()

    def drawn(text: str) -> list[str]:
        return [tag for tag, _ in outline(text).tags]

    assert drawn(seen.stdout) == drawn(page)
    assert asked == ["/page.html"]
    assert "Content Security Policy" not in seen.stderr


HARNESS = """<!doctype html><body><iframe id="page" src="page.html" style="width:390px;height:800px"></iframe><script>
const frame = document.getElementById("page");
frame.onload = () => {
  const inside = frame.contentDocument, look = element => frame.contentWindow.getComputedStyle(element);
  const details = inside.querySelector("details.text"), veil = details.querySelector(".veil");
  const found = {
    overflow: inside.documentElement.scrollWidth - inside.documentElement.clientWidth,
    closed: details.open, blurred: look(veil).filter, said: details.querySelector("blockquote").checkVisibility(),
    paper: look(inside.body).backgroundColor, band: look(inside.querySelector("polygon.band")).fillOpacity,
  };
  details.querySelector("summary").click();
  found.opened = details.open;
  found.read = details.querySelector("blockquote").checkVisibility();
  document.title = JSON.stringify(found);
};
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome binary on the PATH")
def test_a_browser_fits_a_phone_keeps_texts_blurred_until_clicked_and_knows_the_dark(page: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    (tmp_path / "harness.html").write_text(HARNESS, encoding="utf-8")
    assert CHROMIUM is not None

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    def look(port: int, *flags: str) -> dict[str, Any]:
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        address = f"http://127.0.0.1:{port}/harness.html"
        command = [CHROMIUM, *BROWSER_FLAGS, *flags, profile, "--virtual-time-budget=4000", "--dump-dom", address]
        seen = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        title = re.search("<title>(.*?)</title>", seen.stdout)
        assert title, seen.stderr
        found: dict[str, Any] = json.loads(html.unescape(title[1]))
        return found

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        light = look(server.server_port, "--blink-settings=preferredColorScheme=1")
        dark = look(server.server_port, "--blink-settings=preferredColorScheme=0")
        server.shutdown()

    assert light["overflow"] == 0
    assert (light["closed"], light["said"], light["opened"]) == (False, False, True)
    assert "blur" in light["blurred"] and light["read"]
    assert 0 < float(light["band"]) < 1
    assert light["paper"] != dark["paper"]


def test_the_page_shows_feedback_benchmarks_and_warnings(page: str, evaluation: Evaluation) -> None:
    words = " ".join("".join(outline(page).words).split())
    assert "Of 82 held-out prompts that drew blocked responses the candidate catches 50" in words
    for benchmark in evaluation.benchmarks:
        assert benchmark.name in words
    assert "warning: failed" in words
    bare = evaluation.model_copy(update={"held_out": None, "benchmarks": []})
    without = "".join(outline(render_html(bare, [], RunStory())).words)
    assert "Held-out prompts" not in without and "Public benchmarks" not in without
