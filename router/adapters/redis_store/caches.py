"""Cached answers in Redis: one GET for a look-up, writes in the background.

While Redis is away, and only then, answers come from what this worker put or read. Each value carries the time it
ends, for Redis does not say it with the value.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections import OrderedDict
from collections.abc import Callable

from router.adapters.redis_store.connection import RedisConnection
from router.core.errors import UnavailableError

_PREFIX = "farthing:cache:"
_MAX_PENDING_BYTES = 16 * 1024 * 1024
# The version of the frame, and when the value ends: seconds since the epoch.
_FRAME = struct.Struct("<Bd")
_VERSION = 1


class RedisCacheStore:
    """See the port `CacheStore`. A value above `max_value_bytes` is not kept in Redis, nor is any put while
    `max_pending` others wait or Redis is away; the last `memory_bytes` stay with this worker. `now`: seconds since
    the epoch. The connection is shared: `close` leaves it open.
    """

    def __init__(
        self,
        connection: RedisConnection,
        max_value_bytes: int = 1024 * 1024,
        max_pending: int = 256,
        memory_bytes: int = 16 * 1024 * 1024,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._connection = connection
        self._max_value_bytes = max_value_bytes
        self._max_pending = max_pending
        self._now = now
        self._pending: OrderedDict[str, tuple[bytes, int]] = OrderedDict()
        self._pending_bytes = 0
        self._remembered = _Remembered(memory_bytes)
        self._deletions = 0
        self._writer: asyncio.Task[None] | None = None
        self.dropped = 0

    async def get(self, key: str) -> bytes | None:
        if not self._connection.up:
            return self._remembered.get(key, self._now())
        if (waiting := self._pending.get(key)) is not None:
            return waiting[0][_FRAME.size :]
        deletions = self._deletions
        try:
            framed = await self._connection.execute("GET", _PREFIX + key)
        except UnavailableError:
            return self._remembered.get(key, self._now())
        if not isinstance(framed, bytes) or len(framed) < _FRAME.size or framed[0] != _VERSION:
            self._remembered.drop(key)
            return None
        if deletions == self._deletions:
            # Else what was read may have been deleted meanwhile.
            self._remembered.keep(key, framed)
        return framed[_FRAME.size :]

    def put(self, key: str, value: bytes, ttl: float) -> None:
        milliseconds = int(ttl * 1000)
        if milliseconds <= 0 or len(value) > self._max_value_bytes:
            return
        self._forget(key)
        framed = _FRAME.pack(_VERSION, self._now() + ttl) + value
        self._remembered.keep(key, framed)
        full = (
            len(self._pending) >= self._max_pending or self._pending_bytes + len(framed) > _MAX_PENDING_BYTES
        )
        if full or not self._connection.up:
            self.dropped += 1
            return
        self._pending[key] = (framed, milliseconds)
        self._pending_bytes += len(framed)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.get_running_loop().create_task(self._write())

    async def delete(self, key: str) -> None:
        """Raises UnavailableError when Redis is away: that an entry stayed is not to be hidden. This worker's memory
        of it is gone all the same.
        """
        self._forget(key)
        self._remembered.drop(key)
        self._deletions += 1
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


class _Remembered:
    """Framed values, the least recently used dropped first beyond `max_bytes`."""

    _OVERHEAD = 250

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0

    def keep(self, key: str, framed: bytes) -> None:
        self.drop(key)
        self._kept[key] = framed
        self._bytes += len(framed) + self._OVERHEAD
        while self._bytes > self._max_bytes:
            self.drop(next(iter(self._kept)))

    def get(self, key: str, now: float) -> bytes | None:
        framed = self._kept.get(key)
        if framed is None:
            return None
        if _FRAME.unpack_from(framed)[1] <= now:
            self.drop(key)
            return None
        self._kept.move_to_end(key)
        return framed[_FRAME.size :]

    def drop(self, key: str) -> None:
        if (framed := self._kept.pop(key, None)) is not None:
            self._bytes -= len(framed) + self._OVERHEAD
