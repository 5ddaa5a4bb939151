"""One suite for both budget stores: counters are atomic over all windows and seeded from the ledger."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest

from router.adapters.memory import MemoryBudgetStore, MemorySpendSource
from router.adapters.redis_store import RedisBudgetStore, RedisConnection
from router.adapters.system import SystemClock
from router.core.errors import UnavailableError
from router.core.ports import BudgetCharge, BudgetReading, BudgetStore, Denied, Granted, SpendSource
from router.core.types import BudgetWindow, NanoUSD
from tests.contracts.valkey_server import ValkeyServer, patient, valkey_server  # noqa: F401

USD = 1_000_000_000
LIVES = (0.4, 1.5, 6.0)
"""Seconds that a hold lives: a longer life is tried where the machine stood still for most of a shorter one."""


class Stores:
    """Makes stores of one kind; those on Redis share one server."""

    def __init__(self, server: ValkeyServer | None) -> None:
        self.server = server
        self._opened: list[tuple[BudgetStore, RedisConnection | None]] = []

    def make(self, source: SpendSource | None = None, hold_ttl: float = 900.0) -> BudgetStore:
        source = source or MemorySpendSource()
        connection = None
        store: BudgetStore
        if self.server is None:
            store = MemoryBudgetStore(source, SystemClock(), hold_ttl=hold_ttl)
        else:
            connection = patient(self.server.url)
            store = RedisBudgetStore(connection, source, SystemClock(), workers=2, hold_ttl=hold_ttl)
        self._opened.append((store, connection))
        return store

    async def close(self) -> None:
        for store, connection in self._opened:
            await store.close()
            if connection is not None:
                await connection.close()


@pytest.fixture(params=["memory", "valkey"])
async def stores(request: pytest.FixtureRequest) -> AsyncIterator[Stores]:
    server = request.getfixturevalue("valkey_server") if request.param == "valkey" else None
    if server is not None:
        # Ids of holds are unique in life; these tests call theirs a, b and c.
        server.command("FLUSHALL")
    stores = Stores(server)
    yield stores
    await stores.close()


@pytest.fixture
def team() -> BudgetWindow:
    return BudgetWindow(f"team:{uuid.uuid4()}", "2026-11")


@pytest.fixture
def organisation() -> BudgetWindow:
    return BudgetWindow(f"organisation:{uuid.uuid4()}", "2026-11")


def charge(window: BudgetWindow, cap: int | None) -> BudgetCharge:
    return BudgetCharge(window, None if cap is None else NanoUSD(cap))


async def settled(store: BudgetStore, window: BudgetWindow, spent: int, held: int = 0) -> None:
    """Settlements are delivered in the background: waits until the window reads as it should."""
    reading = None
    for _ in range(3000):
        (reading,) = await store.readings([window])
        if (reading.spent, reading.held) == (spent, held):
            return
        await asyncio.sleep(0.01)
    assert (reading.spent, reading.held) == (spent, held)  # type: ignore[union-attr]


async def delivered(store: RedisBudgetStore) -> None:
    for _ in range(3000):
        if not store.pending:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("settlements wait still")


async def test_a_reservation_is_held_and_its_settlement_booked(
    stores: Stores, team: BudgetWindow, organisation: BudgetWindow
) -> None:
    store = stores.make()
    outcome = await store.reserve("a", [charge(organisation, None), charge(team, 10)], NanoUSD(7))
    assert outcome == Granted(
        (BudgetReading(organisation, NanoUSD(0), NanoUSD(7)), BudgetReading(team, NanoUSD(0), NanoUSD(7)))
    )
    store.settle("a", [organisation, team], NanoUSD(5))
    await settled(store, team, 5)
    await settled(store, organisation, 5)


async def test_all_windows_are_held_or_none(
    stores: Stores, team: BudgetWindow, organisation: BudgetWindow
) -> None:
    store = stores.make()
    outcome = await store.reserve("a", [charge(organisation, 100), charge(team, 5)], NanoUSD(6))
    assert outcome == Denied(charge(team, 5), BudgetReading(team, NanoUSD(0), NanoUSD(0)), only_held=False)
    assert await store.readings([organisation]) == (BudgetReading(organisation, NanoUSD(0), NanoUSD(0)),)


async def test_the_first_window_without_room_is_named(
    stores: Stores, team: BudgetWindow, organisation: BudgetWindow
) -> None:
    outcome = await stores.make().reserve("a", [charge(organisation, 3), charge(team, 3)], NanoUSD(4))
    assert isinstance(outcome, Denied)
    assert outcome.charge.window == organisation


async def test_only_held_says_whether_waiting_can_help(stores: Stores, team: BudgetWindow) -> None:
    store = stores.make(MemorySpendSource({team: 4}))
    assert isinstance(await store.reserve("a", [charge(team, 10)], NanoUSD(4)), Granted)
    blocked = await store.reserve("b", [charge(team, 10)], NanoUSD(6))
    hopeless = await store.reserve("c", [charge(team, 10)], NanoUSD(7))
    reading = BudgetReading(team, NanoUSD(4), NanoUSD(4))
    assert blocked == Denied(charge(team, 10), reading, only_held=True)
    assert hopeless == Denied(charge(team, 10), reading, only_held=False)
    store.settle("a", [team], NanoUSD(0))
    await settled(store, team, 4)
    assert isinstance(await store.reserve("b", [charge(team, 10)], NanoUSD(6)), Granted)


async def test_a_window_may_be_filled_to_its_cap_exactly(stores: Stores, team: BudgetWindow) -> None:
    store = stores.make()
    assert isinstance(await store.reserve("a", [charge(team, 10)], NanoUSD(10)), Granted)
    assert isinstance(await store.reserve("b", [charge(team, 10)], NanoUSD(0)), Granted)
    assert isinstance(await store.reserve("c", [charge(team, 10)], NanoUSD(1)), Denied)
    store.settle("b", [team], NanoUSD(0))
    await settled(store, team, 0, held=10)


async def test_sums_stay_exact_where_doubles_are_not(stores: Stores, team: BudgetWindow) -> None:
    spent = 2**53 + 1
    store = stores.make(MemorySpendSource({team: spent}))
    assert isinstance(await store.reserve("a", [charge(team, spent + 1)], NanoUSD(2)), Denied)
    assert isinstance(await store.reserve("a", [charge(team, spent + 1)], NanoUSD(1)), Granted)
    store.settle("a", [team], NanoUSD(1))
    await settled(store, team, spent + 1)


async def test_a_top_up_adds_to_the_hold(stores: Stores, team: BudgetWindow) -> None:
    store = stores.make()
    await store.reserve("a", [charge(team, 10)], NanoUSD(4))
    assert isinstance(await store.reserve("a", [charge(team, 10)], NanoUSD(4)), Granted)
    assert isinstance(await store.reserve("a", [charge(team, 10)], NanoUSD(4)), Denied)
    await settled(store, team, 0, held=8)
    store.settle("a", [team], NanoUSD(3))
    await settled(store, team, 3)


async def test_a_cap_of_none_only_counts(stores: Stores, team: BudgetWindow) -> None:
    store = stores.make(MemorySpendSource({team: 10 * USD}))
    assert isinstance(await store.reserve("a", [charge(team, None)], NanoUSD(USD)), Granted)
    await settled(store, team, 10 * USD, held=USD)


async def test_no_charge_is_granted(stores: Stores) -> None:
    assert await stores.make().reserve("a", [], NanoUSD(5)) == Granted(())


async def test_a_negative_amount_is_refused(stores: Stores, team: BudgetWindow) -> None:
    with pytest.raises(ValueError, match="negative"):
        await stores.make().reserve("a", [charge(team, 5)], NanoUSD(-1))


async def test_settling_twice_books_once(stores: Stores, team: BudgetWindow) -> None:
    store = stores.make()
    await store.reserve("a", [charge(team, 10)], NanoUSD(5))
    for _ in range(3):
        store.settle("a", [team], NanoUSD(4))
    await settled(store, team, 4)
    store.settle("a", [team], NanoUSD(4))
    await asyncio.sleep(0.05)
    await settled(store, team, 4)


async def test_periods_are_counted_apart(stores: Stores, team: BudgetWindow) -> None:
    store = stores.make()
    december = BudgetWindow(team.key, "2026-12")
    await store.reserve("a", [charge(team, 10)], NanoUSD(10))
    assert isinstance(await store.reserve("b", [charge(december, 10)], NanoUSD(10)), Granted)


async def test_an_expired_hold_vanishes_and_its_cost_is_still_booked_once(
    stores: Stores, team: BudgetWindow
) -> None:
    for ttl in LIVES:
        team = BudgetWindow(f"team:{uuid.uuid4()}", "2026-11")
        a, b = f"a{ttl}", f"b{ttl}"
        store, began = stores.make(hold_ttl=ttl), time.monotonic()
        await store.reserve(a, [charge(team, 10)], NanoUSD(10))
        outcome = await store.reserve(b, [charge(team, 10)], NanoUSD(1))
        if time.monotonic() - began < ttl:
            break
    assert isinstance(outcome, Denied)
    for _ in range(3000):
        await asyncio.sleep(0.02)
        outcome = await store.reserve(b, [charge(team, 10)], NanoUSD(1))
        if isinstance(outcome, Granted):
            break
    assert isinstance(outcome, Granted)
    store.settle(a, [team], NanoUSD(2))
    store.settle(a, [team], NanoUSD(2))
    store.settle(b, [team], NanoUSD(1))
    await settled(store, team, 3)


async def test_a_top_up_renews_the_hold(stores: Stores) -> None:
    for ttl in LIVES:
        team = BudgetWindow(f"team:{uuid.uuid4()}", "2026-11")
        a, b = f"a{ttl}", f"b{ttl}"
        store, began = stores.make(hold_ttl=ttl), time.monotonic()
        for hold in (a, b):
            await store.reserve(hold, [charge(team, 10)], NanoUSD(1))
        both = time.monotonic()
        await asyncio.sleep(0.6 * ttl)
        again = time.monotonic()
        await store.reserve(a, [charge(team, 10)], NanoUSD(1))
        lived = time.monotonic() - began < ttl
        await asyncio.sleep(max(0.0, both + ttl - time.monotonic()))
        (reading,) = await store.readings([team])
        if lived and time.monotonic() - again < ttl:
            break
    assert (reading.spent, reading.held) == (0, 2)


async def test_a_window_is_seeded_from_the_ledger_once(stores: Stores, team: BudgetWindow) -> None:
    source = MemorySpendSource({team: 8})
    store = stores.make(source)
    outcomes = await asyncio.gather(
        *(store.reserve(f"h{i}", [charge(team, 10)], NanoUSD(1)) for i in range(10))
    )
    assert sum(isinstance(outcome, Granted) for outcome in outcomes) == 2
    assert source.reads == 1


async def test_without_the_ledger_a_window_is_never_taken_for_empty(
    stores: Stores, team: BudgetWindow
) -> None:
    source = MemorySpendSource({team: 8})
    source.away = True
    store = stores.make(source)
    with pytest.raises(UnavailableError):
        await store.reserve("a", [charge(team, 10)], NanoUSD(1))
    with pytest.raises(UnavailableError):
        await store.readings([team])
    source.away = False
    outcome = await store.reserve("a", [charge(team, 10)], NanoUSD(1))
    assert outcome == Granted((BudgetReading(team, NanoUSD(8), NanoUSD(1)),))


class SlowSource:
    """Lets something happen between the first reading and its return; later readings see `after`."""

    def __init__(self, before: int, after: int) -> None:
        self.amount, self._after = before, after
        self.reading = asyncio.Event()
        self.go_on = asyncio.Event()

    async def spent(self, windows: Sequence[BudgetWindow]) -> Mapping[BudgetWindow, NanoUSD]:
        amount, self.amount = self.amount, self._after
        self.reading.set()
        await self.go_on.wait()
        return dict.fromkeys(windows, NanoUSD(amount))


async def test_a_settlement_while_the_ledger_is_read_is_not_lost(stores: Stores, team: BudgetWindow) -> None:
    source = SlowSource(before=3, after=5)
    store, other = stores.make(source), None
    if stores.server is not None:
        other = stores.make()
    waiting = asyncio.create_task(store.reserve("a", [charge(team, 100)], NanoUSD(1)))
    await source.reading.wait()
    (other or store).settle("b", [team], NanoUSD(2))
    if isinstance(other, RedisBudgetStore):
        await delivered(other)
    source.go_on.set()
    assert await waiting == Granted((BudgetReading(team, NanoUSD(5), NanoUSD(1)),))


async def test_two_hundred_concurrent_requests_fill_a_window_and_never_pass_its_cap(
    stores: Stores, team: BudgetWindow, organisation: BudgetWindow
) -> None:
    store = stores.make()
    cap, worst, cost = 1000, 10, 7
    granted = 0

    async def request(number: int) -> None:
        nonlocal granted
        hold = f"h{number}"
        charges = [charge(organisation, None), charge(team, cap)]
        if isinstance(outcome := await store.reserve(hold, charges, NanoUSD(worst)), Granted):
            granted += 1
            assert all(r.spent + r.held <= cap for r in outcome.readings)
            await asyncio.sleep(0)
            store.settle(hold, [organisation, team], NanoUSD(cost))

    for start in range(0, 1000, 200):
        await asyncio.gather(*(request(start + i) for i in range(200)))
        await settled(store, team, granted * cost)
    assert 0.9 * cap <= granted * cost <= cap
    await settled(store, organisation, granted * cost)
