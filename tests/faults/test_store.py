"""A store that fails, is slow, cuts bodies off or goes away: work waits or stops with words, and nothing is half."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.conftest import Loop, contents
from support.proxy import KINDS, FaultyProxy
from support.services import S3Server

from guardloop import stages
from guardloop.core.errors import GuardLoopError
from guardloop.core.storage import fetch, put
from guardloop.responses import resume
from guardloop.training import fit

pytestmark = [pytest.mark.faults, pytest.mark.slow]
FAILING = tuple(kind for kind in KINDS if kind != "slow")
FILES = {f"part-{i}/file-{i}.bin": bytes([i]) * 5000 * (i + 1) for i in range(6)}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[S3Server]:
    with S3Server(tmp_path / "s3") as server:
        yield server


@pytest.fixture
def proxy(store: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    for name, value in store.client_environment.items():
        monkeypatch.setenv(name, value)
    with FaultyProxy(store.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    return tmp_path / "folder"


@pytest.mark.parametrize("kind", KINDS)
def test_faults_that_pass_are_waited_for(proxy: FaultyProxy, folder: Path, tmp_path: Path, kind: str) -> None:
    proxy.meet(kind, left=2)
    put(folder, "s3://guardloop/folder")
    assert proxy.met == 2
    proxy.meet(kind, left=2)
    assert contents(fetch("s3://guardloop/folder", tmp_path / "back")) == contents(folder)
    assert proxy.met == 2
    for _ in range(3):
        proxy.meet(kind, share=0.15)
        put(folder / "part-5", "s3://guardloop/again")
        assert contents(fetch("s3://guardloop/again", tmp_path / "back")) == contents(folder / "part-5")


@pytest.mark.parametrize("kind", FAILING)
def test_faults_that_last_leave_the_older_copy(
    proxy: FaultyProxy, folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    put(folder, "s3://guardloop/folder")
    older = fetch("s3://guardloop/folder", tmp_path / "back")
    before = contents(older)
    put(folder / "part-0", "s3://guardloop/folder/more")
    proxy.meet(kind, share=1.0)
    with pytest.raises(GuardLoopError) as caught:
        fetch("s3://guardloop/folder", tmp_path / "back")
    assert "s3://guardloop/folder" in caught.value.what and caught.value.remedy
    assert contents(older) == before and {p.name for p in (tmp_path / "back").iterdir()} == {"folder"}


def test_a_store_killed_amid_a_download_leaves_nothing_half(
    store: S3Server, proxy: FaultyProxy, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    put(folder, "s3://guardloop/folder")
    answer = proxy._fault
    seen = iter(range(1000))
    monkeypatch.setattr(proxy, "_fault", lambda: store.stop() or "" if next(seen) == 4 else answer())
    with pytest.raises(GuardLoopError, match="does not answer"):
        fetch("s3://guardloop/folder", tmp_path / "back")
    assert not list((tmp_path / "back").iterdir())
    store.start()
    assert contents(fetch("s3://guardloop/folder", tmp_path / "back")) == contents(folder)


def test_wrong_credentials_are_told_at_once(proxy: FaultyProxy, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(GuardLoopError, match="access refused") as caught:
        put(folder, "s3://guardloop/folder")
    assert "AWS_SECRET_ACCESS_KEY" in caught.value.remedy and "wrong" not in str(caught.value)


@pytest.mark.parametrize("seed", range(3))
def test_stages_that_keep_their_work_in_a_bad_store_end_as_with_a_good_one(
    store: S3Server, proxy: FaultyProxy, loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(resume, "PART_SECONDS", 0.0)
    monkeypatch.setattr(fit, "CHECKPOINT_STEPS", 1)
    monkeypatch.setenv("GUARDLOOP_WORK", f"s3://guardloop/work-{seed}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "5")
    proxy.meet(*FAILING, share=0.15)
    s, out = loop.sections, tmp_path / "out"
    out.mkdir()
    stages.generate_responses(loop.folder / "verdicts", out / "responses", s["responders"], max_error_share=1.0)
    stages.train_guard(loop.folder / "training_set", out / "adapter", s["guard"], s["training"], s["registry"])
    expected = contents(loop.folder)
    found = contents(out)
    for name in ("responses", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert found[name] == expected[name], name
    assert proxy.met > 5
