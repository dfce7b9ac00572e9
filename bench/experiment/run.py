"""Run an experiment: `make experiment`. Writes docs/results.md, its plot, and figures.json beside the steps.

Every step is kept by the hash of what it is made from, so an experiment that was stopped goes on where it was. All
traffic is answered once, whichever guard lets it pass: responses to a prompt depend on its own seeds alone.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer
from rich.console import Console

from bench.experiment.arms import lessons, ranking
from bench.experiment.results import DEFAULT, RECIPE, Cell, write_results
from bench.experiment.settings import Arm, BaselineGuard, ExperimentSettings, load_experiment
from bench.experiment.steps import Kept, UnfinishedError, Workers
from guardloop import stages
from guardloop.core.errors import GuardLoopError
from guardloop.core.progress import Stage
from guardloop.core.records import (
    CONVERSATION,
    EXAMPLE,
    SCREENED,
    Row,
    read_metadata,
    read_table,
    read_tables,
    write_jsonl,
    write_table,
)
from guardloop.data.sources import read_conversations
from guardloop.mining.mine import MiningResult
from guardloop.models.locate import locate
from guardloop.training.supervised import make_guard
from guardloop.training.train import train
from guardloop.training.watch import Step

console = Console(highlight=False, soft_wrap=True)
Item, Made = TypeVar("Item"), TypeVar("Made")


@dataclass(frozen=True)
class Screened:
    """A guard at its threshold, what it said of the traffic and of the test set, and the judged responses."""

    baseline_seed: int
    guard: dict[str, Any]
    traffic: Path
    test: Path
    judged: Sequence[Path]
    """Of all traffic, whether it passed or not."""


@dataclass(frozen=True)
class Lessons:
    """What an arm teaches."""

    arm: Arm
    before: Screened
    folder: Path
    mined: MiningResult
    """Without its tables."""
    ranking: dict[str, tuple[float, float]]


class Experiment:
    """The steps of one experiment, from its settings; each can be done by a worker."""

    def __init__(self, settings: ExperimentSettings, root: Path, *, only_finished: bool = False) -> None:
        self.settings = settings
        self.kept = Kept(root, only_finished=only_finished)

    def run(self, workers: int = 1) -> list[Cell]:
        """Every arm from every baseline with every seed. Returns what each scored on the test set.

        If only what is finished is wanted, these are the arms of which all guards are there; raises UnfinishedError
        where not even the baselines have screened their data.
        """
        settings = self.settings
        with Workers(workers) as side_by_side:
            self.data()
            steps = [partial(self.baseline_guard, seed) for seed in settings.baseline_seeds]
            steps += [partial(self.answered, shard) for shard in range(settings.shards)]
            folders, count = side_by_side.map(_done, steps), len(settings.baseline_seeds)
            guards, answers = folders[:count], folders[count:]
            judged = side_by_side.map(self.judged, product(guards, answers))
            told = [
                (seed, self._guard(base), judged[n * settings.shards : (n + 1) * settings.shards])
                for n, (seed, base) in enumerate(zip(settings.baseline_seeds, guards, strict=True))
            ]
            before = side_by_side.map(self.screened, told)
            cells = [Cell(DEFAULT, b.baseline_seed, 0, _scores(b.test)) for b in before]
            arms, recipe = settings.arms, RECIPE
            for number in range(1, settings.rounds + 1):
                made = self._round(side_by_side, arms, before)
                cells += made
                if number < settings.rounds:  # the recipe's guard becomes the baseline, and the judge stays
                    (again,) = (arm for arm in arms if arm.name == recipe)
                    first = (again.seeds or settings.seeds)[0]
                    champions = {c.baseline_seed: c.folder for c in made if c.arm == recipe and c.seed == first}
                    if not champions:
                        break
                    told = [
                        (b.baseline_seed, {**b.guard, "adapter": f"{champions[b.baseline_seed]}/adapter"}, b.judged)
                        for b in before
                        if b
                    ]
                    before = side_by_side.map(partial(_if_done, self.screened), told)
                    recipe = f"{RECIPE}, round {number + 1}"
                    arms = [again.model_copy(update={"name": recipe, "seeds": [first]})]
        return cells

    def _round(self, workers: Workers, arms: Sequence[Arm], before: Sequence[Screened | None]) -> list[Cell]:
        """The guards of the arms that are made whole: one from each baseline with each seed."""
        taught = workers.map(partial(_if_done, self.lessons), [pair for pair in product(arms, before) if pair[1]])
        asked = [(t, seed) for t in taught if t for seed in t.arm.seeds or self.settings.seeds]
        made = [c for c in workers.map(partial(_if_done, self.trained), asked) if c]
        guards = Counter(c.arm for c in made)
        whole = {a.name for a in arms if guards[a.name] == len(before) * len(a.seeds or self.settings.seeds)}
        return [c for c in made if c.arm in whole]

    def baseline_guard(self, seed: int) -> Path:
        """The folder of the baseline that is made with `seed`."""
        baseline = self.settings.baseline

        def build(folder: Path) -> None:
            rows = _taught(baseline)
            with Stage(f"baseline {seed}") as stage:
                make_guard(
                    *(locate(baseline.base), baseline.family, rows, baseline.training, folder),
                    seed=seed,
                    max_text_tokens=baseline.max_text_tokens,
                    on_step=_reporter(stage),
                )
                stage.done(len(rows), "made")

        return self.kept.make(f"default-{seed}", [baseline.plain(), seed], build)

    def data(self) -> Path:
        """The traffic without the ordinary prompts that made the baseline, and the test set."""
        settings = self.settings

        def build(folder: Path) -> None:
            known = {row["prompt"] for row in read_conversations(settings.baseline.ordinary)}
            traffic = [row for row in read_conversations(settings.dataset.traffic) if row["prompt"] not in known]
            columns = [name for name in CONVERSATION.names if name != "group"]
            write_jsonl(({name: row.get(name) for name in columns} for row in traffic), folder / "traffic.jsonl")
            source = {"kind": "file", "path": str(folder / "traffic.jsonl"), "columns": {"label": "unsafe"}}
            dataset = settings.dataset.plain() | {"traffic": source}
            stages.prepare_data(dataset, folder / "traffic.parquet", folder / "test.parquet")

        return self.kept.make("data", [settings.dataset.plain(), settings.baseline.ordinary.plain()], build)

    def answered(self, shard: int) -> Path:
        """Responses to one shard of all traffic."""
        data, shards = self.data(), self.settings.shards
        responders = [one.plain() for one in self.settings.responders]

        def build(folder: Path) -> None:
            everyone = list(read_table(data / "traffic.parquet"))[shard::shards]
            let_through = {"score": 0.0, "flagged": False, "truncated": False}
            write_table(({**row, **let_through} for row in everyone), SCREENED, folder / "traffic.parquet")
            tables = folder / "traffic.parquet", folder / "responses.parquet"
            stages.generate_responses(*tables, responders, max_error_share=self.settings.max_error_share)

        return self.kept.make(f"responses-{shard}-of-{shards}", [data.name, responders], build)

    def judged(self, pair: tuple[Path, Path]) -> Path:
        """The table of one shard's responses, judged by a baseline."""
        base, answers = pair
        guard = self._guard(base)

        def build(folder: Path) -> None:
            stages.screen(answers / "responses.parquet", folder / "judged.parquet", guard, what="judge")

        return self.kept.make("judged", [answers.name, guard], build) / "judged.parquet"

    def screened(self, told: tuple[int, dict[str, Any], Sequence[Path]]) -> Screened:
        """The traffic and the test set under a guard, whose threshold lets `passed_share` of the traffic pass."""
        baseline_seed, guard, judged = told
        data, share = self.data(), self.settings.passed_share

        def build(folder: Path) -> None:
            stages.screen(data / "traffic.parquet", folder / "scored.parquet", guard)
            rows = list(read_table(folder / "scored.parquet"))
            threshold = float(np.quantile([row["score"] for row in rows if row["score"] is not None], share))
            metadata = {**read_metadata(folder / "scored.parquet"), "threshold": threshold}
            again = ({**row, "flagged": row["score"] is not None and row["score"] > threshold} for row in rows)
            write_table(again, SCREENED, folder / "traffic.parquet", lambda: metadata)
            stages.screen(data / "test.parquet", folder / "test.parquet", {**guard, "threshold": threshold})

        made = self.kept.make("screened", [data.name, guard, share], build)
        guard = {**guard, "threshold": float(read_metadata(made / "traffic.parquet")["threshold"])}
        return Screened(baseline_seed, guard, made / "traffic.parquet", made / "test.parquet", judged)

    def lessons(self, pair: tuple[Arm, Screened]) -> Lessons:
        """What an arm teaches the guard that screened the traffic."""
        arm, before = pair
        traffic = list(read_table(before.traffic))
        scores = {row["id"]: row["score"] for row in traffic if row["score"] is not None and not row["flagged"]}
        judged = [
            {**row, "prompt_score": scores[row["id"]]} for row in read_tables(before.judged) if row["id"] in scores
        ]
        examples, mined = lessons(arm, traffic, judged, self.settings)
        key = [[dict(row) for row in examples], before.traffic.parent.name]
        folder = self.kept.make(
            f"{arm.name}-lessons", key, lambda folder: stages.write_training_set(mined, folder, {}, examples)
        )
        told = replace(mined, examples=[], blocked_inputs=[], shown=[], held_out=[])
        return Lessons(arm, before, folder, told, ranking(examples, traffic, self.settings.subsets))

    def trained(self, pair: tuple[Lessons, int]) -> Cell:
        """The arm's guard with one seed, and the gate's verdict on it."""
        taught, seed = pair
        arm, before, settings = taught.arm, taught.before, self.settings
        training = settings.training.model_validate({**settings.training.plain(), **arm.training})

        def build(folder: Path) -> None:
            examples = list(read_table(taught.folder / stages.EXAMPLES, EXAMPLE))
            guard = settings.guard.model_validate(before.guard)
            with Stage(f"{arm.name}, baseline {before.baseline_seed}, seed {seed}") as stage:
                report = _reporter(stage)
                made = train(
                    *(examples, guard, training, folder / "adapter", lambda _, step: report(step)),
                    seed=seed,
                    checked=False,
                )
                stage.done(len(examples), f"{made.steps} steps")
            test = folder / "test.parquet"
            stages.screen(self.data() / "test.parquet", test, before.guard, adapter=folder / "adapter")
            tables = (before.test, test, taught.folder, folder / "adapter", folder / "gate")
            stages.evaluate(*tables, settings.evaluation.plain(), settings.gate.plain())

        made = self.kept.make(f"{arm.name}-{seed}", [taught.folder.name, before.guard, training.plain(), seed], build)
        evaluation = json.loads((made / "gate" / stages.EVALUATION).read_text("utf-8"))
        scores = _scores(made / "test.parquet")
        return Cell(arm.name, before.baseline_seed, seed, scores, evaluation, made, taught.mined, taught.ranking)

    def _guard(self, base: Path) -> dict[str, Any]:
        return {**self.settings.guard.plain(), "base": str(base)}


def _reporter(stage: Stage) -> Callable[[Step], None]:
    """Reports the steps of a training to `stage`."""
    started = time.monotonic()
    return lambda step: stage.report("step", step.number, step.total, started)


def _done(step: Callable[[], Made]) -> Made:
    return step()


def _if_done(step: Callable[[Item], Made], item: Item) -> Made | None:
    """What `step` makes of `item`; None where only what is finished is wanted, and this is not."""
    try:
        return step(item)
    except UnfinishedError:
        return None


def _taught(baseline: BaselineGuard) -> list[Row]:
    rows = [row for row in read_conversations(baseline.responses) if row["response"] and row["unsafe"] is not None]
    prompts = {row["prompt"]: row for row in read_conversations(baseline.prompts) if row["unsafe"]}
    rows += [{**row, "response": None, "id": f"{row['id']}/prompt"} for row in prompts.values()]
    return rows + [{**row, "unsafe": False} for row in read_conversations(baseline.ordinary)]


def _scores(table: Path) -> list[Row]:
    return [row for row in read_table(table) if row["score"] is not None and row["unsafe"] is not None]


def main(
    config: Annotated[Path, typer.Argument(help="The experiment.")] = Path("configs/experiments/smollm2.yaml"),
    data: Annotated[Path, typer.Option(help="Folder of its files.", envvar="GUARDLOOP_DATA")] = Path(),
    folder: Annotated[Path, typer.Option(help="Where finished steps are kept.")] = Path(".guardloop/experiments"),
    results: Annotated[Path, typer.Option(help="The page that is written.")] = Path("docs/results.md"),
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the GPUs and cores.")] = 1,
    finished: Annotated[bool, typer.Option("--finished", help="Do nothing new: write the arms that are done.")] = False,
) -> None:
    """Compare the recipe with every control."""
    try:
        settings = load_experiment(config, data)
        cells = Experiment(settings, folder / config.stem, only_finished=finished).run(workers)
        write_results(settings, cells, results, folder / config.stem)
    except GuardLoopError as error:
        console.print(f"[red]error:[/] {error}")
        raise SystemExit(2) from None
    console.print(f"{results} is written")


if __name__ == "__main__":
    typer.run(main)
