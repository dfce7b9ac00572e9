"""The installed package: guardloop alone, whose commands work anywhere or say that they need the checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.root import ROOT

PARTS = ("guardloop", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, capture_output=True)
    return target


def call(installed: Path, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    # without site-packages' editable install of the checkout, whose dependencies are wanted nevertheless
    program = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]\n"
        f"sys.path.insert(0, {str(installed)!r})\n"
        "import guardloop.cli.main as cli\n"
        f"assert cli.__file__.startswith({str(installed)!r}), cli.__file__\n"
        "cli.main()"
    )
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    surroundings["GUARDLOOP_HOME"] = str(folder / "home")
    return subprocess.run(
        [sys.executable, "-I", "-c", program, *arguments],
        cwd=folder,
        env=surroundings,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_only_guardloop_is_installed(installed: Path) -> None:
    names = {path.name for path in installed.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} <= {"guardloop", "bin"}
    assert (installed / "guardloop/demo/sample/guard/adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["config", "show"], ["review"], ["demo-report", "--out", "page.html"], ["check", "--help"]]
)
def test_what_works_anywhere(installed: Path, tmp_path: Path, arguments: list[str]) -> None:
    ended = call(installed, tmp_path, *arguments)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [["run"], ["reproduce"], ["compile"], ["plan"], ["doctor"], ["runs"], ["submit"], ["schedule", "list"]],
)
def test_what_needs_a_checkout_says_so(installed: Path, tmp_path: Path, arguments: list[str]) -> None:
    refused = call(installed, tmp_path, *arguments)
    assert refused.returncode == 2 and "needs GuardLoop's repository" in refused.stderr, refused.stderr


@pytest.mark.slow
def test_a_checkout_is_the_current_folder(installed: Path) -> None:
    ended = call(installed, ROOT, "plan", "--past", "no-such-run")
    assert ended.returncode == 2 and "no run 'no-such-run'" in ended.stderr, ended.stderr
