"""The openai engine: any endpoint that speaks the chat completions of the OpenAI API.

The endpoint renders and tokenises the prompt itself, so a prompt's tokens are estimated here; what the endpoint refuses
becomes a row's error. Whether it honours the seed is up to it. One request before all others finds a wrong address, key
or model, and which parameters the endpoint does not take: it goes on without these, and says so.
"""

import logging
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx2 as httpx
import tenacity

from guardloop.core.errors import GuardLoopError
from guardloop.core.text import one_line
from guardloop.responses.chat import PromptError
from guardloop.responses.engine import TOP_P, Reply, Request, failure
from guardloop.responses.engines.completion import BrokenAnswer, ProviderError, read_completion, read_error
from guardloop.responses.settings import ResponderSettings

log = logging.getLogger("guardloop")
ATTEMPTS, EMPTY_ATTEMPTS = 6, 3
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 60.0
CONNECT_SECONDS = 10.0
LARGEST_ANSWER = 8 * 2**20  # bytes
BYTES_PER_TOKEN = 4  # of English text, about
TOO_MANY = 429
AGAIN = frozenset({408, 409, 425, TOO_MANY})
DENIALS = 2  # refusals of the key, once it had been accepted, that end a run
HELLO = Request("hello", "Hello.", 0, 0)
WITHOUT = {
    "seed": "its responses cannot be repeated",
    "temperature": "it draws as it likes, not at the configured temperature",
    "top_p": f"it draws from all tokens, not from the likeliest {TOP_P:.0%}",
    "max_completion_tokens": "its responses end where it likes",
}
"""What it means that an endpoint does not take a parameter."""


class TryAgainError(Exception):
    """A failure that may pass. `wait_seconds` is what the endpoint asked for; `reply` stands where nothing helps."""

    def __init__(self, reason: str, wait_seconds: float | None = None, reply: Reply | None = None) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds
        self.reply = reply


class OpenAIResponder:
    """Generates at an endpoint, with `concurrency` requests at a time."""

    def __init__(self, settings: ResponderSettings) -> None:
        self.name = settings.tag
        self.settings = settings
        self._secrets: list[str] = []
        headers = {name: self._header(value) for name, value in settings.extra_headers.items()}
        if settings.api_key_env:
            headers = {"Authorization": f"Bearer {self._variable(settings.api_key_env)}", **headers}
        self._client = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(settings.timeout_seconds, connect=min(CONNECT_SECONDS, settings.timeout_seconds)),
            limits=httpx.Limits(max_connections=settings.concurrency),
        )
        address = urlsplit(str(settings.base_url))
        path = f"{address.path.rstrip('/').removesuffix('/chat/completions')}/chat/completions"
        self._url = urlunsplit(address._replace(path=path))  # a query, such as ?api-version=, stays
        self._pace = Pace()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._refused: set[str] = set()
        self._denials = 0
        self._reached = False

    def generate(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """One reply per request, as they come in. Reads ahead twice the concurrency."""
        self._stop.clear()
        pool = ThreadPoolExecutor(self.settings.concurrency, thread_name_prefix="responder")
        pending: set[Future[Reply]] = set()
        try:
            for request in requests:
                try:
                    self._check_prompt(request.prompt)
                except PromptError as error:
                    yield failure(request, str(error))
                    continue
                if not self._reached:
                    self._greet()
                pending.add(pool.submit(self._answer, request))
                if len(pending) >= 2 * self.settings.concurrency:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            self._stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _greet(self) -> None:
        """One harmless request before all others. Raises GuardLoopError where it cannot be answered."""
        try:
            reply = self._retry(HELLO)
        except TryAgainError as error:
            if error.reply is None:
                raise self._fatal(f"does not answer: {error}", "check that it is up, and its address") from None
            reply = error.reply
        except ProviderError as error:
            raise self._fatal(
                f"refused the first request: {error}",
                "check the responder's model, base_url, api_key_env and extra_headers",
            ) from None
        if reply.finish_reason in ("filtered", "prompt_filtered"):
            raise self._fatal('filters even "Hello."', "look at the filter that stands before it")
        self._reached = True

    def _answer(self, request: Request) -> Reply:
        """The reply to one request. Raises GuardLoopError for what is wrong with all requests."""
        try:
            return self._retry(request)
        except ProviderError as error:
            if error.filtered:
                return Reply(request.id, request.sample, "", "prompt_filtered", 0)
            return failure(request, str(error))
        except TryAgainError as error:
            return error.reply or failure(request, str(error))

    def _retry(self, request: Request) -> Reply:
        def enough(state: tenacity.RetryCallState) -> bool:
            error = state.outcome.exception() if state.outcome else None
            silent = isinstance(error, TryAgainError) and error.reply is not None
            return self._stop.is_set() or state.attempt_number >= (EMPTY_ATTEMPTS if silent else ATTEMPTS)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TryAgainError),
            stop=enough,
            wait=_wait_seconds,
            sleep=tenacity.sleep_using_event(self._stop),
            reraise=True,
        )
        return retrying(self._ask, request)

    def _check_prompt(self, prompt: str) -> None:
        """Raises PromptError for a prompt that cannot be sent, or has too many tokens as far as can be told here."""
        if not prompt.strip():
            raise PromptError("the prompt is empty")
        try:
            size = len(prompt.encode("utf-8"))
        except UnicodeEncodeError:
            raise PromptError("the prompt is not valid Unicode") from None
        limit = self.settings.max_prompt_tokens
        if size > limit * BYTES_PER_TOKEN:
            raise PromptError(f"the prompt has {size} bytes, likely more than max_prompt_tokens={limit} tokens")

    def _ask(self, request: Request) -> Reply:
        """One attempt. Raises TryAgainError, ProviderError or GuardLoopError."""
        try:
            while True:  # once more for each parameter that is refused
                body = self._body(request)
                status, headers, content = self._send(body)
                try:
                    answer = read_completion(content) if status == 200 else None
                    if answer is None:
                        raise read_error(status, content)
                except ProviderError as error:
                    if not self._learn(error, body):
                        raise self._judged(error, headers) from None
                    continue
                break
        except BrokenAnswer as error:
            raise TryAgainError(str(error)) from None
        reply = Reply(request.id, request.sample, answer.text, answer.kind, answer.tokens, refused=answer.refused)
        if answer.kind == "empty":
            raise TryAgainError("the endpoint's answer is empty", reply=reply)
        return reply

    def _body(self, request: Request) -> dict[str, Any]:
        settings = self.settings
        messages = [{"role": "system", "content": settings.system_prompt}] if settings.system_prompt else []
        options: dict[str, Any] = {
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": TOP_P,
            "seed": request.seed,
        }
        if "max_tokens" in self._refused or "max_completion_tokens" in settings.extra_body:
            options["max_completion_tokens"] = options.pop("max_tokens")
        body = {"model": settings.model, "messages": [*messages, {"role": "user", "content": request.prompt}]}
        kept = {name: value for name, value in options.items() if name not in self._refused}
        return {**body, **kept, **settings.extra_body}

    def _send(self, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and content, all within the timeout, which httpx itself applies to each read only."""
        self._pace.wait(self._stop)
        deadline = time.monotonic() + self.settings.timeout_seconds
        content = bytearray()
        try:
            with self._client.stream("POST", self._url, json=body) as response:
                for chunk in response.iter_bytes():
                    content += chunk
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("the answer did not end")
                    if len(content) > LARGEST_ANSWER:
                        raise ProviderError(response.status_code, "the answer is too large")
                return response.status_code, response.headers, bytes(content)
        except httpx.TimeoutException:
            raise TryAgainError(f"no answer within {self.settings.timeout_seconds:g} s") from None
        except httpx.RequestError as error:
            raise TryAgainError(f"connection failed: {self._without_secrets(str(error))}") from None

    def _learn(self, error: ProviderError, body: dict[str, Any]) -> bool:
        """Go on without a parameter that the endpoint refused; False where that is not what was wrong.

        Only the first request teaches: later errors may repeat what a prompt says.
        """
        name = error.parameter
        if self._reached or not name or name not in body or name in self.settings.extra_body:
            return False
        self._refused.add(name)
        meaning = WITHOUT.get(name, "it gets max_completion_tokens instead")
        log.warning("%s takes no %s, so %s", self.name, name, meaning)
        return True

    def _judged(self, error: ProviderError, headers: httpx.Headers) -> Exception:
        """What to raise for an error of the endpoint: for all requests, for this one, or to try again."""
        error.message = one_line(self._without_secrets(error.message))
        if error.filtered:
            return error
        if error.status == 401 or (error.status == 403 and not self._reached):
            with self._lock:
                self._denials += 1
            if self._reached and self._denials < DENIALS:
                return TryAgainError(str(error))
        elif error.status in AGAIN - {TOO_MANY} or error.status >= 500:
            return TryAgainError(str(error), _retry_after(headers.get("retry-after")))
        elif error.status == TOO_MANY and "insufficient_quota" not in error.code:
            asked = _retry_after(headers.get("retry-after"))
            self._pace.hold(min(asked or 0.0, LONGEST_WAIT_SECONDS))  # the limit is not this one request's
            return TryAgainError(str(error), asked)
        return self._for_all(error)

    def _for_all(self, error: ProviderError) -> Exception:
        """The error itself; one to end the run with where it is not this one prompt's."""
        if error.status in (401, 403) and (error.status == 401 or not self._reached):
            name = self.settings.api_key_env
            valid = f"put a valid key into the environment variable {name}"
            missing = "name the environment variable that holds the key in the responder's api_key_env"
            return self._fatal(f"refused the key: {error}", valid if name else missing)
        if error.status == 404:
            return self._fatal(
                f"has no model {self.settings.model}, or is no such endpoint: {error}",
                "check the responder's model and base_url, which ends in /v1 at most endpoints",
            )
        if error.status in (402, TOO_MANY):
            return self._fatal(f"has no quota left: {error}", "look at the account's billing; what was made is kept")
        return error

    def _fatal(self, what: str, remedy: str) -> GuardLoopError:
        address = urlunsplit(urlsplit(self._url)._replace(query="", fragment=""))
        return GuardLoopError(f"responder {self.name}: {address} {what}", remedy)

    def _header(self, value: str) -> str:
        return self._variable(value[1:]) if value.startswith("$") else value

    def _variable(self, name: str) -> str:
        """A key from the environment. Raises GuardLoopError where there is none, or what cannot be one."""
        key = os.environ.get(name, "").strip()
        if not key:
            raise GuardLoopError(
                f"responder {self.name}: the environment variable {name} is not set",
                f"export {name} with the endpoint's key, or leave it out of the responder's settings",
            )
        if not (key.isascii() and key.isprintable()):  # no header; and the client's error repeats it
            raise GuardLoopError(
                f"responder {self.name}: the value of {name} cannot be a key: "
                "it has line breaks or characters beyond ASCII",
                f"export {name} again, with the key alone",
            )
        self._secrets.append(key)
        return key

    def _without_secrets(self, text: str) -> str:
        """`text` without the keys that were sent, if the endpoint repeats them."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


class Pace:
    """Holds all requests where the endpoint asked for it."""

    def __init__(self) -> None:
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        """Wait until requests may go on, or until `stop` is set."""
        while not stop.is_set() and (seconds := self._next - time.monotonic()) > 0:
            stop.wait(seconds)

    def hold(self, seconds: float) -> None:
        """Let nobody go on for `seconds`."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def _retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: it holds a number or a date."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _wait_seconds(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.wait_seconds if isinstance(error, TryAgainError) else None
    grown = tenacity.wait_exponential_jitter(FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS, jitter=FIRST_WAIT_SECONDS)(state)
    return min(asked, LONGEST_WAIT_SECONDS) if asked is not None else grown
