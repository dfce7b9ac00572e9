"""The commands that look at runs and stop them, and the schedules."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.ended import Ended
from support.kubeflow_server import KubeflowServer, Step, task
from support.small_servers import Kubernetes

from guardloop.core.errors import GuardLoopError
from launch.kubeflow import cluster, schedule
from launch.kubeflow.schedule import six_fields

Call = Callable[..., Ended]


@pytest.fixture
def at(guardloop: Call, server: KubeflowServer) -> Call:
    """Call a command for the server."""
    return lambda *arguments: guardloop(*arguments, "--host", server.url)


def newest(server: KubeflowServer) -> str:
    return list(server.runs)[-1]


# Runs


def test_no_runs_yet(at: Call) -> None:
    assert "no runs yet" in at("runs").out and json.loads(at("runs", "--json").out) == []


def test_runs_newest_first_page_by_page(
    at: Call, submits: Call, server: KubeflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        submits("--no-wait")
    monkeypatch.setattr(cluster, "PAGE", 2)

    listed = [row["id"] for row in json.loads(at("runs", "--json").out)]
    assert listed == list(server.runs)[::-1]
    assert [row["id"] for row in json.loads(at("runs", "--json", "--limit", "3").out)] == listed[:3]
    table = at("runs").out
    assert all(run_id in table for run_id in listed) and "PENDING" in table


def test_runs_of_an_experiment(at: Call, submits: Call, server: KubeflowServer) -> None:
    submits("--no-wait", "--experiment", "a+b 50% & more")
    submits("--no-wait")

    assert len(json.loads(at("runs", "--json", "--experiment", "a+b 50% & more").out)) == 1
    missing = at("runs", "--experiment", "none")
    assert missing.code == 2 and "no experiment 'none'" in missing.err and len(server.experiments) == 2


def test_a_run_is_found_by_id_prefix_name_and_latest(at: Call, submits: Call, server: KubeflowServer) -> None:
    submits("--no-wait")
    submits("--no-wait")
    run_id = newest(server)
    for name in (run_id, run_id[:8], server.runs[run_id]["display_name"], "latest"):
        ended = at("follow", name)
        assert ended.code == 0 and run_id in ended.out
    first, second = server.runs.values()
    second["display_name"] = first["display_name"]
    several = at("cancel", first["display_name"])
    assert several.code == 2 and "several runs" in several.err
    none = at("cancel", "yesterday")
    assert none.code == 2 and "no run 'yesterday'" in none.err and "guardloop runs" in none.err


def test_cancel(at: Call, submits: Call, server: KubeflowServer) -> None:
    server.plays("RUNNING")
    submits("--no-wait")

    assert "is being stopped" in at("cancel", "latest").out
    assert server.runs[newest(server)]["state"] == "CANCELING"

    server.plays("CANCELED")
    followed = at("follow")
    assert followed.code == 1 and "stopped" in followed.err
    again = at("cancel", "latest")
    assert again.code == 0 and "has ended already: CANCELED" in again.out


# Logs


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kubernetes:
    with Kubernetes() as running:
        monkeypatch.setenv("KUBECONFIG", str(running.kubeconfig(tmp_path / "kubeconfig")))
        monkeypatch.setenv("KF_PIPELINES_NAMESPACE", "guardloop")
        yield running


def test_logs_of_the_pods(at: Call, submits: Call, server: KubeflowServer, kubernetes: Kubernetes) -> None:
    submits("--no-wait", "--force")
    run_id = newest(server)
    graph = "guardloop-x7k2p.root"
    kubernetes.add_pod("p-1", run_id, f"{graph}.prepare-data-driver", "driver words")
    kubernetes.add_pod("p-2", run_id, f"{graph}.prepare-data.executor", "360 prompts\n[bold]as they are[/]\n")
    for shard in range(2):
        kubernetes.add_pod(
            f"s-{shard}",
            run_id,
            f"{graph}.for-loop-1.iteration-iterations({shard}:{shard}).iteration-item.screen.executor(0)",
            f"shard {shard}",
        )
    kubernetes.add_pod("w-1", run_id, f"{graph}.mine-feedback.executor", None)
    kubernetes.add_pod("o-1", "another-run", f"{graph}.screen.executor", "of another run")

    every, screen = at("logs", run_id), at("logs", run_id, "screen")

    assert every.code == screen.code == 0, every.all
    assert "360 prompts\n[bold]as they are[/]\n" in every.out and "shard 1" in every.out
    assert "driver words" not in every.out and "another run" not in every.out
    assert "shard 0" in screen.out and "shard 1" in screen.out and "360" not in screen.out
    assert at("logs", run_id, "mine-feedback").code == 2
    wrong = at("logs", run_id, "scren")
    assert wrong.code == 2 and "no stage 'scren'" in wrong.err and "generate-responses" in wrong.err


def test_logs_without_kubernetes_come_from_kubeflow(at: Call, submits: Call, server: KubeflowServer) -> None:
    server.plays(Step("FAILED", [task("screen", "FAILED", child_tasks=[{"pod_name": "pod-9"}, {"task_id": "t"}])]))
    server.logs["pod-9"] = "loading\nerror: the guard does not load\n  -> give it memory\n"

    failed = submits()

    assert failed.code == 1 and "error: the guard does not load -> give it memory" in failed.words
    assert "loading" not in failed.err
    assert "error: the guard does not load" in at("logs", newest(server), "screen").out


def test_logs_that_cannot_be_had_say_why_and_what_to_do(
    at: Call, submits: Call, server: KubeflowServer, kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    submits("--no-wait", "--force")
    run_id = newest(server)

    gone = at("logs", run_id)
    kubernetes.status = 403
    forbidden = at("logs", run_id)
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    unknown = at("logs", run_id)

    assert gone.code == forbidden.code == unknown.code == 2
    assert "pods are gone" in gone.err and "answered 403" in forbidden.err
    assert "no Kubernetes credentials" in unknown.err
    assert all(f"kubectl -n guardloop logs -c main -l pipeline/runid={run_id}" in e.err for e in (gone, forbidden))


# Schedules


@pytest.fixture
def schedules(at: Call) -> Call:
    return lambda *more: at("schedule", "create", "--platform", "minikube", *more)


def test_a_schedule(schedules: Call, at: Call, server: KubeflowServer) -> None:
    ended = schedules("--cron", "0 3 * * 1")

    assert ended.code == 0, ended.all
    (made,) = server.schedules.values()
    assert made["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * 1"}} and made["status"] == "ENABLED"
    assert made["max_concurrency"] == "1" and made["no_catchup"] is True
    assert made["runtime_config"]["parameters"]["guard"]["base"] == "embedded:guard"
    assert "guardloop-demo created" in ended.out and not server.runs
    (row,) = json.loads(at("schedule", "list", "--json").out)
    assert row == {"id": made["recurring_run_id"], "name": "guardloop-demo", "status": "ENABLED", "cron": "0 0 3 * * 1"}
    assert "guardloop-demo" in at("schedule", "list").out


@pytest.mark.slow
def test_scheduled_runs_read_the_data_again_and_submitted_ones_when_asked(
    schedules: Call, submits: Call, server: KubeflowServer
) -> None:
    schedules("--cron", "@daily")
    submits("--no-wait")
    submits("--no-wait", "--fresh")

    cached = {version["name"]: "enableCache" in server.packages[key] for key, version in server.versions.items()}
    assert sorted(cached.values()) == [False, True]
    assert all(("-minikube-demo-fresh" in name) is not uses for name, uses in cached.items())
    (made,) = server.schedules.values()
    used = [one["pipeline_version_reference"]["pipeline_version_id"] for one in (made, *server.runs.values())]
    assert used[0] == used[2] != used[1]


def test_a_schedule_is_one_however_often_it_is_made(schedules: Call, server: KubeflowServer) -> None:
    assert "created" in schedules("--cron", "@daily").out
    before = list(server.schedules)
    assert "unchanged" in schedules("--cron", "@daily").out and list(server.schedules) == before
    assert "replaced" in schedules("--cron", "@weekly").out
    (made,) = server.schedules.values()
    assert made["trigger"]["cron_schedule"]["cron"] == "@weekly"
    assert "created" in schedules("--cron", "@weekly", "--name", "another").out and len(server.schedules) == 2


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("status", [500, "hang up"])
def test_a_schedule_is_made_once_though_the_answer_is_lost(
    schedules: Call, server: KubeflowServer, after: bool, status: object
) -> None:
    schedules("--cron", "@daily")
    server.fail("POST", "/recurringruns", status, after=after)

    assert schedules("--cron", "@hourly").code == 0
    assert [one["trigger"]["cron_schedule"]["cron"] for one in server.schedules.values()] == ["@hourly"]


def test_a_failed_replacement_keeps_the_old_schedule(schedules: Call, server: KubeflowServer) -> None:
    schedules("--cron", "@daily")
    server.fail("POST", "/recurringruns", 400)

    assert schedules("--cron", "@hourly").code == 2
    assert [one["trigger"]["cron_schedule"]["cron"] for one in server.schedules.values()] == ["@daily"]


def test_pause_resume_and_delete(schedules: Call, at: Call, server: KubeflowServer) -> None:
    assert "no schedules yet" in at("schedule", "list").out
    schedules("--cron", "@daily", "--name", "nightly")
    (made,) = server.schedules.values()

    assert at("schedule", "pause", "nightly").code == 0 and made["status"] == "DISABLED"
    assert at("schedule", "resume", "nightly").code == 0 and made["status"] == "ENABLED"
    missing = at("schedule", "pause", "nigthly")
    assert missing.code == 2 and "schedules there: nightly" in missing.err
    assert at("schedule", "delete", "nightly").code == 0 and not server.schedules
    assert at("schedule", "delete", "nightly").code == 2


def test_a_schedule_whose_run_is_under_way_is_not_deleted_unasked(
    schedules: Call, submits: Call, at: Call, server: KubeflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "POLL_SECONDS", 0.01)
    schedules("--cron", "@daily", "--name", "nightly")
    submits("--no-wait")
    (run,), (made,) = server.runs.values(), server.schedules.values()
    run |= {"recurring_run_id": made["recurring_run_id"], "state": "RUNNING"}
    server.plays("RUNNING", "RUNNING", "SUCCEEDED")

    refused = at("schedule", "delete", "nightly")
    replaced = schedules("--cron", "@weekly", "--name", "nightly")
    assert refused.code == replaced.code == 2 and run["run_id"] in refused.words and "--wait" in replaced.words
    assert list(server.schedules.values()) == [made]

    assert at("schedule", "delete", "nightly", "--wait").code == 0
    assert not server.schedules and run["state"] == "SUCCEEDED"


def test_the_run_of_a_schedule_can_be_stopped_with_it(
    schedules: Call, submits: Call, at: Call, server: KubeflowServer
) -> None:
    schedules("--cron", "@daily", "--name", "nightly")
    submits("--no-wait")
    (run,), (made,) = server.runs.values(), server.schedules.values()
    run |= {"recurring_run_id": made["recurring_run_id"], "state": "RUNNING"}

    assert at("schedule", "delete", "nightly", "--now").code == 0
    assert not server.schedules and server.count("POST", f"/runs/{run['run_id']}:terminate") == 1


@pytest.mark.parametrize(
    ("crontab", "kubeflow"),
    [
        ("0 3 * * 1", "0 0 3 * * 1"),
        ("  */15  *  * * MON-FRI ", "0 */15 * * * MON-FRI"),
        ("30 0 3 ? * 1", "30 0 3 ? * 1"),
        ("@daily", "@daily"),
        ("@every 1h30m", "@every 1h30m"),
    ],
)
def test_a_crontab_means_what_it_means_elsewhere(crontab: str, kubeflow: str) -> None:
    assert six_fields(crontab) == kubeflow


@pytest.mark.parametrize("cron", ["", "daily", "@dayly", "* * * *", "0 3 * * 1; rm", "0 0 0 0 0 0 0", "0 3 * * $(x)"])
def test_what_is_no_crontab(schedules: Call, server: KubeflowServer, cron: str) -> None:
    with pytest.raises(GuardLoopError, match="not a cron expression"):
        six_fields(cron)
    ended = schedules("--cron", cron)
    assert ended.code == 2 and not server.requests
