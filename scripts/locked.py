"""Print the part of requirements/lock.txt that dependency groups of pyproject.toml need.

    python scripts/locked.py tools                     the group's packages, with theirs
    python scripts/locked.py stage --alone executor    and those of `executor` without theirs

The lock says at each package what asked for it, so nothing is downloaded to know. Needs Python 3.11 and nothing else:
scripts/setup.sh and images/Dockerfile call it before anything is installed.
"""

import argparse
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements/lock.txt"


class Package:
    """A package of a lock: its lines, and the packages that depend on it (`via`)."""

    def __init__(self, lines: str) -> None:
        self.lines = lines
        name, _, rest = lines.partition("==")
        self.name, self.version = normalize(name), rest.split()[0]
        via = lines.partition("# via ")[2].strip().split(", ")
        self.via = {normalize(name) for name in via if re.fullmatch(r"[\w.-]+", name)}


def main() -> None:
    """Print what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("groups", nargs="*")
    parser.add_argument("--alone", nargs="*", default=[], metavar="GROUP")
    arguments = parser.parse_args()
    packages = select(read_lock(), members(arguments.groups), members(arguments.alone))
    sys.stdout.write("".join(package.lines for package in packages))


def read_lock(path: Path = LOCK) -> list[Package]:
    """The packages of the lock, in its order."""
    return [Package(lines) for lines in re.split(r"^(?=\w)", path.read_text("utf-8"), flags=re.MULTILINE)[1:]]


def select(packages: list[Package], roots: set[str], alone: Iterable[str] = ()) -> list[Package]:
    """The packages named in `roots` with all that they depend on, and those named in `alone`, in the lock's order."""
    needed, before = set(roots), -1
    while len(needed) > before:
        before = len(needed)
        needed |= {package.name for package in packages if package.via & needed}
    needed |= set(alone)
    if missing := needed - {package.name for package in packages}:
        raise SystemExit(f"{LOCK.name} lacks {', '.join(sorted(missing))}: make lock")
    return [package for package in packages if package.name in needed]


def members(groups: Iterable[str], path: Path = ROOT / "pyproject.toml") -> set[str]:
    """The packages that the dependency groups name, those of the groups that they include, too."""
    declared = tomllib.loads(path.read_text("utf-8"))["dependency-groups"]
    return {name for group in groups for name in _members(declared, group)}


def _members(declared: dict[str, list[Any]], group: str) -> set[str]:
    names: set[str] = set()
    for entry in declared[group]:
        names |= _members(declared, entry["include-group"]) if isinstance(entry, dict) else {package_of(entry)}
    return names


def package_of(requirement: str) -> str:
    """The name in a requirement such as `transformers>=5`."""
    return normalize(re.split(r"[\s\[<>=~!;]", requirement)[0])


def normalize(name: str) -> str:
    """A package's name as locks write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
