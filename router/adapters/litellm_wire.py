"""Every wire but OpenAI's, through litellm as a library: requests in OpenAI's form, answers as OpenAI-wire bytes.

litellm is imported at the first call that needs it: 4 to 5 s of CPU and 166 MB that other gateways never pay.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import math
import os
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from router.core.errors import UpstreamError
from router.core.openai_wire import DONE_FRAME, retry_after
from router.core.policy import ProviderSpec
from router.core.ports import UpstreamCall, UpstreamReply

# Without these litellm fetches prices, reads `.env` and looks up notices while it is imported.
IMPORT_GUARDS: Mapping[str, str] = {
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
    "LITELLM_LOCAL_BLOG_POSTS": "True",
    "LITELLM_LOCAL_POLICY_TEMPLATES": "True",
    "LITELLM_TELEMETRY": "False",
}

# What a caller may set. litellm takes addresses, keys, proxies and mock answers by keyword too, so nothing
# goes through that is not known to be harmless. `metadata` and `store` mean something to OpenAI alone.
_CHAT_FIELDS = frozenset(
    {
        "messages",
        "model",
        "frequency_penalty",
        "function_call",
        "functions",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "modalities",
        "n",
        "parallel_tool_calls",
        "prediction",
        "presence_penalty",
        "reasoning_effort",
        "response_format",
        "seed",
        "service_tier",
        "stop",
        "stream",
        "stream_options",
        "temperature",
        "thinking",
        "tool_choice",
        "tools",
        "top_k",
        "top_logprobs",
        "top_p",
        "user",
        "audio",
        "verbosity",
        "web_search_options",
    }
)
_EMBEDDING_FIELDS = frozenset({"model", "input", "dimensions", "encoding_format", "user"})
_NOT_FORWARDED = frozenset({"metadata", "store"})
_PLAIN_NAME = re.compile(r"\w{1,64}")

# For these litellm puts `stop` into every chunk and drops the provider's own mark.
_STOP_IN_EVERY_CHUNK = frozenset({"gemini", "vertex_ai", "vertex_ai_beta"})
_NATIVE_END = b'"finishReason"'

# Exceptions by name: their modules are loaded by litellm only.
_BROKEN = frozenset(
    {
        "ReadError",
        "WriteError",
        "RemoteProtocolError",
        "ClientPayloadError",
        "ServerDisconnectedError",
        "ConnectionResetError",
        "IncompleteRead",
    }
)
_NO_CONNECTION = frozenset(
    {
        "ConnectError",
        "ConnectTimeout",
        "ConnectionRefusedError",
        "ClientConnectorError",
        "ClientConnectorDNSError",
        "ClientConnectorCertificateError",
        "ConnectionTimeoutError",
        "gaierror",
        "EndpointConnectionError",
    }
)


class LitellmWire:
    """Port `Upstream` for providers whose wire is `litellm`.

    The body's `model` is litellm's name (`bedrock/...`, `anthropic/...`, `gemini/...`, `ollama/...`). `keys`
    maps a provider's name to its API key; a provider's `options` go to litellm as they are (`aws_region_name`,
    `api_version`, ...).

    A provider's error is raised as `UpstreamError("status", ...)` with its status and Retry-After, and never
    with its text. A stream that the provider did not end itself raises `cut`: litellm would invent a `stop`.
    """

    def __init__(self, keys: Mapping[str, str], *, trust_env: bool = False) -> None:
        self._keys = keys  # the mapping itself: a reload of the configuration changes it
        self._trust_env = trust_env
        self._litellm: Any = None
        self._loading = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()

    async def send(self, call: UpstreamCall) -> UpstreamReply:
        """Waits for the whole answer, or for a stream's headers. Raises UpstreamError, see the class."""
        arguments = _arguments(call)
        litellm = self._litellm or await self._load()
        exchange = _Exchange()
        _exchange.set(exchange)
        try:
            if call.path.rstrip("/").endswith("/embeddings"):
                answer = await litellm.aembedding(**arguments, **self._connection(call.provider))
            else:
                answer = await litellm.acompletion(
                    **arguments,
                    **self._connection(call.provider),
                    drop_params=False,
                    # Else `tools` load litellm's MCP gateway, which is not installed and calls others.
                    _skip_mcp_handler=True,
                )
        except Exception as error:
            raise _failure(error) from None
        if call.stream:
            return _Stream(answer, exchange, self._closing)
        return _Whole(_dump(_without_extras(answer.model_dump(exclude_none=True))))

    async def close(self) -> None:
        """Waits until the streams that were left are closed."""
        await asyncio.gather(*self._closing, return_exceptions=True)

    async def _load(self) -> Any:
        async with self._loading:
            if self._litellm is None:
                for name, value in IMPORT_GUARDS.items():
                    os.environ.setdefault(name, value)
                litellm: Any = await asyncio.to_thread(importlib.import_module, "litellm")
                # The gateway retries, counts and logs; litellm's own messages quote prompts and providers.
                litellm.num_retries = 0
                litellm.drop_params = False
                litellm.telemetry = False
                litellm.suppress_debug_info = True
                litellm.turn_off_message_logging = True
                litellm.disable_aiohttp_trust_env = not self._trust_env
                _guard_transports()
                for logger in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy"):
                    logging.getLogger(logger).setLevel(logging.CRITICAL)
                self._litellm = litellm
        return self._litellm

    def _connection(self, provider: ProviderSpec) -> dict[str, Any]:
        httpx = importlib.import_module("httpx")
        connection: dict[str, Any] = {
            **(provider.options or {}),
            # First token, idle and total time are dispatch's; this only ends what everybody has forgotten.
            "timeout": httpx.Timeout(provider.timeouts.total, connect=provider.timeouts.connect),
            "max_retries": 0,
            "num_retries": 0,
        }
        if key := self._keys.get(provider.name):
            connection["api_key"] = key
        if provider.base_url is not None:
            connection["api_base"] = provider.base_url
        return connection


@dataclass(slots=True)
class _Exchange:
    """What was seen on the network for the call in progress."""

    broken: Exception | None = None
    native_end: bool = False


# The object is shared by all tasks that litellm makes for one call.
_exchange: ContextVar[_Exchange | None] = ContextVar("exchange", default=None)


def _guard_transports() -> None:
    """Wraps the one place where litellm makes its async transports. No redirect is followed, nothing is
    compressed, and litellm's own retry after a broken connection (a second call that nobody would count) gets
    the first failure again.
    """
    httpx: Any = importlib.import_module("httpx")
    handler = importlib.import_module("litellm.llms.custom_httpx.http_handler").AsyncHTTPHandler
    create = handler.create_async_transport
    if hasattr(create, "guarded"):
        return

    class Watched(httpx.AsyncByteStream):  # type: ignore[misc]
        def __init__(self, inner: Any, exchange: _Exchange) -> None:
            self._inner = inner
            self._exchange = exchange

        async def __aiter__(self) -> AsyncIterator[bytes]:
            before = b""
            async for data in self._inner:
                if not self._exchange.native_end:
                    self._exchange.native_end = _NATIVE_END in before + data
                    before = data[-len(_NATIVE_END) :]
                yield data

        async def aclose(self) -> None:
            await self._inner.aclose()

    class Guarded(httpx.AsyncBaseTransport):  # type: ignore[misc]
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        async def handle_async_request(self, request: Any) -> Any:
            exchange = _exchange.get() or _Exchange()
            if exchange.broken is not None:
                raise exchange.broken
            request.headers["accept-encoding"] = "identity"
            try:
                response = await self._inner.handle_async_request(request)
            except (httpx.RemoteProtocolError, httpx.ConnectError) as error:
                exchange.broken = error
                raise
            if 300 <= response.status_code < 400:
                response.headers.pop("location", None)
            response.stream = Watched(response.stream, exchange)
            return response

        async def aclose(self) -> None:
            await self._inner.aclose()

    def guarded(*args: Any, **kwargs: Any) -> Any:
        inner = create(*args, **kwargs)
        return Guarded(inner if inner is not None else httpx.AsyncHTTPTransport(trust_env=False))

    guarded.guarded = True  # type: ignore[attr-defined]
    handler.create_async_transport = staticmethod(guarded)


class _Whole:
    """A JSON answer that is already here."""

    status = 200

    def __init__(self, body: bytes) -> None:
        self.headers: Mapping[str, str] = {"content-type": "application/json"}
        self._body = body

    async def chunks(self) -> AsyncIterator[bytes]:
        yield self._body

    def close(self) -> None:
        """Nothing is open."""


class _Stream:
    status = 200

    def __init__(self, stream: Any, exchange: _Exchange, closing: set[asyncio.Task[None]]) -> None:
        self.headers: Mapping[str, str] = {"content-type": "text/event-stream; charset=utf-8"}
        self._stream = stream
        self._exchange = exchange
        self._closing = closing
        self._closed = False

    async def chunks(self) -> AsyncIterator[bytes]:
        stream = self._stream
        started = False
        try:
            async for chunk in stream:
                payload = _without_extras(chunk.model_dump(exclude_none=True))
                usage = payload.pop("usage", None)
                choices = [_choice(choice) for choice in payload.get("choices", ())]
                if any(choice["finish_reason"] for choice in choices) and not self._ended():
                    break
                # litellm's own estimate is left out: the gateway's is flagged as one.
                if usage and _usage_was_sent(stream):
                    choices = [choice for choice in choices if choice["delta"] or choice["finish_reason"]]
                    payload["usage"] = usage
                elif not any(choice["delta"] or choice["finish_reason"] for choice in choices):
                    continue
                started = True
                yield b"data: " + _dump({**payload, "choices": choices}) + b"\n\n"
        except Exception as error:
            failure = _failure(error)
            if started and failure.kind != "timeout":
                failure = UpstreamError("cut", f"the stream broke off ({type(error).__name__})")
            raise failure from None
        if not self._ended():
            raise UpstreamError("cut", "the stream ended before the provider had finished")
        yield DONE_FRAME

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            # Closing takes an await, and whoever calls this may be cancelled already.
            task = asyncio.ensure_future(_close(self._stream))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _ended(self) -> bool:
        """Whether the provider itself gave a finish reason; litellm puts `stop` where none came."""
        stream = self._stream
        if getattr(stream, "received_finish_reason", None):
            return True
        said = bool(getattr(stream, "intermittent_finish_reason", None))
        if getattr(stream, "custom_llm_provider", None) in _STOP_IN_EVERY_CHUNK:
            return said and self._exchange.native_end
        return said


async def _close(stream: Any) -> None:
    await stream.aclose()


def _usage_was_sent(stream: Any) -> bool:
    return any(getattr(chunk, "usage", None) is not None for chunk in getattr(stream, "chunks", ()))


def _choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    return {"index": 0, "delta": {}, "finish_reason": None, **choice}


def _without_extras(value: Any) -> Any:
    """The answer without what litellm adds to OpenAI's form."""
    if isinstance(value, dict):
        return {
            k: _without_extras(v)
            for k, v in value.items()
            if k not in ("provider_specific_fields", "cost") and not k.startswith("vertex_ai_")
        }
    return [_without_extras(item) for item in value] if isinstance(value, list) else value


def _arguments(call: UpstreamCall) -> dict[str, Any]:
    try:
        body = json.loads(call.body)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise UpstreamError("protocol", "the request is not a JSON object")
    known = _EMBEDDING_FIELDS if call.path.rstrip("/").endswith("/embeddings") else _CHAT_FIELDS
    foreign = sorted(set(body) - known - _NOT_FORWARDED)
    if foreign:
        names = ", ".join(name for name in foreign if _PLAIN_NAME.fullmatch(name)) or "with odd names"
        raise UpstreamError("status", f"the litellm wire does not carry the fields {names}", status=400)
    arguments = {name: value for name, value in body.items() if name in known}
    for name, value in arguments.items():
        if not _writable(value):
            raise UpstreamError(
                "status",
                f"'{name}' holds a number beyond a float's range or half a surrogate pair, which the litellm wire "
                "does not carry",
                status=400,
            )
    return arguments


def _writable(value: object) -> bool:
    """Whether litellm can write it as JSON again; a number beyond a float's range is infinite by now."""
    if isinstance(value, dict):
        return all(_writable(name) and _writable(item) for name, item in value.items())
    if isinstance(value, list):
        return all(map(_writable, value))
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
    return not isinstance(value, float) or math.isfinite(value)


def _failure(error: Exception) -> UpstreamError:
    """Kind, status and wait of litellm's exception; the text stays behind, it quotes the provider."""
    chain = list(_causes(error))
    name = type(error).__name__
    names = {type(cause).__name__ for cause in chain}
    if names & _BROKEN:
        return UpstreamError("cut", f"the connection broke before the answer's end ({name})")
    if names & _NO_CONNECTION:
        return UpstreamError("connect", f"no connection to the provider ({name})")
    if "Timeout" in names or "APITimeoutError" in names:
        return UpstreamError("timeout", "the provider did not answer in time")
    answered = next(
        (c.response.status_code for c in chain if type(c).__name__.endswith("HTTPStatusError")),  # type: ignore[attr-defined]
        None,
    )
    status = answered or getattr(error, "status_code", None)
    # Without an answer behind it a 500 is litellm's own way to say that it could not read one.
    if isinstance(status, int) and (answered or 400 <= status < 500):
        return UpstreamError(
            "status",
            f"the provider answered {status} ({name})",
            status=status,
            retry_after=_retry_after(chain),
        )
    return UpstreamError("protocol", f"the provider's answer could not be read ({name})")


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        cause = waiting.pop()
        if cause is None or id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        original = getattr(cause, "original_exception", None)
        waiting += [
            cause.__cause__,
            cause.__context__,
            original if isinstance(original, BaseException) else None,
        ]


def _retry_after(chain: list[BaseException]) -> float | None:
    """Seconds, from the one place where litellm keeps the provider's headers."""
    for error in chain:
        headers = getattr(error, "litellm_response_headers", None)
        value = headers.get("retry-after") if headers is not None else None
        seconds = retry_after(value, datetime.now(UTC))
        if seconds is not None:
            return seconds
    return None


def _dump(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), default=str).encode()
