import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.tiny_responder import ask, screened

from guardloop.core.errors import GuardLoopError
from guardloop.core.records import RESPONSE, read_table, write_table
from guardloop.responses.build import build_responder
from guardloop.responses.engine import Reply
from guardloop.responses.engines import openai
from guardloop.responses.engines.openai import OpenAIResponder
from guardloop.responses.respond import respond
from guardloop.responses.settings import ResponderSettings

Script = Callable[[dict[str, Any], int], tuple[int, dict[str, str], Any]]
Serve = Callable[..., Any]


def completion(text: str, finish: str = "stop", tokens: int = 3) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"choices": [choice], "usage": {"completion_tokens": tokens}}


class Endpoint:
    """A real HTTP server. `script(body, attempt)` gives status, headers and content; a float as content drips on.

    The first request, which only says hello, is answered well unless the endpoint `is_strict`; it is not in the lists.
    """

    def __init__(self, script: Script, is_strict: bool = False) -> None:
        self.is_strict, self.greetings = is_strict, 0
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.busiest = busy = 0
        endpoint, lock, attempts = self, threading.Lock(), dict[str, int]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                nonlocal busy
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                hello = body["messages"][-1]["content"] == "Hello."
                with lock:
                    busy += 1
                    endpoint.busiest = max(endpoint.busiest, busy)
                    if not hello:
                        endpoint.bodies.append(body | {"path": self.path})
                        endpoint.headers.append(dict(self.headers))
                        endpoint.times.append(time.monotonic())
                    key = json.dumps(body)
                    attempts[key] = attempts.get(key, 0) + 1
                endpoint.greetings += hello
                if hello and not endpoint.is_strict:
                    status, headers, content = 200, {}, completion("Hi.")
                else:
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
def serve() -> Iterator[Serve]:
    running: list[Endpoint] = []

    def start(script: Script, is_strict: bool = False) -> Endpoint:
        running.append(Endpoint(script, is_strict))
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


def test_asks_as_the_api_wants(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret\n")
    endpoint = serve(echo)
    settings = settings_for(endpoint.url + "/", samples=2, api_key_env="SOME_KEY", system_prompt="be kind")
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


def test_server_errors_are_tried_again(serve: Serve) -> None:
    endpoint = serve(lambda body, attempt: (500, {}, b"oops") if attempt == 1 else echo(body, attempt))
    assert [r.text for r in replies(endpoint, ["a", "b"])] == ["a!", "b!"]
    assert len(endpoint.bodies) == 4


def test_retry_after_is_kept(serve: Serve) -> None:
    endpoint = serve(lambda body, n: (429, {"Retry-After": "0.4"}, b"") if n == 1 else echo(body, n))
    assert [r.text for r in replies(endpoint, ["a"])] == ["a!"]
    assert endpoint.times[1] - endpoint.times[0] >= 0.4


def test_retry_after_may_be_a_date(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "LONGEST_WAIT_SECONDS", 0.3)
    for value, least in (("Wed, 21 Oct 2099 07:28:00 GMT", 0.3), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("soon", 0)):
        endpoint = serve(lambda body, n, v=value: (503, {"Retry-After": v}, b"") if n == 1 else echo(body, n))
        assert [r.text for r in replies(endpoint, ["a"])] == ["a!"]
        assert least <= endpoint.times[1] - endpoint.times[0] < least + 5


@pytest.mark.slow
def test_too_many_requests_hold_all_of_them(serve: Serve) -> None:
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


def test_no_endpoint_at_all_is_told(serve: Serve) -> None:
    endpoint = serve(echo)
    endpoint.close()
    with pytest.raises(GuardLoopError, match="does not answer: connection failed"):
        replies(endpoint, ["a"])


@pytest.mark.slow
@pytest.mark.parametrize("drip", [0.05, 30.0])
def test_an_answer_that_never_ends_is_given_up(serve: Serve, drip: float) -> None:
    endpoint = serve(lambda body, n: (200, {}, drip if body["messages"][-1]["content"] == "b" else completion("fine")))
    started = time.monotonic()
    got = replies(endpoint, ["a", "b"], timeout_seconds=0.6, concurrency=1)
    assert [r.finish_reason for r in got] == ["stop", "error"]
    assert got[1].error == "no answer within 0.6 s"
    assert time.monotonic() - started < 10
    silent = serve(lambda body, n: (200, {}, drip), is_strict=True)
    with pytest.raises(GuardLoopError, match=r"does not answer: no answer within 0\.3 s"):
        replies(silent, ["b"], timeout_seconds=0.3)


def test_what_is_refused_for_one_prompt_is_an_error_of_its_own(serve: Serve) -> None:
    def script(body: dict[str, Any], attempt: int) -> tuple[int, dict[str, str], Any]:
        content = body["messages"][-1]["content"]
        if content == "long":
            return 400, {}, b"context length exceeded"
        return (200, {}, b"<html>") if content == "html" else echo(body, attempt)

    endpoint = serve(script)
    got = {r.id: r for r in replies(endpoint, ["a", "long", "html", "", "\ud800"])}
    assert {id for id, r in got.items() if r.finish_reason == "error"} == {"p1", "p2", "p3", "p4"}
    assert got["p1"].error == "the endpoint answered 400: context length exceeded"
    assert got["p2"].error == "the endpoint's answer is not JSON"
    assert len(endpoint.bodies) == 2 + openai.ATTEMPTS  # what is broken is tried again


def test_answers_without_end_are_cut_off(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "LARGEST_ANSWER", 1000)
    endpoint = serve(lambda body, attempt: (200, {}, completion("x" * 2000)))
    assert replies(endpoint, ["a"])[0].error == "the endpoint answered 200: the answer is too large"


def test_concurrency_and_read_ahead_are_bounded(serve: Serve) -> None:
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


def test_can_be_left_in_the_middle(serve: Serve) -> None:
    endpoint = serve(lambda body, n: echo(body, n) if body["messages"][-1]["content"] == "a" else (503, {}, b""))
    settings = settings_for(endpoint.url, concurrency=2)
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
    "null": (200, {}, None),
    "number": (200, {}, 7),
    "odd choice": (200, {}, {"choices": ["x"]}),
    "400": (400, {}, {"error": {"message": "context length exceeded"}}),
    "413": (413, {}, b""),
    "422": (422, {}, b""),
}


def test_whatever_an_endpoint_does_to_one_prompt_the_others_are_answered(serve: Serve) -> None:
    endpoint = serve(lambda body, n: BROKEN.get(body["messages"][-1]["content"]) or echo(body, n))
    good = [f"good {i}" for i in range(8)]
    rows = screened([*good, *BROKEN, ""])
    settings = settings_for(endpoint.url)
    made = {row["id"]: row for row in respond(rows, OpenAIResponder(settings), settings, max_error_share=0.9)}
    failed = {id for id, row in made.items() if row["finish_reason"] == "error"}
    assert failed == {row["id"] for row in rows[len(good) :]}
    assert [made[f"p{i}"]["response"] for i in range(8)] == [f"{text}!" for text in good]
    with pytest.raises(GuardLoopError, match=r"14 of 22 responses could not be generated"):
        list(respond(rows, OpenAIResponder(settings), settings, max_error_share=0.5))


def test_an_answer_that_is_no_unicode_is_kept_as_far_as_it_is(serve: Serve, tmp_path: Path) -> None:
    half = b'{"choices": [{"message": {"content": "half \\ud83d a pair"}, "finish_reason": "stop"}]}'
    settings = settings_for(serve(lambda body, n: (200, {}, half)).url)
    made = respond(screened(["a"]), OpenAIResponder(settings), settings)
    assert write_table(made, RESPONSE, tmp_path / "r.parquet") == 1
    assert next(read_table(tmp_path / "r.parquet"))["response"] == "half ? a pair"


def test_long_prompts_are_not_sent(serve: Serve) -> None:
    endpoint = serve(echo)
    got = replies(endpoint, ["sea " * 200, "sea"], max_prompt_tokens=100)
    assert [r.finish_reason for r in got] == ["error", "stop"]
    assert got[0].error == "the prompt has 800 bytes, likely more than max_prompt_tokens=100 tokens"
    assert len(endpoint.bodies) == 1


# What endpoints were reported to answer, and what becomes of it


def said(message: dict[str, Any], finish: str | None = "stop", **choice: Any) -> dict[str, Any]:
    return {"choices": [{"message": message, "finish_reason": finish, **choice}], "usage": {"completion_tokens": 3}}


AZURE_FILTER = {"hate": {"filtered": False, "severity": "safe"}, "violence": {"filtered": True, "severity": "high"}}
REPORTED = {
    # name: (the body of a 200, the text that is judged, the kind)
    "plain": (completion(" yes "), "yes", "stop"),
    "cut off": (completion("yes", "length"), "yes", "length"),
    "no reason to end": (said({"content": "yes"}, None), "yes", "stop"),
    "an error field that is null": ({**completion("yes"), "error": None}, "yes", "stop"),
    "a mark at the start": (b"\xef\xbb\xbf" + json.dumps(completion("yes")).encode(), "yes", "stop"),
    "odd usage": ({**completion("yes"), "usage": {"completion_tokens": "many"}}, "yes", "stop"),
    # thoughts
    "reasoning beside": (said({"content": "yes", "reasoning_content": "hm"}), "yes", "stop"),
    "reasoning_content alone": (said({"content": None, "reasoning_content": "hm"}, "length"), "", "thinking"),
    "reasoning alone": (said({"content": "", "reasoning": "hm"}), "", "thinking"),
    "think block": (completion("<think>\nhm\n</think>\n\nyes"), "yes", "stop"),
    "two think blocks": (completion("<think>a</think> <think>b</think> yes"), "yes", "stop"),
    "empty think block": (completion("<think>\n\n</think>\n\n"), "", "thinking"),
    "unclosed think block": (completion("<think>\nFirst, the user", "length"), "", "thinking"),
    "unopened think block": (completion("First, the user</think>yes"), "yes", "stop"),
    "other brackets": (completion("[THINK]hm[/THINK]yes"), "yes", "stop"),
    "channels": (
        completion("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes<|return|>"),
        "yes",
        "stop",
    ),
    "channels without a final one": (completion("<|channel|>analysis<|message|>hm", "length"), "", "thinking"),
    "channels without their marks": (completion("analysisWe need a word. Fine.assistantfinalyes"), "yes", "stop"),
    "a word on channels": (completion("analysis of the text: yes"), "analysis of the text: yes", "stop"),
    "a word on thoughts": (completion("In HTML, <think> is no tag."), "In HTML, <think> is no tag.", "stop"),
    "length without a word": (said({"content": ""}, "length"), "", "thinking"),
    "reasoning tokens alone": (
        {**said({"content": ""}), "usage": {"completion_tokens_details": {"reasoning_tokens": 96}}},
        "",
        "thinking",
    ),
    # parts
    "parts": (said({"content": [{"type": "text", "text": "ye"}, {"type": "output_text", "text": "s"}]}), "yes", "stop"),
    "parts that think": (
        said({"content": [{"type": "thinking", "thinking": [{"text": "hm"}]}, {"type": "text", "text": "yes"}]}),
        "yes",
        "stop",
    ),
    "a list of texts": (said({"content": ["y", "es"]}), "yes", "stop"),
    "an image": (said({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}), "", "empty"),
    # refusals
    "refusal": (said({"content": None, "refusal": "I can't help."}), "I can't help.", "stop"),
    "refusal as a part": (
        said({"content": [{"type": "refusal", "refusal": "I can't help."}]}),
        "I can't help.",
        "stop",
    ),
    # tools
    "tool call": (said({"content": None, "tool_calls": [{"function": {"name": "f"}}]}, "tool_calls"), "", "tool_call"),
    "tool call with a text": (said({"content": "yes", "tool_calls": [{}]}, "tool_calls"), "yes", "stop"),
    "function call": (said({"content": "", "function_call": {"name": "f"}}, "function_call"), "", "tool_call"),
    # filters of the provider
    "content_filter": (said({"content": ""}, "content_filter"), "", "filtered"),
    "content_filter within a text": (said({"content": "First, take"}, "content_filter"), "", "filtered"),
    "Azure's verdict": (said({"content": None}, content_filter_results=AZURE_FILTER), "", "filtered"),
    "Gemini's safety": (said({"content": None}, None, native_finish_reason="SAFETY"), "", "filtered"),
    "Gemini's form": (said({"content": None}, "content_filter: PROHIBITED_CONTENT"), "", "filtered"),
    "no choice, and Azure's verdict on the prompt": (
        {"choices": [], "prompt_filter_results": [{"content_filter_results": AZURE_FILTER}]},
        "",
        "prompt_filtered",
    ),
    "an error object of a filter": ({"error": {"code": "content_filter", "message": "no"}}, "", "prompt_filtered"),
    # nothing
    "null": (said({"content": None}), "", "empty"),
    "null in all fields": (said({"content": None, "reasoning": None, "tool_calls": [], "refusal": None}), "", "empty"),
    "Azure's filter that names none": (
        {**said({"content": None}, "content_filter"), "prompt_filter_results": [{"hate": {"filtered": False}}]},
        "",
        "filtered",
    ),
    "no choices": ({"choices": []}, "", "empty"),
    "choices null": ({"choices": None}, "", "empty"),
    "filters that found nothing": (
        {"choices": [], "prompt_filter_results": [{"hate": {"filtered": False}}]},
        "",
        "empty",
    ),
}


@pytest.mark.parametrize("name", REPORTED)
def test_what_endpoints_answer_is_what_a_user_would_have_seen(serve: Serve, name: str) -> None:
    body, text, kind = REPORTED[name]
    endpoint = serve(lambda asked, attempt: (200, {}, body))
    (reply,) = replies(endpoint, ["a"])
    assert (reply.text, reply.finish_reason) == (text, kind)
    assert reply.refused == ("refusal" in name)
    assert len(endpoint.bodies) == (openai.EMPTY_ATTEMPTS if kind == "empty" else 1)


def test_refusals_of_the_endpoint_are_tagged_and_silence_is_kept_by_its_kind(serve: Serve) -> None:
    endpoint = serve(lambda body, attempt: (200, {}, REPORTED[body["messages"][-1]["content"]][0]))
    settings = settings_for(endpoint.url)
    made = list(respond(screened([*REPORTED]), OpenAIResponder(settings), settings, max_error_share=0.5))
    by_name = dict(zip(REPORTED, sorted(made, key=lambda row: int(row["id"][1:])), strict=True))
    assert {name for name, row in by_name.items() if row["refusal"]} == {"refusal", "refusal as a part"}
    assert {name: row["finish_reason"] for name, row in by_name.items()} == {n: r[2] for n, r in REPORTED.items()}


def test_an_empty_answer_may_come_right(serve: Serve) -> None:
    endpoint = serve(lambda body, n: (200, {}, said({"content": None})) if n == 1 else echo(body, n))
    assert [r.text for r in replies(endpoint, ["a", "b"])] == ["a!", "b!"]


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "upstream is overloaded", "code": 503}},
        {"error": "upstream is overloaded"},
        {"choices": [{"error": {"message": "upstream is overloaded"}, "finish_reason": "error"}]},
        b'{"choices": [{"message": {"con',
        b"<html>",
    ],
    ids=str,
)
def test_a_good_status_with_a_bad_body_is_tried_again(serve: Serve, body: Any) -> None:
    endpoint = serve(lambda asked, n: (200, {}, body) if n < 3 else echo(asked, n))
    assert [r.text for r in replies(endpoint, ["a"])] == ["a!"]
    endpoint = serve(lambda asked, n: (200, {}, body))
    assert replies(endpoint, ["a"])[0].finish_reason == "error"


PROMPT_FILTERS = {
    "Azure": (400, {"error": {"code": "content_filter", "param": "prompt", "message": "The response was filtered"}}),
    "Azure's inner error": (400, {"error": {"innererror": {"content_filter_result": AZURE_FILTER}, "message": "no"}}),
    "OpenAI": (400, {"error": {"code": "content_policy_violation", "message": "rejected by our safety system"}}),
    "OpenRouter": (403, {"error": {"code": 403, "message": "Your input was flagged", "metadata": {"reasons": ["x"]}}}),
    "Alibaba": (400, {"code": "data_inspection_failed", "message": "Input data may contain inappropriate content."}),
    "a gateway": (403, b"blocked by the content policy"),
    "LiteLLM's inner error": (
        400,
        {
            "error": {
                "message": "no",
                "provider_specific_fields": {"innererror": {"content_filter_result": AZURE_FILTER}},
            }
        },
    ),
    "LiteLLM": (400, {"error": {"message": "litellm.ContentPolicyViolationError: content_policy", "code": "400"}}),
}


@pytest.mark.parametrize("name", PROMPT_FILTERS)
def test_a_filter_of_prompts_gives_evidence_and_never_ends_a_run(serve: Serve, name: str) -> None:
    status, body = PROMPT_FILTERS[name]
    endpoint = serve(
        lambda asked, n: (status, {}, body) if "bomb" in asked["messages"][-1]["content"] else echo(asked, n)
    )
    settings = settings_for(endpoint.url)
    rows = screened([*["bomb"] * 18, "a", "b"])
    made = list(respond(rows, OpenAIResponder(settings), settings, max_error_share=0.0))
    assert [row["finish_reason"] for row in made].count("prompt_filtered") == 18
    assert len(endpoint.bodies) == 20  # none is asked again


# Parameters that an endpoint does not take

REFUSALS = {
    # what is refused: (status, body)
    "max_tokens": (
        400,
        {
            "error": {
                "message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                "'max_completion_tokens' instead.",
                "type": "invalid_request_error",
                "param": "max_tokens",
                "code": "unsupported_parameter",
            }
        },
    ),
    "temperature": (
        400,
        {
            "error": {
                "message": "Unsupported value: 'temperature' does not support 0.7 with this model. Only the default "
                "(1) value is supported.",
                "param": "temperature",
                "code": "unsupported_value",
            }
        },
    ),
    "seed": (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs"}]}),
    "top_p": (400, {"message": "`temperature` and `top_p` cannot both be specified for this model."}),
}


@pytest.mark.parametrize("refused", [*([name] for name in REFUSALS), list(REFUSALS)], ids="+".join)
def test_a_parameter_that_is_refused_is_left_out_once_and_said(
    serve: Serve, refused: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    def picky(body: dict[str, Any], attempt: int) -> tuple[int, dict[str, str], Any]:
        wrong = next((name for name in refused if name in body), None)
        return (*REFUSALS[wrong][:1], {}, REFUSALS[wrong][1]) if wrong else echo(body, attempt)

    endpoint = serve(picky, is_strict=True)
    got = replies(endpoint, ["a"] * 12)
    assert {r.text for r in got} == {"a!"}
    assert not any(name in body for body in endpoint.bodies for name in refused)
    assert all(("max_completion_tokens" in body) == ("max_tokens" in refused) for body in endpoint.bodies)
    assert endpoint.greetings == 1 + len(refused) and len(endpoint.bodies) == 12
    for name in refused:
        assert caplog.text.count(f"takes no {name}, so") == 1


OTHER_REFUSALS = {
    "Gemini": ("seed", [{"error": {"code": 400, "message": 'Unknown name "seed": Cannot find field.'}}]),
    "Moonshot": ("top_p", {"error": {"message": "invalid top_p: only 0.95 is allowed for this model"}}),
    "a search model": (
        "temperature",
        {"error": {"message": "Model incompatible request argument supplied: temperature"}},
    ),
    "a gateway": (
        "top_p",
        {"error": "400 Bad Request", "details": {"error": {"message": "is not supported", "param": "top_p"}}},
    ),
    "NIM": ("seed", {"title": "Unprocessable Entity", "detail": "body -> seed\n  Extra inputs are not permitted"}),
    "Mistral": ("seed", {"message": {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"]}]}}),
}


@pytest.mark.parametrize("name", OTHER_REFUSALS)
def test_other_ways_to_refuse_a_parameter_are_understood(serve: Serve, name: str) -> None:
    parameter, told = OTHER_REFUSALS[name]
    endpoint = serve(lambda body, n: (400, {}, told) if parameter in body else echo(body, n), is_strict=True)
    assert [r.text for r in replies(endpoint, ["a"])] == ["a!"]


def test_a_prompt_cannot_talk_a_parameter_away(serve: Serve) -> None:
    def echoing(body: dict[str, Any], attempt: int) -> tuple[int, dict[str, str], Any]:
        prompt = body["messages"][-1]["content"]
        return (400, {}, {"error": f"refused: {prompt}"}) if "seed" in prompt else echo(body, attempt)

    endpoint = serve(echoing)
    got = replies(endpoint, ["seed is not supported", "a"])
    assert [r.finish_reason for r in got] == ["error", "stop"]
    assert all("seed" in body for body in endpoint.bodies)


def test_a_value_that_is_too_large_is_no_unknown_parameter(serve: Serve) -> None:
    told = {"error": {"message": "max_tokens is too large: 96. This model supports at most 64 tokens", "code": 400}}
    with pytest.raises(GuardLoopError, match=r"refused the first request(.|\n)*supports at most 64"):
        replies(serve(lambda body, n: (400, {}, told), is_strict=True), ["a"])


def test_more_fields_headers_and_a_query_are_sent(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_KEY", "key-of-azure")
    endpoint = serve(echo)
    replies(
        endpoint,
        ["a"],
        base_url=f"{endpoint.url}/deployments/d?api-version=2024-06-01",
        extra_body={"max_completion_tokens": 96.0, "temperature": 1, "reasoning": {"effort": "low"}},
        extra_headers={"api-key": "$AZURE_KEY", "X-Team": "safety"},
    )
    (body,), (headers,) = endpoint.bodies, endpoint.headers
    assert body["path"] == "/v1/deployments/d/chat/completions?api-version=2024-06-01"
    assert (body["max_completion_tokens"], body["temperature"], body["reasoning"]) == (96, 1, {"effort": "low"})
    assert "max_tokens" not in body and isinstance(body["max_completion_tokens"], int)
    assert (headers["api-key"], headers["X-Team"]) == ("key-of-azure", "safety")


# What ends a run, and what does not


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (401, {"error": {"message": "Incorrect API key provided: sk-secret"}}, r"refused the key: .*Incorrect API key"),
        (403, b"no access to this project", r"refused the key: .*no access to this project"),
        (
            404,
            {"error": {"message": "The model `m` does not exist"}},
            r"has no model m, .*The model `m` does not exist",
        ),
        (404, b"", r"has no model m, or is no such endpoint"),
        (400, {"detail": "model m is not served here"}, r"refused the first request: .*model m is not served here"),
        (402, {"error": {"message": "Insufficient credits"}}, r"has no quota left: .*Insufficient credits"),
        (429, {"error": {"code": "insufficient_quota", "message": "pay"}}, r"has no quota left: .*pay"),
        (200, b"<html>Welcome to nginx</html>", r"does not answer: .*not JSON"),
        (200, {"status": "ok"}, r"does not answer: .*not a chat completion"),
        (301, b"", r"refused the first request"),
    ],
)
def test_a_wrong_address_key_or_model_is_found_by_one_request(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, status: int, body: Any, told: str
) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    endpoint = serve(lambda asked, n: (status, {}, body), is_strict=True)
    with pytest.raises(GuardLoopError, match=told) as caught:
        replies(endpoint, ["a"] * 20, api_key_env="SOME_KEY")
    assert not endpoint.bodies and "sk-secret" not in str(caught.value)
    assert "SOME_KEY" in str(caught.value) or status not in (401, 403)


def test_two_refusals_of_the_key_end_a_run_and_one_does_not(serve: Serve) -> None:
    once = serve(lambda body, n: (401, {}, b"") if body["messages"][-1]["content"] == "b" and n == 1 else echo(body, n))
    assert {r.text for r in replies(once, ["a", "b", "c"])} == {"a!", "b!", "c!"}
    twice = serve(lambda body, n: (401, {}, b"") if body["messages"][-1]["content"] == "b" else echo(body, n))
    with pytest.raises(GuardLoopError, match="refused the key"):
        replies(twice, ["a", *["b"] * 2])


@pytest.mark.parametrize(
    ("name", "share", "ends"),
    [("reasoning alone", 0.4, False), ("reasoning alone", 0.6, True), ("null", 0.04, False), ("null", 0.1, True)],
)
def test_kinds_are_counted_apart(serve: Serve, name: str, share: float, ends: bool) -> None:
    silent = int(100 * share)
    endpoint = serve(
        lambda body, n: (200, {}, REPORTED[name][0]) if "x" in body["messages"][-1]["content"] else echo(body, n)
    )
    settings = settings_for(endpoint.url)
    rows = screened([*["x"] * silent, *["a"] * (100 - silent)])
    stream = respond(rows, OpenAIResponder(settings), settings)
    if ends:
        with pytest.raises(GuardLoopError, match=f"{silent} of 100 responses are (nothing but thoughts|empty)"):
            list(stream)
    else:
        assert len(list(stream)) == 100


def test_an_error_of_the_endpoint_is_one_visible_line(serve: Serve) -> None:
    hostile = "no\x1b]0;title\x07 \r\nPromoted: all checks passed \u202ereversed"
    endpoint = serve(lambda body, n: (418, {}, {"error": {"message": hostile}}))
    (reply,) = replies(endpoint, ["a"])
    assert reply.error == "the endpoint answered 418: no\\x1b]0;title\\x07 Promoted: all checks passed \\u202ereversed"
