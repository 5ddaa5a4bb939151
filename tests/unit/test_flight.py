"""One call and everyone who reads it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from decimal import Decimal
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from router.core.errors import RequestError, UpstreamFailed
from router.core.policy import CachePolicy
from router.stages.exchange import Exchange
from router.stages.flight import AHEAD, KEEP, Flight, FlightLost, Flights, Head, Subscription
from tests.unit.pipeline_parts import GOOD_ANSWER, GOOD_STREAM, Rig, Script, chunk, eventually

HEAD = Head("m", "p", {})
Run = Callable[[Exchange, Flight], Awaitable[None]]


def leader() -> Exchange:
    policy = SimpleNamespace(cache=CachePolicy())
    return cast(Exchange, SimpleNamespace(request=SimpleNamespace(stream=True), generation=0, policy=policy))


def fly(run: Run, landed: list[Flight] | None = None) -> Flight:
    flight = Flight("key", leader())
    flight.start(run, lambda _, flown: landed.append(flown) if landed is not None else None)
    return flight


async def read(subscription: Subscription) -> bytes:
    try:
        return b"".join([frame async for frame in subscription.frames()])
    finally:
        subscription.close()


async def test_everyone_gets_everything_however_late() -> None:
    go = asyncio.Event()

    async def run(_: Exchange, flight: Flight) -> None:
        flight.begin(HEAD)
        for number in range(50):
            flight.append(b"%d," % number)
            if number == 25:
                await go.wait()
            await asyncio.sleep(0)

    landed: list[Flight] = []
    flight = fly(run, landed)
    early = asyncio.create_task(read(flight.subscribe()))
    await asyncio.sleep(0.02)
    late = asyncio.create_task(read(flight.subscribe()))
    assert flight.joinable
    go.set()
    everything = b"".join(b"%d," % number for number in range(50))
    assert await early == await late == everything == flight.body
    assert landed == [flight]
    assert not flight.joinable


async def test_the_last_reader_that_leaves_ends_the_call() -> None:
    ended: list[BaseException] = []

    async def run(_: Exchange, flight: Flight) -> None:
        flight.begin(HEAD)
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError as error:
            ended.append(error)
            raise

    landed: list[Flight] = []
    flight = fly(run, landed)
    one, two = flight.subscribe(), flight.subscribe()
    await one.head()
    one.close()
    await asyncio.sleep(0.01)
    assert not ended
    two.close()
    await eventually(lambda: landed)
    assert len(ended) == 1
    assert isinstance(flight.error, asyncio.CancelledError)


async def test_a_drained_call_goes_on_without_readers() -> None:
    async def run(_: Exchange, flight: Flight) -> None:
        flight.drain = True
        flight.begin(HEAD)
        await asyncio.sleep(0.02)
        flight.append(b"all of it")

    landed: list[Flight] = []
    flight = fly(run, landed)
    subscription = flight.subscribe()
    await subscription.head()
    subscription.close()
    await eventually(lambda: landed)
    assert (flight.body, flight.error) == (b"all of it", None)


async def test_a_call_cancelled_before_its_first_step_still_lands_once() -> None:
    async def run(_: Exchange, flight: Flight) -> None:
        raise AssertionError("never reached")

    landed: list[Flight] = []
    flight = fly(run, landed)
    flight.subscribe().close()  # before the loop ran once
    await eventually(lambda: landed)
    await asyncio.sleep(0.01)
    assert landed == [flight]


async def test_a_fault_while_it_is_booked_leaves_nobody_waiting() -> None:
    async def run(_: Exchange, flight: Flight) -> None:
        flight.begin(HEAD)
        flight.append(b"all of it")
        await asyncio.sleep(0.01)  # the reader has it and waits for more

    def broken(_: Exchange, flown: Flight) -> None:
        raise RuntimeError("a defect")

    flight = Flight("key", leader())
    flight.start(run, broken)
    assert await asyncio.wait_for(read(flight.subscribe()), 1) == b"all of it"
    assert flight._task is not None
    with pytest.raises(RuntimeError):
        await flight._task


async def test_a_failure_before_the_head_reaches_every_reader() -> None:
    async def run(_: Exchange, flight: Flight) -> None:
        await asyncio.sleep(0.01)
        raise UpstreamFailed("no")

    flight = fly(run)
    readers = [flight.subscribe() for _ in range(3)]
    for outcome in await asyncio.gather(*(r.head() for r in readers), return_exceptions=True):
        assert isinstance(outcome, RequestError)


async def test_a_slow_reader_holds_the_call_back() -> None:
    async def run(_: Exchange, flight: Flight) -> None:
        flight.begin(HEAD)
        for _number in range(100):
            flight.append(b"x" * 10_000)
            await flight.room()

    flight = fly(run)
    subscription = flight.subscribe()
    await eventually(lambda: flight._produced > AHEAD)
    await asyncio.sleep(0.02)
    assert AHEAD < flight._produced <= AHEAD + 10_000
    assert len(await read(subscription)) == 1_000_000


async def test_the_fastest_reader_sets_the_pace() -> None:
    async def run(_: Exchange, flight: Flight) -> None:
        flight.begin(HEAD)
        for _number in range(100):
            flight.append(b"x" * 10_000)
            await flight.room()

    flight = fly(run)
    slow = flight.subscribe()
    assert len(await read(flight.subscribe())) == 1_000_000
    assert len(await read(slow)) == 1_000_000


async def test_a_reader_that_leaves_frees_a_call_that_waits_for_it() -> None:
    async def run(_: Exchange, flight: Flight) -> None:
        flight.begin(HEAD)
        for _number in range(100):
            flight.append(b"x" * 10_000)
            await flight.room()

    flight = fly(run)
    stuck, reader = flight.subscribe(), flight.subscribe()
    await asyncio.sleep(0.01)
    stuck.close()
    assert len(await read(reader)) == 1_000_000


async def test_memory_is_bounded_and_a_reader_left_behind_is_told() -> None:
    async def run(_: Exchange, flight: Flight) -> None:
        flight.begin(HEAD)
        for _number in range(100):
            flight.append(b"x" * 100_000)
            await flight.room()

    flight = fly(run)
    behind = flight.subscribe()
    assert len(await read(flight.subscribe())) == 10_000_000
    assert flight._kept <= KEEP + 100_000
    assert flight.body is None
    assert not flight.joinable
    with pytest.raises(FlightLost):
        await read(behind)


async def test_flights_forget_what_has_landed() -> None:
    flights = Flights()

    async def run(_: Exchange, flight: Flight) -> None:
        flight.begin(HEAD)
        await asyncio.sleep(0.01)

    flight = flights.start("key", leader(), run, lambda *_: None)
    subscription = flight.subscribe()
    assert flights.joinable("key", 0, CachePolicy()) is flight
    assert flights.joinable("other", 0, CachePolicy()) is None
    assert flights.joinable(None, 0, CachePolicy()) is None
    assert flights.joinable("key", 1, CachePolicy()) is None, "a rule was made since it began"
    stricter = CachePolicy(semantic="enforce"), CachePolicy(max_error=Decimal("0.001")), CachePolicy(ttl=60)
    for cache in stricter:
        assert flights.joinable("key", 0, cache) is None, "it may find what this app must not have"
    await read(subscription)
    assert len(flights) == 0


# -- in the pipeline --


def all_settled(rig: Rig) -> bool:
    return len(rig.journal.settled) >= len(rig.journal.opened)


async def test_identical_requests_share_one_call_and_the_leader_pays() -> None:
    rig = Rig()
    rig.wire.scripts["first"] = [Script(0.05, *GOOD_STREAM)]
    bodies = await asyncio.gather(*(rig.ask(stream=True) for _ in range(20)))
    assert len(set(bodies)) == 1
    assert len(rig.wire.calls) == 1
    await eventually(lambda: len(rig.journal.settled) == 20)
    assert sorted(r.cost or 0 for r in rig.journal.settled)[:-1] == [0] * 19
    assert len({r.id for r in rig.journal.settled}) == 20


async def test_a_leader_that_leaves_is_booked_once_and_its_followers_are_served() -> None:
    rig = Rig()
    rig.wire.scripts["first"] = [Script(chunk("Hello"), 0.1, *GOOD_STREAM)]
    first = asyncio.create_task(rig.ask(stream=True))
    await eventually(lambda: rig.wire.calls)
    follower = asyncio.create_task(rig.ask(stream=True))
    await asyncio.sleep(0.02)
    first.cancel()
    assert (await follower).endswith(b"data: [DONE]\n\n")
    await eventually(lambda: len(rig.journal.settled) == 2)
    paid = [record for record in rig.journal.settled if record.cost]
    assert [record.status for record in paid] == ["complete"]
    assert len(rig.wire.calls) == 1


async def test_the_last_one_out_cancels_the_call_and_it_is_an_estimate() -> None:
    rig = Rig()
    rig.wire.scripts["first"] = [Script(chunk("Hello"), 0.25, 0.04, *GOOD_STREAM)]
    readers = [asyncio.create_task(rig.ask(stream=True)) for _ in range(3)]
    await eventually(lambda: rig.wire.replies)
    await asyncio.sleep(0.02)
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    await eventually(lambda: len(rig.journal.settled) == 3)
    (paid,) = [record for record in rig.journal.settled if record.cost]
    assert (paid.status, paid.estimated) == ("cancelled", True)
    assert rig.wire.replies[0].closed


async def test_a_follower_leads_once_when_the_call_it_shared_fails() -> None:
    rig = Rig()
    bad = Script(0.02, b"{}", status=401)
    rig.wire.scripts["first"] = [bad, bad, Script(*GOOD_STREAM)]
    outcomes = await asyncio.gather(
        *(rig.ask("alone", stream=True) for _ in range(5)), return_exceptions=True
    )
    failed = [o for o in outcomes if isinstance(o, BaseException)]
    assert all(isinstance(o, UpstreamFailed) for o in failed)
    assert len(rig.wire.calls) == 2, "the leader's call, and one that the followers share"
    assert len(failed) == 5


async def test_a_follower_is_served_by_the_second_try() -> None:
    rig = Rig()
    rig.wire.scripts["first"] = [Script(0.02, b"{}", status=401), Script(*GOOD_STREAM)]
    outcomes: list[Any] = list(
        await asyncio.gather(*(rig.ask("alone", stream=True) for _ in range(5)), return_exceptions=True)
    )
    assert sum(isinstance(o, UpstreamFailed) for o in outcomes) == 1
    assert sum(isinstance(o, bytes) for o in outcomes) == 4
    assert len(rig.wire.calls) == 2


async def test_each_follower_keeps_its_own_deadline() -> None:
    rig = Rig()
    rig.wire.scripts["first"] = [Script(0.2, *GOOD_STREAM)]
    patient = asyncio.create_task(rig.ask(stream=True))
    await eventually(lambda: rig.wire.calls)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(rig.ask(stream=True), 0.05)
    assert (await patient).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("shared", [False, True])
async def test_a_request_may_be_cancelled_at_any_step(stream: bool, shared: bool) -> None:
    """Whatever was opened is settled once, and no money stays held."""
    ended: set[str] = set()
    for steps in range(60):
        rig = Rig()
        rig.wire.scripts["first"] = [
            Script(chunk("Hello"), 0.0, *GOOD_STREAM) if stream else Script(0.0, GOOD_ANSWER)
        ]
        task = asyncio.create_task(rig.ask("capped", stream=stream, max_tokens=100))
        other = asyncio.create_task(rig.ask("capped", stream=stream, max_tokens=100)) if shared else None
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        results = await asyncio.gather(task, *([other] if other else []), return_exceptions=True)
        await eventually(partial(all_settled, rig))
        for _ in range(5):
            await asyncio.sleep(0)
        opened, settled = [r.id for r in rig.journal.opened], [r.id for r in rig.journal.settled]
        assert sorted(opened) == sorted(settled), steps
        assert await rig.held() == 0, steps
        assert len(rig.flights) == 0
        assert all(reply.closed for reply in rig.wire.replies)
        if shared:
            assert isinstance(results[1], bytes), f"the other one is served, {steps}: {results[1]!r}"
        ended |= {r.status for r in rig.journal.settled} or {"nothing"}
    assert ended >= {"complete", "cancelled"} - ({"cancelled"} if shared else set())
    assert "complete" in ended


async def test_a_follower_never_costs_what_the_leader_paid() -> None:
    rig = Rig()
    rig.wire.scripts["first"] = [Script(chunk("Hello"), 0.05, *GOOD_STREAM)]
    await asyncio.gather(*(rig.ask("capped", stream=number % 2 == 0, max_tokens=100) for number in range(6)))
    await eventually(lambda: len(rig.journal.settled) == 6)
    leaders = [r for r in rig.journal.settled if r.attempts]
    assert len(leaders) == 1
    for record in rig.journal.settled:
        if record is not leaders[0]:
            assert (record.cost, record.cache, record.cache_entry) == (0, "exact", leaders[0].id)


# -- two workers --


async def test_two_workers_share_a_call_which_one_books() -> None:
    one = Rig()
    two = Rig(beside=one)
    one.wire.scripts["first"] = [Script(chunk("Hello"), 0.1, *GOOD_STREAM)]
    asked = [asyncio.create_task(rig.ask(stream=True)) for rig in (one, two, one, two)]
    bodies = await asyncio.gather(*asked)
    assert len(set(bodies)) == 1
    assert len(one.wire.calls) == 1
    await eventually(lambda: len(one.journal.settled) + len(two.journal.settled) == 4)
    (leader,) = [record for record in one.journal.settled if record.attempts]
    for record in (*one.journal.settled, *two.journal.settled):
        if record is not leader:
            assert (record.cost, record.cache, record.cache_entry) == (0, "exact", leader.id)
            assert (record.status, record.usage) == ("complete", leader.usage)
    assert len(one.flights) == len(two.flights) == len(one.board.calls) == 0


async def test_a_call_of_another_worker_that_fails_is_tried_once_more() -> None:
    one = Rig()
    two = Rig(beside=one)
    one.wire.scripts["first"] = [Script(0.05, b"{}", status=401), Script(*GOOD_STREAM)]
    asked = [asyncio.create_task(rig.ask("alone", stream=True)) for rig in (one, two, two)]
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(outcomes[0], UpstreamFailed)
    assert [isinstance(outcome, bytes) for outcome in outcomes[1:]] == [True, True]
    assert len(one.wire.calls) == 2
    await eventually(lambda: len(two.journal.settled) == 2)
    assert sorted(bool(record.attempts) for record in two.journal.settled) == [False, True]


async def test_who_wants_a_fresh_answer_neither_shares_nor_is_shared() -> None:
    one = Rig()
    two = Rig(beside=one)
    one.wire.scripts["first"] = [Script(chunk("Hello"), 0.1, *GOOD_STREAM)]
    fresh = {"cache-control": "no-cache"}
    asked = [
        asyncio.create_task(rig.ask(stream=True, headers=headers))
        for rig, headers in ((one, fresh), (one, {}), (two, fresh), (two, {}))
    ]
    await asyncio.gather(*asked)
    assert len(one.wire.calls) == 3, "one each for those who wanted it, one for the other two"


async def test_who_limits_the_age_waits_for_no_call_that_began_before() -> None:
    one = Rig()
    two = Rig(beside=one)
    one.wire.scripts["first"] = [Script(chunk("Hello"), 0.1, *GOOD_STREAM)]
    young = {"cache-control": "max-age=5"}
    asked = [
        asyncio.create_task(rig.ask(stream=True, headers=headers))
        for rig, headers in ((one, {}), (one, young), (two, young))
    ]
    await asyncio.gather(*asked)
    assert len(one.wire.calls) == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_a_follower_elsewhere_may_be_cancelled_at_any_step(stream: bool) -> None:
    for steps in range(0, 60, 2):
        one = Rig()
        two = Rig(beside=one)
        one.wire.scripts["first"] = [
            Script(chunk("Hello"), 0.005, *GOOD_STREAM) if stream else Script(0.005, GOOD_ANSWER)
        ]
        leading = asyncio.create_task(one.ask("capped", stream=stream, max_tokens=100))
        following = asyncio.create_task(two.ask("capped", stream=stream, max_tokens=100))
        for _ in range(steps):
            await asyncio.sleep(0)
        (following if steps % 4 else leading).cancel()
        await asyncio.gather(leading, following, return_exceptions=True)
        for rig in (one, two):
            await eventually(partial(all_settled, rig))
            opened, settled = [r.id for r in rig.journal.opened], [r.id for r in rig.journal.settled]
            assert sorted(opened) == sorted(settled), steps
            await eventually(lambda rig=rig: len(rig.flights) == 0)  # type: ignore[misc]
        assert await one.held() == 0, steps
        assert not one.board.calls, steps
