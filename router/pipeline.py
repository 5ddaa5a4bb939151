"""The way of one request, from top to bottom.

    admit -> normalise -> exact cache -> semantic cache -> classify -> decide -> reserve -> dispatch -> settle

`Pipeline.answer` is a context manager that the HTTP response owns: however the response ends, leaving the
context settles the request. A call to a provider is a task of its own (a flight), which identical requests
share, those of other workers as well; the request that started it books it, the others book nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from msgspec import Struct

from router.core.cached import CacheBook, CacheCandidate
from router.core.errors import Overloaded, RequestError, UnavailableError
from router.core.ports import Clock, Snapshot
from router.core.types import NanoUSD
from router.stages.admit import Admission, merge_tags, read_wishes
from router.stages.cascade import Cascade
from router.stages.check import CacheChecks
from router.stages.classify import Classify
from router.stages.decide import Decide
from router.stages.exact import ExactCache, StoredAnswer
from router.stages.exchange import Exchange
from router.stages.flight import Flight, Flights, Subscription, UsageFrame
from router.stages.learn import Learn
from router.stages.normalise import READ_AT_ONCE, named_model, read_chat
from router.stages.reply import Answer, stored_answer, streamed_answer, whole_answer
from router.stages.reserve import Reserve
from router.stages.semantic import SemanticCache
from router.stages.settle import Settle, note_failure
from router.stages.shadow import Shadows
from router.stages.sharing import Sharing

log = logging.getLogger("farthing")


class Inbound(Struct, frozen=True):
    """A request as it came in. Header names are lower case; `key` is the hash of the caller's key
    (`Admission.hashed`), `loopback` is about the peer's address.
    """

    request_id: str
    endpoint: str
    headers: Mapping[str, str]
    key: str | None
    body: bytes
    loopback: bool


@dataclass(frozen=True, slots=True)
class Pipeline:
    """`configuration` gives the snapshot in force, `draw` a random number in [0, 1)."""

    configuration: Callable[[], Snapshot]
    admission: Admission
    exact: ExactCache
    flights: Flights
    sharing: Sharing
    classify: Classify
    learn: Learn
    semantic: SemanticCache
    decide: Decide
    reserve: Reserve
    cascade: Cascade
    settle: Settle
    shadows: Shadows
    checks: CacheChecks
    book: CacheBook
    clock: Clock
    draw: Callable[[], float]

    @asynccontextmanager
    async def answer(self, inbound: Inbound) -> AsyncIterator[Answer]:
        """Raises RequestError before the first byte. After it, the answer's own frames tell how it ended."""
        exchange = await self._admit(inbound)
        long = len(exchange.request.text) > READ_AT_ONCE
        key = await asyncio.to_thread(self.exact.key, exchange) if long else self.exact.key(exchange)
        stored = await self.exact.find(key, exchange) if key is not None else None
        if stored is not None:
            yield await self._hit(exchange, stored)
            return
        flight = self._join_or_lead(exchange, key)
        subscription = flight.subscribe()
        try:
            try:
                answer = await self._live(exchange, subscription)
            except RequestError:
                if flight.leader is exchange:
                    raise
                # The call it shared failed: it tries once for itself, or shares such a try.
                subscription.close()
                flight = self._join_or_lead(exchange, key)
                subscription = flight.subscribe()
                answer = await self._live(exchange, subscription)
            yield answer
        except BaseException as error:
            if flight.leader is not exchange:
                note_failure(exchange, error)
            raise
        finally:
            subscription.close()
            if flight.leader is not exchange and flight.stored is None:
                self._settle_follower(exchange, flight)

    async def _admit(self, inbound: Inbound) -> Exchange:
        self.admission.check_room()
        opened_at, started = self.clock.now(), self.clock.monotonic()
        caller = await self.admission.caller(inbound.key, inbound.loopback)
        wishes = read_wishes(inbound.headers)
        request, conversation = await read_chat(inbound.body, caller)
        snapshot = self.configuration()
        policy = snapshot.resolve(caller.team, caller.app, merge_tags(caller.tags, wishes.tags), opened_at)
        reference, baseline_name, baseline_price = named_model(snapshot, policy, request, opened_at)
        return Exchange(
            id=inbound.request_id,
            endpoint=inbound.endpoint,
            opened_at=opened_at,
            started=started,
            caller=caller,
            wishes=wishes,
            request=request,
            snapshot=snapshot,
            policy=policy,
            reference=reference,
            baseline_name=baseline_name,
            baseline_price=baseline_price,
            conversation=conversation,
            generation=self.book.invalidations.generation,
        )

    async def _hit(
        self, exchange: Exchange, stored: StoredAnswer, alike: CacheCandidate | None = None
    ) -> Answer:
        """`alike`: what the semantic cache made of it; None: it answered the same request."""
        exchange.cache, exchange.cache_entry = "exact" if alike is None else "semantic", stored.entry
        exchange.stored_class, exchange.candidate = stored.prompt_class, alike
        exchange.status, exchange.http_status = "complete", 200
        try:
            answer = await stored_answer(exchange, stored)
        except BaseException as error:
            note_failure(exchange, error)
            raise
        finally:
            exchange.first_token_ms = 1000 * (self.clock.monotonic() - exchange.started)
            self.settle.from_cache(exchange, stored.usage, stored.cost, stored.model, stored.provider)
        self.checks.consider(exchange, None)
        return answer

    def _join_or_lead(self, exchange: Exchange, key: str | None) -> Flight:
        # Who limits the age of an answer does not wait for what a request without that limit may find.
        joins = exchange.wishes.read_cache and exchange.wishes.max_age is None
        shared = self.flights.joinable(key, exchange.generation, exchange.policy.cache) if joins else None
        if shared is not None:
            exchange.cache = "exact"
            return shared
        exchange.cache = "miss"
        return self.flights.start(key, exchange, self._fly, self._landed, shared=exchange.wishes.read_cache)

    async def _fly(self, exchange: Exchange, flight: Flight) -> None:
        if not await self.sharing.answered(exchange, flight):  # by the same call of another worker
            await self._lead(exchange, flight)

    async def _lead(self, exchange: Exchange, flight: Flight) -> None:
        """The way of a request that needs a model."""
        policy, snapshot = exchange.policy, exchange.snapshot
        exchange.prices = {name: snapshot.price(name, exchange.opened_at) for name in policy.allow}
        found = await self.semantic.find(exchange)  # where the mode only measures: beside the call
        if found is not None:
            flight.found(found.stored, found.candidate)
            return
        self.learn.note_prompt(exchange)
        if len(policy.allow) > 1 and (exchange.reference is None or policy.substitute):
            exchange.verdict = await self.classify.verdict(
                exchange.caller.team,
                exchange.request.prompt,
                lambda verdict: self.decide.could_change(exchange, verdict),
            )
        elif policy.advise and self.draw() < policy.advise:
            exchange.advice = self.classify.aside(exchange.request.prompt)
        self.decide.choose(exchange, self.draw())
        with _accounted():
            await self.reserve.hold(exchange, lambda: self.decide.downgraded(exchange))
            try:
                self.settle.open(exchange)
                await self.cascade.run(exchange, flight)  # dispatch, and a second opinion where asked for
            except UnavailableError:
                self.settle.withdraw(exchange)
                raise

    def _landed(self, exchange: Exchange, flight: Flight) -> None:
        """The flight has ended, however. Who made the call books it once and keeps a complete answer."""
        stored = False
        try:
            stored = flight.leader is exchange and self._booked(exchange, flight)
        finally:
            self.sharing.landed(flight, stored)

    def _booked(self, exchange: Exchange, flight: Flight) -> bool:
        """Whether the answer is kept."""
        if exchange.status in ("complete", "cut"):
            exchange.http_status = 200
        elif flight.error is not None:
            note_failure(exchange, flight.error)
        body = flight.body
        try:
            self.semantic.landed(exchange)
            self.checks.note(exchange, body)
            exchange.potential_savings = self.decide.potential(exchange)
            self.learn.note_answer(exchange, body)
        except Exception:
            log.exception("nothing is learned of request %s", exchange.id)  # and it is booked all the same
        record = self.settle.dispatched(exchange)
        stored = False
        if record is not None and body is not None and flight.key is not None:
            stored = self.exact.store(flight.key, exchange, record, body, self.draw())
        if record is not None and body is not None:
            self.semantic.keep(exchange, record, body, self.draw())
        self.shadows.consider(exchange, body)
        self.checks.consider(exchange, body)
        return stored

    async def _live(self, exchange: Exchange, subscription: Subscription) -> Answer:
        """The answer of a flight. Raises RequestError where it failed before any of it was sent."""
        flight = subscription.flight
        await subscription.head()
        if flight.stored is not None:
            return await self._hit(exchange, flight.stored, flight.alike)
        streamed = exchange.request.stream and flight.begun.stream
        if not streamed:
            await subscription.finished()
            if flight.body is None or flight.ended.status != "complete":
                raise Overloaded("The call this request shared broke off. Send it again.", retry_after=0)
        if flight.leader is not exchange:
            exchange.cache = "exact"
            with _accounted():
                self.settle.open(exchange)
            exchange.cache_entry, exchange.stored_class = flight.begun.request_id, flight.begun.prompt_class
        if streamed:
            return streamed_answer(exchange, flight.begun, self._relay(exchange, subscription))
        exchange.status, exchange.http_status = "complete", 200
        cost = flight.ended.cost if flight.leader is exchange else NanoUSD(0)
        return await whole_answer(exchange, flight.begun, flight.body or b"", cost)

    async def _relay(self, exchange: Exchange, subscription: Subscription) -> AsyncIterator[bytes]:
        wants_usage = exchange.request.include_usage
        async for frame in subscription.frames():
            if wants_usage or not isinstance(frame, UsageFrame):
                yield frame
        flight = subscription.flight
        if flight.leader is not exchange:
            exchange.status, exchange.http_status = flight.ended.status, 200

    def _settle_follower(self, exchange: Exchange, flight: Flight) -> None:
        if exchange.cache_entry is None:
            return  # it got nothing of the call it shared: nothing was admitted
        begun, ended = flight.begun, flight.ended
        self.settle.from_cache(exchange, ended.usage, ended.cost, begun.model, begun.provider)


@contextmanager
def _accounted() -> Iterator[None]:
    """A request that cannot be accounted for is not made."""
    try:
        yield
    except UnavailableError as away:
        raise Overloaded(
            "The gateway cannot account for this request right now. Try again shortly.", retry_after=2
        ) from away
