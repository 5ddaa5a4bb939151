"""Writing rules against stored answers, within a transaction that writes."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from router.adapters.sql.schema import cache_invalidations
from router.core.cached import Invalidation, RuleKind


def lock_rows(connection: Connection, table: sa.Table) -> None:
    """Until the transaction ends nobody else adds a row to `table`, so that ids rise in the order of commits. Readers
    go on. SQLite has one writer anyway. Who locks both takes `cache_labels` first.
    """
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f'LOCK TABLE "{table.name}" IN SHARE ROW EXCLUSIVE MODE')


def add_rule(
    connection: Connection, kind: RuleKind, value: str, *, at: datetime, by: str, reason: str | None
) -> Invalidation:
    """`by`: `admin`, `cli`, `check` or the id of a key."""
    lock_rows(connection, cache_invalidations)
    newest = connection.scalar(sa.select(sa.func.max(cache_invalidations.c.id)))
    rule = Invalidation(int(newest or 0) + 1, kind, value, at)
    connection.execute(
        sa.insert(cache_invalidations).values(
            id=rule.id, at=at, kind=kind, value=value, by=by, reason=_printable(reason)
        )
    )
    return rule


def quarantine(
    connection: Connection, entry: str, pair: str | None, *, at: datetime, by: str, reason: str
) -> None:
    """An entry is named once, and so is the pair of prompts, for which the next entry would be as wrong. Who locks it
    takes `cache_labels` first.
    """
    lock_rows(connection, cache_invalidations)
    if not quarantined(connection, entry):
        add_rule(connection, "entry", entry, at=at, by=by, reason=reason)
    if pair and not _named(connection, "pair", pair):
        add_rule(connection, "pair", pair, at=at, by=by, reason=reason)


def quarantined(connection: Connection, entry: str) -> bool:
    return _named(connection, "entry", entry)


def _named(connection: Connection, kind: RuleKind, value: str) -> bool:
    rule = cache_invalidations.c
    return bool(connection.scalar(sa.select(sa.exists().where(rule.kind == kind, rule.value == value))))


def _printable(text: str | None) -> str | None:
    """Text that every database and terminal takes."""
    if text is None:
        return None
    return "".join(char if char.isprintable() else " " for char in text).strip() or None
