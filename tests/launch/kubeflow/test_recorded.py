"""What a real Kubeflow Pipelines 2.17 answered, replayed: runs that failed, waited, were stopped, or were cached."""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.ended import Ended
from support.kubeflow_server import KubeflowServer, Step
from support.small_servers import Kubernetes

from launch.kubeflow import follow
from launch.kubeflow.logs import error_in, outcome_in, own_lines
from launch.kubeflow.tasks import stages_at

RECORDINGS = Path(__file__).parent / "recordings"
TITLES = {
    "prepare-data": "prepare data",
    "screen": "screen prompts",
    "generate-responses": "generate responses",
    "screen-2": "screen responses",
    "mine-feedback": "mine feedback",
    "train-guard": "train guard",
    "screen-improved": "screen test (candidate)",
    "score-benchmarks": "score benchmarks",
    "evaluate": "evaluate",
    "register-model": "register model",
}
Call = Callable[..., Ended]


def recorded(name: str) -> Any:
    with gzip.open(RECORDINGS / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)


def log(name: str) -> str:
    with gzip.open(RECORDINGS / f"{name}.txt.gz", "rt", encoding="utf-8") as file:
        return file.read().partition("\n")[2]  # without the headline of `guardloop logs`


@pytest.fixture
def replayed(submits: Call, server: KubeflowServer, guardloop: Call, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Follow a run that goes through recorded states; the pipeline's titles are those of its time."""
    monkeypatch.setattr(follow, "titles_of", lambda version: TITLES)

    def replay(runs: list[dict[str, Any]], kubernetes: Kubernetes | None = None, pods: Iterable[Any] = ()) -> Ended:
        submits("--no-wait", "--force")
        (run_id,) = server.runs
        for pod in pods:
            pod["metadata"]["labels"]["pipeline/runid"] = run_id
            kubernetes.objects.setdefault("pods", {})[pod["metadata"]["name"]] = pod
        server.runs[run_id]["runtime_config"] = runs[-1]["runtime_config"]
        server.runs[run_id]["state_history"] = runs[-1].get("state_history", [])
        server.plays(*(Step(run["state"], run["run_details"]["task_details"]) for run in runs))
        return guardloop("follow", run_id, "--host", server.url)

    return replay


def lines_of(ended: Ended) -> list[str]:
    return [" ".join(line.split()) for line in ended.out.splitlines()]


def test_a_failed_run_is_told_with_its_stage_and_our_error(replayed: Call, server: KubeflowServer) -> None:
    runs = recorded("failed")
    pods = {c["pod_name"] for t in runs[-1]["run_details"]["task_details"] for c in t.get("child_tasks", [])}
    server.logs.update(dict.fromkeys(pods, log("log-failed-stage")))

    ended = replayed(runs)

    assert ended.code == 1 and "FAILED in prepare data" in ended.err  # the run says so a poll before its tasks do
    assert "no such file or folder: s3://mlpipeline/none.jsonl (at http://seaweedfs.kubeflow:9000)" in ended.err
    assert "-> check the address, and that the stage that writes it ran" in ended.err
    assert "exit status" not in ended.err and "Traceback" not in ended.err
    assert "prepare-data" in ended.err.splitlines()[-1]
    assert any(line.startswith("✗ prepare data") for line in lines_of(ended))


def test_from_the_cache_each_stage_is_told_once_with_its_shard(replayed: Call) -> None:
    ended = replayed([recorded("from-cache")])

    lines = [line for line in lines_of(ended) if line.startswith("✓")]
    assert ended.code == 0, ended.all
    assert len(lines) == len(set(lines))
    for shard in (1, 2):
        for stage in ("screen prompts", "generate responses", "screen responses"):
            assert f"✓ {stage} {shard}/2 from cache" in lines
    assert "✓ train guard from cache" in lines
    (registered,) = (line for line in lines if line.startswith("✓ register model"))
    assert registered.endswith("21.0 s")
    assert "Not promoted" in ended.out and "guardloop review" in ended.out


def test_a_run_that_was_stopped_did_not_fail(replayed: Call) -> None:
    ended = replayed([recorded("terminated")])

    assert ended.code == 1 and "stopped: run" in ended.err and "FAILED" not in ended.all
    assert any(line.startswith("■ screen responses 2/2") and line.endswith("stopped") for line in lines_of(ended))


def test_a_stopped_run_is_listed_as_such(submits: Call, server: KubeflowServer, guardloop: Call) -> None:
    submits("--no-wait")
    (run,) = server.runs.values()
    run |= {name: recorded("terminated")[name] for name in ("state", "state_history")}

    (row,) = json.loads(guardloop("runs", "--host", server.url, "--json").out)
    assert (run["state"], row["state"]) == ("FAILED", "CANCELED")


def test_why_a_pod_does_not_start_is_told(
    replayed: Call, kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "WAITING_SECONDS", 0.0)

    ended = replayed(
        [*recorded("unschedulable"), {**recorded("terminated"), "state": "CANCELED"}],
        kubernetes,
        recorded("pods-unschedulable"),
    )

    waiting = [line for line in lines_of(ended) if "cannot start" in line]
    assert len(waiting) == 2
    assert all("Unschedulable: 0/1 nodes are available: 1 Insufficient memory" in line for line in waiting)
    assert {line.partition(" cannot")[0] for line in waiting} == {"! screen prompts 1/2", "! screen prompts 2/2"}


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubernetes]:
    with Kubernetes() as running:
        monkeypatch.setenv("KUBECONFIG", str(running.kubeconfig(tmp_path / "kubeconfig")))
        monkeypatch.setenv("KF_PIPELINES_NAMESPACE", "guardloop")
        yield running


def test_a_run_whose_workflow_is_gone_ends_with_that(
    replayed: Call, kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "WAITING_SECONDS", 0.0)
    monkeypatch.setattr(follow, "STALE_SECONDS", 0.02)

    ended = replayed([recorded("unschedulable")[-1]])

    assert ended.code == 2 and "its workflow is gone" in ended.words and "kubectl's context" in ended.words


def test_logs_are_the_stages_own_lines() -> None:
    own = own_lines(log("log-train-guard"))

    assert own.splitlines()[0].endswith("train_guard: started") and len(own.splitlines()) == 5
    assert not any(word in own for word in ("launcher", "argo", "executor", "parameterValues", "KFP"))
    assert outcome_in(log("log-train-guard"), "train_guard") == "12 steps, loss 0.614 -> 0.252"


def test_what_failed_is_found_among_the_launchers_lines() -> None:
    found = error_in(log("log-failed-stage"))

    assert found[0].startswith("no such file or folder: s3://") and found[1].strip().startswith("-> check the address")
    assert len(found) == 2
    assert error_in("a\nb\n") == ["a", "b"]


def test_stages_of_a_run_without_nodes_are_known_by_what_they_are_called() -> None:
    task = SimpleNamespace(
        display_name="screen(0)", state="RUNNING", start_time=None, end_time=None, child_tasks=None, error=None,
        state_history=None,
    )  # fmt: skip
    run = SimpleNamespace(run_details=SimpleNamespace(task_details=[task]), runtime_config=None)

    (stage,) = stages_at(run, TITLES)
    assert (stage.task, stage.title, stage.shard) == ("screen", "screen prompts", None)
