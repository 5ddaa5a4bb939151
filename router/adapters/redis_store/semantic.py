"""Semantic entries shared by all workers, in Redis: plain keys, small scripts, one stream of changes.

Bodies are the truth: a hit reads one from Redis, so what was removed is gone for every worker at once. Indexes learn
of changes from the stream, which each worker polls; it names entries and holds nothing of them, so that no prompt
outlives its entry. A worker that missed something (its last change is no longer in the stream: trimmed, emptied,
restored) tells its listeners to forget all.

**Redis away.** Bodies come from this worker's own memory of what it put or read, and what it would put goes
there alone. What is removed here meanwhile is removed in Redis before the breaker closes.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Literal

import msgspec

from router.adapters.memory_semantic import MAX_BODY_BYTES, weight
from router.adapters.redis_store.connection import RedisConnection, Script
from router.adapters.redis_store.semantic_scripts import LOCATE, PUT, REMOVE, SERVED
from router.core.cached import SemanticEntry, SemanticListener, StoreSize
from router.core.errors import UnavailableError
from router.core.ports import Clock

logger = logging.getLogger(__name__)

_PREFIX = "farthing:semantic:"
_CHANGES = _PREFIX + "changes"
_TENANTS = _PREFIX + "tenants"
_KEPT_CHANGES = 20_000
_READ_CHANGES = 500
_SCANNED = 200
# A reply of that size is read well within the time limit of an operation, and without holding up other requests.
_SCAN_BYTES = 256 * 1024
_SCANNED_AT_FIRST = 16
_BATCH = 8
_BATCH_BYTES = 1024 * 1024
_TAKEN_MS = 60_000
_LOCATED_FOR = 60.0
_MAX_PENDING_BYTES = 16 * 1024 * 1024
_MAX_REMEMBERED = 10_000
# Names are keyed hashes and request ids. A brace in a tenant's would move its keys to another node.
_NAME = re.compile(r"[0-9A-Za-z._:-]{1,128}")


# The tags are versions: another one's values do not decode.
class _Member(msgspec.Struct, array_like=True, tag=2, frozen=True, gc=False):
    """An entry as a partition's hash holds it."""

    entry: SemanticEntry


class _Body(msgspec.Struct, array_like=True, tag=1, frozen=True, gc=False):
    tenant: str
    partition: str
    id: str
    body: bytes


class _Change(msgspec.Struct, array_like=True, tag=1, frozen=True, gc=False):
    kind: Literal["added", "removed"]
    tenant: str
    partition: str
    id: str


_encode = msgspec.msgpack.Encoder().encode
_members = msgspec.msgpack.Decoder(_Member)
_bodies = msgspec.msgpack.Decoder(_Body)
_changes = msgspec.msgpack.Decoder(tuple[_Change, ...])


class _Load:
    """What was heard of a partition while it was being read."""

    def __init__(self) -> None:
        self.added: dict[str, SemanticEntry] = {}
        self.removed: set[str] = set()


class RedisSemanticStore:
    """See the port `SemanticStore`. The connection is shared: `close` leaves it open.

    A body above `max_body_bytes` is not kept, nor is any put while `max_pending` others wait. `memory_bytes` bounds
    what this worker remembers. `poll_every`: seconds.
    """

    def __init__(
        self,
        connection: RedisConnection,
        clock: Clock,
        max_body_bytes: int = MAX_BODY_BYTES,
        max_pending: int = 256,
        memory_bytes: int = 32 * 1024 * 1024,
        poll_every: float = 0.2,
    ) -> None:
        self._connection = connection
        self._clock = clock
        self._max_body_bytes = max_body_bytes
        self._max_pending = max_pending
        self._poll_every = poll_every
        self._worker = secrets.token_hex(8)
        self._listeners: list[SemanticListener] = []
        self._remembered = _Bodies(memory_bytes)
        self._pending: OrderedDict[str, tuple[SemanticEntry, bytes, int]] = OrderedDict()
        self._pending_bytes = 0
        self._hits: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._lost: OrderedDict[str, SemanticEntry] = OrderedDict()
        # (partition, id) removed here; the partition is empty where only the id was known.
        self._removed: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._owed: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._located: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()
        self._loads: dict[str, list[_Load]] = {}
        self._position: bytes | None = None
        self._beginning = asyncio.Lock()
        self._resets = 0
        self._writer: asyncio.Task[None] | None = None
        self._poller: asyncio.Task[None] | None = None
        self.dropped = 0
        """Puts that Redis did not take, evictions aside."""
        connection.on_recovery(self._recover)

    @property
    def up(self) -> bool:
        return self._connection.up

    def listen(self, listener: SemanticListener) -> None:
        self._listeners.append(listener)

    async def start(self) -> None:
        """Nothing to open: reading the changes begins with the first load or put."""

    async def load(self, partition: str) -> tuple[SemanticEntry, ...] | None:
        if not self._connection.up or not _NAME.fullmatch(partition):
            return None
        load = _Load()
        self._loads.setdefault(partition, []).append(load)
        try:
            # Changes are read from a point before the entries are: none falls between.
            await self._begin()
            resets = self._resets
            found: dict[str, SemanticEntry] = {}
            tenants = await self._connection.execute("SMEMBERS", _tenants_key(partition))
            for tenant in sorted(_text(name) for name in tenants):
                await self._scan(tenant, partition, found)
            if resets != self._resets:
                return None
        except UnavailableError:
            return None
        finally:
            self._loads[partition].remove(load)
            if not self._loads[partition]:
                del self._loads[partition]
        found |= load.added
        now = self._now()
        return tuple(
            entry
            for id, entry in found.items()
            if id not in load.removed and entry.expires_at > now and not self._is_removed(entry)
        )

    def put(self, entry: SemanticEntry, body: bytes, quota: int) -> None:
        names = (entry.tenant, entry.partition, entry.id)
        if (
            not all(_NAME.fullmatch(name) for name in names)
            or len(body) > self._max_body_bytes
            or weight(entry, body) > quota
            or entry.expires_at <= self._now()
            or entry.id in self._pending
            or self._is_removed(entry)
        ):
            self.dropped += 1
            return
        if not self._connection.up:
            self._remembered.keep(entry, body)
            self._keep_alone(entry)
            return
        if len(self._pending) >= self._max_pending or self._pending_bytes + len(body) > _MAX_PENDING_BYTES:
            self.dropped += 1
            return
        self._remembered.keep(entry, body)
        self._pending[entry.id] = (entry, body, quota)
        self._pending_bytes += len(body)
        self._work()

    async def body(self, entry: SemanticEntry) -> bytes | None:
        if self._is_removed(entry) or entry.expires_at <= self._now():
            return None
        waiting = self._pending.get(entry.id)
        if waiting is not None and _same(waiting[0], entry):
            return waiting[1]
        if not self._connection.up:
            return self._remembered.get(entry, self._now())
        try:
            value = await self._connection.execute("GET", _key(entry.tenant, "body:" + entry.id))
        except UnavailableError:
            value = None if self._is_removed(entry) else self._remembered.get(entry, self._now())
            return value if isinstance(value, bytes) else None
        body = _body_of(value, entry)
        if self._is_removed(entry):
            return None
        if body is None:
            self._forget(entry.partition, entry.id)
            self._lost[entry.id] = entry
            _bound(self._lost, self._max_pending)
            self._work()
            return None
        self._remembered.keep(entry, body)
        return body

    def served(self, entry: SemanticEntry) -> None:
        if self._connection.up:
            key = (entry.tenant, entry.id)
            self._hits[key] = self._hits.get(key, 0) + 1
            _bound(self._hits, _MAX_REMEMBERED)
            self._work()

    async def remove(self, partition: str, entry_id: str) -> None:
        await self._take_back(partition, entry_id)

    async def remove_entry(self, entry_id: str) -> None:
        await self._take_back("", entry_id)

    async def size(self) -> StoreSize:
        """Raises UnavailableError when Redis is away."""
        entries = partitions = 0
        sizes: dict[str, int] = {}
        for name in await self._connection.execute("SMEMBERS", _TENANTS):
            tenant = _text(name)
            # Also sweeps what has expired.
            await self._connection.run(SERVED, _account(tenant), [_key(tenant, "")])
            about = await self._connection.execute("HMGET", _key(tenant, "about"), "#entries", "#bytes")
            count, used = (int(value or 0) for value in about)
            if not count:
                await self._connection.execute("SREM", _TENANTS, tenant)
                continue
            entries += count
            sizes[tenant] = used
            partitions += int(await self._connection.execute("HLEN", _key(tenant, "partitions")))
        return StoreSize(entries, partitions, sizes)

    async def close(self) -> None:
        """Writes what is waiting."""
        if self._poller is not None:
            self._poller.cancel()
        if self._writer is not None:
            await asyncio.wait([self._writer], timeout=1.0)
            self._writer.cancel()

    # Writing.

    def _work(self) -> None:
        if self._writer is None or self._writer.done():
            self._writer = asyncio.get_running_loop().create_task(self._write())

    async def _write(self) -> None:
        while self._pending or self._hits or self._lost:
            try:
                await self._begin()
                batch = self._batch()
                outcomes = await asyncio.gather(*(self._store(*put) for put in batch), return_exceptions=True)
                await self._stored(batch, outcomes)
                await self._tidy()
            except Exception as error:
                if not isinstance(error, UnavailableError):
                    logger.exception("writing to the semantic store failed")
                for entry, _, _ in self._pending.values():
                    self._keep_alone(entry)
                self._pending.clear()
                self._pending_bytes = 0
                self._hits.clear()
                self._lost.clear()
                return

    def _batch(self) -> list[tuple[SemanticEntry, bytes, int]]:
        """Some that wait, few enough that none has to wait long for the others' bytes."""
        batch: list[tuple[SemanticEntry, bytes, int]] = []
        size = 0
        for put in islice(self._pending.values(), _BATCH):
            size += len(put[1])
            if batch and size > _BATCH_BYTES:
                break
            batch.append(put)
        return batch

    async def _store(self, entry: SemanticEntry, body: bytes, quota: int) -> list[bytes | int]:
        tenant, partition, id = entry.tenant, entry.partition, entry.id
        ttl = int((entry.expires_at - self._now()) * 1000)
        if ttl <= 0:
            return [0]
        # First where it is found, so that it is never there and cannot be named.
        await self._connection.execute("SET", _entry_key(id), f"{tenant} {partition}", "PX", ttl)
        await self._locate(entry, ttl)
        return await self._run(
            PUT,
            tenant,
            [f"members:{partition}", f"body:{id}"],
            [
                *(id, partition, weight(entry, body), max(entry.cost or 0, 0), quota, ttl),
                *(_encode(_Member(entry)), _encode(_Body(tenant, partition, id, body))),
            ],
        )

    async def _locate(self, entry: SemanticEntry, ttl: int) -> None:
        """Says which tenant the partition's entries are under. What was said lately is not repeated."""
        name = (entry.tenant, entry.partition)
        said, until = self._located.get(name, (0.0, 0.0))
        now = self._now()
        if until >= entry.expires_at and said <= now < said + _LOCATED_FOR:
            return
        longer = ttl + 3_600_000
        await self._connection.execute("SADD", _TENANTS, entry.tenant)
        await self._connection.run(LOCATE, [_tenants_key(entry.partition)], [entry.tenant, longer])
        self._located[name] = (now, now + longer / 1000)
        self._located.move_to_end(name)
        _bound(self._located, _MAX_REMEMBERED)

    async def _stored(
        self,
        batch: Sequence[tuple[SemanticEntry, bytes, int]],
        outcomes: Sequence[list[bytes | int] | BaseException],
    ) -> None:
        changes: list[_Change] = []
        failure: BaseException | None = None
        for (entry, body, _), outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                failure = outcome
                continue
            waiting = self._pending.get(entry.id)
            if waiting is not None and waiting[0] is entry:
                del self._pending[entry.id]
                self._pending_bytes -= len(body)
            changes += self._let_go(entry.tenant, outcome)
            if outcome[0] == 0:
                self.dropped += 1
                self._remembered.drop(entry.id)
            elif self._is_removed(entry):
                # Removed while it was being written: the write may have landed after the removal.
                await self._erase(entry.tenant, entry.partition, entry.id, _TAKEN_MS)
            else:
                changes.append(_Change("added", entry.tenant, entry.partition, entry.id))
                self._hear_added(entry)
        await self._tell(changes)
        if failure is not None:
            raise failure

    async def _tidy(self) -> None:
        hits: dict[str, list[str | bytes | int]] = {}
        for _ in range(min(len(self._hits), 64)):
            (tenant, id), count = self._hits.popitem(last=False)
            hits.setdefault(tenant, []).extend((id, count))
        for tenant, arguments in hits.items():
            reply = await self._run(SERVED, tenant, [], arguments)
            await self._tell(self._let_go(tenant, reply))
        for _ in range(min(len(self._lost), _BATCH)):
            _, entry = self._lost.popitem(last=False)
            await self._erase(entry.tenant, entry.partition, entry.id, 0)

    def _keep_alone(self, entry: SemanticEntry) -> None:
        self.dropped += 1
        self._hear_added(entry)

    # Removing.

    async def _take_back(self, partition: str, id: str) -> None:
        self._removed[partition, id] = None
        _bound(self._removed, _MAX_REMEMBERED)
        for put in [put for put in self._pending.values() if self._is_removed(put[0])]:
            del self._pending[put[0].id]
            self._pending_bytes -= len(put[1])
        if partition:
            self._forget(partition, id)
        try:
            await self._remove(partition, id)
        except UnavailableError:
            self._owed[partition, id] = None
            _bound(self._owed, _MAX_REMEMBERED)
            raise

    async def _remove(self, partition: str, id: str, trial: bool = False) -> None:
        if not _NAME.fullmatch(id):
            return
        value = await self._connection.execute("GET", _entry_key(id), trial=trial)
        places: list[tuple[str, str]] = []
        if isinstance(value, bytes) and value.count(b" ") == 1:
            tenant, _, found = _text(value).partition(" ")
            places = [(tenant, found)] if partition in ("", found) else []
        elif partition:
            names = await self._connection.execute("SMEMBERS", _tenants_key(partition), trial=trial)
            places = [(_text(name), partition) for name in names]
        for tenant, found in places:
            self._forget(found, id)
            await self._erase(tenant, found, id, _TAKEN_MS, trial)

    async def _erase(self, tenant: str, partition: str, id: str, taken_ms: int, trial: bool = False) -> None:
        reply = await self._run(REMOVE, tenant, [f"body:{id}"], [id, partition, taken_ms], trial)
        changes = self._let_go(tenant, reply)
        if taken_ms and not changes:
            changes = [_Change("removed", tenant, partition, id)]
        await self._tell(changes, trial)

    async def _recover(self) -> None:
        """Runs before the breaker closes: what was removed here meanwhile."""
        while self._owed:
            partition, id = next(iter(self._owed))
            await self._remove(partition, id, trial=True)
            self._owed.pop((partition, id), None)

    # Changes.

    async def _begin(self) -> None:
        async with self._beginning:
            if self._position is None:
                self._position = await self._newest()
        if self._poller is None:
            self._poller = asyncio.get_running_loop().create_task(self._poll())

    async def _newest(self) -> bytes:
        reply: Any = await self._connection.execute("XREVRANGE", _CHANGES, "+", "-", "COUNT", 1)
        if reply:
            return bytes(reply[0][0])
        # A stream with nothing in it could not be told from an emptied one.
        return bytes(await self._connection.execute("XADD", _CHANGES, "*", "by", self._worker))

    async def _tell(self, changes: Sequence[_Change], trial: bool = False) -> None:
        """Never raises: who does not hear of a removal finds no body, and of an addition, nothing."""
        if not changes:
            return
        words = ("XADD", _CHANGES, "MAXLEN", "~", _KEPT_CHANGES, "*", "by", self._worker)
        try:
            await self._connection.execute(*words, "what", _encode(changes), trial=trial)
        except UnavailableError:
            logger.debug("a change of the semantic store was not told")

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._poll_every)
            if not self._connection.up:
                continue
            try:
                while await self._read_changes() == _READ_CHANGES:
                    pass
            except UnavailableError:
                continue
            except Exception:
                logger.exception("reading the semantic store's changes failed")
                self._start_over(await self._position_or_none())

    async def _position_or_none(self) -> bytes | None:
        try:
            return await self._newest()
        except UnavailableError:
            return None

    async def _read_changes(self) -> int:
        """How many were read, the last one known included. That one must still be there: else some were missed."""
        position = self._position
        if position is None:
            await self._begin()
            return 0
        reply: Any = await self._connection.execute("XRANGE", _CHANGES, position, "+", "COUNT", _READ_CHANGES)
        if not reply or bytes(reply[0][0]) != position:
            self._start_over(await self._newest())
            return 0
        news: list[_Change] = []
        for _, fields in reply[1:]:
            if fields.get(b"by") == self._worker.encode():
                continue
            try:
                news += _changes.decode(fields[b"what"])
            except (KeyError, msgspec.MsgspecError):
                continue  # the first one of a stream, or another version's
        added = await self._added(news)
        for change in news:
            if change.kind == "removed":
                self._forget(change.partition, change.id)
            elif (entry := added.get((change.partition, change.id))) is not None:
                self._hear_added(entry)
        self._position = bytes(reply[-1][0])
        return len(reply)

    async def _added(self, news: Iterable[_Change]) -> dict[tuple[str, str], SemanticEntry]:
        """The added entries that somebody here wants to hear of."""
        wanted: dict[tuple[str, str], list[str]] = {}
        for change in news:
            if change.kind == "added" and self._wanted(change.partition):
                wanted.setdefault((change.tenant, change.partition), []).append(change.id)
        found: dict[tuple[str, str], SemanticEntry] = {}
        for (tenant, partition), ids in wanted.items():
            for start in range(0, len(ids), _SCANNED_AT_FIRST):
                some = ids[start : start + _SCANNED_AT_FIRST]
                key = _key(tenant, f"members:{partition}")
                values = await self._connection.execute("HMGET", key, *some)
                for id, value in zip(some, values, strict=True):
                    if (entry := _entry_of(value, tenant, partition, id)) is not None:
                        found[partition, id] = entry
        return found

    def _wanted(self, partition: str) -> bool:
        return partition in self._loads or any(each.loaded(partition) for each in self._listeners)

    def _start_over(self, position: bytes | None) -> None:
        logger.info("the semantic store's changes have a gap: partitions are loaded anew")
        self._position = position
        self._resets += 1
        self._remembered.clear()
        self._located.clear()
        for listener in self._listeners:
            listener.reset()

    def _hear_added(self, entry: SemanticEntry) -> None:
        if self._is_removed(entry):
            return
        for load in self._loads.get(entry.partition, ()):
            load.added[entry.id] = entry
        for listener in self._listeners:
            listener.added(entry)

    def _forget(self, partition: str, id: str) -> None:
        self._remembered.drop(id)
        for load in self._loads.get(partition, ()):
            load.removed.add(id)
        for listener in self._listeners:
            listener.removed(partition, id)

    # Small things.

    async def _scan(self, tenant: str, partition: str, found: dict[str, SemanticEntry]) -> None:
        cursor, count = 0, _SCANNED_AT_FIRST
        while True:
            reply: Any = await self._connection.execute(
                "HSCAN", _key(tenant, f"members:{partition}"), cursor, "COUNT", count
            )
            cursor = int(reply[0])
            if size := sum(map(len, reply[1].values())):
                count = min(_SCANNED, max(1, _SCAN_BYTES * len(reply[1]) // size))
            for name, value in reply[1].items():
                if (entry := _entry_of(value, tenant, partition, _text(name))) is not None:
                    found[entry.id] = entry
            if not cursor:
                return

    async def _run(
        self,
        script: Script,
        tenant: str,
        further: Sequence[str],
        arguments: Sequence[str | bytes | int],
        trial: bool = False,
    ) -> list[bytes | int]:
        keys = [*_account(tenant), *(_key(tenant, name) for name in further)]
        reply: list[bytes | int] = await self._connection.run(
            script, keys, [_key(tenant, ""), *arguments], trial=trial
        )
        return reply

    def _let_go(self, tenant: str, reply: Sequence[bytes | int]) -> list[_Change]:
        """What a script says it let go, which is forgotten here at once."""
        names = [_text(name) for name in reply[1:]]
        changes = []
        for partition, id in zip(names[::2], names[1::2], strict=True):
            self._forget(partition, id)
            changes.append(_Change("removed", tenant, partition, id))
        return changes

    def _is_removed(self, entry: SemanticEntry) -> bool:
        removed = self._removed
        return bool(removed) and ((entry.partition, entry.id) in removed or ("", entry.id) in removed)

    def _now(self) -> float:
        return self._clock.now().timestamp()


class _Bodies:
    """Bodies this worker put or read, the least recently used dropped first beyond `max_bytes`."""

    _OVERHEAD = 400

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, tuple[str, str, float, bytes]] = OrderedDict()
        self._bytes = 0

    def keep(self, entry: SemanticEntry, body: bytes) -> None:
        self.drop(entry.id)
        self._kept[entry.id] = (entry.tenant, entry.partition, entry.expires_at, body)
        self._bytes += len(body) + self._OVERHEAD
        while self._bytes > self._max_bytes:
            self.drop(next(iter(self._kept)))

    def get(self, entry: SemanticEntry, now: float) -> bytes | None:
        kept = self._kept.get(entry.id)
        if kept is None or kept[:2] != (entry.tenant, entry.partition) or kept[2] <= now:
            return None
        self._kept.move_to_end(entry.id)
        return kept[3]

    def drop(self, id: str) -> None:
        if (kept := self._kept.pop(id, None)) is not None:
            self._bytes -= len(kept[3]) + self._OVERHEAD

    def clear(self) -> None:
        self._kept.clear()
        self._bytes = 0


def _key(tenant: str, name: str) -> str:
    return f"{_PREFIX}{{{tenant}}}:{name}"


def _account(tenant: str) -> list[str]:
    return [_key(tenant, name) for name in ("about", "worth", "ends", "partitions")]


def _entry_key(id: str) -> str:
    return f"{_PREFIX}entry:{id}"


def _tenants_key(partition: str) -> str:
    return f"{_PREFIX}partition:{partition}"


def _text(value: bytes | int | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _bound(some: OrderedDict[Any, Any], most: int) -> None:
    while len(some) > most:
        some.popitem(last=False)


def _same(one: SemanticEntry, other: SemanticEntry) -> bool:
    return (one.tenant, one.partition) == (other.tenant, other.partition)


def _body_of(value: object, entry: SemanticEntry) -> bytes | None:
    """The body, where the value is this version's and says that it belongs to the entry."""
    if not isinstance(value, bytes) or not value:
        return None
    try:
        stored = _bodies.decode(value)
    except msgspec.MsgspecError:
        return None
    if (stored.tenant, stored.partition, stored.id) != (entry.tenant, entry.partition, entry.id):
        return None
    return stored.body


def _entry_of(value: object, tenant: str, partition: str, id: str) -> SemanticEntry | None:
    """The entry, where the value is this version's and says that it belongs where it was found."""
    if not isinstance(value, bytes):
        return None
    try:
        entry = _members.decode(value).entry
    except msgspec.MsgspecError:
        return None
    if (entry.tenant, entry.partition, entry.id) != (tenant, partition, id):
        return None
    return entry
