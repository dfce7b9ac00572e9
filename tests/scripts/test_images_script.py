"""scripts/images.sh: what it asks the Docker client to build, and what it says where that fails."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.root import ROOT

from launch.images import MODEL_STAGES, STAGES

CLIENT = """#!/bin/sh
case "$1" in
  build) printf '%s\\n' "$*" >>"$NOTES"; [ -z "$ERROR" ] || { echo "$ERROR" >&2; exit 1; } ;;
  image) echo 1000 ;;
  tag | push) echo "$*" >>"$NOTES" ;;
esac
"""
PYTHON = """#!/bin/sh
case "$*" in *"pip download"*) [ -z "$WHEEL" ] || touch build/images/wheels/torch-1.whl ;; esac
[ -n "$WHEEL" ]
"""
SECRET = "https://user:secret@index.example.com/simple"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the script reads, with stand-ins for the Docker client and for Python."""
    for name in (
        "scripts/images.sh",
        "images/Dockerfile",
        "images/docker-bake.hcl",
        "requirements/torch.txt",
        "pyproject.toml",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name, text in (("docker", CLIENT), ("python", PYTHON)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    stale = tmp_path / "build/images/wheels"
    stale.mkdir(parents=True)
    (stale / "torch-0.whl").touch()
    return tmp_path


def run(checkout: Path, *arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The script's end, and the lines that the client got."""
    notes = checkout / "notes"
    notes.unlink(missing_ok=True)
    environment = {"PATH": os.environ["PATH"], "TAG": "abc", "NOTES": str(notes)}
    environment |= {"DOCKER": str(checkout / "docker"), "PYTHON": str(checkout / "python"), **variables}
    script = [checkout / "scripts/images.sh", *arguments]
    done = subprocess.run(script, capture_output=True, text=True, env=environment, check=False)
    return done, notes.read_text().splitlines() if notes.exists() else []


def test_each_stage_is_a_target_and_models_come_for_a_gpu_too(checkout: Path) -> None:
    done, lines = run(checkout, "build")

    assert done.returncode == 0, done.stderr
    built = {
        (word(line, "--target"), line.partition("FLAVOUR=")[2].split()[0], word(line, "--tag")) for line in lines
    }  # fmt: skip
    assert built == {
        *((stage, "cpu", f"guardloop/{stage}:abc") for stage in STAGES),
        *((stage, "gpu", f"guardloop/{stage}:abc-gpu") for stage in MODEL_STAGES),
    }


def test_one_stage_of_one_flavour(checkout: Path) -> None:
    _, lines = run(checkout, "build", "evaluate", "screen", FLAVOUR="gpu")
    assert [word(line, "--target") for line in lines] == ["screen"]

    done, lines = run(checkout, "build", "screening")
    assert done.returncode == 2 and not lines
    assert "No stage is called screening. Stages: prepare-data " in done.stderr


def test_a_stale_wheel_of_torch_decides_nothing(checkout: Path) -> None:
    _, (line,) = run(checkout, "build", "screen", FLAVOUR="cpu")
    assert "TORCH_FROM" not in line
    assert not list((checkout / "build/images").rglob("*.whl"))

    (checkout / "build/images/wheels").mkdir()
    _, (line,) = run(checkout, "build", "screen", FLAVOUR="cpu", WHEEL="yes", TORCH_INDEX=SECRET)
    assert "TORCH_FROM=--config-file /etc/uv/torch.toml" in line and "id=torch" in line


def test_indexes_and_proxies_reach_the_build_and_no_argument_holds_them(checkout: Path) -> None:
    _, (line,) = run(
        checkout, "build", "screen",
        FLAVOUR="cpu", TORCH_INDEX=SECRET, PIP_INDEX_URL=SECRET, HTTPS_PROXY=SECRET, SSL_CERT_FILE="/own/ca.pem",
    )  # fmt: skip

    assert "secret@" not in line
    assert "--build-arg HTTPS_PROXY " in line
    assert "--secret id=ca,src=/own/ca.pem" in line and "--secret id=uv," in line and "--secret id=torch," in line


def test_without_a_registry_it_says_what_can_be_done(checkout: Path) -> None:
    done, _ = run(checkout, "build", ERROR="failed to do request: Head https://registry.example.com: no such host")

    assert done.returncode == 1
    assert all(
        part in done.stderr for part in ("no such host", "PYTHON_IMAGE=", "UV_IMAGE=", "scripts/images.sh bases")
    )
    _, lines = run(checkout, "build", "evaluate", PYTHON_IMAGE="own/python:1", UV_IMAGE="own/uv:1")
    assert "--build-arg PYTHON_IMAGE=own/python:1 --build-arg UV_IMAGE=own/uv:1" in lines[0]


def test_only_what_a_commit_names_is_pushed(checkout: Path) -> None:
    done, lines = run(checkout, "push", TAG="abc-dirty-0", REGISTRY="registry.example.com/a")
    assert done.returncode == 2 and not lines

    _, lines = run(checkout, "push", "screen", REGISTRY="registry.example.com/a", FLAVOUR="cpu")
    assert lines == [
        "tag guardloop/screen:abc registry.example.com/a/screen:abc",
        "push --quiet registry.example.com/a/screen:abc",
    ]


def word(line: str, option: str) -> str:
    words = line.split()
    return words[words.index(option) + 1]
