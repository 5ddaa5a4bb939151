"""The OpenAI wire over aiohttp: bytes go up as they are and come down as they arrive.

Chosen by measurement, see docs/decisions/0050-http-client-of-the-openai-wire.md.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from functools import lru_cache

import aiohttp
from aiohttp import http_exceptions
from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import BytesPayload
from yarl import URL

from router.core.errors import ConfigurationError, UpstreamError
from router.core.ports import UpstreamCall, UpstreamReply

# Idle connections go before the 75 s after which common proxies close theirs.
KEEP_ALIVE_SECONDS = 60.0
MAX_HEADER_BYTES = 16_384
READ_BUFFER_BYTES = 65_536
CONNECTIONS_TRIED = 3
USER_AGENT = "farthing"


class OpenAIWire:
    """Port `Upstream`. One connection pool for all providers of this wire.

    `keys` maps a provider's name to its API key; a provider without one is called without Authorization.
    Nothing of the caller's request but the body is sent. No cookies, no redirects, no proxies or `.netrc`
    from the environment unless `trust_env`.

    Raises ConfigurationError for a key that cannot be a header.
    """

    def __init__(self, keys: Mapping[str, str], *, trust_env: bool = False) -> None:
        for name, key in keys.items():
            _bearer(name, key)
        # The mapping itself is kept: a reload of the configuration changes it.
        self._keys = keys
        self._trust_env = trust_env
        self._session: aiohttp.ClientSession | None = None

    async def send(self, call: UpstreamCall) -> UpstreamReply:
        """Waits for the headers only. Raises UpstreamError: `connect` where no connection came about, so that
        nothing was sent; `protocol` for a redirect, an answer that is not HTTP, or none at all.
        """
        provider = call.provider
        if provider.base_url is None:
            raise UpstreamError("protocol", f"provider {provider.name} has no base_url")
        headers = {
            "content-type": "application/json",
            "accept": "text/event-stream" if call.stream else "application/json",
            "accept-encoding": "identity",
            "user-agent": USER_AGENT,
            "x-request-id": call.request_id,
        }
        if key := self._keys.get(provider.name):
            headers["authorization"] = _bearer(provider.name, key)
        url = _url(provider.base_url, call.path)
        try:
            response = await self._post(url, headers, call.body, provider.timeouts.connect)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _failure(error) from None
        if not 200 <= response.status < 300 and response.status < 400:
            response.close()
            raise UpstreamError("protocol", "answered with a redirect", status=response.status)
        return AiohttpReply(response)

    async def close(self) -> None:
        """Closes every connection, also those in use."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> aiohttp.ClientSession:
        self._session = aiohttp.ClientSession(
            # The number of calls in flight is bounded where requests are admitted.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=self._trust_env,
            # For a provider that compresses against our wish: usage must be read from the answer.
            auto_decompress=True,
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            read_bufsize=READ_BUFFER_BYTES,
        )
        return self._session

    async def _post(
        self, url: URL, headers: Mapping[str, str], body: bytes, connect: float
    ) -> aiohttp.ClientResponse:
        session = self._session or self._open()
        for left in reversed(range(CONNECTIONS_TRIED)):
            payload = _Body(body)
            try:
                return await session.post(
                    url, data=payload, headers=headers, allow_redirects=False, timeout=_timeout(connect)
                )
            except aiohttp.ClientConnectorError:
                raise
            except (aiohttp.ClientConnectionError, ConnectionError):
                # The provider had closed the kept connection. While nothing was sent, another connection is
                # no second attempt; anything later is one, and is not made here.
                if payload.sent or not left:
                    raise
        raise AssertionError("unreachable")


class _Body(BytesPayload):
    """Knows whether its one write, which takes the request's head along, found the connection open."""

    sent = False

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        transport = getattr(writer, "transport", None)
        self.sent = transport is not None and not transport.is_closing()
        await super().write_with_length(writer, content_length)


class AiohttpReply:
    """Port `UpstreamReply`. A body that came compressed is handed on plain, its headers say so."""

    __slots__ = ("_response", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        headers = {name.lower(): value for name, value in response.headers.items()}
        if headers.pop("content-encoding", None) is not None:
            headers.pop("content-length", None)
        self.headers: Mapping[str, str] = headers

    async def chunks(self) -> AsyncIterator[bytes]:
        read = self._response.content.readany
        try:
            while chunk := await read():
                yield chunk
        except http_exceptions.ContentEncodingError:
            raise UpstreamError("protocol", "the answer's content-encoding is unknown or broken") from None
        except (aiohttp.ClientError, http_exceptions.HttpProcessingError, OSError):
            raise UpstreamError("cut", "the connection broke before the answer's end") from None
        except RuntimeError as error:
            if "closed" not in str(error):
                raise
            raise UpstreamError("cut", "the connection was closed on this side") from None

    def close(self) -> None:
        self._response.close()


def _bearer(provider: str, key: str) -> str:
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigurationError(
            f"the API key of provider {provider} is empty or holds a blank, a line break or a character "
            "outside ASCII: set its environment variable to the bare key"
        )
    return f"Bearer {key}"


@lru_cache(maxsize=256)
def _url(base_url: str, path: str) -> URL:
    return URL(base_url.rstrip("/") + "/" + path.lstrip("/"))


@lru_cache(maxsize=64)
def _timeout(connect: float) -> aiohttp.ClientTimeout:
    # Name resolution, TCP and TLS. All later timeouts belong to the dispatch stage.
    return aiohttp.ClientTimeout(total=None, connect=connect, sock_read=None)


def _failure(error: Exception) -> UpstreamError:
    """Says what happened in our own words: the client's messages can hold addresses or a provider's text."""
    match error:
        case aiohttp.ClientConnectorCertificateError() | ssl.SSLCertVerificationError():
            return UpstreamError("connect", "the TLS certificate was not accepted")
        case aiohttp.ClientConnectorDNSError():
            return UpstreamError("connect", "the host name was not found")
        case aiohttp.ConnectionTimeoutError():
            return UpstreamError("connect", "no connection within the connect timeout")
        case aiohttp.ClientConnectorError() | aiohttp.ClientProxyConnectionError():
            return UpstreamError("connect", "the connection was refused or failed")
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientOSError() | ConnectionError():
            return UpstreamError("protocol", "the connection broke before the answer's headers")
        case asyncio.TimeoutError():
            return UpstreamError("timeout", "no answer in time")
        case _:
            return UpstreamError("protocol", f"not a valid HTTP answer ({type(error).__name__})")
