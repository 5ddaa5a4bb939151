"""The admin plane's routes on FastAPI: keys, policy status, reports, requests, health.

What asks SQL is a plain function, which the framework runs in a thread; what touches the worker's own state runs on
the event loop, where that state lives. `admin.py` has checked the key and the size before.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from starlette.exceptions import HTTPException

from router.api.admin import Administration
from router.api.errors import ErrorAnswer, error_answer, internal_error
from router.core.cached import InvalidationKind
from router.core.errors import InvalidRequest, MethodNotAllowed, NotFound, RequestError


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
    not in SQL yet. `learned_artefact`: the heads in use; `refused_artefact`: why those that should be are not.
    """

    ready: bool
    missing: list[str]
    sql_up: bool
    redis_up: bool | None
    journal_unsettled: int
    open_breakers: list[Breaker]
    unusable_providers: dict[str, str]
    learned_artefact: str | None = None
    refused_artefact: str | None = None


class NewInvalidation(_Strict):
    """What is not served any more. `value`: TEAM, TEAM/APP, model, key=value, scope or entry; none for `all`."""

    kind: InvalidationKind
    value: str = Field(default="", max_length=200)
    reason: str | None = Field(default=None, max_length=500)


class InvalidationShown(BaseModel):
    """`by`: admin, cli, check (a check found it wrong) or the id of the key whose caller reported it wrong."""

    id: int
    at: datetime
    kind: str
    value: str
    by: str
    reason: str | None


class CacheStored(BaseModel):
    """The store of answers found by likeness; numbers are None while it is away. `bytes` is of all tenants."""

    up: bool
    entries: int | None
    partitions: int | None
    bytes: int | None


class CacheShown(BaseModel):
    """`generation`: the newest rule this worker knows. `sql_up`: whether it can read newer ones. `invalidations`: the
    newest fifty.
    """

    generation: int
    sql_up: bool
    store: CacheStored
    invalidations: list[InvalidationShown]


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


def routes(administration: Administration) -> FastAPI:
    """The application behind the guard."""
    app = FastAPI(
        title="Farthing admin",
        description="Keys, policy status, reports and health of a Farthing gateway.",
        openapi_url="/admin/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    _answer_errors(app)
    _add_routes(app, administration)
    return app


def _add_routes(app: FastAPI, administration: Administration) -> None:
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
        """spend, savings, budgets or cache, with the digits of `farthing report`."""
        if kind not in ("spend", "savings", "budgets", "cache"):
            raise NotFound("There are reports of spend, savings, budgets and cache.", param="kind")
        if kind == "budgets":
            for name in ("by", "since", "until"):
                if getattr(query, name) is not None:
                    raise InvalidRequest(
                        f"'{name}' has no meaning for budgets: the report shows each budget of this month. Leave "
                        "it out.",
                        param=name,
                    )
        usual = "team,app" if kind == "cache" else "team,model"
        by = [part.strip() for part in (query.by or usual).split(",") if part.strip()]
        text = administration.report(kind, by, query.since, query.until, query.format)
        media = "text/csv; charset=utf-8" if query.format == "csv" else "application/json"
        return Response(text, media_type=media)

    @app.get("/admin/cache", response_model=CacheShown)
    async def cache(query: Annotated[NoQuery, Query()]) -> Any:
        """What is stored, and what of it may no longer be served."""
        return await administration.cache()

    @app.post("/admin/cache/invalidations", status_code=201, response_model=InvalidationShown)
    def invalidate(wanted: NewInvalidation) -> Any:
        """Takes stored answers back. This worker holds to it at once, the others within 5 seconds."""
        return administration.invalidate(wanted.kind, wanted.value, wanted.reason)

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


def _answer_errors(app: FastAPI) -> None:
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
