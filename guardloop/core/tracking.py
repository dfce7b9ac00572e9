"""The way to MLflow: which server, patience while it is away, and errors that say where it was looked for."""

import logging
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import requests
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError
from filelock import FileLock
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

from guardloop.core.errors import GuardLoopError, first_line
from guardloop.core.mlflow_server import refuse_old_server
from guardloop.core.text import without_secrets

# MLflow's own retries would multiply with ours, and could repeat a creation that had succeeded.
# It also reports its use to its makers, and prints, unless told not to.
for _name, _value in {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}.items():
    os.environ.setdefault(_name, _value)

from mlflow import MlflowClient  # noqa: E402  (reads the settings above)
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from sqlalchemy.exc import SQLAlchemyError  # noqa: E402

for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.ERROR)

T = TypeVar("T")
log = logging.getLogger(__name__)

FAILURES = (
    MlflowException,
    requests.RequestException,
    ClientError,
    BotoCoreError,
    Boto3Error,
    SQLAlchemyError,
    OSError,
)
RUN_ID = "guardloop.run_id"
"""The tag that holds the pipeline run's id."""
SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
_opening = threading.Lock()  # MLflow creates a database's tables without a lock of its own


class Connection:
    """MLflow at `tracking_uri`, else at the environment's MLFLOW_TRACKING_URI.

    Failed calls are repeated for up to `patience_seconds`. Raises GuardLoopError if no usable address is given.
    """

    def __init__(self, tracking_uri: str | None = None, patience_seconds: float = 60) -> None:
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            raise GuardLoopError(
                "no MLflow to record in: MLFLOW_TRACKING_URI is not set",
                "give it an address such as https://mlflow.example.org, or sqlite:///guardloop.db for a local file",
            )
        self.uri = uri
        self.place = without_secrets(uri)
        self.patience_seconds = patience_seconds
        if not re.match(rf"({'|'.join(SCHEMES)})(\+\w+)?(:|$)", uri):
            raise GuardLoopError(f"not an MLflow address: {self.place}", "give https://host, or sqlite:///file.db")
        self._client: MlflowClient | None = None

    def attempt(self, what: str, action: Callable[[Any], T]) -> T:
        """`action(client)`, repeated while MLflow is away: it must be safe to repeat. `what` is for the messages.

        Raises GuardLoopError, naming the server, once patience is spent or at once where repeating cannot help.
        """

        def report(state: RetryCallState) -> None:
            log.warning("%s failed (try %d), trying again: MLflow at %s", what, state.attempt_number, self.place)

        started = time.monotonic()
        retrying = Retrying(
            retry=retry_if_exception(_may_pass),
            stop=stop_after_delay(self.patience_seconds),
            wait=wait_exponential_jitter(initial=0.5, max=10, jitter=0.5),
            before_sleep=report,
            reraise=True,
        )
        try:
            return retrying(lambda: action(self._connected()))
        except FAILURES as error:
            seconds = time.monotonic() - started
            raise self._explain(what, error, seconds) from None  # the causes may hold the address with its password

    def _connected(self) -> Any:
        """The client, made on first use: a database may be away then."""
        with _opening:
            if self._client is None:
                if database := self._database():
                    _make_database(database)
                refuse_old_server(self.uri)
                self._client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
            return self._client

    def experiment(self, name: str) -> str:
        """The id of the experiment called `name`, made where there is none. Raises GuardLoopError if it was deleted."""

        def find_or_create(client: Any) -> str:
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                database = self._database()  # its artifacts are kept beside it; MLflow's default is the cwd
                artifacts = (database.parent / "artifacts").absolute().as_uri() if database else None
                try:
                    return str(client.create_experiment(name, artifact_location=artifacts))
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                    experiment = client.get_experiment_by_name(name)  # another process was faster
            if experiment.lifecycle_stage == "deleted":
                raise GuardLoopError(
                    f"the experiment {name!r} was deleted in MLflow at {self.place}",
                    f"`mlflow experiments restore -x {experiment.experiment_id}` brings it back; or set another "
                    "registry.experiment",
                )
            return str(experiment.experiment_id)

        return self.attempt(f"opening the experiment {name!r}", find_or_create)

    def run(self, experiment_name: str, run_id: str, tags: dict[str, str]) -> Any:
        """The MLflow run of the pipeline run `run_id`, made where there is none."""
        if not re.fullmatch(r"[\w.:/ -]+", run_id):
            raise GuardLoopError(f"not a run id: {run_id!r}", "use letters, digits, `-`, `_`, `.`, `:` and `/`")
        experiment = self.experiment(experiment_name)

        def find_or_create(client: Any) -> Any:
            query = f"tags.`{RUN_ID}` = '{run_id}'"
            if runs := client.search_runs([experiment], query, max_results=1, order_by=["attributes.start_time"]):
                return runs[0]
            return client.create_run(experiment, run_name=run_id, tags={**tags, RUN_ID: run_id})

        return self.attempt(f"opening the run {run_id}", find_or_create)

    def _database(self) -> Path | None:
        """The file of an SQLite database."""
        _, separator, path = self.uri.partition("?")[0].partition(":///")
        return Path(path) if separator and self.uri.startswith("sqlite") and path else None

    def _explain(self, what: str, error: Exception, seconds: float) -> GuardLoopError:
        text, reason = str(error), without_secrets(first_line(error))[:300]
        status = _status(error)
        if status in {401, 403}:
            return GuardLoopError(
                f"{what}: MLflow at {self.place} refused access",
                "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
            )
        if "SSLError" in text or "CERTIFICATE_VERIFY_FAILED" in text:
            return GuardLoopError(
                f"{what}: the TLS certificate of MLflow at {self.place} is not trusted",
                "set MLFLOW_TRACKING_SERVER_CERT_PATH to the file of its authority",
            )
        if re.search(r"ReadTimeout|ConnectTimeout|timeout exception|timed out", text):
            limit = MLFLOW_HTTP_REQUEST_TIMEOUT.get()
            return GuardLoopError(
                f"{what}: MLflow at {self.place} did not answer a request within {limit} s ({seconds:.0f} s of trying)",
                "check that the server can reach its database and artifact store; where the link is slow, set "
                "MLFLOW_HTTP_REQUEST_TIMEOUT to more seconds",
            )
        if _may_pass(error):
            return GuardLoopError(
                f"{what}: MLflow at {self.place} does not work after {seconds:.0f} s of trying: {reason}",
                "check that the server runs and can reach its database and artifact store, then run this again",
            )
        return GuardLoopError(
            f"{what}: MLflow at {self.place} refused: {reason}", "mend what it names, then run this again"
        )


def _make_database(path: Path) -> None:
    """Create an SQLite database, whole or not at all: MLflow cannot go on with one whose creation was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            return
        with TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
            partial = Path(folder, path.name)
            MlflowClient(tracking_uri=f"sqlite:///{partial}").search_experiments(max_results=1)
            partial.replace(path)


def _may_pass(error: BaseException) -> bool:
    """Whether repeating the call may help: the server is away, overloaded or failed."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return False
    status = _status(error)
    if status is not None:
        return status >= 500 or status == 429
    return isinstance(error, requests.RequestException | BotoCoreError | Boto3Error | SQLAlchemyError | ConnectionError)


def _status(error: BaseException) -> int | None:
    """The HTTP status behind `error`, where there is one."""
    answer = getattr(error, "json", None)
    if isinstance(answer, dict) and "error_code" not in answer:  # of a gateway before MLflow, which hides its status
        said = [answer.get(key) for key in ("status", "statusCode", "code")]
        refused = re.search(r"(?i)unauthori|forbidden|not authenticated|denied", str(answer))
        return next((n for n in said if isinstance(n, int) and 400 <= n < 600), 403 if refused else 500)
    if isinstance(error, MlflowException):
        return int(error.get_http_status_code())
    if isinstance(error, ClientError):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)
