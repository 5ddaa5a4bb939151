"""CPU per request of two HTTP clients that could carry the OpenAI wire: aiohttp and pyreqwest.

    python -m benchmarks.measurements.http_clients [--requests 3000] [--streams 300]

Starts a simulated provider in a process of its own and measures this process (all its threads): short JSON
answers, then streams of about 200 chunks, 16 at a time. pyreqwest is no dependency: `pip install pyreqwest`
into the environment to have it measured. Result and choice: docs/decisions/0050.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from multiprocessing.connection import Connection
from typing import Any

import uvloop

from router.simulate import SimulatedModel, application, serve

Relay = Callable[[bytes], Awaitable[tuple[int, int]]]
HEADERS = {
    "content-type": "application/json",
    "accept-encoding": "identity",
    "authorization": "Bearer sk-simulated",
}


def provider(link: Connection) -> None:
    async def run() -> None:
        running = await serve(
            application([SimulatedModel("m", typical=40), SimulatedModel("s", typical=200)])
        )
        link.send(running.url)
        await running.wait()

    uvloop.run(run())


async def with_aiohttp(url: str) -> AsyncIterator[Relay]:
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session:

        async def relay(body: bytes) -> tuple[int, int]:
            async with session.post(url, data=body, headers=HEADERS, allow_redirects=False) as response:
                chunks = size = 0
                while chunk := await response.content.readany():
                    chunks, size = chunks + 1, size + len(chunk)
            return chunks, size

        yield relay


async def with_pyreqwest(url: str) -> AsyncIterator[Relay]:
    from pyreqwest.client import ClientBuilder  # type: ignore[import-not-found, unused-ignore]

    async with ClientBuilder().build() as client:

        async def relay(body: bytes) -> tuple[int, int]:
            async with client.post(url).headers(HEADERS).body_bytes(body).build_streamed() as response:
                chunks = size = 0
                reader = response.body_reader
                while (chunk := await reader.read_chunk()) is not None:
                    chunks, size = chunks + 1, size + len(bytes(chunk))
            return chunks, size

        yield relay


async def relay_all(relay: Relay, bodies: list[bytes]) -> int:
    return sum([(await relay(body))[0] for body in bodies])


async def measure(name: str, clients: AsyncIterator[Relay], requests: int, streams: int) -> None:
    async for relay in clients:
        for kind, count in (("warm-up", 100), ("json", requests), ("stream", streams)):

            def body(number: int, stream: bool = kind == "stream") -> bytes:
                said: list[Any] = [{"role": "user", "content": f"Question {number} of the day"}]
                return json.dumps(
                    {"model": "s" if stream else "m", "stream": stream, "messages": said}
                ).encode()

            shares = [[body(number) for number in range(worker, count, 16)] for worker in range(16)]
            cpu, wall = time.process_time(), time.perf_counter()
            chunks = sum(await asyncio.gather(*(relay_all(relay, share) for share in shares)))
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if kind != "warm-up":
                print(
                    f"{name:10} {kind:7} {count / wall:7.0f}/s  {cpu / count * 1e6:7.0f} us CPU each"
                    f"  {cpu / chunks * 1e6:6.1f} us CPU per read ({chunks / count:.1f} reads each)"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--streams", type=int, default=300)
    arguments = parser.parse_args()
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=provider, args=(there,), daemon=True)
    process.start()
    url = here.recv() + "/chat/completions"
    try:
        for name, clients in (("aiohttp", with_aiohttp), ("pyreqwest", with_pyreqwest)):
            try:
                uvloop.run(measure(name, clients(url), arguments.requests, arguments.streams))
            except ImportError:
                print(f"{name:10} not installed")
    finally:
        process.terminate()
        process.join()


if __name__ == "__main__":
    main()
