"""The settings in words: name, type, default and meaning of each."""

from collections.abc import Iterable, Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from guardloop.config.job import Settings
from guardloop.core.settings import Section

BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"), ("multiple_of", "a multiple of"))


def describe_fields(
    model: type[Section] = Settings, prefix: str = "", defaults: Section | None = None
) -> Iterator[tuple[str, str, str, str]]:
    """(dotted name, type, default, meaning) of every setting. `defaults` goes before the model's own."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        default = getattr(defaults, name) if defaults is not None else field.default
        if isinstance(annotation, type) and issubclass(annotation, Section):
            own = default if isinstance(default, Section) else None
            yield from describe_fields(annotation, f"{prefix}{name}.", own)
            continue
        shown = "required" if field.is_required() and defaults is None else repr(default)
        limits = [f"{sign} {value}" for sign, value in _limits(field.metadata)]
        kind = ", ".join([type_name(annotation), *limits])
        yield f"{prefix}{name}", kind, shown, " ".join((field.description or "").split())


def type_name(annotation: Any) -> str:
    """A type in the words of a configuration: the choices themselves, and sections by their names."""
    if annotation is Ellipsis or annotation is None:
        return str(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(str(choice) for choice in arguments)
    if origin is Annotated:
        return ", ".join([type_name(arguments[0]), *(f"{sign} {value}" for sign, value in _limits(arguments[1:]))])
    if origin in (Union, UnionType):
        return " or ".join("nothing" if part is type(None) else type_name(part) for part in arguments)
    if origin is not None:
        parts = [type_name(part) for part in arguments if part is not Ellipsis]
        return f"{'list' if origin is tuple else origin.__name__} of {' to '.join(parts)}"
    return str(getattr(annotation, "__name__", annotation)).removesuffix("Settings")


def _limits(metadata: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """(sign, value) of the bounds that a field declares."""
    for rule in metadata:
        for inner in getattr(rule, "metadata", [rule]):
            for name, sign in BOUNDS:
                if (value := getattr(inner, name, None)) is not None:
                    yield sign, value
