"""Every command that README.md and docs name exists, with its options; each is run by a test, or says what it needs."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from support.pages import PAGES, ROOT, fenced, name, prose

from guardloop.cli import main as cli

COMMANDS = typer.main.get_command(cli.app)
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = {name for names in re.findall(r"^([a-z][a-z -]*):", MAKEFILE, re.M) for name in names.split()}
VARIABLES = set(re.findall(r"^([A-Z_]+) \?=", MAKEFILE, re.M)) | set(re.findall(r"\$\(([A-Z_]+)[):]", MAKEFILE))
FROM_SCRIPTS = set(re.findall(r"\$\{([A-Z_]+)", "".join(p.read_text() for p in (ROOT / "scripts").glob("*.sh"))))
START = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(make|guardloop)\b")
ABOUT = {"--version", "--help", "--install-completion"}
BENCHED = "measures for minutes; `tests` cover what it measures"
TESTED = {  # where a command is run: a test that names it, or what it needs that tests have not
    "make run": "tests/launch/local/test_local_run.py: workshop",
    "make setup": "needs: a package index; the workflow runs it",
    "make check": "needs: itself; the workflow runs it",
    "make test": "needs: itself; the workflow runs it",
    "make submit": "tests/launch/kubeflow/test_process.py: submit",
    "make schedule": "tests/launch/kubeflow/test_runs.py: schedule",
    "make compile": "tests/launch/kubeflow/test_platform.py: compile",
    "make golden": "tests/launch/kubeflow/test_platform.py: golden",
    "make minikube-up": "tests/scripts/test_minikube.py: minikube",
    "make minikube-down": "tests/scripts/test_minikube.py: minikube",
    "make images": "tests/images/test_image_files.py: images",
    "make push": "needs: Docker and a registry",
    "make load": "needs: Docker and minikube",
    "make test-images": "needs: Docker",
    "make services": "tests/scripts/test_services_script.py: services",
    "make ui": "needs: a browser",
    "make lock": "needs: a package index",
    "make lint": "needs: itself; the workflow runs it",
    "make docs": "needs: a package index; the workflow runs it",
    "make docs-generate": "tests/docs/test_pages.py: generated",
    "make screenshots": "needs: Chromium and a finished run; tests/docs/test_pictures.py looks at what it made",
    "make hooks": "needs: git's hooks, which tests leave alone",
    "make help": "tests/docs/test_commands.py: help",
    "make clean": "needs: a checkout that may be emptied",
    "make bench-guard": f"needs: time; {BENCHED}",
    "make bench-train": f"needs: time; {BENCHED}",
    "make bench-generate": f"needs: time; {BENCHED}",
    "make test-faults": "needs: time; the drills are tests themselves",
    "make test-security": "needs: itself; its tests are a part of `make test`",
    "make fuzz": "needs: time; tests/fuzz/test_readers.py runs a part",
    "make sbom": "tests/security/test_sbom.py: sbom",
    "make bench-load": f"needs: time; {BENCHED}",
    "make experiment": "tests/bench/test_experiment.py: main",
    "guardloop run": "tests/launch/local/test_local_run.py: workshop",
    "guardloop reproduce": "tests/faults/test_repeated_runs.py: reproduce",
    "guardloop check": "tests/cli/test_cli.py: check",
    "guardloop benchmark": "tests/evaluation/test_benchmarks.py: benchmark",
    "guardloop compile": "tests/cli/test_cli.py: compile",
    "guardloop config show": "tests/cli/test_cli.py: show",
    "guardloop config fields": "tests/cli/test_cli.py: fields",
    "guardloop doctor": "tests/launch/checks/test_doctor.py: doctor",
    "guardloop plan": "tests/launch/checks/test_plan.py: plan",
    "guardloop serve": "tests/serving/test_service.py: serving",
    "guardloop demo-report": "tests/cli/test_cli.py: demo-report",
    "guardloop review": "tests/registry/test_registry.py: versions",
    "guardloop promote": "tests/registry/test_registry.py: promote",
    "guardloop rollback": "tests/registry/test_registry.py: rollback",
    "guardloop ui": "needs: a browser",
    "guardloop submit": "tests/launch/kubeflow/test_submit.py: submit",
    "guardloop follow": "tests/launch/kubeflow/test_runs.py: follow",
    "guardloop runs": "tests/launch/kubeflow/test_runs.py: runs",
    "guardloop logs": "tests/launch/kubeflow/test_runs.py: logs",
    "guardloop cancel": "tests/launch/kubeflow/test_runs.py: cancel",
    "guardloop schedule list": "tests/launch/kubeflow/test_runs.py: schedule",
    "guardloop schedule create": "tests/launch/kubeflow/test_runs.py: schedule",
    "guardloop schedule pause": "tests/launch/kubeflow/test_runs.py: pause",
    "guardloop schedule resume": "tests/launch/kubeflow/test_runs.py: resume",
    "guardloop schedule delete": "tests/launch/kubeflow/test_runs.py: delete",
}
CHEAP = ("guardloop config", "guardloop plan", "guardloop --version", "guardloop demo-report --out")


def documented() -> Iterator[tuple[Path, list[str]]]:
    """(page, words) of each command in a fenced block, and of those in a line that have a target or command."""
    for page in PAGES:
        lines = [line for _, code in fenced(page) for line in code.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`([^`\n]+)`", prose(page))
        for line in (part for whole in lines for part in whole.split(" && ")):
            words = line.strip().removeprefix("$ ").partition(" #")[0].partition("  ")[0].partition(" | ")[0]
            if not START.match(words):
                continue
            try:
                parts = shlex.split(words.rstrip(".… &"))
            except ValueError:
                pytest.fail(f"{name(page)}: not a command that a shell can read: {words}")
            while "=" in parts[0]:
                parts.pop(0)
            parts[0] = parts[0].removeprefix(".venv/bin/")
            if len(parts) > 1:
                yield page, parts


FOUND = list(documented())


def path_of(words: list[str]) -> tuple[list[str], typer.core.TyperCommand]:
    """The command that `words` name, with those of its words that are its name."""
    command, named = COMMANDS, ["guardloop"]
    for word in words[1:]:
        inner = getattr(command, "commands", {}).get(word)
        if inner is None:
            break
        command, named = inner, [*named, word]
    return named, command


def targets_of(words: list[str]) -> list[str]:
    return [word for word in words[1:] if "=" not in word and re.fullmatch(r"[a-z][a-z-]*", word)]


def all_commands(command: object = COMMANDS, named: str = "guardloop") -> Iterator[tuple[str, typer.core.TyperCommand]]:
    for word, inner in getattr(command, "commands", {}).items():
        if hasattr(inner, "commands"):
            yield from all_commands(inner, f"{named} {word}")
        else:
            yield f"{named} {word}", inner


def test_there_are_commands_in_the_pages() -> None:
    assert len(FOUND) > 80 and {words[0] for _, words in FOUND} == {"make", "guardloop"}


@pytest.mark.parametrize(("page", "words"), FOUND, ids=[f"{name(page)}: {' '.join(words)}" for page, words in FOUND])
def test_the_command_exists(page: Path, words: list[str]) -> None:
    if words[0] == "make":
        assert set(targets_of(words)) <= TARGETS, f"{name(page)}: the Makefile has no such target"
        given = {word.partition("=")[0] for word in words[1:] if "=" in word}
        assert given <= VARIABLES | FROM_SCRIPTS, f"{name(page)}: the Makefile reads no variable {given - VARIABLES}"
        return
    named, command = path_of(words)
    if ABOUT & set(words):
        return
    assert not hasattr(command, "commands"), f"{name(page)}: no command {' '.join(words)}"
    options = {opt for param in command.params for opt in (*param.opts, *param.secondary_opts)}
    used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert used <= options, f"{name(page)}: {' '.join(named)} has no option {', '.join(sorted(used - options))}"


def test_every_documented_command_is_run_by_a_test_or_says_what_it_needs() -> None:
    for page, words in FOUND:
        if ABOUT & set(words):
            continue
        keys = [f"make {t}" for t in targets_of(words)] if words[0] == "make" else [" ".join(path_of(words)[0])]
        for key in keys:
            assert key in TESTED, f"{name(page)}: add `{key}` to TESTED: which test runs it, or what does it need?"


@pytest.mark.parametrize("where", sorted(set(TESTED.values())))
def test_the_tests_that_are_said_to_run_them_do(where: str) -> None:
    file, _, word = where.partition(": ")
    if file != "needs":
        assert re.search(rf"\b{word}\b", (ROOT / file).read_text()), f"{file} has nothing of {word}"


def test_every_command_and_target_is_known_here() -> None:
    known = {key for key in TESTED if key.startswith("guardloop ")}
    assert known == {command for command, _ in all_commands()}
    assert {key.partition(" ")[2] for key in TESTED if key.startswith("make ")} <= TARGETS


@pytest.mark.parametrize(
    "words",
    [
        list(words)
        for words in sorted({tuple(words) for _, words in FOUND})
        if " ".join(words).startswith(CHEAP) and not {"CONFIG", "RUN", "latest"} & set(words)
    ],
    ids=" ".join,
)
def test_a_cheap_command_ends_well(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("GUARDLOOP_HOME", str(tmp_path))
    replaced = {"FILE": "configs/demo.yaml", "PAGE.html": str(tmp_path / "page.html")}
    monkeypatch.setattr(sys, "argv", [replaced.get(word, word) for word in words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code and capsys.readouterr().out


def test_the_examples_at_the_top_of_the_makefile_name_what_is_there() -> None:
    examples = "\n".join(re.findall(r"^#   make .*", MAKEFILE, re.M))
    paths = re.findall(r"\b(?:configs|tests)/[\w./-]+", examples)
    paths += [f"configs/platform/{named}.yaml" for named in re.findall(r"PLATFORM=([\w-]+)", examples)]
    assert paths and not [path for path in paths if not (ROOT / path).exists()]


def test_make_help_lists_every_target_that_is_for_people() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = re.findall(r"^  make ((?:[a-z-]+ )+)", shown, re.M)
    assert {name for names in listed for name in names.split()} >= TARGETS - {"ready"}


@pytest.mark.parametrize("target", sorted(TARGETS - {"help"}))
def test_every_target_can_be_read_by_make(target: str) -> None:
    ended = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert ended.returncode == 0 and ended.stdout.strip(), ended.stderr


# Tables and JSON

PROSE_ONLY = {  # commands that print no table, and so need no --json
    "guardloop compile": "names files",
    "guardloop serve": "tests/serving/test_service.py: serving",
    "guardloop demo-report": "names a file",
    "guardloop promote": "a sentence",
    "guardloop rollback": "a sentence",
    "guardloop ui": "a server",
    "guardloop follow": "lines as they happen; `runs --json` has the state",
    "guardloop logs": "what the stages printed",
    "guardloop cancel": "a sentence",
    "guardloop schedule create": "a sentence",
    "guardloop schedule pause": "a sentence",
    "guardloop schedule resume": "a sentence",
    "guardloop schedule delete": "a sentence",
}


@pytest.mark.parametrize(("named", "command"), list(all_commands()), ids=[named for named, _ in all_commands()])
def test_what_prints_a_table_prints_json_too(named: str, command: typer.core.TyperCommand) -> None:
    has_json = any("--json" in param.opts for param in command.params)
    assert has_json != (named in PROSE_ONLY), f"{named}: give it --json, or say in PROSE_ONLY what it prints"
