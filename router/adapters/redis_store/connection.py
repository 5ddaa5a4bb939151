"""One worker's access to Redis: every operation bounded in time, and a breaker that both stores share.

The first operation that fails opens the breaker. From then on operations are refused at once, and a
background task tries Redis: thrice in the first half second, then every second. When a trial succeeds, the
stores first deliver what they owe (`on_recovery`), then the breaker closes: no request ever pays for a trial.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from hashlib import sha1
from typing import Any

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from router.core.errors import ConfigurationError, UnavailableError

logger = logging.getLogger(__name__)

# Failed trials after which a silence is taken for an outage.
_CONFIRMED = 3
_CLUSTER_SCHEMES = {"redis+cluster://": "redis://", "rediss+cluster://": "rediss://"}


@dataclass(frozen=True, slots=True)
class RedisStatus:
    """`failures` counts how often the breaker opened; `last_error` is its last reason, without any secret."""

    up: bool
    failures: int
    last_error: str


class Script:
    """A Lua script, known to the server by its SHA-1 once it ran there."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha = sha1(source.encode(), usedforsecurity=False).hexdigest()


class _Deadline:
    """Ends a scope after `seconds` in which this process was running and could have read an answer.

    A busy event loop, or a process the machine does not let run, sees its timers late; the answer may then
    lie in the socket's buffer, or Redis may not have been let run either. So time is counted in ticks, a late
    tick counts once, and the loop goes round twice more before Redis is blamed.
    """

    _TICKS = 5
    _ROUNDS = 2

    def __init__(self, scope: asyncio.Timeout, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._scope = scope
        self._tick = seconds / self._TICKS
        self._left = self._TICKS + self._ROUNDS
        self._handle: asyncio.Handle = self._loop.call_later(self._tick, self._due)

    def _due(self) -> None:
        self._left -= 1
        if self._left > self._ROUNDS:
            self._handle = self._loop.call_later(self._tick, self._due)
        elif self._left:
            self._handle = self._loop.call_soon(self._due)
        else:
            self._scope.reschedule(self._loop.time())

    def cancel(self) -> None:
        self._handle.cancel()


class RedisConnection:
    """Operations with a time limit behind a breaker. `timeout` and `retry_every` are seconds."""

    def __init__(
        self,
        client: Redis | RedisCluster,
        *,
        timeout: float = 0.05,
        retry_every: float = 1.0,
        connections: int = 32,
    ) -> None:
        self._client = client
        self._timeout = timeout
        self._retry_every = retry_every
        # Waiting for a free connection is this worker's own load and does not count against Redis.
        self._free = asyncio.Semaphore(connections)
        self._up = True
        self._suspected = False
        self._failures = 0
        self._last_error = ""
        self._recovery: list[Callable[[], Awaitable[None]]] = []
        self._trials: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def up(self) -> bool:
        return self._up

    @property
    def suspected(self) -> bool:
        """Redis was silent just now, which may be a stall of this worker alone: trials have not confirmed it."""
        return self._suspected

    def status(self) -> RedisStatus:
        return RedisStatus(self._up, self._failures, self._last_error)

    def on_recovery(self, deliver: Callable[[], Awaitable[None]]) -> None:
        """`deliver` runs after each outage before the breaker closes; it uses `trial=True`."""
        self._recovery.append(deliver)

    async def ping(self) -> bool:
        """Whether Redis answers and can be written to, whatever the breaker says. Never raises."""
        try:
            # A write: a read-only replica and a server out of memory answer PING, and are of no use here.
            await self.execute("SET", "{farthing:budget}:trial", "1", "EX", "60", trial=True)
        except UnavailableError:
            return False
        return True

    async def execute(self, *words: str | bytes | int, trial: bool = False) -> Any:
        """The reply to one command. Raises UnavailableError when Redis is away, at once if that is known."""
        async with self._free:
            if not (self._up or trial) or self._closed:
                raise UnavailableError("Redis is away")
            try:
                return await self._bounded(words)
            except NoScriptError:
                raise
            except (RedisError, OSError, TimeoutError) as error:
                self._open(error)
                raise UnavailableError("Redis is away") from error

    async def listen(self, *words: str | bytes | int, seconds: float) -> Any:
        """The reply to a command that may wait at the server for `seconds`: beside the time limit, the breaker and
        the connections of requests. One at a time. Raises UnavailableError when Redis is away.
        """
        if not self._up or self._closed:
            raise UnavailableError("Redis is away")
        try:
            async with asyncio.timeout(seconds + 1):
                return await self._client.execute_command(*words)
        except (RedisError, OSError, TimeoutError) as error:
            raise UnavailableError("Redis is away") from error

    async def run(
        self,
        script: Script,
        keys: Sequence[str],
        arguments: Sequence[str | bytes | int],
        *,
        trial: bool = False,
    ) -> Any:
        """The reply of a script, sent by its hash where the server knows it."""
        tail = (len(keys), *keys, *arguments)
        try:
            return await self.execute("EVALSHA", script.sha, *tail, trial=trial)
        except NoScriptError:
            return await self.execute("EVAL", script.source, *tail, trial=trial)

    async def close(self) -> None:
        self._closed = True
        if self._trials is not None:
            self._trials.cancel()
        await self._client.aclose()

    async def _bounded(self, words: Sequence[str | bytes | int]) -> Any:
        async with asyncio.timeout(None) as scope:
            deadline = _Deadline(scope, self._timeout)
            try:
                return await self._client.execute_command(*words)
            finally:
                deadline.cancel()

    def _open(self, error: Exception) -> None:
        # redis-py names host and port in its errors and never the password.
        self._last_error = f"{type(error).__name__}: {error}"[:200]
        if self._up:
            self._up = False
            self._suspected = isinstance(error, TimeoutError)
            self._failures += 1
            logger.warning("redis is away, going on without it (%s)", self._last_error)
            self._trials = asyncio.get_running_loop().create_task(self._try_again())

    async def _try_again(self) -> None:
        failed = 0
        while not self._closed:
            # The first trials come early: a short stall is over by then.
            await asyncio.sleep(self._retry_every / (1 if failed >= _CONFIRMED else 10))
            try:
                if isinstance(self._client, Redis):
                    # Whatever still hangs in a connection of before must not be taken for a new answer.
                    await self._client.connection_pool.disconnect(inuse_connections=False)
                if not await self.ping():
                    failed += 1
                    self._suspected = self._suspected and failed < _CONFIRMED
                    continue
                for deliver in self._recovery:
                    await deliver()
            except UnavailableError:
                continue
            except Exception:
                logger.exception("trying Redis again failed")
                continue
            self._up, self._suspected = True, False
            logger.warning("redis is back")
            return


def connect(
    url: str, *, timeout: float = 0.05, retry_every: float = 1.0, connections: int = 32
) -> RedisConnection:
    """A connection, no socket open yet, for `redis://`, `rediss://` (TLS), `unix://`, `redis+cluster://` and
    `rediss+cluster://`.

    Raises ConfigurationError for a URL that is none of these; the message never holds the URL, which may
    carry a password.
    """
    try:
        for scheme, plain in _CLUSTER_SCHEMES.items():
            if url.startswith(scheme):
                cluster = RedisCluster.from_url(
                    plain + url.removeprefix(scheme),
                    max_connections=connections + 1,  # and one that listens
                    protocol=2,
                    driver_info=None,
                )
                return RedisConnection(
                    cluster, timeout=timeout, retry_every=retry_every, connections=connections
                )
        # No retry inside the client: a reservation sent twice would hold twice.
        pool = ConnectionPool.from_url(
            url,
            max_connections=connections + 1,  # and one that listens
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=None,
            socket_connect_timeout=None,
            driver_info=None,
        )
    except (ValueError, RedisError) as error:
        raise ConfigurationError(
            "FARTHING_REDIS_URL is not a Redis address; write redis://HOST:PORT/DB, rediss:// for TLS or "
            "redis+cluster:// for a cluster"
        ) from error
    return RedisConnection(
        Redis(connection_pool=pool), timeout=timeout, retry_every=retry_every, connections=connections
    )
