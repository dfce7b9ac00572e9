"""What a user gives to `make` reaches the command as it is: no shell and no make reads it."""

import shutil
import subprocess
from pathlib import Path

import pytest
from support.root import ROOT

HOSTILE = ['a"b', "a'b", "a;touch ran", "$(touch ran)", "$(shell touch ran)", "`touch ran`", "a b", "$$(touch ran)"]
NOTE = '#!/bin/sh\nfor word in "$@"; do echo "$word"; done >noted\necho "$PYTEST_ADDOPTS" >>noted\n'


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile, where nothing is set up and commands only note what they are given."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    commands = [*(f".venv/bin/{name}" for name in ("guardloop", "python", "pytest")), "scripts/minikube.sh"]
    for name in [*commands, "scripts/setup.sh"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n" if name == "scripts/setup.sh" else NOTE)
        path.chmod(0o755)
    return tmp_path


def noted(checkout: Path, *arguments: str, **environment: str) -> list[str]:
    """The arguments that the command of a target got."""
    subprocess.run(
        ["make", *arguments],
        cwd=checkout,
        check=True,
        capture_output=True,
        env={"PATH": "/usr/bin:/bin", **environment},
    )
    assert not (checkout / "ran").exists()
    return (checkout / "noted").read_text().splitlines()


@pytest.mark.parametrize("value", HOSTILE)
def test_a_value_is_one_argument_whatever_is_in_it(checkout: Path, value: str) -> None:
    given = {name: f"{value}{name}" for name in ("CONFIG", "HOST", "NAMESPACE", "EXPERIMENT", "CRON")}
    words = noted(checkout, "schedule", *(f"{name}={text}" for name, text in given.items()))

    options = dict(zip(words[2:-1:2], words[3::2], strict=False))
    assert options == {
        "--cron": given["CRON"], "--config": given["CONFIG"], "--pipeline": "full", "--platform": "minikube",
        "--host": given["HOST"], "--namespace": given["NAMESPACE"], "--experiment": given["EXPERIMENT"],
    }  # fmt: skip
    assert f"{value}RUN" in noted(checkout, "screenshots", f"RUN={value}RUN")
    assert f"{value}CONFIG" in noted(checkout, "run", CONFIG=f"{value}CONFIG")


def test_pytest_gets_options_with_their_quotes_behind_ours(checkout: Path) -> None:
    assert noted(checkout, "test", "PYTEST_ARGS=-n 0 -k 'a or b'")[-1].endswith(" -n 0 -k 'a or b'")


@pytest.mark.parametrize(
    ("given", "platform"), [([], "local"), (["RUNNER=docker"], "docker"), (["PLATFORM=mine.yaml"], "mine.yaml")]
)
def test_the_platform_is_the_runner_unless_it_is_named(checkout: Path, given: list[str], platform: str) -> None:
    assert noted(checkout, "run", *given)[-2] == platform
