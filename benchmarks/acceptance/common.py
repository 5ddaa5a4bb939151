"""What the acceptance runs share: servers, load, and a verdict with figures."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.contracts.sql_databases import _server


@dataclass
class Verdict:
    """Collects checks; `finish` prints and gives the exit status."""

    name: str
    failed: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)

    def check(self, good: bool, text: str) -> None:
        self.say(f"{'ok  ' if good else 'FAIL'} {text}")
        if not good:
            self.failed.append(text)

    def finish(self) -> int:
        print(
            f"{self.name}: {'PASSED' if not self.failed else f'FAILED ({len(self.failed)} checks)'}",
            flush=True,
        )
        return 1 if self.failed else 0


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="farthing-acceptance-") as name:
        yield Path(name)


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """A fresh, empty database on a real server."""
    import secrets

    import psycopg

    name = f"acceptance_{secrets.token_hex(4)}"
    with psycopg.connect(_server().get_uri(), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE template0')
    yield _server().get_uri(database=name)


@dataclass
class Answer:
    """`status` 0: the connection broke. `left`: the client went before the end."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float
    left: bool = False

    @property
    def id(self) -> str:
        return self.headers.get("x-request-id", "")


async def ask(
    http: aiohttp.ClientSession,
    url: str,
    key: str,
    body: dict[str, Any],
    *,
    leave_after: int | None = None,
    headers: dict[str, str] | None = None,
) -> Answer:
    """One chat completion. `leave_after`: close the connection after that many bytes of the answer."""
    began = time.monotonic()
    try:
        async with http.post(
            f"{url}/v1/chat/completions",
            data=json.dumps(body),
            headers={"authorization": f"Bearer {key}", "content-type": "application/json", **(headers or {})},
        ) as response:
            found = {name.lower(): value for name, value in response.headers.items()}
            got = b""
            async for chunk in response.content.iter_any():
                got += chunk
                if leave_after is not None and len(got) >= leave_after:
                    response.close()
                    return Answer(response.status, found, got, time.monotonic() - began, left=True)
            return Answer(response.status, found, got, time.monotonic() - began)
    except (aiohttp.ClientError, ConnectionError, TimeoutError):
        return Answer(0, {}, b"", time.monotonic() - began)


def session(limit: int = 300) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=limit), timeout=aiohttp.ClientTimeout(total=120)
    )


def run(main: Any) -> None:
    sys.exit(asyncio.run(main()))
