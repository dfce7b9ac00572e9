"""A run in MLflow for every pipeline run, a version for every adapter, and one champion.

Every method can be called again after a failure. Each moves its alias last, so that a call which fails midway
changes nothing that serves.
"""

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from guardloop.core.errors import GuardLoopError
from guardloop.core.tracking import RUN_ID, Connection
from guardloop.evaluation.result import Evaluation
from guardloop.guard.settings import GuardSettings
from guardloop.models.registered import DIGEST, adapter_digest
from guardloop.registry import contents
from guardloop.registry.contents import DataSource, Origin
from guardloop.registry.package import package
from guardloop.registry.settings import RegistrySettings

log = logging.getLogger(__name__)

CHAMPION, PREVIOUS, CANDIDATE = "champion", "previous", "candidate"
ALIASES = (
    "LoRA adapters of a guard. champion: the one in use. previous: the one that was in use before it. "
    "candidate: the newest."
)
BATCH = 100  # MLflow takes this many parameters at once
MANY = 1000  # runs that one search gives
DIGEST_LENGTH = 36  # of a data set, in MLflow's database


@dataclass(frozen=True)
class Version:
    """A registered version, as a row of a table."""

    version: int
    created: datetime
    verdict: str
    aliases: list[str]
    headline: str
    metrics: dict[str, float]
    """Those of `contents.KEY_METRICS`, also with `_low` and `_high`."""
    run_id: str
    force_reason: str
    """Why it was promoted against the gate; empty if it was not."""


class Registry:
    """Runs and adapters in MLflow, at `tracking_uri`, else at the environment's MLFLOW_TRACKING_URI.

    While MLflow is away, calls are repeated for up to `patience_seconds`; then they raise GuardLoopError.
    """

    def __init__(
        self, settings: RegistrySettings | None = None, tracking_uri: str | None = None, patience_seconds: float = 60
    ) -> None:
        self.settings = settings or RegistrySettings()
        self.connection = Connection(tracking_uri, patience_seconds)

    def record_run(
        self,
        origin: Origin,
        sections: Mapping[str, Any],
        evaluation: Evaluation | None = None,
        *,
        files: Mapping[str, Path] | None = None,
        data: Sequence[DataSource] = (),
        figures: Mapping[str, float] | None = None,
    ) -> str:
        """Record one pipeline run and return its MLflow run id; recording it again brings the same run up to date.

        sections: the settings by section; kept as parameters and as settings.yaml.
        evaluation: None where nothing was trained; kept as metrics and as evaluation.json.
        files: artifacts by the name that they get, such as report.html, summary.md and blocked_inputs.jsonl.
        figures: further metrics, such as the counts of mining.

        Raises GuardLoopError if a file is missing, or if the run was recorded with other settings.
        """
        files = files or {}
        if missing := [str(path) for path in files.values() if not path.exists()]:
            raise GuardLoopError(f"cannot record the run: no such file: {', '.join(missing)}")
        run = self.connection.run(self.settings.experiment, origin.run_id, self.settings.tags)
        run_id = str(run.info.run_id)
        params = _new_params(run, contents.params_of(sections))
        metrics = (contents.metrics_of(evaluation) if evaluation else {}) | dict(figures or {})
        tags = self.settings.tags | origin.tags() | _outcome(origin, evaluation)
        now = int(time.time() * 1000)

        def write(client: Any) -> None:
            for start in range(0, len(params), BATCH):
                client.log_batch(run_id, params=params[start : start + BATCH])
            known = run.data.metrics  # unchanged values are not repeated, which would draw a line for them
            client.log_batch(
                run_id,
                metrics=[Metric(k, float(v), now, 0) for k, v in metrics.items() if known.get(k) != v],
                tags=[RunTag(k, v) for k, v in tags.items()],
            )
            if data:
                client.log_inputs(run_id, datasets=[_dataset(source) for source in data])

        self.connection.attempt(f"recording the run {origin.run_id}", write)
        with tempfile.TemporaryDirectory() as folder:
            _gather(Path(folder), sections, evaluation, files)
            self.connection.attempt(
                f"uploading the files of the run {origin.run_id}", lambda client: client.log_artifacts(run_id, folder)
            )
        self.connection.attempt(
            f"closing the run {origin.run_id}", lambda client: client.set_terminated(run_id, "FINISHED")
        )
        log.info(
            "recorded the run %s with %d metrics in MLflow at %s", origin.run_id, len(metrics), self.connection.place
        )
        return run_id

    def count_uses(self, evaluation: Evaluation) -> int:
        """How many different evaluations were made on the test set of this one, itself included, in any experiment."""
        query = f"tags.`{contents.TEST_SET}` = '{evaluation.test_set}'"

        def count(client: Any) -> int:
            experiments = [experiment.experiment_id for experiment in client.search_experiments()]
            runs = client.search_runs(experiments, query, max_results=MANY) if evaluation.test_set else []
            known = {run.data.tags.get(contents.EVALUATION_DIGEST) for run in runs}
            return len(known | {contents.evaluation_digest(evaluation)})

        return self.connection.attempt("counting the uses of the test set", count)

    def register_adapter(
        self, adapter: Path, origin: Origin, evaluation: Evaluation, guard: GuardSettings | None = None
    ) -> int:
        """Register the adapter folder as a version of the model and return its number; the newest is `candidate`.

        `guard` are the settings of the baseline, with which the adapter is served.
        An adapter is registered once for each evaluation: again by the same run, its tags and description are brought
        up to date; by another run (which took both from a cache), the version that exists is marked with that run.
        Raises GuardLoopError if the folder lacks one of an adapter's files.
        """
        contents.check_adapter(adapter)
        digest = adapter_digest(adapter)
        tags = self.settings.tags | contents.version_tags(origin, evaluation, digest)
        text = contents.description(origin, evaluation)
        name = self.settings.model
        run_id = str(self.connection.run(self.settings.experiment, origin.run_id, self.settings.tags).info.run_id)
        scratch = tempfile.TemporaryDirectory(prefix="guardloop-model-")
        folder = Path(scratch.name) / "model"

        def create_or_update(client: Any) -> int:
            _create_model(client, name)
            for known in self._versions(client):
                if known.tags.get(DIGEST) != digest:
                    continue
                if known.run_id == run_id:
                    for key, value in tags.items():
                        client.set_model_version_tag(name, known.version, key, value)
                    client.update_model_version(name, known.version, text)
                    return int(known.version)
                if known.tags.get(contents.EVALUATION_DIGEST) == tags[contents.EVALUATION_DIGEST]:
                    client.set_model_version_tag(name, known.version, *contents.mark(known.tags, origin.run_id))
                    return int(known.version)
            model = _upload(client, folder, run_id, name, digest)
            created = client.create_model_version(
                name,
                model.artifact_location,
                run_id,
                tags,
                description=text,
                await_creation_for=0,
                model_id=model.model_id,
            )
            return int(created.version)

        with scratch:
            package(adapter, guard or GuardSettings(base=origin.base_model or "embedded:guard"), folder)
            version = self.connection.attempt(f"registering the adapter of the run {origin.run_id}", create_or_update)
        self.connection.attempt("setting the alias candidate", self._point_to_newest)
        made_by = f"{name}/{version}"
        self.connection.attempt(
            f"closing the run {origin.run_id}", lambda client: client.set_tag(run_id, contents.VERSION, made_by)
        )
        log.info("registered %s version %d, gate: %s", name, version, evaluation.decision.verdict)
        return version

    def promote(self, version: int, force_reason: str = "") -> int | None:
        """Make `version` the champion and return the version that it replaced, which becomes `previous`.

        Raises GuardLoopError if there is no such version, or if it did not pass the gate and no `force_reason` is
        given; a reason is kept as a tag of the version.
        """
        name = self.settings.model
        verdict = self._version(version).tags.get(contents.VERDICT, "unknown")
        forced = verdict != "passed"
        if forced and not force_reason.strip():
            raise GuardLoopError(
                f"{name} version {version} is not promoted: the gate's verdict is {verdict!r}",
                f"read its page; `guardloop promote {version} --force REASON` promotes it and records the reason",
            )
        current = self.champion()
        if current == version:
            log.info("%s version %d is the champion already", name, version)
            return None
        tags = {contents.PROMOTED_AT: datetime.now(UTC).isoformat(timespec="seconds")}
        tags |= {contents.REPLACED: str(current)} if current else {}
        tags |= {contents.FORCE_REASON: force_reason.strip()} if forced else {}
        self._move_champion(version, current, tags)
        log.info("%s: version %d is the champion, in place of %s", name, version, current or "the baseline")
        return current

    def rollback(self) -> int:
        """Make the previous champion the champion again and return its version; the one it replaces becomes `previous`.

        Raises GuardLoopError if there is no champion or no previous one.
        """
        current = self.champion()
        previous = self._aliases().get(PREVIOUS)
        if current and previous == current:  # a promotion was cut off before its last step
            replaced = self._version(current).tags.get(contents.REPLACED)
            previous = int(replaced) if replaced else None
        if not current or not previous:
            raise GuardLoopError(
                f"{self.settings.model} has no {'previous champion' if current else 'champion'} to go back "
                f"{'to' if current else 'from'}",
                "`guardloop promote VERSION` makes one",
            )
        self._version(previous)  # it may have been deleted
        self._move_champion(previous, current, {})
        log.info("%s: version %d is the champion again, in place of %d", self.settings.model, previous, current)
        return previous

    def champion(self) -> int | None:
        """The version in use; None where none was promoted and the baseline serves."""
        return self._aliases().get(CHAMPION)

    def versions(self) -> list[Version]:
        """Every registered version, newest first."""
        aliases = self._aliases()
        versions = self.connection.attempt("listing the versions", self._versions)
        return [
            Version(
                version=int(version.version),
                created=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
                verdict=version.tags.get(contents.VERDICT, "unknown"),
                aliases=sorted(alias for alias, of in aliases.items() if of == int(version.version)),
                headline=version.tags.get(contents.HEADLINE, ""),
                metrics=contents.key_metrics(version.tags),
                run_id=version.tags.get(RUN_ID, ""),
                force_reason=version.tags.get(contents.FORCE_REASON, ""),
            )
            for version in versions
        ]

    def _versions(self, client: Any) -> list[Any]:
        """All versions, newest first."""
        versions, token = [], None
        while True:
            page = client.search_model_versions(f"name = '{self.settings.model}'", page_token=token)
            versions += page
            token = page.token
            if not token:
                return sorted(versions, key=lambda version: int(version.version), reverse=True)

    def _version(self, version: int) -> Any:
        def find(client: Any) -> Any:
            return next((known for known in self._versions(client) if int(known.version) == version), None)

        registered = self.connection.attempt(f"reading version {version}", find)
        if registered is None:
            raise GuardLoopError(
                f"{self.settings.model} has no version {version} in MLflow at {self.connection.place}",
                "`guardloop review` lists the versions",
            )
        return registered

    def _aliases(self) -> dict[str, int]:
        """Versions by alias; empty where nothing is registered."""

        def read(client: Any) -> dict[str, int]:
            try:
                aliases = client.get_registered_model(self.settings.model).aliases
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return {}
                raise
            return {alias: int(version) for alias, version in aliases.items()}

        return self.connection.attempt("reading the aliases", read)

    def _move_champion(self, version: int, current: int | None, tags: Mapping[str, str]) -> None:
        """Point `champion` to `version` and `previous` to `current`; the champion moves last."""
        name = self.settings.model

        def move(client: Any) -> None:
            for key, value in tags.items():
                client.set_model_version_tag(name, version, key, value)
            if current is not None:
                client.set_registered_model_alias(name, PREVIOUS, current)
            client.set_registered_model_alias(name, CHAMPION, version)

        self.connection.attempt(f"making version {version} the champion", move)

    def _point_to_newest(self, client: Any) -> None:
        client.set_registered_model_alias(self.settings.model, CANDIDATE, self._versions(client)[0].version)


def _new_params(run: Any, params: Mapping[str, str]) -> list[Param]:
    """The parameters that the run does not have yet; those it has cannot change."""
    changed = {k: v for k, v in params.items() if run.data.params.get(k, v) != v}
    if changed:
        shown = ", ".join(f"{k} was {run.data.params[k]}, is {v}" for k, v in list(changed.items())[:3])
        raise GuardLoopError(
            f"this run was recorded with other settings: {shown}", "start a new run, with an id of its own"
        )
    return [Param(k, v) for k, v in params.items() if k not in run.data.params]


def _outcome(origin: Origin, evaluation: Evaluation | None) -> dict[str, str]:
    if evaluation is None:
        return {
            contents.VERDICT: "nothing trained",
            contents.NOTE: "Mining found too little to train on.",
        }
    return {
        contents.TEST_SET: evaluation.test_set,
        contents.EVALUATION_DIGEST: contents.evaluation_digest(evaluation),
        contents.VERDICT: evaluation.decision.verdict,
        contents.HEADLINE: evaluation.decision.headline,
        contents.NOTE: contents.description(origin, evaluation),
    }


def _dataset(source: DataSource) -> DatasetInput:
    dataset = Dataset(
        name=source.name,
        digest=source.digest[:DIGEST_LENGTH],
        source_type="uri",
        source=json.dumps({"uri": source.uri}),
        profile=json.dumps({"digest": source.digest}),
    )
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", source.role)] if source.role else [])


def _gather(
    folder: Path, sections: Mapping[str, Any], evaluation: Evaluation | None, files: Mapping[str, Path]
) -> None:
    """Copy a run's artifacts into `folder`, under the names that they get."""
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, target)
    plain = {name: section.plain() if hasattr(section, "plain") else section for name, section in sections.items()}
    (folder / "settings.yaml").write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), "utf-8")
    if evaluation is not None:
        (folder / "evaluation.json").write_text(evaluation.model_dump_json(indent=2), "utf-8")


def _create_model(client: Any, name: str) -> None:
    try:
        client.create_registered_model(name, description=ALIASES)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _upload(client: Any, folder: Path, run_id: str, name: str, digest: str) -> Any:
    """The packaged adapter as a logged model of the run, complete; an upload that was cut off is taken up again."""
    experiment = client.get_run(run_id).info.experiment_id
    query = f"tags.`{DIGEST}` = '{digest}'"
    models = [model for model in client.search_logged_models([experiment], query) if model.source_run_id == run_id]
    model = (
        models[0]
        if models
        else client.create_logged_model(experiment, name, run_id, tags={DIGEST: digest}, model_type="lora-adapter")
    )
    client.log_model_artifacts(model.model_id, str(folder))
    outputs = client.get_run(run_id).outputs
    if model.model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return client.finalize_logged_model(model.model_id, "READY")
