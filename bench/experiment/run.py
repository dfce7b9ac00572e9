"""Run an experiment: `make experiment`. Writes docs/results.md, its plot, and figures.json beside the steps.

Every step is kept by the hash of what it is made from, so an experiment that was stopped goes on where it was.
"""

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from bench.experiment.arms import lessons
from bench.experiment.results import Cell, write_results
from bench.experiment.settings import Arm, DefaultGuard, ExperimentSettings, load_experiment
from guardloop import stages
from guardloop.data.sources import read_conversations
from guardloop.embedded import make_guard
from guardloop.errors import GuardLoopError
from guardloop.feedback.mine import Harvest
from guardloop.models import locate
from guardloop.records import CONVERSATION, SCREENED, Row, read_facts, read_table, write_jsonl, write_table
from guardloop.training.train import train

console = Console(highlight=False, soft_wrap=True)
RECIPE = "recipe"


class Kept:
    """Folders of finished steps, named by what they are made from."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def make(self, name: str, key: Any, build: Callable[[Path], None]) -> Path:
        """The folder of step `name`, built first unless one with this `key` (JSON values) is there."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:12]
        folder = self.root / f"{name}-{digest}"
        if not folder.is_dir():
            partial_folder = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial_folder, ignore_errors=True)
            partial_folder.mkdir(parents=True)
            build(partial_folder)
            partial_folder.rename(folder)
            gc.collect()
            torch.cuda.empty_cache()
        return folder


@dataclass(frozen=True)
class Screened:
    """A default guard, the traffic it screened, and the responses it judged."""

    guard: dict[str, Any]
    data: Path
    traffic: Path
    judged: Path
    test: Path


def run(settings: ExperimentSettings, root: Path) -> list[Cell]:
    """Every arm from every default guard with every seed. Returns what each scored on the test set."""
    kept, cells = Kept(root), list[Cell]()
    for seed in settings.default_seeds:
        guard = {**settings.guard.plain(), "base": str(_default_guard(kept, settings.default, seed))}
        before = _screened(kept, settings, guard)
        cells.append(Cell("default", seed, 0, _margins(before.test)))
        for arm in settings.arms:
            cells += _arm(kept, settings, arm, before, seed)
        if settings.rounds > 1:
            cells += _rounds(kept, settings, before, seed)
    return cells


def _arm(
    kept: Kept, settings: ExperimentSettings, arm: Arm, before: Screened, default_seed: int, name: str = ""
) -> Iterator[Cell]:
    """The arm's guard from each seed, and the gate's verdict on it."""
    examples, harvest = lessons(arm, list(read_table(before.traffic)), list(read_table(before.judged)), settings)
    key = [[dict(row) for row in examples], before.traffic.parent.name]
    lessons_at = kept.make(f"{arm.name}-lessons", key, partial(_write_lessons, examples, harvest))
    training = settings.training.model_validate({**settings.training.plain(), **arm.training})
    for seed in settings.seeds:
        ours = training.model_copy(update={"seed": seed, "checkpoint_steps": 0})

        def build(folder: Path, ours: Any = ours) -> None:
            console.print(f"  {arm.name}, seed {ours.seed}: {len(examples)} examples")
            guard = settings.guard.model_validate(before.guard)
            train(examples, guard, ours, folder / "adapter", checked=False)
            stages.screen(
                before.data / "test.parquet", folder / "test.parquet", before.guard, adapter=folder / "adapter"
            )
            tables = (before.test, folder / "test.parquet", lessons_at, folder / "adapter", folder / "gate")
            stages.evaluate(*tables, settings.evaluation.plain(), settings.gate.plain())

        made = kept.make(f"{arm.name}-{seed}", [lessons_at.name, ours.plain()], build)
        verdict = json.loads((made / "gate" / stages.EVALUATION).read_text("utf-8"))["decision"]
        yield Cell(name or arm.name, default_seed, seed, _margins(made / "test.parquet"), verdict, made, harvest)


def _rounds(kept: Kept, settings: ExperimentSettings, before: Screened, default_seed: int) -> Iterator[Cell]:
    """Further rounds: the recipe's guard of the round before screens the traffic; the judge stays the first default."""
    (arm,) = (arm for arm in settings.arms if arm.name == RECIPE)
    for number in range(2, settings.rounds + 1):
        (last,) = _arm(kept, settings.model_copy(update={"seeds": settings.seeds[:1]}), arm, before, default_seed)
        assert last.folder
        guard = {**before.guard, "adapter": str(last.folder / "adapter")}
        before = _screened(kept, settings, guard, judge=before.guard)
        yield from _arm(kept, settings, arm, before, default_seed, name=f"{RECIPE}, round {number}")


def _default_guard(kept: Kept, default: DefaultGuard, seed: int) -> Path:
    training = default.training.model_copy(update={"seed": seed})
    seeded = default.model_copy(update={"training": training})

    def build(folder: Path) -> None:
        console.print(f"making the default guard, seed {seed}")
        make_guard(locate(default.base), default.family, _taught(default), training, folder)

    return kept.make(f"default-{seed}", seeded.plain(), build)


def _taught(default: DefaultGuard) -> list[Row]:
    rows = [row for row in read_conversations(default.responses) if row["response"] and row["unsafe"] is not None]
    prompts = {row["prompt"]: row for row in read_conversations(default.prompts) if row["unsafe"]}
    rows += [{**row, "response": None, "id": f"{row['id']}/prompt"} for row in prompts.values()]
    return rows + [{**row, "unsafe": False} for row in read_conversations(default.ordinary)]


def _screened(
    kept: Kept, settings: ExperimentSettings, guard: dict[str, Any], judge: dict[str, Any] | None = None
) -> Screened:
    """Screen the traffic, generate and judge responses, and score the test set."""
    data = kept.make("data", [settings.dataset.plain(), settings.default.ordinary.plain()], partial(_data, settings))
    key = [data.name, guard, judge, settings.passed_share]

    def screen(folder: Path) -> None:
        stages.screen(data / "traffic.parquet", folder / "scored.parquet", guard)
        rows = list(read_table(folder / "scored.parquet"))
        margins = [row["margin"] for row in rows if row["margin"] is not None]
        threshold = float(np.quantile(margins, settings.passed_share))
        facts = {**read_facts(folder / "scored.parquet"), "threshold": threshold}
        again = ({**row, "flagged": row["margin"] is not None and row["margin"] > threshold} for row in rows)
        write_table(again, SCREENED, folder / "traffic.parquet", lambda: facts)
        stages.screen(data / "test.parquet", folder / "test.parquet", {**guard, "threshold": threshold})

    traffic = kept.make("screened", key, screen)
    threshold = float(read_facts(traffic / "traffic.parquet")["threshold"])

    def respond(folder: Path) -> None:
        stages.generate_responses(traffic / "traffic.parquet", folder / "responses.parquet", settings.responder.plain())
        stages.screen(folder / "responses.parquet", folder / "judged.parquet", judge or guard)

    responses = kept.make("judged", [traffic.name, settings.responder.plain()], respond)
    return Screened(
        {**guard, "threshold": threshold},
        data,
        traffic / "traffic.parquet",
        responses / "judged.parquet",
        traffic / "test.parquet",
    )


def _data(settings: ExperimentSettings, folder: Path) -> None:
    """The traffic without the prompts that made the default guard, and the test set."""
    known = {row["prompt"] for row in read_conversations(settings.default.ordinary)}
    traffic = [row for row in read_conversations(settings.dataset.traffic) if row["prompt"] not in known]
    columns = [name for name in CONVERSATION.names if name != "group"]
    write_jsonl(({name: row.get(name) for name in columns} for row in traffic), folder / "traffic.jsonl")
    source = {"kind": "file", "path": str(folder / "traffic.jsonl"), "columns": {"label": "unsafe"}}
    dataset = settings.dataset.plain() | {"traffic": source}
    stages.prepare_data(dataset, folder / "traffic.parquet", folder / "test.parquet")


def _write_lessons(examples: list[Row], harvest: Harvest, folder: Path) -> None:
    stages.write_harvest(harvest, folder, {}, examples)


def _margins(table: Path) -> list[Row]:
    return [row for row in read_table(table) if row["margin"] is not None and row["unsafe"] is not None]


def main(
    config: Annotated[Path, typer.Argument(help="The experiment.")] = Path("configs/experiments/smollm2.yaml"),
    data: Annotated[Path, typer.Option(help="Folder of its files.", envvar="GUARDLOOP_DATA")] = Path(),
    folder: Annotated[Path, typer.Option(help="Where finished steps are kept.")] = Path(".guardloop/experiments"),
    results: Annotated[Path, typer.Option(help="The page that is written.")] = Path("docs/results.md"),
) -> None:
    """Compare the recipe with every control."""
    try:
        settings = load_experiment(config, data)
        cells = run(settings, folder / config.stem)
        write_results(settings, cells, results, folder / config.stem)
    except GuardLoopError as error:
        console.print(f"[red]error:[/] {error}")
        raise SystemExit(2) from None
    console.print(f"{results} is written")


if __name__ == "__main__":
    typer.run(main)
