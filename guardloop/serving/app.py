"""The service: FastAPI routes over the queue before the guard."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse

from guardloop import __version__
from guardloop.core.errors import GuardLoopError
from guardloop.serving.access import Keys, Limit
from guardloop.serving.batches import Answer, Batches, LateError, QueueFullError
from guardloop.serving.champion import Champion
from guardloop.serving.conversation import Judged, Scope, text_of, to_judge
from guardloop.serving.metrics import Metrics
from guardloop.serving.request_log import RequestLog
from guardloop.serving.schemas import (
    ChatRequest,
    CheckRequest,
    CheckResponse,
    JudgedMessage,
    Message,
    ModerationRequest,
)
from guardloop.serving.settings import MAX_BODY_BYTES, MAX_MESSAGES, ServingSettings

log = logging.getLogger("guardloop")
OPEN_PATHS = ("/health/live", "/health/ready", "/metrics")
GONE = 499  # the client closed the connection; nobody reads it
WORST = {"unsafe": 2, "failed": 1, "safe": 0}


class Service:
    """The guard, its queue, its log and its figures: what the routes share."""

    def __init__(self, champion: Champion, settings: ServingSettings) -> None:
        """Raises GuardLoopError where keys or log cannot be used."""
        self.champion, self.settings = champion, settings
        self.keys = Keys(settings.keys) if settings.keys else None
        self.limit = Limit(settings.requests_per_minute) if settings.requests_per_minute else None
        self.batches = Batches(champion.current, settings.max_waiting, self._passed)
        self.metrics = Metrics(lambda: self.batches.waiting, lambda: bool(champion.refused))
        self.log = (
            RequestLog(settings.log, settings.log_share, settings.log_text, self.metrics.lost.inc)
            if settings.log
            else None
        )
        champion.follow(settings.reload_seconds)

    def close(self) -> None:
        """Answer what waits, write the log, and end."""
        self.champion.close()
        self.batches.close()
        if self.log:
            self.log.close()

    async def check(
        self, request: Request, messages: Sequence[tuple[str, Any]], scope: Scope, conversation: str | None
    ) -> CheckResponse:
        """Judge a conversation, count it and log it."""
        try:
            judged = to_judge(messages, scope)
        except GuardLoopError as error:
            raise HTTPException(422, f"{error.what}; {error.remedy}") from None
        answer = await self._judge(request, judged)
        found = [self._verdict(one, verdict, answer) for one, verdict in zip(judged, answer.verdicts, strict=True)]
        worst = max(found, key=lambda m: (m.flagged, WORST[m.verdict], m.score if m.score is not None else 0.0))
        identity = uuid4().hex
        response = CheckResponse(
            id=identity,
            conversation=conversation or identity,
            flagged=worst.flagged,
            verdict=worst.verdict,
            score=worst.score,
            threshold=worst.threshold,
            categories=sorted({code for m in found if m.flagged for code in m.categories}),
            guard=answer.version,
            judged=found,
        )
        self._record(request, messages, judged, response)
        return response

    async def _judge(self, request: Request, judged: list[Judged]) -> Answer:
        """The verdicts; given up when the client is gone, refused where the guard is too busy."""
        work = asyncio.ensure_future(self.batches.judge([one.row for one in judged], self.settings.timeout_seconds))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise HTTPException(GONE, "the client is gone")
            return work.result()
        except QueueFullError as error:
            raise HTTPException(
                429, "the guard is busy: try again later", {"Retry-After": f"{error.retry_after:.0f}"}
            ) from None
        except LateError:
            raise HTTPException(503, "the guard did not answer in time", {"Retry-After": "1"}) from None
        finally:
            work.cancel()
            gone.cancel()

    def _verdict(self, one: Judged, verdict: Any, answer: Answer) -> JudgedMessage:
        guard = answer.guard
        threshold = guard.threshold if one.role == "user" else guard.response_threshold
        error = "it could not be judged" if verdict is None else verdict.error
        failed = verdict is None or verdict.score is None
        if failed and error == "empty prompt":  # nothing was said, so there is nothing to flag
            failed, error = False, None
            word, flagged = "safe", False
        elif failed:
            word, flagged = "failed", not self.settings.fail_open
        else:
            word, flagged = ("unsafe", True) if verdict.flagged else ("safe", False)
        scored = verdict is not None and not failed
        return JudgedMessage(
            index=one.index,
            role=one.role,
            verdict=word,
            flagged=flagged,
            score=verdict.score if scored else None,
            threshold=threshold,
            probability=verdict.probability if scored else None,
            categories=verdict.categories.split(",") if scored and verdict.categories else [],
            truncated=bool(verdict is not None and verdict.truncated),
            error=error,
        )

    def _record(
        self, request: Request, messages: Sequence[tuple[str, Any]], judged: list[Judged], response: CheckResponse
    ) -> None:
        failed = False
        for message in response.judged:
            failed |= message.verdict == "failed"
            self.metrics.verdicts.labels(response.guard, message.role, message.verdict).inc()
            if message.score is not None:
                self.metrics.scores.labels(response.guard, message.role).observe(message.score)
        if self.log is None:
            return
        last = judged[-1].row
        row = {
            "id": response.id,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "endpoint": request.url.path,
            "key": getattr(request.state, "key", None),
            "messages": [{"role": role, "content": _plain(content)} for role, content in messages],
            "prompt": last["prompt"],
            "response": last["response"],
            **response.model_dump(exclude={"id"}),
        }
        self.log.add(row, always=response.flagged or failed)

    def _passed(self, messages: int, seconds: float) -> None:
        self.metrics.batch.observe(messages)
        self.metrics.batch_seconds.observe(seconds)


def create_app(service: Service) -> FastAPI:
    """The routes of `service`; it is closed with the app."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="GuardLoop", version=__version__, description="Verdicts of the champion guard.", lifespan=life)

    @app.middleware("http")
    async def admit(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        return await _admit(service, request, call)

    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> JSONResponse:
        return _refusal(422, "; ".join(_problem(one) for one in error.errors()[:5]))

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return _refusal(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.post("/v1/check")
    async def check(request: Request, body: CheckRequest) -> CheckResponse:
        """Judge each user and assistant message of a conversation; the worst verdict is the answer."""
        return await service.check(request, _messages(body), body.scope, body.conversation)

    @app.post("/v1/moderations")
    async def moderations(request: Request, body: ModerationRequest) -> dict[str, Any]:
        """As OpenAI's moderations: a result for each text."""
        texts = _texts(body.input)
        checks = await asyncio.gather(*(service.check(request, [("user", text)], "all", None) for text in texts))
        guard = checks[0].guard
        return {"id": f"modr-{checks[0].id}", "model": guard, "results": [_moderation(one) for one in checks]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> dict[str, Any]:
        """As a guard behind vLLM answers: `safe`, or `unsafe` and a line of categories, for the last message."""
        if body.stream:
            raise HTTPException(422, "a verdict is not streamed: leave `stream` out")
        found = await service.check(request, _pairs(body.messages), "last", body.user)
        return _completion(found)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        """The process is there."""
        return {"status": "ok"}

    @app.get("/health/ready")
    async def ready() -> dict[str, Any]:
        """Which version answers, and whether the champion could be taken."""
        version, _ = service.champion.current()
        return {
            "status": "ok",
            "guard": version,
            "refused": service.champion.refused or None,
            "registry": service.champion.away or "ok",
        }

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        """The figures, for Prometheus."""
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return app


async def _admit(service: Service, request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
    """Size, key and rate of a request, before anything is read of it; its time and status, afterwards."""
    path = request.url.path
    if path in OPEN_PATHS:
        return await call(request)
    started = time.monotonic()
    response = _key_problem(service, request) or await _size_problem(request) or await call(request)
    known = path if path in ("/v1/check", "/v1/moderations", "/v1/chat/completions") else "other"
    service.metrics.requests.labels(known, response.status_code).inc()
    service.metrics.seconds.labels(known).observe(time.monotonic() - started)
    return response


def _key_problem(service: Service, request: Request) -> Response | None:
    name = "everyone"
    if service.keys:
        given = request.headers.get("x-api-key") or request.headers.get("authorization", "").removeprefix("Bearer ")
        if (owner := service.keys.owner(given.strip())) is None:
            return _refusal(401, "no valid API key: send `Authorization: Bearer KEY`", {"WWW-Authenticate": "Bearer"})
        name = request.state.key = owner
    if service.limit and (wait := service.limit.wait(name)):
        return _refusal(429, f"{name} asks too often", {"Retry-After": f"{max(1, wait):.0f}"})
    return None


async def _size_problem(request: Request) -> Response | None:
    """Reads the body, which is kept for the route, and stops at the limit."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            return _refusal(413, f"the request is larger than {MAX_BODY_BYTES:,} bytes")
    request._body = bytes(body)
    return None


async def _disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


def _refusal(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error in the form that OpenAI's clients read."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status, headers)


def _problem(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"][1:])
    return f"{place}: {error['msg']}" if place else str(error["msg"])


def _pairs(messages: list[Message]) -> list[tuple[str, Any]]:
    return [(message.role, message.content) for message in messages]


def _messages(body: CheckRequest) -> list[tuple[str, Any]]:
    if body.messages:
        return _pairs(body.messages)
    answer = [("assistant", body.response)] if body.response is not None else []
    return [("user", body.prompt), *answer]


def _texts(given: str | list[Any]) -> list[str]:
    """The texts of a moderation request. Parts of one message are one text, as with OpenAI."""
    if isinstance(given, str):
        return [given]
    if not given or len(given) > MAX_MESSAGES:
        raise HTTPException(422, f"input: send 1 to {MAX_MESSAGES} texts")
    if all(isinstance(part, str) for part in given):
        return given
    try:
        return [text_of(given)]
    except GuardLoopError as error:
        raise HTTPException(422, f"input: {error.what}; {error.remedy}") from None


def _moderation(found: CheckResponse) -> dict[str, Any]:
    probability = found.judged[0].probability
    score = probability if probability is not None else float(found.flagged)
    categories = {"unsafe": found.flagged} | dict.fromkeys(found.categories, True)
    return {
        "flagged": found.flagged,
        "categories": categories,
        "category_scores": dict.fromkeys(categories, score),
        "category_applied_input_types": {name: ["text"] for name in categories},
        **({"error": found.judged[0].error} if found.verdict == "failed" else {}),
    }


def _completion(found: CheckResponse) -> dict[str, Any]:
    content = "unsafe" + ("\n" + ",".join(found.categories) if found.categories else "") if found.flagged else "safe"
    message = {"role": "assistant", "content": content}
    return {
        "id": f"chatcmpl-{found.id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": found.guard,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        "guardloop": found.model_dump(include={"verdict", "score", "threshold", "judged"}),
    }


def _plain(content: Any) -> Any:
    return content if isinstance(content, str) else text_of(content)
