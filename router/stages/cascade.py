"""The cascade: a cheap model answers first, its answer is held back and verified, and a stronger model of the
plan takes its place before the caller has seen a byte of it.

Both attempts are in the ledger. The answer that was set aside keeps its outcome with the error `escalated`; its
cost, and that of a verifier, is overhead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from msgspec import structs

from router.core.errors import RequestError, UpstreamError
from router.core.ports import Clock
from router.core.types import NanoUSD
from router.stages.dispatch import Dispatch
from router.stages.exchange import UNSENT, Exchange
from router.stages.flight import AnswerSink, Head
from router.stages.judge import parsed_answer, read_approval, verifier_request
from router.stages.reserve import Reserve, worst_case_of
from router.stages.signals import signals_of

HOLD = 1024 * 1024
"""Bytes that are held back of an answer. A longer one passes on unverified: it is no refusal."""
PARSED_AT_ONCE = 32 * 1024
VERIFY_SECONDS = 20.0
"""At most, for a verifier's verdict; without one in time the answer is sent."""
APPROVED = 0.5
SIGNALS = "signals"


class HeldAnswer:
    """Keeps an answer from the caller until `send`. One that outgrows HOLD, or that `hold` (asked with the model that
    gives it) says no to, passes on as it comes. `behind` None: nobody but the gateway reads it.
    """

    def __init__(
        self,
        behind: AnswerSink | None = None,
        hold: Callable[[str], bool] = lambda _: True,
        sending: Callable[[], None] = lambda: None,
    ) -> None:
        self._behind = behind
        self._hold = hold
        self._sending = sending
        self._head: Head | None = None
        self._frames: list[bytes] = []
        self._size = 0
        self.sent = False
        self.drain = False

    @property
    def head(self) -> Head | None:
        return self._head

    @property
    def body(self) -> bytes:
        """What is held."""
        return b"".join(self._frames)

    @property
    def ahead(self) -> bool:
        return self.sent and self._behind is not None and self._behind.ahead

    async def room(self) -> None:
        if self.sent and self._behind is not None:
            await self._behind.room()

    def begin(self, head: Head) -> None:
        self._head = head
        if self._behind is not None:
            self._behind.drain = self.drain
        if not self._hold(head.model):
            self.send()

    def append(self, frame: bytes) -> None:
        if not self.sent:
            self._frames.append(frame)
            self._size += len(frame)
            if self._size > HOLD:
                self.send()
        elif self._behind is not None:
            self._behind.append(frame)

    def send(self) -> None:
        if self.sent or self._head is None:
            return
        self.sent = True
        self._sending()
        if self._behind is not None:
            self._behind.begin(self._head)
            for frame in self._frames:
                self._behind.append(frame)
        self._frames.clear()

    def retract(self) -> None:
        if not self.sent:
            self._head, self._size = None, 0
            self._frames.clear()


class Cascade:
    def __init__(self, dispatch: Dispatch, reserve: Reserve, clock: Clock) -> None:
        self._dispatch = dispatch
        self._reserve = reserve
        self._clock = clock

    async def run(self, exchange: Exchange, flight: AnswerSink) -> None:
        """Dispatches the request, with a second opinion where its class asks for one. See `Dispatch.run`."""
        verify = _verification(exchange)
        if verify is None:
            await self._dispatch.run(exchange, flight)
            return

        def sending() -> None:
            exchange.first_token_ms = 1000 * (self._clock.monotonic() - exchange.started)

        held = HeldAnswer(flight, lambda model: stronger(exchange, model) is not None, sending)
        await self._dispatch.run(exchange, held)
        if held.sent:
            return
        # So far only we have seen it: were the caller to leave now, nothing was served.
        error, exchange.status = exchange.error, "failed"
        at, cheap = len(exchange.attempts) - 1, exchange.attempts[-1]
        exchange.attempts[at] = structs.replace(cheap, error=UNSENT)
        doubt = await self._doubt(exchange, held.body, verify)
        if doubt is not None and await self._escalate(exchange, flight, doubt, at):
            return
        exchange.attempts[at] = cheap
        exchange.doubt = doubt
        exchange.status, exchange.error = "complete", error
        held.send()

    async def _doubt(self, exchange: Exchange, body: bytes, verify: str) -> str | None:
        """What is wrong with the answer; None: nothing is known to be."""
        answer = await parsed(body, exchange.request.stream)
        if answer is None:
            return None
        for signal in signals_of(exchange.request, answer):
            # A stronger model would run into the caller's own limit as well.
            if signal != "truncated" or exchange.request.max_output is None:
                return signal
        if verify == SIGNALS or verify not in exchange.policy.allow:
            return None
        approval = await self._asked(exchange, verify, answer)
        return "verification" if approval is not None and approval < APPROVED else None

    async def _asked(self, exchange: Exchange, name: str, answer: dict[str, Any]) -> float | None:
        """What the verifier model makes of it, 0..1; None where it cannot be afforded, or gives no clear answer."""
        request = verifier_request(exchange.request, answer, exchange.snapshot.models[name], exchange.id)
        within = min(VERIFY_SECONDS, self._left(exchange))
        if request is None or within <= 0:
            return None
        aside = structs.replace(exchange, request=request, attempts=[], conversation=None)
        if not await self._afforded(exchange, worst_case_of(aside, name)):
            return None
        heard = HeldAnswer()
        try:
            await self._dispatch.attempt(aside, heard, name, len(exchange.attempts), within)
        except (UpstreamError, RequestError):
            return None
        finally:
            exchange.attempts += [
                attempt
                if attempt.outcome in ("failed", "timeout")
                else structs.replace(attempt, error="verifier")
                for attempt in aside.attempts
            ]
        return read_approval(parsed_answer(heard.body, False))

    async def _escalate(self, exchange: Exchange, flight: AnswerSink, doubt: str, at: int) -> bool:
        """Whether a stronger model's answer reached the caller. `at`: the attempt whose answer is in doubt."""
        cheap = exchange.attempts[at]
        name = stronger(exchange, cheap.model)
        left = self._left(exchange)
        if name is None or left <= 0 or _too_dear(exchange, name):
            return False
        if not await self._afforded(exchange, worst_case_of(exchange, name)):
            return False
        exchange.attempts[at] = structs.replace(cheap, error="escalated")
        exchange.escalated = doubt
        try:
            await self._dispatch.attempt(exchange, flight, name, len(exchange.attempts), left)
        except (UpstreamError, RequestError):
            exchange.escalated = None
            return False
        return True

    async def _afforded(self, exchange: Exchange, amount: NanoUSD | None) -> bool:
        # Where a budget is at its limit the cheap answer does; and what has no price is no remedy.
        return amount is not None and await self._reserve.top_up(exchange, amount, soft=True)

    def _left(self, exchange: Exchange) -> float:
        """Seconds until the time the first model's provider may take is used up: all calls share it."""
        assert exchange.plan is not None
        provider = exchange.snapshot.models[exchange.plan.models[0]].provider
        total = exchange.snapshot.providers[provider].timeouts.total
        return total - (self._clock.monotonic() - exchange.started)


async def parsed(body: bytes, stream: bool) -> dict[str, Any] | None:
    """`parsed_answer`, off the event loop where it takes milliseconds."""
    if len(body) > PARSED_AT_ONCE:
        return await asyncio.to_thread(parsed_answer, body, stream)
    return parsed_answer(body, stream)


def stronger(exchange: Exchange, model: str) -> str | None:
    """The next model of the plan with a higher predicted success."""
    plan = exchange.plan
    if plan is None or model not in plan.models:
        return None
    success = {candidate.model: candidate.success for candidate in plan.candidates}
    own = success.get(model)
    for name in plan.models[plan.models.index(model) + 1 :]:
        theirs = success.get(name)
        if own is not None and theirs is not None and theirs > own:
            return name
    return None


def _verification(exchange: Exchange) -> str | None:
    """How an answer of this class is verified; None: there is no cascade, or the app chose the model itself."""
    if exchange.verdict is None or exchange.plan is None or exchange.plan.reason != "cheapest":
        return None
    requirement = exchange.policy.classes.get(exchange.verdict.prompt_class)
    return requirement.cascade if requirement is not None else None


def _too_dear(exchange: Exchange, name: str) -> bool:
    """Whether both calls together would pass what one request may cost."""
    assert exchange.plan is not None
    limit = exchange.question.max_cost if exchange.question is not None else None
    if limit is None:
        return False
    expected = next(c.expected_cost for c in exchange.plan.candidates if c.model == name)
    return sum(attempt.cost or 0 for attempt in exchange.attempts) + expected > limit
