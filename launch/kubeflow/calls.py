"""Calls to the API of Kubeflow Pipelines: repeated where that may help, and their failures in words for people.

The generated client is used rather than kfp.Client, which prints, waits without end, and keeps a state file of its own.
"""

import json
import logging
import re
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import kfp_server_api as api
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential_jitter
from urllib3 import Retry
from urllib3.exceptions import HTTPError, MaxRetryError, NewConnectionError, SSLError
from urllib3.exceptions import TimeoutError as SlowError

from guardloop.core.errors import GuardLoopError
from guardloop.core.text import without_secrets
from launch.kubeflow.target import COOKIE, TOKEN, TOKEN_FILE, Target

CONNECT_SECONDS, READ_SECONDS = 10, 60
PATIENCE_SECONDS = 20.0
"""How long a call is repeated while Kubeflow Pipelines is away or fails."""
PAUSE_SECONDS = 0.5

T = TypeVar("T")
log = logging.getLogger(__name__)


class ApiError(GuardLoopError):
    """Kubeflow Pipelines did not do what was asked. `status` is that of HTTP; None where no answer came."""

    def __init__(self, what: str, remedy: str = "", status: int | None = None, passing: bool = False) -> None:
        super().__init__(what, remedy)
        self.status = status
        self.passing = passing


class Calls:
    """Calls to one Kubeflow Pipelines. Every method raises ApiError where an answer does not come or serve."""

    def __init__(
        self, target: Target, patience_seconds: float | None = None, say: Callable[[str], None] = log.warning
    ) -> None:
        self.target = target
        self.patience_seconds = PATIENCE_SECONDS if patience_seconds is None else patience_seconds
        self._say = say
        self.client = _client(target)

    def repeated(self, what: str, function: Callable[..., Any], *arguments: Any, **query: Any) -> Any:
        """One call, repeated while that may help; for calls that may be made twice."""
        return self.attempt(lambda: self.once(what, function, *arguments, **query))

    def get(self, what: str, path: str, as_json: bool = True) -> str:
        """The text at `path`, for what the generated client does not know."""

        def get() -> str:
            reply = self._explained(
                what,
                lambda: self.client.call_api(
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
                raise self.stranger(what) from None
            return str(text)

        return self.attempt(get)

    def once(self, what: str, function: Callable[..., Any], *arguments: Any, **query: Any) -> Any:
        """One call, never repeated; for calls that make something."""
        query["_request_timeout"] = (CONNECT_SECONDS, READ_SECONDS)
        answer = self._explained(what, lambda: function(*arguments, **query))
        kind = self.client.last_response.getheader("content-type") or ""
        if "json" not in kind:
            raise self.stranger(what)
        return answer

    def attempt(self, action: Callable[[], T]) -> T:
        """What `action` returns; it is repeated while it fails in a way that passes."""

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
            raise self.stranger(what) from None

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

    def known(self, identity: Any) -> str:
        """An id that was sent: the generated client takes any answer for one, and leaves out what is not in it."""
        if not identity or not isinstance(identity, str):
            raise self.stranger("reading an answer")
        return identity

    def stranger(self, what: str) -> ApiError:
        """The error for an answer that Kubeflow Pipelines would not give."""
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


def _status(status: int) -> str:
    names = {401: "401 Unauthorized", 500: "500 Internal Server Error", 503: "503 Service Unavailable"}
    return names.get(status, str(status))


def _message(error: api.ApiException) -> str:
    """The server's own words, shortened; its JSON errors hold them twice."""
    body = error.body.decode("utf-8", "replace") if isinstance(error.body, bytes) else error.body or ""
    try:
        answer = json.loads(body)
        body = answer.get("message") or answer.get("error_message") or answer.get("error") or body
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
