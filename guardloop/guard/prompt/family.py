"""Families of guards: what differs in how each is prompted and read. A new family is a new YAML file here."""

import difflib
from functools import cache
from pathlib import Path
from typing import Literal

from guardloop.core.errors import GuardLoopError
from guardloop.core.settings import Section, read_section
from guardloop.core.yaml_reader import load_yaml

FOLDER = Path(__file__).parent / "families"


class Family(Section):
    """The metadata of one guard family."""

    name: str
    """The family's name: that of its file."""
    names: list[str]
    """Parts of model names by which `family: auto` knows it."""
    content: Literal["text", "parts"]
    """Whether the chat template takes a message's content as text, or as a list of typed parts."""
    answer_lead: str
    """What the guard emits before its label."""
    categories: list[str] = []
    """The codes of the family's own policy, where it is fixed by the template."""
    accepts_categories: bool = False
    """The chat template takes `categories` and `excluded_category_keys`."""
    template: str | None = None
    """A template of ours, for guards whose tokenizer has none."""
    policy: str | None = None
    """The policy that goes with our template."""
    markers: list[str] = []
    """Block ends and the like, written as plain text; inside a message they are broken up."""
    roles: list[str] = ["User", "Agent"]
    """Words for who speaks; inside a message they are broken up before a colon at the start of a line."""


@cache
def families() -> dict[str, Family]:
    """Every known family by name."""
    found = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        values = load_yaml(path.read_text("utf-8"))
        found[path.stem] = read_section(Family, {"name": path.stem, **values}, str(path.name))
    return found


def family_of(name: str, model: str) -> Family:
    """The family called `name`; for `auto`, the one whose names occur in `model`. Raises GuardLoopError if none."""
    known = families()
    if name == "auto":
        matches = [f for f in known.values() if any(part.lower() in model.lower() for part in f.names)]
        if len(matches) == 1:
            return matches[0]
        raise GuardLoopError(
            f"guard.family: cannot tell the family of {model!r} from its name",
            f"set guard.family to one of: {', '.join(known)}",
        )
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"one of: {', '.join(known)}"
        raise GuardLoopError(f"guard.family: unknown family {name!r}", hint)
    return known[name]
