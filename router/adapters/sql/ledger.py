"""Writing the ledger: a batch of settled requests, with everything they carry, in one transaction."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from router.adapters.journal import with_texts
from router.adapters.sql.database import unavailable, writing
from router.adapters.sql.rules import lock_rows, quarantine
from router.adapters.sql.schema import (
    ROLLUP_KEY,
    ROLLUP_SUMS,
    adjustments,
    attempts,
    budget_spend,
    cache_candidates,
    cache_labels,
    cost_lines,
    iso_utc,
    labels,
    price_records,
    request_features,
    requests,
    spend_rollup,
)
from router.core.cached import CacheLabel
from router.core.errors import ConfigurationError
from router.core.learning import OWN_CALLS, Label
from router.core.types import BudgetWindow, PriceRecord, RequestRecord

log = logging.getLogger(__name__)

_json = msgspec.json.Encoder(order="sorted", decimal_format="string")
_EMPTY_MAPPING, _EMPTY_LIST = "{}", "[]"


def mapping_json(value: Mapping[str, Any]) -> str:
    return _json.encode(dict(value)).decode() if value else _EMPTY_MAPPING


def list_json(value: Sequence[Any]) -> str:
    return _json.encode(value).decode() if value else _EMPTY_LIST


def budgets_json(budgets: Sequence[BudgetWindow]) -> str:
    return _json.encode([(window.key, window.period) for window in budgets]).decode()


def charge(record: RequestRecord) -> int:
    """What a request takes from its budgets: its cost, and where that is unknown its worst case, since unknown is
    never free. The reserve stage counts the same.
    """
    return record.worst_case if record.cost is None else record.cost


def rollup_key(record: RequestRecord) -> tuple[str, ...]:
    """The rollup row a request is counted in, in the order of `ROLLUP_KEY`."""
    return (
        record.opened_at.date().isoformat(),
        budget_period(record),
        record.team,
        record.app or "",
        record.cost_center or "",
        record.served_model or "",
        record.served_provider or "",
        record.prompt_class or "",
        record.cache,
    )


def budget_period(record: RequestRecord) -> str:
    return record.budgets[0].period if record.budgets else record.opened_at.strftime("%Y-%m")


def rollup_sums(record: RequestRecord) -> tuple[int, ...]:
    """What a request adds, in the order of `ROLLUP_SUMS`. A call to learn from adds its cost and tokens, and counts
    neither as a request nor as one that failed.
    """
    asked = not record.endpoint.startswith(OWN_CALLS)
    saving: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    if record.baseline is not None and record.cost is not None:
        saving = (
            1,
            record.cost,
            record.baseline,
            record.routing_savings or 0,
            record.cache_savings or 0,
            record.overhead or 0,
        )
    return (
        int(asked),
        int(record.estimated),
        int(record.unpriced),
        int(asked and record.status == "failed"),
        *record.usage.quantities(),
        record.cost or 0,
        *saving,
        int(record.potential_savings is not None),
        record.potential_savings or 0,
    )


def _sql(table: sa.Table, mark: str, suffix: str = "", *, without: Sequence[str] = ()) -> str:
    columns = [column.name for column in table.columns if column.name not in without]
    names = ", ".join(f'"{name}"' for name in columns)
    marks = ", ".join([mark] * len(columns))
    return f'INSERT INTO "{table.name}" ({names}) VALUES ({marks}){suffix}'  # noqa: S608 - no input in it


def _adding(table: sa.Table, key: Iterable[str], sums: Iterable[str]) -> str:
    added = ", ".join(f'"{name}" = "{table.name}"."{name}" + excluded."{name}"' for name in sums)
    conflict = ", ".join(f'"{name}"' for name in key)
    return f" ON CONFLICT ({conflict}) DO UPDATE SET {added}"


def _add_budget(mark: str) -> str:
    return _sql(budget_spend, mark, _adding(budget_spend, ("key", "period"), ("spent", "requests")))


class Ledger:
    """The tables of the ledger, for writing. Not thread-safe: one writer thread owns it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        sqlite = engine.dialect.name == "sqlite"
        # What the driver takes as it is: the ORM's conversions would cost more than all the rest.
        self._time: Callable[[datetime], Any] = iso_utc if sqlite else _unchanged
        mark = "?" if sqlite else "%s"
        self._insert_price = _sql(price_records, mark, " ON CONFLICT (id) DO NOTHING")
        self._insert_request = _sql(requests, mark)
        self._insert_attempt = _sql(attempts, mark)
        self._insert_line = _sql(cost_lines, mark)
        self._insert_features = _sql(request_features, mark)
        # A request may be labelled by several later ones for the same reason; once is enough.
        self._insert_label = _sql(labels, mark, " ON CONFLICT DO NOTHING")
        self._insert_candidate = _sql(cache_candidates, mark)
        self._insert_cache_label = _sql(cache_labels, mark, " ON CONFLICT DO NOTHING", without=("id",))
        self._add_rollup = _sql(spend_rollup, mark, _adding(spend_rollup, ROLLUP_KEY, ROLLUP_SUMS))
        self._add_budget = _add_budget(mark)
        self._known_prices: set[str] = set()

    def write(self, records: Sequence[RequestRecord], *, fresh: bool) -> int:
        """Books those that are not booked yet and returns their number; all of them or none.

        `fresh`: none of the ids can be in SQL yet, so nobody looks; should one be there all the same, the
        database raises IntegrityError and nothing is written.
        """
        unique = {record.id: record for record in records}
        with writing(self._engine) as connection:
            if not fresh:
                for known in existing_ids(connection, list(unique)):
                    del unique[known]
            if not unique:
                return 0
            prices = self._write_rows(connection, list(unique.values()))
        self._known_prices |= prices
        return len(unique)

    def _write_rows(self, connection: Connection, records: list[RequestRecord]) -> set[str]:
        time = self._time
        request_rows: list[tuple[Any, ...]] = []
        attempt_rows: list[tuple[Any, ...]] = []
        line_rows: list[tuple[Any, ...]] = []
        feature_rows: list[tuple[Any, ...]] = []
        label_rows: list[tuple[Any, ...]] = []
        candidate_rows: list[tuple[Any, ...]] = []
        cache_label_rows: list[tuple[Any, ...]] = []
        prices: dict[str, PriceRecord] = {}
        rollup: dict[tuple[str, ...], tuple[int, ...]] = {}
        budgets: dict[tuple[str, str], tuple[int, int]] = {}
        for record in records:
            request_id = record.id
            request_rows.append(
                (
                    request_id,
                    time(record.opened_at),
                    time(record.settled_at),
                    record.key_id,
                    record.team,
                    record.app,
                    record.cost_center,
                    mapping_json(record.tags),
                    record.endpoint,
                    record.caller_request_id,
                    record.requested_model,
                    record.baseline_model,
                    record.served_model,
                    record.served_provider,
                    record.streamed,
                    record.prompt_class,
                    record.difficulty,
                    record.confidence,
                    record.encoder,
                    record.decision,
                    mapping_json(record.dropped),
                    record.propensity,
                    record.policy_hash,
                    list_json(record.exceptions),
                    budgets_json(record.budgets),
                    record.cache,
                    record.cache_entry,
                    record.status,
                    record.http_status,
                    record.error,
                    record.estimated,
                    record.unpriced,
                    *record.usage.quantities(),
                    record.worst_case,
                    record.cost,
                    record.baseline,
                    record.routing_savings,
                    record.cache_savings,
                    record.overhead,
                    record.potential_savings,
                    record.first_token_ms,
                    record.duration_ms,
                )
            )
            for attempt in record.attempts:
                price = attempt.price
                if price is not None and price.id not in self._known_prices:
                    prices[price.id] = price
                attempt_rows.append(
                    (
                        request_id,
                        attempt.index,
                        attempt.provider,
                        attempt.model,
                        attempt.upstream_model,
                        time(attempt.started_at),
                        attempt.outcome,
                        attempt.status_code,
                        attempt.error,
                        attempt.first_token_ms,
                        attempt.duration_ms,
                        *attempt.usage.quantities(),
                        attempt.estimated,
                        attempt.cost,
                        None if price is None else price.id,
                    )
                )
                for line in attempt.lines:
                    line_rows.append(
                        (
                            request_id,
                            attempt.index,
                            line.bucket,
                            line.quantity,
                            line.unit_price,
                            line.list_price,
                            line.amount,
                            line.list_amount,
                            line.price_id,
                        )
                    )
            if record.features is not None and record.features_encoder is not None:
                feature_rows.append((request_id, record.features_encoder, record.features, record.prompt))
            label_rows.extend(label_row(label, time(label.at)) for label in record.labels)
            if (found := record.candidate) is not None:
                candidate_rows.append(
                    (
                        request_id,
                        found.scope,
                        found.entry,
                        found.similarity,
                        found.probability,
                        found.threshold,
                        found.mode,
                        found.served,
                        found.would_serve,
                        found.saved,
                        list_json(found.reasons),
                        found.pair or None,
                    )
                )
            cache_label_rows.extend(cache_label_row(label, time(label.at)) for label in record.cache_labels)
            key, sums = rollup_key(record), rollup_sums(record)
            before = rollup.get(key)
            rollup[key] = sums if before is None else tuple(map(int.__add__, before, sums))
            cost = charge(record)
            for window in record.budgets:
                spent, count = budgets.get((window.key, window.period), (0, 0))
                budgets[window.key, window.period] = (spent + cost, count + 1)
        # Rows that several writers touch come last and sorted: none of them waits in a ring.
        run = connection.exec_driver_sql
        if prices:
            run(self._insert_price, [self._price_row(prices[name]) for name in sorted(prices)])
        run(self._insert_request, request_rows)
        if attempt_rows:
            run(self._insert_attempt, attempt_rows)
        if line_rows:
            run(self._insert_line, line_rows)
        if feature_rows:
            run(self._insert_features, feature_rows)
        if label_rows:
            run(self._insert_label, label_rows)
        if candidate_rows:
            run(self._insert_candidate, candidate_rows)
        if cache_label_rows:
            lock_rows(connection, cache_labels)
            run(self._insert_cache_label, cache_label_rows)
            _quarantine_wrong(connection, [label for record in records for label in record.cache_labels])
        run(self._add_rollup, [(*key, *rollup[key]) for key in sorted(rollup)])
        if budgets:
            run(self._add_budget, [(*key, *budgets[key]) for key in sorted(budgets)])
        return set(prices)

    def _price_row(self, price: PriceRecord) -> tuple[Any, ...]:
        return (
            price.id,
            price.provider,
            price.model,
            self._time(price.effective_from),
            mapping_json(price.unit_prices),
            mapping_json(price.list_prices),
            mapping_json(price.marginal_prices),
            price.source,
            price.contract,
        )


def label_row(label: Label, at: Any, revision: int = 0) -> tuple[Any, ...]:
    """A row of `labels`, in the order of its columns. `at` is what the driver takes for `label.at`."""
    return (
        "lbl_" + secrets.token_hex(8),
        label.request_id,
        label.model,
        label.score,
        label.weight,
        label.source,
        label.propensity,
        at,
        label.key_id,
        label.team,
        label.comment,
        revision,
    )


def cache_label_row(label: CacheLabel, at: Any, revision: int = 0) -> tuple[Any, ...]:
    """A row of `cache_labels`, in the order of its columns after `id`."""
    return (
        label.request_id,
        label.scope,
        label.entry,
        label.score,
        label.right,
        label.propensity,
        label.source,
        at,
        label.key_id,
        label.team,
        label.app,
        label.comment,
        revision,
    )


def _quarantine_wrong(connection: Connection, labels: Sequence[CacheLabel]) -> None:
    """Rules against entries that were served and that a check found wrong. They travel with the label, so that they
    come through whatever Redis does.
    """
    wrong = [label for label in labels if not label.right]
    if not wrong:
        return
    found = cache_candidates.c
    query = sa.select(found.request_id, found.pair).where(
        found.request_id.in_({label.request_id for label in wrong}), found.served
    )
    served = {row.request_id: row.pair for row in connection.execute(query)}
    for label in wrong:
        if label.request_id in served:
            reason = f"found wrong by {label.source}: {label.request_id}"
            pair = served[label.request_id]
            quarantine(connection, label.entry, pair, at=label.at, by="check", reason=reason)


def _unchanged(value: datetime) -> datetime:
    return value


def adjust(engine: Engine, request_id: str, amount: int, reason: str, author: str, at: datetime) -> str:
    """Corrects a booked request by `amount` nano-USD (negative: a refund) and returns the adjustment's id.

    Raises ConfigurationError for an unknown request, UnavailableError when SQL does not answer.
    """
    adjustment_id = "adj_" + secrets.token_hex(8)
    mark = "?" if engine.dialect.name == "sqlite" else "%s"
    try:
        with writing(engine) as connection:
            query = sa.select(requests.c.budgets).where(requests.c.id == request_id)
            budgets = connection.scalars(query).one_or_none()
            if budgets is None:
                raise ConfigurationError("no booked request has this id")
            connection.execute(
                sa.insert(adjustments).values(
                    id=adjustment_id,
                    request_id=request_id,
                    created_at=at,
                    amount=amount,
                    reason=reason,
                    author=author,
                )
            )
            rows = [(key, period, amount, 0) for key, period in sorted(msgspec.json.decode(budgets))]
            if rows:
                connection.exec_driver_sql(_add_budget(mark), rows)
    except SQLAlchemyError as error:
        raise unavailable(error) from None
    return adjustment_id


def existing_ids(connection: Connection, ids: Sequence[str], chunk: int = 500) -> set[str]:
    """Which of these requests are booked."""
    found: set[str] = set()
    for start in range(0, len(ids), chunk):
        query = sa.select(requests.c.id).where(requests.c.id.in_(ids[start : start + chunk]))
        found.update(connection.scalars(query))
    return found


def without_nul(value: Any) -> Any:
    """The same record without NUL characters, which PostgreSQL's text does not take."""
    return with_texts(value, lambda text: text.replace("\0", "�"))
