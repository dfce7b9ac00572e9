import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.ended import Ended
from support.models import save_guard
from support.root import ROOT

from guardloop import __version__
from guardloop.cli import configuration
from guardloop.cli import main as cli
from guardloop.config import Settings, describe_fields


@pytest.fixture
def guardloop(monkeypatch, capsys, tmp_path) -> Callable[..., Ended]:
    """Call the command line in the repository, with a home folder of its own."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("GUARDLOOP_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["guardloop", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        written = capsys.readouterr()
        return Ended(ended.value.code or 0, written.out, written.err)

    return call


def refused(ended: Ended, *words: str) -> None:
    assert ended.code == 2 and ended.out == ""
    assert ended.err.startswith("error: ") and "\n  -> " in ended.err and "Traceback" not in ended.err
    assert all(word in ended.err for word in words), ended.err


# What it tells


def test_the_version(guardloop):
    assert guardloop("--version") == Ended(0, f"{__version__}\n", "")


def test_help_names_every_command(guardloop):
    ended = guardloop("--help")
    assert ended.code == 0
    assert all(
        name in ended.out for name in ("run", "compile", "check", "review", "promote", "rollback", "ui", "config")
    )


@pytest.mark.parametrize("port", ["0", "65536"])
def test_a_port_that_there_is_not_is_refused(guardloop, port):
    ended = guardloop("ui", "--port", port)
    assert ended.code == 2 and "--port" in ended.err and "Traceback" not in ended.err


def test_no_arguments_give_the_help(guardloop):
    assert "Usage" in guardloop().out


def test_the_settings_of_a_configuration(guardloop):
    shown = guardloop("config", "show", "configs/llama-guard-7b.yaml")
    as_json = guardloop("config", "show", "configs/llama-guard-7b.yaml", "--json")
    assert shown.code == as_json.code == 0
    assert yaml.safe_load(shown.out) == json.loads(as_json.out)
    assert json.loads(as_json.out)["guard"]["base"] == "meta-llama/LlamaGuard-7b"


def test_shown_settings_are_a_configuration(guardloop, tmp_path):
    (tmp_path / "shown.yaml").write_text(guardloop("config", "show").out)
    assert guardloop("config", "show", str(tmp_path / "shown.yaml")).out == guardloop("config", "show").out


def test_the_list_of_settings(guardloop):
    rows = json.loads(guardloop("config", "fields", "--json").out)
    assert [row["setting"] for row in rows] == [row[0] for row in describe_fields()]
    assert all(row["meaning"] for row in rows)
    assert {row["setting"].partition(".")[0] for row in rows} == set(Settings.model_fields)
    table = guardloop("config", "fields").out
    assert "guard.base" in table.replace("\n", "")


def test_a_sample_report(guardloop, tmp_path, monkeypatch):
    written = guardloop("demo-report", "--out", str(tmp_path / "deep" / "page.html"))
    page = (tmp_path / "deep" / "page.html").read_text()
    assert written == Ended(0, f"{tmp_path}/deep/page.html\n", "")
    assert page.startswith("<!doctype html>") and "made up" in page and "Checks of the gate" in page

    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: bool(opened.append(address)))
    shown = guardloop("demo-report")
    assert opened == [(tmp_path / "home/demo-report.html").as_uri()] and "open that file" in shown.out
    assert (tmp_path / "home/demo-report.html").read_text() == page

    (tmp_path / "file").touch()
    refused(guardloop("demo-report", "--out", str(tmp_path / "file" / "page.html")), "cannot write", "--out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("guardloop pl", ["plan"]),
        ("guardloop run --platform g", ["gpu-cluster"]),
        ("guardloop plan configs/d", ["configs/demo.yaml"]),
        ("guardloop benchmark xs", ["xstest"]),
        ("guardloop plan --past 2026", ["20260101-full"]),
    ],
)
def test_the_shell_completes(typed, offered, tmp_path):
    (tmp_path / "runs" / "20260101-full").mkdir(parents=True)
    asked = {"_GUARDLOOP_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "GUARDLOOP_HOME": str(tmp_path), **asked}
    program = "import sys; sys.argv[0] = 'guardloop'; from guardloop.cli.main import app; app(prog_name='guardloop')"
    ended = subprocess.run(
        [sys.executable, "-c", program], env=surroundings, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.stdout.split() == offered, ended.stderr


# What it refuses


def test_an_unknown_pipeline(guardloop, tmp_path):
    refused(guardloop("run", "--pipeline", "traning"), "'traning'", "process, train, evaluate, full")
    assert not (tmp_path / "home").exists()


def test_a_missing_configuration_or_platform(guardloop):
    refused(guardloop("run", "--config", "configs/dmo.yaml"), "did you mean configs/demo.yaml?")
    refused(guardloop("run", "--platform", "locl"), "did you mean configs/platform/local.yaml?")
    refused(guardloop("run", "--platform", "nowhere"), "platform files here: configs/platform/docker.yaml, ")
    refused(guardloop("config", "show", "nothing.yaml"), "nothing.yaml", "configs/demo.yaml")
    refused(guardloop("check", "hello", "--config", "nothing.yaml"), "nothing.yaml")


def test_a_cluster_is_compiled_for_and_not_run_on(guardloop, tmp_path):
    refused(guardloop("run", "--platform", "minikube"), "is a cluster", "guardloop submit --platform minikube")
    assert not (tmp_path / "home").exists()

    ended = guardloop("compile", "--platform", "minikube", "--config", "configs/demo.yaml", "--out", str(tmp_path))
    assert ended.code == 0, ended.err
    text = (tmp_path / "full.yaml").read_text()
    assert "guardloop-environment" in text and "value: demo.yaml" in text


def test_a_place_that_cannot_be_written(guardloop, tmp_path):
    (tmp_path / "file").write_text("")
    refused(guardloop("compile", "--out", str(tmp_path / "file")), "cannot write", "--out")


def test_a_wrong_setting(guardloop, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("guard: {bse: x}\ntraining: {rank: '[red]many[/]'}\n")
    refused(guardloop("config", "show", str(path)), "mine.yaml.guard.bse", "did you mean `base`?", "a valid integer")


def test_data_that_is_not_there(guardloop, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("dataset: {traffic: {kind: file, path: nothing.jsonl}}\n")
    refused(guardloop("run", "--config", str(path)), "dataset.traffic", "nothing.jsonl")
    path.write_text("dataset: {test: {path: tst}}\n")
    refused(guardloop("run", "--config", str(path)), "dataset.test", "'tst'", "traffic")
    path.write_text("dataset: {response_test: {kind: file, path: ~nobody-of-that-name/x.csv}}\n")
    refused(guardloop("run", "--config", str(path)), "dataset.response_test", "~nobody-of-that-name")
    benchmark = "{name: ours, kind: safe, source: {kind: file, path: gone.csv}}"
    path.write_text(f"evaluation: {{benchmarks: [{benchmark}]}}\n")
    refused(guardloop("run", "--config", str(path)), "benchmark ours", "gone.csv")


def test_a_key_that_is_not_set(guardloop, tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    path = tmp_path / "mine.yaml"
    path.write_text(
        "responders: [{kind: openai, model: m, base_url: 'http://localhost/v1', api_key_env: NO_SUCH_KEY}]\n"
    )
    refused(guardloop("run", "--config", str(path)), "NO_SUCH_KEY is not set")


@pytest.mark.parametrize("pipeline", ["train", "evaluate"])
def test_a_pipeline_that_starts_from_a_run_there_is_not(guardloop, pipeline):
    refused(guardloop("run", "--pipeline", pipeline, "--from", "yesterday"), "no run 'yesterday'")


def test_check_needs_something_to_judge(guardloop, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("  \n"))
    refused(guardloop("check"), "give a text, a pipe or --file")
    refused(guardloop("check", "hello", "--file", str(tmp_path / "x.jsonl")), "--file goes alone")
    refused(guardloop("check", "--response", "hi", "--file", str(tmp_path / "x.jsonl")), "--file goes alone")
    refused(guardloop("check", "one", "two", "--response", "hi"), "2 prompts and 1 responses")


@pytest.mark.slow
def test_check_takes_many_texts_and_a_pipe(guardloop, tmp_path, monkeypatch):
    (tmp_path / "small.yaml").write_text(f"guard: {{base: {save_guard(tmp_path / 'guard')}, min_label_mass: 0}}\n")
    config = ("--config", str(tmp_path / "small.yaml"), "--json")

    def checked(*arguments: str) -> list[dict]:
        ended = guardloop("check", *arguments, *config)
        assert ended.code == 0, ended.err
        return [json.loads(line) for line in ended.out.splitlines()]

    two = checked("hello", "a bomb")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\r\n\na bomb\n"))
    piped = checked()
    answered = checked("hello", "hello", "--response", "no", "--response", "a bomb")
    assert [row["score"] for row in piped] == pytest.approx([row["score"] for row in two], abs=1e-4)
    assert len({row["score"] for row in two + answered}) == 4
    assert [row["id"] for row in answered] == ["1", "2"]


def test_check_names_the_row_that_it_cannot_read(guardloop, tmp_path):
    refused(guardloop("check", "--file", str(tmp_path / "nothing.jsonl")), "--file", "nothing.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    refused(guardloop("check", "--file", str(tmp_path / "rows.jsonl")), "row 2", "promt")


def test_a_message_stays_on_its_line(guardloop, tmp_path):
    path = tmp_path / ("long-name-" * 12) / "c.yaml"
    assert str(path) in guardloop("config", "show", str(path)).err


@pytest.mark.parametrize("arguments", [["rum"], ["run", "--pipelin", "full"], ["promote", "one"], ["config", "shw"]])
def test_wrong_usage_ends_with_the_same_code(guardloop, arguments):
    ended = guardloop(*arguments)
    assert ended.code == 2 and "Usage" in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("arguments", "near"),
    [(["rum"], "run"), (["docter"], "doctor"), (["config", "shw"], "show"), (["plan", "--pasd", "x"], "--past")],
)
def test_a_mistyped_word_is_answered_with_the_nearest(guardloop, arguments, near):
    assert re.search(rf"(Did you mean|Possible options:|Did you mean one of:?) ?'?{near}", guardloop(*arguments).err)


def test_ctrl_c_ends_with_a_word_and_its_own_code(guardloop, monkeypatch):
    def interrupted(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(configuration, "settings_of", interrupted)
    ended = guardloop("config", "show")
    assert ended.code == 130 and "stopped" in ended.err and "Traceback" not in ended.err


# As a process


def test_as_a_process_bad_input_ends_with_2_before_any_model_library_loads(tmp_path):
    program = "import sys; from guardloop.cli.main import main\n"
    program += "heavy = {'torch', 'scipy', 'mlflow', 'boto3'}\n"
    program += "try: main()\nfinally: sys.stdout.write(str(bool(heavy & set(sys.modules))))"
    ended = subprocess.run(
        [sys.executable, "-c", program, "check"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert ended.returncode == 2 and ended.stdout == "False"
    assert ended.stderr.startswith("error: check:") and "Traceback" not in ended.stderr


# Two guards side by side


@pytest.mark.slow
def test_check_against_shows_both_verdicts(guardloop, tmp_path):
    first, second = save_guard(tmp_path / "first", threshold=-50.0), save_guard(tmp_path / "second", threshold=50.0)
    (tmp_path / "mine.yaml").write_text(f"guard: {{base: {first}, min_label_mass: 0}}\n")

    call = ("check", "hello", "--config", str(tmp_path / "mine.yaml"), "--against", str(second))
    shown, told = guardloop(*call), guardloop(*call, "--json")

    assert shown.code == told.code == 0, shown.err
    line = shown.out.splitlines()[-1].split()
    assert line[0] == "unsafe" and line[2] == "safe" and str(second) in shown.out
    row = json.loads(told.out)
    assert row["verdict"] == "unsafe" and row["against"]["verdict"] == "safe"
    assert row["score"] == pytest.approx(row["against"]["score"], abs=1e-5)
