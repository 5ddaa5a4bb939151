"""Holds the worst case of a request in every budget it falls under, before anything is spent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec import Struct, structs

from router.core.decide import NoPlan, Plan
from router.core.errors import BudgetExceeded, BudgetHeld, FarthingError, InvalidRequest, RequestError
from router.core.policy import BudgetLimit, EffectivePolicy, ModelSpec
from router.core.ports import BudgetCharge, BudgetStore, Denied
from router.core.pricing import output_bound, usd, worst_case
from router.core.types import BudgetWindow, ChatRequest, NanoUSD
from router.stages.exchange import Exchange

_CALLERS_TOOLS = ("function", "custom")
"""Types of tools that the caller runs."""
_BOUNDED_NEEDS = frozenset({"tools", "json_schema", "vision", "audio"})


class _Hold(Struct, frozen=True):
    plan: Plan
    amount: NanoUSD


class Reserve:
    def __init__(self, budgets: BudgetStore) -> None:
        self._budgets = budgets

    async def hold(self, exchange: Exchange, downgraded: Callable[[], Plan | NoPlan]) -> None:
        """Sets the plan that can be afforded, its windows and its worst case on the exchange.

        `downgraded` decides again for a budget at its limit. Raises BudgetExceeded, BudgetHeld, InvalidRequest
        or UnavailableError.
        """
        policy, plan = exchange.policy, exchange.plan
        assert plan is not None
        capped = any(limit.hard_cap is not None for limit in policy.budgets)
        unbounded = exchange.request.needs - _BOUNDED_NEEDS
        if capped and unbounded:
            raise InvalidRequest(
                f"The cost of {', '.join(sorted(unbounded))} content has no known bound, and a budget with a "
                "hard cap covers this caller. Leave it out, or lift the cap.",
                param="messages",
                code="unbounded_cost",
            )
        if capped and (fees := _fees(exchange.request.body)) is not None:
            raise InvalidRequest(
                f"'{fees}' asks for a tool that the provider runs and bills for beside the tokens. Its fees have no "
                "known bound, and a budget with a hard cap covers this caller. Leave it out, or lift the cap.",
                param=fees,
                code="unbounded_cost",
            )
        exchange.windows = tuple(BudgetWindow(limit.key, policy.period) for limit in policy.budgets)
        try:
            held = await self._hold(exchange, plan, downgraded)
        except RequestError:
            raise
        except BaseException:
            # Cancelled, or the store went away, while a hold may have been taken: give it back.
            self._budgets.settle(exchange.id, exchange.windows, NanoUSD(0))
            raise
        exchange.plan, exchange.worst_case = held.plan, held.amount
        exchange.reserved = True

    async def _hold(self, exchange: Exchange, plan: Plan, downgraded: Callable[[], Plan | NoPlan]) -> _Hold:
        policy = exchange.policy
        held = await self._try(exchange, plan, _charges(policy.budgets, policy.period, soft=True))
        if isinstance(held, Denied) and any(limit.at_limit == "downgrade" for limit in policy.budgets):
            cheaper = downgraded()
            if isinstance(cheaper, Plan):
                held = await self._try(exchange, cheaper, _downgraded_charges(policy.budgets, policy.period))
        if isinstance(held, Denied):
            raise _refusal(held)
        return held

    async def _try(self, exchange: Exchange, plan: Plan, charges: Sequence[BudgetCharge]) -> _Hold | Denied:
        denied: Denied | None = None
        capped = any(charge.cap is not None for charge in charges)
        dropped: dict[str, str] = {}
        # A model asked for by name is not traded for its fallback because money is short.
        named = plan.reason == "named" and plan.models[0] == exchange.reference
        for index, name in enumerate(plan.models[:1] if named else plan.models):
            amount = worst_case_of(exchange, name)
            if amount is None:
                if capped:
                    dropped[name] = "unpriced: its cost cannot be held in a budget"
                    continue
                amount = NanoUSD(0)
            outcome = await self._budgets.reserve(exchange.id, charges, amount)
            if not isinstance(outcome, Denied):
                if index:
                    dropped = {**plan.dropped, **dropped}
                    plan = structs.replace(plan, models=plan.models[index:], dropped=dropped)
                return _Hold(plan, amount)
            dropped[name] = f"its worst case does not fit budget {outcome.charge.window.key}"
            if denied is None or outcome.only_held:
                denied = outcome
        if denied is None:
            raise BudgetExceeded(
                "No model of the plan has a known price, and a budget with a hard cap covers this caller. Add "
                "prices to providers.yaml."
            )
        return denied

    async def top_up(self, exchange: Exchange, amount: NanoUSD, *, soft: bool = False) -> bool:
        """Adds to the hold for another attempt, or for a stream that outgrows it. False: there is no room.

        `soft`: the budgets' own limits bound it as well, for a call that could be left out.
        """
        charges = _charges(exchange.policy.budgets, exchange.policy.period, soft=soft)
        try:
            outcome = await self._budgets.reserve(exchange.id, charges, amount)
        except FarthingError:
            return False
        if isinstance(outcome, Denied):
            return False
        exchange.worst_case = NanoUSD(exchange.worst_case + amount)
        return True


def _fees(body: Mapping[str, Any]) -> str | None:
    """The field that asks a provider for more than tokens."""
    if body.get("web_search_options") is not None:
        return "web_search_options"
    tools = body.get("tools")
    if isinstance(tools, list):
        for tool in tools:
            if isinstance(tool, dict) and tool.get("type", "function") not in _CALLERS_TOOLS:
                return "tools"
    return None


def worst_case_of(exchange: Exchange, name: str) -> NanoUSD | None:
    """design.md section 6; None where the model has no known price."""
    price = exchange.prices.get(name)
    if price is None:
        return None
    request, model = exchange.request, exchange.snapshot.models[name]
    return worst_case(
        price, request.input_bound, request.choices, output_held(request, model, exchange.policy)
    )


def output_held(request: ChatRequest, model: ModelSpec, policy: EffectivePolicy) -> int:
    """Output tokens of one choice the hold covers."""
    return output_bound(
        request.max_output,
        assume_max_output=policy.assume_max_output,
        max_output=model.max_output,
        context=model.context,
        # An estimate may be far too high (pictures, rare scripts), and what it leaves out would not be held.
        input_tokens=request.input_tokens // 2,
    )


def _charges(limits: Sequence[BudgetLimit], period: str, *, soft: bool) -> tuple[BudgetCharge, ...]:
    return tuple(
        BudgetCharge(BudgetWindow(limit.key, period), _cap(limit) if soft else limit.hard_cap)
        for limit in limits
    )


def _downgraded_charges(limits: Sequence[BudgetLimit], period: str) -> tuple[BudgetCharge, ...]:
    """Only budgets that downgrade at their limit go on to their hard cap; the others keep refusing at theirs."""
    return tuple(
        BudgetCharge(
            BudgetWindow(limit.key, period), limit.hard_cap if limit.at_limit == "downgrade" else _cap(limit)
        )
        for limit in limits
    )


def _cap(limit: BudgetLimit) -> NanoUSD | None:
    if limit.limit is None:
        return limit.hard_cap
    return limit.limit if limit.hard_cap is None else min(limit.limit, limit.hard_cap)


def _refusal(denied: Denied) -> RequestError:
    budget = f"{denied.charge.window.key} ({denied.charge.window.period})"
    if denied.only_held:
        return BudgetHeld(
            f"The rest of budget {budget} is held by requests in flight. Try again shortly.", retry_after=1
        )
    return BudgetExceeded(
        f"Budget {budget} is spent: {_usd(denied.reading.spent)} of {_usd(denied.charge.cap or 0)} USD, and this "
        "request's worst case does not fit. Send a lower max_tokens, or have the budget raised in policy.yaml."
    )


def _usd(amount: int) -> str:
    return f"{usd(amount):.4f}"
