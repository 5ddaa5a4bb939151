"""Exactly one ledger entry for every admitted request, whatever happened to it.

Synchronous on purpose: it runs while a cancelled request unwinds, where an `await` would be cancelled again.
"""

from __future__ import annotations

import asyncio
from datetime import datetime

from classifiers import prompt_features
from router.core.errors import RequestError
from router.core.ports import BudgetStore, Clock, Journal
from router.core.pricing import cost_of
from router.core.types import Attempt, NanoUSD, OpenRecord, PriceRecord, RequestRecord, Usage
from router.stages.exchange import Exchange, serving
from router.stages.telemetry import Telemetry

_CLIENT_CLOSED = 499


class Settle:
    def __init__(self, journal: Journal, budgets: BudgetStore, telemetry: Telemetry, clock: Clock) -> None:
        self._journal = journal
        self._budgets = budgets
        self._telemetry = telemetry
        self._clock = clock

    def open(self, exchange: Exchange) -> None:
        """Written before anything is sent to a provider: from here on the request is admitted and has a row."""
        self._journal.open(_open_record(exchange), attempt_follows=exchange.reserved)

    def withdraw(self, exchange: Exchange) -> None:
        """Releases a request whose opening could not be written: it was not admitted and has no row. One that went
        to a provider before is settled.
        """
        if not exchange.attempts and exchange.reserved:
            exchange.reserved = False
            self._budgets.settle(exchange.id, exchange.windows, NanoUSD(0))

    def dispatched(self, exchange: Exchange) -> RequestRecord | None:
        """Settles a request that went to a provider, or was reserved for one. None: settled before."""
        if exchange.record is not None or not exchange.reserved:
            return None
        served = serving(exchange.attempts)
        unpriced = any(attempt.cost is None for attempt in exchange.attempts)
        cost = None if unpriced else NanoUSD(sum(attempt.cost or 0 for attempt in exchange.attempts))
        usage = served.usage if served is not None else Usage()
        baseline = _at_price(usage, exchange.baseline_price)
        served_cost = served.cost if served is not None else NanoUSD(0)
        routing = overhead = None
        if cost is not None and served_cost is not None:
            overhead = NanoUSD(cost - served_cost)
            routing = NanoUSD(baseline - served_cost) if baseline is not None else None
        record = self._record(
            exchange,
            served_model=served.model if served is not None else None,
            served_provider=served.provider if served is not None else None,
            usage=usage,
            cost=cost,
            baseline=baseline,
            routing=routing,
            cache=NanoUSD(0) if routing is not None else None,
            overhead=overhead if routing is not None else None,
            estimated=any(attempt.estimated for attempt in exchange.attempts),
            unpriced=unpriced,
            attempts=tuple(exchange.attempts),
        )
        self._finish(exchange, record)
        # An unpriced answer keeps its worst case booked as spent: unknown is never free.
        self._budgets.settle(exchange.id, exchange.windows, cost if cost is not None else exchange.worst_case)
        return record

    def from_cache(
        self, exchange: Exchange, usage: Usage, avoided: NanoUSD | None, model: str, provider: str
    ) -> None:
        """Settles a request that cost nothing: a cache hit, or one that shared another's answer. `avoided` is what
        the answer cost when `model` made it.
        """
        if exchange.record is not None:
            return
        baseline = _at_price(usage, exchange.baseline_price)
        known = baseline is not None and avoided is not None
        record = self._record(
            exchange,
            served_model=model,
            served_provider=provider,
            usage=usage,
            cost=NanoUSD(0),
            baseline=baseline,
            routing=NanoUSD(baseline - avoided) if baseline is not None and avoided is not None else None,
            cache=avoided if known else None,
            overhead=NanoUSD(0) if known else None,
            estimated=False,
            unpriced=False,
            attempts=(),
        )
        self._finish(exchange, record)

    def _finish(self, exchange: Exchange, record: RequestRecord) -> None:
        exchange.record = record
        self._journal.settle(record)
        self._telemetry.settled(record)

    def _record(
        self,
        exchange: Exchange,
        *,
        served_model: str | None,
        served_provider: str | None,
        usage: Usage,
        cost: NanoUSD | None,
        baseline: NanoUSD | None,
        routing: NanoUSD | None,
        cache: NanoUSD | None,
        overhead: NanoUSD | None,
        estimated: bool,
        unpriced: bool,
        attempts: tuple[Attempt, ...],
    ) -> RequestRecord:
        now: datetime = self._clock.now()
        verdict, plan, policy = exchange.verdict, exchange.plan, exchange.policy
        caller, request = exchange.caller, exchange.request
        return RequestRecord(
            id=exchange.id,
            opened_at=exchange.opened_at,
            settled_at=now,
            key_id=caller.key_id,
            team=caller.team,
            app=caller.app,
            cost_center=policy.cost_center,
            tags={key: tuple(sorted(values)) for key, values in policy.tags.items()},
            endpoint=exchange.endpoint,
            caller_request_id=exchange.wishes.caller_request_id,
            requested_model=request.model,
            baseline_model=exchange.baseline_name,
            served_model=served_model,
            served_provider=served_provider,
            streamed=request.stream,
            prompt_class=exchange.prompt_class,
            difficulty=verdict.difficulty if verdict is not None else None,
            confidence=verdict.confidence if verdict is not None else None,
            encoder=verdict.encoder if verdict is not None else None,
            decision=plan.reason if plan is not None else exchange.cache,
            dropped=dict(plan.dropped) if plan is not None else {},
            propensity=plan.propensity if plan is not None else 1.0,
            policy_hash=policy.policy_hash,
            exceptions=policy.exceptions,
            budgets=exchange.windows,
            cache=exchange.cache,
            cache_entry=exchange.cache_entry,
            status=exchange.status,
            http_status=exchange.http_status,
            error=exchange.error,
            estimated=estimated,
            unpriced=unpriced,
            usage=usage,
            worst_case=exchange.worst_case,
            cost=cost,
            baseline=baseline,
            routing_savings=routing,
            cache_savings=cache,
            overhead=overhead,
            potential_savings=exchange.potential_savings,
            first_token_ms=exchange.first_token_ms,
            duration_ms=1000 * (self._clock.monotonic() - exchange.started),
            attempts=attempts,
            features=prompt_features.pack(exchange.features) if exchange.features is not None else None,
            features_encoder=exchange.features_encoder,
            prompt=exchange.kept_prompt,
            labels=exchange.labels,
            candidate=exchange.candidate,
            cache_labels=exchange.cache_labels,
        )


def _at_price(usage: Usage, price: PriceRecord | None) -> NanoUSD | None:
    return cost_of(usage, price) if price is not None else None


def _open_record(exchange: Exchange) -> OpenRecord:
    return OpenRecord(
        id=exchange.id,
        opened_at=exchange.opened_at,
        key_id=exchange.caller.key_id,
        team=exchange.caller.team,
        app=exchange.caller.app,
        cost_center=exchange.policy.cost_center,
        endpoint=exchange.endpoint,
        requested_model=exchange.request.model,
        prompt_class=exchange.prompt_class,
        streamed=exchange.request.stream,
        policy_hash=exchange.policy.policy_hash,
        budgets=exchange.windows,
        worst_case=exchange.worst_case,
        input_tokens=exchange.request.input_tokens,
        output_tokens=exchange.request.choices * exchange.question.output_tokens if exchange.question else 0,
        caller_request_id=exchange.wishes.caller_request_id,
    )


def note_failure(exchange: Exchange, error: BaseException) -> None:
    if isinstance(error, RequestError):
        exchange.status, exchange.http_status, exchange.error = "failed", error.status, error.code
    elif isinstance(error, asyncio.CancelledError | GeneratorExit):
        exchange.status, exchange.http_status, exchange.error = "cancelled", _CLIENT_CLOSED, "client_left"
    else:
        exchange.status, exchange.http_status, exchange.error = "failed", 500, "internal_error"
