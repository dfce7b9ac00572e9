"""The service answers over HTTP what its guard says, and says so when it cannot."""

import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from support.models import tiny_guard
from support.moderation import Brittle, Registry, Slow, serving

from guardloop.data.settings import SourceSettings
from guardloop.data.sources import read_conversations

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address() -> Any:
    with serving() as (address, _, _):
        yield address


@pytest.fixture(scope="module")
def guard() -> Any:
    return tiny_guard()


def post(address: str, path: str, body: Any, **options: Any) -> requests.Response:
    return requests.post(f"{address}{path}", json=body, timeout=20, **options)


def test_a_check_gives_the_guards_own_verdicts(address: str, guard: Any) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a bomb"}]}
    found = post(address, "/v1/check", body).json()
    wanted = list(guard.score([{"prompt": "hello", "response": None}, {"prompt": "hello", "response": "a bomb"}]))

    assert [m["score"] for m in found["judged"]] == pytest.approx([v.score for v in wanted], abs=1e-5)
    assert [m["flagged"] for m in found["judged"]] == [v.flagged for v in wanted]
    assert found["flagged"] == any(v.flagged for v in wanted)
    assert found["guard"] == "one"


def test_the_worst_message_is_the_answer(address: str) -> None:
    texts = ["hello", "a bomb", "cake", "weapons and more"]
    found = post(address, "/v1/check", {"messages": [{"role": "user", "content": text} for text in texts]}).json()
    flagged = [m for m in found["judged"] if m["flagged"]]
    assert len(found["judged"]) == 4
    assert found["score"] == max(m["score"] for m in flagged or found["judged"])


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 422, "send `messages`, or a `prompt`"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 422, "unknown role 'wizard'"),
        ({"messages": [{"role": "system", "content": "x"}]}, 422, "no message to judge"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, 422, "image_url"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "y"}]}, 422, "send `messages`, or a `prompt`"),
        ({"prompt": "x", "nonsense": 1}, 422, "nonsense"),
        ({"prompt": "x" * 2_000_000}, 413, "larger than"),
        ([1, 2], 422, ""),
    ],
)
def test_what_cannot_be_judged_is_refused_in_words(address: str, body: Any, status: int, words: str) -> None:
    response = post(address, "/v1/check", body)
    assert response.status_code == status
    assert words in response.json()["error"]["message"]


def test_malformed_bodies_never_pass(address: str) -> None:
    for body in (b"", b"{", b"null", b'"x"', b"\xff\xfe", b"{}" * 100, b'{"prompt": 1}', b'{"prompt": null}'):
        response = requests.post(f"{address}/v1/check", data=body, timeout=20)
        assert response.status_code == 422, body


def test_one_bad_message_harms_no_neighbour() -> None:
    with serving(Registry(one=Brittle(tiny_guard(), 0.0))) as (address, _, _):
        body = {"messages": [{"role": "user", "content": text} for text in ("hello", "BREAK", "cake")]}
        closed = post(address, "/v1/check", body).json()
        assert [m["verdict"] == "failed" for m in closed["judged"]] == [False, True, False]
        assert closed["flagged"] and closed["judged"][1]["flagged"]  # fail-closed
        assert 'verdict="failed"' in requests.get(f"{address}/metrics", timeout=20).text
    with serving(Registry(one=Brittle(tiny_guard(), 0.0)), fail_open=True) as (address, _, _):
        opened = post(address, "/v1/check", {"prompt": "BREAK"}).json()
        assert (opened["flagged"], opened["verdict"], bool(opened["judged"][0]["error"])) == (False, "failed", True)


def test_overload_is_refused_and_what_was_accepted_is_answered() -> None:
    slow = Slow(tiny_guard(), 0.2)
    with serving(Registry(one=slow), max_waiting=4) as (address, _, _):
        statuses: Counter[int] = Counter()
        waits: list[str | None] = []

        def ask() -> None:
            response = post(address, "/v1/check", {"prompt": "hello"})
            statuses[response.status_code] += 1
            waits.append(response.headers.get("Retry-After"))

        threads = [threading.Thread(target=ask) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200, 429}
        assert statuses[200] >= 4
        assert sum(wait is not None for wait in waits) == statuses[429]


def test_requests_that_wait_together_are_judged_together() -> None:
    slow = Slow(tiny_guard(), 0.2)
    with serving(Registry(one=slow)) as (address, _, _):
        before = slow.passes
        threads = [threading.Thread(target=post, args=(address, "/v1/check", {"prompt": f"hi {n}"})) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert slow.passes - before <= 4


def test_a_late_request_is_told() -> None:
    with serving(Registry(one=Slow(tiny_guard(), 0.5)), timeout_seconds=0.1) as (address, _, _):
        assert post(address, "/v1/check", {"prompt": "hello"}).status_code == 503


def test_keys_are_asked_for_and_can_be_rotated(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("team-a 0123456789abcdef-a\n")
    with serving(keys=str(keys), requests_per_minute=3) as (address, _, _):

        def status(key: str | None) -> int:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return post(address, "/v1/check", {"prompt": "hello"}, headers=headers).status_code

        assert status(None) == 401
        assert status("wrong-key-0123456789") == 401
        assert status("0123456789abcdef-a") == 200
        time.sleep(0.02)
        keys.write_text("team-a 0123456789abcdef-a\nteam-b 0123456789abcdef-b\n")
        assert status("0123456789abcdef-b") == 200
        assert [status("0123456789abcdef-a") for _ in range(3)].count(429) >= 1
        assert requests.get(f"{address}/health/live", timeout=20).status_code == 200


def test_the_champion_is_followed_and_a_broken_one_is_not_taken() -> None:
    registry = Registry(one=tiny_guard(seed=0), two=tiny_guard(seed=1), broken=Brittle(tiny_guard(), 0.0))
    registry.guards["broken"].score = lambda rows: (_ for _ in ()).throw(RuntimeError("no kernel"))
    with serving(registry) as (address, _, champion):
        first = post(address, "/v1/check", {"prompt": "hello"}).json()
        registry.alias = "two"
        champion.refresh()
        second = post(address, "/v1/check", {"prompt": "hello"}).json()
        assert (first["guard"], second["guard"]) == ("one", "two")
        assert first["score"] != second["score"]
        registry.alias = "broken"
        champion.refresh()
        ready = requests.get(f"{address}/health/ready", timeout=20).json()
        assert ready["guard"] == "two"
        assert "no kernel" in ready["refused"]
        assert "guardloop_champion_refused 1.0" in requests.get(f"{address}/metrics", timeout=20).text
        registry.alias = "one"
        champion.refresh()
        assert requests.get(f"{address}/health/ready", timeout=20).json()["refused"] is None


def test_every_answer_under_reloads_is_of_the_version_it_names() -> None:
    guards = {"one": tiny_guard(seed=0), "two": tiny_guard(seed=1)}
    right = {
        name: next(iter(guard.score([{"prompt": "hello", "response": None}]))).score for name, guard in guards.items()
    }
    registry = Registry(**guards)
    with serving(registry) as (address, _, champion):
        answers: list[dict[str, Any]] = []

        def ask() -> None:
            answers.extend(post(address, "/v1/check", {"prompt": "hello"}).json() for _ in range(15))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for n in range(12):
            registry.alias = ("two", "one")[n % 2]
            champion.refresh()
            time.sleep(0.02)
        for thread in threads:
            thread.join()
        assert len(answers) == 60
        assert all(answer["score"] == pytest.approx(right[answer["guard"]], abs=1e-4) for answer in answers)


def test_the_log_holds_each_request_and_can_be_read_as_traffic(tmp_path: Path) -> None:
    with serving(log=str(tmp_path / "log")) as (address, _, _):
        for n in range(5):
            body = {"messages": [{"role": "user", "content": f"question {n}"}], "conversation": f"c{n}"}
            post(address, "/v1/check", body)
        post(address, "/v1/check", {"prompt": "question 0", "response": "an answer", "conversation": "c0"})
    files = list((tmp_path / "log").glob("date=*/*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
    assert Counter(row["prompt"] for row in rows) == {"question 0": 2, **{f"question {n}": 1 for n in range(1, 5)}}
    assert not list((tmp_path / "log").rglob("*.partial"))
    assert {row["guard"] for row in rows} == {"one"}
    assert {row["conversation"] for row in rows if row["prompt"] == "question 0"} == {"c0"}


def test_a_log_without_text_has_no_text(tmp_path: Path) -> None:
    with serving(log=str(tmp_path / "log"), log_text=False) as (address, _, _):
        post(address, "/v1/check", {"prompt": "a very private question", "response": "a private answer"})
    text = "".join(file.read_text("utf-8") for file in (tmp_path / "log").rglob("*.jsonl"))
    assert text
    assert "private" not in text


def test_what_a_killed_process_left_is_taken_up(tmp_path: Path) -> None:
    left = tmp_path / "log" / "date=2026-01-01" / "120000-abcdef01.jsonl.partial"
    left.parent.mkdir(parents=True)
    left.write_text('{"prompt": "whole"}\n{"prompt": "cut o')
    with serving(log=str(tmp_path / "log")):
        pass
    assert left.with_name("120000-abcdef01.jsonl").read_text() == '{"prompt": "whole"}\n'
    assert not left.exists()


def test_as_openais_moderations(address: str) -> None:
    found = post(address, "/v1/moderations", {"input": ["hello", "a bomb"]}).json()
    assert len(found["results"]) == 2
    assert all(result["flagged"] is result["categories"]["unsafe"] for result in found["results"])
    parts = post(address, "/v1/moderations", {"input": [{"type": "text", "text": "hello"}]}).json()
    both = (parts["results"][0], found["results"][0])
    assert both[0]["flagged"] == both[1]["flagged"]
    assert both[0]["category_scores"]["unsafe"] == pytest.approx(both[1]["category_scores"]["unsafe"], abs=1e-5)


def test_as_a_guard_behind_vllm(address: str) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a bomb"}]
    found = post(address, "/v1/chat/completions", {"model": "guard", "messages": messages}).json()
    content = found["choices"][0]["message"]["content"]
    assert content.splitlines()[0] == ("unsafe" if found["guardloop"]["verdict"] == "unsafe" else "safe")
    assert [m["role"] for m in found["guardloop"]["judged"]] == ["assistant"]


def test_the_openai_client_understands_it(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("app 0123456789abcdef-a\n")
    with serving(keys=str(keys)) as (address, _, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="0123456789abcdef-a", max_retries=0)
        moderated = client.moderations.create(input=["hello", "a bomb"])
        answered = client.chat.completions.create(model="guard", messages=[{"role": "user", "content": "a bomb"}])
        assert [result.flagged for result in moderated.results][1] == (
            answered.choices[0].message.content.splitlines()[0] == "unsafe"
        )
        with pytest.raises(openai.UnprocessableEntityError, match="unknown role"):
            client.chat.completions.create(model="guard", messages=[{"role": "wizard", "content": "x"}])  # type: ignore[list-item]
        with pytest.raises(openai.AuthenticationError, match="no valid API key"):
            client.with_options(api_key="wrong").moderations.create(input="hello")


def test_the_log_is_read_as_the_next_rounds_traffic(tmp_path: Path) -> None:
    with serving(log=str(tmp_path / "log")) as (address, _, _):
        for n in range(4):
            post(address, "/v1/check", {"prompt": f"question {n}"})
    (file,) = (tmp_path / "log").rglob("*.jsonl")
    source = SourceSettings(kind="file", path=str(file), columns={"id": "id", "prompt": "prompt"})
    assert [row["prompt"] for row in read_conversations(source)] == [f"question {n}" for n in range(4)]
