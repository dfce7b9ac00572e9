import ast
import json
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Barrier, Thread, Timer
from typing import Any
from uuid import uuid4

import mlflow
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from support.registry_examples import evaluation, origin
from support.root import ROOT
from support.services import MlflowServer, S3Server
from support.small_servers import SmallServer

from guardloop.core.errors import GuardLoopError
from guardloop.core.mlflow_server import refuse_old_server, server_version
from guardloop.core.settings import read_section
from guardloop.models.registered import resolve_model
from guardloop.registry.contents import DataSource, description
from guardloop.registry.registry import Registry
from guardloop.registry.settings import RegistrySettings
from guardloop.registry.training_log import TrainingLog

pytestmark = pytest.mark.slow

Register = Callable[..., int]
SECTIONS = {
    "training": {"rank": 16, "lr": 5e-5, "modules": ["q", "v"], "lora": {"alpha": 32}},
    "gate": {"mode": "enforce"},
}


def run_of(registry: Registry, run_id: str = "run-1") -> Any:
    client = MlflowClient(registry.connection.uri)
    experiment = client.get_experiment_by_name(registry.settings.experiment)
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`guardloop.run_id` = '{run_id}'")
    return run


def resolve(registry: Registry, uri: str, into: Path) -> Path:
    return resolve_model(uri, into, registry.connection.uri, registry.connection.patience_seconds)


def aliases(registry: Registry) -> dict[str, int]:
    return {alias: row.version for row in registry.versions() for alias in row.aliases}


@pytest.fixture(params=["local", "remote"])
def registry(request: pytest.FixtureRequest) -> Registry:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def test_a_run_is_recorded_whole_and_once(registry: Registry, tmp_path: Path) -> None:
    report = tmp_path / "executor-output-17"  # artifacts of a pipeline have names of its own
    report.write_text("<html>")
    data = [
        DataSource(name="toxicchat", digest="f" * 64, role="test", uri="s3://guardloop/test.parquet"),
        DataSource(name="traffic", digest="e" * 64, role="traffic"),
    ]
    for change in (0.05, 0.05, 0.03):
        run_id = registry.record_run(
            origin(),
            SECTIONS,
            evaluation(change=change),
            files={"report.html": report, "mining/blocked_inputs.jsonl": report},
            data=data,
            figures={"mining_blocked": 312},
        )
    run = run_of(registry)
    assert run.info.run_id == run_id
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "training.rank": "16",
        "training.lr": "5e-05",
        "training.modules": '["q", "v"]',
        "training.lora.alpha": "32",
        "gate.mode": "enforce",
    }
    assert run.data.metrics["change_auprc"] == pytest.approx(0.03)
    assert run.data.metrics["candidate_auprc_low"] == pytest.approx(0.61)
    assert run.data.metrics["baseline_recall_at_0.05_high"] == pytest.approx(0.62)
    assert run.data.metrics["mining_blocked"] == 312
    assert "baseline_ece" not in run.data.metrics  # not a number
    client = MlflowClient(registry.connection.uri)
    assert len(client.get_metric_history(run_id, "mining_blocked")) == 1
    assert len(client.get_metric_history(run_id, "change_auprc")) == 2
    tags = run.data.tags
    assert tags["guardloop.run_id"] == "run-1"
    assert tags["guardloop.git_sha"] == "abc123"
    assert tags["guardloop.gate_verdict"] == "passed"
    assert tags["team"] == "safety"
    assert "| AUPRC | 0.600 | 0.630 | +0.030 (+0.010 to +0.050) |" in tags["mlflow.note.content"]
    assert sorted(used.dataset.name for used in run.inputs.dataset_inputs) == ["toxicchat", "traffic"]
    files = Path(
        mlflow.artifacts.download_artifacts(
            artifact_uri=run.info.artifact_uri, dst_path=str(tmp_path / "back"), tracking_uri=registry.connection.uri
        )
    )
    assert (files / "report.html").read_text() == (files / "mining" / "blocked_inputs.jsonl").read_text() == "<html>"
    assert yaml.safe_load((files / "settings.yaml").read_text()) == SECTIONS
    assert json.loads((files / "evaluation.json").read_text())["decision"]["verdict"] == "passed"


def test_a_run_that_trained_nothing_is_recorded(local: Registry) -> None:
    local.record_run(origin(), {"registry": local.settings}, figures={"mining_blocked": 0})
    run = run_of(local)
    assert run.data.params["registry.model"] == local.settings.model
    assert run.data.metrics == {"mining_blocked": 0}
    assert run.data.tags["guardloop.gate_verdict"] == "nothing trained"
    assert run.info.status == "FINISHED"


def test_many_long_settings(local: Registry) -> None:
    local.record_run(origin(), {"s": {f"key{i}": "x" * 7000 for i in range(130)}})
    assert len(run_of(local).data.params) == 130


def test_settings_named_after_columns_of_a_table_are_recorded(local: Registry) -> None:
    where = {"is toxic?": "1", "label (human)": "yes", "a//b": "c", "x" * 300: "d"}
    local.record_run(origin(), {"dataset": {"where": where}})
    assert sorted(run_of(local).data.params.values()) == ["1", "c", "d", "yes"]
    assert run_of(local).data.params["dataset.where.label _human_"] == "yes"


@pytest.mark.parametrize("name", ["team?", "", " ", "/a", "a//b", "a/../b", "x" * 251, "a\n"])
def test_a_tag_that_mlflow_would_refuse_after_the_run_is_refused_before_it(name: str) -> None:
    with pytest.raises(GuardLoopError, match=r"registry\.tags: .* cannot name a tag"):
        read_section(RegistrySettings, {"tags": {name: "x"}}, "registry")


def test_every_tag_that_is_taken_can_be_recorded(local: Registry) -> None:
    tags = dict.fromkeys(("team", "a/b", "git.sha", "ticket: 7", "größe", "a-b_c", "x" * 250), "x")
    settings = read_section(RegistrySettings, {**local.settings.plain(), "tags": tags}, "registry")
    Registry(settings, local.connection.uri).record_run(origin(), {})
    assert tags.items() <= run_of(local).data.tags.items()


def test_names_of_the_data_are_plain_text_on_a_page() -> None:
    found = evaluation("failed")
    found.decision.headline = "in category <img src=x> ![a](http://evil.example/a.png) it fell"
    page = description(origin().model_copy(update={"base_model": "<b>|`x`![](http://evil.example)"}), found)
    assert "in category &lt;img src=x&gt; !\\[a\\](http&#58;//evil" in page
    assert "baseline &lt;b&gt;\\|\\`x\\`!\\[\\](http&#58;//evil" in page and "://" not in page


def test_other_settings_under_the_same_run_are_refused(local: Registry) -> None:
    local.record_run(origin(), {"training": {"rank": 16}})
    with pytest.raises(GuardLoopError, match=r"other settings: training.rank was 16, is 8"):
        local.record_run(origin(), {"training": {"rank": 8}})


def test_a_missing_artifact_is_refused_before_anything_is_written(local: Registry, tmp_path: Path) -> None:
    with pytest.raises(GuardLoopError, match=r"no such file: .*report"):
        local.record_run(origin(), {}, files={"report.html": tmp_path / "report"})
    assert MlflowClient(local.connection.uri).get_experiment_by_name(local.settings.experiment) is None


def test_the_default_tracking_database_keeps_its_artifacts_beside_it(local: Registry, database: str) -> None:
    local.record_run(origin(), {})
    folder = Path(database.removeprefix("sqlite:///")).parent / "artifacts"
    assert run_of(local).info.artifact_uri.startswith(folder.as_uri())


def test_an_adapter_is_registered_once_and_can_be_downloaded(
    registry: Registry, adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter()
    registry.record_run(origin(), SECTIONS, evaluation())
    assert [registry.register_adapter(folder, origin(), evaluation(v)) for v in ("failed", "passed")] == [1, 1]

    (row,) = registry.versions()
    assert (row.version, row.verdict, row.aliases, row.run_id) == (1, "passed", ["candidate"], "run-1")
    assert row.headline == "The candidate is better."
    assert row.metrics["change_auprc_low"] == pytest.approx(0.03)
    name = registry.settings.model
    version = MlflowClient(registry.connection.uri).get_model_version(name, "1")
    assert version.run_id == run_of(registry).info.run_id
    assert (
        version.tags.items()
        >= {
            "team": "safety",
            "guardloop.git_sha": "abc123",
            "guardloop.data_hash": "d" * 64,
            "guardloop.base_model": "meta/guard",
            "guardloop.base_revision": "r1",
        }.items()
    )
    assert "**Promoted.** The candidate is better." in version.description
    assert "| Does it rank better? | ✓ passed | It does. a \\| b c |" in version.description

    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.connection.uri)
    plain = Path(mlflow.artifacts.download_artifacts(f"models:/{name}@candidate", dst_path=str(tmp_path / "plain")))
    ours = resolve_model(f"models:/{name}@candidate", tmp_path / "ours")
    assert resolve_model(f"models:/{name}/1", tmp_path / "ours") == ours
    for file in ("adapter_config.json", "adapter_model.safetensors", "guard.json", "tokenizer/vocab.txt"):
        assert (plain / "adapter" / file).read_bytes() == (ours / file).read_bytes() == (folder / file).read_bytes()
    assert len(run_of(registry).outputs.model_outputs) == 1  # from data over run to model


def test_candidate_is_the_newest_even_if_an_older_run_comes_again(
    local: Registry, register: Register, tmp_path: Path
) -> None:
    assert [register(local, "a"), register(local, "b")] == [1, 2]
    assert aliases(local) == {"candidate": 2}
    assert local.register_adapter(tmp_path / "adapter-a", origin("a"), evaluation()) == 1
    assert aliases(local) == {"candidate": 2}


def test_another_adapter_of_the_same_run_is_another_version(local: Registry, adapter: Callable[..., Path]) -> None:
    versions = [local.register_adapter(adapter(weights), origin(), evaluation()) for weights in ("one", "two")]
    assert versions == [1, 2]


def test_a_run_whose_stages_came_from_a_cache_marks_the_version_that_exists(
    registry: Registry, adapter: Callable[..., Path]
) -> None:
    folder = adapter()
    assert registry.register_adapter(folder, origin("first"), evaluation()) == 1
    for run in ("second", "third", "third"):
        assert registry.register_adapter(folder, origin(run), evaluation()) == 1
    version = MlflowClient(registry.connection.uri).get_model_version(registry.settings.model, "1")
    assert version.tags["guardloop.also_of_runs"] == "second, third"
    assert (version.tags["guardloop.run_id"], version.run_id) == ("first", run_of(registry, "first").info.run_id)
    assert run_of(registry, "third").data.tags["guardloop.version"] == f"{registry.settings.model}/1"
    assert registry.register_adapter(folder, origin("fourth"), evaluation(change=0.06)) == 2  # evaluated otherwise


def test_different_evaluations_on_one_test_set_are_counted_and_the_tenth_asks_for_a_fresh_one(local: Registry) -> None:
    test_set = uuid4().hex

    def record(number: int, **changes: Any) -> int:
        found = evaluation(change=number / 100).model_copy(update={"test_set": test_set, **changes})
        found.test_set_uses = local.count_uses(found)
        local.record_run(origin(f"run-{number}"), {}, found)
        return found.test_set_uses

    assert [record(number) for number in range(1, 10)] == list(range(1, 10))
    assert record(9) == 9  # the same again
    assert record(20, test_set=uuid4().hex) == 1
    elsewhere = local.settings.model_copy(update={"experiment": f"{local.settings.experiment}, other"})
    local.settings = elsewhere
    assert record(10) == 10
    page = run_of(local, "run-10").data.tags["mlflow.note.content"]
    assert "It is use 10 of this test set. Label a fresh one" in page
    assert run_of(local, "run-10").data.tags["guardloop.test_set"] == test_set


def test_half_an_adapter_is_refused(local: Registry, adapter: Callable[..., Path]) -> None:
    folder = adapter()
    (folder / "guard.json").unlink()
    with pytest.raises(GuardLoopError, match=r"lacks guard\.json"):
        local.register_adapter(folder, origin(), evaluation())
    assert local.versions() == []


def test_promotion_and_rollback(local: Registry, register: Register) -> None:
    assert local.champion() is None
    assert [register(local, run) for run in "abc"] == [1, 2, 3]
    assert local.promote(1) is None
    assert aliases(local) == {"candidate": 3, "champion": 1}
    assert local.promote(2) == 1
    assert local.promote(3) == 2
    assert local.promote(3) is None  # it is the champion already
    assert aliases(local) == {"candidate": 3, "champion": 3, "previous": 2}
    assert local.rollback() == 2
    assert local.champion() == 2
    assert aliases(local)["previous"] == 3


@pytest.mark.parametrize("verdict", ["failed", "not proven"])
def test_the_gate_cannot_be_passed_by_without_a_reason(local: Registry, register: Register, verdict: str) -> None:
    register(local, "a", verdict)
    for reason in ("", "  "):
        with pytest.raises(GuardLoopError, match=f"not promoted: the gate's verdict is '{verdict}'"):
            local.promote(1, force_reason=reason)
    assert local.champion() is None
    local.promote(1, force_reason="accepted by the review board")
    assert local.champion() == 1
    assert local.versions()[0].force_reason == "accepted by the review board"


def test_what_is_not_there(local: Registry, register: Register, tmp_path: Path) -> None:
    name = local.settings.model
    assert local.versions() == []
    with pytest.raises(GuardLoopError, match="has no version 1"):
        local.promote(1)
    with pytest.raises(GuardLoopError, match="no champion to go back from"):
        local.rollback()
    register(local, "a")
    local.promote(1)
    with pytest.raises(GuardLoopError, match="no previous champion to go back to"):
        local.rollback()
    for uri in (f"models:/{name}@other", f"models:/{name}/7", "models:/nothing@champion"):
        with pytest.raises(GuardLoopError, match=r"has no models:/"):
            resolve(local, uri, tmp_path)
    for uri in (f"models:/{name}", f"models:/{name}/latest", "models:/m-0123", "s3://bucket/key", "models:/a'b/1"):
        with pytest.raises(GuardLoopError, match="not a registered model"):
            resolve(local, uri, tmp_path)


def test_a_changed_adapter_in_the_store_is_refused(local: Registry, register: Register, tmp_path: Path) -> None:
    register(local, "a")
    client = MlflowClient(local.connection.uri)
    store = Path(client.get_model_version_download_uri(local.settings.model, "1").removeprefix("file://"))
    (store / "adapter" / "adapter_model.safetensors").write_text("other weights")
    with pytest.raises(GuardLoopError, match="not those that were registered"):
        resolve(local, f"models:/{local.settings.model}/1", tmp_path / "into")
    assert list((tmp_path / "into").iterdir()) == []


def test_a_cached_adapter_is_held_against_the_registry_at_every_use(
    local: Registry, register: Register, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    register(local, "a")
    uri = f"models:/{local.settings.model}/1"
    folder = resolve(local, uri, tmp_path / "into")
    for planted in ("adapter_model.safetensors", "guard.json", "more.json"):
        (folder / planted).write_text('{"threshold": 1e299}')
        assert resolve(local, uri, tmp_path / "into") == folder
        assert "was changed since it was downloaded" in caplog.text
        caplog.clear()
        assert (folder / "guard.json").read_text() == '{"threshold": 0.25}' and not (folder / "more.json").exists()


def test_a_version_without_a_checksum_is_refused(local: Registry, register: Register, tmp_path: Path) -> None:
    register(local, "a")
    MlflowClient(local.connection.uri).delete_model_version_tag(local.settings.model, "1", "guardloop.adapter_sha256")
    with pytest.raises(GuardLoopError, match="has no checksum, so its files cannot be trusted"):
        resolve(local, f"models:/{local.settings.model}/1", tmp_path)


WRITES = (
    "create_logged_model",
    "log_model_artifacts",
    "log_outputs",
    "finalize_logged_model",
    "create_model_version",
    "set_model_version_tag",
    "set_registered_model_alias",
)


class Failing:
    """Lets MLflow fail at the write number `at`, counted from 0, and at every later one."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int) -> None:
        self.writes = 0
        for name in WRITES:
            patch.setattr(MlflowClient, name, self.wrapped(getattr(MlflowClient, name), at))

    def wrapped(self, real: Callable[..., Any], at: int) -> Callable[..., Any]:
        def write(*arguments: Any, **named: Any) -> Any:
            self.writes += 1
            if self.writes > at:
                raise MlflowException("cut off", TEMPORARILY_UNAVAILABLE)
            return real(*arguments, **named)

        return write


def test_wherever_a_promotion_is_cut_off_the_champion_stays(
    local: Registry, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in "abc":
        register(local, run)
    local.promote(1)
    local.promote(2)
    local.connection.patience_seconds = 0
    failures = 0
    while local.champion() == 2:
        with monkeypatch.context() as patch, suppress(GuardLoopError):
            Failing(patch, at=failures)
            local.promote(3)
            break
        failures += 1
        assert local.champion() == 2
    assert failures == 4  # two tags and two aliases
    assert aliases(local) == {"candidate": 3, "champion": 3, "previous": 2}


def test_wherever_a_registration_is_cut_off_it_can_be_repeated(
    local: Registry, register: Register, adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    register(local, "a")
    folder = adapter("b")
    local.connection.patience_seconds = 0
    failures = 0
    while aliases(local) == {"candidate": 1}:
        with monkeypatch.context() as patch, suppress(GuardLoopError):
            Failing(patch, at=failures)
            assert local.register_adapter(folder, origin("b"), evaluation()) == 2
            break
        failures += 1
        assert all(row.verdict == "passed" for row in local.versions())  # a version is whole from the start
    assert failures > 4
    assert aliases(local) == {"candidate": 2}
    assert len(local.versions()) == 2
    models = MlflowClient(local.connection.uri).search_logged_models([run_of(local, "b").info.experiment_id])
    assert len(models) == 2


def test_two_promotions_at_once_leave_one_champion(remote: Registry, register: Register) -> None:
    for run in "abc":
        register(remote, run)
    remote.promote(1)
    together = Barrier(2)

    def promote(version: int) -> None:
        together.wait()
        Registry(remote.settings, remote.connection.uri).promote(version)

    threads = [Thread(target=promote, args=(version,)) for version in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = aliases(remote)
    assert after["champion"] in {2, 3}
    assert after["previous"] in {1, 5 - after["champion"]}
    assert remote.rollback() == after["previous"]


def test_an_artifact_store_that_comes_back_is_waited_for(
    settings: RegistrySettings, mlflow_server: MlflowServer, s3_server: S3Server, register: Register, tmp_path: Path
) -> None:
    impatient = Registry(settings, mlflow_server.url, patience_seconds=0.1)
    s3_server.stop()
    try:
        with pytest.raises(GuardLoopError, match=f"MLflow at {mlflow_server.url} does not work after"):
            register(impatient, "a")
        assert impatient.versions() == []
        back = Timer(2, s3_server.start)
        back.start()
        patient = Registry(settings, mlflow_server.url, patience_seconds=30)
        assert patient.register_adapter(tmp_path / "adapter-a", origin("a"), evaluation()) == 1
        back.join()
    finally:
        s3_server.stop()
        s3_server.start()
    assert (resolve(patient, f"models:/{settings.model}@candidate", tmp_path / "back") / "guard.json").is_file()


def test_a_server_killed_during_a_promotion_changes_nothing_that_serves(
    remote: Registry,
    register: Register,
    mlflow_server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for run in "abc":
        register(remote, run)
    remote.promote(1)
    remote.promote(2)
    real = MlflowClient.set_registered_model_alias

    def killed_before_the_last_step(client: MlflowClient, name: str, alias: str, version: str) -> None:
        if alias == "champion":
            mlflow_server.stop()
        real(client, name, alias, version)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", killed_before_the_last_step)
        with pytest.raises(GuardLoopError, match=f"MLflow at {mlflow_server.url} does not work after"):
            remote.promote(3)
    name = remote.settings.model
    remote.connection.patience_seconds = 0
    for action in (
        remote.versions,
        remote.rollback,
        lambda: remote.promote(1),
        lambda: resolve(remote, f"models:/{name}@champion", tmp_path),
        lambda: remote.record_run(origin("d"), {}, evaluation()),
        lambda: register(remote, "d"),
    ):
        with pytest.raises(GuardLoopError, match=f"MLflow at {mlflow_server.url}"):
            action()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url)
    with TrainingLog("d", remote.settings) as curves:  # training goes on
        curves.log(1, {"loss": 0.5})

    mlflow_server.start()
    remote.connection.patience_seconds = 5
    assert [row.version for row in remote.versions()] == [3, 2, 1]
    assert aliases(remote)["champion"] == 2
    assert remote.rollback() == 1  # although the promotion had already moved `previous`
    assert remote.promote(3) == 1
    assert aliases(remote) == {"candidate": 3, "champion": 3, "previous": 1}


def test_addresses() -> None:
    with pytest.raises(GuardLoopError, match="MLFLOW_TRACKING_URI is not set"):
        Registry()
    with pytest.raises(GuardLoopError, match="not an MLflow address: ftp://host"):
        Registry(tracking_uri="ftp://me:hidden@host")
    with pytest.raises(GuardLoopError, match="the environment's MLFLOW_TRACKING_URI") as caught:
        read_section(RegistrySettings, {"tracking_uri": "https://me:hidden@host"}, "registry")
    assert "hidden" not in str(caught.value)
    with pytest.raises(GuardLoopError, match="not a run id"):
        Registry(tracking_uri="http://127.0.0.1:1").record_run(origin("x' or '1' = '1"), {})


def test_secrets_in_the_environments_address_stay_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hidden@127.0.0.1:1")
    with pytest.raises(GuardLoopError, match=r"MLflow at http://127\.0\.0\.1:1 does not work") as caught:
        Registry(patience_seconds=0).versions()
    assert "hidden" not in str(caught.value)
    assert caught.value.__cause__ is None


class OddServer(SmallServer):
    """Says its version, then answers every other request with `status`, after `seconds`."""

    version, status, body, seconds = "3.17.2", 200, "no", 0.0

    def reply(self, path: str, query: dict[str, str], headers: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        if path == "/version":
            return 200, {}, self.version
        time.sleep(self.seconds)
        return self.status, {}, self.body


@pytest.mark.parametrize(
    ("status", "body"),
    [(401, "no"), (403, ""), (401, '{"detail": "Not authenticated"}'), (403, '{"message": "x", "statusCode": 403}')],
)
def test_refused_access_is_told_at_once_also_by_a_gateway(status: int, body: str) -> None:
    with OddServer() as server, pytest.raises(GuardLoopError, match="refused access") as caught:
        server.status, server.body = status, body
        Registry(tracking_uri=server.url).versions()
    assert "MLFLOW_TRACKING_USERNAME" in caught.value.remedy


@pytest.mark.parametrize(("version", "old"), [("2.22.1", True), ("1.30.0", True), ("3.0.0rc1", False), ("who", False)])
def test_a_server_older_than_logged_models_is_refused_with_the_version_that_is_needed(version: str, old: bool) -> None:
    with OddServer() as server:
        server.version = version
        if not old:
            refuse_old_server(server.url)
            return
        for ask in (Registry(tracking_uri=server.url).versions, lambda: refuse_old_server(server.url)):
            with pytest.raises(
                GuardLoopError, match=rf"is version {re.escape(version)}, without logged models"
            ) as caught:
                ask()
            assert "3.0 or newer" in caught.value.remedy


def test_a_real_server_says_its_version(mlflow_server: MlflowServer) -> None:
    assert server_version(mlflow_server.url) == mlflow.__version__


def test_a_slow_link_is_told_with_its_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with OddServer() as server, pytest.raises(GuardLoopError, match="did not answer a request within 1 s") as caught:
        server.seconds = 1.5
        Registry(tracking_uri=server.url, patience_seconds=0).versions()
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" in caught.value.remedy


def test_mlflow_writes_nothing_to_the_terminal(
    remote: Registry, register: Register, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    remote.record_run(origin("a"), SECTIONS, evaluation())
    register(remote, "a")
    remote.promote(1)
    resolve(remote, f"models:/{remote.settings.model}@champion", tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("module", ["core/tracking.py", "models/registered.py", "registry/training_log.py"])
def test_what_fetches_an_adapter_or_shows_training_needs_no_more_of_mlflow_than_its_small_package(module: str) -> None:
    tree = ast.parse((ROOT / "guardloop" / module).read_text("utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    small = {"mlflow", "mlflow.artifacts", "mlflow.entities", "mlflow.environment_variables", "mlflow.exceptions"}
    assert {name for name in imported if name.startswith("mlflow")} <= small
    assert not any(
        name.startswith("guardloop.registry.") and name != "guardloop.registry.settings" for name in imported
    )
