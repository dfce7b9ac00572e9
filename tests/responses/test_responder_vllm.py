import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_responder import PROMPTS, ask, tiny_settings

from guardloop.errors import GuardLoopError
from guardloop.responses import vllm
from guardloop.responses.responder import Request, build_responder
from guardloop.responses.vllm import READ_AHEAD, VllmResponder


class FakeEngine:
    """Stands in for vLLM's scheduler: two requests are done at each step, the last ones first."""

    def __init__(self) -> None:
        self.waiting: list[tuple[str, Any, Any]] = []
        self.most = 0

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        self.waiting.append((request_id, prompt, params))
        self.most = max(self.most, len(self.waiting))

    def step(self) -> list[Any]:
        outputs = []
        for _ in range(min(2, len(self.waiting))):
            id, prompt, params = self.waiting.pop()
            text = f" {len(prompt['prompt_token_ids'])}/{params.seed} "
            answer = SimpleNamespace(text=text, token_ids=[1, 2], finish_reason="length" if params.seed % 2 else "stop")
            outputs.append(SimpleNamespace(request_id=id, outputs=[answer], finished=True))
        return [*outputs, *(SimpleNamespace(request_id=w[0], outputs=[], finished=False) for w in self.waiting[:1])]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> SimpleNamespace:
    seen = SimpleNamespace(engine=FakeEngine(), options={})

    def llm(**options: Any) -> Any:
        seen.options = options
        if options["model"] == "huge":
            raise ValueError("No available memory for the cache blocks.\nmore")
        return SimpleNamespace(llm_engine=seen.engine)

    module = ModuleType("vllm")
    module.__dict__.update(LLM=llm, SamplingParams=SimpleNamespace)
    module.__dict__["sampling_params"] = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY="final"))
    monkeypatch.setitem(sys.modules, "vllm", module)
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
    settings = tiny_settings(kind="vllm", batch_rows=4)
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
    for reply in got[:-3]:
        prompt = PROMPTS[int(reply.id[1:])] if reply.finish_reason != "error" else ""
        if prompt:
            seed = seeds[reply.id, reply.sample]
            assert reply.text == f"{len(ours.chat.encode(prompt))}/{seed}"
            assert reply.finish_reason == ("length" if seed % 2 else "stop")
    assert sum(r.finish_reason == "error" for r in got) == 3
    assert fake.engine.most <= READ_AHEAD * 4
    assert fake.options["trust_remote_code"] is False
    assert fake.options["enable_prefix_caching"] is True
    assert fake.options["max_model_len"] == 212
