"""Whole runs from the command line: repeated, interrupted, and two at the same moment."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support.workshop import ROOT, Workshop

from launch.local.reproduce import compare

pytestmark = [pytest.mark.faults, pytest.mark.slow]


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    monkeypatch.setenv("GUARDLOOP_CACHE", str(tmp_path / "cache"))
    return Workshop(tmp_path)


def start(workshop: Workshop, *arguments: str) -> "subprocess.Popen[str]":
    config = workshop.folder / "own.yaml"
    config.write_text(yaml.safe_dump(workshop.settings))
    environment = {**os.environ, "GUARDLOOP_HOME": str(workshop.folder / "home"), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "guardloop.cli.main", *arguments]
    if arguments[0] == "run":
        command += ["--config", str(config)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_a_run_is_repeated_to_the_byte(workshop: Workshop) -> None:
    assert workshop.guardloop("--pipeline", "process").returncode == 0
    loose = {"guard": {"threshold": workshop.middle_score()}}
    whole = workshop.guardloop(**loose)
    assert whole.returncode == 0, whole.stderr
    run = workshop.latest
    again = start(workshop, "reproduce", run.name)
    told = again.communicate()[0]
    assert again.returncode == 0, told
    names = {one.name for one in compare(run, workshop.latest)}
    assert {"train-guard/adapter/adapter_model.safetensors", "evaluate/evaluated/evaluation.json"} <= names, names
    versions = subprocess.run(["ls", str(workshop.folder / "home")], capture_output=True, text=True, check=True).stdout
    assert versions.count("mlflow.db\n") == 1  # the repetition is recorded in its own folder
    (path,) = run.glob("artifacts/*/train-guard/adapter/README.md")
    path.write_text("changed")
    again = start(workshop, "reproduce", run.name)
    told = again.communicate()[0]
    assert again.returncode == 1 and "1 of" in told and "differs" in told, told


def test_an_interrupted_run_ends_tidily_says_how_to_go_on_and_goes_on(workshop: Workshop) -> None:
    whole = workshop.guardloop("--pipeline", "process")
    assert whole.returncode == 0, whole.stderr
    undisturbed = workshop.latest
    for work in (workshop.folder / "cache").glob("responses/*/part-*"):
        work.unlink()
    for seconds in (2.0, 12.0, 20.0):
        run = start(workshop, "run", "--pipeline", "process")
        time.sleep(seconds)
        run.send_signal(signal.SIGINT)
        told = run.communicate(timeout=60)[0]
        if run.returncode == 0:  # it was done before
            continue
        assert run.returncode == 130, told
        assert "Traceback" not in told and "stopped" in told, told
        left = subprocess.run(["pgrep", "-f", str(workshop.folder)], capture_output=True, text=True, check=False).stdout
        assert not left, left  # no stage is left behind
    assert workshop.guardloop("--pipeline", "process").returncode == 0
    assert all(one.same for one in compare(undisturbed, workshop.latest))


def test_two_runs_at_once_on_one_cache_both_end_well(workshop: Workshop) -> None:
    runs = [start(workshop, "run", "--pipeline", "process") for _ in range(2)]
    told = [run.communicate(timeout=300)[0] for run in runs]
    folders = [p for p in (workshop.folder / "home" / "runs").iterdir() if not p.is_symlink()]
    assert len(folders) == 2
    for run, text in zip(runs, told, strict=True):
        assert run.returncode in (0, 2) and "Traceback" not in text, text
    assert any(run.returncode == 0 for run in runs)
    if all(run.returncode == 0 for run in runs):
        assert all(one.same for one in compare(*folders))
    else:
        assert any("another process is generating these responses" in text for text in told), told
