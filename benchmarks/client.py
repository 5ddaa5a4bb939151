"""A small HTTP client over raw asyncio protocols: the load generator where wrk is missing, and a reader of streams.

    python -m benchmarks.client load|streams '{"url": ..., "key": ..., ...}'

It prints one line of JSON. It shares the machine with what it measures and takes more of it than wrk does: what is
faster than some ten thousand requests a second is measured as this client's own ceiling.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any
from urllib.parse import urlsplit

from benchmarks.prompts import prompt


class _Connection(asyncio.Protocol):
    """Sends one request after the other and counts the answers; `more` gives the next request or None."""

    def __init__(self, more: Any, answered: Any) -> None:
        self._more = more
        self._answered = answered
        self._buffer = b""
        self._sent_at = 0.0
        self._transport: Any = None
        self.ended = asyncio.get_running_loop().create_future()
        self.waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._next()

    def _next(self) -> None:
        request = self._more()
        self.waiting = request is not None
        if request is None:
            self._transport.close()
            return
        self._sent_at = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, blank, rest = self._buffer.partition(b"\r\n\r\n")
        if not blank:
            return
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if len(rest) < int(length or 0):
            return
        self._buffer = b""
        self._answered(int(head[9:12]), time.perf_counter() - self._sent_at)
        self._next()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


def _request(address: Any, key: str, body: dict[str, Any]) -> bytes:
    text = json.dumps(body).encode()
    return (
        f"POST {address.path} HTTP/1.1\r\nHost: {address.netloc}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    ).encode() + text


async def load(given: dict[str, Any]) -> dict[str, Any]:
    """Closed loop on `connections` connections for `seconds`; the fields of `load.Load`."""
    address = urlsplit(given["url"])
    templates = tuple(given["templates"])
    number, sent = given["first"], 0
    latencies: list[float] = []
    bad = 0
    started = time.perf_counter()
    end = started + given["seconds"]

    def more() -> bytes | None:
        nonlocal number, sent
        if time.perf_counter() >= end:
            return None
        body = {
            "model": given["model"],
            "messages": [{"role": "user", "content": prompt(templates, number)}],
            "temperature": 0.2,
            "max_tokens": 256,
        }
        number, sent = number + 1, sent + 1
        return _request(address, given["key"], body)

    def answered(status: int, seconds: float) -> None:
        nonlocal bad
        latencies.append(seconds)
        bad += status != 200

    loop = asyncio.get_running_loop()
    made = [
        await loop.create_connection(lambda: _Connection(more, answered), address.hostname, address.port)
        for _ in range(given["connections"])
    ]
    await asyncio.gather(*(protocol.ended for _, protocol in made))
    seconds = time.perf_counter() - started
    latencies.sort()
    return {
        "completed": len(latencies),
        "sent": sent,
        "seconds": seconds,
        "p50_us": 1e6 * latencies[len(latencies) // 2],
        "p99_us": 1e6 * latencies[len(latencies) * 99 // 100],
        "non_2xx": bad,
        "broken": sum(protocol.waiting for _, protocol in made),
    }


class _Stream(asyncio.Protocol):
    def __init__(self, request: bytes) -> None:
        self._request = request
        self.frames = 0
        self.reads = 0
        self._tail = b""
        self.done = False
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.reads += 1
        self.frames += data.count(b"data: {")
        self._tail = (self._tail + data)[-64:]
        if b"data: [DONE]" in self._tail:
            self.done = True
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def streams(given: dict[str, Any]) -> dict[str, Any]:
    """`count` streams at once, each to its end: chunks that arrived, and how many streams ended with [DONE]."""
    address = urlsplit(given["url"])
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    made = []
    for index in range(given["count"]):
        body = {
            "model": given["model"],
            "messages": [{"role": "user", "content": f"{given['prompt']} {index}"}],
            "max_tokens": given["tokens"],
            "stream": True,
        }
        request = _request(address, given["key"], body)
        made.append(
            await loop.create_connection(
                lambda request=request: _Stream(request),  # type: ignore[misc]
                address.hostname,
                address.port,
            )
        )
    await asyncio.gather(*(protocol.ended for _, protocol in made))
    return {
        "chunks": sum(protocol.frames for _, protocol in made),
        "reads": sum(protocol.reads for _, protocol in made),
        "complete": sum(protocol.done for _, protocol in made),
        "seconds": time.perf_counter() - started,
    }


if __name__ == "__main__":
    import uvloop

    work = {"load": load, "streams": streams}[sys.argv[1]]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(work(json.loads(sys.argv[2])))))
