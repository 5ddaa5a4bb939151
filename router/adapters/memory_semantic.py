"""The semantic store of one process: what a worker without Redis runs on. Twin of `redis_store.semantic`."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from router.core.cached import SemanticEntry, SemanticListener, StoreSize
from router.core.ports import Clock

# What an entry takes beside its texts and vectors, counted against its tenant's quota.
ENTRY_BYTES = 1024
MAX_BODY_BYTES = 1024 * 1024


def weight(entry: SemanticEntry, body: bytes) -> int:
    """Bytes that an entry counts against its tenant's quota."""
    return len(body) + len(entry.prompt.encode()) + len(entry.vector) + len(entry.sketch) + ENTRY_BYTES


def priority(inflation: float, hits: int, cost: int | None, size: int) -> float:
    """GreedyDual-Size-Frequency (Cherkasova 1998): inflation + frequency x cost / size. `cost` is the nano-USD that a
    hit saves; what is not priced is worth the least there is. It orders entries and is no money.
    """
    return inflation + hits * max(cost or 0, 1) / size


@dataclass(slots=True)
class _Kept:
    entry: SemanticEntry
    body: bytes
    size: int
    priority: float = 0.0
    hits: int = 1


@dataclass(slots=True)
class _Tenant:
    """`queue`: (priority, id), the least first; one whose priority rose has a newer item further back."""

    bytes: int = 0
    inflation: float = 0.0
    queue: list[tuple[float, str]] = field(default_factory=list)


class MemorySemanticStore:
    """See the port `SemanticStore`. Always up. A body above `max_body_bytes` is not kept.

    `max_bytes` bounds the whole, whatever the quotas are: beyond it the tenant that holds most gives way.
    """

    def __init__(
        self, clock: Clock, max_body_bytes: int = MAX_BODY_BYTES, max_bytes: int = 64 * 1024 * 1024
    ) -> None:
        self._clock = clock
        self._max_body_bytes = max_body_bytes
        self._max_bytes = max_bytes
        self._kept: dict[str, _Kept] = {}
        self._partitions: dict[str, set[str]] = {}
        self._tenants: dict[str, _Tenant] = {}
        self._ends: list[tuple[float, str]] = []
        self._listeners: list[SemanticListener] = []
        self._bytes = 0
        self.dropped = 0

    @property
    def up(self) -> bool:
        return True

    def listen(self, listener: SemanticListener) -> None:
        self._listeners.append(listener)

    async def start(self) -> None:
        """Nothing to open."""

    async def load(self, partition: str) -> tuple[SemanticEntry, ...] | None:
        self._expire()
        return tuple(self._kept[id].entry for id in self._partitions.get(partition, ()))

    def put(self, entry: SemanticEntry, body: bytes, quota: int) -> None:
        self._expire()
        size = weight(entry, body)
        if (
            len(body) > self._max_body_bytes
            or size > min(quota, self._max_bytes)
            or entry.expires_at <= self._now()
            or entry.id in self._kept
        ):
            self.dropped += 1
            return
        tenant = self._tenants.get(entry.tenant) or _Tenant()
        while tenant.bytes + size > quota:
            self._evict(tenant)
        while self._bytes + size > self._max_bytes:
            self._evict(max(self._tenants.values(), key=lambda one: one.bytes))
        self._tenants[entry.tenant] = tenant
        kept = _Kept(entry, body, size)
        self._kept[entry.id] = kept
        self._partitions.setdefault(entry.partition, set()).add(entry.id)
        tenant.bytes += size
        self._bytes += size
        self._rank(tenant, kept)
        heapq.heappush(self._ends, (entry.expires_at, entry.id))
        if len(self._ends) > 100 and len(self._ends) > 4 * len(self._kept):
            self._ends = [end for end in self._ends if end[1] in self._kept]
            heapq.heapify(self._ends)
        for listener in self._listeners:
            listener.added(entry)

    async def body(self, entry: SemanticEntry) -> bytes | None:
        self._expire()
        kept = self._kept.get(entry.id)
        asked = (entry.tenant, entry.partition)
        if kept is None or (kept.entry.tenant, kept.entry.partition) != asked:
            return None
        return kept.body

    def served(self, entry: SemanticEntry) -> None:
        if (kept := self._kept.get(entry.id)) is not None:
            kept.hits += 1
            self._rank(self._tenants[kept.entry.tenant], kept)

    async def remove(self, partition: str, entry_id: str) -> None:
        kept = self._kept.get(entry_id)
        if kept is not None and kept.entry.partition == partition:
            self._drop(entry_id)

    async def remove_entry(self, entry_id: str) -> None:
        self._drop(entry_id)

    async def size(self) -> StoreSize:
        self._expire()
        return StoreSize(
            entries=len(self._kept),
            partitions=len(self._partitions),
            bytes={name: tenant.bytes for name, tenant in self._tenants.items()},
        )

    async def close(self) -> None:
        self._kept.clear()
        self._partitions.clear()
        self._tenants.clear()
        self._ends.clear()
        self._bytes = 0

    def _now(self) -> float:
        return self._clock.now().timestamp()

    def _rank(self, tenant: _Tenant, kept: _Kept) -> None:
        kept.priority = priority(tenant.inflation, kept.hits, kept.entry.cost, kept.size)
        heapq.heappush(tenant.queue, (kept.priority, kept.entry.id))
        if len(tenant.queue) > 100 and len(tenant.queue) > 4 * len(self._kept):
            tenant.queue = [item for item in tenant.queue if self._holds(item)]
            heapq.heapify(tenant.queue)

    def _holds(self, item: tuple[float, str]) -> bool:
        kept = self._kept.get(item[1])
        return kept is not None and kept.priority == item[0]

    def _evict(self, tenant: _Tenant) -> None:
        while not self._holds(tenant.queue[0]):
            heapq.heappop(tenant.queue)
        tenant.inflation, id = tenant.queue[0]
        self._drop(id)

    def _expire(self) -> None:
        now = self._now()
        while self._ends and self._ends[0][0] <= now:
            self._drop(heapq.heappop(self._ends)[1])

    def _drop(self, id: str) -> None:
        kept = self._kept.pop(id, None)
        if kept is None:
            return
        entry = kept.entry
        self._bytes -= kept.size
        tenant = self._tenants[entry.tenant]
        tenant.bytes -= kept.size
        if not tenant.bytes:
            del self._tenants[entry.tenant]
        members = self._partitions[entry.partition]
        members.discard(id)
        if not members:
            del self._partitions[entry.partition]
        for listener in self._listeners:
            listener.removed(entry.partition, id)
