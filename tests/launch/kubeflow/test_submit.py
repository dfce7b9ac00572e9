import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.ended import Ended
from support.kubeflow_server import HANG_UP, TIMEOUT, KubeflowServer, Step, task

from guardloop.config import load_settings
from launch.kubeflow import submit

Call = Callable[..., Ended]


def only(table: dict) -> dict:
    assert len(table) == 1
    return next(iter(table.values()))


# What is submitted


def test_a_run_gets_the_settings_and_ends_well(server: KubeflowServer, submits: Call, packages: Path) -> None:
    ended = submits("--experiment", "guards")

    assert ended.code == 0, ended.all
    run, version = only(server.runs), only(server.versions)
    sections = load_settings("configs/demo.yaml").sections()
    assert run["runtime_config"]["parameters"] == {**sections, "shards": 2}
    assert run["pipeline_version_reference"]["pipeline_version_id"] == version["pipeline_version_id"]
    assert only(server.experiments)["display_name"] == "guards"
    assert only(server.pipelines)["name"] == "guardloop"
    assert only(server.packages) == (packages / "full.yaml").read_text()
    assert f"{server.url}/#/runs/details/{run['run_id']}" in ended.out
    assert "succeeded" in ended.out


def test_the_version_is_named_by_the_commit_and_used_again(server: KubeflowServer, submits: Call) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout

    assert submits().code == submits().code == submits("--pipeline", "process").code == 0

    names = [version["name"] for version in server.versions.values()]
    assert len(server.runs) == 3 and len(server.pipelines) == len(names) == 2
    assert all(name.startswith(f"{commit[:12]}-minikube-demo") for name in names)


def test_a_version_of_the_same_name_and_other_content_is_left_alone(server: KubeflowServer, submits: Call) -> None:
    submits()
    older = only(server.versions)
    older["description"] = "GuardLoop full, package sha256:0000"

    assert submits().code == submits().code == 0

    (_, newer), (first, second, third) = server.versions.values(), server.runs.values()
    assert newer["name"].startswith(f"{older['name']}-") and older["description"].endswith("0000")
    used = [run["pipeline_version_reference"]["pipeline_version_id"] for run in (first, second, third)]
    assert used == [older["pipeline_version_id"], *[newer["pipeline_version_id"]] * 2]

    newer["description"] = "someone else's"
    refused = submits()
    assert refused.code == 2 and "was not made from this package" in refused.err and len(server.runs) == 3


def test_a_version_that_another_uploads_at_the_same_moment(server: KubeflowServer, submits: Call) -> None:
    server.fail("POST", "/upload_version", 409, after=True)
    server.fail("POST", "/pipelines", 409, after=True)
    server.fail("POST", "/experiments", 409, after=True)

    assert submits().code == 0
    assert len(server.versions) == len(server.pipelines) == len(server.experiments) == len(server.runs) == 1


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "code.py").write_text("x = 1\n")
    author = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(folder), *arguments], check=True)
    return folder


def test_names_of_versions(checkout: Path, tmp_path: Path) -> None:
    clean = submit.code_state(checkout)
    (checkout / "code.py").write_text("x = 2\n")
    changed = submit.code_state(checkout)
    (checkout / "inner").mkdir()

    assert clean.tag == clean.commit and changed.tag.startswith(f"{clean.commit}-dirty-")
    assert submit.code_state(checkout / "inner") == submit.code_state(tmp_path) == submit.Code()
    name = submit._version_name
    assert name(clean, "gpu-cluster", "d" * 64) == f"{clean.commit[:12]}-gpu-cluster"
    assert name(changed, "My_platform!", "d" * 64) == f"{clean.commit[:12]}-my-platform-changed-dddddddd"
    assert name(submit.Code(), "local", "e" * 64) == "no-commit-local-package-eeeeeeee"


def test_train_starts_from_an_earlier_output(server: KubeflowServer, submits: Call) -> None:
    lacking = submits("--pipeline", "train")
    wrong = submits("--pipeline", "train", "--artifact", "training_set=s3://b/set", "--artifact", "adapter=s3://b/a")
    shapeless = submits("--pipeline", "train", "--artifact", "training_set")
    unknown = submits("--pipeline", "trian")

    assert [e.code for e in (lacking, wrong, shapeless, unknown)] == [2, 2, 2, 2] and not server.requests
    assert "--artifact training_set=URI" in lacking.err and "its inputs: training_set" in wrong.err
    assert "process, train, evaluate, full" in unknown.err

    assert submits("--pipeline", "train", "--artifact", "training_set=s3://b/set").code == 0
    assert only(server.runs)["runtime_config"]["parameters"]["training_set_uri"] == "s3://b/set"


def test_a_dry_run_sends_nothing(server: KubeflowServer, submits: Call) -> None:
    ended = submits("--dry-run")

    assert ended.code == 0 and "nothing was submitted" in ended.out
    assert {method for method, _, _ in server.requests} == {"GET"}


def test_as_json(server: KubeflowServer, submits: Call) -> None:
    dry, sent = submits("--json", "--dry-run"), submits("--json")
    assert json.loads(dry.out)["run"] is None and "dry run" in dry.err
    told = json.loads(sent.out)
    assert told["run"]["id"] in server.runs and told["run"]["id"] in told["run"]["page"]
    assert {check["name"]: check["verdict"] for check in told["checks"]}["Kubeflow Pipelines"] == "ok"


def test_without_waiting(server: KubeflowServer, submits: Call) -> None:
    server.plays("FAILED")

    assert submits("--no-wait").code == 0
    assert server.count("GET", f"/runs/{only(server.runs)['run_id']}") == 0


def test_what_the_platform_says(server: KubeflowServer, guardloop: Call, tmp_path: Path) -> None:
    kubeflow = {"host": server.url, "ui_host": "https://ui.example.org/", "experiment": "nightly"}
    more = {"runner": "kubeflow", "shards": 3, "cluster": {"service_account": "runner"}}
    kubeflow["pipeline_root"] = "file:///tmp/runs"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"kubeflow": kubeflow, **more}))

    ended = guardloop("submit", "--platform", str(tmp_path / "mine.yaml"))

    assert ended.code == 0, ended.all
    run = only(server.runs)
    assert run["service_account"] == "runner" and run["runtime_config"]["pipeline_root"] == "file:///tmp/runs"
    assert run["runtime_config"]["parameters"]["shards"] == 3
    assert only(server.experiments)["display_name"] == "nightly"
    assert f"https://ui.example.org/#/runs/details/{run['run_id']}" in ended.out
    assert only(server.versions)["name"].partition("-")[2].startswith("mine-demo")


def test_options_come_before_the_environment_and_that_before_the_platform(
    server: KubeflowServer, guardloop: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = "http://localhost:9"
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump({"runner": "kubeflow", "kubeflow": {"host": dead}, "cluster": {}})
    )
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
    assert guardloop("submit", "--platform", str(tmp_path / "mine.yaml")).code == 0
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", dead)
    assert guardloop("submit", "--platform", str(tmp_path / "mine.yaml"), "--host", server.url).code == 0


def test_a_namespace_is_sent_where_users_are_kept_apart(guardloop: Call, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    with KubeflowServer(multi_user=True) as server:
        mine.write_text(yaml.safe_dump({"runner": "kubeflow", "kubeflow": {"host": server.url}, "cluster": {}}))
        without = guardloop("submit", "--platform", str(mine))
        refused = guardloop("submit", "--platform", str(mine), "--namespace", "forbidden")
        allowed = guardloop("submit", "--platform", str(mine), "--namespace", "ada")

        assert without.code == refused.code == 2 and allowed.code == 0, allowed.all
        assert "give --namespace" in without.out
        assert "no role in namespace forbidden" in refused.words and "kubeflow-edit" in refused.words
        assert only(server.pipelines)["namespace"] == only(server.experiments)["namespace"] == "ada"


# When Kubeflow Pipelines fails


@pytest.mark.slow
@pytest.mark.usefixtures("short_timeout")
@pytest.mark.parametrize("fault", [500, 502, 503, 429, TIMEOUT, HANG_UP])
@pytest.mark.parametrize(
    "call",
    [("GET", "/healthz"), ("POST", "/pipelines"), ("POST", "/upload_version"), ("POST", "/experiments")],
)
def test_a_passing_fault_is_passed(server: KubeflowServer, submits: Call, call: tuple[str, str], fault: object) -> None:
    server.fail(*call, fault)

    ended = submits("--no-wait")

    assert ended.code == 0, ended.all
    assert len(server.runs) == 1 and "trying again" in ended.err


@pytest.mark.usefixtures("short_timeout")
@pytest.mark.parametrize("fault", [500, 503, TIMEOUT, HANG_UP])
@pytest.mark.parametrize("after", [False, True])
def test_a_run_is_started_once_though_the_answer_is_lost(
    server: KubeflowServer, submits: Call, fault: object, after: bool
) -> None:
    server.fail("POST", "/runs", fault, after=after)

    ended = submits()

    assert ended.code == 0, ended.all
    assert len(server.runs) == 1 and only(server.runs)["run_id"] in ended.out


@pytest.mark.parametrize("status", [400, 401, 403, 404])
@pytest.mark.parametrize("path", ["/pipelines", "/upload_version", "/experiments", "/runs"])
def test_a_refusal_is_told_at_once(server: KubeflowServer, submits: Call, path: str, status: int) -> None:
    server.fail("POST", path, status)

    ended = submits()

    assert ended.code == 2 and ended.err.startswith("error: ") and "\n  -> " in ended.err
    assert not server.runs and server.count("POST", path) == 1


@pytest.mark.usefixtures("impatient")
def test_a_fault_that_stays_ends_with_what_the_server_said(server: KubeflowServer, submits: Call) -> None:
    server.fail("POST", "/runs", *[500] * 200)

    ended = submits()

    assert ended.code == 2 and "500 Internal Server Error: scripted 500" in ended.err and "ml-pipeline" in ended.err


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("body", ["<html>Welcome</html>", "", "plain", [], {}, {"pipeline_id": 7}, {"runs": "no"}])
@pytest.mark.parametrize("path", ["/healthz", "/runs", "/pipelines/names/guardloop"])
def test_odd_answers_never_end_in_a_traceback(server: KubeflowServer, submits: Call, path: str, body: object) -> None:
    server.fail("GET", path, *[200] * 50, body=body)

    assert submits().code in (0, 1, 2)


@pytest.mark.usefixtures("impatient")
def test_nobody_answers(guardloop: Call) -> None:
    ended = guardloop("submit", "--platform", "minikube", "--host", "http://localhost:9")

    assert ended.code == 2 and "cannot be reached" in ended.words and "port-forward" in ended.words
    assert "nothing was submitted" in ended.err


def test_another_server_answers(guardloop: Call, server: KubeflowServer) -> None:
    ended = guardloop("submit", "--platform", "minikube", "--host", f"{server.url}/login")

    assert ended.code == 2 and "/pipeline" in ended.out


# Following


STAGES = [task("prepare-data-driver", "SUCCEEDED"), task("prepare-data", "SUCCEEDED"), task("executor", "SUCCEEDED")]


def test_stages_are_told_as_they_end_and_nothing_else_is(server: KubeflowServer, submits: Call) -> None:
    server.plays(
        "PENDING",
        Step("RUNNING", [task("root", "RUNNING"), task("prepare-data", "RUNNING")]),
        Step("RUNNING", [*STAGES, task("train-guard", "RUNNING")]),
        Step("RUNNING", [*STAGES, task("train-guard", "RUNNING")]),
        Step("SUCCEEDED", [*STAGES, task("train-guard", "SUCCEEDED"), task("promote-model", "SKIPPED")]),
    )

    ended = submits()

    lines = [" ".join(line.split()) for line in ended.out.splitlines()]
    told = lines[next(i for i, line in enumerate(lines) if "/#/runs" in line) + 1 :]
    assert ended.code == 0
    assert told[:-1] == [
        "waiting to start",
        "… prepare data",
        "✓ prepare data 12.5 s",
        "… train guard",
        "✓ train guard 12.5 s",
        "- promote model 12.5 s skipped",
    ]


def test_a_failed_stage_is_named_with_its_message_and_its_log(server: KubeflowServer, submits: Call) -> None:
    failed = [*STAGES, task("train-guard", "FAILED", "the adapter is [red]broken[/]"), task("executor", "FAILED")]
    server.plays("RUNNING", Step("FAILED", failed, error="workflow failed"))

    ended = submits()

    run_id = only(server.runs)["run_id"]
    assert ended.code == 1
    assert "FAILED in train guard" in ended.err and "the adapter is [red]broken[/]" in ended.err
    assert f"guardloop logs {run_id} train-guard" in ended.err


def test_a_stage_that_could_not_start_is_named(server: KubeflowServer, submits: Call) -> None:
    server.plays(Step("FAILED", [task("screen-candidate-driver", "FAILED")]))

    ended = submits()

    assert ended.code == 1 and "FAILED in screen test (candidate)" in ended.err and "could not be started" in ended.err


def test_a_failure_outside_the_stages_tells_what_the_run_says(server: KubeflowServer, submits: Call) -> None:
    server.plays(Step("FAILED", error="quota exceeded"))

    ended = submits()

    assert ended.code == 1 and "quota exceeded" in ended.err


@pytest.mark.usefixtures("short_timeout")
@pytest.mark.parametrize("fault", [500, 503, TIMEOUT, HANG_UP])
def test_following_bears_an_absence(server: KubeflowServer, submits: Call, guardloop: Call, fault: object) -> None:
    server.plays("RUNNING", "RUNNING", "SUCCEEDED")
    submits("--no-wait")
    run_id = only(server.runs)["run_id"]
    server.fail("GET", f"/runs/{run_id}", fault)

    ended = guardloop("follow", run_id[:8], "--host", server.url)

    assert ended.code == 0 and "trying again" in ended.all


@pytest.mark.usefixtures("impatient")
def test_following_gives_up_when_the_absence_stays(server: KubeflowServer, submits: Call, guardloop: Call) -> None:
    server.plays("RUNNING")
    submits("--no-wait")
    run_id = only(server.runs)["run_id"]
    server.fail("GET", f"/runs/{run_id}", *[503] * 500)

    ended = guardloop("follow", run_id, "--host", server.url)

    assert ended.code == 2 and "503" in ended.err


def test_a_run_that_is_deleted_while_it_is_followed(server: KubeflowServer, submits: Call) -> None:
    server.plays("RUNNING")
    original = server._look

    def look(run: dict) -> dict:
        shown = original(run)
        if run["looks"] == 3:
            del server.runs[run["run_id"]]
        return shown

    server._look = look  # type: ignore[method-assign]
    ended = submits()

    assert ended.code == 2 and "no such thing" in ended.err and "may go on" in ended.err


def test_ctrl_c_leaves_the_run_alone(server: KubeflowServer, submits: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    server.plays("RUNNING")

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.kubeflow.follow.time.sleep", interrupted)
    ended = submits()

    run_id = only(server.runs)["run_id"]
    assert ended.code == 130
    assert f"guardloop follow {run_id}" in ended.out and f"guardloop cancel {run_id}" in ended.out
    assert only(server.runs)["state"] == "RUNNING" and "nothing was promoted" not in ended.all


# What is not told


def test_no_secret_is_printed(guardloop: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "very-secret-token")
    monkeypatch.setenv("KF_PIPELINES_COOKIE", "session=very-secret-cookie")
    with KubeflowServer(token="another") as server:
        ended = guardloop("submit", "--platform", "minikube", "--host", server.url)

    assert ended.code == 2 and "very-secret" not in ended.all and "does not know who asks" in ended.words


def test_the_run_as_json(server: KubeflowServer, submits: Call, guardloop: Call) -> None:
    submits()
    rows = json.loads(guardloop("runs", "--host", server.url, "--json").out)

    assert [row["state"] for row in rows] == ["SUCCEEDED"] and rows[0]["id"] == only(server.runs)["run_id"]


def test_this_machine_is_no_cluster(guardloop: Call) -> None:
    ended = guardloop("submit", "--platform", "local", "--host", "http://localhost:9")

    assert ended.code == 2 and "local is no cluster" in ended.words and "minikube, gpu-cluster" in ended.words
