"""Shadow answers: a share of the requests that a cheaper model answered also goes to the reference, and a judge, or
their agreement, says how good both answers are. Where a quality floor is asked for the draw takes no notice of who
answered: the reference and one of the cheaper models are compared, whichever of them has not answered answers now.

Off the answer path: it begins when the answer has ended, in a task of its own that fails and delays no request. Each
call is a ledger row of its own (`learn.shadow`, `learn.judge`) under the budget `learn`; the labels travel with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

from msgspec import structs

from classifiers.encoder import Encoder
from classifiers.floor import draw_comparison
from router.core.decide import NoPlan, Plan
from router.core.errors import FarthingError, UnavailableError, UpstreamError
from router.core.floor import reference_of
from router.core.learning import DRAWN, DRAWN_JUDGED, DRAWN_SAME, Label
from router.core.policy import BudgetLimit, LearnPolicy
from router.core.ports import Clock, Identifiers
from router.core.pricing import price_usage, total
from router.core.types import ChatRequest
from router.stages.cascade import HeldAnswer, parsed
from router.stages.dispatch import Dispatch
from router.stages.exchange import Exchange, serving
from router.stages.judge import (
    VERDICT_TOKENS,
    Answer,
    agreement,
    judge_request,
    read_verdict,
    readable,
    says_the_same,
    unstreamed,
)
from router.stages.reserve import Reserve
from router.stages.settle import Settle, note_failure
from router.stages.signals import signals_of

log = logging.getLogger("farthing")

IN_FLIGHT = 8
"""Pairs in the making in one worker; a request drawn beyond that is left out."""
MAX_ANSWER = 256 * 1024
"""Bytes; a longer answer is not compared."""
LEARN = "learn"
SHADOW_ENDPOINT = "learn.shadow"
JUDGE_ENDPOINT = "learn.judge"
ORGANISATION = "organisation"


@dataclass(frozen=True, slots=True)
class _Pair:
    """A request on which `cheaper` is compared with `reference`. `propensity`: with which this pair came about;
    `drawn`: for a quality floor, whoever answered the request. `answers` by model, at first the one that was served.
    """

    exchange: Exchange
    learn: LearnPolicy
    cheaper: str
    reference: str
    propensity: float
    drawn: bool
    answers: dict[str, Answer]


class Shadows:
    """`encoder` tells how alike two long answers are; `draw` is in [0, 1)."""

    def __init__(
        self,
        dispatch: Dispatch,
        reserve: Reserve,
        settle: Settle,
        encoder: Encoder,
        clock: Clock,
        identifiers: Identifiers,
        draw: Callable[[], float],
    ) -> None:
        self._dispatch = dispatch
        self._reserve = reserve
        self._settle = settle
        self._encoder = encoder
        self._clock = clock
        self._identifiers = identifiers
        self._draw = draw
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = False

    def consider(self, exchange: Exchange, body: bytes | None) -> None:
        """Once a request is settled. `body` is its answer in the form it asked for."""
        learn = exchange.learn
        if learn is None or not learn.shadow or learn.budget is None or self._ended:
            return
        plan = exchange.plan
        if plan is None or not _complete(exchange) or body is None or len(body) > MAX_ANSWER:
            return
        reference = _reference(exchange, drawn=bool(plan.compared))
        if reference is None or not exchange.comparable:
            return
        compared = plan.compared or _answered_cheaper(exchange, reference)
        found = draw_comparison(compared, float(learn.shadow), self._draw()) if compared else None
        if found is None or len(self._tasks) >= IN_FLIGHT:
            return
        cheaper, propensity = found
        able = {candidate.model for candidate in plan.candidates}
        if cheaper not in able or reference not in able:
            return  # another model would not be as likely to be drawn where it is able as where it is not
        if not plan.compared:
            propensity *= plan.propensity
        pair = _Pair(exchange, learn, cheaper, reference, propensity, bool(plan.compared), {})
        self.spawn(self._compare(pair, body))

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs it off the answer path. Nothing is spawned beyond IN_FLIGHT, nor once it has ended."""
        if self._ended or len(self._tasks) >= IN_FLIGHT:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def end(self) -> None:
        """Breaks off what is under way, and begins nothing more."""
        self._ended = True
        for task in self._tasks:
            task.cancel()

    async def ended(self) -> None:
        """Waits until what was broken off is settled."""
        self.end()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _compare(self, pair: _Pair, body: bytes) -> None:
        exchange = pair.exchange
        answer, served = await parsed(body, exchange.request.stream), serving(exchange.attempts)
        if answer is None or served is None:
            return
        pair.answers[served.model] = answer
        try:
            await self._shadow(pair)
        except FarthingError:
            return  # no budget, no store or no answer: there is no label, and a call that was made has its row
        except Exception:
            log.exception("a shadow answer to request %s failed", exchange.id)

    async def _shadow(self, pair: _Pair) -> None:
        judge = pair.learn.judge if readable(pair.exchange.request) else None
        if judge not in pair.exchange.policy.allow:
            judge = None  # whoever may not answer the prompt may not read it either
        for model in (pair.cheaper, pair.reference):
            if model not in pair.answers:
                await self._second(pair, model, agree=judge is None or pair.drawn)
        if judge is None or not pair.answers.keys() >= {pair.cheaper, pair.reference}:
            return

        def scored(judging: Exchange, cheaper: float, reference: float) -> None:
            source = DRAWN_JUDGED if pair.drawn else "judge"
            judging.labels = self._labels(pair, source, cheaper, reference, 1.0)

        answers = (pair.answers[pair.cheaper], pair.answers[pair.reference])
        await self.judged(pair.exchange, pair.learn, judge, answers, scored)

    async def _second(self, pair: _Pair, model: str, *, agree: bool) -> None:
        """A further answer to the pair's request. `agree`: once it is the last, agreement labels the pair; of a pair
        that was drawn for a floor also where a judge will be asked, for without its verdict the pair counts as well.
        """
        request = unstreamed(pair.exchange.request)
        shadow = self.aside(pair.exchange, pair.learn, SHADOW_ENDPOINT, model, request)

        def read(answer: Answer) -> None:
            pair.answers[model] = answer
            if agree and pair.answers.keys() >= {pair.cheaper, pair.reference}:
                shadow.labels = self._agreed(pair)

        await self.call(shadow, model, read)

    async def judged(
        self,
        exchange: Exchange,
        learn: LearnPolicy,
        judge: str,
        answers: tuple[Answer, Answer],
        read: Callable[[Exchange, float, float], None],
    ) -> None:
        """Asks `judge` how good two answers to a request are. `read` gets the judge's call, before it is settled, and
        the score of each answer in [0, 1]; it is not called where nothing clear was said. Raises FarthingError.
        """
        swapped = self._draw() < 0.5  # a judge prefers a place, so each answer stands in each as often
        a, b = reversed(answers) if swapped else answers
        request = judge_request(exchange.request, a, b, exchange.snapshot.models[judge], exchange.id)
        if request is None:
            return
        judging = self.aside(exchange, learn, JUDGE_ENDPOINT, judge, request)

        def said(answer: Answer) -> None:
            verdict = read_verdict(answer)
            if verdict is not None:
                scores = (verdict.a_good, verdict.b_good)
                read(judging, *(reversed(scores) if swapped else scores))

        await self.call(judging, judge, said)

    def _agreed(self, pair: _Pair) -> tuple[Label, ...]:
        """Labels without a judge: the reference's answer is the yardstick, unless it is broken itself. A pair drawn
        for a floor is labelled in any case, if only to say that it was drawn, and the label says whether the answers
        are the same beyond doubt.
        """
        cheaper, reference = pair.answers[pair.cheaper], pair.answers[pair.reference]
        broken = bool(signals_of(pair.exchange.request, reference))
        found = None if broken else agreement(cheaper, reference, self._likeness)
        if not pair.drawn:
            return () if found is None else self._labels(pair, "shadow", found[0], 1.0, found[1])
        score, weight = found or (0.0, 0.0)
        source = DRAWN if broken or not says_the_same(cheaper, reference) else DRAWN_SAME
        return self._labels(pair, source, score, 1.0, weight)

    def _likeness(self, left: str, right: str) -> float:
        vectors = self._encoder.encode([left, right])
        return float(vectors[0] @ vectors[1])

    def _labels(
        self, pair: _Pair, source: str, cheaper: float, reference: float, weight: float
    ) -> tuple[Label, ...]:
        caller, now = pair.exchange.caller, self._clock.now()
        return tuple(
            Label(
                request_id=pair.exchange.id,
                model=model,
                score=score,
                weight=weight,
                source=source,
                propensity=pair.propensity,
                at=now,
                key_id=caller.key_id,
                team=caller.team,
            )
            for model, score in ((pair.cheaper, cheaper), (pair.reference, reference))
        )

    def aside(
        self, origin: Exchange, learn: LearnPolicy, endpoint: str, model: str, request: ChatRequest
    ) -> Exchange:
        """A call of the gateway's own: the team's, but under the budget of learning and not compared to anything."""
        limits = [BudgetLimit(LEARN, learn.budget, learn.budget, "refuse")]
        # What the organisation may spend at most holds for this as well; a team is not made to pay for learning.
        limits += [
            replace(limit, at_limit="refuse") for limit in origin.policy.budgets if limit.key == ORGANISATION
        ]
        question = origin.question
        if question is not None and endpoint == JUDGE_ENDPOINT:
            question = structs.replace(question, output_tokens=VERDICT_TOKENS // 8)
        return Exchange(
            id=self._identifiers.request_id(),
            endpoint=endpoint,
            opened_at=self._clock.now(),
            started=self._clock.monotonic(),
            caller=origin.caller,
            wishes=structs.replace(origin.wishes, caller_request_id=None, min_quality=None, max_cost=None),
            request=structs.replace(request, model=model),
            snapshot=origin.snapshot,
            policy=replace(origin.policy, budgets=tuple(limits)),
            reference=None,
            baseline_name=None,
            baseline_price=None,
            verdict=origin.verdict,
            question=question,
            plan=Plan((model,), "named", {}),
            prices=origin.prices,
        )

    async def call(self, exchange: Exchange, model: str, read: Callable[[Answer], None]) -> Answer | None:
        """The answer; None where it is none. `read` sees it before the call is settled. Raises FarthingError."""
        await self._reserve.hold(exchange, lambda: NoPlan("not_allowed", {}))
        heard = HeldAnswer()
        answer: Answer | None = None
        try:
            self._settle.open(exchange)
            await self._dispatch.attempt(exchange, heard, model, 0)
            exchange.http_status = 200
            answer = await parsed(heard.body, False)
            if answer is not None:
                read(answer)
        except UpstreamError as error:
            exchange.status, exchange.http_status, exchange.error = "failed", 502, error.kind
            raise
        except UnavailableError as error:
            note_failure(exchange, error)
            self._settle.withdraw(exchange)
            raise
        except BaseException as error:
            note_failure(exchange, error)
            raise
        finally:
            self._settle.dispatched(exchange)
        return answer


def _reference(exchange: Exchange, *, drawn: bool) -> str | None:
    """What cheaper models are measured against; None where the policy does not allow the baseline for this request.
    A quality floor has a reference all the same.
    """
    policy, verdict = exchange.policy, exchange.verdict
    if verdict is None:
        return None
    if not drawn and policy.baseline is not None and policy.baseline not in policy.allow:
        return None
    return reference_of(exchange.snapshot, policy, verdict.prompt_class)


def _complete(exchange: Exchange) -> bool:
    """Whether the request was routed, and answered."""
    plan, record = exchange.plan, exchange.record
    routed = plan is not None and plan.reason != "named"
    return routed and record is not None and record.status == "complete"


def _answered_cheaper(exchange: Exchange, reference: str) -> tuple[str, ...]:
    """The model that answered, where the reference is dearer."""
    served, price = serving(exchange.attempts), exchange.prices.get(reference)
    if served is None or served.cost is None or served.model == reference or price is None:
        return ()
    return (served.model,) if total(price_usage(served.usage, price)) > served.cost else ()
