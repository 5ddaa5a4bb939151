"""Money arithmetic: whole nano-USD, rounded half to even per line, bounds rounded up."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.catalogue import price_record
from router.core.pricing import (
    divided,
    estimate_cost,
    every_bucket,
    output_bound,
    price_usage,
    total,
    usd,
    worst_case,
)
from router.core.types import BUCKETS, PriceRecord, Usage, nano

START = datetime(2026, 1, 1, tzinfo=UTC)

unit_prices = st.fixed_dictionaries(
    {bucket: st.integers(0, 200 * 10**9).map(lambda n: Decimal(n) / 10**9) for bucket in BUCKETS}
)
prices = unit_prices.map(lambda found: price_record("p", "m", START, found, "test"))
tokens = st.integers(0, 2_000_000)
usages = st.builds(Usage, *[tokens] * len(BUCKETS))


def record(**named: str) -> PriceRecord:
    return price_record("p", "m", START, every_bucket({k: Decimal(v) for k, v in named.items()}), "test")


@given(usages, prices)
def test_a_total_is_the_sum_of_its_lines_and_each_line_recomputes_from_its_own_fields(
    usage: Usage, price: PriceRecord
) -> None:
    lines = price_usage(usage, price)
    assert [(line.bucket, line.quantity) for line in lines] == list(usage.buckets())
    assert total(lines) == sum(line.amount for line in lines)
    for line in lines:
        exact = Decimal(line.quantity) * line.unit_price / 1_000_000
        assert line.amount == int(exact.quantize(Decimal(1), rounding=ROUND_HALF_EVEN))
        assert line.unit_price == price.unit_prices[line.bucket] * 10**9
        assert line.price_id == price.id
        assert all(type(value) is int for value in (line.amount, line.unit_price, line.list_amount))
        assert line.amount >= 0


@given(usages, usages, prices)
def test_usage_priced_in_two_parts_differs_by_rounding_alone(a: Usage, b: Usage, price: PriceRecord) -> None:
    both = Usage(*(x + y for x, y in zip(a.quantities(), b.quantities(), strict=True)))
    together = total(price_usage(both, price))
    apart = total(price_usage(a, price)) + total(price_usage(b, price))
    assert abs(together - apart) <= len(BUCKETS)


@given(usages, prices, st.integers(1, 4))
def test_a_worst_case_is_never_below_what_usage_within_its_bounds_costs(
    usage: Usage, price: PriceRecord, choices: int
) -> None:
    per_choice = -(-usage.output_total // choices)
    bound = worst_case(price, usage.input_total, choices, per_choice)
    # Each of up to eight lines may have been rounded up by half a nano-USD.
    assert bound + len(BUCKETS) >= total(price_usage(usage, price))


@given(prices, tokens, tokens, tokens)
def test_an_estimate_equals_the_price_of_the_same_usage_but_for_rounding(
    price: PriceRecord, sent: int, answered: int, cached: int
) -> None:
    cached = min(cached, sent)
    usage = Usage(input=sent - cached, input_cached=cached, output=answered)
    estimate = estimate_cost(price, sent, answered, cached_tokens=cached)
    assert abs(estimate - total(price_usage(usage, price))) <= 3


@given(st.integers(0, 10**24))
def test_division_rounds_half_to_even(product: int) -> None:
    expected = (Decimal(product) / 1_000_000).quantize(Decimal(1), rounding=ROUND_HALF_EVEN)
    assert divided(product) == int(expected)


@pytest.mark.parametrize(("product", "amount"), [(500_000, 0), (1_500_000, 2), (2_500_000, 2), (500_001, 1)])
def test_exact_halves_go_to_the_even_neighbour(product: int, amount: int) -> None:
    assert divided(product) == amount


def test_a_known_answer_costs_what_the_price_list_says() -> None:
    price = record(input="2.50", output="10", input_cached="1.25")
    lines = price_usage(Usage(input=1_000, input_cached=2_000, output=500), price)
    assert {line.bucket: line.amount for line in lines} == {
        "input": 2_500_000,
        "input_cached": 2_500_000,
        "output": 5_000_000,
    }
    assert usd(total(lines)) == Decimal("0.010")


def test_missing_buckets_are_charged_at_input_or_output() -> None:
    filled = every_bucket({"input": Decimal(1), "output": Decimal(3)})
    assert filled == {b: Decimal(3) if b.startswith("output") else Decimal(1) for b in BUCKETS}


def test_a_discount_lowers_the_amount_and_keeps_the_list_amount() -> None:
    listed = every_bucket({"input": Decimal(5), "output": Decimal(30)})
    price = price_record(
        "p", "m", START, {b: p * Decimal("0.88") for b, p in listed.items()}, "test", list_prices=listed
    )
    (line,) = price_usage(Usage(input=1_000_000), price)
    assert (line.amount, line.list_amount) == (4_400_000_000, 5_000_000_000)


def test_a_marginal_estimate_uses_the_marginal_prices() -> None:
    full = every_bucket({"input": Decimal(1), "output": Decimal(2)})
    price = price_record("p", "m", START, full, "test", marginal_prices={b: p / 20 for b, p in full.items()})
    assert estimate_cost(price, 1_000, 1_000) == 3_000_000
    assert estimate_cost(price, 1_000, 1_000, marginal=True) == 150_000


def test_a_worst_case_takes_the_dearest_buckets_and_rounds_up() -> None:
    price = record(input="1", output="2", cache_write="1.25", output_reasoning="3")
    assert worst_case(price, 100, 2, 10) == 125_000 + 60_000
    assert worst_case(record(input="0.000000001", output="0"), 1, 1, 0) == 1


@pytest.mark.parametrize(
    ("limit", "context", "used", "bound"),
    [(None, 10_000, 0, 4096), (100, 10_000, 0, 100), (9_000, 10_000, 0, 8192), (None, 10_000, 9_990, 10)],
)
def test_the_output_bound_is_the_least_of_what_limits_it(
    limit: int | None, context: int, used: int, bound: int
) -> None:
    found = output_bound(limit, assume_max_output=4096, max_output=8192, context=context, input_tokens=used)
    assert found == bound


def test_more_than_nine_decimals_is_refused() -> None:
    with pytest.raises(ValueError, match="nano-USD"):
        nano(Decimal("0.0000000001"))


def test_a_price_id_follows_from_its_content_alone() -> None:
    assert record(input="1", output="2").id == record(input="1.0", output="2.00").id
    assert record(input="1", output="2").id != record(input="1", output="2.1").id
