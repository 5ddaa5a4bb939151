"""Ledger records for tests: small, whole and consistent in themselves."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Literal

from router.core.cached import CacheCandidate, CacheLabel
from router.core.learning import Label
from router.core.types import (
    BUCKETS,
    Attempt,
    AttemptRecord,
    BudgetWindow,
    CostLine,
    NanoUSD,
    OpenRecord,
    PriceRecord,
    RequestRecord,
    Usage,
)
from tests.values import replace

OPENED = datetime(2026, 11, 24, 10, 30, 0, 123456, tzinfo=UTC)
USD_PER_MILLION = Decimal("0.25")


class FixedClock:
    """`ports.Clock` that stands still."""

    def monotonic(self) -> float:
        return 0.0

    def now(self) -> datetime:
        return datetime(2026, 11, 24, 11, 0, 0, tzinfo=UTC)


def new_id() -> str:
    return str(uuid.uuid4())


def price(model: str = "mini", usd: Decimal = USD_PER_MILLION) -> PriceRecord:
    prices = dict.fromkeys(BUCKETS, usd)
    return PriceRecord(
        id=f"price-{model}-{usd}",
        provider="openai",
        model=model,
        effective_from=datetime(2026, 1, 1, tzinfo=UTC),
        unit_prices=prices,
        list_prices=prices,
        marginal_prices=prices,
        source="test",
    )


def lines(record: PriceRecord, usage: Usage) -> tuple[CostLine, ...]:
    """What the test expects a usage to cost, computed apart from the product."""
    found = []
    for bucket, quantity in usage.buckets():
        unit = int(record.unit_prices[bucket] * 10**9)
        amount = NanoUSD(round(Decimal(quantity * unit) / 1_000_000))
        found.append(CostLine(bucket, quantity, unit, unit, amount, amount, record.id))
    return tuple(found)


def windows(team: str, app: str | None) -> tuple[BudgetWindow, ...]:
    keys = ["organisation", f"team:{team}", *([f"app:{team}/{app}"] if app else [])]
    return tuple(BudgetWindow(key, "2026-11") for key in keys)


def opened(
    request_id: str, *, team: str = "search", app: str | None = "faq-bot", **changes: Any
) -> OpenRecord:
    record = OpenRecord(
        id=request_id,
        opened_at=OPENED,
        key_id="key_1",
        team=team,
        app=app,
        cost_center="4711",
        endpoint="/v1/chat/completions",
        requested_model="auto",
        prompt_class="simple",
        streamed=False,
        policy_hash="hash-1",
        budgets=windows(team, app),
        worst_case=NanoUSD(1_000_000),
        input_tokens=100,
        output_tokens=200,
    )
    return replace(record, **changes)


def attempted(request_id: str, index: int = 0, *, priced: PriceRecord | None = None) -> AttemptRecord:
    return AttemptRecord(request_id, index, "openai", "mini", "gpt-5-mini", OPENED, priced or price())


def settled(
    request_id: str,
    *,
    team: str = "search",
    app: str | None = "faq-bot",
    usage: Usage = Usage(input=100, output=50),  # noqa: B008 - frozen
    baseline: int | None = 100_000,
    failed_first: bool = False,
    **changes: Any,
) -> RequestRecord:
    """A complete request on `mini`; with `failed_first` a cut attempt that cost money came before it."""
    priced = price()
    costs: list[Attempt] = []
    if failed_first:
        costs.append(_attempt(0, Usage(input=7), priced, "cut"))
    costs.append(_attempt(len(costs), usage, priced, "complete"))
    return _request(request_id, team, app, usage, baseline, costs, changes)


def hit(
    cache: Literal["exact", "semantic"], *, entry: str, saved: int = 90_000, **changes: Any
) -> RequestRecord:
    """An answer out of a cache; a semantic one with the candidate that was served."""
    found = candidate(entry=entry, mode="enforce", served=True, saved=saved) if cache == "semantic" else None
    parts: dict[str, Any] = {
        "attempts": (),
        "cache": cache,
        "cache_entry": entry,
        "decision": cache,
        "cost": NanoUSD(0),
        "baseline": NanoUSD(saved),
        "routing_savings": NanoUSD(0),
        "cache_savings": NanoUSD(saved),
        "overhead": NanoUSD(0),
        "candidate": found,
    }
    return settled(new_id(), **{**parts, **changes})


def labelled(request: RequestRecord, source: str = "refusal", **changes: Any) -> Label:
    """A label of the model that served it."""
    label = Label(
        request_id=request.id,
        model=request.served_model or "",
        score=0.0,
        weight=0.5,
        source=source,
        propensity=request.propensity,
        at=OPENED,
        key_id=request.key_id,
        team=request.team,
    )
    return replace(label, **changes)


def candidate(**changes: Any) -> CacheCandidate:
    """What the semantic cache found and, in shadow, did not serve."""
    found = CacheCandidate(
        scope="scope-1",
        entry="entry-1",
        similarity=0.95,
        probability=0.9,
        threshold=0.85,
        mode="shadow",
        served=False,
        would_serve=True,
        saved=40_000,
    )
    return replace(found, **changes)


def cache_labelled(request: RequestRecord, **changes: Any) -> CacheLabel:
    """A label of the candidate of `request`, right and by agreement."""
    found = request.candidate or candidate()
    label = CacheLabel(
        request_id=request.id,
        scope=found.scope,
        entry=found.entry,
        score=found.probability,
        right=True,
        propensity=1.0,
        source="agreement",
        at=OPENED,
        key_id=request.key_id,
        team=request.team,
        app=request.app,
    )
    return replace(label, **changes)


def _attempt(index: int, usage: Usage, priced: PriceRecord, outcome: Any) -> Attempt:
    priced_lines = lines(priced, usage)
    return Attempt(
        index=index,
        provider="openai",
        model="mini",
        upstream_model="gpt-5-mini",
        started_at=OPENED,
        outcome=outcome,
        status_code=200,
        first_token_ms=12.5,
        duration_ms=30.25,
        usage=usage,
        lines=priced_lines,
        cost=NanoUSD(sum(line.amount for line in priced_lines)),
        price=priced,
    )


def _request(
    request_id: str,
    team: str,
    app: str | None,
    usage: Usage,
    baseline: int | None,
    attempts: Sequence[Attempt],
    changes: dict[str, Any],
) -> RequestRecord:
    cost = sum(attempt.cost or 0 for attempt in attempts)
    overhead = cost - (attempts[-1].cost or 0)
    record = RequestRecord(
        id=request_id,
        opened_at=OPENED,
        settled_at=OPENED,
        key_id="key_1",
        team=team,
        app=app,
        cost_center="4711",
        tags={"data": ("pii",)},
        endpoint="/v1/chat/completions",
        caller_request_id=None,
        requested_model="auto",
        baseline_model="frontier",
        served_model="mini",
        served_provider="openai",
        streamed=False,
        prompt_class="simple",
        difficulty=0.25,
        confidence=0.75,
        encoder="static",
        decision="mini: cheapest that meets simple",
        dropped={"frontier": "dearer"},
        propensity=1.0,
        policy_hash="hash-1",
        exceptions=(),
        budgets=windows(team, app),
        cache="miss",
        cache_entry=None,
        status="complete",
        http_status=200,
        error=None,
        estimated=False,
        unpriced=False,
        usage=usage,
        worst_case=NanoUSD(1_000_000),
        cost=NanoUSD(cost),
        baseline=None if baseline is None else NanoUSD(baseline),
        routing_savings=None if baseline is None else NanoUSD(baseline - cost + overhead),
        cache_savings=None if baseline is None else NanoUSD(0),
        overhead=None if baseline is None else NanoUSD(overhead),
        potential_savings=None,
        first_token_ms=12.5,
        duration_ms=30.25,
        attempts=tuple(attempts),
    )
    return replace(record, **changes)
