"""The one place where an error becomes an HTTP answer, in OpenAI's shape with all four keys."""

from __future__ import annotations

import json
from dataclasses import dataclass

from router.core.errors import RequestError, UpstreamRejected


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    status: int
    content_type: str
    headers: dict[str, str]
    body: bytes


def error_answer(error: RequestError) -> ErrorAnswer:
    """Status, headers and body of a refusal or failure. A provider's rejection keeps the provider's body."""
    headers: dict[str, str] = {}
    if error.retry is not None:
        headers["x-should-retry"] = "true" if error.retry else "false"
    if error.retry_after is not None:
        headers["retry-after"] = str(max(0, round(error.retry_after)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, UpstreamRejected):
        return ErrorAnswer(error.status, error.content_type, headers, error.body)
    return ErrorAnswer(
        error.status,
        "application/json",
        headers,
        error_body(error.message, error.type, error.code, error.param),
    )


def internal_error() -> ErrorAnswer:
    """A fault of ours. It says nothing of its cause: that is in the log, under the request's id."""
    body = error_body("The gateway failed on this request.", "server_error", "internal_error", None)
    return ErrorAnswer(500, "application/json", {"x-should-retry": "true"}, body)


def error_body(message: str, type: str, code: str | None, param: str | None) -> bytes:
    error = {"message": message, "type": type, "param": param, "code": code}
    return json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", "replace")
