"""The openai engine: any endpoint that speaks the chat completions of the OpenAI API.

The endpoint renders and tokenises the prompt itself, so a prompt's tokens are estimated here; what the endpoint refuses
becomes a row's error. Whether it honours the seed is up to it.
"""

import math
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2 as httpx
import tenacity

from guardloop.core.errors import GuardLoopError
from guardloop.responses.chat import PromptError
from guardloop.responses.engine import TOP_P, FinishReason, Reply, Request, failure
from guardloop.responses.settings import ResponderSettings

ATTEMPTS = 6
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 60.0
CONNECT_SECONDS = 10.0
LARGEST_ANSWER = 8 * 2**20  # bytes
BYTES_PER_TOKEN = 4  # of English text, about
FORBIDDEN, TOO_MANY = 403, 429
AGAIN = frozenset({408, 409, 425, TOO_MANY})


class TryAgainError(Exception):
    """A failure that may pass. `wait_seconds` is what the endpoint asked for."""

    def __init__(self, reason: str, wait_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds


class ForbiddenError(TryAgainError):
    """Refused before any answer: because of the key, or of this one prompt, which another's answer will tell."""


class RefusedError(Exception):
    """The endpoint refused this one request; trying again would not help."""


class OpenAIResponder:
    """Generates at an endpoint, with `concurrency` requests at a time."""

    def __init__(self, settings: ResponderSettings) -> None:
        self.name = settings.tag
        self.settings = settings
        headers = {}
        if settings.api_key_env:
            self._key = os.environ.get(settings.api_key_env, "").strip()
            if not self._key:
                raise GuardLoopError(
                    f"responder.api_key_env: the environment variable {settings.api_key_env} is not set",
                    f"export {settings.api_key_env} with the endpoint's key, or leave api_key_env out",
                )
            if not (self._key.isascii() and self._key.isprintable()):  # no header; and the client's error repeats it
                raise GuardLoopError(
                    f"responder.api_key_env: the value of {settings.api_key_env} cannot be a key: "
                    "it has line breaks or characters beyond ASCII",
                    f"export {settings.api_key_env} again, with the key alone",
                )
            headers["Authorization"] = f"Bearer {self._key}"
        self._client = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(settings.timeout_seconds, connect=min(CONNECT_SECONDS, settings.timeout_seconds)),
            limits=httpx.Limits(max_connections=settings.concurrency),
        )
        self._pace = Pace()
        self._stop = threading.Event()
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

    def _answer(self, request: Request) -> Reply:
        """The reply to one request. Raises GuardLoopError for what is wrong with all requests."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TryAgainError),
            stop=tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_when_event_set(self._stop),
            wait=_wait_seconds,
            sleep=tenacity.sleep_using_event(self._stop),
            reraise=True,
        )
        try:
            return retrying(self._ask, request)
        except RefusedError as error:
            return failure(request, str(error))
        except ForbiddenError as error:
            if not self._reached and not self._stop.is_set():
                raise self._refused_key(str(error)) from None
            return failure(request, str(error))
        except TryAgainError as error:
            if not self._reached and not self._stop.is_set():
                raise GuardLoopError(
                    f"responder.base_url: {self.settings.base_url} does not answer: {error}",
                    "check the address and that the endpoint is up; raise responder.timeout_seconds if it is slow",
                ) from None
            return failure(request, str(error))

    def _check_prompt(self, prompt: str) -> None:
        """Raises PromptError for a prompt that cannot be sent, or has too many tokens as far as can be told here."""
        if not prompt.strip():
            raise PromptError("the prompt is empty")
        try:
            size = len(prompt.encode("utf-8"))
        except UnicodeEncodeError:
            raise PromptError("the prompt is not valid Unicode") from None
        most = self.settings.max_prompt_tokens
        if size > most * BYTES_PER_TOKEN:
            raise PromptError(f"the prompt has {size} bytes, likely more than max_prompt_tokens={most} tokens")

    def _ask(self, request: Request) -> Reply:
        """One attempt. Raises TryAgainError, RefusedError or GuardLoopError."""
        settings = self.settings
        messages = [{"role": "system", "content": settings.system_prompt}] if settings.system_prompt else []
        body = {
            "model": settings.model,
            "messages": [*messages, {"role": "user", "content": request.prompt}],
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": TOP_P,
            "seed": request.seed,
        }
        self._pace.wait(self._stop)
        try:
            status, headers, content = self._post(body)
        except httpx.TimeoutException:
            raise TryAgainError(f"no answer within {settings.timeout_seconds:g} s") from None
        except httpx.RequestError as error:
            raise TryAgainError(f"connection failed: {error}") from None
        if status in AGAIN or status >= 500:
            asked = _retry_after(headers.get("retry-after"))
            if status == TOO_MANY and asked is not None:
                self._pace.hold(min(asked, LONGEST_WAIT_SECONDS))  # the limit is not this one request's
            raise TryAgainError(f"the endpoint answered {status}", asked)
        if status == FORBIDDEN:  # a filter before an endpoint refuses prompts so
            told = f"the endpoint answered {status}: {self._excerpt(content)}"
            raise RefusedError(told) if self._reached else ForbiddenError(told)
        self._check_access(status, content)
        self._reached = True
        if status != 200:
            raise RefusedError(f"the endpoint answered {status}: {self._excerpt(content)}")
        return _read_answer(request, content)

    def _post(self, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and content, all within the timeout, which httpx itself applies to each read only."""
        deadline = time.monotonic() + self.settings.timeout_seconds
        content = bytearray()
        with self._client.stream("POST", f"{self.settings.base_url}/chat/completions", json=body) as response:
            for chunk in response.iter_bytes():
                content += chunk
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the answer did not end")
                if len(content) > LARGEST_ANSWER:
                    raise RefusedError("the endpoint's answer is too large")
            return response.status_code, response.headers, bytes(content)

    def _check_access(self, status: int, content: bytes) -> None:
        settings = self.settings
        if status == 401:
            raise self._refused_key(f"the endpoint answered {status}: {self._excerpt(content)}")
        if status == 404:
            raise GuardLoopError(
                f"responder: {settings.base_url} has no model {settings.model}, or is no such endpoint (404)",
                "check responder.model and responder.base_url, which ends in /v1 at most endpoints",
            )

    def _refused_key(self, told: str) -> GuardLoopError:
        settings = self.settings
        return GuardLoopError(
            f"responder: {settings.base_url} refused the key: {told}",
            f"put a valid key into the environment variable {settings.api_key_env}"
            if settings.api_key_env
            else "name the environment variable that holds the key in responder.api_key_env",
        )

    def _excerpt(self, content: bytes) -> str:
        """The start of an error's text, without the key if the endpoint repeats it."""
        text = " ".join(content.decode("utf-8", "replace").split())
        if self.settings.api_key_env:
            text = text.replace(self._key, "***")
        return text[:200]


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


def _read_answer(request: Request, content: bytes) -> Reply:
    try:
        answer = httpx.Response(200, content=content).json()
        choice = answer["choices"][0]
        text = choice["message"].get("content") or choice["message"].get("refusal") or ""
        tokens = int((answer.get("usage") or {}).get("completion_tokens") or 0)
        reason: FinishReason = "length" if choice.get("finish_reason") == "length" else "stop"
        return Reply(request.id, request.sample, str(text).strip(), reason, tokens)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError):
        raise RefusedError("the endpoint's answer is not a chat completion") from None


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
