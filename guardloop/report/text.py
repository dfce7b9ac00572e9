"""Text and figures as people should read them: hostile characters made visible, numbers short and aligned."""

import math
import re
import unicodedata
from itertools import groupby

from guardloop.evaluation.result import Estimate

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"
JOINERS = {"\u200c", "\u200d"}  # emoji and several scripts need them; they move nothing
MARKS = 4  # more than any language stacks on one letter
MARKDOWN = re.compile(r"([\\`*_\[\]|~#])")
WEB_ADDRESS = re.compile(r"(?<=[a-zA-Z]):(?=//)|(?<=\bwww)\.", re.IGNORECASE)


def visible(text: str) -> str:
    """`text` with control, bidi, invisible and lone-surrogate characters written out, as in `[U+202E]`.

    Towers of accents, which would be drawn over their surroundings, are cut to `MARKS`.
    """
    shown = []
    for marks, run in groupby(text.replace("\r\n", "\n"), key=_is_mark):
        characters = list(run)
        if marks and len(characters) > MARKS:
            shown += [*characters[:MARKS], f"[{len(characters) - MARKS:,} more marks]"]
        else:
            shown += map(_shown, characters)
    return "".join(shown)


def excerpt(text: str | None, limit: int) -> str:
    """The first `limit` characters of `text`, and how many were left out."""
    text = text or ""
    rest = len(text) - limit
    return text if rest <= 0 else f"{text[:limit]} … ({rest:,} more characters)"


def number(value: float | None, signed: bool = False, digits: int = 3) -> str:
    """`digits` decimals, but counts and large numbers whole: `0.842`, `+0.041`, `12,400`."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return f"{MINUS if value < 0 else ''}∞"
    if 0 < value < 0.0005 and not signed:
        return "<0.001"
    if isinstance(value, int) or abs(value) >= 1000 or (abs(value) >= 2 and value == int(value)):
        digits = 0
    value = round(value, digits) + 0.0  # never a negative zero
    shown = f"{value:{'+' if signed else ''},.{digits}f}"
    return shown.replace("-", MINUS)


def percent(value: float | None) -> str:
    """A share with one decimal: `70.2%`."""
    return NOTHING if value is None or not math.isfinite(value) else f"{100 * value:.1f}%".replace("-", MINUS)


def interval(estimate: Estimate | None, signed: bool = False) -> str:
    """The interval as `0.812 to 0.870`, empty where there is none."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f"{number(estimate.low, signed)} to {number(estimate.high, signed)}"


def setting(value: object) -> str:
    """A setting or figure of any type, in a table cell."""
    match value:
        case None | "":
            return NOTHING
        case bool():
            return "yes" if value else "no"
        case int():
            return number(value)
        case float():
            return (
                number(value) if abs(value) >= 1000 or not math.isfinite(value) else re.sub("^-", MINUS, f"{value:.4g}")
            )
        case list() | tuple():
            return ", ".join(setting(item) for item in value) or NOTHING
        case _:
            return str(value)


def label(name: str) -> str:
    """A key as words: `hard_negative` becomes `hard negative`."""
    return name.replace("_", " ")


def sentence(text: str) -> str:
    """`text` with its first letter raised and the rest as it is."""
    return text[:1].upper() + text[1:]


def markdown(text: str) -> str:
    """`text` as one line that Markdown neither formats nor links, nor lets become HTML."""
    line = " ".join(visible(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return WEB_ADDRESS.sub(lambda found: f"&#{ord(found[0])};", MARKDOWN.sub(r"\\\1", line))


def _is_mark(character: str) -> bool:
    return unicodedata.category(character) in {"Mn", "Me"}


def _shown(character: str) -> str:
    if character in "\n\t" or character in JOINERS:
        return character
    hidden = unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
    return f"[U+{ord(character):04X}]" if hidden else character
