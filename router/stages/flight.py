"""One call in progress and everyone who waits for its answer.

The call is a task of its own: it ends when its last subscriber leaves, not when the request that started it
does. What it produced so far is kept, so that an identical request that comes later gets it from the start.
A flight may also carry a call that another worker makes (`stages/sharing.py`); who reads it sees no difference.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Protocol

from msgspec import Struct

from router.core.cached import CacheCandidate
from router.core.errors import CallLost
from router.core.policy import CachePolicy
from router.core.ports import CallBegun, CallEnded, CallPart
from router.core.types import Usage
from router.stages.exact import StoredAnswer
from router.stages.exchange import Exchange

AHEAD = 256 * 1024
"""Bytes a call may be ahead of its fastest subscriber before it stops reading from the provider."""
KEEP = 4 * 1024 * 1024
"""Bytes kept for late joiners and the cache; an answer above it can no longer be joined."""
BATCH = 64
"""Frames that are handed to another worker at once."""


class UsageFrame(bytes):
    """A stream frame that only carries usage; a subscriber that did not ask for usage does not get it."""


class Head(Struct, frozen=True):
    """What is known once the answer begins."""

    model: str
    provider: str
    headers: Mapping[str, str]


class AnswerSink(Protocol):
    """Where a provider's answer goes while it comes. `sent`: its first byte is out, no other takes its place."""

    drain: bool

    @property
    def head(self) -> Head | None: ...

    @property
    def sent(self) -> bool: ...

    @property
    def ahead(self) -> bool: ...

    async def room(self) -> None: ...

    def begin(self, head: Head) -> None: ...

    def append(self, frame: bytes) -> None: ...

    def send(self) -> None:
        """Passes on what was held back, and holds nothing back from here on."""
        ...

    def retract(self) -> None:
        """Forgets an answer of which nothing was sent."""
        ...


class FlightLost(Exception):
    """This subscriber fell too far behind an answer that is larger than what is kept."""


class Flight:
    """Start it with `start`; read it through `subscribe`. `key` is None for a call nobody else may join. `leader` is
    the request that makes the call and books it; None: one of another worker does, or the answer was `stored`.
    `drain`: the call goes on when its last reader leaves. `generation`: the newest rule against stored answers known
    when it began; an answer in the making is of no more use than a stored one once a newer rule is made. `cache`: the
    leader's policy, which says what stored answer it may find.
    """

    def __init__(self, key: str | None, leader: Exchange) -> None:
        self.key = key
        self.generation = leader.generation
        self.cache = leader.policy.cache
        self.leader: Exchange | None = leader
        self.stored: StoredAnswer | None = None
        self.alike: CacheCandidate | None = None
        self.drain = False
        self.error: BaseException | None = None
        self._head: Head | None = None
        self._begun: CallBegun | None = None
        self._ended: CallEnded | None = None
        self._frames: list[bytes] = []
        self._dropped = 0
        self._kept = 0
        self._produced = 0
        self._finished = False
        self._subscribers: set[Subscription] = set()
        self._task: asyncio.Task[None] | None = None
        self._room: asyncio.Future[None] | None = None

    def start(
        self,
        run: Callable[[Exchange, Flight], Awaitable[None]],
        done: Callable[[Exchange, Flight], None],
    ) -> None:
        exchange = self.leader
        assert exchange is not None

        def end() -> None:
            if not self._finished:
                self._finished = True
                try:
                    done(exchange, self)
                finally:
                    self._wake()  # whatever went wrong, nobody waits for ever

        async def fly() -> None:
            try:
                await run(exchange, self)
            except asyncio.CancelledError as error:
                self.error = self.error or error
                raise
            except BaseException as error:
                self.error = error
            finally:
                end()

        self._task = asyncio.get_running_loop().create_task(fly())
        # A task cancelled before its first step never enters its own `finally`.
        self._task.add_done_callback(lambda _: end())

    @property
    def joinable(self) -> bool:
        """Whether a new subscriber would still get the answer from its first byte."""
        return not self._finished and self._dropped == 0 and self.error is None

    @property
    def body(self) -> bytes | None:
        """The whole answer, where it was small enough to be kept."""
        return None if self._dropped else b"".join(self._frames)

    def subscribe(self) -> Subscription:
        subscription = Subscription(self)
        self._subscribers.add(subscription)
        return subscription

    @property
    def head(self) -> Head | None:
        return self._head

    @property
    def sent(self) -> bool:
        return self._head is not None

    @property
    def begun(self) -> CallBegun:
        """Whose call it is and what is known of its answer, once that begins."""
        if self._begun is None:
            assert self.leader is not None
            assert self._head is not None
            leader, head = self.leader, self._head
            self._begun = CallBegun(
                leader.id, leader.prompt_class, leader.request.stream, head.model, head.provider, head.headers
            )
        return self._begun

    @property
    def ended(self) -> CallEnded:
        """How the call was booked; that it was not, while it goes on."""
        if self._ended is not None:
            return self._ended
        if self.leader is None:
            return CallEnded("failed", Usage(), None)
        status, record = self.leader.status, self.leader.record
        if record is None:
            return CallEnded(status, Usage(), None)
        return CallEnded(status, record.usage, record.cost)

    def begin(self, head: Head) -> None:
        self._head = head
        self._wake()

    def begin_elsewhere(self, begun: CallBegun) -> None:
        """Another worker's call begins to answer."""
        self._begun = begun
        self.begin(Head(begun.model, begun.provider, begun.headers))

    def end_elsewhere(self, ended: CallEnded) -> None:
        self._ended = ended

    def found(self, stored: StoredAnswer, alike: CacheCandidate | None = None) -> None:
        """The answer is in a cache: everyone who waits here has a hit. `alike`: it answered another prompt."""
        self.leader, self.stored, self.alike = None, stored, alike
        self.begin(Head(stored.model, stored.provider, {}))

    async def parts(self) -> AsyncGenerator[CallPart, None]:
        """See the port `SharedCall`."""
        subscription = self.subscribe()
        try:
            while self._head is None:
                if self._finished:
                    raise CallLost("the call failed before its answer began")
                await subscription.wait()
            if self.leader is None:
                return  # found in a cache, where others find it as well
            if self._kept > KEEP:
                raise CallLost("the answer is too large to be shared")
            yield self.begun
            try:
                async for frames in subscription.batches():
                    yield frames
            except FlightLost:
                raise CallLost("the reader fell too far behind") from None
            yield self.ended
        finally:
            subscription.close()

    def send(self) -> None:
        """Nothing is ever held back here."""

    def retract(self) -> None:
        """Nothing is ever held back here."""

    def append(self, frame: bytes) -> None:
        self._frames.append(frame)
        self._kept += len(frame)
        self._produced += len(frame)
        if self._kept > KEEP:
            self._forget()
        self._wake()

    @property
    def ahead(self) -> bool:
        """Whether every subscriber is more than AHEAD bytes behind."""
        return bool(self._subscribers) and self._behind() > AHEAD

    async def room(self) -> None:
        """Waits while it is ahead."""
        while self.ahead:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def _behind(self) -> int:
        return min(self._produced - subscriber.consumed for subscriber in self._subscribers)

    def _forget(self) -> None:
        fastest = max((subscriber.at for subscriber in self._subscribers), default=0)
        count = max(0, min(fastest - self._dropped, len(self._frames) // 2))
        self._kept -= sum(map(len, self._frames[:count]))
        del self._frames[:count]
        self._dropped += count

    def _wake(self) -> None:
        for subscriber in self._subscribers:
            subscriber.wake()

    def _consumed(self) -> None:
        room = self._room
        if room is not None and not room.done() and (not self._subscribers or self._behind() <= AHEAD):
            room.set_result(None)

    def _leave(self, subscription: Subscription) -> None:
        self._subscribers.discard(subscription)
        self._consumed()
        if not self._subscribers and not self._finished and not self.drain and self._task is not None:
            self._task.cancel()


class Subscription:
    """One reader of a flight. `close` must be called; it ends the call when nobody else reads it."""

    def __init__(self, flight: Flight) -> None:
        self.flight = flight
        self.at = 0
        self.consumed = 0
        self._waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def head(self) -> Head:
        """Waits for the answer to begin. Raises what ended the call before that."""
        flight = self.flight
        while flight.head is None:
            if flight._finished:
                raise flight.error or asyncio.CancelledError()
            await self.wait()
        return flight.head

    async def frames(self) -> AsyncIterator[bytes]:
        """Every frame from the first. Ends with the call; its error, if any, is the caller's to look at."""
        flight = self.flight
        while True:
            index = self.at - flight._dropped
            if index < 0:
                raise FlightLost()
            if index < len(flight._frames):
                frame = flight._frames[index]
                self.at += 1
                self.consumed += len(frame)
                yield frame
                flight._consumed()
            elif flight._finished:
                return
            else:
                await self.wait()

    async def batches(self) -> AsyncIterator[tuple[bytes, ...]]:
        """The same, several frames at once where they are there."""
        flight = self.flight
        while True:
            index = self.at - flight._dropped
            if index < 0:
                raise FlightLost()
            if frames := tuple(flight._frames[index : index + BATCH]):
                self.at += len(frames)
                self.consumed += sum(map(len, frames))
                yield frames
                flight._consumed()
            elif flight._finished:
                return
            else:
                await self.wait()

    async def finished(self) -> None:
        """Waits for the end of the call, or until this reader cannot have all of it any more."""
        with suppress(FlightLost):
            async for _ in self.frames():
                pass

    async def wait(self) -> None:
        """Until something happens in the flight."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def close(self) -> None:
        self.flight._leave(self)


class Flights:
    """Calls in flight that identical requests may join, by the key of the exact cache."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def joinable(self, key: str | None, generation: int, cache: CachePolicy) -> Flight | None:
        """None as well where a rule newer than the call is known, by its `generation`, or the leader's app may have
        stored answers that this one may not.
        """
        flight = self._flights.get(key) if key is not None else None
        if flight is None or not flight.joinable or flight.generation < generation or flight.cache != cache:
            return None
        return flight

    def start(
        self,
        key: str | None,
        leader: Exchange,
        run: Callable[[Exchange, Flight], Awaitable[None]],
        done: Callable[[Exchange, Flight], None],
        shared: bool = True,
    ) -> Flight:
        """`shared`: identical requests may join it."""
        flight = Flight(key, leader)
        if key is not None and shared:
            self._flights[key] = flight

        def landed(exchange: Exchange, flown: Flight) -> None:
            if key is not None and self._flights.get(key) is flown:
                del self._flights[key]
            done(exchange, flown)

        flight.start(run, landed)
        return flight
