"""Run an experiment: `make experiment`. Writes docs/results.md, its plot, and figures.json beside the steps.

Every step is kept by the hash of what it is made from, so an experiment that was stopped goes on where it was. All
traffic is answered once, whichever guard lets it pass: responses to a prompt depend on its own seeds alone.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer
from rich.console import Console

from bench.experiment.arms import arm_examples, ranking
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
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Guard:
    """A guard to start from, with what its first judge says of the responses."""

    baseline_seed: int
    settings: dict[str, Any]
    judged: Sequence[Path]
    """Tables of the judged responses to all traffic, whether it passed or not."""


@dataclass(frozen=True)
class Screened:
    """A guard at its threshold, with its verdicts on the traffic and on the test set."""

    guard: Guard
    traffic: Path
    test: Path


@dataclass(frozen=True)
class TrainingSet:
    """What an arm is trained on."""

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
            guards, answers = [self._guard(folder) for folder in folders[:count]], folders[count:]
            judged = iter(side_by_side.map(self.judged, product(guards, answers)))
            jobs = [
                Guard(seed, guard, [next(judged) for _ in answers])
                for seed, guard in zip(settings.baseline_seeds, guards, strict=True)
            ]
            before: list[Screened | None] = side_by_side.map(self.screened, jobs)
            cells = [Cell(DEFAULT, b.guard.baseline_seed, 0, _scores(b.test)) for b in before if b]
            cells += (made := self._round(side_by_side, settings.arms, before))
            recipe = next(arm for arm in settings.arms if arm.name == RECIPE)
            seed = (recipe.seeds or settings.seeds)[0]
            for number in range(2, settings.rounds + 1):  # the recipe's guard is the baseline, and the judge stays
                champions = {c.baseline_seed: c.folder for c in made if c.arm == recipe.name and c.seed == seed}
                jobs = [_champion(b.guard, champions) for b in before if b and champions]
                before = side_by_side.map(partial(_if_done, self.screened), jobs)
                recipe = recipe.model_copy(update={"name": f"{RECIPE}, round {number}", "seeds": [seed]})
                cells += (made := self._round(side_by_side, [recipe], before))
        return cells

    def _round(self, workers: Workers, arms: Sequence[Arm], before: Sequence[Screened | None]) -> list[Cell]:
        """The guards of the arms that are made whole: one from each baseline with each seed."""
        pairs = [(arm, screened) for arm, screened in product(arms, before) if screened]
        sets = workers.map(partial(_if_done, self.training_set), pairs)
        wanted = [(each, seed) for each in sets if each for seed in each.arm.seeds or self.settings.seeds]
        made = [c for c in workers.map(partial(_if_done, self.trained), wanted) if c]
        guards = Counter(c.arm for c in made)
        whole = {a.name for a in arms if guards[a.name] == len(before) * len(a.seeds or self.settings.seeds)}
        return [c for c in made if c.arm in whole]

    def baseline_guard(self, seed: int) -> Path:
        """The folder of the baseline that is made with `seed`."""
        baseline = self.settings.baseline

        def build(folder: Path) -> None:
            rows = _labelled(baseline)
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

    def judged(self, pair: tuple[dict[str, Any], Path]) -> Path:
        """The table of one shard's responses, judged by a baseline."""
        guard, answers = pair

        def build(folder: Path) -> None:
            stages.screen(answers / "responses.parquet", folder / "judged.parquet", guard, what="judge")

        return self.kept.make("judged", [answers.name, guard], build) / "judged.parquet"

    def screened(self, job: Guard) -> Screened:
        """The traffic and the test set under a guard, whose threshold lets `passed_share` of the traffic pass."""
        guard = job.settings
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
        return Screened(replace(job, settings=guard), made / "traffic.parquet", made / "test.parquet")

    def training_set(self, pair: tuple[Arm, Screened]) -> TrainingSet:
        """What an arm trains the guard on that screened the traffic."""
        arm, before = pair
        traffic = list(read_table(before.traffic))
        scores = {row["id"]: row["score"] for row in traffic if row["score"] is not None and not row["flagged"]}
        judged = [
            {**row, "prompt_score": scores[row["id"]]}
            for row in read_tables(before.guard.judged)
            if row["id"] in scores
        ]
        examples, mined = arm_examples(arm, traffic, judged, self.settings)
        key = [[dict(row) for row in examples], before.traffic.parent.name]
        folder = self.kept.make(
            f"{arm.name}-examples", key, lambda folder: stages.write_training_set(mined, folder, {}, examples)
        )
        figures = replace(mined, examples=[], blocked_inputs=[], shown=[], held_out=[])
        return TrainingSet(arm, before, folder, figures, ranking(examples, traffic, self.settings.subsets))

    def trained(self, pair: tuple[TrainingSet, int]) -> Cell:
        """The arm's guard with one seed, and the gate's verdict on it."""
        data, seed = pair
        arm, before, settings = data.arm, data.before, self.settings
        training = settings.training.model_validate({**settings.training.plain(), **arm.training})

        def build(folder: Path) -> None:
            examples = list(read_table(data.folder / stages.EXAMPLES, EXAMPLE))
            guard = settings.guard.model_validate(before.guard.settings)
            with Stage(f"{arm.name}, baseline {before.guard.baseline_seed}, seed {seed}") as stage:
                report = _reporter(stage)
                made = train(
                    *(examples, guard, training, folder / "adapter", lambda _, step: report(step)),
                    seed=seed,
                    checked=False,
                )
                stage.done(len(examples), f"{made.steps} steps")
            test = folder / "test.parquet"
            stages.screen(self.data() / "test.parquet", test, before.guard.settings, adapter=folder / "adapter")
            tables = (before.test, test, data.folder, folder / "adapter", folder / "gate")
            stages.evaluate(*tables, settings.evaluation.plain(), settings.gate.plain())

        key = [data.folder.name, before.guard.settings, training.plain(), seed]
        made = self.kept.make(f"{arm.name}-{seed}", key, build)
        evaluation = json.loads((made / "gate" / stages.EVALUATION).read_text("utf-8"))
        scores = _scores(made / "test.parquet")
        return Cell(arm.name, before.guard.baseline_seed, seed, scores, evaluation, made, data.mined, data.ranking)

    def _guard(self, base: Path) -> dict[str, Any]:
        return {**self.settings.guard.plain(), "base": str(base)}


def _reporter(stage: Stage) -> Callable[[Step], None]:
    """Reports the steps of a training to `stage`."""
    started = time.monotonic()
    return lambda step: stage.report("step", step.number, step.total, started)


def _champion(guard: Guard, champions: Mapping[int, Path | None]) -> Guard:
    """The guard with the adapter that the recipe made of it."""
    return replace(guard, settings={**guard.settings, "adapter": f"{champions[guard.baseline_seed]}/adapter"})


def _done(step: Callable[[], Made]) -> Made:
    return step()


def _if_done(step: Callable[[Item], Made], item: Item) -> Made | None:
    """What `step` makes of `item`; None where only what is finished is wanted, and this is not."""
    try:
        return step(item)
    except UnfinishedError:
        return None


def _labelled(baseline: BaselineGuard) -> list[Row]:
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
