"""A frozen, killed, emptied or read-only Valkey under the semantic store: no error, no wait, nothing removed."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timedelta

import pytest

from router.adapters.redis_store import RedisConnection, RedisSemanticStore
from router.adapters.system import SystemClock
from router.core.cached import Origin, SemanticEntry
from router.core.errors import UnavailableError
from tests.contracts.valkey_server import LIMIT, PATIENCE, ValkeyServer, patient
from tests.values import replace

QUOTA = 10_000_000
BODY = b'{"choices": []}'
RATE = 50


class LaterClock(SystemClock):
    later = timedelta()

    def now(self) -> datetime:
        return super().now() + self.later


class Heard:
    def __init__(self) -> None:
        self.entries: dict[str, SemanticEntry] = {}
        self.resets = 0

    def loaded(self, partition: str) -> bool:
        return True

    def added(self, entry: SemanticEntry) -> None:
        self.entries[entry.id] = entry

    def removed(self, partition: str, entry_id: str) -> None:
        self.entries.pop(entry_id, None)

    def reset(self) -> None:
        self.entries.clear()
        self.resets += 1


def entry_of(partition: str = "partition", tenant: str = "tenant", ttl: float = 60.0) -> SemanticEntry:
    now = time.time()
    return SemanticEntry(
        origin=Origin(uuid.uuid4().hex, 0, "search", None, "mini"),
        tenant=tenant,
        partition=partition,
        prompt="What is the capital of Ecuador?",
        vector=bytes(768),
        sketch=bytes(512),
        encoder_id="minilm-1",
        stored_at=now,
        expires_at=now + ttl,
        provider="openai",
        upstream_model="gpt-5-mini",
        prompt_class=None,
        usage=(1, 2),
        cost=1000,
        policy_hash="rules",
        stream=False,
        body_bytes=len(BODY),
    )


@pytest.fixture
async def store(connection: RedisConnection) -> AsyncIterator[RedisSemanticStore]:
    store = RedisSemanticStore(connection, SystemClock())
    yield store
    await store.close()


def now() -> float:
    return asyncio.get_running_loop().time()


async def until(condition: Callable[[], object], seconds: float = 60.0) -> float:
    """Seconds until the condition held."""
    began = now()
    while not condition():
        if now() - began > seconds:
            raise AssertionError(f"it did not come to pass within {seconds} s")
        await asyncio.sleep(0.01)
    return now() - began


async def written(store: RedisSemanticStore) -> None:
    await until(lambda: store._writer is None or store._writer.done())


async def test_a_frozen_server_costs_fifty_milliseconds_once(
    server: ValkeyServer, connection: RedisConnection, store: RedisSemanticStore
) -> None:
    entries = [entry_of() for _ in range(50)]
    for entry in entries:
        store.put(entry, BODY, QUOTA)
    await written(store)
    server.freeze(connection)
    began = now()
    bodies = await asyncio.gather(*(store.body(entry) for entry in entries), store.load("partition"))
    # 50 ms, and what a loaded machine adds.
    assert now() - began < 0.3
    assert bodies == [BODY] * 50 + [None]
    began = now()
    for entry in entries:
        assert await store.body(entry) == BODY
        store.served(entry)
        store.put(entry_of(), BODY, QUOTA)
        assert await store.load("partition") is None
    assert now() - began < 0.1
    assert not store.up
    with pytest.raises(UnavailableError):
        await store.size()
    server.thaw(connection)
    await until(lambda: store.up)
    assert connection.status().failures == 1
    loaded = await store.load("partition")
    assert loaded is not None
    assert {entry.id for entry in loaded} == {entry.id for entry in entries}


async def test_what_is_removed_while_redis_is_away_stays_removed(
    server: ValkeyServer, connection: RedisConnection, store: RedisSemanticStore
) -> None:
    other_connection = patient(server.url)
    other = RedisSemanticStore(other_connection, SystemClock())
    heard = Heard()
    store.listen(heard)
    one, two, three = entry_of(), entry_of(), entry_of()
    for entry in (one, two, three):
        store.put(entry, BODY, QUOTA)
    await written(store)
    server.freeze(connection)
    assert await store.body(one) == BODY
    with pytest.raises(UnavailableError):
        await store.remove("partition", one.id)
    with pytest.raises(UnavailableError):
        await store.remove_entry(two.id)
    assert [await store.body(entry) for entry in (one, two, three)] == [None, None, BODY]
    assert one.id not in heard.entries
    store.put(one, BODY, QUOTA)
    assert await store.body(one) is None
    server.thaw(connection)
    await until(lambda: store.up)
    # It was removed in Redis before anybody was let at it again, so for all workers.
    assert [await other.body(entry) for entry in (one, two, three)] == [None, None, BODY]
    assert [await store.body(entry) for entry in (one, two, three)] == [None, None, BODY]
    assert await store.load("partition") == (three,)
    await other.close()
    await other_connection.close()


async def test_memory_serves_nobody_else_and_nothing_expired(
    server: ValkeyServer, connection: RedisConnection
) -> None:
    clock = LaterClock()
    store = RedisSemanticStore(connection, clock)
    entry, short = entry_of(), entry_of(ttl=30)
    for each in (entry, short):
        store.put(each, BODY, QUOTA)
    await written(store)
    server.kill()
    assert await store.body(short) == BODY
    assert await store.body(replace(entry, partition="other")) is None
    assert await store.body(replace(entry, tenant="other")) is None
    clock.later = timedelta(seconds=31)
    assert await store.body(short) is None
    assert await store.body(entry) == BODY
    await store.close()


async def test_memory_is_bounded(server: ValkeyServer, connection: RedisConnection) -> None:
    store = RedisSemanticStore(connection, SystemClock(), memory_bytes=10_000)
    entries = [entry_of() for _ in range(10)]
    for entry in entries:
        store.put(entry, b"x" * 1600, QUOTA)
    await written(store)
    server.kill()
    kept = [await store.body(entry) is not None for entry in entries]
    assert kept == [False] * 5 + [True] * 5
    await store.close()


async def test_a_server_restarted_empty_is_filled_anew(
    server: ValkeyServer, connection: RedisConnection, store: RedisSemanticStore
) -> None:
    heard = Heard()
    store.listen(heard)
    before = entry_of()
    store.put(before, BODY, QUOTA)
    await written(store)
    server.kill()
    assert await store.body(before) == BODY
    alone = entry_of()
    store.put(alone, BODY, QUOTA)
    assert await store.body(alone) == BODY
    assert set(heard.entries) == {before.id, alone.id}
    server.start()
    assert await until(lambda: store.up) < 5
    assert await store.body(before) is None
    await until(lambda: heard.resets == 1)
    assert await store.body(alone) is None
    assert not heard.entries
    after = entry_of()
    store.put(after, BODY, QUOTA)
    await written(store)
    assert await store.load("partition") == (after,)
    assert await store.body(after) == BODY
    # Nor does memory know what was emptied.
    server.freeze(connection)
    assert [await store.body(entry) for entry in (before, alone, after)] == [None, None, BODY]
    server.thaw(connection)


@pytest.mark.parametrize(
    ("breaking", "healing"),
    [
        (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
        (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
    ],
    ids=["out of memory", "read-only replica"],
)
async def test_a_server_that_takes_no_writes_counts_as_away(
    server: ValkeyServer, store: RedisSemanticStore, breaking: tuple[str, ...], healing: tuple[str, ...]
) -> None:
    before = entry_of()
    store.put(before, BODY, QUOTA)
    await written(store)
    assert server.command(*breaking).startswith(b"+OK")
    during = entry_of()
    store.put(during, BODY, QUOTA)
    await written(store)
    assert not store.up
    assert [await store.body(entry) for entry in (before, during)] == [BODY, BODY]
    with pytest.raises(UnavailableError):
        await store.remove_entry(before.id)
    assert await store.body(before) is None
    assert server.command(*healing).startswith(b"+OK")
    await until(lambda: store.up)
    after = entry_of()
    store.put(after, BODY, QUOTA)
    await written(store)
    assert await store.load("partition") == (after,)


async def test_puts_that_wait_are_bounded(server: ValkeyServer, connection: RedisConnection) -> None:
    store = RedisSemanticStore(connection, SystemClock(), max_pending=5)
    entries = [entry_of() for _ in range(20)]
    for entry in entries:
        store.put(entry, BODY, QUOTA)
    assert store.dropped == 15
    await store.close()
    loaded = await store.load("partition")
    assert loaded is not None
    assert {entry.id for entry in loaded} == {entry.id for entry in entries[:5]}


@pytest.mark.parametrize("fault", ["frozen", "killed", "restarted empty", "read-only"])
async def test_under_use_nothing_fails_and_nothing_waits(
    server: ValkeyServer, connection: RedisConnection, store: RedisSemanticStore, fault: str
) -> None:
    """Two workers, look-ups, puts, hits and removals at a rate, the fault in the middle."""
    other_connection = patient(server.url)
    other = RedisSemanticStore(other_connection, SystemClock())
    known = [entry_of() for _ in range(40)]
    for entry in known:
        store.put(entry, BODY, QUOTA)
    await written(store)
    removed: list[SemanticEntry] = []
    waits: list[float] = []
    wrong: list[object] = []
    stop = asyncio.Event()

    async def ask(number: int) -> None:
        worker = (store, other)[number % 2]
        entry = known[number % len(known)]
        began = now()
        body = await worker.body(entry)
        if number % 5 == 0:
            await worker.load("partition")
        waits.append(now() - began)
        if body not in (None, BODY) or (body is not None and entry in removed):
            wrong.append((entry.id, body))
        worker.put(entry_of(), BODY, QUOTA)
        worker.served(entry)
        if number % 25 == 7:
            victim = known[number % 7]
            try:
                await store.remove_entry(victim.id)
            except UnavailableError:
                # Only this worker has to know as long as Redis is away.
                assert await store.body(victim) is None
            else:
                removed.append(victim)
                for each in (store, other):
                    if each.up and await each.body(victim) is not None and each.up:
                        wrong.append(victim.id)

    async def use() -> list[BaseException | None]:
        asks = []
        number = 0
        while not stop.is_set():
            asks.append(asyncio.create_task(ask(number)))
            number += 1
            await asyncio.sleep(1 / RATE)
        return await asyncio.gather(*asks, return_exceptions=True)

    using = asyncio.create_task(use())
    await asyncio.sleep(0.3)
    for each in (connection, other_connection):
        each._timeout = LIMIT
    await asyncio.sleep(0.2)
    if fault == "frozen":
        server.freeze()
    elif fault == "read-only":
        server.command("REPLICAOF", "127.0.0.1", "1")
    else:
        server.kill()
    await until(lambda: not store.up and not other.up)
    if fault == "restarted empty":
        server.start()
    else:
        await asyncio.sleep(1.0)
        if fault == "frozen":
            server.thaw()
        elif fault == "read-only":
            server.command("REPLICAOF", "NO", "ONE")
        else:
            server.start()
    recovery = await until(lambda: store.up and other.up)
    await asyncio.sleep(0.5)
    stop.set()
    outcomes = await using
    for each in (connection, other_connection):
        each._timeout = PATIENCE
    assert [outcome for outcome in outcomes if outcome is not None] == []
    assert not wrong
    assert recovery < 5
    assert len(waits) == len(outcomes) > RATE
    # One operation in flight when it happened waits 50 ms; a load is two or more, each behind the breaker.
    assert max(waits) < 0.3
    assert sorted(waits)[int(0.9 * len(waits))] < 0.05
    after = entry_of("partition-after")
    store.put(after, BODY, QUOTA)
    await written(store)
    assert await other.load("partition-after") == (after,)
    assert await other.body(after) == BODY
    await other.close()
    await other_connection.close()


async def test_long_prompts_are_read_in_pieces_that_hold_nobody_up(
    server: ValkeyServer, store: RedisSemanticStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [replace(entry_of(), prompt="長" * 8_000) for _ in range(100)]
    for entry in entries:
        store.put(entry, BODY, QUOTA)
    await written(store)
    beside = patient(server.url)
    execute, sizes = beside.execute, []

    async def measured(*words: str | bytes | int, trial: bool = False) -> object:
        reply = await execute(*words, trial=trial)
        if words[0] == "HSCAN":
            sizes.append(sum(map(len, reply[1].values())))
        return reply

    monkeypatch.setattr(beside, "execute", measured)
    other = RedisSemanticStore(beside, SystemClock())
    loaded = await other.load("partition")
    await other.close()
    await beside.close()
    assert loaded is not None
    assert {entry.id for entry in loaded} == {entry.id for entry in entries}
    assert max(sizes) < 1024 * 1024 < sum(sizes)
