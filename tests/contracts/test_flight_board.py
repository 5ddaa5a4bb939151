"""One suite for both boards: two workers that are asked for the same call. Then what only Redis can do to it."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from types import SimpleNamespace
from typing import Any, cast

import pytest

from router.adapters.memory import MemoryFlightBoard
from router.adapters.redis_store import RedisConnection, RedisFlightBoard
from router.adapters.redis_store import flights as redis_flights
from router.core.errors import CallLost, UpstreamFailed
from router.core.policy import CachePolicy
from router.core.ports import CallBegun, CallElsewhere, CallEnded, CallPart, FlightBoard, SharedCall
from router.core.types import NanoUSD, Usage
from router.stages.exchange import Exchange
from router.stages.flight import Flight, Head, Subscription, UsageFrame
from tests.contracts.valkey_server import ValkeyServer, patient, valkey_server  # noqa: F401

SECRET = b"0123456789abcdef"
ENDED = CallEnded("complete", Usage(input=3, output=5), NanoUSD(77))
Workers = Callable[[int], Any]


class Call:
    """A flight that does what the test says: `begin`, `frame`, `end`, `fail`. `left`: nobody reads it any more."""

    def __init__(self, stream: bool = True) -> None:
        record = SimpleNamespace(usage=ENDED.usage, cost=ENDED.cost)
        leader = SimpleNamespace(
            id="the-leader",
            prompt_class="simple",
            generation=0,
            policy=SimpleNamespace(cache=CachePolicy()),
            request=SimpleNamespace(stream=stream),
            status="complete",
            record=record,
        )
        self.flight = Flight("key", cast(Exchange, leader))
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.flight.start(self._run, lambda *_: None)
        self.own: Subscription | None = self.flight.subscribe()

    async def _run(self, _: Exchange, flight: Flight) -> None:
        await self._end

    def begin(self) -> None:
        self.flight.begin(Head("small", "sim", {"openai-version": "1"}))

    def frame(self, frame: bytes) -> None:
        self.flight.append(frame)

    def end(self) -> None:
        if not self._end.done():
            self._end.set_result(None)

    def fail(self) -> None:
        self._end.set_exception(UpstreamFailed("no"))

    def leave(self) -> None:
        """The client of the request that started it goes."""
        if self.own is not None:
            self.own.close()
            self.own = None

    @property
    def left(self) -> bool:
        return isinstance(self.flight.error, asyncio.CancelledError)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is noticed sooner. What Redis lets expire by its own clock lives on where a machine stands still."""
    for name, value in {
        "BEAT": 0.1,
        "TICK": 0.0625,
        "SILENCE": 0.75,
        "INBOX_MS": 60_000,
        "LANDED_MS": 60_000,
    }.items():
        monkeypatch.setattr(redis_flights, name, value)


@pytest.fixture(params=["memory", "valkey"])
async def workers(request: pytest.FixtureRequest, fast: None) -> AsyncIterator[Workers]:
    """Gives the boards of so many workers."""
    async with AsyncExitStack() as stack:
        calls: dict[str, SharedCall] = {}

        async def start(number: int) -> list[FlightBoard]:
            if request.param == "memory":
                return [MemoryFlightBoard(calls) for _ in range(number)]
            url = request.getfixturevalue("valkey_server").url
            return [await redis_board(stack, url) for _ in range(number)]

        yield start


async def redis_board(stack: AsyncExitStack, url: str, secret: bytes = SECRET) -> RedisFlightBoard:
    connection = patient(url, retry_every=0.2)
    board = RedisFlightBoard(connection, secret)
    await board.start()
    stack.push_async_callback(connection.close)
    stack.push_async_callback(board.close)
    return board


@pytest.fixture
def key() -> str:
    return uuid.uuid4().hex


async def heard(elsewhere: CallElsewhere, found: list[CallPart] | None = None) -> list[CallPart]:
    """All parts, frames as one tuple a frame. `found` has what came so far."""
    found = [] if found is None else found
    async with aclosing(elsewhere.parts()) as parts:
        async for part in parts:
            found.extend((frame,) for frame in part) if isinstance(part, tuple) else found.append(part)
    return found


async def eventually(found: Callable[[], Any], seconds: float = 60.0) -> None:
    end = asyncio.get_running_loop().time() + seconds
    while not found():
        assert asyncio.get_running_loop().time() < end, "waited in vain"
        await asyncio.sleep(0.01)


async def given_back(board: FlightBoard) -> None:
    """Until Redis has heard of every call that landed."""
    if isinstance(board, RedisFlightBoard):
        await eventually(lambda: not board._releases and not board._aside)


async def joined(call: Call, readers: int) -> None:
    """Until so many read the call, the request that started it among them."""
    await eventually(lambda: len(call.flight._subscribers) == readers)


async def followed(board: FlightBoard, key: str, over: CallElsewhere | None = None) -> CallElsewhere:
    elsewhere = await board.claim(key, Call().flight, over)
    assert elsewhere is not None
    return elsewhere


async def test_the_first_makes_the_call_and_the_next_one_too_once_it_has_landed(
    workers: Workers, key: str
) -> None:
    one, two = await workers(2)
    call, next_call = Call(), Call()
    assert await one.claim(key, call.flight) is None
    assert await one.claim(key + "b", Call().flight) is None, "another key is another call"
    one.landed(key, call.flight, stored=False)
    await given_back(one)
    assert await two.claim(key, next_call.flight) is None
    two.landed(key, next_call.flight, stored=False)
    await given_back(two)
    assert await one.claim(key, Call().flight) is None


async def test_only_who_made_the_call_gives_it_back(workers: Workers, key: str) -> None:
    one, two, three = await workers(3)
    call = Call()
    assert await one.claim(key, call.flight) is None
    one.landed(key, Call().flight, stored=True)
    two.landed(key, Call().flight, stored=True)
    await asyncio.sleep(0.05)
    assert await three.claim(key, Call().flight) is not None


@pytest.mark.parametrize("stream", [False, True])
async def test_a_follower_gets_the_same_frames_however_late(workers: Workers, key: str, stream: bool) -> None:
    one, two, three = await workers(3)
    call = Call(stream)
    assert await one.claim(key, call.flight) is None
    early = asyncio.create_task(heard(await followed(two, key)))
    await asyncio.sleep(0.05)
    call.begin()
    call.frame(b"data: one\n\n")
    await asyncio.sleep(0.05)
    late = asyncio.create_task(heard(await followed(three, key)))
    await asyncio.sleep(0.05)
    call.frame(UsageFrame(b"data: usage\n\n"))
    call.frame(b"data: [DONE]\n\n")
    call.end()
    begun = CallBegun("the-leader", "simple", stream, "small", "sim", {"openai-version": "1"})
    frames = [(b"data: one\n\n",), (b"data: usage\n\n",), (b"data: [DONE]\n\n",)]
    for parts in (await early, await late):
        assert parts == [begun, *frames, ENDED]
        kinds = [type(part[0]) for part in parts if isinstance(part, tuple)]
        assert kinds == [bytes, UsageFrame, bytes]


async def test_a_call_goes_on_while_a_follower_reads_it_and_ends_with_the_last(
    workers: Workers, key: str
) -> None:
    one, two, three = await workers(3)
    call = Call()
    assert await one.claim(key, call.flight) is None
    readers = [asyncio.create_task(heard(await followed(board, key))) for board in (two, three)]
    await joined(call, 3)
    call.leave()
    await asyncio.sleep(0.1)
    call.begin()
    assert not call.left
    readers[0].cancel()
    await joined(call, 1)
    await asyncio.sleep(0.1)
    assert not call.left
    readers[1].cancel()
    await eventually(lambda: call.left)


async def test_a_call_that_fails_before_its_answer_is_lost_to_all(workers: Workers, key: str) -> None:
    one, two, three = await workers(3)
    call = Call()
    assert await one.claim(key, call.flight) is None
    readers = [asyncio.create_task(heard(await followed(board, key))) for board in (two, three)]
    await joined(call, 3)
    call.fail()
    one.landed(key, call.flight, stored=False)
    for outcome in await asyncio.gather(*readers, return_exceptions=True):
        assert isinstance(outcome, CallLost)
    await given_back(one)
    again = [await board.claim(key, Call().flight) for board in (one, two, three)]
    assert [elsewhere is None for elsewhere in again].count(True) == 1, "one of them makes it anew"


async def test_what_is_over_has_no_parts_and_its_place_is_taken_once(workers: Workers, key: str) -> None:
    one, two, three = await workers(3)
    call = Call()
    assert await one.claim(key, call.flight) is None
    beside, other = await followed(two, key), await followed(three, key)
    call.fail()
    one.landed(key, call.flight, stored=False)
    await given_back(one)
    for elsewhere in (beside, other):
        (parts,) = await asyncio.gather(heard(elsewhere), return_exceptions=True)
        assert parts == [] or isinstance(parts, CallLost)
    assert await two.claim(key, Call().flight, beside) is None
    assert await three.claim(key, Call().flight, other) is not None


async def test_an_answer_that_outgrew_what_is_kept_has_no_followers(workers: Workers, key: str) -> None:
    one, two = await workers(2)
    call = Call()
    assert await one.claim(key, call.flight) is None
    elsewhere = await followed(two, key)
    call.begin()
    for _ in range(100):
        call.frame(b"x" * 100_000)
        call.flight._consumed()
    assert call.own is not None
    call.own.at = 90
    call.frame(b"x")
    assert not call.flight.joinable
    (parts,) = await asyncio.gather(heard(elsewhere), return_exceptions=True)
    assert parts == [] or isinstance(parts, CallLost)


async def test_a_large_answer_comes_whole_and_a_slow_follower_holds_it_back(
    workers: Workers, key: str
) -> None:
    one, two = await workers(2)
    call = Call()
    assert await one.claim(key, call.flight) is None
    elsewhere = await followed(two, key)
    parts = elsewhere.parts()
    beginning = asyncio.create_task(anext(parts))
    await asyncio.sleep(0.1)
    frames = [bytes([number % 251]) * 30_000 for number in range(40)] + [b"y" * 300_000]
    call.begin()
    for frame in frames:
        call.frame(frame)
    call.end()
    got = b""
    async with aclosing(parts):
        assert isinstance(await beginning, CallBegun)
        async for part in parts:
            if isinstance(part, tuple):
                got += b"".join(part)
                await asyncio.sleep(0.02)
    assert got == b"".join(frames)


# -- Redis alone --


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("valkey_server").url)


@pytest.fixture
async def stack(fast: None) -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def die(board: RedisFlightBoard) -> None:
    """As kill -9: not a word more."""
    for task in board._tasks:
        task.cancel()
    for pump in list(board._pumps.values()):
        assert pump.task is not None
        pump.task.cancel()
    board._connection._closed = True


async def mortal(monkeypatch: pytest.MonkeyPatch, board: RedisFlightBoard) -> None:
    """Its inbox ends soon after its last sign of life."""
    monkeypatch.setattr(redis_flights, "INBOX_MS", 750)
    for _ in range(3000):
        if await board._connection.execute("PTTL", board._inbox) <= 750:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it gives no sign of life")


async def test_an_answer_that_was_stored_leaves_a_mark(
    stack: AsyncExitStack,
    url: str,
    key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, two, three = [await redis_board(stack, url) for _ in range(3)]
    call = Call()
    assert await one.claim(key, call.flight) is None
    one.landed(key, call.flight, stored=True)
    await given_back(one)
    marks = [await followed(two, key), await followed(three, key)]
    assert all(mark.stored for mark in marks)
    assert await heard(marks[0]) == []
    assert await two.claim(key, Call().flight, marks[0]) is None, "the answer was not there: it is made anew"
    assert await three.claim(key, Call().flight, marks[1]) is not None
    other = Call()
    monkeypatch.setattr(redis_flights, "LANDED_MS", 50)
    assert await one.claim(key + "b", other.flight) is None
    one.landed(key + "b", other.flight, stored=True)
    await given_back(one)
    await asyncio.sleep(0.1)
    assert await two.claim(key + "b", Call().flight) is None, "the mark is gone"


async def test_a_dead_worker_is_noticed_before_and_after_the_answer_began(
    stack: AsyncExitStack,
    url: str,
    key: str,
) -> None:
    one, two, three = [await redis_board(stack, url) for _ in range(3)]
    silent, begun = Call(), Call()
    assert await one.claim(key, silent.flight) is None
    assert await one.claim(key + "b", begun.flight) is None
    waiting = await followed(two, key)
    before = asyncio.create_task(heard(waiting))
    got: list[CallPart] = []
    after = asyncio.create_task(heard(await followed(three, key + "b"), got))
    begun.begin()
    begun.frame(b"a")
    await joined(silent, 2)
    await eventually(lambda: len(got) == 2)
    await die(one)
    began = asyncio.get_running_loop().time()
    assert await before == []
    with pytest.raises(CallLost):
        await after
    assert asyncio.get_running_loop().time() - began < 1.5
    assert await two.claim(key, Call().flight, waiting) is None
    late = await followed(three, key + "b")
    assert await heard(late) == []
    assert await three.claim(key + "b", Call().flight, late) is None


async def test_a_dead_follower_lets_the_call_go(
    stack: AsyncExitStack,
    url: str,
    key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, two = [await redis_board(stack, url) for _ in range(2)]
    call = Call()
    assert await one.claim(key, call.flight) is None
    reader = asyncio.create_task(heard(await followed(two, key)))
    await joined(call, 2)
    call.leave()
    await mortal(monkeypatch, two)
    await die(two)
    await eventually(lambda: call.left)
    reader.cancel()


async def test_without_redis_everyone_makes_the_call(stack: AsyncExitStack, key: str) -> None:
    server = ValkeyServer()
    stack.callback(server.close)
    one, two = [await redis_board(stack, server.url) for _ in range(2)]
    call = Call()
    assert await one.claim(key, call.flight) is None
    reader = asyncio.create_task(heard(await followed(two, key)))
    await joined(call, 2)
    server.kill()
    assert await asyncio.wait_for(reader, 3) == []
    assert await two.claim(key, Call().flight) is None
    assert await two.claim(key + "b", Call().flight) is None


@pytest.mark.parametrize("fault", ["frozen", "emptied", "restarted"])
async def test_an_answer_that_has_begun_outlives_a_fault_of_redis(
    stack: AsyncExitStack, key: str, fault: str
) -> None:
    server = ValkeyServer()
    stack.callback(server.close)
    one, two = [await redis_board(stack, server.url) for _ in range(2)]
    call = Call()
    assert await one.claim(key, call.flight) is None
    reader = asyncio.create_task(heard(await followed(two, key)))
    await joined(call, 2)
    for board in (one, two):
        board._connection._timeout = 0.2
    call.begin()
    frames = [b"%d," % number for number in range(60)]
    for number, frame in enumerate(frames):
        call.frame(frame)
        await asyncio.sleep(0.02)
        if number == 20:
            if fault == "frozen":
                server.freeze()
            elif fault == "emptied":
                server.command("FLUSHALL")
            else:
                server.kill()
        if number == 40 and fault != "emptied":
            server.thaw() if fault == "frozen" else server.start()
    call.end()
    parts = await asyncio.wait_for(reader, 10)
    assert b"".join(part[0] for part in parts if isinstance(part, tuple)) == b"".join(frames)
    assert parts[-1] == ENDED


async def test_words_that_are_not_signed_are_not_heard(
    stack: AsyncExitStack,
    url: str,
    key: str,
) -> None:
    one, two = [await redis_board(stack, url) for _ in range(2)]
    forger = await redis_board(stack, url, b"another secret!!")
    call = Call()
    assert await one.claim(key, call.flight) is None
    elsewhere = await followed(two, key)
    reader = asyncio.create_task(heard(elsewhere))
    await eventually(lambda: one._pumps and two._ears)
    (follow,) = two._ears
    forged = redis_flights._Word(follow, 1, 0, key, frames=(b"forged",))
    assert await forger.send(two._worker, forged)
    # A true word, replayed to another inbox, is as little worth.
    payload = redis_flights._encode(forged)
    replayed = one._signature(redis_flights._INBOX + "other", payload) + payload
    await one._connection.execute("XADD", two._inbox, "*", "word", replayed)
    await asyncio.sleep(0.1)
    call.begin()
    call.frame(b"true")
    call.end()
    assert [part for part in await reader if isinstance(part, tuple)] == [(b"true",)]


async def eventually_small(connection: RedisConnection, inbox: str) -> None:
    for _ in range(3000):
        if await connection.execute("XLEN", inbox) <= 2:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("what was heard is there still")


async def test_inboxes_stay_small_and_end_with_their_worker(
    stack: AsyncExitStack,
    url: str,
    key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, two = [await redis_board(stack, url) for _ in range(2)]
    call = Call()
    assert await one.claim(key, call.flight) is None
    reader = asyncio.create_task(heard(await followed(two, key)))
    call.begin()
    for _ in range(200):
        call.frame(b"x" * 1000)
        await asyncio.sleep(0.001)
    call.end()
    await reader
    connection: RedisConnection = two._connection
    await eventually_small(connection, two._inbox)
    await mortal(monkeypatch, one)
    await die(one)
    for _ in range(3000):
        if not await connection.execute("EXISTS", one._inbox):
            return
        await asyncio.sleep(0.02)
    raise AssertionError("its inbox is there still")


async def test_an_unshared_call_costs_two_commands(
    stack: AsyncExitStack,
    url: str,
    key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    board = await redis_board(stack, url)
    await asyncio.sleep(0.05)
    sent: list[str] = []
    execute = board._connection.execute

    async def counted(*words: Any, trial: bool = False) -> Any:
        sent.append(str(words[0]))
        return await execute(*words, trial=trial)

    monkeypatch.setattr(board._connection, "execute", counted)
    for number in range(10):
        call = Call()
        assert await board.claim(f"{key}{number}", call.flight) is None
        board.landed(f"{key}{number}", call.flight, stored=True)
    await asyncio.sleep(0.05)
    assert len([word for word in sent if word.startswith("EVAL")]) <= 22


async def test_a_claim_that_is_given_up_is_given_back(
    stack: AsyncExitStack,
    url: str,
    key: str,
) -> None:
    one, two = [await redis_board(stack, url) for _ in range(2)]
    claim = asyncio.create_task(one.claim(key, Call().flight))
    await asyncio.sleep(0)
    claim.cancel()
    await asyncio.gather(claim, return_exceptions=True)
    await given_back(one)
    assert await two.claim(key, Call().flight) is None


def test_a_secret_is_told_from_another() -> None:
    boards = [
        RedisFlightBoard(cast(Any, SimpleNamespace(on_recovery=lambda _: None)), s) for s in (b"a", b"b")
    ]
    word = secrets.token_bytes(16)
    assert boards[0]._signature("i", word) != boards[1]._signature("i", word)
    assert boards[0]._signature("i", word) != boards[0]._signature("j", word)
