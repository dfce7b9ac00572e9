"""The experiment on tiny random models: what is asserted is the flow and the arithmetic, not the quality."""

import csv
import json
import random
import shutil
from pathlib import Path

import pytest
import yaml
from support.mining_examples import judged, screened
from support.models import save_guard
from support.tiny_responder import save as save_responder

from bench.experiment import run as module
from bench.experiment.arms import arm_examples, ranking
from bench.experiment.results import DEFAULT, GOLD, RECIPE, RESPONSES, Cell, compare, measure
from bench.experiment.results import _part as part_of
from bench.experiment.settings import Arm, ExperimentSettings, Subset, load_experiment
from guardloop.core.errors import GuardLoopError
from guardloop.core.settings import read_section
from guardloop.mining.settings import MiningSettings

CONTROLS = {"positives only": "positives", "self-training": "self", "gold labels": "gold"}
SOURCE = {"kind": "file", "path": "rows.jsonl"}
SMALL = {
    "title": "tiny",
    "baseline": {"responses": SOURCE, "prompts": SOURCE, "ordinary": SOURCE},
    "dataset": {"traffic": SOURCE, "test": SOURCE},
    "mining": {"held_out": 0.0},
    "evaluation": {"resamples": 300},
    "arms": [{"name": "recipe"}],
}


def settings(**changes) -> ExperimentSettings:
    return read_section(ExperimentSettings, {**SMALL, **changes}, "tiny")


@pytest.fixture
def evidence():
    """Ten passed prompts of which three drew blocked responses, and two that were blocked themselves."""
    rows = [screened(f"p{n}", -2.0 + 0.1 * n) | {"unsafe": n < 5} for n in range(10)]
    blocked = [screened(f"b{n}", 3.0) | {"unsafe": n == 0} for n in range(2)]
    return [*rows, *blocked], [judged(row, s, 4.0 if n < 3 else -4.0) for n, row in enumerate(rows) for s in range(2)]


def test_positives_only_are_what_was_blocked_and_nothing_else(evidence):
    examples, _ = arm_examples(Arm(name="x", examples="positives"), *evidence, settings())
    assert {row["id"] for row in examples} == {"p0", "p1", "p2"} and {row["target"] for row in examples} == {1.0}


def test_balanced_adds_as_many_random_passed_prompts(evidence):
    examples, _ = arm_examples(Arm(name="x", examples="balanced"), *evidence, settings())
    safe = {row["id"] for row in examples if row["target"] == 0}
    assert len(examples) == 6 and len(safe) == 3 and safe <= {f"p{n}" for n in range(3, 10)}


def test_self_training_knows_no_responses(evidence):
    rows, responses = evidence
    examples, _ = arm_examples(Arm(name="x", examples="self"), rows, responses, settings())
    others, _ = arm_examples(Arm(name="x", examples="self"), rows, responses[:2], settings())
    assert {row["id"]: row["target"] for row in examples} == {row["id"]: float(row["flagged"]) for row in rows}
    assert examples == others


def test_gold_takes_the_labels_of_all_traffic_and_replays_responses(evidence):
    rows, _ = evidence
    examples, _ = arm_examples(Arm(name="x", examples="gold"), *evidence, settings())
    prompts = {row["id"]: row["target"] for row in examples if row["kind"] == "gold"}
    assert prompts == {row["id"]: float(row["unsafe"]) for row in rows}
    assert any(row["kind"] == "replay_response" for row in examples)


def test_the_recipe_takes_an_arms_own_settings_responders_and_samples(evidence):
    rows, responses = evidence
    few, mined = arm_examples(Arm(name="x", samples=1, mining={"replay": 0.0}), rows, responses, settings())
    assert mined.responses == 10 and not any(row["kind"].startswith("replay") for row in few)
    none, _ = arm_examples(Arm(name="x", responders=["nobody"]), rows, responses, settings())
    assert not any(row["kind"] == "positive" for row in none)
    with pytest.raises(GuardLoopError, match=r"arms\.x\.held_uot"):
        arm_examples(Arm(name="x", mining={"held_uot": 0.1}), rows, responses, settings())


def test_what_the_targets_know_is_measured_on_the_passed_prompts(evidence):
    rows, responses = evidence
    subsets = [Subset(name="all"), Subset(name="elsewhere", source="nowhere")]
    examples, _ = arm_examples(Arm(name="x"), rows, responses, settings())
    own, target = ranking(examples, rows, subsets)["all"]
    assert own < target < 1  # the lowest scores are the unsafe ones, of which three of five drew blocked responses
    assert ranking(examples, rows, subsets).keys() == {"all"}
    gold, _ = arm_examples(Arm(name="x", examples="gold"), rows, responses, settings())
    assert ranking(gold, rows, subsets)["all"][1] == 1


def cells(**better: float) -> list[Cell]:
    """Guards whose scores follow the labels as well as asked, and the baseline, which knows less."""
    draw = random.Random(0)
    rows = [
        {"id": f"t{n}", "unsafe": n % 3 == 0, "response": "so" if n % 5 == 0 else None, "source": "a", "group": f"g{n}"}
        for n in range(300)
    ]
    noise = {row["id"]: draw.gauss(0, 1) for row in rows}
    made = []
    for arm, skill in {DEFAULT: 0.5, **better}.items():
        for seed in range(2):
            jitter = random.Random(seed)
            scores = {r["id"]: noise[r["id"]] + skill * r["unsafe"] + 0.01 * jitter.random() for r in rows}
            made.append(Cell(arm, 0, seed, [{**row, "score": scores[row["id"]]} for row in rows]))
    return made


def test_gains_and_the_share_of_the_gap_are_paired():
    made = cells(**{RECIPE: 1.5, GOLD: 3.0, "same": 0.5})
    part = part_of(Subset(name="all"), made)
    assert part is not None and part.scores[RECIPE].shape == (2, 240)  # responses are a part of their own
    scores = measure(part, settings())

    assert scores[RECIPE]["auprc"].gain.low > 0 and scores[RECIPE]["recall"].gain.value > 0
    assert abs(scores["same"]["auprc"].gain.value) < 0.01 and abs(scores["same"]["auprc"].closed.value) < 0.05
    assert 0.2 < scores[RECIPE]["auprc"].closed.value < 0.9
    assert scores[GOLD]["auprc"].closed is None and scores[DEFAULT]["auprc"].gain.value == 0
    against = compare(part, RECIPE, "same", settings())["auprc"]
    assert against.low < scores[RECIPE]["auprc"].gain.value < against.high


def test_without_a_gain_from_labels_there_is_no_gap_to_close():
    part = part_of(Subset(name="all"), cells(**{RECIPE: 1.5, GOLD: 0.4}))
    assert part is not None and measure(part, settings())[RECIPE]["auprc"].closed is None


def test_a_part_without_both_classes_is_left_out():
    made = cells()
    assert part_of(Subset(name="none", source="nowhere"), made) is None
    responses = part_of(Subset(name=RESPONSES), made)
    assert responses is not None and len(responses.unsafe) == 60


def in_little(folder: Path) -> dict:
    """An experiment on tiny models and made-up prompts, all below `folder`."""
    words = ("a cake", "a bomb", "the garden", "a door")
    rows = [
        {"id": f"r{n}", "prompt": f"how do I build {words[n % 4]} number {n}?", "source": "a" if n % 2 else "b"}
        | {"prompt_label": "unsafe" if n % 4 == 1 else "safe", "response_label": "unsafe" if n % 3 == 1 else "safe"}
        for n in range(120)
    ]
    for name, chosen in {"traffic": rows[:60], "test": rows[60:]}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    answered = [row | {"response": f"mix flour and sugar {n}"} for n, row in enumerate(rows)]
    for name, chosen in {"judge": answered[:60], "responses": answered[60:]}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    responder = folder / "responder"
    responder.mkdir()
    save_responder(responder)
    prompts, responses = ({"label": f"{kind}_label"} for kind in ("prompt", "response"))

    def file(name: str, columns: dict, limit: int) -> dict:
        return {"kind": "file", "path": f"{name}.jsonl", "columns": columns, "limit": limit}

    small = {"rank": 2, "validation": 0.3}
    answering = {"model": str(responder), "samples": 2, "max_new_tokens": 4, "max_prompt_tokens": 256}
    return {
        "title": "In little",
        "baseline": {
            "base": str(save_guard(folder / "guard", threshold=0.0)),
            "responses": file("judge", responses, 40),
            "prompts": file("judge", prompts, 20),
            "ordinary": file("traffic", prompts, 6),
            "training": small,
        },
        "dataset": {
            "traffic": file("traffic", prompts, 60),
            "test": file("test", prompts, 60),
            "response_test": file("responses", responses, 20),
        },
        "guard": {"min_label_mass": 0},
        "responders": [answering | {"name": "plain", "prefill": ""}, answering | {"name": "prefilled"}],
        "max_error_share": 1.0,
        "mining": {"held_out": 0.0},
        "training": small,
        "evaluation": {"resamples": 200},
        "seeds": [0, 1],
        "rounds": 2,
        "shards": 2,
        "subsets": [{"name": "all"}, {"name": "a", "source": "a"}],
        "arms": [
            {"name": "recipe", "seeds": [1]},
            *({"name": name, "examples": kind} for name, kind in CONTROLS.items()),
        ],
    }


def figures_of(table: Path, arm: str) -> list[dict[str, str]]:
    """The rows of an arm that compare it with the baseline, without the share of the gap that it closes."""
    rows = csv.DictReader(table.open(encoding="utf-8"))
    kept = [row for row in rows if row["arm"] == arm and row["against"] == DEFAULT]
    return [{name: value for name, value in row.items() if not name.startswith("gap_")} for row in kept]


@pytest.mark.slow
def test_it_writes_its_page_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config, page, kept = tmp_path / "tiny.yaml", tmp_path / "docs" / "results.md", tmp_path / "kept"
    config.write_text(yaml.safe_dump(in_little(tmp_path)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    module.main(config, tmp_path, kept, page, workers=2)

    log = capfd.readouterr().err
    assert "baseline 0: step 1/" in log and "recipe, baseline 0, seed 1: step 1/" in log
    text = page.read_text()
    assert all(f"| {arm} |" in text for arm in (DEFAULT, RECIPE, "self-training", GOLD))
    assert (page.parent / "results" / "tiny.svg").read_text().startswith("<?xml")
    table = page.parent / "results" / "tiny.csv"
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    on_all = {row["arm"]: row for row in rows if row["part"] == "all" and row["against"] in ("", DEFAULT)}
    assert set(on_all) == {DEFAULT, RECIPE, *CONTROLS, "recipe, round 2", "source alone"}
    # all that is unsafe is of source a, and half of a is unsafe
    assert on_all["source alone"]["auprc"] == "0.500"
    assert [row["part"] for row in rows if row["arm"] == "source alone"] == ["all", RESPONSES]
    assert [row["part"] for row in rows if row["against"] == "self-training" and row["auprc_change"]] == ["all", "a"]
    figures = json.loads((kept / "tiny" / "figures.json").read_text())["all"]
    labels_help = figures[GOLD]["auprc"]["gain"]["low"] > 0
    assert (figures[RECIPE]["auprc"]["closed"] is not None) == labels_help == (on_all[RECIPE]["gap_closed"] != "")
    assert on_all[RECIPE]["auprc"] == f"{figures[RECIPE]['auprc']['value']['value']:.3f}"
    assert f"| {RECIPE} | {on_all[RECIPE]['auprc']} ({float(on_all[RECIPE]['auprc_low']):+.3f} to " in text
    # an arm's own seeds, the experiment's, and the second round's one
    assert [on_all[arm]["guards"] for arm in (RECIPE, GOLD, "recipe, round 2")] == ["1", "2", "1"]
    evaluations = [json.loads(p.read_text()) for p in (kept / "tiny").glob(f"{GOLD}-*/gate/evaluation.json")]
    blocked = sum(e["metrics"]["fpr"]["candidate"]["value"] for e in evaluations) / 2
    assert len(evaluations) == 2 and on_all[GOLD]["safe_blocked"] == f"{blocked:.3f}"
    assert on_all[GOLD]["promoted"].endswith("of 2") and on_all[RECIPE]["passed_target_auprc"]

    gone = {**on_all[RECIPE], "arm": "an arm of old", "version": "0.1"}
    table.write_text(table.read_text() + ",".join(gone.values()) + "\n")
    before = table.read_text()
    page.write_text("## What was learned\n\nMuch.\n\n" + text)
    monkeypatch.setattr(module, "train", None)  # nothing is trained again
    monkeypatch.setattr(module, "make_guard", None)
    module.main(config, tmp_path, kept, page, workers=1)
    assert page.read_text() == "## What was learned\n\nMuch.\n\n" + text and table.read_text() == before
    recipe = figures_of(table, RECIPE)

    shutil.rmtree(next((kept / "tiny").glob(f"{GOLD}-1-*")))
    module.main(config, tmp_path, kept, page, workers=2, finished=True)
    part = page.read_text()
    assert f"| {GOLD} |" not in part and f"Not finished, and not in these tables: {GOLD}.\n" in part
    assert figures_of(table, RECIPE) == recipe != []
    shutil.rmtree(next((kept / "tiny").glob(f"{RECIPE}-1-*")))  # the second round's guard was made from it
    module.main(config, tmp_path, kept, page, workers=1, finished=True)
    assert f"tables: recipe; {GOLD}; recipe, round 2.\n" in page.read_text()
    with pytest.raises(SystemExit):
        module.main(config, tmp_path, tmp_path / "nothing", page, workers=1, finished=True)


def test_the_experiments_of_the_project_are_sound(tmp_path: Path) -> None:
    for path in Path("configs/experiments").glob("*.yaml"):
        found = load_experiment(path, tmp_path)
        names = [arm.name for arm in found.arms]
        assert len(set(names)) == len(names) and {RECIPE, "self-training", GOLD, "positives only"} <= set(names)
        assert found.dataset.traffic.path.startswith(str(tmp_path))
        for arm in found.arms:
            read_section(MiningSettings, {**found.mining.plain(), **arm.mining}, arm.name)
