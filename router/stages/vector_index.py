"""What one worker knows of the semantic store: the vectors of the partitions it was asked about, searched row by row.

A search reads every row of one partition and of no other, so nothing near is missed and nothing foreign is found.
The static sketches (256 numbers) are kept as int8 with one scale a row: a cosine is off by 0.002 at most, which
is little against the floor and can only change who comes last among the candidates. What is decided on, the cosine
by the cache's encoder, comes from the float16 the store keeps. Everything else of an entry is packed, and what
entries of a partition have in common is kept once.

Not a product of BLAS's gemv, whose threads cost milliseconds on a busy machine: `vecdot` is one short dot a row.
Belongs to one event loop, and nothing locks. Only `fill` awaits: a large partition is taken in step by step.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from router.core.cached import Origin, SemanticEntry
from router.core.ports import Clock

Vector = NDArray[np.float32]

MAX_BYTES = 160 * 1024 * 1024
"""About 110,000 entries; taken as partitions are asked about."""
CANDIDATES = 8
FLOOR = 0.55
_CHUNK = 1024
_STEP = 256
"""Entries that are taken in before the event loop has its turn."""
_SWEPT = 64
# What Python takes beside arrays and texts, measured (benchmarks/semantic_lookup.py). Of a partition: its object,
# tables and place in the index. Of a row: id, packed entry, the slots of three lists and a dict.
_PARTITION_BYTES = 900
_ROW_BYTES = 300
_COMMON_BYTES = 1000

_own = msgspec.msgpack.Encoder()
_read_own: msgspec.msgpack.Decoder[tuple[str, int, float, int, tuple[int, ...], int | None]] = (
    msgspec.msgpack.Decoder(tuple[str, int, float, int, tuple[int, ...], int | None])
)


@dataclass(frozen=True, slots=True)
class Near:
    """An entry whose sketch is near. `similarity`: cosine of the sketches. The entry's own sketch is empty: only int8
    is left of it.
    """

    entry: SemanticEntry
    similarity: float


class VectorIndex:
    """Partitions this worker loaded, the least recently used forgotten beyond `max_bytes`.

    `dimensions` and `sketch_dimensions`: of the cache's encoder and of the static one. An entry of others is left
    out. It is a `SemanticListener`: what happens in partitions that are not loaded is not kept.
    """

    def __init__(
        self, clock: Clock, dimensions: int = 384, sketch_dimensions: int = 256, max_bytes: int = MAX_BYTES
    ) -> None:
        self._clock = clock
        self._dimensions = dimensions
        self._sketch_dimensions = sketch_dimensions
        self._max_bytes = max_bytes
        self._partitions: OrderedDict[str, _Partition] = OrderedDict()
        self._filling: dict[str, _Filling] = {}
        self._room = np.empty((_CHUNK, sketch_dimensions), dtype=np.float32)
        self.bytes = 0
        """Memory used, counted closely."""

    @property
    def partitions(self) -> int:
        return len(self._partitions)

    @property
    def entries(self) -> int:
        return sum(partition.rows for partition in self._partitions.values())

    def ready(self, partition: str) -> bool:
        """Whether it can be searched."""
        return partition in self._partitions

    def loaded(self, partition: str) -> bool:
        return partition in self._partitions or partition in self._filling

    async def fill(self, partition: str, entries: Iterable[SemanticEntry]) -> bool:
        """From when it is called the partition is kept current by what is heard; when it returns it holds these
        entries and can be searched. To miss nothing, call it right after the store's `load` returned, with no `await`
        between. False where all was forgotten meanwhile.
        """
        filling = self._begin(partition)
        try:
            for _ in self._steps(filling, partition, entries):
                await asyncio.sleep(0)
            return self._finish(filling, partition)
        finally:
            if self._filling.get(partition) is filling:  # broken off
                del self._filling[partition]

    def replace(self, partition: str, entries: Iterable[SemanticEntry]) -> None:
        """The same at once."""
        filling = self._begin(partition)
        for _ in self._steps(filling, partition, entries):
            pass
        self._finish(filling, partition)

    def _begin(self, partition: str) -> _Filling:
        self._drop(partition)
        filling = self._filling[partition] = _Filling(
            _Partition(self._sketch_dimensions, self._dimensions), set()
        )
        return filling

    def _steps(self, filling: _Filling, partition: str, entries: Iterable[SemanticEntry]) -> Iterator[None]:
        now = self._now()
        by_id = {entry.id: entry for entry in entries if entry.partition == partition}
        kept = [entry for entry in by_id.values() if self._fits(entry, now)]
        # One that would take more than half of the memory is kept in part, the newest.
        kept.sort(key=lambda entry: entry.stored_at, reverse=True)
        row = 2 * self._dimensions + self._sketch_dimensions + _ROW_BYTES
        sizes = np.cumsum([row + len(entry.prompt) for entry in kept])
        kept = kept[: int(np.searchsorted(sizes, self._max_bytes // 2))]
        filling.partition.reserve(len(kept))
        for start in range(0, len(kept), _STEP):
            yield
            filling.take(kept[start : start + _STEP])

    def _finish(self, filling: _Filling, partition: str) -> bool:
        if self._filling.get(partition) is not filling:
            return False
        del self._filling[partition]
        self._partitions[partition] = filling.partition
        self.bytes += filling.partition.size
        self._bound()
        return True

    def add(self, entry: SemanticEntry) -> None:
        """Nothing happens where the partition is not loaded. One of the same id is replaced."""
        now = self._now()
        if not self._fits(entry, now):
            return
        if (filling := self._filling.get(entry.partition)) is not None:
            filling.partition.add(entry)
            filling.removed.discard(entry.id)
            return
        found = self._partitions.get(entry.partition)
        if found is None:
            return
        before = found.size
        found.sweep(now)
        found.add(entry)
        self.bytes += found.size - before
        self._bound()

    def remove(self, partition: str, entry_id: str) -> None:
        if (filling := self._filling.get(partition)) is not None:
            filling.partition.remove(entry_id)
            filling.removed.add(entry_id)
            return
        found = self._partitions.get(partition)
        if found is not None:
            before = found.size
            found.remove(entry_id)
            self.bytes += found.size - before

    def forget(self) -> None:
        """No partition is loaded any more."""
        self._partitions.clear()
        self._filling.clear()
        self.bytes = 0

    # A SemanticListener.
    added = add
    removed = remove
    reset = forget

    def near(
        self, partition: str, sketch: Vector, limit: int = CANDIDATES, floor: float = FLOOR
    ) -> tuple[Near, ...]:
        """The live entries nearest by sketch, best first, none below `floor`. `sketch` is float32 of length 1."""
        found = self._partitions.get(partition)
        if found is None:
            return ()
        self._partitions.move_to_end(partition)
        now = self._now()
        before = found.size
        found.sweep(now)
        self.bytes += found.size - before
        nearest = found.near(np.asarray(sketch, dtype=np.float32), limit, floor, now, self._room)
        return tuple(Near(found.entry(partition, row), similarity) for row, similarity in nearest)

    def _now(self) -> float:
        return self._clock.now().timestamp()

    def _fits(self, entry: SemanticEntry, now: float) -> bool:
        return (
            entry.expires_at > now
            and len(entry.sketch) == 2 * self._sketch_dimensions
            and len(entry.vector) == 2 * self._dimensions
        )

    def _drop(self, partition: str) -> None:
        if (gone := self._partitions.pop(partition, None)) is not None:
            self.bytes -= gone.size

    def _bound(self) -> None:
        while self.bytes > self._max_bytes and self._partitions:
            self._drop(next(iter(self._partitions)))


class _Partition:
    """Rows without gaps: the last row takes the place of a removed one. Arrays grow by half, so that adding copies
    each row a bounded number of times.
    """

    __slots__ = (
        "_common",
        "_commons",
        "_expires",
        "_ids",
        "_own",
        "_own_bytes",
        "_rows",
        "_scales",
        "_sketches",
        "_soonest",
        "rows",
        "vectors",
    )

    def __init__(self, sketch_dimensions: int, dimensions: int) -> None:
        self.rows = 0
        self._sketches = np.empty((0, sketch_dimensions), dtype=np.int8)
        self._scales = np.empty(0, dtype=np.float32)
        self._expires = np.empty(0, dtype=np.float64)
        self.vectors = np.empty((0, dimensions), dtype=np.float16)
        self._soonest = float("inf")
        self._ids: list[str] = []
        self._rows: dict[str, int] = {}
        self._own: list[bytes] = []
        self._own_bytes = 0
        self._common: list[tuple[Any, ...]] = []
        self._commons: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    @property
    def size(self) -> int:
        arrays = self._sketches.nbytes + self._scales.nbytes + self._expires.nbytes + self.vectors.nbytes
        return (
            _PARTITION_BYTES
            + arrays
            + self._own_bytes
            + _ROW_BYTES * self.rows
            + _COMMON_BYTES * len(self._commons)
        )

    def reserve(self, more: int) -> None:
        """Room for that many rows more, so that taking them in copies none."""
        if self.rows + more > len(self._scales):
            self._grow(self.rows + more)

    def extend(self, entries: Sequence[SemanticEntry]) -> None:
        """Many at once, none of which it has, no id twice: a third of the time."""
        if not entries:
            return
        self.reserve(len(entries))
        start = self.rows
        for entry in entries:
            self._append(entry.id, *self._packed(entry))
        rows = slice(start, self.rows)
        sketches = np.frombuffer(b"".join(entry.sketch for entry in entries), dtype="<f2")
        self._quantise(rows, sketches.reshape(len(entries), -1))
        vectors = np.frombuffer(b"".join(entry.vector for entry in entries), dtype="<f2")
        self.vectors[rows] = vectors.reshape(len(entries), -1)
        self._expires[rows] = [entry.expires_at for entry in entries]
        self._soonest = min(self._soonest, float(self._expires[rows].min()))

    def __contains__(self, entry_id: str) -> bool:
        return entry_id in self._rows

    def add(self, entry: SemanticEntry) -> None:
        row = self._rows.get(entry.id)
        own, common = self._packed(entry)
        if row is None:
            row = self.rows
            if row == len(self._scales):
                self._grow(row + row // 2 + 1)
            self._append(entry.id, own, common)
        else:
            self._own_bytes += len(own) - len(self._own[row])
            self._own[row], self._common[row] = own, common
        self._quantise(slice(row, row + 1), np.frombuffer(entry.sketch, dtype="<f2")[np.newaxis])
        self.vectors[row] = np.frombuffer(entry.vector, dtype="<f2")
        self._expires[row] = entry.expires_at
        self._soonest = min(self._soonest, entry.expires_at)

    def remove(self, entry_id: str) -> None:
        row = self._rows.pop(entry_id, None)
        if row is None:
            return
        last = self.rows - 1
        self._own_bytes -= len(self._own[row])
        if row != last:
            for array in (self._sketches, self._scales, self._expires, self.vectors):
                array[row] = array[last]
            self._ids[row], self._own[row] = self._ids[last], self._own[last]
            self._common[row] = self._common[last]
            self._rows[self._ids[row]] = row
        del self._ids[last], self._own[last], self._common[last]
        self.rows = last

    def sweep(self, now: float) -> None:
        """Removes expired rows, a bounded number at a time."""
        if now < self._soonest:
            return
        due = np.flatnonzero(self._expires[: self.rows] <= now)[:_SWEPT]
        for entry_id in [self._ids[row] for row in due]:
            self.remove(entry_id)
        self._soonest = float(self._expires[: self.rows].min(initial=np.inf))

    def near(
        self, sketch: Vector, limit: int, floor: float, now: float, room: Vector
    ) -> list[tuple[int, float]]:
        rows = self.rows
        scores = np.empty(rows, dtype=np.float32)
        for start in range(0, rows, len(room)):
            end = min(rows, start + len(room))
            chunk = room[: end - start]
            np.copyto(chunk, self._sketches[start:end])
            np.vecdot(chunk, sketch, out=scores[start:end])
        scores *= self._scales[:rows]
        found = np.flatnonzero(scores >= floor)
        found = found[self._expires[found] > now]
        if len(found) > limit:
            found = found[np.argpartition(-scores[found], limit - 1)[:limit]]
        found = found[np.argsort(-scores[found], kind="stable")]
        return [(int(row), float(scores[row])) for row in found]

    def entry(self, partition: str, row: int) -> SemanticEntry:
        prompt, generation, stored_at, body_bytes, usage, cost = _read_own.decode(self._own[row])
        tenant, encoder_id, provider, upstream_model, prompt_class, policy_hash, stream, *origin = (
            self._common[row]
        )
        team, app, model, tags, scope = origin
        return SemanticEntry(
            origin=Origin(self._ids[row], generation, team, app, model, tags, scope),
            tenant=tenant,
            partition=partition,
            prompt=prompt,
            vector=self.vectors[row].astype("<f2").tobytes(),
            sketch=b"",
            encoder_id=encoder_id,
            stored_at=stored_at,
            expires_at=float(self._expires[row]),
            provider=provider,
            upstream_model=upstream_model,
            prompt_class=prompt_class,
            usage=usage,
            cost=cost,
            policy_hash=policy_hash,
            stream=stream,
            body_bytes=body_bytes,
        )

    def _packed(self, entry: SemanticEntry) -> tuple[bytes, tuple[Any, ...]]:
        own, common = _packed(entry)
        return own, self._commons.setdefault(common, common)

    def _append(self, entry_id: str, own: bytes, common: tuple[Any, ...]) -> None:
        self._rows[entry_id] = self.rows
        self._ids.append(entry_id)
        self._own.append(own)
        self._own_bytes += len(own)
        self._common.append(common)
        self.rows += 1

    def _quantise(self, rows: slice, sketches: NDArray[np.float16]) -> None:
        exact = sketches.astype(np.float32)
        scales = np.abs(exact).max(axis=1) / 127
        scales[scales == 0] = 1
        self._sketches[rows] = np.rint(exact / scales[:, np.newaxis])
        self._scales[rows] = scales

    def _grow(self, capacity: int) -> None:
        for name in ("_sketches", "_scales", "_expires", "vectors"):
            old = getattr(self, name)
            new = np.empty((capacity, *old.shape[1:]), dtype=old.dtype)
            new[: self.rows] = old
            setattr(self, name, new)


@dataclass(slots=True)
class _Filling:
    """A partition that is being taken in. `removed`: what was taken back meanwhile."""

    partition: _Partition
    removed: set[str]

    def take(self, entries: Sequence[SemanticEntry]) -> None:
        # What was heard meanwhile is newer.
        self.partition.extend(
            [entry for entry in entries if entry.id not in self.removed and entry.id not in self.partition]
        )


def _packed(entry: SemanticEntry) -> tuple[bytes, tuple[Any, ...]]:
    """What is the entry's own, as msgpack, and what it has in common with others."""
    origin = entry.origin
    own = _own.encode(
        (entry.prompt, origin.generation, entry.stored_at, entry.body_bytes, entry.usage, entry.cost)
    )
    common = (
        entry.tenant,
        entry.encoder_id,
        entry.provider,
        entry.upstream_model,
        entry.prompt_class,
        entry.policy_hash,
        entry.stream,
        origin.team,
        origin.app,
        origin.model,
        origin.tags,
        origin.scope,
    )
    return own, common
