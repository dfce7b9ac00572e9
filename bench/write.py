"""docs/benchmarks.md: each benchmark writes its own section, between two markers."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
TITLE = "# Benchmarks\n\nEach section names the command that writes it.\n"


def write_section(name: str, markdown: str, page: Path = PAGE, title: str = TITLE) -> None:
    """Put `markdown` between `<!-- name -->` and `<!-- /name -->`; a section that is new is added at the end."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    section = f"{start}\n{markdown.strip()}\n{end}"
    text = page.read_text("utf-8") if page.exists() else title
    if start in text and end in text:
        text = re.sub(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: section, text, count=1, flags=re.DOTALL)
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, "utf-8")
