"""Kubeflow Pipelines through its v2beta1 API: patient where repeating helps, and never the same thing made twice.

The generated client is used rather than kfp.Client, which prints, waits without end, and keeps a state file of its own.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus, urlsplit
from urllib.request import getproxies, proxy_bypass

import kfp_server_api as api
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential_jitter
from urllib3 import Retry
from urllib3.exceptions import HTTPError, MaxRetryError, NewConnectionError, SSLError
from urllib3.exceptions import TimeoutError as SlowError

from guardloop.errors import GuardLoopError, without_secrets
from launch.target import COOKIE, TOKEN, TOKEN_FILE, Target

CONNECT_SECONDS, READ_SECONDS = 10, 60
PATIENCE_SECONDS = 20.0
"""How long a call is repeated while Kubeflow Pipelines is away or fails."""
PAUSE_SECONDS = 0.5
PAGE = 100

T = TypeVar("T")
log = logging.getLogger(__name__)


class ApiError(GuardLoopError):
    """Kubeflow Pipelines did not do what was asked. `status` is that of HTTP; None where no answer came."""

    def __init__(self, what: str, remedy: str = "", status: int | None = None, passing: bool = False) -> None:
        super().__init__(what, remedy)
        self.status = status
        self.passing = passing


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
        self._say = say
        self.patience_seconds = PATIENCE_SECONDS if patience_seconds is None else patience_seconds
        self._client = _client(target)
        self._about: About | None = None

    def about(self) -> About:
        """Its version, and whether it keeps its users apart."""
        if self._about is None:
            told = json.loads(self._get("asking for its health", "/apis/v2beta1/healthz"))
            if not isinstance(told, dict):
                raise self._stranger("asking for its health")
            version = told.get("tag_name") or told.get("apiServerTagName") or "of unknown version"
            self._about = About(str(version), bool(told.get("multi_user")))
        return self._about

    def check_access(self) -> None:
        """Raises ApiError unless this user may list runs in the namespace."""
        self._call("listing runs", self._runs.run_service_list_runs, page_size=1, **self._namespace())

    def pipeline(self, name: str, description: str = "") -> str:
        """The id of the pipeline called `name`, made where there is none."""

        def find_or_create() -> str:
            if found := self._pipeline_id(name):
                return found
            body = api.V2beta1Pipeline(name=name, display_name=name, description=description, **self._namespace())
            try:
                made = self._once("creating the pipeline", self._pipelines.pipeline_service_create_pipeline, body)
            except ApiError as error:
                if error.status == 409 and (found := self._pipeline_id(name)):
                    return found  # someone was faster
                raise
            return self._known(made.pipeline_id)

        return self._attempt(find_or_create)

    def version(self, pipeline_id: str, name: str, package: Path, description: str) -> tuple[Any, bool]:
        """The pipeline's version called `name`, uploaded where there is none; and whether it was there already."""

        def find_or_upload() -> tuple[Any, bool]:
            if found := self._version(pipeline_id, name):
                return found, True
            try:
                made = self._once(
                    "uploading the pipeline",
                    self._uploads.upload_pipeline_version,
                    str(package),
                    name=name,
                    pipelineid=pipeline_id,
                    description=description,
                )
            except ApiError as error:
                if error.status == 409 and (found := self._version(pipeline_id, name)):
                    return found, True
                raise
            self._known(made.pipeline_version_id)
            return made, False

        return self._attempt(find_or_upload)

    def version_of(self, run: Any) -> Any | None:
        """The pipeline version that a run executes, or None where it is gone."""
        reference = run.pipeline_version_reference
        if reference is None or not reference.pipeline_version_id:
            return None
        try:
            return self._call(
                "reading the pipeline",
                self._pipelines.pipeline_service_get_pipeline_version,
                reference.pipeline_id,
                reference.pipeline_version_id,
            )
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def experiment(self, name: str, create: bool = True) -> str | None:
        """The id of the experiment called `name`, made where there is none; None if it is not to be made."""
        listing = self._experiments.experiment_service_list_experiments

        def find() -> str | None:
            found = self._once(
                "listing experiments", listing, filter=_equals("display_name", name), **self._namespace()
            )
            return next((str(e.experiment_id) for e in found.experiments or [] if e.display_name == name), None)

        def find_or_create() -> str | None:
            if (found := find()) or not create:
                return found
            body = api.V2beta1Experiment(display_name=name, **self._namespace())
            try:
                made = self._once(
                    "creating the experiment", self._experiments.experiment_service_create_experiment, body
                )
            except ApiError as error:
                if error.status == 409 and (found := find()):
                    return found
                raise
            return self._known(made.experiment_id)

        return self._attempt(find_or_create)

    def start(self, name: str, experiment_id: str, version: Any, arguments: dict[str, Any], description: str) -> Any:
        """Start a run. `name` must be new: it tells a try whose answer was lost that the run exists."""
        body = api.V2beta1Run(
            display_name=name,
            description=description,
            experiment_id=experiment_id,
            pipeline_version_reference=_reference(version),
            runtime_config=api.V2beta1RuntimeConfig(parameters=arguments, pipeline_root=self.target.pipeline_root),
            service_account=self.target.service_account,
        )
        tries = 0

        def find_or_start() -> Any:
            nonlocal tries
            tries += 1
            if tries > 1 and (found := self._runs_called(name)):
                return found[0]
            made = self._once("starting the run", self._runs.run_service_create_run, body)
            self._known(made.run_id)
            return made

        return self._attempt(find_or_start)

    def run(self, run_id: str) -> Any:
        """The run with this id."""
        return self._call("reading the run", self._runs.run_service_get_run, run_id)

    def find_run(self, name: str) -> Any:
        """A run by id, by the first characters of its id, by name, or `latest`. Raises GuardLoopError if none is."""
        if name == "latest":
            found = list(self.runs(limit=1))
        else:
            try:
                return self.run(name)
            except ApiError as error:
                if error.status not in (400, 404):
                    raise
            found = self._attempt(lambda: self._runs_called(name))
            found = found or [r for r in self.runs(limit=200) if len(name) >= 4 and str(r.run_id).startswith(name)]
        if len(found) > 1:
            ids = ", ".join(str(r.run_id) for r in found[:5])
            raise GuardLoopError(f"{name!r} is the name of several runs: {ids}", "give the id of one")
        if not found:
            raise GuardLoopError(f"no run {name!r} at {self.target.host}", "`guardloop runs` lists them")
        return self.run(found[0].run_id)

    def runs(self, experiment_id: str | None = None, limit: int = 20) -> Iterator[Any]:
        """The newest runs first, of one experiment or all."""
        where = {"experiment_id": experiment_id} if experiment_id else {}
        listing = self._runs.run_service_list_runs
        return self._pages("runs", limit, listing, sort_by="created_at desc", **where, **self._namespace())

    def terminate(self, run_id: str) -> None:
        """Stop a run."""
        self._call("stopping the run", self._runs.run_service_terminate_run, run_id)

    def log(self, run_id: str, pod: str) -> str | None:
        """What a pod of a run has printed, or None where Kubeflow Pipelines does not have it."""
        try:
            place = f"/apis/v1alpha1/runs/{quote(run_id, safe='')}/nodes/{quote(pod, safe='')}/log"
            text = self._get("reading a log", place, as_json=False)
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
        found = self._pages("recurring_runs", limit, listing, sort_by="created_at desc", **which, **self._namespace())
        return (one for one in found if name is None or one.display_name == name)

    def create_schedule(
        self, name: str, cron: str, experiment_id: str, version: Any, arguments: dict[str, Any], description: str
    ) -> Any:
        """Start a run whenever `cron` says so (see launch.schedule), one at a time, missed ones left out."""
        body = api.V2beta1RecurringRun(
            display_name=name,
            description=description,
            experiment_id=experiment_id,
            pipeline_version_reference=_reference(version),
            runtime_config=api.V2beta1RuntimeConfig(parameters=arguments, pipeline_root=self.target.pipeline_root),
            service_account=self.target.service_account,
            trigger=api.V2beta1Trigger(cron_schedule=api.V2beta1CronSchedule(cron=cron)),
            mode=api.RecurringRunMode.ENABLE,
            max_concurrency="1",
            no_catchup=True,
        )
        known = {one.recurring_run_id for one in self.schedules(name)}
        tries = 0

        def find_or_create() -> Any:
            nonlocal tries
            tries += 1
            if tries > 1 and (new := [one for one in self.schedules(name) if one.recurring_run_id not in known]):
                return new[0]
            return self._once("creating the schedule", self._schedules.recurring_run_service_create_recurring_run, body)

        return self._attempt(find_or_create)

    def pause_schedule(self, schedule_id: str) -> None:
        """Start no more runs until it is resumed."""
        self._call("pausing the schedule", self._schedules.recurring_run_service_disable_recurring_run, schedule_id)

    def resume_schedule(self, schedule_id: str) -> None:
        """Start runs again."""
        self._call("resuming the schedule", self._schedules.recurring_run_service_enable_recurring_run, schedule_id)

    def delete_schedule(self, schedule_id: str) -> None:
        """Forget the schedule; one that is gone already is none to complain of."""
        try:
            self._call("deleting the schedule", self._schedules.recurring_run_service_delete_recurring_run, schedule_id)
        except ApiError as error:
            if error.status != 404:
                raise

    # The parts of the API

    @property
    def _pipelines(self) -> Any:
        return api.PipelineServiceApi(self._client)

    @property
    def _uploads(self) -> Any:
        return api.PipelineUploadServiceApi(self._client)

    @property
    def _experiments(self) -> Any:
        return api.ExperimentServiceApi(self._client)

    @property
    def _runs(self) -> Any:
        return api.RunServiceApi(self._client)

    @property
    def _schedules(self) -> Any:
        return api.RecurringRunServiceApi(self._client)

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
            found = self._once(
                "looking up the pipeline",
                self._pipelines.pipeline_service_get_pipeline_by_name,
                name,
                **self._namespace(),
            )
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        return self._known(found.pipeline_id)

    def _version(self, pipeline_id: str, name: str) -> Any | None:
        listing = self._pipelines.pipeline_service_list_pipeline_versions
        found = self._once("listing versions", listing, pipeline_id, filter=_equals("display_name", name))
        return next((v for v in found.pipeline_versions or [] if name in (v.name, v.display_name)), None)

    def _runs_called(self, name: str) -> list[Any]:
        listing = self._runs.run_service_list_runs
        found = self._once("listing runs", listing, filter=_equals("display_name", name), **self._namespace())
        return [run for run in found.runs or [] if run.display_name == name]

    def _pages(self, field: str, limit: int, listing: Callable[..., Any], **query: Any) -> Iterator[Any]:
        token, left = "", limit
        while left > 0:
            page = self._call("listing", listing, page_size=min(left, PAGE), page_token=token, **query)
            entries = (getattr(page, field) or [])[:left]
            yield from entries
            left -= len(entries)
            if not (token := page.next_page_token) or not entries:
                return

    # Calls

    def _call(self, what: str, function: Callable[..., Any], *arguments: Any, **query: Any) -> Any:
        """One call, repeated while that may help; for calls that may be made twice."""
        return self._attempt(lambda: self._once(what, function, *arguments, **query))

    def _get(self, what: str, path: str, as_json: bool = True) -> str:
        """The text at `path`, for what the generated client does not know."""

        def get() -> str:
            reply = self._explained(
                what,
                lambda: self._client.call_api(
                    path,
                    "GET",
                    auth_settings=["Bearer"],
                    _preload_content=False,
                    _return_http_data_only=True,
                    _request_timeout=(CONNECT_SECONDS, READ_SECONDS),
                ),
            )
            try:
                text = reply.data.decode("utf-8", "replace")
                if as_json:
                    json.loads(text)
            except HTTPError as error:
                raise self._away(what, error) from None
            except ValueError:
                raise self._stranger(what) from None
            return str(text)

        return self._attempt(get)

    def _once(self, what: str, function: Callable[..., Any], *arguments: Any, **query: Any) -> Any:
        query["_request_timeout"] = (CONNECT_SECONDS, READ_SECONDS)
        answer = self._explained(what, lambda: function(*arguments, **query))
        kind = self._client.last_response.getheader("content-type") or ""
        if "json" not in kind:
            raise self._stranger(what)
        return answer

    def _attempt(self, action: Callable[[], T]) -> T:
        def report(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if state.attempt_number == 1 and isinstance(error, ApiError):
                self._say(f"{error.what}; trying again for up to {self.patience_seconds:.0f} s")

        retrying = Retrying(
            retry=retry_if_exception(lambda error: isinstance(error, ApiError) and error.passing),
            stop=stop_after_delay(self.patience_seconds),
            wait=wait_exponential_jitter(initial=PAUSE_SECONDS, max=20 * PAUSE_SECONDS, jitter=PAUSE_SECONDS),
            before_sleep=report,
            reraise=True,
        )
        return retrying(action)

    def _explained(self, what: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except api.ApiException as error:
            raise self._refused(what, error) from None
        except HTTPError as error:
            raise self._away(what, error) from None
        except (ValueError, AttributeError, TypeError) as error:  # what the generated client makes of odd answers
            log.debug("%s: %r", what, error)
            raise self._stranger(what) from None

    def _refused(self, what: str, error: api.ApiException) -> ApiError:
        status, place = int(error.status or 0), self.target.host
        if status == 401 or 300 <= status < 400:
            return ApiError(
                f"{what}: {place} does not know who asks ({_status(status)}; sent: {self.target.credentials})",
                f"set {TOKEN}, {TOKEN_FILE} (a file) or {COOKIE} (of a browser that is logged in)",
                status,
            )
        if status == 403:
            where = f" in namespace {self.target.namespace}" if self.target.namespace else ""
            return ApiError(
                f"{what}: {place} refuses access{where}: {_message(error)}",
                "check the namespace, and ask its owner for the role kubeflow-edit",
                status,
            )
        if status == 404:
            return ApiError(
                f"{what}: {place} has no such thing: {_message(error)}",
                "check the name, and that the host leads to Kubeflow Pipelines 2 (its address may end in /pipeline)",
                status,
            )
        passing = status == 429 or status >= 500
        remedy = "look at the log of the deployment ml-pipeline, then try again" if passing else "mend what it names"
        return ApiError(f"{what}: {place} answered {_status(status)}: {_message(error)}", remedy, status, passing)

    def _away(self, what: str, error: HTTPError) -> ApiError:
        cause: BaseException | None = error.reason if isinstance(error, MaxRetryError) else error
        place = self.target.host
        if isinstance(cause, SSLError):
            if "CERTIFICATE_VERIFY_FAILED" in str(cause):
                return ApiError(
                    f"{what}: the TLS certificate of {place} is not trusted ({_certificate_problem(str(cause))})",
                    "give the file of its authority: KF_PIPELINES_CA_FILE, or kubeflow.ca_file in the platform",
                )
            return ApiError(f"{what}: {place} does not speak TLS", "check the port, or use the http:// address")
        if isinstance(cause, SlowError) and not isinstance(cause, NewConnectionError):
            words = "did not answer in time"
        else:
            words = f"cannot be reached ({_reason(cause or error)})"
        return ApiError(
            f"{what}: {place} {words}",
            "check the address and the network; is a `kubectl port-forward` running?",
            passing=True,
        )

    def _known(self, identity: Any) -> str:
        """An id that was sent: the generated client takes any answer for one, and leaves out what is not in it."""
        if not identity or not isinstance(identity, str):
            raise self._stranger("reading an answer")
        return identity

    def _stranger(self, what: str) -> ApiError:
        return ApiError(
            f"{what}: what answers at {self.target.host} is not the API of Kubeflow Pipelines 2, or a login before it",
            f"check the address (it may end in /pipeline); for a login page set {COOKIE} or {TOKEN}",
        )


def _client(target: Target) -> Any:
    configuration = api.Configuration(host=target.host)
    configuration.ssl_ca_cert = target.ca_file
    configuration.retries = Retry(connect=0, read=0, redirect=0, status=0, other=0, raise_on_redirect=False)
    parts = urlsplit(target.host)
    if not proxy_bypass(parts.hostname or ""):
        configuration.proxy = getproxies().get(parts.scheme)
    if target.token():

        def renew(configuration: Any) -> None:
            configuration.api_key["authorization"] = target.token()

        configuration.api_key_prefix["authorization"] = "Bearer"
        configuration.refresh_api_key_hook = renew
        renew(configuration)
    return api.ApiClient(configuration, cookie=target.cookie)


def _reference(version: Any) -> Any:
    return api.V2beta1PipelineVersionReference(
        pipeline_id=version.pipeline_id, pipeline_version_id=version.pipeline_version_id
    )


def _equals(key: str, value: str) -> str:
    # quoted here and once more on its way: the server undoes it twice
    return quote_plus(json.dumps({"predicates": [{"operation": "EQUALS", "key": key, "string_value": value}]}))


def _status(status: int) -> str:
    names = {401: "401 Unauthorized", 500: "500 Internal Server Error", 503: "503 Service Unavailable"}
    return names.get(status, str(status))


def _message(error: api.ApiException) -> str:
    """The server's own words, shortened; its JSON errors hold them twice."""
    body = error.body.decode("utf-8", "replace") if isinstance(error.body, bytes) else error.body or ""
    try:
        told = json.loads(body)
        body = told.get("message") or told.get("error_message") or told.get("error") or body
    except (ValueError, AttributeError):
        body = re.sub(r"<[^>]*>", " ", body)  # a proxy's page
    return without_secrets(" ".join(str(body).split()))[:400] or str(error.reason or "no reason given")


def _reason(error: BaseException) -> str:
    """The last and plainest part of what urllib3 says, such as `[Errno 111] Connection refused`."""
    text = str(error).rpartition(": ")[2].strip("()'\" ") or type(error).__name__
    return without_secrets(text)[:200]


def _certificate_problem(text: str) -> str:
    found = re.search(r"certificate verify failed: ([^(]*)", text)
    return found[1].strip() if found else "verification failed"
