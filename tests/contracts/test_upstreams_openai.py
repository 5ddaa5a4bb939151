"""What the OpenAI wire promises beyond the port: connections, compression, redirects, keys."""

from __future__ import annotations

import asyncio
import gzip
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import client_reqrep as reqrep

from router.adapters.openai_wire import OpenAIWire
from router.core.errors import ConfigurationError, UpstreamError
from router.core.policy import ModelSpec, ProviderSpec, Timeouts
from router.core.ports import UpstreamCall, UpstreamReply

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[object, object, None]]
KEY = "sk-very-secret"
MODEL = ModelSpec("m", "p", "m", 8192, 1024, frozenset(), frozenset(), {}, None, None, None)


def call(url: str, body: bytes = b"{}", connect: float = 2.0) -> UpstreamCall:
    provider = ProviderSpec("p", "openai", url, "P_KEY", Timeouts(connect=connect))
    return UpstreamCall(provider, MODEL, "/chat/completions", body, False, "req-1")


@pytest.fixture
async def wire() -> AsyncIterator[OpenAIWire]:
    wire = OpenAIWire({"p": KEY})
    yield wire
    await wire.close()


@asynccontextmanager
async def server(handle: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handle(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    running = await asyncio.start_server(one, "127.0.0.1", 0, ssl=tls)
    port = running.sockets[0].getsockname()[1]
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}/v1"
    finally:
        running.close()


async def request(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    line, *lines = head.strip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (item.partition(": ") for item in lines)}
    return line, headers, await reader.readexactly(int(headers.get("content-length", "0")))


def answer(body: bytes = b"{}", status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


async def read(reply: UpstreamReply) -> bytes:
    return b"".join([chunk async for chunk in reply.chunks()])


async def test_what_is_sent(wire: OpenAIWire) -> None:
    seen = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await request(reader))
        writer.write(answer())

    async with server(handle) as url:
        assert await read(await wire.send(call(url + "/", b'{"a": "\xc3\xa4"}'))) == b"{}"
    line, headers, body = seen[0]
    assert line == "POST /v1/chat/completions HTTP/1.1"
    assert body == b'{"a": "\xc3\xa4"}'
    assert headers.pop("host").startswith("127.0.0.1:")
    assert headers == {
        "authorization": f"Bearer {KEY}",
        "accept": "application/json",
        "accept-encoding": "identity",
        "content-type": "application/json",
        "content-length": "11",
        "user-agent": "farthing",
        "x-request-id": "req-1",
    }


async def test_a_provider_without_a_key_gets_none() -> None:
    seen = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append((await request(reader))[1])
        writer.write(answer())

    wire = OpenAIWire({"other": KEY})
    async with server(handle) as url:
        await read(await wire.send(call(url)))
    await wire.close()
    assert "authorization" not in seen[0]


async def test_connections_are_kept_and_cookies_are_not(wire: OpenAIWire) -> None:
    connections, cookies = [], []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(1)
        while True:
            cookies.append((await request(reader))[1].get("cookie"))
            writer.write(answer(b"{}", "200 OK", "set-cookie: a=b; path=/"))

    async with server(handle) as url:
        for _ in range(3):
            await read(await wire.send(call(url)))
    assert len(connections) == 1
    assert cookies == [None, None, None]


async def test_a_kept_connection_that_the_provider_closed_is_replaced(wire: OpenAIWire) -> None:
    served = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(await request(reader))
        writer.write(answer())  # no `connection: close`: the client keeps what ends now

    async with server(handle) as url:
        for number in range(4):
            assert await read(await wire.send(call(url))) == b"{}"
            await asyncio.sleep(0.02 if number % 2 else 0)
    assert len(served) == 4


async def test_a_connection_lost_between_picking_and_writing_is_replaced(
    wire: OpenAIWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            served.append(await request(reader))
            writer.write(answer())

    async with server(handle) as url:
        await read(await wire.send(call(url)))
        send = reqrep.ClientRequest.send
        lost = []

        async def losing(self: reqrep.ClientRequest, conn: reqrep.Connection) -> reqrep.ClientResponse:
            if not lost and conn.transport is not None:
                lost.append(1)
                conn.transport.close()
            return await send(self, conn)

        monkeypatch.setattr(reqrep.ClientRequest, "send", losing)
        assert await read(await wire.send(call(url))) == b"{}"
    assert lost == [1]
    assert len(served) == 2


async def test_a_call_that_was_sent_is_not_sent_again(wire: OpenAIWire) -> None:
    served = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number in range(2):
            served.append(await request(reader))
            if number == 0:
                writer.write(answer())

    async with server(handle) as url:
        await read(await wire.send(call(url)))
        with pytest.raises(UpstreamError) as caught:
            await wire.send(call(url))
    assert caught.value.kind == "protocol"
    assert len(served) == 2


@pytest.mark.parametrize(
    "status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"]
)
async def test_redirects_are_errors(wire: OpenAIWire, status: str) -> None:
    served = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            served.append(await request(reader))
            writer.write(answer(b"", status, "location: /elsewhere"))

    async with server(handle) as url:
        with pytest.raises(UpstreamError) as caught:
            await wire.send(call(url))
    assert (caught.value.kind, caught.value.status) == ("protocol", int(status[:3]))
    assert len(served) == 1


async def test_a_compressed_answer_is_handed_on_plain(wire: OpenAIWire) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(answer(gzip.compress(b'{"a":1}'), "200 OK", "content-encoding: gzip", "x-a: b"))

    async with server(handle) as url:
        reply = await wire.send(call(url))
        assert await read(reply) == b'{"a":1}'
    assert reply.headers == {"x-a": "b"}


@pytest.mark.parametrize(("encoding", "body"), [("gzip", b"not gzip at all"), ("gzip", b"")])
async def test_a_broken_compression_is_no_answer(wire: OpenAIWire, encoding: str, body: bytes) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(answer(body, "200 OK", f"content-encoding: {encoding}"))

    got, raised = b"", []
    async with server(handle) as url:
        reply = await wire.send(call(url))
        try:
            got = await read(reply)
        except UpstreamError as error:
            raised.append(error.kind)
    assert got == b""
    assert raised in (["cut"], ["protocol"]) if body else raised == []


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx-long: " + b"a" * 40_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
    ],
)
async def test_what_is_not_http_is_a_protocol_error_without_its_text(wire: OpenAIWire, raw: bytes) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(raw)
        await writer.drain()

    async with server(handle) as url:
        with pytest.raises(UpstreamError) as caught:
            await wire.send(call(url))
    assert caught.value.kind == "protocol"
    assert "OpenSSH" not in str(caught.value)
    assert "aaaa" not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_the_connect_timeout_is_the_providers(wire: OpenAIWire) -> None:
    # A listener whose backlog is full answers no SYN.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(address)
            fillers.append(filler)
        started = asyncio.get_running_loop().time()
        with pytest.raises(UpstreamError) as caught:
            await wire.send(call(f"http://127.0.0.1:{address[1]}/v1", connect=0.2))
        for filler in fillers:
            filler.close()
    assert caught.value.kind == "connect"
    assert asyncio.get_running_loop().time() - started < 1.5


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
async def test_a_certificate_nobody_signed_is_refused(wire: OpenAIWire, tmp_path: Path) -> None:
    served = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(await request(reader))

    async with server(handle, self_signed(tmp_path)) as url:
        with pytest.raises(UpstreamError) as caught:
            await wire.send(call(url))
    assert caught.value.kind == "connect"
    assert "certificate" in caught.value.detail
    assert served == []


def self_signed(folder: Path) -> ssl.SSLContext:
    key, certificate = folder / "key.pem", folder / "cert.pem"
    options = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1"
    command = ["openssl", *options.split(), "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


async def test_proxies_of_the_environment_are_ignored(
    wire: OpenAIWire, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(answer())

    async with server(handle) as url:
        assert await read(await wire.send(call(url))) == b"{}"


@pytest.mark.parametrize("key", ["", "sk-1 sk-2", "sk\r\nx-evil: 1", "ключ"])
def test_a_key_that_is_no_header_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ConfigurationError, match="provider p") as caught:
        OpenAIWire({"p": key})
    assert not key or key not in str(caught.value)


async def test_closing_the_wire_breaks_off_what_is_open(wire: OpenAIWire) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
        await writer.drain()
        await reader.read()

    async with server(handle) as url:
        reply = await wire.send(call(url))
        await wire.close()
        with pytest.raises(UpstreamError) as caught:
            await read(reply)
    assert caught.value.kind == "cut"


async def test_a_provider_without_an_address_is_an_error(wire: OpenAIWire) -> None:
    provider = ProviderSpec("p", "openai", None, None, Timeouts())
    with pytest.raises(UpstreamError, match="provider p has no base_url"):
        await wire.send(UpstreamCall(provider, MODEL, "/chat/completions", b"{}", False, "req-1"))
