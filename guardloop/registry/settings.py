"""Settings of the registry: where runs and adapters are recorded."""

import re

from pydantic import Field, field_validator

from guardloop.core.settings import Section

NAME = r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$"
TAG = re.compile(r"(?=.{1,250}$)\w[\w.: -]*(/\w[\w.: -]*)*")


class RegistrySettings(Section):
    """How runs and adapters are called in MLflow, whose address is the environment's MLFLOW_TRACKING_URI."""

    experiment: str = Field(default="guardloop", min_length=1)
    """MLflow experiment that holds one run per pipeline run."""
    model: str = Field(default="guardloop-guard", pattern=NAME)
    """Registered model whose versions are the trained adapters; its alias `champion` is the guard in use."""
    tags: dict[str, str] = {}
    """Tags put on every run and version, for example the team or the ticket."""

    @field_validator("tags")
    @classmethod
    def _tag_names(cls, tags: dict[str, str]) -> dict[str, str]:
        if wrong := [name for name in tags if not re.fullmatch(TAG, name)]:
            raise ValueError(f"{wrong[0]!r} cannot name a tag: letters, digits, `_`, `-`, `.`, `:`, `/` and spaces can")
        return tags
