"""What usage costs, in whole nano-USD.

A unit price in USD per million tokens has at most nine decimals, so in nano-USD per million tokens it is a whole
number and `amount = quantity * unit / 1_000_000` is the only division. Each line is rounded half to even, and a
total is the sum of its rounded lines, so that every figure can be recomputed from stored rows. A worst case is
rounded up: it is a bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import ROUND_HALF_EVEN, Decimal

from router.core.types import (
    BUCKETS,
    INPUT_BUCKETS,
    NANO_PER_USD,
    CostLine,
    NanoUSD,
    PriceRecord,
    Usage,
)

TOKENS_PER_UNIT = 1_000_000
_SMALLEST_PRICE = Decimal("0.000000001")


def usd(amount: int) -> Decimal:
    """Nano-USD as USD, exact."""
    return Decimal(amount) / NANO_PER_USD


def rounded_price(usd_per_million: Decimal) -> Decimal:
    """A computed unit price, to the nine decimals a price record may hold."""
    return usd_per_million.quantize(_SMALLEST_PRICE, rounding=ROUND_HALF_EVEN)


def divided(product: int) -> NanoUSD:
    """`product / 1_000_000`, half to even."""
    amount, rest = divmod(product, TOKENS_PER_UNIT)
    twice = 2 * rest
    if twice > TOKENS_PER_UNIT or (twice == TOKENS_PER_UNIT and amount % 2):
        amount += 1
    return NanoUSD(amount)


def price_usage(usage: Usage, price: PriceRecord) -> tuple[CostLine, ...]:
    """One line per bucket that holds tokens."""
    lines = []
    for bucket, quantity in usage.buckets():
        unit, listed = price.unit_nano[bucket], price.list_nano[bucket]
        lines.append(
            CostLine(
                bucket=bucket,
                quantity=quantity,
                unit_price=unit,
                list_price=listed,
                amount=divided(quantity * unit),
                list_amount=divided(quantity * listed),
                price_id=price.id,
            )
        )
    return tuple(lines)


def cost_of(usage: Usage, price: PriceRecord) -> NanoUSD:
    """The total of the lines of `price_usage`."""
    prices = price.unit_nano
    return NanoUSD(sum(divided(quantity * prices[bucket]) for bucket, quantity in usage.buckets()))


def total(lines: Iterable[CostLine]) -> NanoUSD:
    return NanoUSD(sum(line.amount for line in lines))


def estimate_cost(
    price: PriceRecord,
    input_tokens: int,
    output_tokens: int,
    *,
    marginal: bool = False,
    cached_tokens: int = 0,
) -> NanoUSD:
    """Expected cost of a request. `cached_tokens` is the part of `input_tokens` read from the provider's cache.

    `marginal`: what the request adds where the machine is already paid for; decides, never books.
    """
    prices = price.marginal_nano if marginal else price.unit_nano
    cached = min(cached_tokens, input_tokens)
    return divided(
        (input_tokens - cached) * prices["input"]
        + cached * prices["input_cached"]
        + output_tokens * prices["output"]
    )


def output_bound(
    limit: int | None, *, assume_max_output: int, max_output: int, context: int, input_tokens: int
) -> int:
    """The most tokens one choice can hold: the caller's limit or the assumed one, within what the model takes."""
    wanted = assume_max_output if limit is None else limit
    return max(0, min(wanted, max_output, context - input_tokens))


def worst_case(price: PriceRecord, input_bound: int, choices: int, max_output: int) -> NanoUSD:
    """The most one attempt can cost: the input's upper bound at the dearest input bucket plus `choices` answers of
    `max_output` tokens at the dearest output bucket, rounded up.
    """
    product = input_bound * price.dearest_input + choices * max_output * price.dearest_output
    return NanoUSD(-(-product // TOKENS_PER_UNIT))


def every_bucket(named: Mapping[str, Decimal]) -> dict[str, Decimal]:
    """Prices for every bucket from those that are named, `input` and `output` at least.

    A missing input bucket is charged at `input`, a missing output bucket at `output`: never less than is known.
    """
    return {
        bucket: named.get(bucket, named["input" if bucket in INPUT_BUCKETS else "output"])
        for bucket in BUCKETS
    }
