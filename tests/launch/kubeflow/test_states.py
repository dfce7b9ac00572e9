"""Whatever states a run goes through: the exit code is 0 if, and only if, it succeeded."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cases import cases
from support.ended import Ended
from support.kubeflow_server import KubeflowServer, Step, task

Call = Callable[..., Ended]
AT_WORK = ["RUNTIME_STATE_UNSPECIFIED", "PENDING", "RUNNING", "PAUSED", "CANCELING"]
ENDS = ["SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"]
STRANGE = ["SUCCEEDED_MAYBE", "succeeded", "EVICTED"]


@pytest.fixture
def started(submits: Call, server: KubeflowServer) -> str:
    submits("--no-wait")
    return next(iter(server.runs))


@pytest.mark.slow
@settings(max_examples=cases(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    before=st.lists(st.sampled_from(AT_WORK), max_size=4),
    end=st.sampled_from([*ENDS, *STRANGE, "RUNTIME_STATE_UNSPECIFIED"]),
    tasks=st.lists(st.sampled_from([*AT_WORK, *ENDS, "ODD"]), max_size=3),
)
def test_only_success_is_success(
    server: KubeflowServer, guardloop: Call, started: str, before: list[str], end: str, tasks: list[str]
) -> None:
    told = [task(f"screen{'-2' * number}", state) for number, state in enumerate(tasks)]
    server.runs[started]["looks"] = 0
    server.plays(*before, Step(end, told, ended=True))

    ended = guardloop("follow", started, "--host", server.url)

    assert (ended.code == 0) == (end == "SUCCEEDED"), ended.all
    said = {"CANCELED": "stopped"}.get(end, end)
    assert ended.code in (0, 1) and (ended.code == 0 or said in ended.err)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("state", [*ENDS, *STRANGE])
def test_an_end_without_its_time(server: KubeflowServer, guardloop: Call, started: str, state: str) -> None:
    server.plays("RUNNING", Step(state, ended=False))

    ended = guardloop("follow", started, "--host", server.url)

    expected = {"SUCCEEDED": 0, "FAILED": 1, "CANCELED": 1, "SKIPPED": 1}.get(state, 2)
    assert ended.code == expected, ended.all
    if expected == 2:
        assert "not known here" in ended.words and state in ended.err


def test_a_strange_state_may_pass(server: KubeflowServer, guardloop: Call, started: str) -> None:
    server.plays("RUNNING", Step("EVICTED", ended=False), "RUNNING", "SUCCEEDED")

    assert guardloop("follow", started, "--host", server.url).code == 0


def test_a_state_that_is_left_out(server: KubeflowServer, guardloop: Call, started: str) -> None:
    """The server's JSON has no field for a value of zero."""
    original = server._look

    def look(run: dict) -> dict:
        shown = original(run)
        return {name: value for name, value in shown.items() if (name, value) != ("state", "PENDING")}

    server._look = look  # type: ignore[method-assign]
    server.plays("PENDING", "PENDING", "SUCCEEDED")

    assert guardloop("follow", started, "--host", server.url).code == 0
    assert server.runs[started]["looks"] >= 3
