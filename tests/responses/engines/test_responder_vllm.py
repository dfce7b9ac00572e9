import os
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_responder import PROMPTS, ask, tiny_settings

from guardloop.core.errors import GuardLoopError
from guardloop.responses.build import build_responder
from guardloop.responses.engine import Request
from guardloop.responses.engines import vllm
from guardloop.responses.engines.vllm import READ_AHEAD, SEEDED_RUNNER, VllmResponder

BROKEN, DEADLY = 7, 8  # tokens that no ordinary prompt has


class FakeEngine:
    """Stands in for vLLM's scheduler: two requests are done at each step, the last ones first."""

    def __init__(self) -> None:
        self.waiting: list[tuple[str, Any, Any]] = []
        self.most = 0
        self.closed = False
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=4))
        self.engine_core = SimpleNamespace(shutdown=self.close)

    def close(self) -> None:
        self.closed = True

    def abort_request(self, request_ids: list[str]) -> None:
        self.waiting = [w for w in self.waiting if w[0] not in request_ids]

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        if len(prompt["prompt_token_ids"]) > 60:
            raise ValueError("longer than the maximum model length")
        self.waiting.append((request_id, prompt, params))
        self.most = max(self.most, len(self.waiting))

    def step(self) -> list[Any]:
        outputs = []
        for _ in range(min(2, len(self.waiting))):
            id, prompt, params = self.waiting.pop()
            reason = "error" if BROKEN in prompt["prompt_token_ids"] else "length" if params.seed % 2 else "stop"
            if DEADLY in prompt["prompt_token_ids"]:
                raise RuntimeError("EngineCore encountered an issue.")
            tokens = [*prompt["prompt_token_ids"][-4:-2], 1]
            answer = SimpleNamespace(text="", token_ids=tokens, finish_reason=reason)
            outputs.append(SimpleNamespace(request_id=id, outputs=[answer], finished=True))
        return [*outputs, *(SimpleNamespace(request_id=w[0], outputs=[], finished=False) for w in self.waiting[:1])]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> SimpleNamespace:
    seen = SimpleNamespace(engine=FakeEngine(), options={}, runners=[])

    def llm(**options: Any) -> Any:
        seen.options = options
        seen.runners.append(os.environ.get(SEEDED_RUNNER))
        if options["model"] == "old" and seen.runners[-1] == "1":
            raise ValueError("VLLM_USE_V2_MODEL_RUNNER does not yet support: mamba models")
        if options["model"] == "huge":
            raise ValueError("No available memory for the cache blocks.\nmore")
        return SimpleNamespace(llm_engine=seen.engine)

    module = ModuleType("vllm")
    module.__dict__.update(LLM=llm, SamplingParams=SimpleNamespace)
    module.__dict__["inputs"] = SimpleNamespace(tokens_input=lambda tokens: {"prompt_token_ids": tokens})
    module.__dict__["sampling_params"] = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY="final"))
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.inputs", module.__dict__["inputs"])
    monkeypatch.delenv(SEEDED_RUNNER, raising=False)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(vllm, "load_tokenizer", lambda model, revision: tokenizer)
    return seen


def test_a_missing_vllm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(GuardLoopError, match=r"vllm is not usable here(.|\n)*guardloop\[gpu\]"):
        build_responder(tiny_settings(kind="vllm"), load="somewhere")


def test_a_missing_gpu_is_told(fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GuardLoopError, match="needs a GPU"):
        build_responder(tiny_settings(kind="vllm"), load="somewhere")


def test_a_model_that_does_not_fit_is_told(fake: SimpleNamespace) -> None:
    with pytest.raises(GuardLoopError, match=r"cannot serve huge: No available memory for the cache blocks\.\n"):
        VllmResponder(tiny_settings(kind="vllm"), "huge")


def test_feeds_the_scheduler_and_reads_ahead_a_bounded_number(fake: SimpleNamespace) -> None:
    settings = tiny_settings(kind="vllm")
    ours, read = VllmResponder(settings, "org/model"), 0
    asked = ask([*PROMPTS, ""], settings)

    def requests() -> Iterator[Request]:
        nonlocal read
        for request in asked:
            read += 1
            yield request

    got = []
    for reply in ours.generate(requests()):
        got.append(reply)
        assert read - len(got) <= READ_AHEAD * 4
    assert {(r.id, r.sample) for r in got} == {(r.id, r.sample) for r in asked}
    seeds = {(r.id, r.sample): r.seed for r in asked}
    for reply in got:
        if reply.finish_reason == "error":
            continue
        made = [*ours.chat.encode(PROMPTS[int(reply.id[1:])])[-4:-2], 1]
        cut = seeds[reply.id, reply.sample] % 2
        assert reply.finish_reason == ("length" if cut else "stop")
        assert reply.tokens == (3 if cut else 2)  # the token that ends an answer is not one of it
        assert reply.text == ours.chat.tokenizer.decode(made[: reply.tokens], skip_special_tokens=True).strip()
    assert sum(r.finish_reason == "error" for r in got) == 3
    assert fake.engine.most <= READ_AHEAD * 4
    assert fake.options["trust_remote_code"] is False
    assert fake.options["enable_prefix_caching"] is True
    assert fake.options["max_model_len"] == 212
    ours.close()
    assert fake.engine.closed


def test_what_vllm_refuses_or_gives_up_on_is_an_error_of_its_own(fake: SimpleNamespace) -> None:
    settings = tiny_settings(kind="vllm", samples=1)
    ours = VllmResponder(settings, "org/model")
    encode = ours.chat.encode
    ours.chat.encode = lambda prompt: [*encode(prompt)] + [BROKEN] * (prompt == "broken")  # type: ignore[method-assign]
    asked = ask(["moon", "sea " * 90, "broken", "", "\ud800", "why"], settings)
    got = {r.id: r for r in ours.generate(asked)}
    assert {id for id, r in got.items() if r.finish_reason == "error"} == {"p1", "p2", "p3", "p4"}
    assert got["p1"].error == "vLLM refused the prompt: longer than the maximum model length"
    assert got["p2"].error == "vLLM gave up on the prompt: error"


def test_an_engine_that_dies_is_told(fake: SimpleNamespace) -> None:
    settings = tiny_settings(kind="vllm", samples=1)
    ours = VllmResponder(settings, "org/model")
    encode = ours.chat.encode
    ours.chat.encode = lambda prompt: [*encode(prompt)] + [DEADLY] * (prompt == "deadly")  # type: ignore[method-assign]
    with pytest.raises(GuardLoopError, match=r"vLLM stopped working: EngineCore(.|\n)*goes on from there"):
        list(ours.generate(ask(["moon", "deadly", "why"], settings)))
    assert not fake.engine.waiting
    assert len(list(ours.generate(ask(PROMPTS[:3], settings)))) == 3  # nothing of before is left over


def test_seeds_take_the_runner_that_draws_them_fast(fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    VllmResponder(tiny_settings(kind="vllm"), "org/model")
    VllmResponder(tiny_settings(kind="vllm"), "old")
    assert fake.runners == ["1", "1", "0"]
    assert SEEDED_RUNNER not in os.environ
    monkeypatch.setenv(SEEDED_RUNNER, "0")
    VllmResponder(tiny_settings(kind="vllm"), "org/model")
    assert fake.runners[-1] == "0"
