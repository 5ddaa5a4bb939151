"""The admin plane's guard: who asks and how much was sent, before FastAPI is even imported.

FastAPI (`admin_routes.py`) is imported in a thread with the first request that carries the admin key: importing it
takes part of a second, which the streams on the data plane would feel, and nobody without the key can cause it.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, Protocol

from router.api.data_plane import Message, Receive, Scope, Send
from router.api.errors import ErrorAnswer, error_answer
from router.core.cached import InvalidationKind
from router.core.errors import InvalidRequest, NotAuthenticated, RequestError, RequestTooLarge
from router.core.json_object import parse_object

MAX_BODY = 64 * 1024
MAX_QUERY = 4 * 1024


class Administration(Protocol):
    """What stands behind the routes. All but `policy`, `reload_policy`, `cache` and `health` block; all raise
    RequestError.
    """

    def keys(self) -> list[dict[str, Any]]: ...

    def create_key(
        self, team: str, app: str | None, tags: Mapping[str, tuple[str, ...]]
    ) -> tuple[str, dict[str, Any]]: ...

    def adopt_key(
        self, key: str, team: str, app: str | None, tags: Mapping[str, tuple[str, ...]]
    ) -> dict[str, Any]: ...

    def revoke_key(self, key_id: str) -> dict[str, Any]: ...

    def policy(self) -> dict[str, Any]: ...

    def reload_policy(self) -> bool: ...

    def report(
        self, kind: str, by: Sequence[str], since: str | None, until: str | None, form: str
    ) -> str: ...

    async def cache(self) -> dict[str, Any]: ...

    def invalidate(self, kind: InvalidationKind, value: str, reason: str | None) -> dict[str, Any]: ...

    def verify(self) -> dict[str, Any]: ...

    def request(self, request_id: str) -> bytes: ...

    def health(self) -> Mapping[str, Any]: ...


def application(*, admin_key: str | None, administration: Administration) -> Guard:
    """The ASGI application. Without an admin key it refuses everything."""
    return Guard(administration, admin_key)


class Guard:
    """Checks the key and the size of every request, then hands it to the routes."""

    def __init__(self, administration: Administration, admin_key: str | None) -> None:
        self._administration = administration
        self._routes: Any = None
        self._building = asyncio.Lock()
        self._expected = sha256(admin_key.encode("utf-8", "surrogateescape")).digest() if admin_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"the admin plane speaks HTTP, not {scope['type']}")
        try:
            self._check(scope)
            body = await _read(scope, receive)
            if body and scope["method"] == "POST":
                parse_object(body)  # FastAPI would take a name given twice
        except RequestError as error:
            await _send(send, error_answer(error))
            return
        if body is None:
            return
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        if self._routes is None:
            async with self._building:
                self._routes = self._routes or await asyncio.to_thread(self._build)
        await self._routes(scope, replay, send)

    def _build(self) -> Any:
        from router.api.admin_routes import routes

        return routes(self._administration)

    def _check(self, scope: Scope) -> None:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        # Digests of equal length, so that the time tells neither a part of the key nor how long it is.
        same = hmac.compare_digest(sha256(key.strip()).digest(), self._expected or bytes(32))
        if self._expected is None or scheme.lower() != b"bearer" or not same:
            raise NotAuthenticated(
                "The admin plane needs 'Authorization: Bearer FARTHING_ADMIN_KEY', the key this gateway was "
                "started with.",
                code="invalid_admin_key",
            )
        if len(scope.get("query_string", b"")) > MAX_QUERY:
            raise InvalidRequest(f"The query is longer than {MAX_QUERY} bytes.")


async def _read(scope: Scope, receive: Receive) -> bytes | None:
    """The body, None where the client left. Raises RequestTooLarge."""
    too_large = RequestTooLarge(f"The body is larger than {MAX_BODY} bytes.")
    for name, value in scope["headers"]:
        if name == b"content-length" and (not value.isdigit() or len(value) > 9 or int(value) > MAX_BODY):
            raise too_large
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            raise too_large
        if not message.get("more_body", False):
            return b"".join(parts)


async def _send(send: Send, answer: ErrorAnswer) -> None:
    headers = {**answer.headers, "content-type": answer.content_type, "content-length": str(len(answer.body))}
    if answer.status == 413:
        headers["connection"] = "close"
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": raw})
    await send({"type": "http.response.body", "body": answer.body})
