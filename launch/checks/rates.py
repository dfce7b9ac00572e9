"""How fast stages are, and how much they write: as an earlier run on this machine took, or as benchmarks measured."""

import json
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from google.protobuf import json_format

from guardloop.config import Settings, load_settings
from guardloop.core.errors import GuardLoopError
from guardloop.core.places import home
from guardloop.core.records import read_metadata
from launch.local.runs import Run, find_run
from launch.pipelines import pipelines, stage_titles

TABLE = Path(__file__).parent / "rates.yaml"
GUARDS = 2  # that score each row of a benchmark


@dataclass(frozen=True)
class Rate:
    """A measured speed: how many of `unit` a second a stage does with a model, and the section that says so."""

    stage: Literal["screen", "generate_responses", "train_guard"]
    model: str
    device: Literal["cpu", "gpu"]
    per_second: float
    unit: Literal["texts", "tokens", "examples"]
    section: str
    quantization: str = "none"


@dataclass(frozen=True)
class Took:
    """What a stage of a run did: all its shards together."""

    items: int
    seconds: float
    bytes: int | None = None


@dataclass(frozen=True)
class Past:
    """A finished run: what each stage took, and the shares by which one stage's work follows from another's."""

    run: str
    settings: Settings
    stages: dict[str, Took]
    mining: dict[str, Any] = field(default_factory=dict)
    tokens: int | None = None
    """Tokens of all responses."""

    @property
    def passed_share(self) -> float | None:
        """Share of the screened prompts that the guard let pass."""
        screened = self.mining.get("screened")
        return self.mining["passed"] / screened if screened else None

    @property
    def tokens_per_response(self) -> float | None:
        """Mean length of a response."""
        responses = self.mining.get("responses")
        return self.tokens / responses if responses and self.tokens is not None else None


def recorded_rates() -> list[Rate]:
    """The rates that docs/benchmarks.md reports."""
    return [Rate(**row) for row in yaml.safe_load(TABLE.read_text("utf-8"))]


def read_past(name: str) -> Past:
    """A run of this machine by its id, or `latest`. Raises GuardLoopError if there is none, or it did not end."""
    run = find_run(name)
    try:
        summary = json.loads((run.folder / "summary.json").read_text("utf-8"))
        settings = load_settings(run.folder / "settings.yaml")
    except (OSError, ValueError) as error:
        raise GuardLoopError(f"the run {run.id} has no summary: it did not end", "name a run that ended") from error
    written = _written(run)
    shards: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for stage in summary["stages"]:
        shards[re.sub(r" \[\d+\]$", "", stage["stage"])].append(stage)
    stages = {
        name: Took(sum(part["items"] for part in parts), sum(part["seconds"] for part in parts), written.get(name))
        for name, parts in shards.items()
    }
    if took := stages.get("score_benchmarks"):  # which counts a row once
        stages["score_benchmarks"] = replace(took, items=took.items * GUARDS)
    return Past(run.id, settings, stages, summary.get("mining") or {}, _response_tokens(run))


def find_alike(settings: Settings, but: str = "") -> Past | None:
    """The newest finished run with the same guard, responders and training method, or None. `but`: not this one.

    A run that went through to its evaluation is preferred to one that ended early.
    """
    newest: Past | None = None
    for folder in sorted((home() / "runs").glob("*"), reverse=True):
        if folder.is_symlink() or folder.name == but or not (folder / "summary.json").is_file():
            continue
        try:
            past = read_past(folder.name)
        except GuardLoopError:  # of an older version, with other settings
            continue
        if _kind(past.settings) == _kind(settings) and "generate_responses" in past.stages:
            newest = newest or past
            if "evaluate" in past.stages:
                return past
    return newest


def _kind(settings: Settings) -> tuple[Any, ...]:
    """What decides how fast stages are; the amount of data does not."""
    guard, training = settings.guard, settings.training
    responders = tuple((one.kind, one.model, one.max_new_tokens) for one in settings.responders)
    return (guard.base, guard.quantization, responders, training.rank, training.top_layers)


def _written(run: Run) -> dict[str, int]:
    """Bytes that each stage of a run wrote."""
    titles = stage_titles(json_format.MessageToDict(pipelines()["full"].pipeline_spec))
    written: dict[str, int] = defaultdict(int)
    for folder in (run.folder / "artifacts").glob("*/**"):
        if folder.name in titles and (folder / "executor_output.json").is_file():
            written[titles[folder.name]] += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return dict(written)


def _response_tokens(run: Run) -> int | None:
    tables = list((run.folder / "artifacts").glob("**/generate-responses/responses"))
    return sum(int(read_metadata(table).get("tokens", 0)) for table in tables) if tables else None
