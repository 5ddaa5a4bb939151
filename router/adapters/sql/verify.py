"""Recomputing the ledger from its own stored rows.

Every cost line from its quantity and unit price, every attempt from its lines, every request from its attempts,
the savings identity, the price copied into a line against the price record, rollups and budgets against the
requests. Rows come in batches by request id, all from one snapshot.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, RowMapping
from sqlalchemy.exc import SQLAlchemyError

from router.adapters.sql.database import one_snapshot, schema_problem, unavailable
from router.adapters.sql.ledger import existing_ids
from router.adapters.sql.schema import (
    ROLLUP_KEY,
    ROLLUP_SUMS,
    TOKEN_COLUMNS,
    adjustments,
    attempts,
    budget_spend,
    cache_candidates,
    cost_lines,
    price_records,
    requests,
    spend_rollup,
)
from router.adapters.sql.spend import journalled_ids
from router.core.learning import OWN_CALLS
from router.core.pricing import divided
from router.core.types import nano

BATCH = 1000
_SUM_COLUMNS = ("cost", "baseline", "routing_savings", "cache_savings", "overhead")


@dataclass(frozen=True, slots=True)
class Difference:
    """A stored figure that its own rows do not give."""

    where: str
    what: str
    stored: Any
    expected: Any

    def __str__(self) -> str:
        return f"{self.where}: {self.what} is {self.stored}, its rows give {self.expected}"


@dataclass(slots=True)
class Verification:
    """`unsettled` requests are still in a journal; they are no difference."""

    requests: int = 0
    unsettled: int = 0
    differences: list[Difference] = field(default_factory=list)


def verify(engine: Engine, journals: Path, *, batch: int = BATCH, limit: int = 1000) -> Verification:
    """Checks everything; stops after `limit` differences. Raises UnavailableError when SQL does not answer."""
    result = Verification()
    problem = schema_problem(engine)
    if problem is not None:
        result.differences.append(Difference("schema", "state", problem, "current"))
        return result
    ids = journalled_ids(journals)
    try:
        with one_snapshot(engine) as connection:
            for difference in _differences(connection, result, batch):
                result.differences.append(difference)
                if len(result.differences) >= limit:
                    break
            result.unsettled = len(ids) - len(existing_ids(connection, sorted(ids)))
    except SQLAlchemyError as error:
        raise unavailable(error) from None
    return result


def _differences(connection: Connection, result: Verification, batch: int) -> Iterator[Difference]:
    yield from _orphans(connection)
    prices = _Prices(connection)
    rollup: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0] * len(ROLLUP_SUMS))
    budgets: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0, 0])
    after = ""
    while True:
        query = sa.select(requests).where(requests.c.id > after).order_by(requests.c.id).limit(batch)
        found = connection.execute(query).mappings().all()
        if not found:
            break
        first, after = found[0]["id"], found[-1]["id"]
        tried = _by_request(connection, attempts, first, after)
        lines = _by_request(connection, cost_lines, first, after)
        found_by_likeness = _by_request(connection, cache_candidates, first, after)
        for row in found:
            result.requests += 1
            request_id = row["id"]
            yield from _check_request(row, tried.get(request_id, []), lines.get(request_id, []), prices)
            yield from _check_candidate(row, found_by_likeness.get(request_id, []))
            _add_to_rollup(rollup, row)
            for key, period in msgspec.json.decode(row["budgets"]):
                total = budgets[key, period]
                total[0] += row["worst_case"] if row["cost"] is None else row["cost"]
                total[1] += 1
    corrected = sa.select(requests.c.budgets, adjustments.c.amount).join_from(adjustments, requests)
    for row in connection.execute(corrected).mappings():
        for key, period in msgspec.json.decode(row["budgets"]):
            budgets[key, period][0] += row["amount"]
    yield from _compare(connection, spend_rollup, ROLLUP_KEY, ROLLUP_SUMS, rollup)
    yield from _compare(connection, budget_spend, ("key", "period"), ("spent", "requests"), budgets)


def _by_request(
    connection: Connection, table: sa.Table, first: str, last: str
) -> dict[str, Sequence[RowMapping]]:
    query = sa.select(table).where(table.c.request_id.between(first, last)).order_by(*table.primary_key)
    rows = connection.execute(query).mappings()
    return {request_id: list(group) for request_id, group in groupby(rows, lambda row: row["request_id"])}


class _Prices:
    """Price records in nano-USD per million tokens, read once each."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._known: dict[str, tuple[Mapping[str, int], Mapping[str, int]] | None] = {}

    def find(self, price_id: str) -> tuple[Mapping[str, int], Mapping[str, int]] | None:
        if price_id not in self._known:
            query = sa.select(price_records).where(price_records.c.id == price_id)
            row = self._connection.execute(query).mappings().one_or_none()
            prices = None if row is None else (_nano(row["unit_prices"]), _nano(row["list_prices"]))
            self._known[price_id] = prices
        return self._known[price_id]


def _nano(text: str) -> dict[str, int]:
    return {bucket: nano(usd) for bucket, usd in msgspec.json.decode(text, type=dict[str, Decimal]).items()}


def _check_request(
    row: RowMapping, tried: Sequence[RowMapping], lines: Sequence[RowMapping], prices: _Prices
) -> Iterator[Difference]:
    where = f"request {row['id']}"
    by_attempt: dict[int, list[RowMapping]] = defaultdict(list)
    for line in lines:
        by_attempt[line["attempt"]].append(line)
    for attempt in tried:
        yield from _check_attempt(
            f"{where} attempt {attempt['attempt']}", attempt, by_attempt[attempt["attempt"]], prices
        )
    if [attempt["attempt"] for attempt in tried] != list(range(len(tried))):
        found = [attempt["attempt"] for attempt in tried]
        yield Difference(where, "numbering of attempts", found, list(range(len(tried))))
    unpriced = any(attempt["cost"] is None for attempt in tried)
    cost = None if unpriced else sum(attempt["cost"] for attempt in tried)
    if row["cost"] != cost:
        yield Difference(where, "cost", row["cost"], cost)
    if row["unpriced"] != unpriced:
        yield Difference(where, "unpriced", row["unpriced"], unpriced)
    if any(attempt["estimated"] for attempt in tried) and not row["estimated"]:
        yield Difference(where, "estimated", row["estimated"], True)
    parts = [row[name] for name in ("routing_savings", "cache_savings", "overhead")]
    if None not in parts:
        routing, cache, overhead = parts
        expected = None if row["baseline"] is None or cost is None else row["baseline"] - cost
        if routing + cache - overhead != expected:
            yield Difference(where, "routing + cache - overhead", routing + cache - overhead, expected)
    elif parts != [None, None, None]:
        yield Difference(where, "parts of the saving", parts, "all or none")


def _check_candidate(row: RowMapping, found: Sequence[RowMapping]) -> Iterator[Difference]:
    """An answer by likeness is the one that was found and served, and no other request has one that was served."""
    where = f"request {row['id']}"
    served = [candidate["entry"] for candidate in found if candidate["served"]]
    if row["cache"] == "semantic" and not found:
        yield Difference(where, "candidate", "no candidate", row["cache_entry"])
    elif row["cache"] == "semantic" and served != [row["cache_entry"]]:
        yield Difference(where, "entry of the candidate that was served", served, row["cache_entry"])
    elif row["cache"] != "semantic" and served:
        yield Difference(where, "cache although its candidate was served", row["cache"], "semantic")


def _check_attempt(
    where: str, attempt: RowMapping, lines: Sequence[RowMapping], prices: _Prices
) -> Iterator[Difference]:
    for line in lines:
        at = f"{where} {line['bucket']}"
        for amount, unit in (("amount", "unit_price"), ("list_amount", "list_price")):
            expected = divided(line["quantity"] * line[unit])
            if line[amount] != expected:
                yield Difference(at, amount, line[amount], expected)
        if line["price_id"] != attempt["price_id"]:
            yield Difference(at, "price record", line["price_id"], attempt["price_id"])
        price = prices.find(line["price_id"])
        for unit, known in zip(("unit_price", "list_price"), price or (), strict=False):
            if line[unit] != known.get(line["bucket"]):
                yield Difference(at, unit, line[unit], known.get(line["bucket"]))
    if attempt["cost"] is None:
        if lines:
            yield Difference(where, "cost", None, sum(line["amount"] for line in lines))
        return
    cost = sum(line["amount"] for line in lines)
    if attempt["cost"] != cost:
        yield Difference(where, "cost", attempt["cost"], cost)
    billed = {line["bucket"]: line["quantity"] for line in lines}
    used = {name.removeprefix("tokens_"): attempt[name] for name in TOKEN_COLUMNS if attempt[name]}
    if billed != used:
        yield Difference(where, "billed tokens", billed, used)


def _orphans(connection: Connection) -> Iterator[Difference]:
    pairs = (
        (attempts, requests, attempts.c.request_id == requests.c.id),
        (adjustments, requests, adjustments.c.request_id == requests.c.id),
        (
            cost_lines,
            attempts,
            sa.and_(
                cost_lines.c.request_id == attempts.c.request_id, cost_lines.c.attempt == attempts.c.attempt
            ),
        ),
        (cost_lines, price_records, cost_lines.c.price_id == price_records.c.id),
    )
    for child, parent, on in pairs:
        missing = next(iter(parent.primary_key)).is_(None)
        query = sa.select(sa.func.count()).select_from(child.outerjoin(parent, on)).where(missing)
        count = connection.scalar(query)
        if count:
            yield Difference(child.name, f"rows without {parent.name}", count, 0)


def _add_to_rollup(rollup: dict[tuple[str, ...], list[int]], row: RowMapping) -> None:
    """The same sums as `ledger.rollup_sums`, from the stored row: two ways to one figure."""
    periods = msgspec.json.decode(row["budgets"])
    key = (
        row["opened_at"].strftime("%Y-%m-%d"),
        periods[0][1] if periods else row["opened_at"].strftime("%Y-%m"),
        row["team"],
        row["app"] or "",
        row["cost_center"] or "",
        row["served_model"] or "",
        row["served_provider"] or "",
        row["prompt_class"] or "",
        row["cache"],
    )
    compared = row["cost"] is not None and row["baseline"] is not None
    saving = [row[name] or 0 if compared else 0 for name in _SUM_COLUMNS]
    asked = not row["endpoint"].startswith(OWN_CALLS)
    added = (
        int(asked),
        int(row["estimated"]),
        int(row["unpriced"]),
        int(asked and row["status"] == "failed"),
        *(row[name] for name in TOKEN_COLUMNS),
        row["cost"] or 0,
        int(compared),
        *saving,
        int(row["potential_savings"] is not None),
        row["potential_savings"] or 0,
    )
    sums = rollup[key]
    for at, value in enumerate(added):
        sums[at] += value


def _compare(
    connection: Connection,
    table: sa.Table,
    key: Sequence[str],
    sums: Sequence[str],
    expected: Mapping[tuple[str, ...], Sequence[int]],
) -> Iterator[Difference]:
    seen = set()
    for row in connection.execute(sa.select(table).order_by(*table.primary_key)).mappings():
        name = tuple(row[column] for column in key)
        seen.add(name)
        wanted = expected.get(name) or [0] * len(sums)
        for column, value in zip(sums, wanted, strict=True):
            if row[column] != value:
                yield Difference(f"{table.name} {'/'.join(name)}", column, row[column], value)
    for name in sorted(expected.keys() - seen):
        yield Difference(table.name, "row " + "/".join(name), "missing", list(expected[name]))
