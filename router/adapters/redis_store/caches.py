"""Cached answers in Redis: one GET for a look-up, writes in the background."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from router.adapters.redis_store.connection import RedisConnection
from router.core.errors import UnavailableError

_PREFIX = "farthing:cache:"
_MAX_PENDING_BYTES = 16 * 1024 * 1024


class RedisCacheStore:
    """See the port `CacheStore`. A value above `max_value_bytes` is not kept, nor is any put while
    `max_pending` others wait or Redis is away. The connection is shared: `close` leaves it open.
    """

    def __init__(
        self, connection: RedisConnection, max_value_bytes: int = 1024 * 1024, max_pending: int = 256
    ) -> None:
        self._connection = connection
        self._max_value_bytes = max_value_bytes
        self._max_pending = max_pending
        self._pending: OrderedDict[str, tuple[bytes, int]] = OrderedDict()
        self._pending_bytes = 0
        self._writer: asyncio.Task[None] | None = None
        self.dropped = 0

    async def get(self, key: str) -> bytes | None:
        if not self._connection.up:
            return None
        if (waiting := self._pending.get(key)) is not None:
            return waiting[0]
        try:
            value = await self._connection.execute("GET", _PREFIX + key)
        except UnavailableError:
            return None
        return value if isinstance(value, bytes) else None

    def put(self, key: str, value: bytes, ttl: float) -> None:
        milliseconds = int(ttl * 1000)
        if milliseconds <= 0 or len(value) > self._max_value_bytes:
            return
        self._forget(key)
        full = (
            len(self._pending) >= self._max_pending or self._pending_bytes + len(value) > _MAX_PENDING_BYTES
        )
        if full or not self._connection.up:
            self.dropped += 1
            return
        self._pending[key] = (value, milliseconds)
        self._pending_bytes += len(value)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.get_running_loop().create_task(self._write())

    async def delete(self, key: str) -> None:
        """Raises UnavailableError when Redis is away: that an entry stayed is not to be hidden."""
        self._forget(key)
        await self._connection.execute("UNLINK", _PREFIX + key)

    async def close(self) -> None:
        """Writes what is waiting."""
        if self._writer is not None:
            await asyncio.wait([self._writer], timeout=1.0)
            self._writer.cancel()

    def _forget(self, key: str) -> None:
        if (waiting := self._pending.pop(key, None)) is not None:
            self._pending_bytes -= len(waiting[0])

    async def _write(self) -> None:
        while self._pending:
            key, entry = next(iter(self._pending.items()))
            try:
                await self._connection.execute("SET", _PREFIX + key, entry[0], "PX", entry[1])
                if key not in self._pending:
                    # Deleted while it was being written: the write may have landed after the deletion.
                    await self._connection.execute("UNLINK", _PREFIX + key)
            except UnavailableError:
                self.dropped += len(self._pending)
                self._pending.clear()
                self._pending_bytes = 0
                return
            if self._pending.get(key) is entry:
                self._forget(key)
