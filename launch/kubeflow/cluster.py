"""Kubeflow Pipelines through its v2beta1 API, never making the same thing twice."""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus

import kfp_server_api as api

from guardloop.core.errors import GuardLoopError
from launch.kubeflow.calls import ApiError, Calls
from launch.kubeflow.target import Target

PAGE = 100

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class About:
    """What an installation says of itself."""

    version: str
    multi_user: bool


class Cluster:
    """One Kubeflow Pipelines. Every method raises ApiError, with words for people, where it cannot do its work."""

    def __init__(
        self, target: Target, patience_seconds: float | None = None, say: Callable[[str], None] = log.warning
    ) -> None:
        self.target = target
        self._calls = calls = Calls(target, patience_seconds, say)
        self._pipelines = api.PipelineServiceApi(calls.client)
        self._uploads = api.PipelineUploadServiceApi(calls.client)
        self._experiments = api.ExperimentServiceApi(calls.client)
        self._runs = api.RunServiceApi(calls.client)
        self._schedules = api.RecurringRunServiceApi(calls.client)
        self._about: About | None = None

    def about(self) -> About:
        """Its version, and whether it keeps its users apart."""
        if self._about is None:
            answer = json.loads(self._calls.get("asking for its health", "/apis/v2beta1/healthz"))
            if not isinstance(answer, dict):
                raise self._calls.stranger("asking for its health")
            version = answer.get("tag_name") or answer.get("apiServerTagName") or "of unknown version"
            self._about = About(str(version), bool(answer.get("multi_user")))
        return self._about

    def check_access(self) -> None:
        """Raises ApiError unless this user may list runs in the namespace."""
        self._calls.repeated("listing runs", self._runs.run_service_list_runs, page_size=1, **self._namespace())

    def pipeline(self, name: str, description: str = "") -> str:
        """The id of the pipeline called `name`, made where there is none."""

        def make() -> str:
            body = api.V2beta1Pipeline(name=name, display_name=name, description=description, **self._namespace())
            made = self._calls.once("creating the pipeline", self._pipelines.pipeline_service_create_pipeline, body)
            return self._calls.known(made.pipeline_id)

        return self._find_or_make(lambda: self._pipeline_id(name), make)[0]

    def version(self, pipeline_id: str, name: str, package: Path, description: str) -> tuple[Any, bool]:
        """The pipeline's version called `name`, uploaded where there is none; and whether it was there already."""

        def make() -> Any:
            upload, texts = self._uploads.upload_pipeline_version, {"name": name, "description": description}
            made = self._calls.once("uploading the pipeline", upload, str(package), pipelineid=pipeline_id, **texts)
            self._calls.known(made.pipeline_version_id)
            return made

        return self._find_or_make(lambda: self._version(pipeline_id, name), make)

    def version_of(self, run: Any) -> Any | None:
        """The pipeline version that a run executes, or None where it is gone."""
        reference = run.pipeline_version_reference
        if reference is None or not reference.pipeline_version_id:
            return None
        try:
            return self._calls.repeated(
                "reading the pipeline",
                self._pipelines.pipeline_service_get_pipeline_version,
                reference.pipeline_id,
                reference.pipeline_version_id,
            )
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def find_experiment(self, name: str) -> str | None:
        """The id of the experiment called `name`, or None."""
        return self._calls.attempt(lambda: self._experiment_id(name))

    def experiment(self, name: str) -> str:
        """The id of the experiment called `name`, made where there is none."""

        def make() -> str:
            body = api.V2beta1Experiment(display_name=name, **self._namespace())
            create = self._experiments.experiment_service_create_experiment
            return self._calls.known(self._calls.once("creating the experiment", create, body).experiment_id)

        return self._find_or_make(lambda: self._experiment_id(name), make)[0]

    def start(self, name: str, experiment_id: str, version: Any, arguments: dict[str, Any], description: str) -> Any:
        """Start a run. `name` must be new: it tells a try whose answer was lost that the run exists."""
        body = api.V2beta1Run(**self._what_runs(name, experiment_id, version, arguments, description))

        def make() -> Any:
            made = self._calls.once("starting the run", self._runs.run_service_create_run, body)
            self._calls.known(made.run_id)
            return made

        return self._make_once(make, lambda: self._runs_called(name))

    def run(self, run_id: str) -> Any:
        """The run with this id."""
        return self._calls.repeated("reading the run", self._runs.run_service_get_run, run_id)

    def find_run(self, name: str) -> Any:
        """A run by id, by the first characters of its id, by name, or `latest`. Raises GuardLoopError if none is."""
        if name == "latest":
            matching = list(self.runs(limit=1))
        else:
            try:
                return self.run(name)
            except ApiError as error:
                if error.status not in (400, 404):
                    raise
            matching = self._calls.attempt(lambda: self._runs_called(name))
            matching = matching or [
                r for r in self.runs(limit=200) if len(name) >= 4 and str(r.run_id).startswith(name)
            ]
        if len(matching) > 1:
            ids = ", ".join(str(r.run_id) for r in matching[:5])
            raise GuardLoopError(f"{name!r} is the name of several runs: {ids}", "give the id of one")
        if not matching:
            raise GuardLoopError(f"no run {name!r} at {self.target.host}", "`guardloop runs` lists them")
        return self.run(matching[0].run_id)

    def runs(self, experiment_id: str | None = None, limit: int = 20) -> Iterator[Any]:
        """The newest runs first, of one experiment or all."""
        where = {"experiment_id": experiment_id} if experiment_id else {}
        listing = self._runs.run_service_list_runs
        return self._pages("runs", limit, listing, sort_by="created_at desc", **where, **self._namespace())

    def terminate(self, run_id: str) -> None:
        """Stop a run."""
        self._calls.repeated("stopping the run", self._runs.run_service_terminate_run, run_id)

    def log(self, run_id: str, pod: str) -> str | None:
        """What a pod of a run has printed, or None where Kubeflow Pipelines does not have it."""
        try:
            place = f"/apis/v1alpha1/runs/{quote(run_id, safe='')}/nodes/{quote(pod, safe='')}/log"
            text = self._calls.get("reading a log", place, as_json=False)
        except ApiError as error:
            if error.passing or error.status in (400, 404):
                return None
            raise
        # an error comes with status 200, and a page of the user interface is no log
        return None if not text or text.startswith('{"error_message"') or text.lstrip().startswith("<") else text

    def schedules(self, name: str | None = None, limit: int = 200) -> Iterator[Any]:
        """The recurring runs, newest first; with `name`, those called so."""
        which = {"filter": _equals("display_name", name)} if name else {}
        listing = self._schedules.recurring_run_service_list_recurring_runs
        pages = self._pages("recurring_runs", limit, listing, sort_by="created_at desc", **which, **self._namespace())
        return (one for one in pages if name is None or one.display_name == name)

    def create_schedule(
        self, name: str, cron: str, experiment_id: str, version: Any, arguments: dict[str, Any], description: str
    ) -> Any:
        """Start a run whenever `cron` says so (see launch.kubeflow.schedule), one at a time, missed ones left out."""
        body = api.V2beta1RecurringRun(
            **self._what_runs(name, experiment_id, version, arguments, description),
            trigger=api.V2beta1Trigger(cron_schedule=api.V2beta1CronSchedule(cron=cron)),
            mode=api.RecurringRunMode.ENABLE,
            max_concurrency="1",
            no_catchup=True,
        )
        known = {one.recurring_run_id for one in self.schedules(name)}
        create = self._schedules.recurring_run_service_create_recurring_run
        return self._make_once(
            lambda: self._calls.once("creating the schedule", create, body),
            lambda: [one for one in self.schedules(name) if one.recurring_run_id not in known],
        )

    def pause_schedule(self, schedule_id: str) -> None:
        """Start no more runs until it is resumed."""
        self._calls.repeated(
            "pausing the schedule", self._schedules.recurring_run_service_disable_recurring_run, schedule_id
        )

    def resume_schedule(self, schedule_id: str) -> None:
        """Start runs again."""
        self._calls.repeated(
            "resuming the schedule", self._schedules.recurring_run_service_enable_recurring_run, schedule_id
        )

    def delete_schedule(self, schedule_id: str) -> None:
        """Forget the schedule; one that is gone already is none to complain of."""
        try:
            self._calls.repeated(
                "deleting the schedule", self._schedules.recurring_run_service_delete_recurring_run, schedule_id
            )
        except ApiError as error:
            if error.status != 404:
                raise

    def _what_runs(
        self, name: str, experiment_id: str, version: Any, arguments: dict[str, Any], description: str
    ) -> dict[str, Any]:
        """What a run and a schedule have in common."""
        return {
            "display_name": name,
            "description": description,
            "experiment_id": experiment_id,
            "pipeline_version_reference": api.V2beta1PipelineVersionReference(
                pipeline_id=version.pipeline_id, pipeline_version_id=version.pipeline_version_id
            ),
            "runtime_config": api.V2beta1RuntimeConfig(parameters=arguments, pipeline_root=self.target.pipeline_root),
            "service_account": self.target.service_account,
        }

    def _find_or_make(self, find: Callable[[], T | None], make: Callable[[], T]) -> tuple[T, bool]:
        """What `find` finds or else `make` makes, and whether it was there; someone may be faster in between."""

        def attempt() -> tuple[T, bool]:
            if found := find():
                return found, True
            try:
                return make(), False
            except ApiError as error:
                if error.status == 409 and (found := find()):
                    return found, True
                raise

        return self._calls.attempt(attempt)

    def _make_once(self, make: Callable[[], Any], made: Callable[[], list[Any]]) -> Any:
        """What `make` makes; a second try first looks whether the first was `made`, and only its answer lost."""
        tries = 0

        def attempt() -> Any:
            nonlocal tries
            tries += 1
            earlier = made() if tries > 1 else []
            return earlier[0] if earlier else make()

        return self._calls.attempt(attempt)

    def _namespace(self) -> dict[str, str]:
        """Named only where users are kept apart: a single-user installation has no namespaces of its own."""
        if not self.about().multi_user:
            return {}
        if not self.target.namespace:
            raise GuardLoopError(
                f"{self.target.host} keeps its users apart, and no namespace is named",
                "give --namespace, that of your Kubeflow profile",
            )
        return {"namespace": self.target.namespace}

    def _pipeline_id(self, name: str) -> str | None:
        try:
            pipeline = self._calls.once(
                "looking up the pipeline",
                self._pipelines.pipeline_service_get_pipeline_by_name,
                name,
                **self._namespace(),
            )
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        return self._calls.known(pipeline.pipeline_id)

    def _version(self, pipeline_id: str, name: str) -> Any | None:
        listing = self._pipelines.pipeline_service_list_pipeline_versions
        page = self._calls.once("listing versions", listing, pipeline_id, filter=_equals("display_name", name))
        return next((v for v in page.pipeline_versions or [] if name in (v.name, v.display_name)), None)

    def _experiment_id(self, name: str) -> str | None:
        listing, named = self._experiments.experiment_service_list_experiments, _equals("display_name", name)
        page = self._calls.once("listing experiments", listing, filter=named, **self._namespace())
        return next((str(e.experiment_id) for e in page.experiments or [] if e.display_name == name), None)

    def _runs_called(self, name: str) -> list[Any]:
        listing = self._runs.run_service_list_runs
        page = self._calls.once("listing runs", listing, filter=_equals("display_name", name), **self._namespace())
        return [run for run in page.runs or [] if run.display_name == name]

    def _pages(self, field: str, limit: int, listing: Callable[..., Any], **query: Any) -> Iterator[Any]:
        token, left = "", limit
        while left > 0:
            page = self._calls.repeated("listing", listing, page_size=min(left, PAGE), page_token=token, **query)
            entries = (getattr(page, field) or [])[:left]
            yield from entries
            left -= len(entries)
            if not (token := page.next_page_token) or not entries:
                return


def _equals(key: str, value: str) -> str:
    # quoted here and once more on its way: the server undoes it twice
    return quote_plus(json.dumps({"predicates": [{"operation": "EQUALS", "key": key, "string_value": value}]}))
