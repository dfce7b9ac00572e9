"""docs/configuration.md: every setting of a configuration and of a platform file, from the settings models."""

from collections.abc import Iterable, Iterator
from typing import Any, get_args

from guardloop.config import PlatformSettings, Settings, describe_fields, type_name
from guardloop.core.settings import Section
from scripts.docs.markdown import NOTE, code, first_words, table

INTRODUCTION = f"""# Configuration

{NOTE}

Look up a setting here. A configuration is a YAML file that decides a run's result; everything in it has a default, and
`configs/` has one file for each situation. Where the run executes is a platform file in `configs/platform/`, further
down. Unknown keys are refused, with the nearest valid one named. `guardloop config show FILE` prints a file with every
default.
"""
TOP_LEVEL = "Top level"
LONGEST_DEFAULT = 80


def configuration_page() -> str:
    """The whole page."""
    fields = Settings.model_fields.items()
    sections = {name: found for name, field in fields for found in _sections_in(field.annotation)}
    top = [row for row in describe_fields() if "." not in row[0]]
    parts = [INTRODUCTION, f"## {TOP_LEVEL}\n\n{_table(top)}\n"]
    parts += [_section(name, model) for name, model in sections.items()]
    parts.append(_section("Platform files", PlatformSettings))
    places: dict[type[Section], list[str]] = {}
    for root in (Settings, PlatformSettings):
        for path, model in _lists(root):
            if path not in sections:
                places.setdefault(model, []).append(path)
    parts += [_section(type_name(model), model, found) for model, found in places.items()]
    return "\n".join(parts).rstrip() + "\n"


def _section(title: str, model: Any, places: list[str] | None = None) -> str:
    where = f" In {', '.join(map(code, dict.fromkeys(places)))}." if places else ""
    return f"## {title}\n\n{first_words(model)}{where}\n\n{_table(describe_fields(model))}\n"


def _table(fields: Iterable[tuple[str, str, str, str]]) -> str:
    rows = [
        (code(name), kind, code(default) if len(default) <= LONGEST_DEFAULT else "see below", meaning)
        for name, kind, default, meaning in fields
    ]
    return table(("setting", "type", "default", "meaning"), rows)


def _lists(model: type[Section], prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """(path, model) of every setting that holds sections of its own: in a list, in a mapping, or perhaps."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield from _lists(annotation, f"{prefix}{name}.")
            continue
        for found in _sections_in(annotation):
            yield f"{prefix}{name}", found
            yield from _lists(found, f"{prefix}{name}.")


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)
