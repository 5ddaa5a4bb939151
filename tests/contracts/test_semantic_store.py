"""One suite for both semantic stores, and what several workers on one Valkey see of each other."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.crc import key_slot

from router.adapters.memory_semantic import MemorySemanticStore, weight
from router.adapters.redis_store import RedisSemanticStore
from router.adapters.redis_store.connection import RedisConnection, Script
from router.adapters.system import SystemClock
from router.core.cached import Origin, SemanticEntry, SemanticStore
from router.stages.vector_index import VectorIndex
from tests.contracts.valkey_server import ValkeyServer, free_port, patient, valkey_server  # noqa: F401
from tests.values import replace

QUOTA = 10_000_000
BODY = b'{"choices": []}'


class Heard:
    """A listener that is interested in everything and writes it down."""

    def __init__(self) -> None:
        self.entries: dict[str, SemanticEntry] = {}
        self.gone: list[tuple[str, str]] = []
        self.resets = 0

    def loaded(self, partition: str) -> bool:
        return True

    def added(self, entry: SemanticEntry) -> None:
        self.entries[entry.id] = entry

    def removed(self, partition: str, entry_id: str) -> None:
        self.entries.pop(entry_id, None)
        self.gone.append((partition, entry_id))

    def reset(self) -> None:
        self.entries.clear()
        self.resets += 1


def unit(seed: int, size: int) -> np.ndarray:
    vector = np.random.default_rng(seed).standard_normal(size)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def entry_of(
    tenant: str,
    partition: str,
    *,
    id: str | None = None,
    ttl: float = 60.0,
    cost: int | None = 2_000_000,
    seed: int = 0,
    prompt: str = "What is the capital of Ecuador?",
) -> SemanticEntry:
    now = time.time()
    return SemanticEntry(
        origin=Origin(id or uuid.uuid4().hex, 3, "search", "faq", "mini", ("env=prod", "tier=1"), "scope"),
        tenant=tenant,
        partition=partition,
        prompt=prompt,
        vector=unit(seed, 384).astype("<f2").tobytes(),
        sketch=unit(seed, 256).astype("<f2").tobytes(),
        encoder_id="minilm-1",
        stored_at=now,
        expires_at=now + ttl,
        provider="openai",
        upstream_model="gpt-5-mini",
        prompt_class=None,
        usage=(10, 0, 20),
        cost=cost,
        policy_hash="rules",
        stream=False,
        body_bytes=len(BODY),
    )


async def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        await asyncio.sleep(0.005)


async def written(store: SemanticStore) -> None:
    if isinstance(store, RedisSemanticStore):
        await until(lambda: store._writer is None or store._writer.done())


@pytest.fixture(params=["memory", "valkey"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[SemanticStore]:
    if request.param == "memory":
        memory = MemorySemanticStore(SystemClock(), max_body_bytes=10_000)
        yield memory
        await memory.close()
    else:
        connection = patient(request.getfixturevalue("valkey_server").url)
        redis = RedisSemanticStore(connection, SystemClock(), max_body_bytes=10_000, poll_every=0.02)
        yield redis
        await redis.close()
        await connection.close()


@pytest.fixture
async def connections(valkey_server: ValkeyServer) -> AsyncIterator[list[RedisConnection]]:  # noqa: F811
    made = [patient(valkey_server.url) for _ in range(2)]
    yield made
    for connection in made:
        await connection.close()


@pytest.fixture
async def workers(connections: list[RedisConnection]) -> AsyncIterator[list[RedisSemanticStore]]:
    stores = [RedisSemanticStore(each, SystemClock(), poll_every=0.02) for each in connections]
    yield stores
    for store in stores:
        await store.close()


@pytest.fixture
def tenant() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def partition() -> str:
    return uuid.uuid4().hex


async def test_an_entry_comes_back_as_it_was_put(store: SemanticStore, tenant: str, partition: str) -> None:
    assert await store.load(partition) == ()
    entry = entry_of(tenant, partition)
    body = bytes(range(256)) * 10
    assert await store.body(entry) is None
    store.put(entry, body, QUOTA)
    assert await store.body(entry) == body
    await written(store)
    assert await store.load(partition) == (entry,)
    assert await store.body(entry) == body
    assert store.up


async def test_a_partition_is_loaded_whole_and_alone(
    store: SemanticStore, tenant: str, partition: str
) -> None:
    mine = [entry_of(tenant, partition, seed=i) for i in range(230)]
    others = [entry_of(tenant, partition + "x"), entry_of("t" + tenant, partition + "y")]
    for entry in [*mine, *others]:
        store.put(entry, BODY, QUOTA)
    await written(store)
    loaded = await store.load(partition)
    assert loaded is not None
    assert sorted(loaded, key=lambda entry: entry.id) == sorted(mine, key=lambda entry: entry.id)
    assert await store.load(partition + "x") == (others[0],)


async def test_nobody_reads_the_body_of_another(store: SemanticStore, tenant: str, partition: str) -> None:
    entry = entry_of(tenant, partition)
    store.put(entry, BODY, QUOTA)
    await written(store)
    assert await store.body(replace(entry, partition=partition + "x")) is None
    assert await store.body(replace(entry, tenant=tenant + "x")) is None


async def test_an_entry_ends_with_its_time(store: SemanticStore, tenant: str, partition: str) -> None:
    heard = Heard()
    store.listen(heard)
    short, long = entry_of(tenant, partition, ttl=0.15), entry_of(tenant, partition)
    for entry in (short, long):
        store.put(entry, BODY, QUOTA)
    await written(store)
    await asyncio.sleep(0.2)
    assert await store.load(partition) == (long,)
    assert await store.body(short) is None
    assert (await store.size()).bytes[tenant] == weight(long, BODY)
    store.put(entry_of(tenant, partition, ttl=-1), BODY, QUOTA)
    await written(store)
    assert await store.load(partition) == (long,)


async def test_what_is_too_large_is_not_kept(store: SemanticStore, tenant: str, partition: str) -> None:
    entry = entry_of(tenant, partition)
    store.put(entry, b"x" * 10_001, QUOTA)
    store.put(entry, BODY, weight(entry, BODY) - 1)
    await written(store)
    assert await store.load(partition) == ()
    assert await store.body(entry) is None


async def test_a_removed_entry_is_gone(store: SemanticStore, tenant: str, partition: str) -> None:
    heard = Heard()
    store.listen(heard)
    one, two, three = (entry_of(tenant, partition) for _ in range(3))
    for entry in (one, two, three):
        store.put(entry, BODY, QUOTA)
    await written(store)
    await store.remove(partition + "x", one.id)
    assert await store.body(one) == BODY
    await store.remove(partition, one.id)
    await store.remove_entry(two.id)
    assert [await store.body(entry) for entry in (one, two, three)] == [None, None, BODY]
    assert await store.load(partition) == (three,)
    assert {(partition, one.id), (partition, two.id)} <= set(heard.gone)
    assert set(heard.entries) == {three.id}
    assert (await store.size()).bytes[tenant] == weight(three, BODY)
    await store.remove(partition, one.id)
    await store.remove_entry("unknown")


async def test_removed_while_it_is_written(store: SemanticStore, tenant: str, partition: str) -> None:
    entries = [entry_of(tenant, partition) for _ in range(30)]
    for entry in entries:
        store.put(entry, BODY, QUOTA)
    await asyncio.sleep(0)
    await asyncio.gather(*(store.remove_entry(entry.id) for entry in entries))
    await written(store)
    assert [await store.body(entry) for entry in entries] == [None] * 30
    assert await store.load(partition) == ()


async def test_the_least_worth_a_byte_goes_first(store: SemanticStore, tenant: str, partition: str) -> None:
    """GreedyDual-Size-Frequency: dollars, hits and bytes all count, and age by what was let go before."""
    heard = Heard()
    store.listen(heard)
    dear = entry_of(tenant, partition, cost=9_000_000)
    cheap = entry_of(tenant, partition + "2", cost=1_000_000, id=f"{tenant}-2")
    # Were it not for its hits, this one would go before its equal.
    served = entry_of(tenant, partition, cost=1_000_000, id=f"{tenant}-1")
    large = entry_of(tenant, partition, cost=2_000_000)
    bodies = {dear.id: BODY, cheap.id: BODY, served.id: BODY, large.id: b"x" * 9_000}
    for entry in (dear, cheap, served, large):
        store.put(entry, bodies[entry.id], QUOTA)
        await written(store)
    for _ in range(2):
        store.served(served)
    await written(store)
    used = sum(weight(entry, bodies[entry.id]) for entry in (dear, cheap, served, large))
    assert (await store.size()).bytes[tenant] == used
    left = {dear.id, cheap.id, served.id, large.id}
    # 2 for 11,321 bytes, 1 for 2,336, 3 x 1 for 2,336, 9 for 2,336: each newcomer pushes out one.
    for victim in (large, cheap, served):
        new = entry_of(tenant, partition, cost=8_000_000)
        room = weight(new, BODY) - weight(victim, bodies[victim.id])
        store.put(new, BODY, used + room)
        await written(store)
        used += room
        left -= {victim.id}
        assert left <= set(heard.entries)
        assert victim.id not in heard.entries
        assert await store.body(victim) is None
    assert (await store.size()).bytes[tenant] == used
    # Who comes late starts above what went before: unserved, even the dearest goes for cheaper ones in the end.
    for _ in range(4):
        new = entry_of(tenant, partition, cost=8_000_000)
        store.put(new, BODY, used)
        await written(store)
        assert new.id in heard.entries
    assert dear.id not in heard.entries


async def test_quotas_are_each_tenants_own(store: SemanticStore, tenant: str, partition: str) -> None:
    other = entry_of("t" + tenant, partition + "x", cost=None)
    store.put(other, BODY, QUOTA)
    quota = 5 * weight(other, BODY)
    mine = [entry_of(tenant, partition, cost=None, id=f"{tenant}{i:02}") for i in range(12)]
    for entry in mine:
        store.put(entry, BODY, quota)
        await written(store)
    size = await store.size()
    assert size.bytes[tenant] <= quota
    loaded = await store.load(partition)
    assert loaded is not None
    # Equal in worth, the oldest went first.
    assert {entry.id for entry in loaded} == {entry.id for entry in mine[-5:]}
    assert await store.body(other) == BODY
    assert size.entries >= 6
    assert size.partitions >= 2


async def test_listeners_hear_what_is_put(store: SemanticStore, tenant: str, partition: str) -> None:
    heard = Heard()
    index = VectorIndex(SystemClock())
    store.listen(heard)
    store.listen(index)
    loaded = await store.load(partition)
    assert loaded == ()
    index.replace(partition, loaded)
    entries = [entry_of(tenant, partition, seed=i) for i in range(5)]
    for entry in entries:
        store.put(entry, BODY, QUOTA)
    await written(store)
    assert heard.entries == {entry.id: entry for entry in entries}
    near = index.near(partition, unit(3, 256))
    assert replace(near[0].entry, sketch=entries[3].sketch) == entries[3]
    assert near[0].similarity == pytest.approx(1.0, abs=5e-3)
    await store.remove_entry(entries[3].id)
    assert all(one.entry.id != entries[3].id for one in index.near(partition, unit(3, 256), floor=-1.0))


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["put", "put", "put", "served", "served", "remove"]),
            st.integers(0, 9),
            st.sampled_from([0, 0, 100, 2_000]),
            st.sampled_from([None, 100_000, 100_000, 250_000, 400_000]),
        ),
        min_size=10,
        max_size=60,
    ),
    quota=st.integers(5_000, 20_000),
)
def test_both_stores_let_the_same_go(
    valkey_server: ValkeyServer,  # noqa: F811
    steps: list[tuple[str, int, int, int | None]],
    quota: int,
) -> None:
    async def play(store: SemanticStore, tenant: str) -> tuple[set[str], int]:
        kept: list[SemanticEntry] = []
        for number, (what, which, length, cost) in enumerate(steps):
            if what == "put":
                entry = entry_of(tenant, f"{tenant}{which % 3}", id=f"{tenant}-{number:03}", cost=cost)
                kept.append(entry)
                store.put(entry, b"x" * length, quota)
            elif kept and what == "served":
                store.served(kept[which % len(kept)])
            elif kept:
                await store.remove_entry(kept[which % len(kept)].id)
            await written(store)
        left: set[str] = set()
        for third in range(3):
            left |= {entry.id[-3:] for entry in await store.load(f"{tenant}{third}") or ()}
        assert left == {entry.id[-3:] for entry in kept if await store.body(entry) is not None}
        return left, (await store.size()).bytes.get(tenant, 0)

    async def both() -> None:
        memory = MemorySemanticStore(SystemClock())
        connection = patient(valkey_server.url)
        redis = RedisSemanticStore(connection, SystemClock())
        tenant = uuid.uuid4().hex
        ours, theirs = await play(memory, tenant), await play(redis, tenant)
        assert ours == theirs
        assert ours[1] <= quota
        await redis.close()
        await connection.close()

    asyncio.run(both())


# Several workers on one Valkey.


async def test_a_second_worker_finds_what_the_first_stored(
    workers: list[RedisSemanticStore], tenant: str, partition: str
) -> None:
    first, second = workers
    heard = Heard()
    second.listen(heard)
    assert await second.load(partition) == ()
    entry = entry_of(tenant, partition)
    first.put(entry, BODY, QUOTA)
    await until(lambda: entry.id in heard.entries)
    assert heard.entries[entry.id] == entry
    assert await second.body(entry) == BODY
    # What the first removes is gone for the second before it could have heard of it.
    await first.remove_entry(entry.id)
    assert await second.body(entry) is None
    await until(lambda: (partition, entry.id) in heard.gone)
    assert heard.resets == 0


async def test_a_partition_nobody_asked_for_is_not_told(
    workers: list[RedisSemanticStore], tenant: str, partition: str
) -> None:
    first, second = workers
    index = VectorIndex(SystemClock())
    second.listen(index)
    index.replace(partition, await second.load(partition) or ())
    first.put(entry_of(tenant, partition + "x"), BODY, QUOTA)
    first.put(entry_of(tenant, partition), BODY, QUOTA)
    await until(lambda: index.entries == 1)
    assert not index.loaded(partition + "x")


async def test_nothing_is_missed_between_loading_and_hearing(
    workers: list[RedisSemanticStore], tenant: str, partition: str
) -> None:
    first, second = workers
    index = VectorIndex(SystemClock())
    second.listen(index)
    entries = [entry_of(tenant, partition, seed=i) for i in range(300)]
    gone = entries[::7]

    async def write() -> None:
        for entry in entries:
            first.put(entry, BODY, QUOTA)
            await asyncio.sleep(0.001)
        await written(first)
        for entry in gone:
            await first.remove(partition, entry.id)

    writing = asyncio.create_task(write())
    for _ in range(10):
        await asyncio.sleep(0.03)
        loaded = await second.load(partition)
        assert loaded is not None
        index.replace(partition, loaded)
    await writing
    await until(lambda: index.entries == len(entries) - len(gone))


@pytest.mark.parametrize("emptied", ["FLUSHALL", "trimmed", "older"])
async def test_a_gap_in_the_changes_makes_all_start_over(
    workers: list[RedisSemanticStore],
    connections: list[RedisConnection],
    tenant: str,
    partition: str,
    emptied: str,
) -> None:
    first, second = workers
    heard = Heard()
    second.listen(heard)
    await second.load(partition)
    first.put(entry_of(tenant, partition), BODY, QUOTA)
    await until(lambda: heard.entries)
    if emptied == "FLUSHALL":
        await connections[0].execute("FLUSHALL")
    elif emptied == "trimmed":
        # A fresh change in place of all known ones, in one step.
        words = ("XADD", "farthing:semantic:changes", "MAXLEN", 1, "*", "other", "version")
        await connections[0].execute(*words)
    else:
        await connections[0].execute("XTRIM", "farthing:semantic:changes", "MAXLEN", 0)
    await until(lambda: heard.resets == 1)
    assert not heard.entries
    # And it goes on from there.
    await second.load(partition)
    entry = entry_of(tenant, partition)
    first.put(entry, BODY, QUOTA)
    await until(lambda: entry.id in heard.entries)
    assert heard.resets == 1


async def test_a_late_write_does_not_bring_a_removed_entry_back(
    workers: list[RedisSemanticStore], tenant: str, partition: str
) -> None:
    first, second = workers
    entry = entry_of(tenant, partition)
    first.put(entry, BODY, QUOTA)
    await written(first)
    await first.remove_entry(entry.id)
    second.put(entry, BODY, QUOTA)
    await written(second)
    assert await second.body(entry) is None
    assert await second.load(partition) == ()


async def test_values_that_are_not_what_they_should_be_are_no_entries(
    workers: list[RedisSemanticStore], connections: list[RedisConnection], tenant: str, partition: str
) -> None:
    first, second = workers
    heard = Heard()
    second.listen(heard)
    entry, other = entry_of(tenant, partition), entry_of(tenant, partition + "x")
    for each in (entry, other):
        first.put(each, BODY, QUOTA)
    await written(first)
    prefix = f"farthing:semantic:{{{tenant}}}:"
    connection = connections[0]
    # Another partition's member and body in the place of this one's, another version, and garbage.
    foreign = await connection.execute("HGET", f"{prefix}members:{partition}x", other.id)
    await connection.execute(
        "HSET", f"{prefix}members:{partition}", other.id, foreign, "old", b"\x91\x07", "g", "g"
    )
    assert await second.load(partition) == (entry,)
    for value in (await connection.execute("GET", f"{prefix}body:{other.id}"), b"garbage", b"\x91\x07", b""):
        await connection.execute("SET", f"{prefix}body:{entry.id}", value, "PX", 60_000)
        assert await second.body(entry) is None
        assert (partition, entry.id) in heard.gone
    await written(second)
    assert await second.body(other) == BODY


async def test_a_body_the_server_let_go_takes_its_entry_along(
    workers: list[RedisSemanticStore], connections: list[RedisConnection], tenant: str, partition: str
) -> None:
    first, _ = workers
    entry = entry_of(tenant, partition)
    first.put(entry, BODY, QUOTA)
    await written(first)
    await connections[0].execute("UNLINK", f"farthing:semantic:{{{tenant}}}:body:{entry.id}")
    assert await first.body(entry) is None
    await written(first)
    assert await first.load(partition) == ()
    assert tenant not in (await first.size()).bytes


async def test_a_lost_account_starts_over(
    workers: list[RedisSemanticStore], connections: list[RedisConnection], tenant: str, partition: str
) -> None:
    first, _ = workers
    quota = 3 * weight(entry_of(tenant, partition), BODY)
    for lost in ("about", "worth", "ends"):
        for _ in range(3):
            first.put(entry_of(tenant, partition), BODY, quota)
        await written(first)
        await connections[0].execute("UNLINK", f"farthing:semantic:{{{tenant}}}:{lost}")
        last = entry_of(tenant, partition)
        first.put(last, BODY, quota)
        await written(first)
        assert await first.load(partition) == (last,)
        assert (await first.size()).bytes[tenant] == weight(last, BODY)


async def test_all_keys_end_with_their_entries(
    workers: list[RedisSemanticStore], connections: list[RedisConnection], tenant: str, partition: str
) -> None:
    first, _ = workers
    for ttl in (30, 90, 20):
        first.put(entry_of(tenant, partition, ttl=ttl), BODY, QUOTA)
        await written(first)
    keys = await connections[0].execute("KEYS", f"*{tenant}*")
    keys += await connections[0].execute("KEYS", f"*{partition}")
    assert len(keys) >= 8
    for key in keys:
        left = await connections[0].execute("PTTL", key)
        assert 0 < left <= 90_000 + 3_600_000, key
        if b":body:" not in key:
            assert left > 80_000, key


async def test_scripts_touch_one_slot(monkeypatch: pytest.MonkeyPatch, valkey_server: ValkeyServer) -> None:  # noqa: F811
    connection = patient(valkey_server.url)
    store = RedisSemanticStore(connection, SystemClock())
    slots: list[set[int]] = []
    run = RedisConnection.run

    async def watched(
        self: RedisConnection, script: Script, keys: list[str], *rest: object, **more: object
    ) -> object:
        slots.append({key_slot(key.encode()) for key in keys})
        if len(keys) > 1:
            assert rest[0][0] == keys[0].removesuffix("about")  # type: ignore[index]
            assert key_slot(str(rest[0][0]).encode()) in slots[-1]  # type: ignore[index]
        return await run(self, script, keys, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(RedisConnection, "run", watched)
    tenant = uuid.uuid4().hex
    entries = [entry_of(tenant, uuid.uuid4().hex) for _ in range(8)]
    for entry in entries:
        store.put(entry, BODY, 5 * weight(entry, BODY))
    await written(store)
    store.served(entries[-1])
    await written(store)
    await store.remove_entry(entries[-1].id)
    await store.size()
    assert len(slots) > 16
    assert all(len(each) == 1 for each in slots)
    await store.close()
    await connection.close()


async def test_a_cluster_serves_entries(tenant: str, partition: str) -> None:
    server = ValkeyServer("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    try:
        assert server.command("CLUSTER", "ADDSLOTSRANGE", "0", "16383") == b"+OK"
        url = server.url.replace("redis://", "redis+cluster://").removesuffix("/0")
        for _ in range(600):
            if await (connection := patient(url)).ping():
                break
            await connection.close()
            await asyncio.sleep(0.1)
        store = RedisSemanticStore(connection, SystemClock(), poll_every=0.02)
        other = RedisSemanticStore(connection, SystemClock(), poll_every=0.02)
        heard = Heard()
        other.listen(heard)
        assert await other.load(partition) == ()
        entries = [entry_of(tenant, partition, seed=i) for i in range(20)]
        quota = 10 * weight(entries[0], BODY)
        for entry in entries:
            store.put(entry, BODY, quota)
        await written(store)
        loaded = await store.load(partition)
        assert loaded is not None
        assert len(loaded) == 10
        await until(lambda: set(heard.entries) == {entry.id for entry in loaded})
        store.served(loaded[0])
        await other.remove_entry(loaded[0].id)
        assert await store.body(loaded[0]) is None
        assert await store.body(loaded[1]) == BODY
        assert (await store.size()).entries == 9
        assert connection.status().failures == 0
        await store.close()
        await other.close()
        await connection.close()
    finally:
        server.close()
