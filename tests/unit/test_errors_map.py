"""Every refusal becomes an HTTP answer in OpenAI's shape, and every route has its cost class."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Iterator
from typing import Any

import pytest

from router.api import data_plane
from router.api.data_plane import ROUTES, DataPlane
from router.api.errors import error_answer, internal_error
from router.core import errors
from router.core.errors import RequestError, RequestTimedOut, UpstreamRejected


def tree(kind: type[RequestError]) -> Iterator[type[RequestError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from tree(child)


KINDS = sorted(
    {kind for kind in tree(RequestError) if kind is not UpstreamRejected}, key=lambda k: k.__name__
)
TYPES = {
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "insufficient_quota",
    "rate_limit_error",
    "server_error",
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_refusal_has_openais_shape(kind: type[RequestError]) -> None:
    answer = error_answer(kind('Say "why" and\nwhat to do.', param="field", retry_after=1.2))
    assert 400 <= answer.status <= 504
    assert answer.content_type == "application/json"
    body = json.loads(answer.body)
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] == 'Say "why" and\nwhat to do.'
    assert error["param"] == "field"
    assert error["type"] in TYPES
    assert error["code"]
    assert answer.headers["retry-after"] == "2"
    assert answer.headers["x-should-retry"] == ("true" if kind.retry else "false")
    assert not any("\n" in value or "\r" in value for value in answer.headers.values())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_refusal_a_retry_cannot_cure_says_so(kind: type[RequestError]) -> None:
    # 502 and 504 come after the gateway has retried: a client that did so too would multiply its attempts.
    cured_by_time = kind.status in (429, 503)
    assert kind.retry is cured_by_time


def test_the_same_code_means_the_same_status_but_for_budgets() -> None:
    seen: dict[str, set[int]] = {}
    for kind in KINDS:
        seen.setdefault(kind.code, set()).add(kind.status)
    assert {code for code, statuses in seen.items() if len(statuses) > 1} == {"budget_exceeded"}


def test_every_refusal_is_documented_and_lives_in_one_tree() -> None:
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        assert issubclass(kind, errors.FarthingError), name
        assert kind.__doc__, name


def test_a_providers_rejection_in_openais_shape_keeps_its_bytes() -> None:
    body = b'{"error": {"message":"no","type":"t","param":null,"code":null,"more":1}, "id":7}'
    answer = error_answer(UpstreamRejected(422, body, "application/json; charset=utf-8"))
    assert (answer.status, answer.body) == (422, body)
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        (b'{"error":{"message":"no","code":"too_much"}}', "no", "too_much"),
        (b'{"error":{"message":"no","code":7}}', "no", "provider_rejected"),
        (b'{"error":"model not found"}', "model not found", "provider_rejected"),
        (
            b'{"object":"error","message":"too long","type":"BadRequestError"}',
            "too long",
            "provider_rejected",
        ),
        (b'{"detail":"Not here"}', "Not here", "provider_rejected"),
        (
            b'{"detail":[{"loc":["n"],"msg":"a number"}]}',
            '[{"loc": ["n"], "msg": "a number"}]',
            "provider_rejected",
        ),
        (b"<html>Bad Request</html>", None, "provider_rejected"),
        (b"", None, "provider_rejected"),
        (b"[1]", None, "provider_rejected"),
        (b"[" * 100_000, None, "provider_rejected"),
    ],
)
def test_what_a_provider_says_otherwise_is_brought_into_openais_shape(
    body: bytes, message: str | None, code: str
) -> None:
    answer = error_answer(UpstreamRejected(400, body, "text/html; charset=\u4f60"))
    assert (answer.status, answer.content_type) == (400, "application/json")
    error = json.loads(answer.body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] == (message or "The provider refused the request and gave no reason.")
    assert error["code"] == code


def test_a_fault_of_ours_says_nothing_of_its_cause() -> None:
    answer = internal_error()
    assert answer.status == 500
    assert set(json.loads(answer.body)["error"]) == {"message", "type", "param", "code"}


# -- routes --


def data_plane_without_parts() -> DataPlane:
    parts: dict[str, Any] = {
        name: None
        for name, parameter in inspect.signature(DataPlane).parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    return DataPlane(**parts)


def test_every_route_has_a_handler_and_a_cost_class() -> None:
    plane = data_plane_without_parts()
    assert set(plane._handlers) == {route.path for route in ROUTES}
    assert all(route.cost in ("metered", "free") for route in ROUTES)
    assert {route.path for route in ROUTES if "POST" in route.methods} <= {
        "/feedback",  # keeps a score and asks no provider
        "/cache/feedback",
        *(route.path for route in ROUTES if route.cost == "metered"),
    }


def test_metered_routes_go_through_the_pipeline_and_free_ones_do_not() -> None:
    plane = data_plane_without_parts()
    for route in ROUTES:
        source = inspect.getsource(plane._handlers[route.path])
        assert ("_pipeline.answer" in source) == (route.cost == "metered"), route.path


def test_the_data_plane_calls_nobody_but_through_the_pipeline() -> None:
    source = inspect.getsource(data_plane)
    for word in ("aiohttp", "httpx", ".send(call", "Upstream"):
        assert word not in source


# -- bodies --


async def test_a_body_that_does_not_end_is_not_waited_for() -> None:
    bodies = data_plane._Bodies(0.08)
    pieces = 0

    async def dribble() -> dict[str, Any]:
        nonlocal pieces
        pieces += 1
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b" ", "more_body": True}

    with pytest.raises(RequestTimedOut) as caught:
        await bodies.read({}, dribble, 10_000)
    assert pieces > 1
    assert error_answer(caught.value).headers["connection"] == "close"
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0.05)
    assert (bodies._since, bodies._late, bodies._timer) == ({}, set(), None)


async def test_a_body_in_time_is_read_and_a_caller_that_leaves_is_no_late_one() -> None:
    bodies = data_plane._Bodies(0.08)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.03)
        return {"type": "http.request", "body": b"{}", "more_body": False}

    for _ in range(4):
        assert await bodies.read({}, receive, 10) == b"{}"
    reading = asyncio.create_task(bodies.read({}, receive, 10))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
