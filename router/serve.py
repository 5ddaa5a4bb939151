"""Runs gateways: one in this process, or several worker processes behind the same listening sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from http import HTTPStatus
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from router.api.errors import error_body
from router.core.errors import ConfigurationError
from router.settings import MIN_SECRET, Settings, collect_metrics_in, read_settings, worker_environment

log = logging.getLogger("farthing")

BACKLOG = 2048
DRAIN_SECONDS = 30
RESTART_PAUSE = 1.0
MAX_HEAD = 64 * 1024
"""Bytes of a request's head."""
_CHUNKED = b"transfer-encoding: chunked\r\n\r\n"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigurationError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        reason = error.strerror if isinstance(error, OSError) else "a port is a number from 0 to 65535"
        raise ConfigurationError(
            f"--port: {host}:{port} cannot be listened on ({reason}). Name another port, or free it."
        ) from None
    sock.listen(BACKLOG)
    sock.set_inheritable(True)
    return sock


def serve(settings: Settings, announce: Callable[[str], None]) -> int:
    """Serves until SIGTERM or SIGINT. `announce` is told where. The exit status of the process."""
    if settings.admin_port is not None and not settings.admin_key:
        raise ConfigurationError(
            "--admin-port needs FARTHING_ADMIN_KEY: the admin plane is never open to everyone."
        )
    if settings.admin_port is not None and len(settings.admin_key or "") < MIN_SECRET:
        raise ConfigurationError(
            f"FARTHING_ADMIN_KEY is shorter than {MIN_SECRET} characters and could be guessed. Use the output of "
            "'openssl rand -hex 32'."
        )
    data = listen(settings.host, settings.port)
    admin = listen(settings.host, settings.admin_port) if settings.admin_port is not None else None

    def started() -> None:
        announce(f"Farthing serves http://{settings.host}:{data.getsockname()[1]}/v1")
        if admin is not None:
            announce(f"Admin plane: http://{settings.host}:{admin.getsockname()[1]}/admin")

    if settings.workers == 1:
        _run(run_worker(settings, data, admin, started=started))
        return 0
    started()  # the sockets listen; the workers answer as they come up
    return _Supervisor(settings, data, admin).run()


def _run(worker: Coroutine[Any, Any, None]) -> None:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(worker)


class _JoinedTransport:
    """Sends the head of an answer together with the first of its body: one system call less, one packet less.

    `old_client`: it speaks HTTP/1.0, which knows no chunks; the end of an answer of unknown length is that of the
    connection.
    """

    __slots__ = ("_head", "_loop", "_transport", "_unchunks", "old_client")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._head = b""
        self._unchunks = False
        self.old_client = False

    def write(self, data: bytes) -> None:
        if self._unchunks:
            size, _, rest = data.partition(b"\r\n")
            data = rest[: int(size or b"0", 16)]
        elif self.old_client and data.endswith(_CHUNKED):
            data, self._unchunks = data.removesuffix(_CHUNKED) + b"\r\n", True
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(b"HTTP/1.1 ") and data.endswith(b"\r\n\r\n"):
            self._head = data
            self._loop.call_soon(self._flush)
            return
        self._transport.write(data)

    def _flush(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Protocol(HttpToolsProtocol):
    """httptools bounds neither heads nor trailers nor what chunks say beside their bytes: all that is no body may be
    MAX_HEAD and as much as the body.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._joined = _JoinedTransport(transport)
        self._spare = MAX_HEAD
        super().connection_made(cast("asyncio.Transport", self._joined))

    def on_message_begin(self) -> None:
        self._spare = MAX_HEAD
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._joined.old_client = self.scope["http_version"] == "1.0"

    def on_body(self, body: bytes) -> None:
        self._spare += 2 * len(body)
        super().on_body(body)

    def data_received(self, data: bytes) -> None:
        self._spare -= len(data)
        super().data_received(data)
        if self._spare < 0 and not self.transport.is_closing():
            if "method" in self.scope:  # the head is through: an answer may be on its way
                self.transport.close()
            else:
                self._refuse(
                    431, f"The request's head is larger than {MAX_HEAD // 1024} KiB. Send fewer headers."
                )

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "This is not a valid HTTP request.")

    def _refuse(self, status: int, message: str) -> None:
        body = error_body(message, "invalid_request_error", "invalid_request", None)
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()


class _Server(uvicorn.Server):
    """Signals are the worker's to handle: it may run two servers in one loop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _server(app: Any) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            loop="none",
            http=_Protocol,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            # A caller's X-Forwarded-For must never pass for the peer's own address.
            proxy_headers=False,
            date_header=True,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
    )


async def run_worker(
    settings: Settings,
    data: socket.socket,
    admin: socket.socket | None,
    worker: str = "worker",
    parent: int | None = None,
    started: Callable[[], None] = lambda: None,
) -> None:
    """One gateway on these sockets, until SIGTERM or SIGINT; SIGHUP reloads the configuration.

    `started` is called once it can answer. `parent` is the reading end of a pipe that the supervisor holds open: its
    end is the supervisor's.
    """
    from router.app import Gateway

    gateway = Gateway(settings, worker)
    await gateway.start()
    _settle_down()
    started()
    servers = [_server(gateway.data_plane)]
    sockets = [data]
    if admin is not None:
        servers.append(_server(gateway.admin_plane))
        sockets.append(admin)
    loop = asyncio.get_running_loop()

    def end() -> None:
        gateway.drain()
        for server in servers:
            if server.should_exit:
                server.force_exit = True
            server.should_exit = True

    def orphaned(descriptor: int) -> None:
        # Nobody would replace or end this worker any more, and it holds the port.
        loop.remove_reader(descriptor)
        log.error("the supervisor is gone, this worker ends")
        end()

    if parent is not None:
        loop.add_reader(parent, orphaned, parent)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    loop.add_signal_handler(signal.SIGHUP, gateway.watch.reload)
    try:
        await asyncio.gather(
            *(server.serve(sockets=[sock]) for server, sock in zip(servers, sockets, strict=True))
        )
    finally:
        await gateway.stop()


def _settle_down() -> None:
    """Tunes the interpreter for serving: what is loaded by now stays, and the event loop comes first."""
    gc.collect()
    gc.freeze()
    # Requests leave no cycles behind; with the default of 700 the collector walks young objects all the time.
    gc.set_threshold(20_000, 20, 50)
    # The event loop gives the interpreter away at every system call: the ledger writer must give it back soon.
    sys.setswitchinterval(0.0005)


class _Supervisor:
    """Starts worker processes, replaces one that dies, hands signals on."""

    def __init__(self, settings: Settings, data: socket.socket, admin: socket.socket | None) -> None:
        self._settings = settings
        self._data = data
        self._admin = admin
        self._workers: dict[int, tuple[subprocess.Popen[bytes], float]] = {}
        self._ending = False

    def run(self) -> int:
        shutil.rmtree(self._settings.metrics, ignore_errors=True)
        self._settings.metrics.mkdir(parents=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._end())
        signal.signal(signal.SIGHUP, lambda *_: self._tell(signal.SIGHUP))
        for index in range(self._settings.workers):
            self._start(index)
        status = 0
        while self._workers:
            for index, (process, started) in list(self._workers.items()):
                code = process.poll()
                if code is None:
                    continue
                del self._workers[index]
                if self._ending:
                    status = status or max(code, 0)
                elif (
                    code == 2
                ):  # it says itself what is wrong with its configuration; the others would say the same
                    status = code
                    self._end()
                else:
                    log.error("worker %d ended with status %d and is replaced", index, code)
                    if time.monotonic() - started < RESTART_PAUSE:
                        time.sleep(RESTART_PAUSE)
                    self._start(index)
            time.sleep(0.1)
        return status

    def _start(self, index: int) -> None:
        settings = self._settings
        # One worker serves the admin plane: it needs no more, and its state is in SQL and files.
        admin = self._admin if index == 0 else None
        sockets = [self._data, *([admin] if admin is not None else [])]
        arguments = {
            "index": index,
            "sockets": [sock.fileno() for sock in sockets],
            "host": settings.host,
            "port": settings.port,
            "workers": settings.workers,
            "open_team": settings.open_team,
        }
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", "router.serve", json.dumps(arguments)],
            stdin=subprocess.PIPE,  # never written to: it ends with this process
            pass_fds=[sock.fileno() for sock in sockets],
            env=worker_environment(settings),
        )
        self._workers[index] = (process, time.monotonic())

    def _tell(self, number: int) -> None:
        for process, _ in self._workers.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def _end(self) -> None:
        self._ending = True
        self._tell(signal.SIGTERM)


def _worker_main(text: str) -> int:
    arguments = json.loads(text)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings = read_settings(
        host=arguments["host"],
        port=arguments["port"],
        workers=arguments["workers"],
        open_team=arguments["open_team"],
    )
    collect_metrics_in(settings.metrics)
    sockets = [socket.socket(fileno=number) for number in arguments["sockets"]]
    admin = sockets[1] if len(sockets) > 1 else None
    try:
        _run(
            run_worker(settings, sockets[0], admin, f"worker-{arguments['index']}", parent=sys.stdin.fileno())
        )
    except ConfigurationError as error:
        print(f"farthing: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_worker_main(sys.argv[1]))
