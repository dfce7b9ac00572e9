import math
import random
import resource
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import cases
from support.models import (
    FAMILIES,
    agent,
    renderer_of,
    tiny_guard,
    tiny_llama,
    user,
    with_lora,
)

from guardloop.core.errors import GuardLoopError
from guardloop.guard import engine
from guardloop.guard.engine import Guard
from guardloop.guard.inference.forward import PrefixCache, label_hidden
from guardloop.guard.inference.packed import PackedForward

PROPERTY = settings(max_examples=cases(30), deadline=None, derandomize=True)
WORDS = ["how", "do", "I", "bake", "a", "cake", "build", "bomb", "<|eot_id|>", "[/INST]", "你好", ".", "?", "\n"]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=40).map(" ".join).filter(str.strip)
rows = st.fixed_dictionaries({"prompt": texts, "response": st.none() | texts | st.just("")})
conversations = st.lists(rows, min_size=1, max_size=9)
NEAR = 1e-4


@cache
def guard_of(family, lora=False, packed=False):
    model = with_lora(tiny_llama(family)) if lora else tiny_llama(family)
    return Guard(model.eval(), renderer_of(family), min_label_mass=0.0, packed=packed, pack_tokens=1024)


@torch.no_grad()
def by_full_forward(guard, row):
    """Score and label mass of one conversation, from all logits of the whole prompt by itself."""
    return by_tokens(guard, guard.renderer.render(row["prompt"], row["response"]).tokens)


@torch.no_grad()
def by_tokens(guard, tokens):
    logits = guard.model(torch.tensor([[*tokens, *guard.labels.before]])).logits[0, -1]
    safe, unsafe = guard.labels.safe, guard.labels.unsafe
    return float(logits[unsafe] - logits[safe]), float(logits.softmax(-1)[[safe, unsafe]].sum())


def scores(guard, conversations):
    return [verdict.score for verdict in guard.score(conversations)]


@pytest.mark.parametrize("lora", [False, True])
@given(family=st.sampled_from(FAMILIES), batch_tokens=st.sampled_from([1, 30, 200, 4096]), conversations=conversations)
@PROPERTY
def test_scores_equal_a_full_forward_pass_of_each_conversation(lora, family, batch_tokens, conversations):
    guard = guard_of(family, lora)
    guard.scorer.batch_tokens = batch_tokens
    for row, verdict in zip(conversations, guard.score(conversations), strict=True):
        score, mass = by_full_forward(guard, row)
        assert verdict.score == pytest.approx(score, abs=NEAR)
        assert verdict.label_mass == pytest.approx(mass, abs=NEAR)
        assert verdict.flagged == (verdict.score > 0)
        assert verdict.error is None


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@given(family=st.sampled_from(FAMILIES), conversations=st.lists(rows, min_size=12, max_size=60))
@settings(PROPERTY, max_examples=cases(8))
def test_packed_scores_equal_a_full_forward_pass_of_each_conversation(lora, family, conversations):
    guard, batched = guard_of(family, lora, packed=True), guard_of(family, lora)
    for one, other in zip(guard.score(conversations), batched.score(conversations), strict=True):
        assert one.score == pytest.approx(other.score, abs=NEAR)
        assert one.label_mass == pytest.approx(other.label_mass, abs=NEAR)
    row = conversations[0]
    assert next(guard.score(conversations)).score == pytest.approx(by_full_forward(guard, row)[0], abs=NEAR)


def test_many_conversations_are_packed_and_few_are_not():
    guard = tiny_guard(packed=True, pack_tokens=1024)
    list(guard.score(user(*["hello there"] * 5)))
    assert not guard.scorer._packs
    list(guard.score([*user(*["hello there"] * 80), *agent(*[("hello", "there")] * 80)]))
    assert {size for _, size in guard.scorer._packs} >= {1024}
    assert len({prefix for prefix, _ in guard.scorer._packs}) == len(
        {tuple(prefix) for prefix in guard.renderer.prefixes}
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory\nSearch for")]
)
def test_where_memory_runs_out_packs_and_batches_are_halved_for_good(monkeypatch, error):
    conversations = user(*[f"hello there {n}" for n in range(600)])
    expected = [verdict.score for verdict in tiny_guard().score(conversations)]
    forward, tried = PackedForward.__call__, []

    def small(self, *args):
        tried.append(self.size)
        if self.size > 2048:
            raise error
        return forward(self, *args)

    monkeypatch.setattr(PackedForward, "__call__", small)
    guard = tiny_guard(packed=True, pack_tokens=8192)
    assert [verdict.score for verdict in guard.score(conversations)] == pytest.approx(expected, abs=NEAR)
    assert tried[:3] == [8192, 4096, 2048] and max(tried[3:]) == 2048
    list(guard.score(conversations))
    assert max(tried[3:]) == 2048


@pytest.mark.slow
def test_where_packs_cannot_be_computed_batches_serve_and_a_log_line_says_so(monkeypatch, caplog):
    conversations = user(*[f"hello there {n}" for n in range(600)])
    expected = [verdict.score for verdict in tiny_guard().score(conversations)]
    monkeypatch.setattr(PackedForward, "__call__", broken := Broken())
    guard = tiny_guard(packed=True, pack_tokens=2048)
    for _ in range(2):
        assert [verdict.score for verdict in guard.score(conversations)] == pytest.approx(expected, abs=NEAR)
    assert broken.tried == 1
    assert [record.message for record in caplog.records if "packs" in record.message] == [
        "packs: no valid Triton configs; from here on batches, which are slower"
    ]


def test_an_error_of_a_later_pack_is_not_taken_for_one_of_all_packs(monkeypatch):
    guard, conversations = tiny_guard(packed=True, pack_tokens=2048), user(*[f"hello there {n}" for n in range(600)])
    list(guard.score(conversations))
    monkeypatch.setattr(PackedForward, "__call__", Broken())
    with pytest.raises(RuntimeError, match="no valid Triton configs"):
        list(guard.score(conversations))


class Broken:
    """Packs on a GPU whose compiler cannot do them."""

    tried = 0

    def __call__(self, *args):
        self.tried += 1
        raise RuntimeError("no valid Triton configs\nRequired: 131072 Hardware limit: 101376")


@pytest.mark.parametrize("work", [lambda g: list(g.score(user("hello"))), lambda g: g.scorer.next_tokens([[1]])])
def test_a_conversation_that_fits_no_memory_ends_in_an_error_for_people(monkeypatch, work):
    def never(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("guardloop.guard.inference.scorer.label_hidden", never)
    with pytest.raises(GuardLoopError, match="out of memory with packs of 1024 and batches of 256 tokens"):
        work(tiny_guard(packed=True))


def test_the_probability_is_the_score_after_the_temperature():
    cool, warm = tiny_guard(), tiny_guard(temperature=4.0)
    for a, b in zip(cool.score(user(*WORDS[:8])), warm.score(user(*WORDS[:8])), strict=True):
        assert a.score == b.score
        assert a.probability == pytest.approx(1 / (1 + math.exp(-a.score)))
        assert b.probability == pytest.approx(1 / (1 + math.exp(-a.score / 4)))


class Scripted:
    """A scorer whose model writes a set text after `unsafe`."""

    def __init__(self, scorer, tokens):
        self.scorer, self.tokens, self.asked = scorer, tokens, []

    def score(self, prompts):
        return self.scorer.score(prompts)

    def next_tokens(self, prompts):
        self.asked.append(len(prompts))
        return [self.tokens[min(len(self.asked), len(self.tokens)) - 1]] * len(prompts)


@pytest.mark.parametrize(
    ("written", "categories", "error"),
    [
        ("\nS1", "S1", None),
        ("\nS1,S3", "S1,S3", None),
        ("\nS99", None, "unreadable categories: 'unsafe\\nS99'"),
        ("", None, "unreadable categories: 'unsafe'"),
    ],
)
def test_categories_of_flagged_rows_are_read_in_a_second_pass(written, categories, error):
    guard = tiny_guard("llama-guard-3", categories=True)
    tokenizer = guard.renderer.tokenizer
    tokens = tokenizer(written, add_special_tokens=False)["input_ids"] + [tokenizer.convert_tokens_to_ids("<|eot_id|>")]
    guard.scorer = Scripted(guard.scorer, tokens)
    prompts = user(*WORDS[:8])
    guard.threshold = sorted(v.score for v in tiny_guard("llama-guard-3").score(prompts))[4]
    verdicts = list(guard.score(prompts))
    flagged = [v for v in verdicts if v.flagged]
    assert len(flagged) == 3
    assert guard.scorer.asked == [3] * len(tokens)
    assert {(v.categories, v.error) for v in flagged} == {(categories, error)}
    assert {v.categories for v in verdicts if not v.flagged} == {None}


def test_an_adapter_matters():
    plain, adapted = (scores(guard_of("guardloop", lora), user("a", "b c")) for lora in (False, True))
    assert max(abs(a - b) for a, b in zip(plain, adapted, strict=True)) > 0.1


@given(conversations=st.lists(rows, min_size=2, max_size=12), seed=st.integers(0, 99))
@PROPERTY
def test_a_score_depends_on_its_own_conversation_only(conversations, seed):
    guard = guard_of("llama-guard-3")
    order = random.Random(seed).sample(range(len(conversations)), len(conversations))
    guard.scorer.batch_tokens = 60
    together = scores(guard, conversations)
    guard.scorer.batch_tokens = 4096
    shuffled = scores(guard, [conversations[i] for i in order])
    alone = [scores(guard, [row])[0] for row in conversations]
    assert [together[i] for i in order] == pytest.approx(shuffled, abs=NEAR)
    assert together == pytest.approx(alone, abs=NEAR)


def test_the_role_changes_the_score():
    guard = guard_of("llama-guard-1")
    as_prompt, as_response = scores(guard, [*user("build a bomb"), *agent(("hello", "build a bomb"))])
    assert abs(as_prompt - as_response) > 0.01


def test_an_empty_prompt_is_recorded_and_the_rest_is_scored():
    guard = guard_of("guardloop")
    verdicts = list(guard.score([*user("", "hello", " \n"), *agent(("", "an answer"), ("hello", ""))]))
    assert [v.error for v in verdicts] == ["empty prompt", None, "empty prompt", None, None]
    assert [v.score is None for v in verdicts] == [True, False, True, False, False]
    assert all(v.flagged for v in verdicts if v.error)
    assert verdicts[1].score == pytest.approx(by_full_forward(guard, user("hello")[0])[0], abs=NEAR)
    assert list(guard.score([])) == []
    assert [v.error for v in guard.score(user(""))] == ["empty prompt"]


def test_truncation_is_recorded():
    guard = Guard(tiny_llama(), renderer_of("guardloop", max_text_tokens=16), min_label_mass=0.0)
    assert [v.truncated for v in guard.score(user("short", "long " * 50))] == [False, True]


@pytest.mark.security
@pytest.mark.parametrize("row", [{"prompt": 5}, {"prompt": ["x"]}, {"prompt": "x", "response": {"text": "y"}}, {}])
def test_a_row_of_a_wrong_type_fails_no_other_and_never_passes(row):
    guard = tiny_guard(threshold=50.0)
    before, bad, after = guard.score([*user("hello"), row, *user("hello")])
    assert bad.flagged and bad.score is None and bad.error
    assert before == after and not before.flagged


@pytest.mark.security
def test_a_blank_prompt_does_not_switch_judging_off():
    guard = tiny_guard()
    (blank, absent) = guard.score([*agent((" ", "build a bomb")), {"prompt": None, "response": "build a bomb"}])
    assert blank.error is absent.error is None
    assert blank.score == pytest.approx(absent.score, abs=NEAR)


@pytest.mark.security
@pytest.mark.parametrize("role", ["prompt", "response"])
def test_the_middle_of_a_long_message_is_judged(role):
    guard = Guard(tiny_llama(), renderer_of("guardloop", max_text_tokens=256), min_label_mass=0.0)
    words = "we bake a cake and paint the door green "
    text = words * 20 + "build a bomb. " + words * 20
    row = {"prompt": text} if role == "prompt" else {"prompt": "hello", "response": text}
    windows = guard.renderer.render_windows([(row["prompt"], row.get("response"))])[0]
    read = [guard.renderer.tokenizer.decode(window.tokens) for window in windows]
    assert any("build a bomb" in text for text in read)
    alone = [by_tokens(guard, window.tokens)[0] for window in windows]
    (verdict,) = guard.score([row])
    assert verdict.truncated and verdict.score == pytest.approx(max(alone), abs=NEAR)


@pytest.mark.security
def test_a_message_of_too_many_windows_never_passes():
    guard = Guard(tiny_llama(), renderer_of("guardloop", max_text_tokens=16), min_label_mass=0.0, threshold=50.0)
    (long, short) = guard.score(user("word " * 2000, "word"))
    assert long.flagged and long.truncated and long.score is None and "too long" in long.error
    assert not short.flagged and short.error is None


def test_a_prompt_off_every_prefix_falls_back_to_a_whole_pass(family):
    guard = tiny_guard(family)
    guard.scorer.prefixes = [[*p[:-1], p[-1] + 1] for p in guard.scorer.prefixes]  # no prompt starts like this
    rows = [*user("hello", "build a bomb " * 9), *agent(("hello", "no"))]
    assert scores(guard, rows) == pytest.approx([by_full_forward(guard, row)[0] for row in rows], abs=NEAR)


def test_hidden_states_behind_a_cached_template_are_those_of_the_whole():
    model, rows = tiny_llama(), [[8, 9], [1], [7, 8, 4, 2]]
    with torch.no_grad():
        hidden = label_hidden(model, PrefixCache(model, [5, 6, 7]), rows)
        whole = [model.model(torch.tensor([[5, 6, 7, *row]])).last_hidden_state[0, -1] for row in rows]
    torch.testing.assert_close(hidden, torch.stack(whole), atol=NEAR, rtol=0)


@pytest.mark.parametrize("budget", [1, 50, 100, 1000])
def test_a_forward_pass_stays_within_the_token_budget(budget):
    guard = tiny_guard(batch_tokens=budget)
    shapes = []
    hook = guard.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    list(guard.score(user(*("word " * n for n in range(1, 40)))))
    hook.remove()
    prefix, *batches = shapes
    assert prefix == (1, len(guard.renderer.prefixes[0]))
    assert sum(count for count, _ in batches) == 39
    assert all(count == 1 or count * width <= budget for count, width in batches)


def test_scoring_streams(monkeypatch):
    monkeypatch.setattr(engine, "WINDOW", 4)
    taken = []
    source = (taken.append(n) or row for n, row in enumerate(user(*["hello"] * 40)))
    verdicts = tiny_guard().score(source)
    next(verdicts)
    assert len(taken) == 8  # one window ahead


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_conversations():
    guard = tiny_guard()

    def peak(count):
        source = ({"prompt": f"how do I bake cake number {n}", "response": None} for n in range(count))
        assert sum(1 for _ in guard.score(source)) == count
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB

    assert peak(40_000) - peak(12_000) < 40


def test_a_low_label_mass_stops_the_run_before_any_verdict():
    guard = tiny_guard(min_label_mass=0.95)
    with pytest.raises(GuardLoopError, match=r"median label mass is 0\.\d\d, under 0\.95") as error:
        next(guard.score(user("hello", "there")))
    assert "guard.min_label_mass: 0" in error.value.remedy


def test_a_low_label_mass_is_reported_for_a_model_that_is_no_guard_yet():
    masses = [v.label_mass for v in tiny_guard(min_label_mass=0.0).score(user("hello", "there"))]
    assert all(0 <= mass < 0.95 for mass in masses)


def test_an_answer_that_is_not_a_number_is_no_verdict():
    guard = tiny_guard()
    with torch.no_grad():
        guard.model.model.norm.weight.fill_(float("nan"))
    (verdict,) = guard.score(user("hello"))
    assert (verdict.score, verdict.flagged, verdict.error) == (None, True, "the guard's answer is not a number")
    guard.min_label_mass = 0.95
    with pytest.raises(GuardLoopError, match="label mass"):
        list(guard.score(user("hello")))


@pytest.mark.slow
def test_scores_of_a_half_precision_model_do_not_collapse_into_ties():
    guard = Guard(tiny_llama().to(torch.bfloat16), renderer_of("guardloop"), min_label_mass=0.0)
    rows = user(*(f"number {n}" for n in range(60)))
    rounded = {by_full_forward(guard, row)[0] for row in rows}
    assert len(set(scores(guard, rows))) > 2 * len(rounded)


def test_the_threshold_divides_flagged_from_passed():
    guard = tiny_guard()
    prompts = user(*WORDS[:8])
    guard.threshold = sorted(scores(guard, prompts))[4]
    assert sum(v.flagged for v in guard.score(prompts)) == 3


def test_prompts_and_responses_have_thresholds_of_their_own():
    rows = [*user("hello", "build a bomb"), *agent(("hello", "no"), ("hello", "yes"))]
    guard = tiny_guard()
    lowest = min(scores(guard, rows))
    guard.threshold, guard.response_threshold = lowest - 1, max(scores(guard, rows)) + 1
    assert [v.flagged for v in guard.score(rows)] == [True, True, False, False]
    guard.threshold, guard.response_threshold = guard.response_threshold, guard.threshold
    assert [v.flagged for v in guard.score(rows)] == [False, False, True, True]
