"""One configuration: its sections, read from a YAML file and validated before anything runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from guardloop.config.files import read_yaml
from guardloop.core.settings import Section, read_section
from guardloop.data.settings import DatasetSettings, SourceSettings
from guardloop.evaluation.settings import EvaluationSettings, GateSettings
from guardloop.guard.settings import GuardSettings
from guardloop.mining.settings import MiningSettings
from guardloop.registry.settings import RegistrySettings
from guardloop.responses.settings import RECIPE, ResponderSettings, distinct
from guardloop.training.settings import TrainingSettings


class Settings(Section):
    """Everything that decides a run's result. Where it runs is the platform's business."""

    seed: int = Field(default=0, ge=0)
    """Seed of all that is drawn: rows, responses, what is held out, the training and the bootstrap."""
    max_error_share: float = Field(default=0.05, ge=0, le=1)
    """The run stops when a larger share of one responder's responses could not be generated."""
    dataset: DatasetSettings = DatasetSettings()
    guard: GuardSettings = GuardSettings()
    responders: list[ResponderSettings] = Field(default=RECIPE, min_length=1)
    """The models that answer the passed prompts, each with settings of its own; every one answers every prompt."""
    mining: MiningSettings = MiningSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    gate: GateSettings = GateSettings()
    registry: RegistrySettings = RegistrySettings()

    @field_validator("responders")
    @classmethod
    def _names_differ(cls, responders: list[ResponderSettings]) -> list[ResponderSettings]:
        return distinct(responders)

    @model_validator(mode="after")
    def _sharded_is_not_quantized(self) -> Self:
        if self.training.sharded and self.guard.quantization in ("int8", "nf4"):
            raise ValueError(
                f"training.sharded: the weights of guard.quantization {self.guard.quantization} cannot be split; leave "
                "sharded off, as a quantized guard fits one GPU, or set the quantization to none"
            )
        return self

    def sections(self) -> dict[str, Any]:
        """Every setting of the top level as JSON-ready values: the pipeline's parameters.

        Settings that are None are left out, since KFP has no such value; None is the default of every one of them.
        """
        return self.model_dump(mode="json", exclude_none=True)

    def sources(self) -> Iterator[tuple[str, SourceSettings]]:
        """(place in the settings, source) of every table that a run reads, those of benchmarks included."""
        for part in ("traffic", "test", "response_test"):
            if (source := getattr(self.dataset, part)) is not None:
                yield f"dataset.{part}", source
        for benchmark in self.evaluation.benchmarks:
            yield f"benchmark {benchmark.name}", benchmark.source


def load_settings(path: str | Path) -> Settings:
    """Read and validate a configuration. Raises GuardLoopError naming the file and each wrong key."""
    return read_section(Settings, read_yaml(path, "configuration", "configs"), Path(path).name)
