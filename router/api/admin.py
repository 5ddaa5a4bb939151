"""The admin plane on FastAPI: keys, policy status, reports, health. Every route needs FARTHING_ADMIN_KEY.

What asks SQL is a plain function, which the framework runs in a thread; what touches the worker's own state runs on
the event loop, where that state lives.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Annotated, Any, Literal, Protocol

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from starlette.exceptions import HTTPException

from router.api.data_plane import Message, Receive, Scope, Send
from router.api.errors import ErrorAnswer, error_answer, internal_error
from router.core.errors import (
    InvalidRequest,
    MethodNotAllowed,
    NotAuthenticated,
    NotFound,
    RequestError,
    RequestTooLarge,
)

log = logging.getLogger("farthing")

MAX_BODY = 64 * 1024
MAX_QUERY = 4 * 1024

_DESCRIPTION = "Keys, policy status, reports and health of a Farthing gateway."


class Administration(Protocol):
    """What stands behind the routes. All but `policy`, `reload_policy` and `health` block; all raise RequestError."""

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

    def verify(self) -> dict[str, Any]: ...

    def request(self, request_id: str) -> bytes: ...

    def health(self) -> Mapping[str, Any]: ...


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


_TagName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]


class NewKey(_Strict):
    """A team or app gets a key. `tags` are on every request it sends."""

    team: str = Field(max_length=63)
    app: str | None = Field(default=None, max_length=63)
    tags: dict[_TagName, list[_TagName]] = Field(default={}, max_length=16)


class AdoptedKey(NewKey):
    """`key` is the one the app already sends; only its keyed hash is stored."""

    key: SecretStr


class KeyShown(BaseModel):
    id: str
    team: str
    app: str | None
    tags: dict[str, list[str]]
    adopted: bool
    created_at: datetime
    revoked_at: datetime | None


class KeyCreated(KeyShown):
    """`key` is shown in this answer and never again."""

    key: str


class Keys(BaseModel):
    keys: list[KeyShown]


class PolicyStatus(BaseModel):
    """`last_error`: why the files as they are now were not loaded; None: they are what is active."""

    hash: str
    loaded_at: datetime
    warnings: list[str]
    last_error: str | None


class PolicyReloaded(PolicyStatus):
    changed: bool


class Breaker(BaseModel):
    """`model` is None where the whole provider cannot be reached."""

    provider: str
    model: str | None


class Health(BaseModel):
    """`redis_up` is None where Redis is not used. `journal_unsettled`: admitted requests of this worker that are
    not in SQL yet.
    """

    ready: bool
    missing: list[str]
    sql_up: bool
    redis_up: bool | None
    journal_unsettled: int
    open_breakers: list[Breaker]
    unusable_providers: dict[str, str]


class Difference(BaseModel):
    where: str
    what: str
    stored: str
    expected: str


class Verification(BaseModel):
    agrees: bool
    requests: int
    unsettled: int
    differences: list[Difference]


class ReportQuery(_Strict):
    """`by`: dimensions split by commas. `since` and `until`: 7d, 12h, a date or a time."""

    by: str | None = Field(default=None, max_length=200)
    since: str | None = Field(default=None, max_length=64)
    until: str | None = Field(default=None, max_length=64)
    format: Literal["json", "csv"] = "json"


class NoQuery(_Strict):
    pass


def application(*, admin_key: str | None, administration: Administration) -> Guard:
    """The ASGI application. Without an admin key it refuses everything."""
    app = FastAPI(
        title="Farthing admin",
        description=_DESCRIPTION,
        openapi_url="/admin/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    _errors(app)
    _routes(app, administration)
    return Guard(app, admin_key)


def _routes(app: FastAPI, administration: Administration) -> None:
    @app.get("/admin/keys", response_model=Keys)
    def list_keys(query: Annotated[NoQuery, Query()]) -> Any:
        """Every key, revoked ones included, never its text."""
        return {"keys": administration.keys()}

    @app.post("/admin/keys", status_code=201, response_model=KeyCreated)
    def create_key(wanted: NewKey, response: Response) -> Any:
        """Makes a key. It works at once, and this answer is the only one that shows it."""
        key, entry = administration.create_key(wanted.team, wanted.app, _tags(wanted))
        response.headers["cache-control"] = "no-store"
        return {"key": key, **entry}

    @app.post("/admin/keys/adopt", status_code=201, response_model=KeyShown)
    def adopt_key(wanted: AdoptedKey) -> Any:
        """Takes over a key an app already sends."""
        return administration.adopt_key(wanted.key.get_secret_value(), wanted.team, wanted.app, _tags(wanted))

    @app.delete("/admin/keys/{id}", response_model=KeyShown)
    def revoke_key(id: str) -> Any:
        """Ends a key; running gateways refuse it within 5 seconds."""
        return administration.revoke_key(id)

    @app.get("/admin/policy", response_model=PolicyStatus)
    async def policy() -> Any:
        """The configuration in force."""
        return administration.policy()

    @app.post("/admin/policy/reload", response_model=PolicyReloaded)
    async def reload_policy() -> Any:
        """Reads both files now; other workers follow within 2 seconds."""
        changed = administration.reload_policy()
        return {"changed": changed, **administration.policy()}

    @app.get("/admin/reports/{kind}", response_class=Response)
    def report(kind: str, query: Annotated[ReportQuery, Query()]) -> Response:
        """spend, savings or budgets, with the digits of `farthing report`."""
        if kind not in ("spend", "savings", "budgets"):
            raise NotFound("There are reports of spend, savings and budgets.", param="kind")
        if kind == "budgets":
            for name in ("by", "since", "until"):
                if getattr(query, name) is not None:
                    raise InvalidRequest(
                        f"'{name}' has no meaning for budgets: the report shows each budget of this month. Leave "
                        "it out.",
                        param=name,
                    )
        by = [part.strip() for part in (query.by or "team,model").split(",") if part.strip()]
        text = administration.report(kind, by, query.since, query.until, query.format)
        media = "text/csv; charset=utf-8" if query.format == "csv" else "application/json"
        return Response(text, media_type=media)

    @app.get("/admin/requests/{id}", response_class=Response)
    def request(id: str) -> Response:
        """Why that model answered and what it cost: what `farthing policy explain --request-id ID --json` prints."""
        return Response(administration.request(id), media_type="application/json")

    @app.get("/admin/health", response_model=Health)
    async def health() -> Any:
        """How this worker and its stores do."""
        return administration.health()

    @app.get("/admin/ledger/verify", response_model=Verification)
    def verify() -> Any:
        """Recomputes the whole ledger from its stored rows."""
        return administration.verify()


def _tags(wanted: NewKey) -> dict[str, tuple[str, ...]]:
    return {key: tuple(sorted(set(values))) for key, values in wanted.tags.items()}


# -- errors --


def _errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return _response(error_answer(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _response(error_answer(_invalid(error.errors())))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return _response(
                error_answer(NotFound("There is no such route. GET /admin/openapi.json lists them."))
            )
        if error.status_code == 405:
            return _response(error_answer(MethodNotAllowed("This route takes another method.")))
        return _response(error_answer(InvalidRequest("The body is not valid JSON.", code="invalid_json")))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _response(internal_error())


def _response(answer: ErrorAnswer) -> Response:
    return Response(answer.body, answer.status, answer.headers, answer.content_type)


def _invalid(problems: Sequence[Any]) -> InvalidRequest:
    """The first problem, by field. What was sent is never repeated: it may hold a key."""
    problem = problems[0]
    if problem["type"] == "json_invalid":
        return InvalidRequest("The body is not valid JSON.", code="invalid_json")
    where = [str(part) for part in problem["loc"][1:]]
    field = _printable(".".join(where)) or "body"
    if problem["type"] == "extra_forbidden":
        return InvalidRequest(f"'{field}' is not a field of this request. Leave it out.", param=field)
    if problem["type"] == "missing":
        return InvalidRequest(f"'{field}' is missing.", param=field)
    if where and where[0] == "tags":
        return InvalidRequest(
            "'tags' maps names to lists of names, such as {\"data\": [\"pii\"]}; a name holds a-z, 0-9, '_', '.' and "
            "'-'.",
            param="tags",
        )
    if field == "body":
        return InvalidRequest("The body must be a JSON object, sent as 'content-type: application/json'.")
    return InvalidRequest(f"'{field}': {_printable(str(problem['msg']))}.", param=field)


def _printable(text: str) -> str:
    return "".join(char for char in text[:120] if char.isprintable())


# -- the guard --


class Guard:
    """Before any route is looked up or a byte is parsed: who asks, and how much was sent."""

    def __init__(self, app: FastAPI, admin_key: str | None) -> None:
        self._app = app
        self._expected = sha256(admin_key.encode("utf-8", "surrogateescape")).digest() if admin_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"the admin plane speaks HTTP, not {scope['type']}")
        try:
            self._check(scope)
            body = await _read(scope, receive)
        except RequestError as error:
            await _send(send, error_answer(error))
            return
        if body is None:
            return
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        await self._app(scope, replay, send)

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
