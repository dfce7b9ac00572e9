import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.cases import cases
from support.mining_examples import World, judged, round_of, screened, worlds

from guardloop.core.records import EXAMPLE, HELD_OUT_PROMPT, JUDGED, SCREENED, read_metadata, read_table, write_table
from guardloop.data.clean import prepare
from guardloop.data.settings import DatasetSettings, SourceSettings
from guardloop.mining.evidence import gather, probability, vote
from guardloop.mining.examples import HARD_NEGATIVES_PER_POSITIVE
from guardloop.mining.mine import MiningResult, mine
from guardloop.mining.settings import MiningSettings
from guardloop.stages import BLOCKED_INPUTS, EXAMPLES, HELD_OUT, MINING, MINING_PAGE, mine_feedback
from guardloop.training.train import split

many = hypothesis_settings(max_examples=cases(40), deadline=None, derandomize=True)
DEFAULTS = MiningSettings(held_out=0)

chosen = st.builds(
    MiningSettings,
    prior_strength=st.floats(0.5, 8),
    min_blocked_share=st.sampled_from([0.01, 0.25, 0.5, 1.0]),
    replay=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    min_positives=st.integers(1, 4),
    held_out=st.just(0.0),
)


def mined(world: World, settings: MiningSettings = DEFAULTS, seed: int = 0) -> MiningResult:
    return mine(world.screened, world.judged, settings, seed)


def of(result: MiningResult, *kinds: str) -> list[dict]:
    return [row for row in result.examples if row["kind"] in kinds]


def prompts(result: MiningResult) -> list[dict]:
    return [row for row in result.examples if not row["kind"].startswith("replay")]


def replays(result: MiningResult) -> list[dict]:
    return of(result, "replay_blocked", "replay_response")


# What the examples are


@many
@given(worlds(), chosen)
def test_no_prompt_has_two_targets(world, settings):
    targets = defaultdict(set)
    for row in mined(world, settings).examples:
        targets[row["prompt"], row["response"]].add(row["target"])
    assert all(len(found) == 1 for found in targets.values())
    as_prompts = [row["prompt"] for row in mined(world, settings).examples if row["response"] is None]
    assert len(set(as_prompts)) == len(as_prompts)


@many
@given(worlds(), chosen)
def test_every_example_is_whole(world, settings):
    groups = {row["prompt"]: row["group"] for row in world.screened}
    for row in mined(world, settings).examples:
        assert set(row) == set(EXAMPLE.names)
        assert 0 <= row["target"] <= 1 and 0 <= row["weight"] <= 1
        assert row["kind"] and row["reason"] and row["group"] == groups[row["prompt"]]


@many
@given(worlds(), chosen)
def test_only_prompts_that_passed_are_examples(world, settings):
    unasked = [judged(row, 0, 5.0) for row in world.screened if row["flagged"]]  # a table that does not belong
    result = mine(world.screened, world.judged + unasked, settings)
    assert {row["prompt"] for row in prompts(result)} <= set(world.texts(flagged=False))
    assert {row["prompt"] for row in of(result, "replay_blocked")} <= set(world.texts(flagged=True))
    assert result.examples == mined(world, settings).examples


@many
@given(worlds(), chosen)
def test_each_judged_prompt_is_one_example(world, settings):
    usable = {r["prompt"] for r in world.judged if r["score"] is not None and r["finish_reason"] != "error"}
    assert Counter(row["prompt"] for row in prompts(mined(world, settings))) == Counter(usable)


@many
@given(worlds(), chosen)
def test_the_kinds_follow_from_the_evidence(world, settings):
    evidence = {found.prompt["prompt"]: found for found in gather(world.judged).values()}
    targets = vote(gather(world.judged), settings.prior_strength).by_id
    for row in prompts(mined(world, settings)):
        found = evidence[row["prompt"]]
        share = found.blocked / found.responses
        refused = found.refusals == found.responses
        expected = {
            "positive": found.blocked and share >= settings.min_blocked_share,
            "uncertain": found.blocked and share < settings.min_blocked_share,
            "hard_negative": not found.blocked and not refused,
            "passed": not found.blocked and not refused,
            "refused": not found.blocked and refused,
        }
        assert expected[row["kind"]]
        assert row["target"] == pytest.approx(targets[found.prompt["id"]])


@many
@given(worlds(), chosen)
def test_there_are_two_hard_negatives_to_a_positive_where_the_pool_allows(world, settings):
    result = mined(world, settings)
    pool = len(of(result, "hard_negative", "passed"))
    wanted = HARD_NEGATIVES_PER_POSITIVE * len(of(result, "positive"))
    assert len(of(result, "hard_negative")) == min(pool, wanted)


def test_refused_prompts_never_become_hard_negatives():
    result = mined(round_of(positives=10, answered=3, refused=30))
    assert result.counts["hard_negative"] == 3 and result.counts["refused"] == 30
    assert {row["id"].partition("-")[0] for row in of(result, "hard_negative")} == {"answered"}
    assert max(row["weight"] for row in of(result, "refused")) < min(row["weight"] for row in of(result, "positive"))


def test_hard_negatives_read_like_the_positives():
    world = World([], [])
    texts = ["how to open a bank vault at night"] + ["how to open a bank account at last"] * 2 + ["a poem on rain"] * 6
    for number, text in enumerate(texts):
        prompt = screened(f"p{number}", -1.0, f"{text} {number}")
        world.screened.append(prompt)
        world.judged += [judged(prompt, i, 3.0 if number == 0 else -3.0) for i in range(4)]
    assert {row["id"] for row in of(mined(world), "hard_negative")} == {"p1", "p2"}


def test_hard_negatives_score_like_the_positives():
    world = World([], [])
    for number in range(9):
        prompt = screened(f"p{number}", -0.5 if number < 3 else -9.0, f"the same words {'x' * number}")
        world.screened.append(prompt)
        world.judged += [judged(prompt, i, 3.0 if number == 0 else -3.0) for i in range(4)]
    assert {row["id"] for row in of(mined(world), "hard_negative")} == {"p1", "p2"}


@pytest.mark.parametrize("text", ["", "?", "的", "🙂 🙂"])
def test_prompts_without_words_can_be_mined(text):
    world = round_of(positives=1, answered=3)
    for row in world.screened + world.judged:
        row["prompt"] = text * (1 + int(row["id"].partition("-")[2]))
    assert len(of(mined(world), "hard_negative")) == 2


# Replay


@many
@given(worlds(), chosen)
def test_replay_has_its_share_of_the_weight(world, settings):
    result = mined(world, settings)
    replayed, trained = (sum(row["weight"] for row in rows) for rows in (replays(result), prompts(result)))
    if not settings.replay or not prompts(result):
        assert replayed == 0
    elif max((row["weight"] for row in replays(result)), default=1.0) < 1:
        assert replayed / (replayed + trained) == pytest.approx(settings.replay)
    else:  # too few rows for their share: none weighs more than another example
        assert replayed / (replayed + trained) <= settings.replay + 1e-9


def test_by_default_replay_is_two_fifths_of_the_weight():
    result = mined(round_of(positives=10, answered=40, flagged=30))
    replayed, trained = (sum(row["weight"] for row in rows) for rows in (replays(result), prompts(result)))
    assert replayed == pytest.approx((replayed + trained) * 0.4)
    assert {row["kind"] for row in replays(result)} == {"replay_blocked", "replay_response"}


def test_replayed_responses_are_mostly_to_prompts_whose_targets_moved():
    rows = [screened(f"{'moved' if n < 40 else 'still'} {n}", -6.0) for n in range(400)]
    world = World(rows, [judged(row, 0, 6.0 if row["id"].startswith("moved") else -30.0) for row in rows])
    drawn = [row["id"] for row in of(mined(world), "replay_response")]
    assert len(drawn) == 200 and sum(id.startswith("moved") for id in drawn) > 35  # by chance alone some 20 of the 40


@many
@given(worlds(), chosen)
def test_replay_keeps_what_the_baseline_says(world, settings):
    targets = vote(gather(world.judged), settings.prior_strength)
    texts = {row["prompt"]: row["score"] for row in world.screened}
    responses = {row["response"]: row for row in world.judged}
    for row in replays(mined(world, settings)):
        if row["kind"] == "replay_blocked":
            assert row["response"] is None and row["target"] == targets.prior(texts[row["prompt"]])
        else:  # both turns are kept: a response is judged in its conversation
            source = responses[row["response"]]
            assert row["prompt"] == source["prompt"] and row["target"] == probability(source["score"])


def test_the_seed_chooses_the_replayed_rows():
    world = round_of(positives=4, answered=8, flagged=60)
    one, again, other = (mined(world, seed=seed) for seed in (1, 1, 2))
    assert one == again and one.examples != other.examples and prompts(one) == prompts(other)


# What does not matter


@many
@given(worlds(), chosen, st.randoms())
def test_the_order_of_the_rows_does_not_matter(world, settings, draw):
    shuffled = World(*(draw.sample(rows, len(rows)) for rows in (world.screened, world.judged)))
    assert mined(shuffled, settings) == mined(world, settings)


@many
@given(worlds(), chosen)
def test_responses_that_failed_do_not_matter(world, settings):
    failed = []
    for row in world.screened:
        if row["score"] is not None and not row["flagged"]:
            failed += [
                judged(row, 90, None),
                judged(row, 91, 9.0, finish="error"),
                judged(row, 92, None, True, "error"),
            ]
    assert mine(world.screened, failed + world.judged, settings) == mined(world, settings)


def test_the_labels_of_the_traffic_do_not_matter():
    world, labelled = round_of(positives=9, answered=20), round_of(positives=9, answered=20)
    for row in labelled.screened + labelled.judged:
        row["unsafe"], row["category"] = True, "S1"
    assert mined(world) == mined(labelled)


# What is held out


@many
@given(worlds(), chosen, st.sampled_from([0.2, 0.5]))
def test_what_is_held_out_is_in_no_example(world, settings, share):
    everything = mined(world, settings)
    result = mined(world, settings.model_copy(update={"held_out": share}))
    hidden = {row["group"] for row in result.held_out}
    assert hidden.isdisjoint(row["group"] for row in result.examples)
    assert {row["id"] for row in [*result.held_out, *prompts(result)]} == {row["id"] for row in prompts(everything)}
    assert result.blocked_inputs == everything.blocked_inputs  # people see all of it


@many
@given(worlds(), chosen)
def test_what_is_held_out_is_labelled_by_its_responses(world, settings):
    evidence = {found.prompt["id"]: found for found in gather(world.judged).values()}
    for row in mined(world, settings.model_copy(update={"held_out": 0.5})).held_out:
        found = evidence[row["id"]]
        assert set(row) == set(HELD_OUT_PROMPT.names)
        assert (row["responses"], row["blocked"]) == (found.responses, found.blocked)
        positive = found.blocked >= settings.min_blocked_share * found.responses
        assert row["response_unsafe"] is (False if not found.blocked else True if positive else None)


def test_a_share_is_held_out_and_training_still_finds_its_own_validation_rows():
    result = mined(round_of(300, 700), MiningSettings())
    assert len(result.held_out) == pytest.approx(200, abs=45)
    training, validation = split(prompts(result), 0.2, 0)
    assert len(validation) / (len(training) + len(validation)) == pytest.approx(0.2, abs=0.05)


# What is enough to train on


@many
@given(worlds(), chosen)
def test_the_result_says_whether_it_is_enough_and_why(world, settings):
    result = mined(world, settings)
    positives = len(of(result, "positive"))
    contrast = of(result, "hard_negative", "passed", "refused")
    assert result.enough == (positives >= settings.min_positives and bool(contrast))
    assert result.reason and (str(positives) in result.reason or not contrast)
    assert result.counts == Counter(row["kind"] for row in result.examples)
    assert result.passed == len(world.texts(flagged=False))


@pytest.mark.parametrize(
    ("world", "why"),
    [
        (round_of(0, 0), "0 of 0 passed prompts"),
        (round_of(0, 0, flagged=20), "0 of 0 passed prompts"),
        (round_of(0, 20), "0 of 20 passed prompts"),
        (round_of(7, 20), "7 of 27 passed prompts"),
        (round_of(12, 0), "nothing to contrast"),
    ],
)
def test_a_small_result_is_not_enough_and_says_why(world, why):
    result = mined(world)
    assert not result.enough and why in result.reason
    assert len(result.blocked_inputs) == result.counts.get("positive", 0)


def test_a_result_of_the_least_size_is_enough():
    assert mined(round_of(DEFAULTS.min_positives, 1)).enough


@many
@given(worlds(), chosen)
def test_blocked_inputs_are_the_positives_worst_first(world, settings):
    result = mined(world, settings)
    assert {r["id"] for r in result.blocked_inputs} == {r["id"] for r in of(result, "positive")}
    targets = [row["target"] for row in result.blocked_inputs]
    assert targets == sorted(targets, reverse=True)
    for row in result.blocked_inputs:
        judged_so = [r for r in world.judged if r["id"] == row["id"] and r["score"] is not None]
        assert row["worst_response"] == max(judged_so, key=lambda r: r["score"])["response"]


# The stage


def written(world: World, folder: Path, shards: int = 1) -> tuple[list[Path], list[Path]]:
    """The round as the earlier stages leave it: a pair of tables for each shard."""
    tables: tuple[list[Path], list[Path]] = [], []
    for shard in range(shards):
        ids = {row["id"] for row in world.screened[shard::shards]}
        for rows, schema, paths in ((world.screened, SCREENED, tables[0]), (world.judged, JUDGED, tables[1])):
            paths.append(folder / f"{shard}-of-{shards}-{len(rows)}-{len(schema)}.parquet")
            write_table((row for row in rows if row["id"] in ids), schema, paths[-1], lambda: {"guard": "made up"})
    return tables


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_nothing_is_appended_from_one_run_to_the_next(tmp_path):
    tables = written(round_of(10, 30, 5, flagged=20), tmp_path)
    figures, enough = mine_feedback(*tables, tmp_path / "mined", DEFAULTS.plain())
    first = files(tmp_path / "mined")
    assert set(first) == {EXAMPLES, HELD_OUT, BLOCKED_INPUTS, MINING, MINING_PAGE}
    assert mine_feedback(*tables, tmp_path / "mined", DEFAULTS.plain()) == (figures, enough)
    assert files(tmp_path / "mined") == first
    assert enough and figures["positives"] == 10


def test_an_earlier_result_leaves_no_trace(tmp_path):
    mine_feedback(*written(round_of(10, 30), tmp_path), tmp_path / "mined", DEFAULTS.plain())
    small = written(round_of(9, 11), tmp_path)
    for folder in ("mined", "fresh"):
        mine_feedback(*small, tmp_path / folder, DEFAULTS.plain())
    assert files(tmp_path / "mined") == files(tmp_path / "fresh")


def test_shards_do_not_change_the_result(tmp_path):
    world = round_of(10, 30, 5, flagged=20)
    for shards in (1, 3):
        mine_feedback(*written(world, tmp_path, shards), tmp_path / f"mined-{shards}", DEFAULTS.plain())
    assert files(tmp_path / "mined-1") == files(tmp_path / "mined-3")


def test_the_stage_writes_what_was_mined(tmp_path):
    world = round_of(10, 30, 5, flagged=20)
    world.judged[0]["response"] = 'two\nlines, \u2028 a separator and "quotes" 🙂'
    mine_feedback(*written(world, tmp_path), tmp_path, DEFAULTS.plain())
    rows = list(read_table(tmp_path / EXAMPLES, EXAMPLE))
    assert Counter(row["kind"] for row in rows) == json.loads((tmp_path / MINING).read_text("utf-8"))["counts"]
    assert read_metadata(tmp_path / EXAMPLES) == {"screened": {"guard": "made up"}, "judged": {"guard": "made up"}}
    with (tmp_path / BLOCKED_INPUTS).open(encoding="utf-8") as lines:
        blocked = [json.loads(line) for line in lines]
    assert {row["id"] for row in blocked} == {f"positive-{i}" for i in range(10)}
    assert all(row["blocked"] == row["responses"] == 4 and row["worst_response"] for row in blocked)


def test_an_empty_result_ends_well(tmp_path):
    figures, enough = mine_feedback(*written(World([], []), tmp_path), tmp_path / "mined", DEFAULTS.plain())
    assert not enough and figures == {"positives": 0, "examples": 0, "blocked": 0}
    assert list(read_table(tmp_path / "mined" / EXAMPLES, EXAMPLE)) == []
    assert (tmp_path / "mined" / BLOCKED_INPUTS).read_text() == ""
    assert "0 of 0" in json.loads((tmp_path / "mined" / MINING).read_text())["reason"]


def test_a_prompt_that_traffic_repeats_is_one_example(tmp_path):
    """From files to examples: the same prompt twice in the traffic, once answered and once blocked."""
    texts = [f"prompt about {topic} number {i}" for i, topic in enumerate(["bread", "locks", "rain", "tea"] * 5)]
    traffic = [{"prompt": change(text)} for text in texts for change in (str, str.upper)]
    test = [{"prompt": "vile", "label": "unsafe"}, {"prompt": "kind", "label": "safe"}]
    for name, rows in (("traffic", traffic), ("test", test)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = {n: SourceSettings(kind="file", path=str(tmp_path / f"{n}.jsonl")) for n in ("traffic", "test")}
    rows, _, _ = prepare(DatasetSettings(**sources))
    world = World([screened(r["id"], -1.0, r["prompt"]) for r in rows], [])
    world.judged = [judged(r, i, (-1.0) ** i) for i, r in enumerate(world.screened)]
    trained = Counter(row["prompt"].casefold() for row in prompts(mined(world)))
    assert set(trained) == set(texts) and set(trained.values()) == {1}
