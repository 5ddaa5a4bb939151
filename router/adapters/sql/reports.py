"""Reports over the ledger, for people (table, HTML) and programs (JSON, CSV): the same digits in each.

Whole days are summed from the rollup, the parts of a day at both ends of the asked span from the requests
themselves. A request belongs to the UTC day it was opened on; its model is the one that served it.
"""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from router.adapters.sql.database import one_snapshot, unavailable
from router.adapters.sql.ledger import existing_ids
from router.adapters.sql.schema import (
    ROLLUP_SUMS,
    TOKEN_COLUMNS,
    adjustments,
    budget_spend,
    requests,
    spend_rollup,
)
from router.adapters.sql.spend import journalled_ids
from router.adapters.sql.writer import REJECTED_FILE
from router.core.errors import ConfigurationError
from router.core.learning import OWN_CALLS
from router.core.policy import BudgetLimit
from router.core.types import NANO_PER_USD

Format = Literal["table", "json", "csv", "html"]
FORMATS: tuple[Format, ...] = ("table", "json", "csv", "html")

# What people group by -> the rollup's column; the requests have the same under the second name.
DIMENSIONS: Mapping[str, tuple[str, str]] = {
    "team": ("team", "team"),
    "app": ("app", "app"),
    "model": ("model", "served_model"),
    "class": ("prompt_class", "prompt_class"),
    "day": ("day", "day"),
    "provider": ("provider", "served_provider"),
    "cache": ("cache", "cache"),
    "cost_center": ("cost_center", "cost_center"),
}

Cell = str | int | Decimal | None


@dataclass(frozen=True, slots=True)
class Usd:
    """Nano-USD that a report prints in USD, always with nine decimals."""

    nano: int

    def __str__(self) -> str:
        sign = "-" if self.nano < 0 else ""
        whole, rest = divmod(abs(self.nano), NANO_PER_USD)
        return f"{sign}{whole}.{rest:09d}"


@dataclass(frozen=True, slots=True)
class Report:
    """`columns` is the order of every row's values. `data_health` says how far the figures can be trusted."""

    columns: tuple[str, ...]
    rows: tuple[Mapping[str, Cell | Usd], ...]
    data_health: Mapping[str, int]


def spend_report(
    engine: Engine,
    journals: Path,
    by: Sequence[str] = ("team", "model"),
    since: datetime | None = None,
    until: datetime | None = None,
) -> Report:
    """What was spent. `cost_usd` includes adjustments and leaves out what is unpriced (counted apart). Calls the
    gateway makes to learn from cost, and are not counted as requests.

    Raises ConfigurationError for an unknown dimension, UnavailableError when SQL does not answer.
    """
    groups, health = _read(engine, journals, by, since, until)
    rows = [
        {
            **dimensions_of(by, key),
            "requests": sums["requests"],
            "cost_usd": Usd(sums["cost"] + sums["adjusted"]),
            **{name: sums[name] for name in TOKEN_COLUMNS},
            "estimated": sums["estimated"],
            "unpriced": sums["unpriced"],
            "failed": sums["failed"],
        }
        for key, sums in groups.items()
    ]
    columns = (*by, "requests", "cost_usd", *TOKEN_COLUMNS, "estimated", "unpriced", "failed")
    return Report(columns, ordered(rows, by, "cost_usd"), health)


def savings_report(
    engine: Engine,
    journals: Path,
    by: Sequence[str] = ("team", "model"),
    since: datetime | None = None,
    until: datetime | None = None,
) -> Report:
    """What was saved against the reference: baseline - cost = routing + cache - overhead, in every row.

    All but `requests` covers only the `compared` requests whose cost and baseline are known. `potential_usd` is
    what the `advised` requests could have saved.
    """
    groups, health = _read(engine, journals, by, since, until)
    rows = [
        {
            **dimensions_of(by, key),
            "requests": sums["requests"],
            "compared": sums["saving_requests"],
            "baseline_usd": Usd(sums["baseline"]),
            "cost_usd": Usd(sums["saving_cost"]),
            "saved_usd": Usd(sums["baseline"] - sums["saving_cost"]),
            "routing_usd": Usd(sums["routing_savings"]),
            "cache_usd": Usd(sums["cache_savings"]),
            "overhead_usd": Usd(sums["overhead"]),
            "advised": sums["potential_requests"],
            "potential_usd": Usd(sums["potential_savings"]),
        }
        for key, sums in groups.items()
    ]
    columns = (
        *by,
        "requests",
        "compared",
        "baseline_usd",
        "cost_usd",
        "saved_usd",
        "routing_usd",
        "cache_usd",
        "overhead_usd",
        "advised",
        "potential_usd",
    )
    return Report(columns, ordered(rows, by, "saved_usd"), health)


def budgets_report(
    engine: Engine,
    journals: Path,
    limits: Iterable[BudgetLimit],
    period: str,
    team_budget: Callable[[str], BudgetLimit | None] = lambda _: None,
) -> Report:
    """Every budget that has a limit or spend in `period` (`2026-11`). `team_budget` gives the limit of a team that
    `limits` does not name. `spent_usd` counts an unpriced request at
    its worst case, as the reservation does; `state` is ok, warn, at_limit or at_hard_cap.
    """
    by_key = {limit.key: limit for limit in limits}
    ids = journalled_ids(journals)
    query = sa.select(budget_spend).where(budget_spend.c.period == period)
    try:
        with one_snapshot(engine) as connection:
            spent = {row.key: row for row in connection.execute(query)}
            health = health_of(journals, unsettled_of(connection, ids), {})
    except SQLAlchemyError as error:
        raise unavailable(error) from None
    rows = []
    for key in spent.keys() - by_key.keys():
        if key.startswith("team:") and (limit := team_budget(key.removeprefix("team:"))) is not None:
            by_key[key] = limit
    for key in sorted(by_key.keys() | spent.keys()):
        booked = spent.get(key)
        rows.append(_budget_row(key, period, by_key.get(key), 0 if booked is None else booked.spent, booked))
    columns = ("budget", "period", "limit_usd", "hard_cap_usd", "spent_usd", "share", "state", "requests")
    return Report(columns, tuple(rows), health)


def _budget_row(
    key: str, period: str, limit: BudgetLimit | None, spent: int, booked: Any
) -> dict[str, Cell | Usd]:
    soft = limit.limit if limit is not None else None
    hard = limit.hard_cap if limit is not None else None
    bound = soft if soft is not None else hard
    share = (Decimal(spent) / bound).quantize(Decimal("0.0001")) if bound else None
    state = "ok"
    if limit is not None and bound is not None:
        if any(spent >= bound * warn for warn in limit.warn_at):
            state = "warn"
        if spent >= bound:
            state = "at_limit"
        if hard is not None and spent >= hard:
            state = "at_hard_cap"
    return {
        "budget": key,
        "period": period,
        "limit_usd": None if soft is None else Usd(soft),
        "hard_cap_usd": None if hard is None else Usd(hard),
        "spent_usd": Usd(spent),
        "share": share,
        "state": state,
        "requests": 0 if booked is None else booked.requests,
    }


def render(report: Report, form: str) -> str:
    """The report as text. Raises ConfigurationError for an unknown format."""
    if form == "json":
        return _as_json(report)
    if form == "csv":
        return _as_csv(report)
    if form == "html":
        return _as_html(report)
    if form == "table":
        return _as_table(report)
    raise ConfigurationError(f"format: must be one of {', '.join(FORMATS)}")


_SPAN = re.compile(r"(\d{1,5})([hdw])")
_HOURS = {"h": 1, "d": 24, "w": 168}


def moment(text: str, now: datetime) -> datetime:
    """`7d`, `24h` or `2w` before `now`, a date (`2026-11-01`, midnight UTC) or an ISO 8601 time.

    Raises ConfigurationError.
    """
    span = _SPAN.fullmatch(text)
    try:
        if span is not None:
            return now - timedelta(hours=int(span[1]) * _HOURS[span[2]])
        found = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise ConfigurationError(
            "since/until: write a span (24h, 7d, 2w), a date (2026-11-01) or a time (2026-11-01T08:00:00+00:00)"
        ) from None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


# -- reading --

Groups = dict[tuple[str, ...], dict[str, int]]
_SUMS = (*ROLLUP_SUMS, "adjusted")


def _read(
    engine: Engine, journals: Path, by: Sequence[str], since: datetime | None, until: datetime | None
) -> tuple[Groups, dict[str, int]]:
    unknown = [name for name in by if name not in DIMENSIONS]
    if unknown:
        raise ConfigurationError(f"by: {unknown[0]!r} is not one of {', '.join(DIMENSIONS)}")
    if len(set(by)) != len(by):
        raise ConfigurationError("by: a dimension is named twice")
    ids = journalled_ids(journals)
    groups: Groups = {}
    try:
        with one_snapshot(engine) as connection:
            for query in _queries(connection, by, since, until):
                for row in connection.execute(query).mappings():
                    key = tuple(row[f"by_{name}"] or "" for name in by)
                    sums = groups.setdefault(key, dict.fromkeys(_SUMS, 0))
                    for name in _SUMS:
                        sums[name] += int(row.get(name) or 0)
            unsettled = unsettled_of(connection, ids)
    except SQLAlchemyError as error:
        raise unavailable(error) from None
    if not by:
        groups.setdefault((), dict.fromkeys(_SUMS, 0))
    totals = {name: sum(sums[name] for sums in groups.values()) for name in _SUMS}
    return groups, health_of(journals, unsettled, totals)


def _queries(
    connection: Connection, by: Sequence[str], since: datetime | None, until: datetime | None
) -> list[sa.Select[Any]]:
    first = None if since is None else _next_midnight(since)
    last = None if until is None else _midnight(until)
    queries = []
    if first is not None and last is not None and first >= last:
        queries.append(_raw_query(connection, by, since, until))
    else:
        queries.append(_rollup_query(by, first, last))
        if since is not None and first != since:
            queries.append(_raw_query(connection, by, since, first))
        if until is not None and last != until:
            queries.append(_raw_query(connection, by, last, until))
    queries.append(_adjustment_query(connection, by, since, until))
    return queries


def _rollup_query(by: Sequence[str], first: datetime | None, last: datetime | None) -> sa.Select[Any]:
    table = spend_rollup.c
    groups = [table[DIMENSIONS[name][0]].label(f"by_{name}") for name in by]
    query = sa.select(*groups, *(sa.func.sum(table[name]).label(name) for name in ROLLUP_SUMS))
    if first is not None:
        query = query.where(table.day >= first.strftime("%Y-%m-%d"))
    if last is not None:
        query = query.where(table.day < last.strftime("%Y-%m-%d"))
    return query.group_by(*groups)


def _raw_query(
    connection: Connection, by: Sequence[str], since: datetime | None, until: datetime | None
) -> sa.Select[Any]:
    row = requests.c
    compared = sa.and_(row.cost.is_not(None), row.baseline.is_not(None))
    asked = row.endpoint.not_like(f"{OWN_CALLS}%")
    sums = {
        "requests": count_of(asked),
        "estimated": count_of(row.estimated),
        "unpriced": count_of(row.unpriced),
        "failed": count_of(sa.and_(asked, row.status == "failed")),
        **{name: sa.func.sum(row[name]) for name in TOKEN_COLUMNS},
        "cost": sa.func.sum(row.cost),
        "saving_requests": count_of(compared),
        "saving_cost": sa.func.sum(sa.case((compared, row.cost))),
        **{
            name: sa.func.sum(sa.case((compared, row[name])))
            for name in ("baseline", "routing_savings", "cache_savings", "overhead")
        },
        "potential_requests": sa.func.count(row.potential_savings),
        "potential_savings": sa.func.sum(row.potential_savings),
    }
    groups = raw_groups(connection, by)
    query = sa.select(*groups, *(sums[name].label(name) for name in ROLLUP_SUMS))
    return within(query, since, until).group_by(*groups)


def _adjustment_query(
    connection: Connection, by: Sequence[str], since: datetime | None, until: datetime | None
) -> sa.Select[Any]:
    groups = raw_groups(connection, by)
    query = sa.select(*groups, sa.func.sum(adjustments.c.amount).label("adjusted")).join_from(
        adjustments, requests, adjustments.c.request_id == requests.c.id
    )
    return within(query, since, until).group_by(*groups)


def within(query: sa.Select[Any], since: datetime | None, until: datetime | None) -> sa.Select[Any]:
    if since is not None:
        query = query.where(requests.c.opened_at >= since)
    if until is not None:
        query = query.where(requests.c.opened_at < until)
    return query


def raw_groups(connection: Connection, by: Sequence[str]) -> list[sa.Label[Any]]:
    def column(name: str) -> sa.ColumnElement[Any]:
        if name != "day":
            return sa.func.coalesce(requests.c[DIMENSIONS[name][1]], "")
        if connection.dialect.name == "sqlite":
            return sa.func.substr(sa.type_coerce(requests.c.opened_at, sa.Text()), 1, 10)
        return sa.func.to_char(sa.func.timezone("UTC", requests.c.opened_at), "YYYY-MM-DD")

    return [column(name).label(f"by_{name}") for name in by]


def count_of(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[Any]:
    return sa.func.sum(sa.case((condition, 1), else_=0))


def _midnight(at: datetime) -> datetime:
    return at.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def _next_midnight(at: datetime) -> datetime:
    midnight = _midnight(at)
    return midnight if midnight == at else midnight + timedelta(days=1)


def unsettled_of(connection: Connection, ids: set[str]) -> int:
    return len(ids) - len(existing_ids(connection, sorted(ids)))


def health_of(journals: Path, unsettled: int, totals: Mapping[str, int]) -> dict[str, int]:
    try:
        with (journals / REJECTED_FILE).open("rb") as file:
            rejected = sum(1 for _ in file)
    except FileNotFoundError:
        rejected = 0
    named = {name: totals[name] for name in ("unpriced", "estimated", "failed") if name in totals}
    return {"unsettled": unsettled, "rejected": rejected, **named}


def dimensions_of(by: Sequence[str], key: tuple[str, ...]) -> dict[str, Cell]:
    return {name: value or None for name, value in zip(by, key, strict=True)}


def ordered(
    rows: list[dict[str, Cell | Usd]], by: Sequence[str], amount: str
) -> tuple[Mapping[str, Cell | Usd], ...]:
    """By time where days are asked for, else the largest amount first."""

    def order(row: dict[str, Cell | Usd]) -> tuple[Any, ...]:
        names = tuple(str(row[name] or "") for name in by)
        value = row[amount]
        assert isinstance(value, Usd)
        return (row["day"], *names) if "day" in by else (-value.nano, *names)

    return tuple(sorted(rows, key=order))


# -- writing --


def _as_json(report: Report) -> str:
    def value(cell: Cell | Usd) -> Any:
        return msgspec.Raw(str(cell).encode()) if isinstance(cell, Usd | Decimal) else cell

    rows = [{name: value(row[name]) for name in report.columns} for row in report.rows]
    encoded = msgspec.json.encode({"rows": rows, "data_health": dict(report.data_health)})
    return msgspec.json.format(encoded, indent=2).decode() + "\n"


def _as_csv(report: Report) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")  # RFC 4180; it quotes both
    writer.writerow(report.columns)
    for row in report.rows:
        writer.writerow([_csv_cell(row[name]) for name in report.columns])
    return out.getvalue()


def _csv_cell(cell: Cell | Usd) -> str:
    if cell is None:
        return ""
    if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        return "'" + cell  # a spreadsheet would run it as a formula
    return str(cell)


def _as_table(report: Report) -> str:
    shown = [name for name in report.columns if not _empty_tokens(report, name)]
    lines = [shown, *([_table_cell(row[name]) for name in shown] for row in report.rows)]
    if len(report.rows) > 1 and (total := _total(report, shown)):
        lines.append(total)
    widths = [max(len(line[at]) for line in lines) for at in range(len(shown))]
    left = [_is_text(report, name) for name in shown]
    text = [
        "  ".join(
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    if not report.rows:
        text.append("(nothing booked)")
    health = ", ".join(f"{count} {name}" for name, count in report.data_health.items())
    return "\n".join([*text, "", f"data health: {health}", ""])


def _empty_tokens(report: Report, name: str) -> bool:
    return name in TOKEN_COLUMNS and not any(row[name] for row in report.rows)


def _is_text(report: Report, name: str) -> bool:
    return any(isinstance(row[name], str) for row in report.rows)


def _table_cell(cell: Cell | Usd) -> str:
    if cell is None:
        return "-"
    # No cell can break the table or drive the terminal.
    return "".join(char if char.isprintable() else "?" for char in str(cell))


def _total(report: Report, shown: list[str]) -> list[str] | None:
    cells = []
    for name in shown:
        values = [row[name] for row in report.rows]
        if all(isinstance(value, Usd) for value in values):
            cells.append(str(Usd(sum(value.nano for value in values if isinstance(value, Usd)))))
        elif all(isinstance(value, int) for value in values):
            cells.append(str(sum(value for value in values if isinstance(value, int))))
        else:
            cells.append("")
    if "budget" in shown:  # an organisation's budget holds its teams': there is no sum
        return None
    if not cells[0]:
        cells[0] = "total"
    return cells


def _as_html(report: Report) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line((_table_cell(row[name]) for name in report.columns), "td") for row in report.rows)
    health = html.escape(", ".join(f"{count} {name}" for name, count in report.data_health.items()))
    return (
        f"<table>\n<thead>{line(report.columns, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>\n"
        f"<p>data health: {health}</p>\n"
    )
