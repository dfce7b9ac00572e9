# ruff: noqa: RUF001
import math

import pytest

from guardloop.evaluation.result import Estimate
from guardloop.report import text


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("a\x00b", "a[U+0000]b"),
        ("\u202eevil", "[U+202E]evil"),
        ("\u2066x\u2069", "[U+2066]x[U+2069]"),
        ("zero\u200bwidth", "zero[U+200B]width"),
        ("tag\U000e0041", "tag[U+E0041]"),
        ("\ud800", "[U+D800]"),
        ("\x1b[31m", "[U+001B][31m"),
        ("line\u2028end", "line[U+2028]end"),
    ],
)
def test_characters_that_hide_or_reorder_are_written_out(hostile: str, shown: str) -> None:
    assert text.visible(hostile) == shown
    text.visible(hostile).encode()


@pytest.mark.parametrize(
    "plain", ["two\nlines\tand a tab", "مرحبا", "👩\u200d🚒", "naïve – “quoted”", "ที่นี่", "नमस्ते", "日本語"]
)
def test_ordinary_text_of_any_script_is_left_alone(plain: str) -> None:
    assert text.visible(plain) == plain


def test_towers_of_accents_are_cut() -> None:
    assert text.visible("a" + "\u0301" * 400 + "b") == "a" + "\u0301" * 4 + "[396 more marks]b"


def test_windows_line_ends_become_plain_ones() -> None:
    assert text.visible("a\r\nb\rc") == "a\nb[U+000D]c"


def test_an_excerpt_says_what_it_leaves_out() -> None:
    assert text.excerpt("short", 10) == "short"
    assert text.excerpt("x" * 5000, 10) == "x" * 10 + " … (4,990 more characters)"
    assert text.excerpt(None, 10) == ""


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.8421, "0.842"), (-0.0412, "−0.041"), (0.00002, "<0.001"), (417.0, "417"), (12400, "12,400"), (0, "0"),
     (-0.0001, "0.000"),      (None, "–"), (math.nan, "–"), (-math.inf, "−∞")],
)  # fmt: skip
def test_numbers_are_short(value: float | None, shown: str) -> None:
    assert text.number(value) == shown


def test_gains_carry_their_sign() -> None:
    assert text.number(0.0412, signed=True) == "+0.041"
    assert text.number(-2.57, signed=True, digits=1) == "−2.6"
    assert text.interval(Estimate(value=0.1, low=-0.02, high=0.2), signed=True) == "−0.020 to +0.200"
    assert text.interval(Estimate(value=0.1)) == ""


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (True, "yes"), (False, "no"), (5e-05, "5e-05"), (-0.05, "−0.05"), (1284.2, "1,284"), ([1, 2], "1, 2"),
     ([], "–"), ("mode", "mode")],
)  # fmt: skip
def test_settings_of_any_type_fit_a_cell(value: object, shown: str) -> None:
    assert text.setting(value) == shown


@pytest.mark.parametrize(
    "hostile",
    ["<script>x</script>", "a | b", "**bold**", "[click](https://evil.example)", "`code`", "two\nlines",
     "https://evil.example", "www.evil.example", "&lt;b&gt;", "![](x)", "# heading"],
)  # fmt: skip
def test_markdown_neither_formats_nor_links_a_text(hostile: str) -> None:
    safe = text.markdown(hostile)
    assert "<" not in safe and "\n" not in safe and "://" not in safe and "www." not in safe
    for mark in "*_`[]|#":
        assert safe.replace("&#", "").count(mark) == safe.count(f"\\{mark}")
