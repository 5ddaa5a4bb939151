"""Which model answers: a pure function of what is asked, what the policy says, what it costs and how the models
do right now. It reads no clock, no socket and no global.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from msgspec import Struct

from router.core.learning import Estimate, Floor
from router.core.policy import ClassRequirement, EffectivePolicy, ModelSpec
from router.core.pricing import estimate_cost
from router.core.types import LiveStatus, NanoUSD, PriceRecord

PROBE_SHARE = 0.01
"""Share of eligible requests that go to a model left out for latency, so that its recovery is seen."""

DEFAULT_OUTPUT_TOKENS = 256

Reason = Literal["named", "cheapest", "best", "probe", "budget_downgrade"]

_UNKNOWN = LiveStatus()
_ZERO = Decimal(0)
_NO_REQUIREMENT = ClassRequirement(_ZERO)

# Where each class lies on the scale of difficulty: the middle of its third.
_CLASS_CENTRES: tuple[tuple[str, float], ...] = (("simple", 1 / 6), ("medium", 1 / 2), ("complex", 5 / 6))


class Question(Struct, frozen=True):
    """What decide needs to know of a request. `prompt_class` is None where nothing was classified.

    `reference` is the configured model the app asked for by name; None for `auto`. `input_tokens` and
    `output_tokens` are forecasts for one choice; `asked_output` is the caller's own limit.
    """

    needs: frozenset[str]
    parameters: frozenset[str]
    choices: int
    input_tokens: int
    output_tokens: int
    asked_output: int | None
    reference: str | None = None
    prompt_class: str | None = None
    difficulty: float | None = None
    min_quality: Decimal | None = None
    max_cost: NanoUSD | None = None


class Candidate(Struct, frozen=True):
    """A model that passed the hard constraints. `expected_cost` is what routing compares (marginal);
    `success` the predicted probability of a good answer, None without a prior; `estimate` what it was learned from.
    """

    model: str
    expected_cost: NanoUSD
    success: Decimal | None
    first_token: float | None
    total: float | None
    estimate: Estimate | None = None

    @property
    def success_words(self) -> str:
        """What `success` is and where it comes from."""
        known = self.estimate
        if known is None:
            return f"predicted success {self.success:.2f}"
        if known.fallback:
            why = "unlike the labelled traffic" if known.unfamiliar else "no labels yet"
            return f"prior success {self.success:.2f} ({why})"
        return (
            f"learned success {self.success:.2f} "
            f"({known.lower:.2f}-{known.upper:.2f}, {known.evidence:.0f} labels)"
        )


class Plan(Struct, frozen=True):
    """Models to try in order (the first is the choice), why that one, and why not each other one.

    `propensity` is the probability with which the first model was taken, for off-policy evaluation. `compared`: the
    quality floor's cheaper models, on one of which a request that is drawn is compared with the reference.
    """

    models: tuple[str, ...]
    reason: Reason
    dropped: Mapping[str, str]
    candidates: tuple[Candidate, ...] = ()
    propensity: float = 1.0
    notes: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NoPlan:
    """Nothing may serve this request. `kind` says which refusal it becomes."""

    kind: Literal["not_allowed", "context", "nothing_meets"]
    dropped: Mapping[str, str]


def success_of(
    quality: Mapping[str, Decimal] | None, prompt_class: str | None, difficulty: float | None
) -> Decimal | None:
    """Predicted success: the prior of the class, shifted by difficulty along the line through the priors of
    neighbouring classes. At a class's centre it is exactly the prior; beyond the outer centres it stays flat.
    """
    if quality is None or prompt_class is None:
        return None
    if difficulty is None:
        return quality[prompt_class]
    left, right, share = _between(difficulty)
    low = quality[left]
    return low if not share else low + (quality[right] - low) * share


@lru_cache(maxsize=10_001)
def four_decimals(ten_thousandths: int) -> Decimal:
    """A probability that was learned, exact to four decimals."""
    return Decimal(ten_thousandths) / 10_000


@lru_cache(maxsize=64)
def _between(difficulty: float) -> tuple[str, str, Decimal]:
    """The classes whose centres a difficulty lies between, and how far it is from the first to the second."""
    if difficulty <= _CLASS_CENTRES[0][1]:
        return "simple", "simple", Decimal(0)
    for (left, low), (right, high) in pairwise(_CLASS_CENTRES):
        if difficulty <= high:
            return left, right, Decimal(repr(round((difficulty - low) / (high - low), 6)))
    return "complex", "complex", Decimal(0)


def decide(
    question: Question,
    policy: EffectivePolicy,
    models: Mapping[str, ModelSpec],
    prices: Mapping[str, PriceRecord | None],
    live: Mapping[str, LiveStatus],
    *,
    draw: float,
    downgrade: bool = False,
    max_attempts: int = 3,
    success: Mapping[str, Estimate] | None = None,
    floor: Floor | None = None,
) -> Plan | NoPlan:
    """The ordered plan for one request. `draw` in [0, 1) is the only randomness, and it is passed in.

    `downgrade`: a budget is at its limit, so the cheapest model that passes the hard constraints answers. `success`:
    learned estimates by model; where there are none the priors decide. `floor`: the quality floor of the class, which
    then stands in place of `min_quality`.
    """
    dropped: dict[str, str] = dict(policy.excluded)
    allowed = [name for name in policy.allow if name in models]
    feasible: list[str] = []
    for name in allowed:
        why = _hard_constraint(question, policy, models[name], prices.get(name), live.get(name, _UNKNOWN))
        if why is None:
            feasible.append(name)
        else:
            dropped[name] = why
    candidates = {
        name: _candidate(
            question,
            models[name],
            prices.get(name),
            live.get(name, _UNKNOWN),
            None if success is None else success.get(name),
        )
        for name in feasible
    }
    if question.max_cost is not None:
        for name in list(feasible):
            if candidates[name].expected_cost > question.max_cost:
                dropped[name] = "expected cost above max_cost_per_request"
                feasible.remove(name)

    named = question.reference is not None and not policy.substitute
    if named:
        return _named(question, policy, feasible, candidates, dropped, max_attempts)
    if not feasible:
        return NoPlan(_why_none(allowed, dropped), dropped)
    if downgrade:
        chosen = min(feasible, key=lambda name: _price_order(candidates[name]))
        for name in feasible:
            if name != chosen:
                dropped[name] = "budget at its limit: the cheapest model answers"
        return Plan((chosen,), "budget_downgrade", dropped, tuple(candidates.values()))
    return _automatic(question, policy, feasible, candidates, dropped, draw, max_attempts, floor)


def _named(
    question: Question,
    policy: EffectivePolicy,
    feasible: Sequence[str],
    candidates: Mapping[str, Candidate],
    dropped: dict[str, str],
    max_attempts: int,
) -> Plan | NoPlan:
    reference = question.reference
    assert reference is not None
    rest = [name for name in policy.fallback if name in feasible and name != reference]
    if reference in feasible:
        order = [reference, *rest]
    elif reference in policy.allow and "unavailable" in dropped.get(reference, "") and rest:
        order = rest  # the named model is down: its fallback answers, as it would after a failed attempt
    else:
        return NoPlan(_why_none([reference] if reference in policy.allow else [], dropped), dropped)
    for name in feasible:
        if name not in order:
            dropped[name] = "the app asked for another model by name"
    return Plan(tuple(order[:max_attempts]), "named", dropped, tuple(candidates.values()))


def _automatic(
    question: Question,
    policy: EffectivePolicy,
    feasible: list[str],
    candidates: Mapping[str, Candidate],
    dropped: dict[str, str],
    draw: float,
    max_attempts: int,
    floor: Floor | None,
) -> Plan | NoPlan:
    requirement = policy.classes.get(question.prompt_class or "medium", _NO_REQUIREMENT)
    minimum = max(requirement.min_quality, question.min_quality or _ZERO)
    good: list[str] = []
    slow: list[str] = []
    for name in feasible:
        candidate = candidates[name]
        if name == question.reference:
            good.append(name)  # what the app asked for is always good enough, and fast enough, for it
        elif candidate.success is None:
            dropped[name] = "no quality prior: served by name or as fallback only"
        elif (low := _not_good_enough(candidate, minimum, floor)) is not None:
            dropped[name] = low
        elif (late := _too_slow(candidate, requirement)) is not None:
            dropped[name] = late
            slow.append(name)
        else:
            good.append(name)

    ordered = sorted(good, key=lambda name: _price_order(candidates[name]))
    notes: tuple[str, ...] = ()
    if any(entry.estimate is not None and entry.estimate.unfamiliar for entry in candidates.values()):
        notes = ("the prompt is unlike the labelled traffic: priors decide",)
    reason: Reason = "cheapest"
    propensity = 1.0
    probes = [
        name
        for name in sorted(slow, key=lambda name: _price_order(candidates[name]))
        if not ordered or _price_order(candidates[name]) < _price_order(candidates[ordered[0]])
    ]
    if ordered and probes:
        probed = draw < PROBE_SHARE
        propensity = PROBE_SHARE if probed else 1 - PROBE_SHARE
        if probed:
            # Each slow model gets its share of the probes; the draw below PROBE_SHARE picks which.
            probe = probes[int(draw / PROBE_SHARE * len(probes))]
            ordered = [probe, *ordered]
            reason = "probe"
            dropped.pop(probe, None)
    if not ordered:
        if policy.when_nothing_meets == "refuse":
            return NoPlan("nothing_meets", dropped)
        ordered = sorted(feasible, key=lambda name: _best_order(candidates[name]))[:1]
        reason = "best"
        dropped.pop(ordered[0], None)
        notes = (*notes, "nothing meets the class; the best of what is left answers")

    choice = ordered[0]
    for name in ordered[1:]:
        dropped.setdefault(name, "dearer than the choice")
    backups = [name for name in policy.fallback if name in feasible and name != choice]
    if not policy.fallback:
        backups = ordered[1:]
    order = [choice, *backups][:max_attempts]
    compared = () if floor is None else floor.compared
    return Plan(tuple(order), reason, dropped, tuple(candidates.values()), propensity, notes, compared)


def _not_good_enough(candidate: Candidate, minimum: Decimal, floor: Floor | None) -> str | None:
    if floor is not None:
        if candidate.model == floor.reference:
            return None
        return floor.excludes(candidate.model, candidate.estimate)
    if candidate.success is not None and candidate.success < minimum:
        return f"{candidate.success_words} below min_quality {minimum:.2f}"
    return None


def _hard_constraint(
    question: Question,
    policy: EffectivePolicy,
    model: ModelSpec,
    price: PriceRecord | None,
    status: LiveStatus,
) -> str | None:
    if not status.available:
        return f"unavailable: {status.reason}"
    missing = question.needs - model.supports
    if missing:
        return f"does not support {', '.join(sorted(missing))}"
    rejected = question.parameters & model.rejects
    if rejected:
        return f"rejects the parameter {', '.join(sorted(rejected))}"
    if question.asked_output is not None and question.asked_output > model.max_output:
        return f"max_output {model.max_output} below the asked {question.asked_output}"
    if question.input_tokens + (question.asked_output or 1) > model.context:
        return f"context {model.context} too small for about {question.input_tokens} tokens"
    if price is None and policy.on_unpriced_model == "block":
        return "unpriced: add a price, or set on_unpriced_model: allow"
    return None


def _candidate(
    question: Question,
    model: ModelSpec,
    price: PriceRecord | None,
    status: LiveStatus,
    estimate: Estimate | None,
) -> Candidate:
    output = max(1, min(question.output_tokens, question.asked_output or model.max_output, model.max_output))
    cost = NanoUSD(0)
    if price is not None:
        cost = estimate_cost(
            price,
            question.input_tokens,
            output * question.choices,
            marginal=True,
            cached_tokens=question.input_tokens if status.warm else 0,
        )
    first = status.first_token_p95 if status.first_token_p95 is not None else model.expect_first_token
    rate = status.tokens_per_second or model.expect_tokens_per_second
    total = first + output / rate if first is not None and rate else None
    if estimate is None:
        success = success_of(model.quality, question.prompt_class, question.difficulty)
    else:
        success = four_decimals(round(estimate.success * 10_000))
    return Candidate(model.name, cost, success, first, total, estimate)


def _too_slow(candidate: Candidate, requirement: ClassRequirement) -> str | None:
    limit = requirement.first_token_p95
    if limit is not None and candidate.first_token is not None and candidate.first_token > limit:
        return f"first token p95 {candidate.first_token:.2f}s above {limit:g}s"
    limit = requirement.total_p95
    if limit is not None and candidate.total is not None and candidate.total > limit:
        return f"total p95 {candidate.total:.1f}s above {limit:g}s"
    return None


def _price_order(candidate: Candidate) -> tuple[int, Decimal, str]:
    return (candidate.expected_cost, -(candidate.success or Decimal(0)), candidate.model)


def _best_order(candidate: Candidate) -> tuple[Decimal, float, int, str]:
    first = candidate.first_token if candidate.first_token is not None else float("inf")
    return (-(candidate.success or Decimal(0)), first, candidate.expected_cost, candidate.model)


def _why_none(
    names: Iterable[str], dropped: Mapping[str, str]
) -> Literal["not_allowed", "context", "nothing_meets"]:
    reasons = [dropped.get(name, "") for name in names]
    if reasons and all(reason.startswith("context ") for reason in reasons):
        return "context"
    if reasons and all(reason.startswith("unavailable") for reason in reasons):
        return "nothing_meets"
    return "not_allowed"
