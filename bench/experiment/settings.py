"""What one experiment is: its data, how its baseline is made, and the arms that are compared."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from guardloop.config.files import read_yaml
from guardloop.core.settings import S, Section, read_section
from guardloop.data.settings import DatasetSettings, SourceSettings
from guardloop.evaluation.settings import EvaluationSettings, GateSettings
from guardloop.guard.settings import GuardSettings
from guardloop.mining.settings import MiningSettings
from guardloop.responses.settings import RECIPE, ResponderSettings
from guardloop.training.settings import TrainingSettings


class BaselineGuard(Section):
    """How the baseline is made: a small model that learns to judge responses, and little of prompts."""

    base: str = "embedded:smollm2"
    """The model that is trained."""
    family: str = "guardloop"
    """Its prompt format and policy."""
    responses: SourceSettings
    """Prompts with responses and the responses' labels."""
    prompts: SourceSettings
    """The same prompts with their own labels; of each distinct unsafe one, the prompt alone is learnt, too."""
    ordinary: SourceSettings
    """Harmless prompts that are learnt as such. They are taken out of the traffic."""
    training: TrainingSettings = TrainingSettings()
    """How it is trained. The adapter is merged into the base."""
    max_text_tokens: int = Field(default=1024, ge=16)
    """Longer messages keep their head and tail."""


class Arm(Section):
    """One way to make the candidate."""

    name: str
    """Its row in the table."""
    examples: Literal["recipe", "positives", "balanced", "self", "gold"] = "recipe"
    """What it is trained on. recipe: what mine_feedback writes. positives: mined prompts as unsafe, and nothing else.
    balanced: with as many random passed prompts as safe. self: the baseline's own decisions, without responses. gold:
    the data's own labels."""
    mining: dict[str, Any] = {}
    """Settings of `mining` that differ."""
    training: dict[str, Any] = {}
    """Settings of `training` that differ."""
    responders: list[str] = []
    """Only the responses with these tags; by default all."""
    samples: int | None = None
    """Only so many responses of each responder to each prompt."""
    seeds: list[int] = []
    """Seeds of training; by default the experiment's."""


class Subset(Section):
    """A part of the test set that is reported by itself."""

    name: str
    source: str = ""
    """Start of the rows' source; by default all rows."""


class ExperimentSettings(Section):
    """One experiment. Paths of files are relative to the folder given with --data."""

    title: str
    """Heading of the results."""
    baseline: BaselineGuard
    baseline_seeds: list[int] = Field(default=[0], min_length=1)
    """Baselines to start from; the arms are run on each."""
    dataset: DatasetSettings
    guard: GuardSettings = GuardSettings()
    responders: list[ResponderSettings] = RECIPE
    max_error_share: float = Field(default=0.05, ge=0, le=1)
    """The experiment stops when a larger share of one responder's responses could not be generated."""
    mining: MiningSettings = MiningSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    gate: GateSettings = GateSettings()
    passed_share: float = Field(default=0.85, gt=0, lt=1)
    """The baseline's threshold lets this share of the traffic pass."""
    arms: list[Arm] = Field(min_length=1)
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    """Seeds of training; each arm is trained with each."""
    shards: int = Field(default=1, ge=1)
    """Parts of the traffic that are answered and judged side by side, where there are workers."""
    subsets: list[Subset] = [Subset(name="all")]
    rounds: int = Field(default=1, ge=1)
    """Rounds of the loop: in each further one the recipe's guard screens the traffic, and the judge stays."""


def load_experiment(path: Path, data: Path) -> ExperimentSettings:
    """The experiment in a YAML file, with the paths of its files below `data`. Raises GuardLoopError if it is wrong."""
    settings = read_section(ExperimentSettings, read_yaml(path, "experiment", "configs/experiments"), path.name)

    def below(section: S, *names: str) -> S:
        """The section with the files of the named sources below `data`."""
        moved = {}
        for name in names:
            source: SourceSettings | None = getattr(section, name)
            if source and source.kind == "file" and "://" not in source.path:  # an absolute path stays as it is
                moved[name] = source.model_copy(update={"path": str(data / source.path)})
        return section.model_copy(update=moved)

    baseline = below(settings.baseline, "responses", "prompts", "ordinary")
    dataset = below(settings.dataset, "traffic", "test", "response_test")
    return settings.model_copy(update={"baseline": baseline, "dataset": dataset})
