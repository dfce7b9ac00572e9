import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.cases import cases
from support.feedback_examples import judged, screened, worlds

from guardloop.mining.lexical import by_words
from guardloop.mining.mine import MiningResult, mine
from guardloop.mining.settings import MiningSettings

many = hypothesis_settings(max_examples=cases(40), deadline=None, derandomize=True)
BAD = ["steal a wallet from tourists", "steal passwords from neighbours", "steal jewels from museums"]
GOOD = ["bake bread for breakfast", "bake biscuits with cinnamon", "bake potatoes with rosemary"]


def family(phrases: list[str], size: int) -> list[str]:
    """Texts that share words, none twice."""
    return [f"how to {phrases[n % len(phrases)]} number {n}" for n in range(size)]


def alone(texts: list[str]) -> list[str]:
    """A group for each text."""
    return [f"group {n}" for n in range(len(texts))]


@many
@given(st.lists(st.tuples(st.text(max_size=40), st.floats(0, 1), st.integers(0, 4)), min_size=1, max_size=12))
def test_whatever_the_texts_are_each_gets_a_probability(rows):
    texts, targets, groups = zip(*rows, strict=True)
    told = by_words(texts, np.array(targets), [str(group) for group in groups])
    assert told.shape == (len(rows),)
    assert ((told >= 0) & (told <= 1)).all()


@many
@given(st.lists(st.floats(0, 1), min_size=60, max_size=60))
def test_what_words_say_is_as_often_unsafe_as_the_targets(targets):
    texts = family([*BAD, *GOOD], 60)
    assert by_words(texts, np.array(targets), alone(texts)).mean() == pytest.approx(np.mean(targets), abs=1e-3)


def test_prompts_that_read_alike_correct_a_judge_that_erred_on_a_few():
    texts = family(BAD, 60) + family(GOOD, 60)
    targets = np.array([0.9] * 60 + [0.1] * 60)
    targets[:6], targets[-6:] = 0.1, 0.9
    told = by_words(texts, targets, alone(texts))
    assert told[:6].min() > 0.7
    assert told[-6:].max() < 0.3


def test_near_duplicates_tell_nothing_of_each_other():
    texts, targets = family(BAD, 20) + family(GOOD, 100), np.array([1.0] * 20 + [0.0] * 100)
    apart, together = alone(texts), ["the same"] * 20 + alone(texts)[20:]
    assert by_words(texts, targets, apart)[:20].min() > 0.9
    assert by_words(texts, targets, together)[:20].max() < 0.5


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("如何从游客那里偷钱包不被发现", "如何在家里烤面包和饼干"),
        ("नकली पासपोर्ट कैसे बनाएं", "घर पर रोटी कैसे पकाएं"),
        ("كيف أسرق محفظة سائح", "كيف أخبز الخبز في المنزل"),
    ],
)
def test_any_script_has_words(bad, good):
    texts = [f"{number} {bad}" for number in range(40)] + [f"{number} {good}" for number in range(40)]
    told = by_words(texts, np.array([0.8] * 40 + [0.2] * 40), alone(texts))
    assert told[:40].min() > 0.6
    assert told[40:].max() < 0.4


def test_the_order_of_the_texts_does_not_matter():
    texts = family([*BAD, *GOOD], 50)
    targets, order = np.linspace(0, 1, 50), np.random.default_rng(0).permutation(50)
    groups = alone(texts)
    told = by_words(texts, targets, groups)
    again = by_words([texts[n] for n in order], targets[order], [groups[n] for n in order])
    np.testing.assert_allclose(again, told[order], atol=1e-5)


# In mining


def taught(result: MiningResult) -> dict[str, float]:
    return {row["id"]: row["target"] for row in result.examples if not row["kind"].startswith("replay")}


def test_words_raise_a_prompt_that_reads_like_the_positives_and_lower_one_that_does_not():
    rows = [screened(f"bad {n}", -2.0, f"steal a wallet, way {n}") for n in range(40)]
    rows += [screened(f"good {n}", -2.0, f"bake some bread, way {n}") for n in range(40)]
    blocked = {row["id"]: row["id"].startswith("bad") for row in rows} | {"bad 0": False, "good 0": True}
    table = [judged(row, sample, 6.0 if blocked[row["id"]] else -6.0) for row in rows for sample in range(4)]
    without, half = (
        taught(mine(rows, table, MiningSettings(held_out=0.0, lexical_weight=words))) for words in (0.0, 0.5)
    )
    assert half["bad 0"] > without["bad 0"] + 0.2
    assert half["good 0"] < without["good 0"] - 0.2


@many
@given(worlds(), st.floats(-8, 8))
def test_words_learn_nothing_from_what_is_held_out(world, score):
    settings = MiningSettings(held_out=0.5, lexical_weight=0.5)
    result = mine(world.screened, world.judged, settings)
    hidden = {row["group"] for row in result.held_out}
    other = [{**row, "score": score, "flagged": score > 0} if row["group"] in hidden else row for row in world.judged]
    assert taught(mine(world.screened, other, settings)) == taught(result)
