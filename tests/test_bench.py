"""The GPU parts of the benchmarks run anywhere with a tiny model: no GPU time is spent on their mistakes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import guard, train_gpu
from bench.workload import TINY

pytestmark = pytest.mark.slow


def test_guard_measures_every_way_and_the_margins_agree(tmp_path: Path) -> None:
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
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    rates = re.findall(r"^\| this engine, .+ \| ([\d.]+) \| .*\|$", page.read_text("utf-8"), re.MULTILINE)
    assert len(rates) == 2
    assert all(float(rate) > 0 for rate in rates)
