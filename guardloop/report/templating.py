"""How templates are filled: every value that one prints is made harmless on its way in.

Labelled text is hostile. In HTML, control and bidi characters are written out, and jinja escapes the rest; in Markdown,
a text is one line that neither formats nor links.
"""

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from guardloop.evaluation.result import INTERVAL
from guardloop.report import text
from guardloop.report.summary import SYMBOLS, TONES, tone

EXCERPT = 1500


@cache
def environment(autoescape: bool) -> Environment:
    """The templates of this folder, for HTML (`autoescape`) or Markdown."""
    made = Environment(
        loader=PackageLoader("guardloop.report"),
        autoescape=autoescape,
        finalize=_finalize_html if autoescape else _finalize_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )
    made.filters |= {
        "excerpt": text.excerpt,
        "interval": text.interval,
        "label": text.label,
        "number": text.number,
        "sentence": text.sentence,
        "percent": text.percent,
        "setting": text.setting,
        "tone": tone,
    }
    made.globals |= {"EXCERPT": EXCERPT, "INTERVAL": INTERVAL, "SYMBOLS": SYMBOLS, "TONES": TONES}
    return made


def _finalize_html(value: object) -> object:
    return text.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _finalize_markdown(value: object) -> object:
    return text.markdown(value) if isinstance(value, str) else value
