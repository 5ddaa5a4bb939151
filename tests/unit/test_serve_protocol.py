"""What the server's protocol adds to uvicorn's: bounds on heads, errors in OpenAI's shape, answers without chunks."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import pytest
import uvicorn
from uvicorn.server import ServerState

from router.serve import MAX_HEAD, _Protocol

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.sent = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        self.sent += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, _: str) -> None:
        return None

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


async def _reads_all(_: Any, receive: Any, send: Any) -> None:
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message["body"])
        if not message["more_body"]:
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"%d" % size, "more_body": False})


def connected() -> tuple[_Protocol, Wire]:
    wire = Wire()
    config = uvicorn.Config(_reads_all, http=_Protocol, lifespan="off", log_config=None)
    protocol = _Protocol(config, ServerState(), {}, asyncio.get_running_loop())
    protocol.connection_made(cast(asyncio.Transport, wire))
    return protocol, wire


def error_of(sent: bytes) -> Any:
    return json.loads(sent.partition(b"\r\n\r\n")[2])["error"]


async def test_a_head_that_is_too_large_is_refused_with_the_remedy() -> None:
    protocol, wire = connected()
    protocol.data_received(HEAD)
    for _ in range(MAX_HEAD // 1024):
        assert not wire.closed
        protocol.data_received(b"x-piece: " + b"y" * 1013 + b"\r\n")
    protocol.data_received(b"x: y\r\n")
    assert wire.closed
    assert wire.sent.startswith(b"HTTP/1.1 431 ")
    assert set(error_of(wire.sent)) == {"message", "type", "param", "code"}
    assert "Send fewer headers" in error_of(wire.sent)["message"]


async def test_what_is_no_http_is_refused_in_openais_shape() -> None:
    protocol, wire = connected()
    protocol.data_received(b"what?\r\n\r\n")
    assert wire.closed
    assert wire.sent.startswith(b"HTTP/1.1 400 ")
    assert set(error_of(wire.sent)) == {"message", "type", "param", "code"}


async def test_trailers_end_the_connection_and_nothing_is_said() -> None:
    protocol, wire = connected()
    protocol.data_received(HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\n")
    for _ in range(MAX_HEAD // 1024 + 1):
        protocol.data_received(b"x-piece: " + b"y" * 1013 + b"\r\n")
    assert wire.closed
    assert wire.sent == b""


@pytest.mark.parametrize("size", [1, 7, 4096])
async def test_a_large_body_in_chunks_is_no_head(size: int) -> None:
    protocol, wire = connected()
    count = 4 * MAX_HEAD // size
    protocol.data_received(HEAD + b"transfer-encoding: chunked\r\n\r\n")
    chunk = b"%x\r\n" % size + b"z" * size + b"\r\n"
    # One byte to a chunk is five bytes beside it, which nobody sends in earnest.
    for _ in range(count if size > 1 else MAX_HEAD // 8):
        protocol.data_received(chunk)
    protocol.data_received(b"0\r\n\r\n")
    for _ in range(5):
        await asyncio.sleep(0)
    assert wire.sent.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(("version", "chunked"), [("1.0", False), ("1.1", True)])
async def test_an_old_client_gets_no_chunks(version: str, chunked: bool) -> None:
    protocol, wire = connected()
    protocol.data_received(f"POST / HTTP/{version}\r\ncontent-length: 3\r\n\r\nabc".encode())
    for _ in range(5):
        await asyncio.sleep(0)
    head, _, body = wire.sent.partition(b"\r\n\r\n")
    assert (b"transfer-encoding" in head) is chunked
    assert body == (b"1\r\n3\r\n0\r\n\r\n" if chunked else b"3")
    assert wire.closed is not chunked
