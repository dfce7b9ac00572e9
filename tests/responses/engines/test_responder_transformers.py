import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from support.tiny_responder import PROMPTS, ask, build_model, build_tokenizer, small, tiny_settings

from guardloop.core.errors import GuardLoopError
from guardloop.responses.build import build_responder
from guardloop.responses.engine import TOP_P, Reply, Request
from guardloop.responses.engines import transformers as engine
from guardloop.responses.engines.slots import Slots
from guardloop.responses.engines.transformers import WINDOW_BATCHES, TransformersResponder
from guardloop.responses.sampling import choose_tokens, uniforms
from guardloop.responses.settings import ResponderSettings

Answers = set[tuple[str, int, str, str, int]]


def answers(replies: Iterator[Reply]) -> Answers:
    return {(r.id, r.sample, r.text, r.finish_reason, r.tokens) for r in replies}


@pytest.fixture(scope="module")
def responder(model: Any, tokenizer: Any) -> Callable[..., TransformersResponder]:

    def build(batch_size: int = 8, batch_tokens: int = 1024, **changes: Any) -> TransformersResponder:
        limits = {"batch_size": batch_size, "batch_tokens": batch_tokens}
        return TransformersResponder.of(tiny_settings(**changes), model, tokenizer, **limits)

    return build


def greedy_by_transformers(model: Any, responder: TransformersResponder, prompt: str) -> str:
    tokens = torch.tensor([responder.chat.encode(prompt)])
    limit = responder.settings.max_new_tokens
    with torch.inference_mode():
        made = model.generate(tokens, max_new_tokens=limit, do_sample=False, pad_token_id=1)[0, tokens.shape[1] :]
    return str(responder.tokenizer.decode([t for t in made.tolist() if t not in responder.ends]).strip())


@pytest.mark.slow
def test_greedy_is_what_transformers_generates(responder: Callable[..., TransformersResponder], model: Any) -> None:
    ours = responder(temperature=0, samples=1, max_new_tokens=20)
    replies = {r.id: r for r in ours.generate(ask(PROMPTS, ours.settings))}
    for i, prompt in enumerate(PROMPTS):
        assert replies[f"p{i}"].text == greedy_by_transformers(model, ours, prompt)
    assert {r.finish_reason for r in replies.values()} == {"stop", "length"}


FAMILIES = {
    "qwen2": {"use_sliding_window": False, "sliding_window": 16},
    "qwen3": {},
    "mistral": {"sliding_window": 300},
    "gemma2": {"sliding_window": 300, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 300},
    "granite": {"logits_scaling": 2.0},
    "gpt_neox": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_too(family: str, tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **small(len(tokenizer), **FAMILIES[family]))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ours = TransformersResponder.of(tiny_settings(temperature=0, samples=1), model, tokenizer)
    for reply in ours.generate(ask(PROMPTS[:12], ours.settings)):
        assert reply.text == greedy_by_transformers(model, ours, PROMPTS[int(reply.id[1:])])


def sampled_the_plain_way(model: Any, responder: TransformersResponder, request: Request) -> str:
    settings = responder.settings
    tokens, made = responder.chat.encode(request.prompt), list[int]()
    random = torch.from_numpy(uniforms(request.seed, settings.max_new_tokens))
    for step in range(settings.max_new_tokens):
        with torch.inference_mode():
            logits = model(torch.tensor([tokens + made])).logits[:, -1]
        token = int(choose_tokens(logits, random[step : step + 1], settings.temperature, TOP_P))
        if token in responder.ends:
            break
        made.append(token)
    return str(responder.tokenizer.decode(made).strip())


def test_samples_are_what_the_plain_way_gives(responder: Callable[..., TransformersResponder], model: Any) -> None:
    ours = responder()
    requests = ask(PROMPTS[:10], ours.settings)
    replies = {(r.id, r.sample): r.text for r in ours.generate(requests)}
    assert replies == {(r.id, r.sample): sampled_the_plain_way(model, ours, r) for r in requests}
    assert len(set(replies.values())) > 20


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"batch_size": 1}, {"batch_size": 2}, {"batch_size": 64}, {"batch_tokens": 256}])
def test_batches_do_not_matter(responder: Callable[..., TransformersResponder], shape: dict[str, int]) -> None:
    usual, other = responder(), responder(**shape)
    requests = ask(PROMPTS[:20], usual.settings)
    assert answers(other.generate(requests)) == answers(usual.generate(requests))


@pytest.mark.slow
def test_shards_do_not_matter(responder: Callable[..., TransformersResponder]) -> None:
    ours = responder()
    by_count: dict[int, Answers] = {}
    for count in (1, 2, 7):
        shards = [[r for r in ask(PROMPTS, ours.settings) if int(r.id[1:]) % count == s] for s in range(count)]
        by_count[count] = set().union(*(answers(ours.generate(shard)) for shard in shards))
    assert by_count[1] == by_count[2] == by_count[7]
    assert len(by_count[1]) == len(PROMPTS) * ours.settings.samples


def test_reads_ahead_a_bounded_number(responder: Callable[..., TransformersResponder]) -> None:
    ours, read = responder(batch_size=4, max_new_tokens=3), 0

    def requests() -> Iterator[Request]:
        nonlocal read
        for request in ask(PROMPTS * 2, ours.settings):
            read += 1
            yield request

    for done, _ in enumerate(ours.generate(requests()), start=1):
        assert read - done <= (WINDOW_BATCHES + 1) * 4


def test_the_cache_stays_within_batch_tokens(
    responder: Callable[..., TransformersResponder], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    admit = Slots.admit

    def watched(slots: Slots, *args: Any) -> None:
        admit(slots, *args)
        keys = slots._store[0][0]
        sizes.append(keys.shape[0] * keys.shape[2])

    monkeypatch.setattr(Slots, "admit", watched)
    ours = responder(batch_size=64, batch_tokens=512)
    long = ["sea " * 90, *PROMPTS, "moon " * 80, *PROMPTS]
    assert len(list(ours.generate(ask(long, ours.settings)))) == len(long) * 3
    assert max(sizes) <= 512
    assert len(set(sizes)) > 1


def test_more_samples_than_rows(responder: Callable[..., TransformersResponder]) -> None:
    ours = responder(samples=5, batch_size=2)
    assert len(answers(ours.generate(ask(PROMPTS[:3], ours.settings)))) == 15


def test_bad_prompts_are_replies_and_the_rest_goes_on(responder: Callable[..., TransformersResponder]) -> None:
    ours = responder(samples=2)
    prompts = ["", "why is the sea", "\ud800", "sea " * 400, "moon"]
    replies = list(ours.generate(ask(prompts, ours.settings)))
    assert len(replies) == 10
    assert {r.id for r in replies if r.finish_reason == "error"} == {"p0", "p2", "p3"}
    assert all(bool(r.error) == (r.finish_reason == "error") for r in replies)


def test_nothing_asked_nothing_done(responder: Callable[..., TransformersResponder]) -> None:
    assert list(responder().generate([])) == []


def test_base_models_stop_at_the_next_turn() -> None:
    tokenizer = build_tokenizer(template=None)
    model = build_model(len(tokenizer))
    ours = TransformersResponder.of(tiny_settings(samples=1, max_new_tokens=40), model, tokenizer)
    script = tokenizer(" the sea\n\nUser: and")["input_ids"]
    plain = model.forward

    def scripted(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        made = int(kwargs["position_ids"][0, 0]) - start
        output.logits[:, -1, script[min(made, len(script) - 1)]] = 1e4
        return output

    start = len(ours.chat.encode("why")) - 1
    model.forward = scripted
    (reply,) = ours.generate(ask(["why"], ours.settings))
    assert (reply.text, reply.finish_reason) == ("the sea", "stop")
    assert reply.tokens < 40


def test_models_with_another_cache_are_refused(tokenizer: Any) -> None:
    config = transformers.BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=2)
    with pytest.raises(GuardLoopError, match=r"cannot run a bloom model(.|\n)*vllm or openai"):
        TransformersResponder.of(tiny_settings(), transformers.BloomForCausalLM(config), tokenizer)


@pytest.mark.parametrize(("changes", "told"), [({"max_prompt_tokens": 600}, "context of 512"), ({}, "window of 64")])
def test_contexts_that_are_too_long_are_refused(tokenizer: Any, changes: dict[str, int], told: str) -> None:
    config = transformers.MistralConfig(**small(len(tokenizer), sliding_window=None if changes else 64))
    with pytest.raises(GuardLoopError, match=rf"{told}(.|\n)*lower its max_prompt_tokens"):
        TransformersResponder.of(tiny_settings(**changes), transformers.MistralForCausalLM(config), tokenizer)


def test_loads_from_a_folder(tiny_folder: Any) -> None:
    settings: ResponderSettings = tiny_settings(model="embedded:tiny", samples=1)
    ours = build_responder(settings, load=str(tiny_folder))
    assert ours.name == "embedded:tiny"
    assert len(list(ours.generate(ask(PROMPTS[:2], settings)))) == 2


def test_bfloat16_generates(tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "pick_dtype", lambda device: torch.bfloat16)
    settings = tiny_settings(samples=2)
    replies = list(build_responder(settings, load=str(tiny_folder)).generate(ask(PROMPTS[:6], settings)))
    assert {r.finish_reason for r in replies} <= {"stop", "length"}
    assert sum(bool(r.text) for r in replies) >= 10


def failing(model: Any, tokenizer: Any, word: str, calls: list[int]) -> Any:
    """The model's forward pass, which fails wherever `word` is in the batch, and counts its batches."""
    plain, marks = model.forward, set(tokenizer(word)["input_ids"])

    def forward(*args: Any, **kwargs: Any) -> Any:
        tokens = kwargs["input_ids"]
        calls.append(len(tokens))
        if any(marks <= set(row) for row in tokens.tolist()):
            raise RuntimeError("CUDA error: an illegal memory access\nmore")
        return plain(*args, **kwargs)

    return forward


def test_a_prompt_that_the_model_fails_on_does_not_cost_the_others(
    responder: Callable[..., TransformersResponder], model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = responder(samples=2)
    prompts = [*PROMPTS[:15], "zq~zq", *PROMPTS[15:30]]
    whole = answers(ours.generate(ask(prompts, ours.settings)))
    calls: list[int] = []
    base = failing(model.base_model, tokenizer, "zq~zq", calls)
    monkeypatch.setattr(model.base_model, "forward", base)
    got = list(ours.generate(ask(prompts, ours.settings)))
    assert [(r.id, r.error) for r in got if r.error] == [
        ("p15", "the model failed on it: CUDA error: an illegal memory access")
    ] * 2
    assert answers(iter(r for r in got if not r.error)) == {row for row in whole if row[0] != "p15"}
    assert max(calls) > 1  # the rest still runs in batches


@pytest.mark.parametrize(
    ("samples", "fitting"), [(1, 3), *(pytest.param(*odd, marks=pytest.mark.slow) for odd in [(2, 3), (4, 3), (4, 1)])]
)
def test_batches_that_do_not_fit_are_halved_for_good(
    responder: Callable[..., TransformersResponder], monkeypatch: pytest.MonkeyPatch, samples: int, fitting: int
) -> None:
    ours = responder(samples=samples)
    expected = answers(ours.generate(ask(PROMPTS, ours.settings)))
    step, sizes = TransformersResponder._step, list[int]()

    def small(self: TransformersResponder, slots: Slots, rows: list[Any]) -> list[Reply]:
        sizes.append(len(rows))
        if len(rows) > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, slots, rows)

    monkeypatch.setattr(TransformersResponder, "_step", small)
    assert answers(ours.generate(ask(PROMPTS, ours.settings))) == expected
    most = ours.batch_size
    assert fitting / 2 <= most <= fitting  # no smaller than it has to be
    failed = [n for n, size in enumerate(sizes) if size > fitting]
    assert len(failed) <= 3  # from 8 rows
    assert max(sizes[failed[-1] + 1 :]) == most  # the rest goes on in batches


def test_a_response_that_does_not_fit_by_itself_is_its_own_error(
    responder: Callable[..., TransformersResponder], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = responder(samples=1)
    longest = max(len(ours.chat.encode(prompt)) for prompt in PROMPTS)
    plain = model.base_model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].shape[1] >= longest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "forward", forward)
    got = list(ours.generate(ask(PROMPTS, ours.settings)))
    assert len(got) == len(PROMPTS)
    failed = {reply.id for reply in got if reply.error}
    assert failed == {f"p{n}" for n, prompt in enumerate(PROMPTS) if len(ours.chat.encode(prompt)) == longest}


def test_a_closed_responder_holds_no_model(tokenizer: Any) -> None:
    model = build_model(len(tokenizer))
    alive = weakref.ref(model)
    ours = TransformersResponder.of(tiny_settings(), model, tokenizer)
    del model
    assert alive() is not None
    ours.close()
    assert alive() is None
