"""Checks of what the semantic cache found: a stored answer is compared with a fresh one.

Where the stored answer was not served, the fresh one is the request's own, and comparing them by agreement costs
nothing. Where it was, the model is asked again off the answer path, under the budget `learn`. A judge costs either
way. Which requests are checked was drawn before anything was looked up (`stages/semantic.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from router.core.cached import CacheLabel, SemanticStore
from router.core.errors import FarthingError, UnavailableError
from router.core.policy import LearnPolicy
from router.core.ports import Clock
from router.stages.cascade import parsed
from router.stages.exchange import Exchange
from router.stages.judge import Answer, parsed_answer, says_the_same, unstreamed
from router.stages.semantic import Found, Inquiry
from router.stages.shadow import SHADOW_ENDPOINT, Shadows
from router.stages.signals import signals_of

log = logging.getLogger("farthing")

MAX_FRESH = 128 * 1024
"""Bytes of a fresh answer that is compared; a short answer is not said in so many."""
GOOD = 0.5
AGREEMENT = "agreement"
JUDGE = "judge"


class CacheChecks:
    def __init__(self, shadows: Shadows, store: SemanticStore, clock: Clock) -> None:
        self._shadows = shadows
        self._store = store
        self._clock = clock

    def note(self, exchange: Exchange, body: bytes | None) -> None:
        """Once the request's own answer has ended, before it is settled: the label that costs nothing."""
        inquiry = exchange.inquiry
        found = inquiry.found if inquiry is not None else None
        if inquiry is None or found is None or not inquiry.checked or inquiry.judge is not None:
            return
        if exchange.candidate is None or found.comparable is None or not _whole(exchange) or body is None:
            return
        try:
            right = _agrees(exchange, found, body, exchange.request.stream)
        except Exception:
            log.exception("a candidate of request %s is not checked", exchange.id)
            return
        if right is not None:
            exchange.cache_labels += (self._label(exchange, inquiry, found, right, AGREEMENT),)

    def consider(self, exchange: Exchange, body: bytes | None) -> None:
        """Once a request is settled: what has to be asked for. `body` is its own answer; None: it had a hit."""
        inquiry, learn = exchange.inquiry, exchange.learn
        found = inquiry.found if inquiry is not None else None
        if inquiry is None or found is None or exchange.candidate is None or not inquiry.checked:
            return
        if learn is None or learn.budget is None:
            return
        if exchange.candidate.served:
            if inquiry.judge is None and found.comparable is None:
                return  # nothing could be said of it
            self._shadows.spawn(
                self._checked(exchange, lambda: self._ask_again(exchange, inquiry, found, learn))
            )
        elif inquiry.judge is not None and body is not None and _whole(exchange):
            self._shadows.spawn(
                self._checked(exchange, lambda: self._compare(exchange, inquiry, found, learn, body))
            )

    async def _checked(self, exchange: Exchange, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except FarthingError:
            return  # no budget, no store or no answer: there is no label, and a call that was made has its row
        except Exception:
            log.exception("what request %s got from the semantic cache is not checked", exchange.id)

    async def _ask_again(
        self, exchange: Exchange, inquiry: Inquiry, found: Found, learn: LearnPolicy
    ) -> None:
        model = found.entry.origin.model
        again = self._shadows.aside(exchange, learn, SHADOW_ENDPOINT, model, unstreamed(exchange.request))
        wrong = False

        def labelled(fresh: Answer) -> None:
            nonlocal wrong
            if (
                inquiry.judge is None
                and found.comparable is not None
                and not signals_of(exchange.request, fresh)
            ):
                right = says_the_same(found.comparable, fresh)
                again.cache_labels = (self._label(exchange, inquiry, found, right, AGREEMENT),)
                wrong = not right

        fresh = await self._shadows.call(again, model, labelled)
        if fresh is not None and inquiry.judge is not None:
            wrong = await self._judged(exchange, inquiry, found, learn, inquiry.judge, fresh) is False
        if wrong:
            await self._quarantine(found)

    async def _compare(
        self, exchange: Exchange, inquiry: Inquiry, found: Found, learn: LearnPolicy, body: bytes
    ) -> None:
        fresh = await parsed(body, exchange.request.stream)
        if fresh is not None and inquiry.judge is not None:
            await self._judged(exchange, inquiry, found, learn, inquiry.judge, fresh)

    async def _judged(
        self,
        exchange: Exchange,
        inquiry: Inquiry,
        found: Found,
        learn: LearnPolicy,
        judge: str,
        fresh: Answer,
    ) -> bool | None:
        """Whether the judge finds the stored answer good; None where it says nothing clear."""
        if signals_of(exchange.request, fresh):
            return None
        stored = await parsed(found.stored.body, found.stored.stream)
        if stored is None:
            return None
        right: bool | None = None

        def scored(judging: Exchange, of_stored: float, _: float) -> None:
            nonlocal right
            right = of_stored >= GOOD
            judging.cache_labels = (self._label(exchange, inquiry, found, right, JUDGE),)

        await self._shadows.judged(exchange, learn, judge, (stored, fresh), scored)
        return right

    async def _quarantine(self, found: Found) -> None:
        """What was served and found wrong is served to nobody else."""
        with suppress(UnavailableError):
            await self._store.remove(found.entry.partition, found.entry.id)

    def _label(
        self, exchange: Exchange, inquiry: Inquiry, found: Found, right: bool, source: str
    ) -> CacheLabel:
        caller = exchange.caller
        return CacheLabel(
            request_id=exchange.id,
            scope=inquiry.scope,
            entry=found.entry.id,
            score=found.candidate.probability,
            right=right,
            propensity=inquiry.propensity,
            source=source,
            at=self._clock.now(),
            key_id=caller.key_id,
            team=caller.team,
            app=caller.app,
        )


def _whole(exchange: Exchange) -> bool:
    return exchange.status == "complete" and exchange.error is None and exchange.doubt is None


def _agrees(exchange: Exchange, found: Found, body: bytes, stream: bool) -> bool | None:
    """Whether the request's own answer says what the comparable stored one does; None: it is none to compare with."""
    if len(body) > MAX_FRESH:
        return False
    fresh = parsed_answer(body, stream)
    if fresh is None or signals_of(exchange.request, fresh):
        return None
    assert found.comparable is not None
    return says_the_same(found.comparable, fresh)
