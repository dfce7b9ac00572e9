"""Small pieces of Markdown."""

import inspect
from collections.abc import Iterable, Sequence

NOTE = "<!-- Written by `make docs-generate` from the code; changes made here are lost. -->"


def table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; line breaks and bars in cells are made harmless."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in lines)


def code(text: str) -> str:
    """`text` as code; nothing for no text."""
    return f"`{text}`" if text else ""


def first_words(thing: object) -> str:
    """The docstring of something, on one line."""
    return " ".join((inspect.getdoc(thing) or "").split())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
