"""Precedence: what holds for a caller, and what a price is on a day."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.adapters.price_catalogue import shipped_catalogue
from router.core.compile import CompiledSnapshot, describe
from router.core.errors import InvalidRequest
from router.core.lint import load
from router.core.policy import BudgetLimit, EffectivePolicy
from router.core.types import NANO_PER_USD

CATALOGUE = shipped_catalogue()
NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)  # a Tuesday

PROVIDERS = """
apiVersion: farthing/v1
providers:
  openai: { base_url: "https://api.openai.com/v1", api_key_env: OPENAI_API_KEY }
  local:  { base_url: "http://local:8000/v1" }
models:
  a: { provider: local,  context: 8000, price: { input: 1, output: 2 }, quality: { simple: 0.9, medium: 0.9, complex: 0.9 } }
  b: { provider: local,  context: 8000, price: { input: 2, output: 4 }, quality: { simple: 0.9, medium: 0.9, complex: 0.9 } }
  c: { provider: openai, context: 8000, name: gpt-4o, price: catalog, quality: { simple: 1, medium: 1, complex: 1 } }
  d: { provider: openai, context: 8000, name: gpt-5.6-luna, price: catalog, quality: { simple: 1, medium: 1, complex: 1 } }
"""  # noqa: E501


def snapshot(extra: str = "", *, defaults: str = "", zone: str = "UTC") -> CompiledSnapshot:
    policy = (
        f"apiVersion: farthing/v1\norganisation: {{ timezone: {zone} }}\nclasses: {{}}\n"
        f"defaults: {{ allow: [d, c, b, a], fallback: [c, a]{defaults} }}\n{extra}"
    )
    found = load(PROVIDERS, policy, CATALOGUE, NOW)
    assert found.snapshot is not None, [str(problem) for problem in found.errors]
    return found.snapshot


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def test_allow_is_intersected_all_the_way_down_and_each_exclusion_says_why() -> None:
    found = snapshot(
        """
teams: { t: { allow: [a, b, c], apps: { x: { allow: [a, b], deny: [b] } } } }
rules:
  - { name: pii, when: { tag.data: [pii] }, then: { allow: [b, c, d] } }
"""
    )
    team, app = found.resolve("t", None, {}, NOW), found.resolve("t", "x", {}, NOW)
    assert team.allow == ("a", "b", "c")
    assert team.excluded == {"d": "not allowed by team t"}
    assert app.allow == ("a",)
    assert app.excluded == {
        "d": "not allowed by team t",
        "c": "not allowed by app t/x",
        "b": "denied by app t/x",
    }
    tagged = found.resolve("t", "x", {"data": frozenset({"pii", "more"})}, NOW)
    assert tagged.allow == ()
    assert tagged.excluded["a"] == "not allowed by rule 'pii'"
    assert tagged.rules == ("pii",)


def test_allow_keeps_the_order_of_providers_and_fallback_chooses_only_from_it() -> None:
    found = snapshot("teams: { t: { deny: [c] } }")
    assert found.resolve("other", None, {}, NOW).allow == ("a", "b", "c", "d")
    assert found.resolve("other", None, {}, NOW).fallback == ("c", "a")
    assert found.resolve("t", None, {}, NOW).fallback == ("a",)


def test_deny_is_the_union_of_every_level() -> None:
    found = snapshot(
        """
teams: { t: { deny: [b], apps: { x: { deny: [c] } } } }
rules: [{ name: r, when: { app: [x] }, then: { deny: [d] } }]
""",
        defaults=", deny: [a]",
    )
    assert found.resolve("t", "x", {}, NOW).excluded == {
        "a": "denied by defaults",
        "b": "denied by team t",
        "c": "denied by app t/x",
        "d": "denied by rule 'r'",
    }


def test_a_scalar_is_that_of_the_first_matching_rule_then_app_team_defaults() -> None:
    found = snapshot(
        """
teams: { t: { assume_max_output: 200, apps: { x: { assume_max_output: 300 } } } }
rules:
  - { name: first,  when: { tag.k: [v] }, then: { assume_max_output: 400, substitute: true } }
  - { name: second, when: { tag.k: [v, w] }, then: { assume_max_output: 500, when_nothing_meets: refuse } }
""",
        defaults=", assume_max_output: 100",
    )

    def assumed(team: str, app: str | None, *tags: str) -> int:
        return found.resolve(team, app, {"k": frozenset(tags)} if tags else {}, NOW).assume_max_output

    assert assumed("other", None) == 100
    assert assumed("t", None) == 200
    assert assumed("t", "unknown app inherits its team") == 200
    assert assumed("t", "x") == 300
    assert assumed("t", "x", "w") == 500
    assert assumed("t", "x", "v") == 400
    both = found.resolve("t", "x", {"k": frozenset({"v"})}, NOW)
    assert (both.substitute, both.when_nothing_meets) == (True, "refuse")


def test_classes_and_cache_merge_field_by_field() -> None:
    found = snapshot(
        """
teams:
  t:
    classes: { simple: { min_quality: 0.5 }, complex: { total_p95: none } }
    cache: { ttl: 1h }
    apps: { x: { classes: { simple: { first_token_p95: 9s } }, cache: { semantic: enforce } } }
""",
        defaults=", cache: { scope: app }",
    )
    effective = found.resolve("t", "x", {}, NOW)
    assert effective.classes["simple"].min_quality == Decimal("0.5")
    assert effective.classes["simple"].first_token_p95 == 9
    assert effective.classes["complex"].total_p95 is None
    assert effective.classes["complex"].first_token_p95 == 15
    assert (effective.cache.ttl, effective.cache.semantic, effective.cache.scope) == (3600, "enforce", "app")


def test_tags_of_the_app_and_of_the_caller_add_up() -> None:
    found = snapshot(
        """
teams: { t: { apps: { x: { tags: { data: [pii] } } } } }
rules: [{ name: pii, when: { tag.data: [pii] }, then: { allow: [a] } }]
"""
    )
    effective = found.resolve("t", "x", {"data": frozenset({"public"})}, NOW)
    assert effective.tags == {"data": frozenset({"pii", "public"})}
    assert effective.allow == ("a",)


def test_an_unknown_tag_is_refused_with_the_known_ones() -> None:
    found = snapshot("rules: [{ name: pii, when: { tag.data: [pii] }, then: { allow: [a] } }]")
    with pytest.raises(InvalidRequest) as caught:
        found.resolve("t", None, {"evil\r\n": frozenset({"x"})}, NOW)
    assert caught.value.code == "unknown_tag"
    assert "known keys: data" in caught.value.message
    assert "evil" not in caught.value.message


NIGHT = """
rules:
  - { name: night, when: { time: { from: "20:00", to: "07:00" } }, then: { assume_max_output: 1 } }
  - { name: weekend night, when: { time: { days: [sat, sun], from: "20:00", to: "07:00" } }, then: { assume_max_output: 2 } }
  - { name: office, when: { time: { days: [mon, tue, wed, thu, fri], from: "09:00", to: "17:00" } }, then: { assume_max_output: 3 } }
  - { name: either, when: { time: [{ days: [sun] }, { from: "12:00", to: "12:01" }] }, then: { assume_max_output: 4 } }
"""  # noqa: E501


@pytest.mark.parametrize(
    ("moment", "rules"),
    [
        ("2026-11-24T19:59:59", ()),
        ("2026-11-24T20:00:00", ("night",)),
        ("2026-11-25T06:59:59", ("night",)),
        ("2026-11-25T07:00:00", ()),
        ("2026-11-24T09:00:00", ("office",)),
        ("2026-11-24T12:00:30", ("office", "either")),
        ("2026-11-24T17:00:00", ()),
        ("2026-11-28T03:00:00", ("night",)),  # Saturday morning: the window began on Friday
        ("2026-11-28T21:00:00", ("night", "weekend night")),
        ("2026-11-29T10:00:00", ("either",)),
        ("2026-11-30T03:00:00", ("night", "weekend night")),  # Monday morning: it began on Sunday
    ],
)
def test_time_windows(moment: str, rules: tuple[str, ...]) -> None:
    assert snapshot(NIGHT).resolve("t", None, {}, at(moment)).rules == rules


def test_time_windows_and_months_follow_the_organisations_timezone() -> None:
    found = snapshot(NIGHT, zone="Asia/Tokyo")
    assert found.resolve("t", None, {}, at("2026-11-24T11:00:00")).rules == ("night",)
    assert found.resolve("t", None, {}, at("2026-11-30T14:59:59")).period == "2026-11"
    assert found.resolve("t", None, {}, at("2026-11-30T15:00:00")).period == "2026-12"


BUDGETS = """
teams:
  t: { budget: { month: 100, at_limit: downgrade, hard_cap: 120, warn_at: [80%, 50%] }, apps: { x: { budget: { month: 10 } } } }
  free: {}
unlisted_teams: { budget: { month: 5, at_limit: refuse } }
"""  # noqa: E501


def amounts(effective: EffectivePolicy) -> dict[str, tuple[object, object, str]]:
    def dollars(amount: int | None) -> object:
        return None if amount is None else Decimal(amount) / NANO_PER_USD

    return {b.key: (dollars(b.limit), dollars(b.hard_cap), b.at_limit) for b in effective.budgets}


def test_budgets_of_organisation_team_app_and_unlisted_team() -> None:
    found = snapshot(BUDGETS)
    assert amounts(found.resolve("t", "x", {}, NOW)) == {
        "team:t": (100, 120, "downgrade"),
        "app:t/x": (10, 10, "refuse"),
    }
    assert amounts(found.resolve("new", "x", {}, NOW)) == {"team:new": (5, 5, "refuse")}
    assert amounts(found.resolve("free", None, {}, NOW)) == {}
    assert found.resolve("t", None, {}, NOW).budgets[0].warn_at == (Decimal("0.5"), Decimal("0.8"))


@pytest.mark.parametrize(
    ("written", "limit"),
    [
        ("month: 10", BudgetLimit("team:t", 10, 10, "refuse")),
        ("month: 10, hard_cap: 12", BudgetLimit("team:t", 10, 12, "downgrade")),
        ("month: 10, hard_cap: 12, at_limit: refuse", BudgetLimit("team:t", 10, 12, "refuse")),
        ("month: 10, at_limit: downgrade", BudgetLimit("team:t", 10, None, "downgrade")),
        ("hard_cap: 12", BudgetLimit("team:t", None, 12, "downgrade")),
    ],
)
def test_what_a_budget_means_where_it_does_not_say(written: str, limit: BudgetLimit) -> None:
    (found,) = snapshot(f"teams: {{ t: {{ budget: {{ {written} }} }} }}").resolve("t", None, {}, NOW).budgets
    scaled = [None if amount is None else amount * NANO_PER_USD for amount in (limit.limit, limit.hard_cap)]
    assert [found.limit, found.hard_cap] == scaled
    assert found.at_limit == limit.at_limit


def exception(body: str, more: str = "") -> CompiledSnapshot:
    return snapshot(
        f"""
teams: {{ t: {{ allow: [a], budget: {{ month: 100, hard_cap: 120 }}, apps: {{ x: {{ budget: {{ month: 10 }} }}, y: {{}} }} }} }}
{more}
exceptions: [{{ name: launch, team: t, reason: because, until: "2026-12-15", {body} }}]
"""  # noqa: E501
    )


def test_an_exception_widens_allow_and_budget_until_it_ends_and_is_named() -> None:
    found = exception("allow: [b], budget: { month: 200, hard_cap: 240 }")
    before, after = found.resolve("t", None, {}, NOW), found.resolve("t", None, {}, at("2026-12-15T00:00:00"))
    assert before.allow == ("a", "b")
    assert "b" not in before.excluded
    assert before.exceptions == ("launch",)
    assert amounts(before) == {"team:t": (200, 240, "downgrade")}
    assert after.allow == ("a",)
    assert after.exceptions == ()
    assert amounts(after) == {"team:t": (100, 120, "downgrade")}
    assert found.resolve("other", None, {}, NOW).exceptions == ()


def test_a_hard_cap_wins_over_an_exception_that_does_not_raise_it() -> None:
    assert amounts(exception("budget: { month: 200 }").resolve("t", None, {}, NOW)) == {
        "team:t": (120, 120, "downgrade")
    }


def test_an_exception_for_one_app_leaves_the_team_alone() -> None:
    found = exception("app: x, budget: { month: 50 }, allow: [b]")
    assert amounts(found.resolve("t", "x", {}, NOW)) == {
        "team:t": (100, 120, "downgrade"),
        "app:t/x": (50, 50, "refuse"),
    }
    assert found.resolve("t", "y", {}, NOW).allow == ("a",)


def test_an_exception_has_no_effect_before_it_begins() -> None:
    found = exception('from: "2026-12-01", allow: [b]')
    assert found.resolve("t", None, {}, NOW).allow == ("a",)
    assert found.resolve("t", None, {}, at("2026-12-01T00:00:00")).allow == ("a", "b")


def test_a_data_rule_still_holds_under_an_exception_unless_it_names_the_rule() -> None:
    rule = "rules: [{ name: pii, when: { tag.data: [pii] }, then: { allow: [a] } }]"
    tags = {"data": frozenset({"pii"})}
    assert exception("allow: [b]", rule).resolve("t", None, tags, NOW).allow == ("a",)
    skipping = exception("allow: [b], skip_rules: [pii]", rule).resolve("t", None, tags, NOW)
    assert skipping.allow == ("a", "b")
    assert skipping.rules == ()


def test_an_exceptions_scalars_come_before_those_of_rules() -> None:
    rule = "rules: [{ name: r, when: { team: [t] }, then: { max_cost_per_request: 1 } }]"
    assert (
        exception("max_cost_per_request: 2", rule).resolve("t", None, {}, NOW).max_cost_per_request
        == 2 * NANO_PER_USD
    )


# -- prices -----------------------------------------------------------------------------------------------------


CONTRACTS = """
contracts:
  - { provider: openai, models: [c], discount: 12%, from: "2026-07-01", until: "2027-07-01", reference: PO-1 }
  - { provider: openai, discount: 5%, from: "2026-01-01", reference: PO-2 }
"""


@pytest.mark.parametrize(
    ("moment", "contract", "price"),
    [
        ("2025-12-31T23:59:59", None, "2.5"),
        ("2026-01-01T00:00:00", "PO-2", "2.375"),
        ("2026-07-01T00:00:00", "PO-1", "2.2"),
        ("2027-06-30T23:59:59", "PO-1", "2.2"),
        ("2027-07-01T00:00:00", "PO-2", "2.375"),
    ],
)
def test_a_contract_discounts_from_its_first_day_to_its_last(
    moment: str, contract: str | None, price: str
) -> None:
    record = snapshot(CONTRACTS).price("c", at(moment))
    assert record is not None
    assert record.contract == contract
    assert record.unit_prices["input"] == Decimal(price)
    assert record.list_prices["input"] == Decimal("2.5")
    assert record.effective_from <= at(moment)


def test_contract_days_follow_the_timezone() -> None:
    found = snapshot(CONTRACTS, zone="America/New_York")
    before, after = found.price("c", at("2026-07-01T03:59:59")), found.price("c", at("2026-07-01T04:00:00"))
    assert before is not None
    assert after is not None
    assert (before.contract, after.contract) == ("PO-2", "PO-1")


def test_each_price_has_its_own_lasting_id() -> None:
    one, two = snapshot(CONTRACTS), snapshot(CONTRACTS + "\nteams: { t: {} }")
    moments = [at("2025-06-01T00:00:00"), at("2026-03-01T00:00:00"), NOW]
    ids = [[record.id for m in moments if (record := s.price("c", m)) is not None] for s in (one, two)]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 3


def test_a_price_change_of_the_catalogue_takes_effect_on_its_day() -> None:
    found = snapshot()
    old, new = found.price("d", at("2026-07-29T00:00:00")), found.price("d", at("2026-07-30T00:00:00"))
    assert old is not None
    assert new is not None
    assert (old.unit_prices["input"], new.unit_prices["input"]) == (Decimal(1), Decimal("0.2"))


def test_the_catalogue_prices_a_name_nobody_configured() -> None:
    found = snapshot()
    record = found.catalogue_price("claude-sonnet-4-5", NOW)
    assert record is not None
    assert (record.provider, record.unit_prices["output"]) == ("anthropic", Decimal(15))
    assert found.catalogue_price("nobody", NOW) is None
    assert found.catalogue_price("x" * 10_000, NOW) is None
    assert found.price("nobody", NOW) is None


# -- the snapshot itself ----------------------------------------------------------------------------------------


def test_the_fingerprint_follows_what_a_cached_answer_could_depend_on() -> None:
    text = """
teams: { t: { budget: { month: 9 }, cost_center: "1" }, u: { cost_center: "2" }, v: { allow: [a, b] } }
rules: [{ name: pii, when: { tag.data: [pii] }, then: { substitute: true } }]
"""
    found = snapshot(text)
    base = found.resolve("t", None, {}, NOW).fingerprint
    assert found.resolve("u", None, {}, NOW).fingerprint == base
    assert found.resolve("v", None, {}, NOW).fingerprint != base
    assert found.resolve("t", None, {"data": frozenset({"pii"})}, NOW).fingerprint != base
    assert found.resolve("t", None, {"data": frozenset({"other"})}, NOW).fingerprint != base


@given(
    st.lists(st.tuples(st.sampled_from("tuv"), st.sampled_from([None, "x", "y"]), st.integers(0, 400_000)))
)
def test_the_memo_never_changes_an_answer(calls: list[tuple[str, str | None, int]]) -> None:
    text = NIGHT + "teams: { t: { apps: { x: { allow: [a] } } }, u: { deny: [c] } }"
    shared = snapshot(text)
    for team, app, minutes in calls:
        moment = datetime.fromtimestamp(NOW.timestamp() + 60 * minutes, UTC)
        assert shared.resolve(team, app, {}, moment) == shared._resolve(team, app, {}, moment)


def test_the_memo_is_bounded_and_fast() -> None:
    found = snapshot(NIGHT)
    for index in range(10_000):
        found.resolve(f"team-{index}", None, {}, NOW)
    assert len(found._memo) <= 4096
    for index in range(5_000):
        found.catalogue_price(f"unknown-{index}", NOW)
    assert len(found._named) <= 4096
    found.resolve("t", "x", {}, NOW)
    best = min(_seconds(found) for _ in range(5))
    assert best < 20e-6, f"{best * 1e6:.1f} us on a memo hit"


def _seconds(found: CompiledSnapshot) -> float:
    start = time.thread_time()
    for _ in range(1000):
        found.resolve("t", "x", {}, NOW)
    return (time.thread_time() - start) / 1000


def test_what_holds_can_be_described_as_plain_data() -> None:
    found = describe(snapshot(BUDGETS, defaults=", max_cost_per_request: 0.25").resolve("t", "x", {}, NOW))
    assert found["max_cost_per_request"] == "0.25"
    assert found["budgets"][0]["hard_cap"] == "120"
    assert found["allow"] == ["a", "b", "c", "d"]
