"""The GPU parts of the benchmarks run anywhere with a tiny model: no GPU time is spent on their mistakes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.root import ROOT
from support.workshop import Workshop

from bench import demo, guard, train_gpu
from bench.workload import TINY

pytestmark = pytest.mark.slow


def test_guard_measures_every_way_and_the_scores_agree(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    guard.main(tiny=True, page=page)
    text = page.read_text("utf-8")
    rates = re.findall(r"^\| .+ \| ([\d,.]+) \| .*\|$", text, re.MULTILINE)
    assert len(rates) == 10
    assert all(float(rate.replace(",", "")) > 0 for rate in rates)
    (apart,) = re.findall(r"packs differ from whole prompts by (\S+) at most", text)
    assert float(apart) < 1e-4


def test_training_ways_take_steps() -> None:
    rows = train_gpu.rows(TINY)
    for _ in range(2):
        _, rate, _ = next(rows)
        assert rate and rate > 0


def test_both_ways_to_hold_the_guard_in_several_processes_take_steps(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "bench.train_gpu", "--sharded", "--tiny", "--page", str(page)]
    subprocess.run(command, check=True, cwd=ROOT)
    rates = re.findall(r"^\| this engine, .+ \| ([\d.]+) \| .*\|$", page.read_text("utf-8"), re.MULTILINE)
    assert len(rates) == 2
    assert all(float(rate) > 0 for rate in rates)


def test_the_demo_is_judged_seed_by_seed_and_nothing_more_is_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = Workshop(tmp_path)
    workshop.settings["guard"]["threshold"] = workshop.middle_of_sample()
    ended = workshop.guardloop("--pipeline", "process")
    assert ended.returncode == 0, ended.stderr
    monkeypatch.setenv("GUARDLOOP_HOME", str(tmp_path / "home"))
    before = sorted(path.name for path in (tmp_path / "home" / "runs").iterdir())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # where nobody answers
    page = tmp_path / "benchmarks.md"
    demo.main(seeds=1, config=tmp_path / "config.yaml", run="latest", page=page)
    text = page.read_text("utf-8")
    (decision,) = re.findall(r"^\| 0 \|.*\| (promoted|not promoted) \|$", text, re.MULTILINE)
    assert f"Promoted with {int(decision == 'promoted')} of 1 seeds" in text
    assert sorted(path.name for path in (tmp_path / "home" / "runs").iterdir()) == before


def test_the_demo_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARDLOOP_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="2"):
        demo.main(seeds=1, config=Path("configs/demo.yaml"), run="latest", page=tmp_path / "page.md")
