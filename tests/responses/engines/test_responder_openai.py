import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.tiny_responder import ask, screened

from guardloop.core.errors import GuardLoopError
from guardloop.core.records import RESPONSE, read_table, write_table
from guardloop.responses.build import build_responder
from guardloop.responses.engine import Reply
from guardloop.responses.engines import openai
from guardloop.responses.engines.openai import OpenAIResponder, Pace
from guardloop.responses.respond import respond
from guardloop.responses.settings import ResponderSettings

Script = Callable[[dict[str, Any], int], tuple[int, dict[str, str], Any]]


def completion(text: str, finish: str = "stop", tokens: int = 3) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"choices": [choice], "usage": {"completion_tokens": tokens}}


class Endpoint:
    """A real HTTP server. `script(body, attempt)` gives status, headers and content; a float as content drips on."""

    def __init__(self, script: Script) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.busiest = busy = 0
        lock, attempts = threading.Lock(), dict[str, int]()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                nonlocal busy
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    busy += 1
                    endpoint.busiest = max(endpoint.busiest, busy)
                    endpoint.bodies.append(body | {"path": self.path})
                    endpoint.headers.append(dict(self.headers))
                    endpoint.times.append(time.monotonic())
                    key = json.dumps(body)
                    attempts[key] = attempts.get(key, 0) + 1
                status, headers, content = script(body, attempts[key])
                with lock:
                    busy -= 1
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if isinstance(content, float):
                    while not endpoint.closed.wait(content):
                        try:
                            self.wfile.write(b" ")
                            self.wfile.flush()
                        except OSError:
                            return
                else:
                    self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

            def log_message(self, *args: object) -> None:
                pass

        self.closed = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[[Script], Endpoint]]:
    running: list[Endpoint] = []

    def start(script: Script) -> Endpoint:
        running.append(Endpoint(script))
        return running[-1]

    yield start
    for endpoint in running:
        endpoint.close()


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(openai, "ATTEMPTS", 3)


def settings_for(url: str, **changes: Any) -> ResponderSettings:
    values = {"kind": "openai", "model": "m", "base_url": url, "samples": 1, "concurrency": 4, "timeout_seconds": 20}
    return ResponderSettings.model_validate(values | changes)


def replies(endpoint: Endpoint, prompts: list[str], **changes: Any) -> list[Reply]:
    settings = settings_for(endpoint.url, **changes)
    return sorted(OpenAIResponder(settings).generate(ask(prompts, settings)), key=lambda r: (r.id, r.sample))


def echo(body: dict[str, Any], attempt: int) -> tuple[int, dict[str, str], Any]:
    return 200, {}, completion(f" {body['messages'][-1]['content']}! ")


def test_asks_as_the_api_wants(serve: Callable[[Script], Endpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret\n")
    endpoint = serve(echo)
    settings = settings_for(endpoint.url + "/", samples=2, api_key_env="SOME_KEY", system_prompt="be kind", seed=3)
    got = list(build_responder(settings).generate(ask(["hi", "été"], settings)))
    assert {(r.id, r.sample, r.text, r.finish_reason, r.tokens) for r in got} == {
        (id, sample, text, "stop", 3) for id, text in (("p0", "hi!"), ("p1", "été!")) for sample in (0, 1)
    }
    body = next(b for b in endpoint.bodies if b["messages"][1]["content"] == "hi")
    assert body["path"] == "/v1/chat/completions"
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"]) == ("m", 96, 0.7, 0.9)
    assert body["messages"][0] == {"role": "system", "content": "be kind"}
    assert len({b["seed"] for b in endpoint.bodies}) == 4
    assert {h["Authorization"] for h in endpoint.headers} == {"Bearer sk-secret"}


def test_finish_reasons_and_missing_parts(serve: Callable[[Script], Endpoint]) -> None:
    answers = {
        "long": completion("x", "length"),
        "filtered": completion("", "content_filter"),
        "null": {"choices": [{"message": {"content": None}}]},
    }
    endpoint = serve(lambda body, attempt: (200, {}, answers[body["messages"][-1]["content"]]))
    got = {r.id: (r.text, r.finish_reason, r.tokens) for r in replies(endpoint, list(answers))}
    assert got == {"p0": ("x", "length", 3), "p1": ("", "stop", 3), "p2": ("", "stop", 0)}


def test_server_errors_are_tried_again(serve: Callable[[Script], Endpoint]) -> None:
    endpoint = serve(lambda body, attempt: (500, {}, b"oops") if attempt == 1 else echo(body, attempt))
    assert [r.text for r in replies(endpoint, ["a", "b"])] == ["a!", "b!"]
    assert len(endpoint.bodies) == 4


def test_retry_after_is_kept(serve: Callable[[Script], Endpoint]) -> None:
    endpoint = serve(lambda body, n: (429, {"Retry-After": "0.4"}, b"") if n == 1 else echo(body, n))
    assert [r.text for r in replies(endpoint, ["a"])] == ["a!"]
    assert endpoint.times[1] - endpoint.times[0] >= 0.4


def test_retry_after_may_be_a_date(serve: Callable[[Script], Endpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "LONGEST_WAIT_SECONDS", 0.3)
    for value, least in (("Wed, 21 Oct 2099 07:28:00 GMT", 0.3), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("soon", 0)):
        endpoint = serve(lambda body, n, v=value: (503, {"Retry-After": v}, b"") if n == 1 else echo(body, n))
        assert [r.text for r in replies(endpoint, ["a"])] == ["a!"]
        assert least <= endpoint.times[1] - endpoint.times[0] < least + 5


@pytest.mark.slow
def test_too_many_requests_hold_all_of_them(serve: Callable[[Script], Endpoint]) -> None:
    refused = threading.Event()

    def script(body: dict[str, Any], attempt: int) -> tuple[int, dict[str, str], Any]:
        if not refused.is_set():
            refused.set()
            return 429, {"Retry-After": "1"}, b""
        time.sleep(0.2)
        return echo(body, attempt)

    endpoint = serve(script)
    assert all(r.finish_reason == "stop" for r in replies(endpoint, ["a"] * 6, concurrency=2))
    assert sum(t - endpoint.times[0] < 0.9 for t in endpoint.times) <= 2  # what was under way already


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_names_the_variable(
    serve: Callable[[Script], Endpoint], monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    endpoint = serve(lambda body, attempt: (status, {}, b"bad key sk-secret"))
    with pytest.raises(GuardLoopError, match="SOME_KEY") as told:
        replies(endpoint, ["a"] * 20, api_key_env="SOME_KEY")
    assert "sk-secret" not in str(told.value)
    with pytest.raises(GuardLoopError, match=r"responder\.api_key_env"):
        replies(endpoint, ["a"])


def test_a_prompt_that_a_filter_forbids_is_an_error_of_its_own(
    serve: Callable[[Script], Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai, "FIRST_WAIT_SECONDS", 0.2)
    monkeypatch.setattr(openai, "ATTEMPTS", 6)

    def filtered(body: dict[str, Any], attempt: int) -> tuple[int, dict[str, str], Any]:
        return (403, {}, b"blocked by policy") if body["messages"][-1]["content"] == "bomb" else echo(body, attempt)

    got = replies(serve(filtered), ["bomb", "a", "bomb", "b"])  # the first one is refused before any answer
    assert [r.error for r in got] == ["the endpoint answered 403: blocked by policy", None] * 2
    assert [r.text for r in got[1::2]] == ["a!", "b!"]


def test_a_missing_key_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(GuardLoopError, match=r"SOME_KEY is not set(.|\n)*export SOME_KEY"):
        OpenAIResponder(settings_for("http://localhost:1/v1", api_key_env="SOME_KEY"))


@pytest.mark.parametrize("key", ["sk-secret\nsk-other", "sk-secr\u00e9t", "sk-secret\x01"])
def test_what_cannot_be_a_key_is_told_and_not_repeated(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(GuardLoopError, match="value of SOME_KEY cannot be a key") as told:
        OpenAIResponder(settings_for("http://localhost:1/v1", api_key_env="SOME_KEY"))
    assert "sk-" not in str(told.value)


def test_an_unknown_model_is_told(serve: Callable[[Script], Endpoint]) -> None:
    with pytest.raises(GuardLoopError, match="has no model m"):
        replies(serve(lambda body, attempt: (404, {}, b"")), ["a"])


def test_no_endpoint_at_all_is_told(serve: Callable[[Script], Endpoint]) -> None:
    endpoint = serve(echo)
    endpoint.close()
    with pytest.raises(GuardLoopError, match="does not answer: connection failed"):
        replies(endpoint, ["a"])


@pytest.mark.slow
@pytest.mark.parametrize("drip", [0.05, 30.0])
def test_an_answer_that_never_ends_is_given_up(serve: Callable[[Script], Endpoint], drip: float) -> None:
    endpoint = serve(lambda body, n: (200, {}, drip if body["messages"][-1]["content"] == "b" else completion("fine")))
    started = time.monotonic()
    got = replies(endpoint, ["a", "b"], timeout_seconds=0.6, concurrency=1)
    assert [r.finish_reason for r in got] == ["stop", "error"]
    assert got[1].error == "no answer within 0.6 s"
    assert time.monotonic() - started < 10
    with pytest.raises(GuardLoopError, match=r"does not answer: no answer within 0\.3 s"):
        replies(endpoint, ["b"], timeout_seconds=0.3)


def test_what_is_refused_for_one_prompt_is_an_error_of_its_own(serve: Callable[[Script], Endpoint]) -> None:
    def script(body: dict[str, Any], attempt: int) -> tuple[int, dict[str, str], Any]:
        content = body["messages"][-1]["content"]
        if content == "long":
            return 400, {}, b"context length exceeded"
        return (200, {}, b"<html>") if content == "html" else echo(body, attempt)

    endpoint = serve(script)
    got = {r.id: r for r in replies(endpoint, ["a", "long", "html", "", "\ud800"])}
    assert {id for id, r in got.items() if r.finish_reason == "error"} == {"p1", "p2", "p3", "p4"}
    assert got["p1"].error == "the endpoint answered 400: context length exceeded"
    assert got["p2"].error == "the endpoint's answer is not a chat completion"
    assert len(endpoint.bodies) == 3


def test_answers_without_end_are_cut_off(serve: Callable[[Script], Endpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "LARGEST_ANSWER", 1000)
    endpoint = serve(lambda body, attempt: (200, {}, completion("x" * 2000)))
    assert replies(endpoint, ["a"])[0].error == "the endpoint's answer is too large"


def test_concurrency_and_read_ahead_are_bounded(serve: Callable[[Script], Endpoint]) -> None:
    def slow(body: dict[str, Any], attempt: int) -> tuple[int, dict[str, str], Any]:
        time.sleep(0.03)
        return echo(body, attempt)

    endpoint = serve(slow)
    settings = settings_for(endpoint.url)
    read = done = 0

    def requests() -> Iterator[Any]:
        nonlocal read
        for request in ask(["a"] * 40, settings):
            read += 1
            yield request

    for _ in OpenAIResponder(settings).generate(requests()):
        done += 1
        assert read - done <= 2 * settings.concurrency
    assert done == 40
    assert 2 <= endpoint.busiest <= 4


@pytest.mark.slow
def test_a_hold_is_for_those_too_who_wait_for_their_turn_and_costs_no_more_than_itself() -> None:
    pace, stop, went = Pace(600), threading.Event(), list[float]()  # a turn every 0.1 s

    def go() -> None:
        pace.wait(stop)
        went.append(time.monotonic())

    threads = [threading.Thread(target=go) for _ in range(20)]
    for thread in threads:
        thread.start()
    while not went:
        time.sleep(0.001)
    held = time.monotonic()
    pace.hold(0.6)
    for thread in threads:
        thread.join()
    late = sorted(when for when in went if when > held)
    assert len(late) >= 18 and late[0] >= held + 0.6
    assert all(b - a > 0.05 for a, b in pairwise(late))
    assert late[0] < held + 1.6  # not after the turns that those behind it had been given


def test_the_rate_is_kept(serve: Callable[[Script], Endpoint]) -> None:
    endpoint = serve(echo)
    replies(endpoint, ["a"] * 6, requests_per_minute=600)
    assert endpoint.times[-1] - endpoint.times[0] >= 0.45


def test_can_be_left_in_the_middle(serve: Callable[[Script], Endpoint]) -> None:
    endpoint = serve(lambda body, n: echo(body, n) if body["messages"][-1]["content"] == "a" else (503, {}, b""))
    settings = settings_for(endpoint.url, requests_per_minute=120, concurrency=2)
    stream = OpenAIResponder(settings).generate(ask(["a", *["b"] * 30], settings))
    next(stream)
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 1


BROKEN = {
    "500": (500, {}, b"oops"),
    "503": (503, {"Retry-After": "0"}, b""),
    "gzip": (200, {"Content-Encoding": "gzip"}, b"not gzip"),
    "html": (200, {}, b"<html>"),
    "cut off": (200, {}, b'{"choices": [{"message": {"con'),
    "deep": (200, {}, b"[" * 100_000),
    "empty": (200, {}, b""),
    "no choice": (200, {}, {"choices": []}),
    "null": (200, {}, None),
    "odd usage": (200, {}, {"choices": [{"message": {"content": "x"}}], "usage": {"completion_tokens": "many"}}),
    "400": (400, {}, {"error": {"message": "context length exceeded"}}),
    "413": (413, {}, b""),
    "422": (422, {}, b""),
}


def test_whatever_an_endpoint_does_to_one_prompt_the_others_are_answered(serve: Callable[[Script], Endpoint]) -> None:
    endpoint = serve(lambda body, n: BROKEN.get(body["messages"][-1]["content"]) or echo(body, n))
    good = [f"good {i}" for i in range(8)]
    rows = screened([*good, *BROKEN, ""])
    settings = settings_for(endpoint.url, max_error_share=0.9)
    made = {row["id"]: row for row in respond(rows, OpenAIResponder(settings), settings)}
    failed = {id for id, row in made.items() if row["finish_reason"] == "error"}
    assert failed == {row["id"] for row in rows[len(good) :]}
    assert [made[f"p{i}"]["response"] for i in range(8)] == [f"{text}!" for text in good]
    with pytest.raises(GuardLoopError, match=r"14 of 22 responses could not be generated"):
        strict = settings_for(endpoint.url, max_error_share=0.5)
        list(respond(rows, OpenAIResponder(strict), strict))


def test_an_answer_that_is_no_unicode_is_kept_as_far_as_it_is(
    serve: Callable[[Script], Endpoint], tmp_path: Path
) -> None:
    half = b'{"choices": [{"message": {"content": "half \\ud83d a pair"}, "finish_reason": "stop"}]}'
    settings = settings_for(serve(lambda body, n: (200, {}, half)).url)
    made = respond(screened(["a"]), OpenAIResponder(settings), settings)
    assert write_table(made, RESPONSE, tmp_path / "r.parquet") == 1
    assert next(read_table(tmp_path / "r.parquet"))["response"] == "half ? a pair"


def test_a_refusal_in_a_field_of_its_own_is_read(serve: Callable[[Script], Endpoint]) -> None:
    refusal = {"choices": [{"message": {"content": None, "refusal": "I'm sorry, I can't help with that."}}]}
    settings = settings_for(serve(lambda body, n: (200, {}, refusal)).url)
    (row,) = respond(screened(["a"]), OpenAIResponder(settings), settings)
    assert row["refusal"]


def test_long_prompts_are_not_sent(serve: Callable[[Script], Endpoint], tiny_folder: Path) -> None:
    endpoint = serve(echo)
    prompts = ["sea " * 200, "sea"]
    estimated = replies(endpoint, prompts, max_prompt_tokens=100)
    counted = replies(endpoint, prompts, max_prompt_tokens=100, tokenizer=str(tiny_folder))
    assert [r.finish_reason for r in estimated] == [r.finish_reason for r in counted] == ["error", "stop"]
    assert estimated[0].error == "the prompt has 800 bytes, likely more than max_prompt_tokens=100 tokens"
    assert counted[0].error == "the prompt has more than max_prompt_tokens=100 tokens"
    assert len(endpoint.bodies) == 2
