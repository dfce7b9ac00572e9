"""The installed package: guardloop alone, whose commands work anywhere or say that they need the checkout."""

import json
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


PROGRAM = """
import contextlib, io, json, sys
# without the editable install of the checkout, whose dependencies are wanted nevertheless
sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]
sys.path.insert(0, sys.argv[1])
import guardloop.cli.main as cli
assert cli.__file__.startswith(sys.argv[1]), cli.__file__
ends = []
for arguments in json.loads(sys.argv[2]):
    sys.argv = ["guardloop", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            cli.main()
        except SystemExit as end:
            ends.append((end.code or 0, err.getvalue()))
print(json.dumps(ends))
"""


def ends(installed: Path, folder: Path, *commands: list[str]) -> list[tuple[int, str]]:
    """(exit code, what went to stderr) of each command, as the installed package has it, started in `folder`."""
    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    surroundings["GUARDLOOP_HOME"] = str(installed.parent / "home")
    ended = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, str(installed), json.dumps(commands)],
        cwd=folder,
        env=surroundings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return [(code, err) for code, err in json.loads(ended.stdout)]


@pytest.mark.slow
def test_only_guardloop_is_installed(installed: Path) -> None:
    names = {path.name for path in installed.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} <= {"guardloop", "bin"}
    assert (installed / "guardloop/demo/sample/guard/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_what_works_anywhere(installed: Path, tmp_path: Path) -> None:
    commands = [["config", "show"], ["config", "fields"], ["demo-report", "--out", "page.html"], ["review"]]
    for code, err in ends(installed, tmp_path, *commands):
        assert code == 0, err
    assert (tmp_path / "page.html").is_file()


@pytest.mark.slow
def test_what_needs_a_checkout_says_so(installed: Path, tmp_path: Path) -> None:
    names = ["run", "reproduce", "compile", "plan", "doctor", "submit", "follow", "runs", "schedule list"]
    for name, (code, err) in zip(names, ends(installed, tmp_path, *(n.split() for n in names)), strict=True):
        assert code == 2 and "needs GuardLoop's repository" in err, (name, err)


@pytest.mark.slow
def test_a_checkout_is_the_current_folder(installed: Path) -> None:
    ((code, err),) = ends(installed, ROOT, ["plan", "--past", "no-such-run"])
    assert code == 2 and "no run 'no-such-run'" in err, err
