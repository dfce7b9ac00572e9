"""The base of every settings section: strict keys, and errors that name the nearest valid key."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from guardloop.core.errors import GuardLoopError
from guardloop.core.escaped import unescape
from guardloop.core.text import holds_secret

S = TypeVar("S", bound="Section")

SEED = "gone: the run's one `seed` stands at the top level"
AUTO = "gone: a GPU is used where there is one; CUDA_VISIBLE_DEVICES= hides it"
TRACKING = "gone: MLflow's address is the environment's MLFLOW_TRACKING_URI"
ENGINE = "gone: the engine chooses it, and takes less where memory runs out"
FIXED = "gone: it is fixed now, as in the measured recipe"
OLD = {
    "job.feedback": "it is called `mining` now",
    "job.responder": "it is called `responders` now: a list, one item for each model",
    "dataset.agent": "it is called `response_test` now",
    "dataset.name": "gone: the name follows from the path of `traffic`",
    "dataset.near_duplicate": "gone: it is always 0.8",
    "dataset.max_chars": "gone: it is always 8000",
    "dataset.seed": SEED,
    "source.any_label": "gone: `columns: {label: [COLUMN, COLUMN]}` takes several columns, of which any decides",
    "source.where_not": "gone: write `where: {COLUMN: {not: VALUE}}`",
    "guard.tracking_uri": TRACKING,
    "guard.excluded_categories": "gone: leave the categories out of a `policy` file",
    "guard.dtype": AUTO,
    "guard.device": AUTO,
    "guard.batch_tokens": ENGINE,
    "guard.pack_tokens": ENGINE,
    "guard.categories": "gone: `guardloop check --categories` shows them, and a served guard always does",
    "guard.is_guard": "gone: `min_label_mass: 0` accepts a base that is not a guard yet",
    "responder.others": "gone: each model is an item of the list `responders`",
    "responder.opening": "it is called `prefill` now",
    "responder.seed": SEED,
    "responder.max_error_share": "it stands at the top level now",
    "responder.top_p": "gone: it is always 0.9",
    "responder.batch_rows": ENGINE,
    "responder.batch_size": ENGINE,
    "responder.batch_tokens": ENGINE,
    "responder.dtype": AUTO,
    "responder.device": AUTO,
    "responder.tokenizer": "gone: an endpoint counts a prompt's tokens itself",
    "responder.requests_per_minute": "gone: `concurrency` bounds the requests, and the endpoint's Retry-After is kept",
    "mining.words": "it is called `lexical_weight` now",
    "mining.fusion": "gone: responders and guard always vote, as in the measured recipe",
    "mining.answered_evidence": "gone: responders and guard always vote, as in the measured recipe",
    "mining.refused_evidence": "gone: responders and guard always vote, as in the measured recipe",
    "mining.hard_negatives_per_positive": "gone: it is always 2",
    "mining.seed": SEED,
    "training.alpha": "gone: it is always twice the `rank`",
    "training.dropout": FIXED,
    "training.targets": FIXED,
    "training.target_modules": FIXED,
    "training.schedule": FIXED,
    "training.warmup": FIXED,
    "training.order": FIXED,
    "training.weight_decay": FIXED,
    "training.clip": FIXED,
    "training.min_examples": "gone: `mining.min_positives` ends a run that found too little",
    "training.seed": SEED,
    "training.variant": "gone: adapters are plain LoRA",
    "training.category_weight": "gone: no stage writes categories into the training set",
    "training.micro_rows": ENGINE,
    "training.batch_rows": "it is called `batch_size` now",
    "training.pack_tokens": ENGINE,
    "training.validate_steps": "gone: the validation split is scored after each epoch",
    "training.eval_steps": "gone: the validation split is scored after each epoch",
    "training.patience": FIXED,
    "training.fpr_limit": FIXED,
    "training.checkpoints": "gone: they are kept below GUARDLOOP_WORK, else GUARDLOOP_CACHE",
    "training.checkpoint_steps": "gone: a checkpoint is kept every 50 steps",
    "evaluation.seed": SEED,
    "evaluation.confidence": "gone: intervals are of 95%",
    "evaluation.length_edges": FIXED,
    "evaluation.min_slice_rows": FIXED,
    "evaluation.calibration_bins": FIXED,
    "benchmark.licence": "gone: say it in a comment",
    "benchmark.gated": "gone: say it in a comment",
    "benchmark.about": "gone: say it in a comment",
    "gate.fpr_margin": "it is called `max_fpr_rise` now",
    "gate.slice_margin": "it is called `max_slice_loss` now",
    "gate.agent_margin": "it is called `max_response_loss` now",
    "gate.require_agent": "it is called `require_response_test` now",
    "gate.mcnemar_alpha": FIXED,
    "gate.min_label_mass": FIXED,
    "gate.max_unreadable": FIXED,
    "gate.collapsed_share": FIXED,
    "published.tolerance": "gone: it is always 0.05",
    "published.miss": "gone: a miss is always a warning",
    "registry.tracking_uri": TRACKING,
}
"""What became of settings of earlier versions, by section and name: sections are named by their classes."""

KINDS: dict[type, str] = {str: "text", list: "a list", dict: "a mapping"}
"""What was given, in words: the text itself may be a password, or long."""


class Section(BaseModel):
    """A group of settings. Unknown keys and infinite numbers are refused; values are frozen once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _holds_no_secret(self) -> Self:
        """Settings are stored in compiled pipelines, in MLflow and beside artifacts."""
        for name in type(self).model_fields:
            if any(map(holds_secret, _texts(getattr(self, name)))):
                raise ValueError(
                    f"{name} holds a password or a key; put it into the environment, and leave it out here"
                )
        return self

    def plain(self) -> dict[str, Any]:
        """The section as JSON-ready values: what travels as one pipeline parameter."""
        return self.model_dump(mode="json")


def read_section(model: type[S], values: object, where: str) -> S:
    """Validate `values` as a `model`. Raises GuardLoopError naming each wrong key or value, under `where`."""
    try:
        return model.model_validate({} if values is None else unescape(values))
    except ValidationError as error:
        raise GuardLoopError(
            "\n".join(_explain(model, problem, where) for problem in error.errors()),
            "`guardloop config fields` lists the settings; docs/configuration.md has those of platforms, too",
        ) from None


def read_list(model: type[S], values: object, where: str) -> list[S]:
    """Validate each item of the list `values` as a `model`. Raises GuardLoopError as `read_section` does."""
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise GuardLoopError(f"{where} must be a list that is not empty", "give `- ` before each item")
    return [read_section(model, value, f"{where}.{number}") for number, value in enumerate(values)]


def _explain(model: type[Section], problem: Any, where: str) -> str:
    place = ".".join([where, *(str(part) for part in problem["loc"])]).strip(".")
    if problem["type"] == "extra_forbidden":
        section, key = _section_at(model, problem["loc"][:-1]), str(problem["loc"][-1])
        if became := OLD.get(f"{_name_of(section)}.{key}"):
            return f"{place}: {became}"
        near = difflib.get_close_matches(key, valid := sorted(section.model_fields), n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"valid keys: {', '.join(valid)}"
        return f"{place}: unknown setting; {hint}"
    if problem["type"] == "value_error":  # our own rule says all; what was given may be a password
        return f"{place}: {problem['msg'].removeprefix('Value error, ')}"
    if problem["type"] == "missing":
        return f"{place}: {problem['msg']}"
    given = problem.get("input")
    shown = repr(given) if isinstance(given, int | float | None) else KINDS.get(type(given), type(given).__name__)
    return f"{place}: {problem['msg']} (got {shown})"


def _texts(value: object) -> Iterator[str]:
    """The texts in a setting's value; sections look after their own."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _section_at(model: type[BaseModel], path: tuple[Any, ...]) -> type[BaseModel]:
    """The (nested) model that `path` leads to."""
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
    return current


def _name_of(section: type[BaseModel]) -> str:
    return section.__name__.removesuffix("Settings").lower() or "job"
