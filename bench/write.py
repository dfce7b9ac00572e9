"""Sections of docs/benchmarks.md that benchmarks write themselves."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def write_section(name: str, markdown: str) -> None:
    """Put `markdown` between `<!-- name -->` and `<!-- /name -->` of docs/benchmarks.md, at its end if it is new."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    section = f"{start}\n{markdown.strip()}\n{end}"
    page = PAGE.read_text("utf-8") if PAGE.is_file() else "# Benchmarks\n"
    found, count = re.subn(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: section, page, flags=re.DOTALL)
    PAGE.write_text(found if count else f"{page.rstrip()}\n\n{section}\n", "utf-8")
