"""`decide` against a brute-force reading of design.md, and each way a plan can come about."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.decide import PROBE_SHARE, NoPlan, Plan, Question, decide, success_of
from router.core.learning import Estimate, Floor
from router.core.policy import CachePolicy, ClassRequirement, EffectivePolicy, ModelSpec
from router.core.pricing import every_bucket
from router.core.types import PROMPT_CLASSES, LiveStatus, NanoUSD, PriceRecord
from tests.values import replace

NO_PROBE = 0.5


def model(name: str, **changes: Any) -> ModelSpec:
    spec = ModelSpec(
        name=name,
        provider="p",
        upstream_name=name,
        context=10_000,
        max_output=2_000,
        supports=frozenset({"tools"}),
        rejects=frozenset(),
        rename={},
        expect_first_token=None,
        expect_tokens_per_second=None,
        quality={"simple": Decimal("0.9"), "medium": Decimal("0.8"), "complex": Decimal("0.7")},
    )
    return replace(spec, **changes)


def price(name: str, bought: str, sold: str, cached: str | None = None) -> PriceRecord:
    prices = {"input": Decimal(bought), "output": Decimal(sold)}
    if cached is not None:
        prices["input_cached"] = Decimal(cached)
    full = every_bucket(prices)
    return PriceRecord(
        id=name,
        provider="p",
        model=name,
        effective_from=datetime(2026, 1, 1, tzinfo=UTC),
        unit_prices=full,
        list_prices=full,
        marginal_prices=full,
        source="test",
    )


def policy(**changes: Any) -> EffectivePolicy:
    effective = EffectivePolicy(
        policy_hash="h",
        allow=("small", "large"),
        excluded={},
        fallback=(),
        substitute=False,
        classes={name: ClassRequirement(Decimal("0.5")) for name in PROMPT_CLASSES},
        max_cost_per_request=None,
        assume_max_output=1_000,
        when_nothing_meets="best",
        on_unpriced_model="block",
        cache=CachePolicy(),
        advise=Decimal(0),
        learns=True,
        budgets=(),
        baseline=None,
        cost_center=None,
        tags={},
        rules=(),
        exceptions=(),
        fingerprint="f",
        period="2026-11",
    )
    return replace(effective, **changes)


def question(**changes: Any) -> Question:
    asked = Question(
        needs=frozenset(),
        parameters=frozenset(),
        choices=1,
        input_tokens=100,
        output_tokens=100,
        asked_output=None,
        prompt_class="medium",
        difficulty=0.5,
    )
    return replace(asked, **changes)


TWO = {"small": model("small"), "large": model("large")}
PRICES: Mapping[str, PriceRecord | None] = {
    "small": price("small", "0.1", "0.4"),
    "large": price("large", "5", "20"),
}


def plan_for(
    asked: Question | None = None,
    effective: EffectivePolicy | None = None,
    models: Mapping[str, ModelSpec] = TWO,
    prices: Mapping[str, PriceRecord | None] = PRICES,
    live: Mapping[str, LiveStatus] | None = None,
    **options: Any,
) -> Plan | NoPlan:
    options.setdefault("draw", NO_PROBE)
    return decide(asked or question(), effective or policy(), models, prices, live or {}, **options)


def chosen(plan: Plan | NoPlan) -> tuple[str, str]:
    assert isinstance(plan, Plan), plan
    return plan.models[0], plan.reason


# -- the minimum --

NAMES = ("a", "b", "c", "d", "e")
Case = tuple[
    Question,
    EffectivePolicy,
    dict[str, ModelSpec],
    dict[str, PriceRecord | None],
    dict[str, LiveStatus],
]


def case_of(seed: int) -> Case:
    """A random case. Built from a seed, because drawing some sixty values one by one takes ten times as long."""
    dice = Random(seed)

    def share() -> Decimal:
        return Decimal(dice.randint(0, 100)) / 100

    def perhaps(value: Any) -> Any:
        return value if dice.random() < 0.6 else None

    def some(*values: str) -> frozenset[str]:
        return frozenset(value for value in values if dice.random() < 0.4)

    def money() -> str:
        return str(Decimal(dice.choice((0, 100, 250, 1_000, dice.randint(0, 30_000)))) / 1_000)

    names = NAMES[: dice.randint(1, 5)]
    models = {
        name: model(
            name,
            context=dice.choice((500, 5_000, 50_000)),
            max_output=dice.choice((100, 1_000, 8_000)),
            supports=frozenset({"tools"}) | some("vision"),
            rejects=some("temperature") & some("temperature"),
            expect_first_token=perhaps(dice.uniform(0.05, 20)),
            expect_tokens_per_second=perhaps(dice.uniform(1, 500)),
            quality={name: share() for name in PROMPT_CLASSES} if dice.random() < 0.8 else None,
        )
        for name in names
    }
    prices = {name: price(name, money(), money(), money()) if dice.random() < 0.8 else None for name in names}
    live = {
        name: LiveStatus(
            available=dice.random() < 0.9,
            reason="its circuit breaker is open",
            first_token_p95=perhaps(dice.uniform(0.05, 20)),
            tokens_per_second=perhaps(dice.uniform(1, 500)),
            warm=dice.random() < 0.3,
        )
        for name in names
    }
    effective = policy(
        allow=tuple(dice.sample(names, dice.randint(1, len(names)))),
        classes={
            name: ClassRequirement(
                share() * share(), perhaps(dice.uniform(0.05, 20)), perhaps(dice.uniform(0.05, 60))
            )
            for name in PROMPT_CLASSES
        },
        on_unpriced_model=dice.choice(("block", "allow")),
        when_nothing_meets="refuse",
    )
    asked = question(
        needs=some("vision") & some("vision"),
        parameters=some("temperature", "stop", "seed"),
        choices=dice.randint(1, 3),
        input_tokens=dice.choice((10, 400, dice.randint(1, 6_000))),
        output_tokens=dice.randint(1, 2_000),
        asked_output=perhaps(dice.choice((50, dice.randint(1, 2_000)))),
        prompt_class=dice.choice(PROMPT_CLASSES),
        difficulty=None,
        min_quality=perhaps(share() * share()),
        max_cost=perhaps(NanoUSD(dice.randint(0, 50_000_000))),
    )
    return asked, effective, models, prices, live


_seeds = st.integers(0, 2**63)


def brute_force(
    asked: Question,
    effective: EffectivePolicy,
    models: Mapping[str, ModelSpec],
    prices: Mapping[str, PriceRecord | None],
    live: Mapping[str, LiveStatus],
) -> set[str]:
    """Every model whose expected cost is the lowest of those that meet everything, read off the design."""
    costs: dict[str, int] = {}
    for name in effective.allow:
        spec, record, status = models[name], prices[name], live[name]
        requirement = effective.classes[str(asked.prompt_class)]
        output = min(asked.output_tokens, spec.max_output, asked.asked_output or spec.max_output)
        first = spec.expect_first_token if status.first_token_p95 is None else status.first_token_p95
        rate = spec.expect_tokens_per_second if status.tokens_per_second is None else status.tokens_per_second
        success = None if spec.quality is None else spec.quality[str(asked.prompt_class)]
        if not status.available or not asked.needs <= spec.supports or asked.parameters & spec.rejects:
            continue
        if (asked.asked_output or 1) + asked.input_tokens > spec.context:
            continue
        if (asked.asked_output or 0) > spec.max_output:
            continue
        if record is None and effective.on_unpriced_model == "block":
            continue
        if success is None or success < max(requirement.min_quality, asked.min_quality or Decimal(0)):
            continue
        if (
            requirement.first_token_p95 is not None
            and first is not None
            and first > requirement.first_token_p95
        ):
            continue
        if (
            requirement.total_p95 is not None
            and first is not None
            and rate is not None
            and first + output / rate > requirement.total_p95
        ):
            continue
        exact = Decimal(0)
        if record is not None:
            bought = record.unit_prices["input_cached" if status.warm else "input"]
            exact = asked.input_tokens * bought + output * asked.choices * record.unit_prices["output"]
        cost = int((exact * 1000).to_integral_value(rounding="ROUND_HALF_EVEN"))
        if asked.max_cost is not None and cost > asked.max_cost:
            continue
        costs[name] = cost
    return {name for name, cost in costs.items() if cost == min(costs.values())}


def test_the_generated_cases_have_a_choice_often_enough() -> None:
    found = sum(bool(brute_force(*case_of(seed))) for seed in range(500))
    assert 100 < found < 400


@settings(max_examples=2_000, deadline=None)
@given(_seeds)
def test_the_choice_is_the_brute_force_minimum(seed: int) -> None:
    case = case_of(seed)
    cheapest = brute_force(*case)
    plan = decide(*case, draw=NO_PROBE)
    if not cheapest:
        assert isinstance(plan, NoPlan)
    else:
        assert isinstance(plan, Plan)
        assert plan.models[0] in cheapest
        assert plan.reason == "cheapest"
    dropped = set(plan.dropped)
    first = {plan.models[0]} if isinstance(plan, Plan) else set()
    assert dropped | first >= set(case[1].allow), "every other model has its reason"
    assert not dropped & first
    assert decide(*case, draw=NO_PROBE) == plan, "the same question has the same answer"


@settings(max_examples=500, deadline=None)
@given(_seeds, st.floats(0, 0.999))
def test_no_plan_breaks_a_hard_constraint(seed: int, draw: float) -> None:
    asked, effective, models, prices, live = case_of(seed)
    for downgrade in (False, True):
        for loose in (effective, replace(effective, when_nothing_meets="best")):
            plan = decide(asked, loose, models, prices, live, draw=draw, downgrade=downgrade)
            for name in plan.models if isinstance(plan, Plan) else ():
                assert name in effective.allow
                assert live[name].available
                assert asked.needs <= models[name].supports
                assert not asked.parameters & models[name].rejects


# -- named --


def test_a_named_model_is_served_by_itself() -> None:
    plan = plan_for(question(reference="large"))
    assert chosen(plan) == ("large", "named")
    assert plan.dropped["small"] == "the app asked for another model by name"


def test_a_named_model_keeps_its_fallback() -> None:
    plan = plan_for(question(reference="large"), policy(fallback=("small",)))
    assert isinstance(plan, Plan)
    assert plan.models == ("large", "small")


def test_a_named_model_that_is_down_is_answered_by_its_fallback() -> None:
    down = {"large": LiveStatus(available=False, reason="its circuit breaker is open")}
    plan = plan_for(question(reference="large"), policy(fallback=("small",)), live=down)
    assert isinstance(plan, Plan)
    assert plan.models == ("small",)
    refused = plan_for(question(reference="large"), live=down)
    assert isinstance(refused, NoPlan)
    assert refused.kind == "nothing_meets"


def test_a_named_model_outside_the_allow_list_is_refused() -> None:
    plan = plan_for(
        question(reference="large"), policy(allow=("small",), excluded={"large": "denied by team search"})
    )
    assert isinstance(plan, NoPlan)
    assert plan.kind == "not_allowed"
    assert plan.dropped["large"] == "denied by team search"


def test_a_named_model_is_never_judged_by_quality_or_latency() -> None:
    strict = policy(classes={name: ClassRequirement(Decimal(1), 0.001) for name in PROMPT_CLASSES})
    late = {"small": LiveStatus(first_token_p95=9.0)}
    assert chosen(plan_for(question(reference="small"), strict, live=late)) == ("small", "named")


def test_substitute_takes_the_cheaper_one_that_meets_the_class() -> None:
    swap = policy(substitute=True)
    assert chosen(plan_for(question(reference="large"), swap)) == ("small", "cheapest")


def test_substitute_keeps_the_reference_where_nothing_cheaper_is_good_enough() -> None:
    strict = policy(
        substitute=True, classes={name: ClassRequirement(Decimal("0.99")) for name in PROMPT_CLASSES}
    )
    assert chosen(plan_for(question(reference="large"), strict)) == ("large", "cheapest")


# -- downgrade, best, refuse --


def test_a_downgrade_ignores_quality() -> None:
    strict = policy(classes={name: ClassRequirement(Decimal(1)) for name in PROMPT_CLASSES})
    assert chosen(plan_for(effective=strict, downgrade=True)) == ("small", "budget_downgrade")


def test_a_downgrade_leaves_a_named_model_alone_without_substitute() -> None:
    asked = question(reference="large")
    assert chosen(plan_for(asked, downgrade=True)) == ("large", "named")
    assert chosen(plan_for(asked, policy(substitute=True), downgrade=True)) == ("small", "budget_downgrade")


def test_the_best_answers_where_nothing_meets() -> None:
    strict = policy(classes={name: ClassRequirement(Decimal(1)) for name in PROMPT_CLASSES})
    better = {**TWO, "large": model("large", quality=dict.fromkeys(PROMPT_CLASSES, Decimal("0.95")))}
    plan = plan_for(effective=strict, models=better)
    assert chosen(plan) == ("large", "best")
    assert "large" not in plan.dropped


def test_refuse_refuses_where_nothing_meets() -> None:
    strict = policy(
        when_nothing_meets="refuse", classes={name: ClassRequirement(Decimal(1)) for name in PROMPT_CLASSES}
    )
    plan = plan_for(effective=strict)
    assert isinstance(plan, NoPlan)
    assert plan.kind == "nothing_meets"
    assert "min_quality 1.00" in plan.dropped["small"]


def test_too_long_for_every_model_is_told_as_context() -> None:
    plan = plan_for(question(input_tokens=1_000_000))
    assert isinstance(plan, NoPlan)
    assert plan.kind == "context"


def test_a_model_without_a_prior_is_a_fallback_only() -> None:
    models = {**TWO, "small": model("small", quality=None)}
    plan = plan_for(effective=policy(fallback=("small",)), models=models)
    assert isinstance(plan, Plan)
    assert plan.models == ("large", "small")
    assert "no quality prior" in plan.dropped["small"]


# -- latency and probes --

SLOW = {"small": LiveStatus(first_token_p95=5.0)}
QUICK_CLASS = policy(classes={name: ClassRequirement(Decimal("0.5"), 1.0) for name in PROMPT_CLASSES})


def test_a_slow_model_is_left_out() -> None:
    plan = plan_for(effective=QUICK_CLASS, live=SLOW)
    assert chosen(plan) == ("large", "cheapest")
    assert plan.dropped["small"] == "first token p95 5.00s above 1s"
    assert isinstance(plan, Plan)
    assert plan.propensity == pytest.approx(1 - PROBE_SHARE)


@given(st.floats(0, 0.999_999))
def test_a_slow_model_is_probed_by_its_share(draw: float) -> None:
    plan = plan_for(effective=QUICK_CLASS, live=SLOW, draw=draw)
    assert isinstance(plan, Plan)
    if draw < PROBE_SHARE:
        assert chosen(plan) == ("small", "probe")
        assert plan.models[1] == "large", "the probe's fallback is what would have answered"
        assert plan.propensity == pytest.approx(PROBE_SHARE)
    else:
        assert chosen(plan) == ("large", "cheapest")


def test_a_dearer_slow_model_is_not_probed() -> None:
    plan = plan_for(effective=QUICK_CLASS, live={"large": LiveStatus(first_token_p95=5.0)}, draw=0.0)
    assert chosen(plan) == ("small", "cheapest")


def test_total_time_counts_the_forecast_tokens_at_the_live_rate() -> None:
    classes = {name: ClassRequirement(Decimal("0.5"), None, 10.0) for name in PROMPT_CLASSES}
    live = {"small": LiveStatus(first_token_p95=1.0, tokens_per_second=10.0)}
    assert chosen(plan_for(question(output_tokens=80), policy(classes=classes), live=live))[0] == "small"
    assert chosen(plan_for(question(output_tokens=100), policy(classes=classes), live=live))[0] == "large"


def test_a_warm_conversation_is_cheaper() -> None:
    prices = {"small": price("small", "2", "2"), "large": price("large", "3", "2", cached="0.3")}
    assert chosen(plan_for(prices=prices))[0] == "small"
    assert chosen(plan_for(prices=prices, live={"large": LiveStatus(warm=True)}))[0] == "large"


# -- success --


def test_success_is_the_prior_at_each_centre_and_between_them_on_the_line() -> None:
    quality = {"simple": Decimal("0.9"), "medium": Decimal("0.6"), "complex": Decimal("0.2")}
    for name, centre in zip(PROMPT_CLASSES, (1 / 6, 1 / 2, 5 / 6), strict=True):
        assert abs((success_of(quality, name, centre) or 0) - quality[name]) < Decimal("0.00001")
    assert success_of(quality, "simple", 0.0) == Decimal("0.9")
    assert success_of(quality, "complex", 1.0) == Decimal("0.2")
    assert success_of(quality, "medium", 1 / 3) == pytest.approx(Decimal("0.75"), abs=Decimal("0.0001"))
    assert success_of(None, "simple", 0.2) is None
    assert success_of(quality, None, 0.2) is None


@given(st.floats(0, 1), st.floats(0, 1))
def test_harder_prompts_are_never_more_likely_to_succeed(one: float, other: float) -> None:
    quality = {"simple": Decimal("0.9"), "medium": Decimal("0.6"), "complex": Decimal("0.2")}
    easy, hard = sorted((one, other))
    more, less = success_of(quality, "medium", easy), success_of(quality, "medium", hard)
    assert more is not None
    assert less is not None
    assert more >= less


# -- learned success --


def learned(success: float, evidence: float = 310.0, **changes: Any) -> Estimate:
    return replace(Estimate(success, success - 0.08, success + 0.06, evidence, fallback=False), **changes)


ASKING = policy(classes={name: ClassRequirement(Decimal("0.90")) for name in PROMPT_CLASSES})


def test_learned_success_decides_in_place_of_the_prior() -> None:
    estimates = {"small": learned(0.95), "large": learned(0.97)}
    assert chosen(plan_for(effective=ASKING, success=estimates)) == ("small", "cheapest")
    plan = plan_for(effective=ASKING, success={"small": learned(0.82), "large": learned(0.97)})
    assert chosen(plan) == ("large", "cheapest")
    assert plan.dropped["small"] == "learned success 0.82 (0.74-0.88, 310 labels) below min_quality 0.90"


def test_a_prior_says_why_it_speaks() -> None:
    new = learned(0.8, 0.0, fallback=True)
    plan = plan_for(effective=ASKING, success={"small": new, "large": learned(0.97)})
    assert plan.dropped["small"] == "prior success 0.80 (no labels yet) below min_quality 0.90"
    assert isinstance(plan, Plan)
    assert plan.notes == ()
    strange = replace(new, unfamiliar=True)
    plan = plan_for(effective=ASKING, success={"small": strange, "large": replace(strange, success=0.85)})
    assert isinstance(plan, Plan)
    assert plan.dropped["small"] == "prior success 0.80 (unlike the labelled traffic) below min_quality 0.90"
    assert plan.notes[0] == "the prompt is unlike the labelled traffic: priors decide"


def test_a_model_without_an_estimate_is_judged_by_its_prior() -> None:
    better = {**TWO, "large": model("large", quality=dict.fromkeys(PROMPT_CLASSES, Decimal("0.95")))}
    plan = plan_for(effective=ASKING, models=better, success={"small": learned(0.5)})
    assert chosen(plan) == ("large", "cheapest")
    without = plan_for(effective=ASKING, models=better)
    assert without.dropped["small"] == "predicted success 0.80 below min_quality 0.90"


def test_the_best_by_learned_success_answers_where_nothing_meets() -> None:
    plan = plan_for(effective=ASKING, success={"small": learned(0.7), "large": learned(0.6)})
    assert chosen(plan) == ("small", "best")


@given(st.floats(0, 0.999_999))
def test_probes_keep_their_share_with_learned_success(draw: float) -> None:
    estimates = {"small": learned(0.95), "large": learned(0.97)}
    plan = plan_for(effective=QUICK_CLASS, live=SLOW, success=estimates, draw=draw)
    assert isinstance(plan, Plan)
    probed = plan.reason == "probe"
    assert probed == (draw < PROBE_SHARE)
    assert plan.propensity == pytest.approx(PROBE_SHARE if probed else 1 - PROBE_SHARE)


# -- the quality floor --

CERTAIN = Decimal("0.95")


def floor(**changes: Any) -> Floor:
    return replace(Floor("large", CERTAIN, "small", 0.7, 0.08, {}), **changes)


def test_the_floor_stands_in_place_of_min_quality() -> None:
    estimates = {"small": learned(0.75), "large": learned(0.8)}
    assert chosen(plan_for(effective=ASKING, success=estimates, floor=floor())) == ("small", "cheapest")
    plan = plan_for(effective=ASKING, success={**estimates, "small": learned(0.69)}, floor=floor())
    assert chosen(plan) == ("large", "cheapest")
    assert plan.dropped["small"] == "quality floor: learned success 0.69 below 0.70 for 95 % confidence"


def test_with_labels_missing_the_reference_answers_and_the_cheaper_model_is_compared() -> None:
    lacking = floor(model=None, missing={"small": 120}, compared=("small",))
    plan = plan_for(effective=ASKING, floor=lacking)
    assert chosen(plan) == ("large", "cheapest")
    assert plan.dropped["small"] == "quality floor: 120 labels missing for 95 % confidence"
    assert isinstance(plan, Plan)
    assert plan.compared == ("small",)
    one = floor(model=None, missing={"small": 1}, confidence=Decimal("0.995"))
    dropped = plan_for(effective=ASKING, floor=one).dropped["small"]
    assert dropped == "quality floor: 1 label missing for 99.5 % confidence"


def test_an_unfamiliar_prompt_stays_with_the_reference() -> None:
    strange = learned(0.99, 0.0, fallback=True, unfamiliar=True)
    plan = plan_for(effective=ASKING, success={"small": strange, "large": strange}, floor=floor())
    assert chosen(plan)[0] == "large"
    assert "unlike the labelled traffic" in plan.dropped["small"]
    assert chosen(plan_for(effective=ASKING, floor=floor()))[0] == "large", "so does one nothing predicts"


def test_one_cheaper_model_serves_a_class() -> None:
    models = {**TWO, "middle": model("middle")}
    prices = {**PRICES, "middle": price("middle", "0.05", "0.05")}
    wide = policy(allow=("small", "middle", "large"))
    estimates = {name: learned(0.99) for name in models}
    plan = plan_for(effective=wide, models=models, prices=prices, success=estimates, floor=floor())
    assert chosen(plan)[0] == "small"
    assert plan.dropped["middle"] == "quality floor: large and small answer for 95 % confidence"


def test_where_the_reference_is_away_the_best_of_the_rest_answers_or_nobody() -> None:
    away = {"large": LiveStatus(available=False, reason="breaker open")}
    lacking = floor(model=None, missing={"small": 3})
    assert chosen(plan_for(effective=ASKING, live=away, floor=lacking)) == ("small", "best")
    strict = replace(ASKING, when_nothing_meets="refuse")
    assert isinstance(plan_for(effective=strict, live=away, floor=lacking), NoPlan)


def test_the_floor_leaves_downgrades_and_named_models_alone() -> None:
    lacking = floor(model=None, missing={"small": 3})
    assert chosen(plan_for(downgrade=True, floor=lacking)) == ("small", "budget_downgrade")
    assert chosen(plan_for(question(reference="small"), floor=lacking)) == ("small", "named")
    swap = policy(substitute=True)
    assert chosen(plan_for(question(reference="small"), swap, floor=lacking)) == ("small", "cheapest")


def test_what_is_compared_does_not_hang_on_who_answers() -> None:
    estimates = {"small": learned(0.75), "large": learned(0.8)}
    lower = {**estimates, "small": learned(0.69)}
    plans = [
        plan_for(effective=ASKING, success=s, floor=floor(compared=("small",))) for s in (estimates, lower)
    ]
    assert [chosen(plan)[0] for plan in plans] == ["small", "large"]
    assert [plan.compared for plan in plans if isinstance(plan, Plan)] == [("small",)] * 2
