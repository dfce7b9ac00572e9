"""A disk that is full, files that are damaged, a clock that jumps, and two at work on one cache."""

import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.conftest import Loop, contents
from filelock import FileLock
from support.processes import start

from guardloop.core.errors import GuardLoopError
from guardloop.responses.work import Work

pytestmark = [pytest.mark.faults, pytest.mark.slow]
WRITERS = (
    *("prepare_data", "screen", "generate_responses", "mine_feedback", "train_guard"),
    *("screen_candidate", "score_benchmarks", "evaluate"),
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of half a MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_told_and_the_stage_runs_again_once_there_is_room(
    loop: Loop, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("GUARDLOOP_CACHE", str(tmp_path / "cache"))
    stage, refused = loop.stages()[name], 0
    ballast = small_disk / "ballast"
    for room in (0, 4096, 8192, 16384, 32768):
        ballast.write_bytes(b"")
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        ballast.write_bytes(bytes(free - room))
        out = small_disk / f"out-{room}"
        try:
            out.mkdir()
            stage(out)
        except GuardLoopError as error:
            refused += 1
            assert str(small_disk) in error.what or "disk" in error.what, error
            assert "space" in error.remedy, error
        except OSError:
            assert not out.is_dir()  # no room for the folder itself
    ballast.unlink()
    assert refused
    out = small_disk / "out-0"
    out.mkdir(exist_ok=True)
    stage(out)
    (tmp_path / "whole").mkdir()
    stage(tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["verdicts", "judged", "responses", "default", "held_out", "training_set"])
def test_a_damaged_artifact_is_refused_by_the_stage_that_reads_it(loop: Loop, tmp_path: Path, name: str) -> None:
    """Any byte that is changed, and any end that is cut off, in any table or adapter of the round."""
    dice = random.Random(name)
    readers = {
        "verdicts": "generate_responses",
        "judged": "mine_feedback",
        "responses": "screen responses",
        "default": "evaluate",
        "held_out": "evaluate",
        "training_set": "train_guard",
    }
    path = loop.folder / name
    path = path / "examples.parquet" if path.is_dir() else path
    whole = path.read_bytes()
    try:
        for number in range(12):
            damaged = bytearray(whole)
            place = dice.randrange(len(whole))
            if number % 3 == 2:
                del damaged[place:]
            else:
                damaged[place] ^= 1 << dice.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(GuardLoopError, match="run the stage that writes it again"):
                loop.stages()[readers[name]](tmp_path)
    finally:
        path.write_bytes(whole)


def test_a_damaged_adapter_is_refused(loop: Loop, tmp_path: Path) -> None:
    path = loop.folder / "adapter" / "adapter_model.safetensors"
    whole = path.read_bytes()
    try:
        for place in (len(whole) // 2, len(whole) - 1, 3):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(GuardLoopError, match="its checksum differs"):
                loop.stages()["screen_candidate"](tmp_path)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["evaluated/evaluation.json", "training_set/mining.json"])
def test_damaged_json_is_refused(loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    path = loop.folder / name
    whole = path.read_bytes()
    try:
        for damaged in (whole[: len(whole) // 2], b"", b"[]", b"\xff\xfe", b"null"):
            path.write_bytes(damaged)
            with pytest.raises(GuardLoopError, match="run the stage that writes it again"):
                loop.stages()["register_model"](tmp_path)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("days", [-400, -1, 1, 400])
@pytest.mark.parametrize("name", ["generate_responses", "train_guard"])
def test_a_clock_that_jumps_amid_the_work_changes_nothing(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, days: int
) -> None:
    monkeypatch.setenv("GUARDLOOP_CACHE", str(tmp_path / "cache"))
    real, started = time.time, time.time()
    monkeypatch.setattr(time, "time", lambda: real() + (days * 86400 if real() - started > 0.2 else 0))
    loop.stages()[name](tmp_path)
    monkeypatch.setattr(time, "time", real)
    made = contents(tmp_path)
    whole = contents(loop.folder)
    kept = {n: d for n, d in made.items() if not n.startswith("cache/")}
    assert kept and all(whole[n] == digest for n, digest in kept.items())


def test_a_clock_that_jumps_does_not_delete_work_in_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARDLOOP_WORK", str(tmp_path))
    mine, another, third = (letter * 32 for letter in "abc")
    with Work(mine):
        (tmp_path / mine / "part-000000-00.parquet").write_bytes(b"x")
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + 400 * 86400)
        with Work(another):
            assert (tmp_path / mine / "part-000000-00.parquet").is_file()
    with Work(third):
        assert not (tmp_path / mine).exists()  # nobody holds it now


def test_two_at_work_on_one_cache_make_the_same(loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same stage twice at the same moment: the second waits, or says who is at work; none spoils the other's."""
    monkeypatch.setenv("GUARDLOOP_CACHE", str(tmp_path / "cache"))
    whole = contents(loop.folder)
    for name in ("generate_responses", "train_guard"):
        folders = [tmp_path / name / str(i) for i in range(2)]
        children = []
        for folder in folders:
            folder.mkdir(parents=True)
            children.append(start(_quietly, loop.stages()[name], folder))
        for child in children:
            child.join(120)
        codes = sorted(child.exitcode or 0 for child in children)
        assert codes in ([0, 0], [0, 2]), name
        for folder in folders:
            assert all(whole[n] == digest for n, digest in contents(folder).items())
        assert any(contents(folder) for folder in folders)


def _quietly(stage: object, folder: Path) -> None:
    try:
        stage(folder)  # type: ignore[operator]
    except GuardLoopError:
        os._exit(2)
    os._exit(0)


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    def hold() -> None:
        FileLock(tmp_path / "lock").acquire()
        time.sleep(60)

    child = start(hold)
    time.sleep(0.5)
    child.kill()
    child.join()
    with FileLock(tmp_path / "lock").acquire(timeout=1):
        pass
