"""One call for identical requests of several workers.

Before a flight makes its call it asks the board whether another worker makes the same one. Then the flight carries
that call: same frames, same end, booked there. Where that call cannot be had, this worker makes its own: an answer
that came meanwhile is in the cache, and a worker that died or a board that is away is not waited for.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from router.core.errors import CallLost, UpstreamFailed, UpstreamTimedOut
from router.core.openai_wire import error_frame
from router.core.ports import CallBegun, CallElsewhere, CallEnded, Clock, FlightBoard
from router.core.types import Usage
from router.stages.dispatch import MAX_ATTEMPTS
from router.stages.exact import ExactCache, StoredAnswer
from router.stages.exchange import Exchange
from router.stages.flight import Flight

ROUNDS = 4
"""Calls of others that may be over when this worker comes to have them, before it makes its own regardless."""
PAUSES = (0.0, 0.005, 0.02, 0.1)
"""Seconds between looks for an answer that is being stored."""
RECENT = 0.5
"""Seconds since a request came in within which an answer stored meanwhile would have left its mark on the board."""


class Sharing:
    """`board` keeps the mark of an answer that was stored for longer than RECENT."""

    def __init__(self, board: FlightBoard, exact: ExactCache, clock: Clock) -> None:
        self._board = board
        self._exact = exact
        self._clock = clock

    async def answered(self, exchange: Exchange, flight: Flight) -> bool:
        """Whether the flight has its answer from elsewhere. False: this worker is to make the call.

        Raises UpstreamFailed where another worker's call failed before its answer began.
        """
        key = flight.key
        # Who limits the age of an answer waits for no call that began before.
        if key is None or not exchange.wishes.read_cache or exchange.wishes.max_age is not None:
            return False
        over: CallElsewhere | None = None
        for _ in range(ROUNDS):
            elsewhere = await self._board.claim(_call(key, flight), flight, over)
            if elsewhere is None:
                # Whoever was held up since it looked in the cache may have missed all of a call.
                late = over is None and self._clock.monotonic() - exchange.started > RECENT
                return late and await self._found(key, exchange, flight, (0.0,))
            if await self._carried(exchange, flight, elsewhere):
                return True
            if await self._found(key, exchange, flight, PAUSES if elsewhere.stored else (0.0,)):
                return True
            over = elsewhere
        return False

    def landed(self, flight: Flight, stored: bool) -> None:
        """The flight has ended. `stored`: its answer was given to the cache."""
        if flight.key is not None:
            self._board.landed(_call(flight.key, flight), flight, stored)

    async def _found(self, key: str, exchange: Exchange, flight: Flight, pauses: tuple[float, ...]) -> bool:
        for pause in pauses:
            if pause:
                await asyncio.sleep(pause)
            stored: StoredAnswer | None = await self._exact.find(key, exchange)
            if stored is not None:
                flight.found(stored)
                return True
        return False

    async def _carried(self, exchange: Exchange, flight: Flight, elsewhere: CallElsewhere) -> bool:
        """Fills the flight with another worker's call. False: there was nothing of it to have."""
        leader, flight.leader = flight.leader, None
        try:
            async with asyncio.timeout(_longest(exchange)), aclosing(elsewhere.parts()) as parts:
                async for part in parts:
                    if isinstance(part, CallBegun):
                        flight.begin_elsewhere(part)
                    elif isinstance(part, CallEnded):
                        flight.end_elsewhere(part)
                    else:
                        for frame in part:
                            flight.append(frame)
                        if flight.ahead:
                            await flight.room()
        except (CallLost, TimeoutError) as error:
            if flight.head is None and isinstance(error, TimeoutError):
                raise UpstreamTimedOut("The call this request shared took too long.") from None
            if flight.head is None:
                raise UpstreamFailed("The call this request shared failed.") from None
            flight.end_elsewhere(CallEnded("cut", Usage(), None))
            if flight.begun.stream:
                flight.append(
                    error_frame(
                        "The provider's answer broke off before its end.", "server_error", "upstream_cut"
                    )
                )
        if flight.head is None:
            flight.leader = leader
        return flight.head is not None


def _call(key: str, flight: Flight) -> str:
    """Names the call on the board. After a new rule against stored answers the same request is another call."""
    return f"{key}:{flight.generation}"


def _longest(exchange: Exchange) -> float:
    """Seconds a call of this request's own could take at most."""
    snapshot = exchange.snapshot
    providers = {snapshot.models[name].provider for name in exchange.policy.allow}
    return MAX_ATTEMPTS * max((snapshot.providers[name].timeouts.total for name in providers), default=0.0)
