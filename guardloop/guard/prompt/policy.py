"""Policies: the categories a guard judges by, as data."""

import re
from pathlib import Path

import yaml

from guardloop.core.errors import GuardLoopError
from guardloop.core.settings import Section, read_section
from guardloop.core.yaml_reader import load_yaml

FOLDER = Path(__file__).parent / "policies"
CODE = re.compile(r"^[A-Z]{1,3}[0-9]{1,3}$")


class Category(Section):
    """One category of a policy."""

    name: str
    """Short name, as shown in reports."""
    description: str
    """What falls under it, as the guard reads it."""


Policy = dict[str, Category]


def read_policy(path: str | Path) -> Policy:
    """Read a YAML of `code: {name, description}`. Raises GuardLoopError for a missing file or a malformed code."""
    path = Path(path)
    try:
        values = load_yaml(path.read_text("utf-8"))
    except FileNotFoundError:
        raise GuardLoopError(f"guard.policy: no such file: {path}", "check the path") from None
    except (OSError, yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:  # PyYAML's
        raise GuardLoopError(
            f"guard.policy: {path} is not readable YAML: {' '.join(str(error).split())}", "mend or replace the file"
        ) from None
    if not isinstance(values, dict) or not values:
        raise GuardLoopError(
            f"guard.policy: {path} has no categories", "write `S1: {name: ..., description: ...}` lines"
        )
    for code in values:
        if not isinstance(code, str) or not CODE.match(code):
            raise GuardLoopError(f"guard.policy: {path}: {code!r} is not a category code", "codes look like S1 or O12")
    return {code: read_section(Category, value, f"{path}: {code}") for code, value in values.items()}


def parse_codes(text: str, policy_codes: list[str]) -> list[str]:
    """Codes of a comma-separated line. Raises ValueError for one that the policy does not have."""
    codes = [code.strip() for code in text.split(",") if code.strip()]
    if unknown := [code for code in codes if code not in policy_codes]:
        raise ValueError(f"unknown category codes: {', '.join(unknown)}")
    return codes
