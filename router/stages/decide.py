"""Asks `router.core.decide` with what is known now: the verdict, the prices and how every model does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from decimal import Decimal
from types import MappingProxyType
from typing import cast

from classifiers.classifier import Verdict
from router.core.decide import DEFAULT_OUTPUT_TOKENS, NoPlan, Plan, Question, decide, success_of
from router.core.errors import ContextExceeded, InvalidRequest, NotAllowed, NothingMeets, RequestError
from router.core.floor import QualityFloor
from router.core.health import Health
from router.core.learning import Estimate, Floor, Learned
from router.core.policy import EffectivePolicy
from router.core.ports import Clock
from router.core.pricing import cost_of
from router.core.types import PROMPT_CLASSES, NanoUSD, PromptClass
from router.stages.exchange import Exchange, serving

_NO_ESTIMATES: Mapping[str, Estimate] = MappingProxyType({})


def _nothing_learned() -> None:
    return None


class Decide:
    """`learned` gives the artefact in force, None while there is none. `executor` computes quality floors off the
    answer path; without one the first request of a policy waits for them.
    """

    def __init__(
        self,
        health: Health,
        clock: Clock,
        learned: Callable[[], Learned | None] = _nothing_learned,
        executor: Executor | None = None,
    ) -> None:
        self._health = health
        self._clock = clock
        self._learned = learned
        self._executor = executor
        self._floor: tuple[Learned | None, QualityFloor] = (None, QualityFloor(None))

    def choose(self, exchange: Exchange, draw: float) -> None:
        """Sets the plan on the exchange. Raises the refusal where nothing may serve the request."""
        plan = self.plan(exchange, exchange.policy, exchange.verdict, draw=draw)
        if isinstance(plan, NoPlan):
            raise _refused(plan, exchange)
        exchange.plan = plan

    def downgraded(self, exchange: Exchange) -> Plan | NoPlan:
        """The plan for a budget at its limit."""
        return self.plan(exchange, exchange.policy, exchange.verdict, downgrade=True)

    def plan(
        self,
        exchange: Exchange,
        policy: EffectivePolicy,
        verdict: Verdict | None,
        *,
        draw: float = 1.0,
        downgrade: bool = False,
    ) -> Plan | NoPlan:
        snapshot, now = exchange.snapshot, self._clock.monotonic()
        live = {
            name: self._health.status(snapshot.models[name].provider, name, now, exchange.conversation)
            for name in policy.allow
        }
        question = exchange.question = _question(exchange, verdict)
        return decide(
            question,
            policy,
            snapshot.models,
            exchange.prices,
            live,
            draw=draw,
            downgrade=downgrade,
            success=self.estimates(exchange) or None,
            floor=self._quality_floor(exchange, policy, question),
        )

    @property
    def floor(self) -> QualityFloor:
        """The quality floors of the artefact in force."""
        learned = self._learned()
        if self._floor[0] is not learned:
            calibration = None if learned is None else learned.calibration
            self._floor = (learned, QualityFloor(calibration, self._executor))
        return self._floor[1]

    def estimates(self, exchange: Exchange) -> Mapping[str, Estimate]:
        """The learned estimates for the question in hand, of every allowed model; empty where the priors decide."""
        learned, question = self._learned(), exchange.question
        if learned is None or question is None or question.prompt_class is None or exchange.features is None:
            return _NO_ESTIMATES
        if exchange.features_encoder != learned.predictor.encoder_id:
            return _NO_ESTIMATES
        prompt_class = question.prompt_class
        # A verdict is asked about more than once: its neighbours, a downgrade, what substituting would have saved.
        # Difficulty only moves priors: where none of them speaks, the class alone says what is predicted.
        key = (learned.predictor.id, prompt_class, question.difficulty)
        any_difficulty = (learned.predictor.id, prompt_class, None)
        known = exchange.estimates.get(key) or exchange.estimates.get(any_difficulty)
        if known is None:
            models = exchange.snapshot.models
            priors = {
                name: float(prior)
                for name in exchange.policy.allow
                if (prior := success_of(models[name].quality, prompt_class, question.difficulty)) is not None
            }
            known = exchange.estimates[key] = learned.predictor.predict(
                exchange.features, prompt_class, priors
            )
            if not any(estimate.fallback for estimate in known.values()):
                exchange.estimates[any_difficulty] = known
        return known

    def _quality_floor(self, exchange: Exchange, policy: EffectivePolicy, question: Question) -> Floor | None:
        requirement = policy.classes.get(question.prompt_class or "")
        if requirement is None or requirement.confidence is None:
            return None
        minimum = max(requirement.min_quality, question.min_quality or Decimal(0))
        assert question.prompt_class is not None
        found = self.floor.of(exchange.snapshot, policy, question.prompt_class, minimum, exchange.opened_at)
        if found is not None and not exchange.comparable:
            # None of its like is ever drawn, so what was shown was shown of other requests.
            return replace(found, model=None, bound=0.0)
        return found

    def could_change(self, exchange: Exchange, verdict: Verdict) -> bool:
        """Whether a neighbouring class would have led to another model."""
        choice = _choice(self.plan(exchange, exchange.policy, verdict))
        return any(
            _choice(self.plan(exchange, exchange.policy, other)) != choice for other in _neighbours(verdict)
        )

    def potential(self, exchange: Exchange) -> NanoUSD | None:
        """What a named request would have saved, had the policy let a cheaper model answer it."""
        advice, plan = exchange.advice, exchange.plan
        if advice is None or not advice.done() or advice.cancelled() or advice.exception() is not None:
            return None
        served = serving(exchange.attempts)
        if plan is None or served is None or served.cost is None:
            return None
        freed = replace(exchange.policy, substitute=True)
        other = _choice(self.plan(exchange, freed, advice.result()))
        price = exchange.prices.get(other) if other is not None else None
        if price is None:
            return None
        return NanoUSD(served.cost - cost_of(served.usage, price))


def _question(exchange: Exchange, verdict: Verdict | None) -> Question:
    request, policy, wishes = exchange.request, exchange.policy, exchange.wishes
    limits = [limit for limit in (policy.max_cost_per_request, wishes.max_cost) if limit is not None]
    return Question(
        needs=request.needs,
        parameters=request.parameters,
        choices=request.choices,
        input_tokens=request.input_tokens,
        output_tokens=verdict.output_tokens if verdict is not None else DEFAULT_OUTPUT_TOKENS,
        asked_output=request.max_output,
        reference=exchange.reference,
        prompt_class=verdict.prompt_class if verdict is not None else None,
        difficulty=verdict.difficulty if verdict is not None else None,
        min_quality=wishes.min_quality,
        max_cost=min(limits) if limits else None,
    )


def _choice(plan: Plan | NoPlan) -> str | None:
    return plan.models[0] if isinstance(plan, Plan) else None


def _neighbours(verdict: Verdict) -> list[Verdict]:
    at = PROMPT_CLASSES.index(cast("PromptClass", verdict.prompt_class))
    centres = ((index * 2 + 1) / 6 for index in range(3))
    others = zip(PROMPT_CLASSES, centres, strict=True)
    return [
        replace(verdict, prompt_class=name, difficulty=centre)
        for index, (name, centre) in enumerate(others)
        if abs(index - at) == 1
    ]


def _refused(plan: NoPlan, exchange: Exchange) -> RequestError:
    why = "; ".join(f"{name}: {reason}" for name, reason in sorted(plan.dropped.items()))
    if plan.kind == "context":
        return ContextExceeded(
            f"The prompt is too long for every model that may answer. {why}", param="messages"
        )
    if plan.kind == "nothing_meets":
        return NothingMeets(f"No model meets the policy for this request right now. {why}", retry_after=5)
    reference = exchange.reference
    if reference is not None and reference in exchange.policy.allow:
        return InvalidRequest(
            f"The model '{reference}' cannot serve this request: {plan.dropped.get(reference, 'unknown')}.",
            param="model",
            code="unsupported_by_model",
        )
    return NotAllowed(f"The policy leaves no model for this request. {why}", param="model")
