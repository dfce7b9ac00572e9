"""One configuration: eight sections, read from a YAML file and validated before anything runs."""

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import Field, model_validator

from guardloop.cluster import ClusterSettings
from guardloop.data.settings import DatasetSettings, SourceSettings
from guardloop.docker import DockerSettings
from guardloop.errors import GuardLoopError
from guardloop.evaluation.settings import EvaluationSettings, GateSettings
from guardloop.feedback.settings import FeedbackSettings
from guardloop.guard.settings import GuardSettings
from guardloop.kubeflow import KubeflowSettings
from guardloop.registry.settings import RegistrySettings
from guardloop.responses.settings import ResponderSettings
from guardloop.settings import Section, read_section
from guardloop.training.settings import TrainingSettings

BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"), ("multiple_of", "a multiple of"))


class Settings(Section):
    """Everything that decides a run's result. Where it runs is the platform's business."""

    dataset: DatasetSettings = DatasetSettings()
    guard: GuardSettings = GuardSettings()
    responder: ResponderSettings = ResponderSettings()
    feedback: FeedbackSettings = FeedbackSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    gate: GateSettings = GateSettings()
    registry: RegistrySettings = RegistrySettings()

    @model_validator(mode="after")
    def _one_registry(self) -> "Settings":
        """The default guard is looked up where adapters are registered."""
        if self.guard.tracking_uri is None and self.registry.tracking_uri is not None:
            guard = self.guard.model_copy(update={"tracking_uri": self.registry.tracking_uri})
            return self.model_copy(update={"guard": guard})
        return self

    @model_validator(mode="after")
    def _sharded_is_not_quantized(self) -> Self:
        if self.training.sharded and self.guard.quantization in ("int8", "nf4"):
            raise ValueError(
                f"training.sharded: the weights of guard.quantization {self.guard.quantization} cannot be split; leave "
                "sharded off, as a quantized guard fits one GPU, or set the quantization to none"
            )
        return self

    def sections(self) -> dict[str, dict[str, Any]]:
        """Each section as JSON-ready values: the pipeline's parameters.

        Settings that are None are left out, since KFP has no such value; None is the default of every one of them.
        """
        return self.model_dump(mode="json", exclude_none=True)

    def sources(self) -> Iterator[tuple[str, SourceSettings]]:
        """(place in the settings, source) of every table that a run reads, those of benchmarks included."""
        for part in ("traffic", "test", "agent"):
            if (source := getattr(self.dataset, part)) is not None:
                yield f"dataset.{part}", source
        for benchmark in self.evaluation.benchmarks:
            yield f"benchmark {benchmark.name}", benchmark.source


class PlatformSettings(Section):
    """Where a run executes, and how wide."""

    runner: Literal["subprocess", "docker", "kubeflow"] = "subprocess"
    """Every stage is a process of this machine (subprocess), a container (docker), or a pod of a cluster (kubeflow)."""
    shards: int = Field(default=1, ge=1)
    """Parts in which the traffic is screened and answered side by side."""
    stage_threads: int | None = Field(default=None, ge=1)
    """Processor threads of one stage; by default all cores, divided by the shards that run at once."""
    docker: DockerSettings = DockerSettings()
    """The containers (runner docker)."""
    kubeflow: KubeflowSettings = KubeflowSettings()
    """Kubeflow Pipelines, for `guardloop submit`."""
    cluster: ClusterSettings | None = None
    """The pods of a run and what they find (runner kubeflow)."""

    @model_validator(mode="after")
    def _fits_runner(self) -> Self:
        if (self.runner == "kubeflow") != (self.cluster is not None):
            raise ValueError("runner kubeflow needs a `cluster` section, and no other runner takes one")
        return self


def load_settings(path: str | Path) -> Settings:
    """Read and validate a configuration. Raises GuardLoopError naming the file and each wrong key."""
    return read_section(Settings, read_yaml(path, "configuration", "configs"), Path(path).name)


def load_platform(name: str) -> PlatformSettings:
    """Read configs/platform/NAME.yaml, or the file that `name` is a path of."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path("configs/platform") / f"{name}.yaml"
    return read_section(PlatformSettings, read_yaml(path, "platform", "configs/platform"), path.name)


def read_yaml(path: str | Path, what: str, folder: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises GuardLoopError for a file that is missing, unreadable or not a mapping."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        known = {p.stem: str(p) for p in sorted(Path(folder).glob("*.yaml"))}
        near = difflib.get_close_matches(path.stem, known, n=1)
        here = ", ".join(known.values()) or "none"
        hint = f"did you mean {known[near[0]]}?" if near else f"{what} files here: {here}"
        raise GuardLoopError(f"{what}: no such file: {path}", hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise GuardLoopError(f"{what}: cannot read {path}: {error}", "give a YAML file in UTF-8 text") from None
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:  # as PyYAML raises them
        raise GuardLoopError(
            f"{what}: {path} is not valid YAML: {' '.join(str(error).split())}", f"compare it with a file in {folder}"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise GuardLoopError(
            f"{what}: {path} must hold sections, such as `dataset:`", f"compare it with a file in {folder}"
        )
    return values


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
