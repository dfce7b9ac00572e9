import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import cases
from support.models import FAMILIES, renderer_of, tokenizer_of

from guardloop.core.errors import GuardLoopError
from guardloop.guard.prompt.verdict import WrittenVerdict, label_tokens, parse_verdict

CODES = ["S1", "S2", "S10"]
PINNED = {  # lead, safe, unsafe
    "llama-guard-1": ([], "▁safe", "▁unsafe"),
    "llama-guard-2": ([], "safe", "unsafe"),
    "llama-guard-3": (["ĊĊ"], "safe", "unsafe"),
    "llama-guard-3-1b": (["ĊĊ"], "safe", "unsafe"),
    "guardloop": ([], "Ġsafe", "Ġunsafe"),
}


def test_the_label_tokens_are_pinned(family):
    labels, tokenizer = label_tokens(renderer_of(family)), tokenizer_of(family)
    found = [tokenizer.convert_ids_to_tokens(ids) for ids in (list(labels.before), labels.safe, labels.unsafe)]
    assert tuple(found) == PINNED[family]


def test_the_label_tokens_are_where_the_model_writes_its_answer(family):
    renderer, labels = renderer_of(family), label_tokens(renderer_of(family))
    for messages in (["How are you?"], ["How are you?", "Fine, thanks."]):
        for answer, label in (("safe", labels.safe), ("unsafe", labels.unsafe)):
            text = renderer._template(messages) + renderer.family.answer_lead + answer
            whole = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert whole == [*renderer.render(*messages).tokens, *labels.before, label]


def test_a_training_target_read_back_is_the_same_verdict(family):
    renderer, labels = renderer_of(family), label_tokens(renderer_of(family))
    first, last = renderer.codes[0], renderer.codes[-1]
    for answer, label, verdict in (
        ("safe", labels.safe, WrittenVerdict("safe")),
        (f"unsafe\n{first}", labels.unsafe, WrittenVerdict("unsafe", (first,))),
        (f"unsafe\n{first},{last}", labels.unsafe, WrittenVerdict("unsafe", (first, last))),
    ):
        tokens = renderer.answer(answer)
        assert tokens[: len(labels.before) + 1] == [*labels.before, label]
        assert parse_verdict(renderer.tokenizer.decode(tokens), renderer.codes) == verdict


def test_a_tokenizer_that_cannot_tell_the_answers_apart_is_refused(monkeypatch):
    renderer = renderer_of("guardloop")
    monkeypatch.setattr(renderer, "answer", lambda answer: [1, 2])
    with pytest.raises(GuardLoopError, match="no differing token"):
        label_tokens(renderer)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("safe", WrittenVerdict("safe")),
        ("\n\nsafe", WrittenVerdict("safe")),
        (" safe \n", WrittenVerdict("safe")),
        ("unsafe\nS1", WrittenVerdict("unsafe", ("S1",))),
        ("\n\nunsafe\nS2,S10", WrittenVerdict("unsafe", ("S2", "S10"))),
        ("unsafe\nS2, S10\n", WrittenVerdict("unsafe", ("S2", "S10"))),
    ],
)
def test_written_verdicts_are_read(text, verdict):
    assert parse_verdict(text, CODES) == verdict


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "\n\n", "SAFE", "Safe", "UNSAFE", "UNSAFE\nS1", "Unsafe\nS1", "safe.", "safe\nS1", "safe safe"),
        *(
            "unsafe",
            "unsafe\n",
            "unsafe S1",
            "unsafe\n\nS1",
            "unsafe\nS1\nS2",
            "unsafe\ns1",
            "unsafe\nO1",
            "unsafe\nS3",
        ),
        *("unsafe\nS1,S3", "unsafe\n1", "unsafe\nviolence", "unsafe\nS1 S2", "unsafe\n,", "not safe", "unsafely\nS1"),
        *("S1", "unsafe\r\nS1", "safe\x00", "I cannot say.", "s a f e", "unsafe:\nS1", "unsafe\nS1 because"),
    ],
)
def test_anything_else_is_a_parse_error(text):
    assert parse_verdict(text, CODES) is None


@given(
    text=st.text() | st.lists(st.sampled_from(["safe", "unsafe", "SAFE", "\n", " ", ",", *CODES, "O1"])).map("".join)
)
@settings(max_examples=cases(200), deadline=None, derandomize=True)
def test_unsafe_is_never_read_where_it_is_not_written(text):
    verdict = parse_verdict(text, CODES)
    if verdict is None:
        return
    lines = text.strip().split("\n")
    assert lines[0] == verdict.label
    assert set(verdict.categories) <= set(CODES)
    assert bool(verdict.categories) == (verdict.label == "unsafe")


def test_every_family_is_pinned():
    assert set(PINNED) == set(FAMILIES)
