"""Every way a request can be refused or fail, and what the caller is told.

One tree, mapped to HTTP in one place (`router/api/errors.py`). `code` is stable and machine-readable,
`message` names the field and the remedy and never holds a secret or a caller's text.
"""

from __future__ import annotations


class FarthingError(Exception):
    """Base of everything Farthing raises on purpose."""


class ConfigurationError(FarthingError):
    """The gateway cannot start or reload truthfully with this configuration."""


class UnavailableError(FarthingError):
    """A store (Redis, SQL) did not answer in time; the caller decides what may go on without it."""


class CallLost(FarthingError):
    """A call that another request makes failed before its answer began, or broke off for those who share it."""


class RequestError(FarthingError):
    """A request that is answered with an error. `retry` is the value of `x-should-retry`; None: not sent.

    `retry_after` is seconds. `status` is the HTTP status, `type` and `param` go into OpenAI's error body.
    """

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"
    retry: bool | None = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code
        self.retry_after = retry_after


class InvalidRequest(RequestError):
    """400: the body or a header is not what the API takes."""


class NotAuthenticated(RequestError):
    """401: no key, or one that is unknown or revoked."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class NotAllowed(RequestError):
    """403: the policy leaves no model for this request; the message names what excluded each."""

    status = 403
    type = "permission_error"
    code = "model_not_allowed"


class ModelNotFound(RequestError):
    """404: a model name nobody configured, under `unknown_model: refuse`."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class NotFound(RequestError):
    """404: no such route."""

    status = 404
    code = "not_found"


class MethodNotAllowed(RequestError):
    """405: the route exists, the method does not."""

    status = 405
    code = "method_not_allowed"
    allowed: tuple[str, ...] = ()
    """The methods that do."""


class RequestTimedOut(RequestError):
    """408: the body did not come in time."""

    status = 408
    code = "request_timeout"


class RequestTooLarge(RequestError):
    """413: the body passes the size limit."""

    status = 413
    code = "request_too_large"


class ContextExceeded(RequestError):
    """400 with OpenAI's own code, so that clients that shorten their prompt on it do so."""

    code = "context_length_exceeded"


class BudgetExceeded(RequestError):
    """402: the budget is spent; a retry cannot help."""

    status = 402
    type = "insufficient_quota"
    code = "budget_exceeded"


class BudgetHeld(RequestError):
    """429: only money held by requests in flight is in the way; a retry can help."""

    status = 429
    type = "rate_limit_error"
    code = "budget_exceeded"
    retry = True


class RateLimited(RequestError):
    """429: too many requests of this caller."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retry = True


class Overloaded(RequestError):
    """503: the gateway sheds load, or has no store it needs to serve this caller truthfully."""

    status = 503
    type = "server_error"
    code = "overloaded"
    retry = True


class NothingMeets(RequestError):
    """503: no model meets the class and the policy says `when_nothing_meets: refuse`."""

    status = 503
    type = "server_error"
    code = "no_model_meets_policy"
    retry = True


class UpstreamFailed(RequestError):
    """502: every model of the plan failed. Never carries the provider's text.

    The gateway is the only layer that retries: a client that did so too would multiply its attempts.
    """

    status = 502
    type = "server_error"
    code = "upstream_failed"


class UpstreamTimedOut(UpstreamFailed):
    """504: the last model of the plan did not answer in time."""

    status = 504
    code = "upstream_timeout"


class UpstreamRejected(RequestError):
    """A provider refused the request itself (400, 404, 413, 422): passed on with the provider's own body."""

    def __init__(self, status: int, body: bytes, content_type: str) -> None:
        super().__init__("the provider rejected the request")
        self.status = status
        self.body = body
        self.content_type = content_type


class UpstreamError(FarthingError):
    """One attempt failed. `kind` is one of connect, timeout, status, quota, protocol, cut; or, where the provider did
    nothing wrong, budget or reader. `status` where there is one.

    `retry_after` is the provider's wish in seconds. `detail` is for logs: it holds no provider text.
    """

    def __init__(
        self, kind: str, detail: str, *, status: int | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.status = status
        self.retry_after = retry_after
