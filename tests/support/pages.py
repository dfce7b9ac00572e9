"""The Markdown pages that users read, without their code, and their code."""

import re
from pathlib import Path

from support.root import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^( *)(```|~~~)(\w*)\n(.*?)^\1\2\s*$", re.M | re.S)
LINK = re.compile(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.+?)\s*#*$", re.M)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """The page without fenced code."""
    return FENCE.sub("", page.read_text("utf-8"))


def fenced(page: Path) -> list[tuple[str, str]]:
    """(language, code) of each fenced block."""
    return [(found[3], found[4]) for found in FENCE.finditer(page.read_text("utf-8"))]


def links(page: Path) -> list[str]:
    """The targets of the page's links, code left out."""
    return LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page)))


def anchors(page: Path) -> set[str]:
    """What a link to a part of the page may end in: its headings as GitHub and the site's builder write them."""
    found: dict[str, int] = {}
    for heading in HEADING.findall(prose(page)):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower()).strip().replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return set(found) | {f"{slug}-{i}" for slug, count in found.items() for i in range(1, count + 1)}
