import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from responses.test_respond import Script
from support.killed import Killer, contents, parts
from support.services import S3Server
from support.tiny_responder import PROMPTS, screened, tiny_settings

from guardloop.core.errors import GuardLoopError
from guardloop.core.progress import Stage
from guardloop.core.records import RESPONSE, SCREENED, Row, read_table, write_table
from guardloop.responses import resume, work
from guardloop.responses.engine import Reply, Request
from guardloop.responses.respond import respond
from guardloop.responses.resume import Parts, answered
from guardloop.responses.settings import ResponderSettings
from guardloop.responses.work import Work, key_of

KILLS, KILLS_WITHOUT_DISK = 20, 6


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where unfinished work is kept; a part is written for every prompt that is done."""
    monkeypatch.setenv(work.PLACE, str(tmp_path / "work"))
    monkeypatch.setattr(resume, "PART_SECONDS", 0.0)
    return tmp_path / "work"


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the stage's function on `rows` with `responder` in place of the engines; the responses that came out."""

    def run(
        rows: list[Row], responder: Any, settings: ResponderSettings, seed: int = 0, max_error_share: float = 0.05
    ) -> list[tuple[Any, ...]]:
        table = tmp_path / "screened.parquet"
        write_table(rows, SCREENED, table)
        monkeypatch.setattr(resume, "build_responder", lambda one: responder)
        write_table(
            answered(table, [settings], seed, max_error_share, Stage("test")), RESPONSE, tmp_path / "out.parquet"
        )
        return contents(tmp_path / "out.parquet")

    return run


def finished(place: Path) -> set[str]:
    return {row["id"] for part in parts(place) for row in read_table(part)}


@pytest.fixture
def killer(tmp_path: Path, place: Path, tiny_folder: Path) -> Killer:
    killer = Killer(tmp_path, tiny_folder)
    shutil.rmtree(place)
    return killer


@pytest.mark.slow
def test_survives_being_killed_at_any_moment(killer: Killer, place: Path, tmp_path: Path) -> None:
    dice, kills, resumed = random.Random(0), 0, 0
    output = tmp_path / "out.parquet"
    while kills < KILLS:
        before = finished(place)
        resumed += bool(before)
        killer.log.write_text("")
        code = killer.kill_within(dice.uniform(0, killer.seconds * 0.7), output, place if kills % 3 == 0 else None)
        assert not before & set(killer.log.read_text().split())  # what is finished is not answered again
        assert code in (0, -signal.SIGKILL)
        kills += code == -signal.SIGKILL
        if code == 0:  # done before it could be killed: right, and then half of it is taken away
            assert contents(output) == contents(killer.whole)
            output.unlink()
            for part in sorted(place.glob("*/part-*.parquet"))[::2]:
                part.unlink()
    assert killer.kill_within(60, output) == 0
    assert len(contents(output)) == len(killer.rows) * 2
    assert contents(output) == contents(killer.whole)
    assert resumed > KILLS / 2


@pytest.mark.slow
def test_a_pod_that_loses_its_disk_goes_on_from_the_store(
    killer: Killer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, dice, kills, sent = tmp_path / "out.parquet", random.Random(0), 0, 0
    with S3Server(tmp_path / "s3") as s3:
        for name, value in s3.client_environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv(work.PLACE, "s3://guardloop/work/")
        bucket = s3.files / "guardloop" / "work"
        while kills < KILLS_WITHOUT_DISK:
            before, there = parts(bucket), finished(bucket)
            killer.log.write_text("")
            code = killer.kill_within(dice.uniform(0, killer.seconds), output, bucket if kills % 2 == 0 else None)
            assert code in (0, -signal.SIGKILL)
            assert not there & set(killer.log.read_text().split())
            assert before.items() <= parts(bucket).items()
            kills, sent = kills + 1, max(sent, len(there))
            if code == 0:
                assert contents(output) == contents(killer.whole)
                output.unlink()
                client = boto3.client("s3")  # the server would miss a file that is unlinked behind it
                for part in list(bucket.glob("*/part-*.parquet"))[::2]:
                    client.delete_object(Bucket="guardloop", Key=str(part.relative_to(bucket.parent)))
        assert killer.kill_within(60, output) == 0
        assert contents(output) == contents(killer.whole)
        assert sent


def test_what_failed_is_tried_again(answer: Callable[..., Any]) -> None:
    rows, settings = screened(PROMPTS), tiny_settings()
    first, second, third = Script(("p1", "p2")), Script(("p2",)), Script(("p2",))
    for responder, asked in ((first, set(range(40))), (second, {1, 2}), (third, {2})):
        made = answer(rows, responder, settings, max_error_share=0.5)
        assert len(made) == 120
        assert {r.id for r in responder.asked} == {f"p{i}" for i in asked}
    assert [row[0] for row in made if row[RESPONSE.names.index("finish_reason")] == "error"] == ["p2"] * 3


def test_what_is_done_is_kept_when_too_much_fails(answer: Callable[..., Any], tmp_path: Path) -> None:
    rows = screened(PROMPTS)
    with pytest.raises(GuardLoopError, match="is kept"):
        answer(rows, Script(tuple(f"p{i}" for i in range(20))), tiny_settings(), max_error_share=0.2)
    assert not (tmp_path / "out.parquet").exists()
    again = Script()
    assert len(answer(rows, again, tiny_settings(), max_error_share=0.3)) == 120  # as the message suggests
    assert {r.id for r in again.asked} == {f"p{i}" for i in range(20)}


def test_finished_work_needs_no_engine(answer: Callable[..., Any]) -> None:
    rows, settings = screened(PROMPTS), tiny_settings()
    made = answer(rows, Script(), settings)
    assert answer(rows, None, settings) == made  # as when a pod's outputs could not be uploaded


def test_other_rows_or_settings_are_other_work(answer: Callable[..., Any]) -> None:
    rows, settings = screened(PROMPTS), tiny_settings()
    answer(rows, Script(), settings)
    for other_rows, other, seed in (
        (rows, settings, 1),
        (rows, tiny_settings(temperature=0.5), 0),
        (screened(PROMPTS, score=-2.0), settings, 0),
    ):
        responder = Script()
        answer(other_rows, responder, other, seed)
        assert len(responder.asked) == 120
    unused = Script()
    answer(rows, unused, tiny_settings(timeout_seconds=9), max_error_share=0.9)
    assert not unused.asked


def test_a_model_that_took_anothers_place_is_other_work(tmp_path: Path, place: Path) -> None:
    table, folder = tmp_path / "table", tmp_path / "model"
    table.write_bytes(b"rows")
    folder.mkdir()
    settings = tiny_settings(model=str(folder))
    keys = set()
    for weights in (b"a", b"bc"):
        (folder / "model.safetensors").write_bytes(weights)
        keys.add(key_of(table, settings, 0))
    assert len(keys) == 2


def test_broken_parts_are_answered_again(answer: Callable[..., Any], place: Path) -> None:
    rows, settings = screened(PROMPTS), tiny_settings()
    expected = answer(rows, Script(), settings)
    parts = sorted(place.glob("*/part-*.parquet"))
    assert len(parts) > 10
    parts[3].write_bytes(parts[3].read_bytes()[:100])
    parts[5].write_bytes(b"")
    for half in ("part-000099-00", "error-000099-00"):
        (parts[0].parent / f"{half}.parquet.partial").write_bytes(b"half")
    again = Script()
    assert answer(rows, again, settings) == expected
    assert 2 <= len({r.id for r in again.asked}) <= 8
    assert not list(place.glob("*/*.partial"))


def test_parts_of_two_pods_are_not_counted_twice(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder, prompts in ((first, PROMPTS[:10]), (second, PROMPTS[:20])):
        folder.mkdir()
        Parts(folder, 3).fill(screened(prompts), Script, tiny_settings())
    for part in second.glob("part-*"):
        shutil.copy(part, first)
    both, again = Parts(first, 3), Script()
    both.fill(screened(PROMPTS), lambda: again, tiny_settings())
    assert Counter((row["id"], row["sample"]) for row in both.rows()) == Counter(
        (f"p{i}", sample) for i in range(40) for sample in range(3)
    )
    assert len({r.id for r in again.asked}) < 40


def test_a_part_is_dropped_only_for_what_a_kept_one_has(tmp_path: Path) -> None:
    rows = list(respond(screened(PROMPTS[:11]), Script(), tiny_settings(samples=1)))
    for i in range(10):  # each part shares a prompt with the one before
        overlapping = [row for row in rows if row["id"] in (f"p{i}", f"p{i + 1}")]
        write_table(overlapping, RESPONSE, tmp_path / f"part-{i:06d}-00.parquet")
    kept = Parts(tmp_path, 1)
    assert kept.answered == 10
    assert sorted(part.name[5:11] for part in tmp_path.iterdir()) == [f"{i:06d}" for i in range(0, 10, 2)]


def test_two_processes_do_not_share_a_folder(
    answer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "LOCK_SECONDS", 0.0)
    settings = tiny_settings()

    class Nested(Script):
        def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
            with pytest.raises(GuardLoopError, match="another process"):
                list(answered(tmp_path / "screened.parquet", [settings], 0, 0.05, Stage("test")))
            yield from super().generate(requests)

    assert len(answer(screened(["a"]), Nested(), settings)) == 3


def test_old_work_is_forgotten_and_nothing_else_there_is_touched(place: Path) -> None:
    old, new, another = (letter * 32 for letter in "abc")
    for name, days in ((old, 8), (new, 6), ("thesis", 800)):
        (place / name).mkdir(parents=True)
        (place / name / "part-000000-00.parquet").write_bytes(b"x")
        os.utime(place / name, (0, time.time() - days * 86400))
    with Work(another):
        assert sorted(p.name for p in place.iterdir()) == [new, another, "thesis"]
    assert [p.name for p in (place / "thesis").iterdir()] == ["part-000000-00.parquet"]


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(work.PLACE, str(tmp_path / "file"))
    with pytest.raises(GuardLoopError, match=work.PLACE), Work("key"):
        pass


@pytest.mark.slow
def test_a_store_that_goes_away_is_no_reason_to_stop(
    answer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with S3Server(tmp_path / "s3") as s3:
        for name, value in s3.client_environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv(work.PLACE, "s3://guardloop/work")

        class Breaker(Script):
            def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
                for number, reply in enumerate(super().generate(requests)):
                    if number == 6:
                        s3.stop()
                    yield reply

        assert len(answer(screened(PROMPTS[:6]), Breaker(), tiny_settings())) == 18
        assert "not in the store yet" in caplog.text
        with pytest.raises(GuardLoopError, match="does not answer"):  # at the start it is
            answer(screened(PROMPTS[:6]), Breaker(), tiny_settings())


def test_a_slow_store_makes_the_engine_wait(
    answer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    unsent = most = 0
    keep = Work.keep

    def counted(self: Work, file: Path) -> None:
        nonlocal unsent, most
        self._store = "s3://somewhere"
        unsent += 1
        keep(self, file)
        most = max(most, unsent)

    def slow(self: Work, file: Path) -> None:
        nonlocal unsent
        time.sleep(0.01)
        unsent -= 1

    monkeypatch.setattr(Work, "keep", counted)
    monkeypatch.setattr(Work, "_send", slow)
    assert len(answer(screened(PROMPTS), Script(), tiny_settings())) == 120
    assert unsent == 0  # all is sent when the work ends
    assert 1 < most <= work.MOST_UNSENT + 1


def test_nothing_passed_gives_an_empty_table(answer: Callable[..., Any], place: Path) -> None:
    assert answer(screened(PROMPTS, flagged=True), None, tiny_settings()) == []
    assert not place.exists()
