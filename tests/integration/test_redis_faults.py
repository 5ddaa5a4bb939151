"""What a frozen, killed, emptied or read-only Valkey costs, and that no money is lost or spent twice."""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from router.adapters.memory import MemorySpendSource
from router.adapters.redis_store import RedisBudgetStore, RedisCacheStore, RedisConnection, connect
from router.adapters.system import SystemClock
from router.core.errors import ConfigurationError, UnavailableError
from router.core.ports import BudgetCharge, Denied, Granted
from router.core.types import BudgetWindow, NanoUSD
from tests.contracts.valkey_server import ValkeyServer, free_port, patient

WORKERS = 4
LAG = 0.3


@pytest.fixture
def source() -> MemorySpendSource:
    return MemorySpendSource()


@pytest.fixture
async def store(connection: RedisConnection, source: MemorySpendSource) -> AsyncIterator[RedisBudgetStore]:
    store = RedisBudgetStore(connection, source, SystemClock(), workers=WORKERS, ledger_lag=LAG)
    yield store
    await store.close()


@pytest.fixture
def window() -> BudgetWindow:
    return BudgetWindow(f"team:{uuid.uuid4()}", "2026-11")


def charge(window: BudgetWindow, cap: int | None) -> BudgetCharge:
    return BudgetCharge(window, None if cap is None else NanoUSD(cap))


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


async def state(store: RedisBudgetStore, window: BudgetWindow) -> tuple[int, int]:
    (reading,) = await store.readings([window])
    return reading.spent, reading.held


async def reads(store: RedisBudgetStore, window: BudgetWindow, expected: tuple[int, int]) -> None:
    """Until the window reads so."""
    for _ in range(3000):
        if (found := await state(store, window)) == expected:
            return
        await asyncio.sleep(0.02)
    assert found == expected


async def take(store: RedisBudgetStore, window: BudgetWindow, cap: int, prefix: str) -> list[str]:
    """Reserves 1 until it is denied; the ids of the holds."""
    holds = []
    while isinstance(
        await store.reserve(f"{prefix}{len(holds)}", [charge(window, cap)], NanoUSD(1)), Granted
    ):
        holds.append(f"{prefix}{len(holds)}")
    return holds


async def test_a_frozen_server_costs_fifty_milliseconds_once(
    server: ValkeyServer, connection: RedisConnection, store: RedisBudgetStore, window: BudgetWindow
) -> None:
    cache = RedisCacheStore(connection)
    await store.reserve("before", [charge(window, 1000)], NanoUSD(100))
    server.freeze(connection)
    began = now()
    outcomes = await asyncio.gather(
        *(store.reserve(f"h{i}", [charge(window, 1000)], NanoUSD(1)) for i in range(100)),
        *(cache.get(f"k{i}") for i in range(100)),
    )
    first = now() - began
    assert all(isinstance(outcome, Granted) for outcome in outcomes[:100])
    assert outcomes[100:] == [None] * 100
    # 50 ms, and what a loaded machine adds.
    assert first < 0.3
    began = now()
    for i in range(200):
        assert await cache.get(f"k{i}") is None
        cache.put(f"k{i}", b"x", 60)
    # A quarter of what was left: 225, of which 100 are gone.
    assert len(await take(store, window, 1000, "late")) == 125
    assert now() - began < 0.1
    assert not connection.status().up
    assert connection.status().failures == 1

    for i in range(100):
        store.settle(f"h{i}", [window], NanoUSD(1))
    store.settle("before", [window], NanoUSD(40))
    server.thaw(connection)
    assert await until(lambda: connection.up) < 5.0
    # Everything was delivered before the breaker closed: 140 settled, 125 in flight.
    assert await state(store, window) == (140, 125)
    for i in range(125):
        store.settle(f"late{i}", [window], NanoUSD(1))
    await until(lambda: store.pending == 0)
    assert await state(store, window) == (265, 0)
    await cache.close()


async def test_a_reservation_that_reached_a_frozen_server_leaves_no_hold(
    server: ValkeyServer, connection: RedisConnection, store: RedisBudgetStore, window: BudgetWindow
) -> None:
    await store.reserve("before", [charge(window, 100)], NanoUSD(4))
    server.freeze(connection)
    assert isinstance(await store.reserve("doomed", [charge(window, 100)], NanoUSD(90)), Denied)
    server.thaw(connection)
    await until(lambda: connection.up)
    assert await state(store, window) == (0, 4)


async def test_a_cancelled_reservation_leaves_no_hold(
    server: ValkeyServer, store: RedisBudgetStore, window: BudgetWindow
) -> None:
    await store.reserve("before", [charge(window, 100)], NanoUSD(4))
    for i in range(20):
        task = asyncio.create_task(store.reserve(f"c{i}", [charge(window, 100)], NanoUSD(1)))
        for _ in range(i % 6):
            await asyncio.sleep(0)
        task.cancel()
        if (await asyncio.gather(task, return_exceptions=True)) and not task.cancelled():
            store.settle(f"c{i}", [window], NanoUSD(0))
    await until(lambda: store.pending == 0)
    assert await state(store, window) == (0, 4)


async def test_without_redis_a_budget_never_read_is_refused_and_one_without_a_cap_is_not(
    server: ValkeyServer, connection: RedisConnection, store: RedisBudgetStore, window: BudgetWindow
) -> None:
    server.kill()
    with pytest.raises(UnavailableError):
        await store.reserve("a", [charge(window, 10)], NanoUSD(1))
    assert await store.reserve("b", [charge(window, None)], NanoUSD(1)) == Granted(())
    with pytest.raises(UnavailableError):
        await store.readings([window])
    assert not await connection.ping()


async def test_a_server_that_returns_empty_is_seeded_from_the_ledger(
    server: ValkeyServer,
    connection: RedisConnection,
    store: RedisBudgetStore,
    source: MemorySpendSource,
    window: BudgetWindow,
) -> None:
    source.amounts[window] = 500
    await store.reserve("flying", [charge(window, 1000)], NanoUSD(100))
    await store.reserve("landing", [charge(window, 1000)], NanoUSD(50))
    server.kill()
    alone = await take(store, window, 1000, "alone")
    assert len(alone) == (1000 - 500 - 150) // WORKERS
    # Settled while Redis is away: the ledger has them by the time it is read again.
    for hold in alone:
        store.settle(hold, [window], NanoUSD(1))
    store.settle("landing", [window], NanoUSD(50))
    source.amounts[window] += len(alone) + 50
    await asyncio.sleep(LAG)
    server.start()
    await until(lambda: connection.up)
    # Until it is seeded again this worker goes on with what was its share, and that is used up but for
    # what the settlements gave back.
    assert isinstance(await store.reserve("more", [charge(window, 1000)], NanoUSD(300)), Denied)
    expected = (500 + len(alone) + 50, 100)
    for _ in range(3000):
        if await state(store, window) == expected:
            break
        await asyncio.sleep(0.02)
    assert await state(store, window) == expected


@pytest.mark.parametrize("loss", ["FLUSHALL", "evicted"])
async def test_a_window_lost_without_an_outage_is_never_taken_for_empty(
    server: ValkeyServer,
    store: RedisBudgetStore,
    source: MemorySpendSource,
    window: BudgetWindow,
    loss: str,
) -> None:
    source.amounts[window] = 950
    await store.reserve("flying", [charge(window, 1000)], NanoUSD(30))
    if loss == "FLUSHALL":
        server.command("FLUSHALL")
    else:
        server.command("DEL", f"{{farthing:budget}}:{window.period}:{window.key}")
    for i in range(100):
        assert isinstance(await store.reserve(f"x{i}", [charge(window, 1000)], NanoUSD(21)), Denied)
        await asyncio.sleep(0.005)
    assert await state(store, window) == (950, 30)
    store.settle("flying", [window], NanoUSD(20))
    await until(lambda: store.pending == 0)
    assert await state(store, window) == (970, 0)


async def test_another_worker_puts_its_holds_back_too(
    server: ValkeyServer, store: RedisBudgetStore, source: MemorySpendSource, window: BudgetWindow
) -> None:
    other_connection = patient(server.url)
    other = RedisBudgetStore(other_connection, source, SystemClock(), workers=WORKERS, ledger_lag=LAG)
    await store.reserve("mine", [charge(window, 1000)], NanoUSD(10))
    await other.reserve("theirs", [charge(window, 1000)], NanoUSD(20))
    server.command("FLUSHALL")
    await state(store, window)
    await reads(store, window, (0, 10))
    await state(other, window)
    await reads(store, window, (0, 30))
    await other.close()
    await other_connection.close()


async def test_the_share_of_a_worker_that_was_idle_is_part_of_what_others_left(
    server: ValkeyServer,
    connection: RedisConnection,
    store: RedisBudgetStore,
    source: MemorySpendSource,
    window: BudgetWindow,
) -> None:
    other_connection = patient(server.url)
    other = RedisBudgetStore(other_connection, source, SystemClock(), workers=WORKERS)
    await store.reserve("idle", [charge(window, 1000)], NanoUSD(0))
    await other.reserve("all", [charge(window, 1000)], NanoUSD(960))
    await until(lambda: store._reading(window).held == 960)
    server.freeze(connection, other_connection)
    # Silent for a moment, Redis may still serve the others: so near its cap nothing is spent on a guess.
    outcome = await store.reserve("early", [charge(window, 1000)], NanoUSD(1))
    assert isinstance(outcome, Denied)
    assert outcome.only_held
    await until(lambda: not connection.suspected)
    assert len(await take(store, window, 1000, "mine")) == 10
    server.thaw(connection, other_connection)
    await other.close()
    await other_connection.close()


@pytest.mark.parametrize(
    ("breaking", "healing"),
    [
        (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
        (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
    ],
    ids=["out of memory", "read-only replica"],
)
async def test_a_server_that_takes_no_writes_counts_as_away(
    server: ValkeyServer,
    connection: RedisConnection,
    store: RedisBudgetStore,
    window: BudgetWindow,
    breaking: tuple[str, ...],
    healing: tuple[str, ...],
) -> None:
    await store.reserve("before", [charge(window, 100)], NanoUSD(20))
    assert server.command(*breaking).startswith(b"+OK")
    assert len(await take(store, window, 100, "alone")) == 20
    assert not connection.up
    await asyncio.sleep(1.2)
    assert not connection.up
    store.settle("before", [window], NanoUSD(15))
    assert server.command(*healing).startswith(b"+OK")
    await until(lambda: connection.up)
    assert await state(store, window) == (15, 20)


async def test_more_settlements_than_are_kept_make_the_window_start_from_the_ledger(
    server: ValkeyServer, connection: RedisConnection, source: MemorySpendSource, window: BudgetWindow
) -> None:
    store = RedisBudgetStore(connection, source, SystemClock(), workers=1, ledger_lag=0.05, max_pending=10)
    for i in range(50):
        await store.reserve(f"h{i}", [charge(window, 1000)], NanoUSD(2))
    server.freeze(connection)
    assert isinstance(await store.reserve("h50", [charge(window, 1000)], NanoUSD(2)), Granted)
    for i in range(51):
        store.settle(f"h{i}", [window], NanoUSD(1))
    source.amounts[window] = 51
    assert store.pending == 10
    await asyncio.sleep(0.1)
    server.thaw(connection)
    await until(lambda: connection.up)
    await reads(store, window, (51, 0))
    await store.close()


async def test_a_busy_event_loop_is_not_taken_for_a_frozen_server(
    connection: RedisConnection, store: RedisBudgetStore, window: BudgetWindow
) -> None:
    """Busy for a second, twice what is waited for Redis here; the server itself may be let run late as well."""
    cache = RedisCacheStore(connection)
    await store.reserve("before", [charge(window, 1000)], NanoUSD(1))
    connection._timeout = 0.5

    async def hog() -> None:
        for _ in range(10):
            time.sleep(0.1)  # noqa: ASYNC251
            await asyncio.sleep(0)

    outcomes, _, _ = await asyncio.gather(
        asyncio.gather(*(store.reserve(f"h{i}", [charge(window, 1000)], NanoUSD(1)) for i in range(40))),
        asyncio.gather(*(cache.get(f"k{i}") for i in range(40))),
        hog(),
    )
    assert all(isinstance(outcome, Granted) for outcome in outcomes)
    assert connection.status().failures == 0


async def test_the_cache_comes_back_by_itself(server: ValkeyServer, connection: RedisConnection) -> None:
    cache = RedisCacheStore(connection)
    cache.put("k", b"value", 60)
    await until(lambda: not cache._pending)
    server.kill()
    # What this worker put or read is still served, and what it deletes is gone.
    assert await cache.get("k") == b"value"
    with pytest.raises(UnavailableError):
        await cache.delete("k")
    assert await cache.get("k") is None
    cache.put("k", b"alone", 60)
    assert await cache.get("k") == b"alone"
    server.start()
    await until(lambda: connection.up)
    assert await cache.get("k") is None
    cache.put("k", b"value", 60)
    await until(lambda: not cache._pending)
    assert await cache.get("k") == b"value"
    await cache.close()


async def test_what_is_remembered_without_redis_ends_in_time_and_is_bounded(
    server: ValkeyServer, connection: RedisConnection
) -> None:
    now = 1000.0
    writer = RedisCacheStore(connection, now=lambda: now)
    cache = RedisCacheStore(connection, memory_bytes=3_000, now=lambda: now)
    for name in ("a", "b", "c", "d"):
        writer.put(name, name.encode() * 1000, 60)
    writer.put("short", b"short", 10)
    await writer.close()
    for name in ("a", "b", "c", "d", "short"):
        assert await cache.get(name) is not None
    # Deleted by another worker, and seen to be gone.
    await writer.delete("c")
    assert await cache.get("c") is None
    server.kill()
    assert [await cache.get(name) for name in ("a", "b", "c")] == [None] * 3
    assert await cache.get("d") == b"d" * 1000
    assert await cache.get("short") == b"short"
    now += 11
    assert await cache.get("short") is None
    now += 50
    assert await cache.get("d") is None


async def test_a_value_of_another_version_is_none(connection: RedisConnection) -> None:
    cache = RedisCacheStore(connection)
    for value in (b"", b"\x01", b"\x07" + b"x" * 100):
        await connection.execute("SET", "farthing:cache:k", value)
        assert await cache.get("k") is None


async def test_writes_waiting_for_the_cache_are_bounded(connection: RedisConnection) -> None:
    cache = RedisCacheStore(connection, max_pending=5)
    for i in range(20):
        cache.put(f"k{i}", b"value", 60)
    assert cache.dropped == 15
    await cache.close()
    assert await cache.get("k4") == b"value"
    assert await cache.get("k5") is None


async def test_a_password_is_used_and_never_told() -> None:
    server = ValkeyServer("--requirepass", "sesame-open")
    try:
        good = connect(server.url.replace("redis://", "redis://:sesame-open@"))
        wrong = connect(server.url.replace("redis://", "redis://:sesame-shut@"))
        assert await good.ping()
        assert not await wrong.ping()
        assert "sesame" not in wrong.status().last_error
        await good.close()
        await wrong.close()
    finally:
        server.close()
    with pytest.raises(ConfigurationError) as refused:
        connect("http://:sesame-open@localhost")
    assert "sesame" not in str(refused.value)


async def test_a_cluster_serves_budgets_and_cache(window: BudgetWindow) -> None:
    server = ValkeyServer("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    try:
        assert server.command("CLUSTER", "ADDSLOTSRANGE", "0", "16383") == b"+OK"
        url = server.url.replace("redis://", "redis+cluster://").removesuffix("/0")
        # A node takes some seconds to find its cluster complete; meanwhile it refuses everything.
        for _ in range(600):
            if await (connection := patient(url)).ping():
                break
            await connection.close()
            await asyncio.sleep(0.1)
        store = RedisBudgetStore(connection, MemorySpendSource({window: 5}), SystemClock())
        cache = RedisCacheStore(connection)
        assert isinstance(await store.reserve("a", [charge(window, 10)], NanoUSD(5)), Granted)
        assert isinstance(await store.reserve("b", [charge(window, 10)], NanoUSD(1)), Denied)
        store.settle("a", [window], NanoUSD(4))
        for i in range(20):
            cache.put(f"k{i}", b"value", 60)
        await cache.close()
        assert [await cache.get(f"k{i}") for i in range(20)] == [b"value"] * 20
        await until(lambda: store.pending == 0)
        assert await state(store, window) == (9, 0)
        await store.close()
        await connection.close()
    finally:
        server.close()


async def test_four_processes_fill_one_window_and_never_pass_its_cap(
    server: ValkeyServer, store: RedisBudgetStore, window: BudgetWindow
) -> None:
    cap = 100_000
    script = Path(__file__).with_name("redis_worker.py")
    root = Path(__file__).parents[2]
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.integration." + script.stem),
            *(server.url, window.key, window.period, str(cap)),
            cwd=root,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
    outputs = await asyncio.gather(*(process.communicate(b"") for process in processes))
    assert [process.returncode for process in processes] == [0] * 4
    spent = [int(stdout.split()[0]) for stdout, _ in outputs]
    peak = [int(stdout.split()[1]) for stdout, _ in outputs]
    assert max(peak) <= cap
    assert 0.9 * cap <= sum(spent) <= cap
    assert all(amount > 0 for amount in spent)
    assert await state(store, window) == (sum(spent), 0)


async def test_workers_of_other_machines_count_for_the_share(server: ValkeyServer) -> None:
    window = BudgetWindow("team:many", "2026-11")
    source = MemorySpendSource({window: 0})
    connections = [patient(server.url) for _ in range(3)]
    stores = [
        RedisBudgetStore(connection, source, SystemClock(), workers=1, ledger_lag=LAG)
        for connection in connections
    ]
    charge = [BudgetCharge(window, NanoUSD(900))]
    for number, store in enumerate(stores):
        assert isinstance(await store.reserve(f"first-{number}", charge, NanoUSD(0)), Granted)
    await until(lambda: all(store._seen_workers == 3 for store in stores))
    server.freeze(*connections)
    try:
        alone = stores[0]
        granted = 0
        for number in range(40):
            outcome = await alone.reserve(f"alone-{number}", charge, NanoUSD(50))
            granted += isinstance(outcome, Granted)
            await asyncio.sleep(0.05)
        assert 0 < granted * 50 <= 300  # a third of 900, not all of it
    finally:
        server.thaw()
        for store, connection in zip(stores, connections, strict=True):
            await store.close()
            await connection.close()
