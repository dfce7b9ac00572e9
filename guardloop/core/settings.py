"""The base of every settings section: strict keys, and errors that name the nearest valid key."""

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from guardloop.core.errors import GuardLoopError, without_secrets

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """A group of settings. Unknown keys and infinite numbers are refused; values are frozen once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def plain(self) -> dict[str, Any]:
        """The section as JSON-ready values: what travels as one pipeline parameter."""
        return self.model_dump(mode="json")


def read_section(model: type[S], values: object, where: str) -> S:
    """Validate `values` as a `model`. Raises GuardLoopError naming each wrong key or value, under `where`."""
    if values is None:
        values = {}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise GuardLoopError(
            "\n".join(_explain(model, problem, where) for problem in error.errors()),
            "`guardloop config fields` lists the settings; docs/configuration.md has those of platforms, too",
        ) from None


def without_credentials(uri: str | None, where: str) -> str | None:
    """`uri` itself. Raises GuardLoopError if it holds a password: settings are stored in pipelines and runs."""
    if uri and without_secrets(uri) != uri:
        raise GuardLoopError(
            f"{where} holds credentials: {without_secrets(uri)}",
            "give MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or _TOKEN) in the environment",
        )
    return uri


def _explain(model: type[Section], problem: Any, where: str) -> str:
    place = ".".join([where, *(str(part) for part in problem["loc"])]).strip(".")
    if problem["type"] == "extra_forbidden":
        valid = _valid_keys(model, problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"valid keys: {', '.join(valid)}"
        return f"{place}: unknown setting; {hint}"
    if problem["type"] == "value_error":  # our own rule says all; what was given may be a password
        return f"{place}: {problem['msg'].removeprefix('Value error, ')}"
    return f"{place}: {problem['msg']} (got {str(problem.get('input'))[:80]!r})"


def _valid_keys(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Keys of the (nested) model that `path` leads to."""
    current: type[BaseModel] = model
    for part in (part for part in path if not isinstance(part, int)):  # numbers are places in a list
        field = current.model_fields.get(str(part))
        if field is None:
            break
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        nested = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not nested:
            break
        current = nested[0]
    return sorted(current.model_fields)
