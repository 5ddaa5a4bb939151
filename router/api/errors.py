"""The one place where an error becomes an HTTP answer, in OpenAI's shape with all four keys."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from router.core.errors import MethodNotAllowed, RequestError, UpstreamRejected

_KEYS = frozenset({"message", "type", "param", "code"})


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    status: int
    content_type: str
    headers: dict[str, str]
    body: bytes


def error_answer(error: RequestError) -> ErrorAnswer:
    """Status, headers and body of a refusal or failure. A provider's rejection keeps the provider's words."""
    headers: dict[str, str] = {}
    if error.retry is not None:
        headers["x-should-retry"] = "true" if error.retry else "false"
    if error.retry_after is not None:
        headers["retry-after"] = str(max(0, math.ceil(error.retry_after)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status == 408:
        headers["connection"] = "close"  # what may still come of the body is not waited for
    if isinstance(error, MethodNotAllowed):
        headers["allow"] = ", ".join(error.allowed)
    if isinstance(error, UpstreamRejected):
        return _rejected(error, headers)
    return ErrorAnswer(
        error.status,
        "application/json",
        headers,
        error_body(error.message, error.type, error.code, error.param),
    )


def _rejected(error: UpstreamRejected, headers: dict[str, str]) -> ErrorAnswer:
    """The provider's own bytes where they are OpenAI's shape; else what they say, brought into it."""
    try:
        said = json.loads(error.body)
    except (ValueError, RecursionError):
        said = None
    told = said.get("error", said) if isinstance(said, dict) else None
    if isinstance(told, dict) and told is not said and told.keys() >= _KEYS:
        return ErrorAnswer(error.status, error.content_type, headers, error.body)
    fields = {key: told.get(key) for key in _KEYS} if isinstance(told, dict) else {}
    message = fields.get("message") or (said.get("detail") if isinstance(said, dict) else None) or told
    if not isinstance(message, str):
        # A validator's list of faults (FastAPI, vLLM) reads as it is; a page or an empty body says nothing.
        message = json.dumps(message) if message else "The provider refused the request and gave no reason."
    kind, code, param = (
        value if isinstance(value, str) else None for value in map(fields.get, ("type", "code", "param"))
    )
    body = error_body(message, kind or "invalid_request_error", code or "provider_rejected", param)
    return ErrorAnswer(error.status, "application/json", headers, body)


def internal_error() -> ErrorAnswer:
    """A fault of ours. It says nothing of its cause: that is in the log, under the request's id."""
    body = error_body("The gateway failed on this request.", "server_error", "internal_error", None)
    return ErrorAnswer(500, "application/json", {"x-should-retry": "true"}, body)


def error_body(message: str, type: str, code: str | None, param: str | None) -> bytes:
    error = {"message": message, "type": type, "param": param, "code": code}
    return json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", "replace")
