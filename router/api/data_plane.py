"""The data plane: plain ASGI, one function per route, nothing between the server and the pipeline.

A framework's routing and middleware would cost more than the whole way of a request, and would hide a client
that leaves.
"""

from __future__ import annotations

import asyncio
import json
import logging
import zlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from router.api.errors import ErrorAnswer, error_answer, internal_error
from router.core.errors import (
    InvalidRequest,
    MethodNotAllowed,
    ModelNotFound,
    NotFound,
    RequestError,
    RequestTimedOut,
    RequestTooLarge,
)
from router.core.openai_wire import error_frame
from router.core.ports import Clock, Identifiers, Snapshot
from router.core.types import AUTO, Caller
from router.pipeline import Inbound, Pipeline
from router.stages.admit import Admission
from router.stages.feedback import MAX_BODY as MAX_FEEDBACK_BODY
from router.stages.feedback import CacheFeedback, Feedback
from router.stages.telemetry import Telemetry

log = logging.getLogger("farthing")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_BODY = 32 * 1024 * 1024
READ_WITHIN = 300.0
"""Seconds a body may take to come."""
WATCH_AFTER = 0.05
"""Seconds after which an answer in the making is worth watching for a client that leaves."""
LISTS = ("cache-control", "x-farthing-tags")
_LOOPBACK = ("127.", "::1")


class Readiness(Protocol):
    """What `/readyz` answers: what is still missing, empty when ready."""

    def missing(self) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Route:
    """`cost` says how a route's money is bounded: `metered` goes through reserve and settle, `free` calls nobody."""

    path: str
    methods: tuple[str, ...]
    cost: Literal["metered", "free"]


ROUTES: tuple[Route, ...] = (
    Route("/chat/completions", ("POST",), "metered"),
    Route("/feedback", ("POST",), "free"),
    Route("/cache/feedback", ("POST",), "free"),
    Route("/models", ("GET",), "free"),
    Route("/models/{id}", ("GET",), "free"),
    Route("/healthz", ("GET", "HEAD"), "free"),
    Route("/readyz", ("GET", "HEAD"), "free"),
    Route("/metrics", ("GET",), "free"),
)
_BY_PATH = {route.path: route for route in ROUTES}
_ONE_MODEL = "/models/{id}"


class ClientLeft(Exception):
    """The client closed its connection."""


class DataPlane:
    """The ASGI application. `metrics` renders `/metrics`; `max_body` is in bytes."""

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        admission: Admission,
        feedback: Feedback,
        cache_feedback: CacheFeedback,
        configuration: Callable[[], Snapshot],
        telemetry: Telemetry,
        metrics: Callable[[], bytes],
        readiness: Readiness,
        identifiers: Identifiers,
        clock: Clock,
        max_body: int = MAX_BODY,
        read_within: float = READ_WITHIN,
    ) -> None:
        self._pipeline = pipeline
        self._admission = admission
        self._feedback = feedback
        self._cache_feedback = cache_feedback
        self._configuration = configuration
        self._telemetry = telemetry
        self._metrics = metrics
        self._readiness = readiness
        self._identifiers = identifiers
        self._clock = clock
        self._max_body = max_body
        self._bodies = _Bodies(read_within)
        self._handlers: dict[str, Callable[[Scope, Receive, _Reply, str], Awaitable[None]]] = {
            "/chat/completions": self._chat_completions,
            "/feedback": self._give_feedback,
            "/cache/feedback": self._judge_hit,
            "/models": self._models,
            "/models/{id}": self._model,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/metrics": self._render_metrics,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"the data plane speaks HTTP, not {scope['type']}")
        request_id = self._identifiers.request_id()
        reply = _Reply(send, request_id)
        self._admission.in_flight += 1
        try:
            route, argument = _route(scope["path"])
            if scope["method"] not in route.methods:
                refusal = MethodNotAllowed(f"{route.path} takes {' or '.join(route.methods)}.")
                refusal.allowed = route.methods
                raise refusal
            await self._handlers[route.path](scope, receive, reply, argument)
        except RequestError as error:
            self._telemetry.refused(error.code)
            await reply.error(error_answer(error))
        except ClientLeft:
            pass
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("request %s failed", request_id)
            self._telemetry.refused("internal_error")
            await reply.error(internal_error())
        finally:
            self._admission.in_flight -= 1

    # -- routes --

    async def _chat_completions(self, scope: Scope, receive: Receive, reply: _Reply, _: str) -> None:
        headers = _headers(scope)
        # Before a byte of the body is kept: nobody without a key, and no flood, fills the memory.
        self._admission.check_room()
        key, loopback = self._admission.hashed(headers.get("authorization")), _is_loopback(scope)
        await self._admission.caller(key, loopback)
        body = await self._bodies.read(headers, receive, self._max_body)
        inbound = Inbound(reply.request_id, "chat.completions", headers, key, body, loopback)
        async with _Leaving(receive), self._pipeline.answer(inbound) as answer:
            if answer.content_type == "application/json":
                whole = b"".join([frame async for frame in answer.frames])
                await reply.whole(answer.status, answer.content_type, answer.headers, whole)
                return
            await reply.start(answer.status, answer.content_type, answer.headers)
            async for frame in answer.frames:
                await reply.more(frame)
            await reply.end()

    async def _give_feedback(self, scope: Scope, receive: Receive, reply: _Reply, _: str) -> None:
        headers = _headers(scope)
        caller = await self._caller(headers, scope)
        body = await self._bodies.read(headers, receive, min(MAX_FEEDBACK_BODY, self._max_body))
        score = await self._feedback.give(caller, body)
        await reply.json(200, {"request_id": score.request_id, "score": score.score, "stored": True})

    async def _judge_hit(self, scope: Scope, receive: Receive, reply: _Reply, _: str) -> None:
        headers = _headers(scope)
        caller = await self._caller(headers, scope)
        body = await self._bodies.read(headers, receive, min(MAX_FEEDBACK_BODY, self._max_body))
        verdict, judged = await self._cache_feedback.give(caller, body)
        said = {
            "request_id": verdict.request_id,
            "correct": verdict.correct,
            "stored": True,
            "quarantined": judged.quarantined,
        }
        if verdict.correct and judged.quarantined:
            said["note"] = (
                "This answer was reported wrong before and stays out of the caches; a verdict does not bring it back."
            )
        await reply.json(200, said)

    async def _models(self, scope: Scope, receive: Receive, reply: _Reply, _: str) -> None:
        names = await self._names(scope)
        listed = {"object": "list", "data": [_model_object(name) for name in names]}
        await reply.json(200, listed)

    async def _model(self, scope: Scope, receive: Receive, reply: _Reply, name: str) -> None:
        if name not in await self._names(scope):
            raise ModelNotFound(
                "No model of this name is open to this key. GET /v1/models lists them.", param="model"
            )
        await reply.json(200, _model_object(name))

    async def _healthz(self, scope: Scope, receive: Receive, reply: _Reply, _: str) -> None:
        await reply.json(200, {"status": "ok"})

    async def _readyz(self, scope: Scope, receive: Receive, reply: _Reply, _: str) -> None:
        missing = self._readiness.missing()
        status = {"status": "ready"} if not missing else {"status": "not ready", "missing": missing}
        await reply.json(503 if missing else 200, status)

    async def _render_metrics(self, scope: Scope, receive: Receive, reply: _Reply, _: str) -> None:
        await reply.whole(200, "text/plain; version=0.0.4; charset=utf-8", {}, self._metrics())

    async def _caller(self, headers: Mapping[str, str], scope: Scope) -> Caller:
        key = self._admission.hashed(headers.get("authorization"))
        return await self._admission.caller(key, _is_loopback(scope))

    async def _names(self, scope: Scope) -> list[str]:
        headers = _headers(scope)
        caller = await self._caller(headers, scope)
        snapshot = self._configuration()
        policy = snapshot.resolve(caller.team, caller.app, caller.tags, self._clock.now())
        aliases = [name for name, target in snapshot.aliases.items() if target in policy.allow]
        return [AUTO, *policy.allow, *sorted(aliases)]


class _Reply:
    """Sends one answer. Every one carries the request's id; an error after the first byte ends a stream honestly."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self._started = False
        self._streaming = False

    async def start(
        self, status: int, content_type: str, headers: Mapping[str, str], length: int | None = None
    ) -> None:
        raw = [
            (b"content-type", _safe(content_type)),
            (b"x-request-id", self.request_id.encode("ascii")),
        ]
        if length is not None:
            raw.append((b"content-length", str(length).encode("ascii")))
        raw.extend((name.encode("latin-1"), _safe(value)) for name, value in headers.items())
        self._started = True
        self._streaming = length is None
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def more(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, body: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def whole(self, status: int, content_type: str, headers: Mapping[str, str], body: bytes) -> None:
        await self.start(status, content_type, headers, len(body))
        await self.end(body)

    async def json(self, status: int, value: object) -> None:
        await self.whole(status, "application/json", {}, json.dumps(value).encode("utf-8"))

    async def error(self, error: ErrorAnswer) -> None:
        if not self._started:
            await self.whole(error.status, error.content_type, error.headers, error.body)
        elif self._streaming:
            await self.end(
                error_frame("The gateway failed on this answer.", "server_error", "internal_error")
            )


def _route(path: str) -> tuple[Route, str]:
    """The route of a path, with or without `/v1`, and what stands for `{id}`. Raises NotFound."""
    path = path.removeprefix("/v1") if path.startswith("/v1/") else path
    route = _BY_PATH.get(path)
    if route is not None and route.path != _ONE_MODEL:
        return route, ""
    if path.startswith("/models/") and len(path) > len("/models/"):
        return _BY_PATH[_ONE_MODEL], path.removeprefix("/models/")
    raise NotFound(
        "No such route. The data plane serves " + ", ".join(f"/v1{r.path}" for r in ROUTES[:5]) + "."
    )


def _headers(scope: Scope) -> dict[str, str]:
    """Lower-case names. A header given twice keeps its last value; those of LISTS add up (RFC 9110, 5.3)."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        if name in LISTS and name in headers:
            value = f"{headers[name]},{value}"
        headers[name] = value
    return headers


def _is_loopback(scope: Scope) -> bool:
    client = scope.get("client")
    return client is not None and str(client[0]).startswith(_LOOPBACK)


class _Bodies:
    """Reads bodies, and ends those that take too long. One timer looks at all of them: one of its own for each would
    cost more than most bodies do.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: dict[asyncio.Task[Any], float] = {}
        self._late: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def read(self, headers: Mapping[str, str], receive: Receive, limit: int) -> bytes:
        """See `_read_body`. Raises RequestTimedOut as well."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        self._since[task] = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(self._seconds / 4, self._look)
        try:
            return await _read_body(headers, receive, limit)
        except asyncio.CancelledError:
            if task in self._late and task.uncancel() == 0:
                raise RequestTimedOut(
                    f"The body did not come within {self._seconds:g} seconds. Send less, or faster."
                ) from None
            raise
        finally:
            del self._since[task]
            self._late.discard(task)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        for task, since in self._since.items():
            if loop.time() - since > self._seconds and task not in self._late:
                self._late.add(task)
                task.cancel()
        self._timer = loop.call_later(self._seconds / 4, self._look) if self._since else None


async def _read_body(headers: Mapping[str, str], receive: Receive, limit: int) -> bytes:
    """The body, inflated. Raises RequestTooLarge before more than `limit` bytes are held, and ClientLeft."""
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
        more = message.get("more_body", False)
    return _inflated(b"".join(parts), headers.get("content-encoding", "").strip().lower(), limit)


def _inflated(body: bytes, encoding: str, limit: int) -> bytes:
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise InvalidRequest(
            "'Content-Encoding' may be gzip, deflate or identity.",
            param="content-encoding",
            code="unsupported_encoding",
        )
    inflater = zlib.decompressobj(wbits=47)  # 32 + 15: gzip or zlib, told apart by the header
    try:
        inflated = inflater.decompress(body, limit + 1)
    except zlib.error:
        raise InvalidRequest(
            f"The body is not {encoding}, as 'Content-Encoding' says.", param="content-encoding"
        ) from None
    if len(inflated) > limit:
        raise _too_large(limit)
    if not inflater.eof:
        raise InvalidRequest("The compressed body is cut short.", param="content-encoding")
    if inflater.unused_data:
        raise InvalidRequest(
            "The compressed body goes on after its end. Compress it in one piece.", param="content-encoding"
        )
    return inflated


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"The body is larger than {_size(limit)}. Send less, or raise the limit.")


def _size(limit: int) -> str:
    return f"{limit // (1024 * 1024)} MiB" if limit >= 1024 * 1024 else f"{limit // 1024} KiB"


class _Leaving:
    """Cancels the block when the client leaves, and raises ClientLeft in its place.

    It looks after WATCH_AFTER seconds first: most answers are there before, and a look costs a task of its own.
    """

    __slots__ = ("_left", "_receive", "_task", "_timer", "_watcher")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._left = False
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER, self._look)

    def _look(self) -> None:
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left = True
        self._task.cancel()

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if kind is asyncio.CancelledError and self._left and self._task.uncancel() == 0:
            raise ClientLeft from None


def _model_object(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "farthing"}


def _safe(value: str) -> bytes:
    """A header value without control characters, so that nothing can add a header of its own."""
    if value.isascii() and value.isprintable():
        return value.encode("ascii")
    return "".join(c if " " <= c <= "~" else "?" for c in value).encode("ascii")
