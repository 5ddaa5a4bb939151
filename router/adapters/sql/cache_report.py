"""The report on the caches: hits, what they saved, and how often an answer found by likeness was wrong.

The digits are the ledger's; the rate of wrong answers is an estimate with an interval (`classifiers.pairs.bound`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from classifiers.pairs.bound import Certificate, Labelled, Prior, interval
from router.adapters.sql.cache_book import FEEDBACK, SqlCacheBook
from router.adapters.sql.database import one_snapshot, unavailable
from router.adapters.sql.reports import (
    DIMENSIONS,
    Cell,
    Report,
    Usd,
    count_of,
    dimensions_of,
    health_of,
    ordered,
    raw_groups,
    unsettled_of,
    within,
)
from router.adapters.sql.schema import cache_candidates, cache_labels, requests
from router.adapters.sql.spend import journalled_ids
from router.core.errors import ConfigurationError, RequestError
from router.core.policy import CacheUse
from router.core.ports import Snapshot
from router.stages.evidence import Standing, certified, labelled

SCOPE = "scope"
CERTIFIED = "certified"
COLUMNS = (
    "requests",
    "exact",
    "semantic",
    "hit_rate",
    "avoided_usd",
    "would_serve",
    "would_save_usd",
    "labels",
    "wrong_rate",
    "wrong_low",
    "wrong_high",
    "reported_right",
    "reported_wrong",
    "certified",
    "stopped",
    "waiting",
    "labels_missing",
)

MaxError = Callable[[str, str | None, Mapping[str, frozenset[str]]], float | None]
"""The policy's `max_error` for a team, an app and tags; None where it cannot be told."""

Key = tuple[str, ...]
_SUMS = ("requests", "exact", "semantic", "avoided", "unpriced", "would_serve", "would_save")


def policy_bound(snapshot: Snapshot, at: datetime) -> MaxError:
    """What the policy asks at one moment."""

    def bound(team: str, app: str | None, tags: Mapping[str, frozenset[str]]) -> float | None:
        try:
            return float(snapshot.resolve(team, app, tags, at).cache.max_error)
        except RequestError:  # a tag key the policy does not know any more
            return None

    return bound


@dataclass(slots=True)
class _Group:
    """`checked`: labels of answers that were served, or would have been."""

    sums: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_SUMS, 0))
    checked: list[Labelled] = field(default_factory=list)
    reported: list[bool] = field(default_factory=list)
    scopes: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Scope:
    """What held for the scope's newest candidate."""

    mode: str
    team: str
    app: str | None
    tags: Mapping[str, frozenset[str]]


def cache_report(
    engine: Engine,
    journals: Path,
    by: Sequence[str] = ("team", "app"),
    since: datetime | None = None,
    until: datetime | None = None,
    *,
    max_error: MaxError = lambda team, app, tags: None,
) -> Report:
    """What the caches did, by the dimensions of the other reports and by `scope` (whose answers share evidence).

    `requests` leaves out the calls that the policy's `learn` makes. `avoided_usd` is the sum of the hits' cache
    savings in the ledger. `would_serve` counts answers found by likeness that a mode without serving (`shadow`, or
    `certified` without enough evidence) kept back, `would_save_usd` what they would have saved. `wrong_rate`, between
    `wrong_low` and `wrong_high` with 95 % confidence, is the share of wrong answers among those that were or would
    have been served, from `labels` checks; what callers reported stands apart, as they report what went wrong.
    `certified` scopes have shown the policy's bound; `stopped` ones had, and then too many of their latest checks
    went wrong: they serve nothing; those `waiting` lack about `labels_missing` checks together (None: not known, or
    hopeless).

    Raises ConfigurationError for an unknown dimension, UnavailableError when SQL does not answer.
    """
    known = (*DIMENSIONS, SCOPE)
    unknown = [name for name in by if name not in known]
    if unknown:
        raise ConfigurationError(f"by: {unknown[0]!r} is not one of {', '.join(known)}")
    if len(set(by)) != len(by):
        raise ConfigurationError("by: a dimension is named twice")
    ids = journalled_ids(journals)
    groups: dict[Key, _Group] = defaultdict(_Group)
    if not by:
        groups[()] = _Group()
    try:
        with one_snapshot(engine) as connection:
            _read_counts(connection, groups, by, since, until)
            _read_labels(connection, groups, by, since, until)
            scopes = _read_scopes(connection, groups, by, since, until)
            unsettled = unsettled_of(connection, ids)
    except SQLAlchemyError as error:
        raise unavailable(error) from None
    weighed = _weighed(engine, scopes, max_error)
    rows = []
    for key, group in groups.items():
        row = dimensions_of(by, key)
        if SCOPE in by:
            found = scopes.get(str(row[SCOPE]))
            row["mode"] = None if found is None else found.mode
        rows.append({**row, **_figures(group, weighed)})
    columns = (*by, "mode", *COLUMNS) if SCOPE in by else (*by, *COLUMNS)
    unpriced = sum(group.sums["unpriced"] for group in groups.values())
    health = {**health_of(journals, unsettled, {}), "hits_without_price": unpriced}
    return Report(columns, ordered(rows, by, "avoided_usd"), health)


# -- reading --


def _groups(connection: Connection, by: Sequence[str]) -> list[sa.Label[Any]]:
    plain = iter(raw_groups(connection, [name for name in by if name != SCOPE]))
    scope = sa.func.coalesce(cache_candidates.c.scope, "").label(f"by_{SCOPE}")
    return [scope if name == SCOPE else next(plain) for name in by]


def _key(row: Any, by: Sequence[str]) -> Key:
    return tuple(row[f"by_{name}"] or "" for name in by)


def _asked(query: sa.Select[Any], since: datetime | None, until: datetime | None) -> sa.Select[Any]:
    return within(query, since, until).where(~requests.c.endpoint.like("learn.%"))


def _read_counts(
    connection: Connection,
    groups: dict[Key, _Group],
    by: Sequence[str],
    since: datetime | None,
    until: datetime | None,
) -> None:
    row, found = requests.c, cache_candidates.c
    names = _groups(connection, by)
    hit = row.cache != "miss"
    kept_back = sa.and_(found.would_serve, ~found.served)
    sums = {
        "requests": sa.func.count(),
        "exact": count_of(row.cache == "exact"),
        "semantic": count_of(row.cache == "semantic"),
        "avoided": sa.func.sum(sa.case((hit, row.cache_savings))),
        "unpriced": count_of(sa.and_(hit, row.cache_savings.is_(None))),
        "would_serve": count_of(kept_back),
        "would_save": sa.func.sum(sa.case((kept_back, found.saved))),
    }
    query = sa.select(*names, *(sums[name].label(name) for name in _SUMS)).select_from(
        requests.outerjoin(cache_candidates, found.request_id == row.id)
    )
    for counted in connection.execute(_asked(query, since, until).group_by(*names)).mappings():
        group = groups[_key(counted, by)]
        for name in _SUMS:
            group.sums[name] += int(counted[name] or 0)


def _read_labels(
    connection: Connection,
    groups: dict[Key, _Group],
    by: Sequence[str],
    since: datetime | None,
    until: datetime | None,
) -> None:
    said = cache_labels.c
    one_judgement = (said.request_id, said.entry, said.source, said.key_id)
    number = sa.func.row_number().over(partition_by=one_judgement, order_by=said.revision.desc())
    newest = sa.select(cache_labels, number.label("number")).subquery()
    found = cache_candidates.c
    query = (
        sa.select(
            *_groups(connection, by),
            newest.c.score,
            newest.c.correct,
            newest.c.propensity,
            newest.c.source,
            found.served,
            found.would_serve,
        )
        .select_from(
            newest.join(requests, requests.c.id == newest.c.request_id).outerjoin(
                cache_candidates, found.request_id == newest.c.request_id
            )
        )
        .where(newest.c.number == 1)
        .order_by(newest.c.id)
    )
    for row in connection.execute(_asked(query, since, until)).mappings():
        group = groups[_key(row, by)]
        if row["source"] == FEEDBACK:
            group.reported.append(row["correct"])
        elif row["propensity"] > 0 and (row["served"] or row["would_serve"]):
            group.checked.append(Labelled(row["score"], row["correct"], min(1.0, row["propensity"])))


def _read_scopes(
    connection: Connection,
    groups: dict[Key, _Group],
    by: Sequence[str],
    since: datetime | None,
    until: datetime | None,
) -> dict[str, _Scope]:
    found = cache_candidates.c
    joined = cache_candidates.join(requests, requests.c.id == found.request_id)
    names = _groups(connection, by)
    query = sa.select(*names, found.scope).select_from(joined).group_by(*names, found.scope)
    for row in connection.execute(_asked(query, since, until)).mappings():
        groups[_key(row, by)].scopes.add(row["scope"])
    number = sa.func.row_number().over(
        partition_by=found.scope, order_by=(requests.c.opened_at.desc(), requests.c.id.desc())
    )
    latest = sa.select(
        found.scope, found.mode, requests.c.team, requests.c.app, requests.c.tags, number.label("number")
    ).select_from(joined)
    newest = _asked(latest, since, until).subquery()
    scopes = {}
    for row in connection.execute(sa.select(newest).where(newest.c.number == 1)).mappings():
        tags = msgspec.json.decode(row["tags"], type=dict[str, frozenset[str]])
        scopes[row["scope"]] = _Scope(row["mode"], row["team"], row["app"], tags)
    return scopes


# -- what the evidence says --


_Weighed = tuple[Standing, Certificate]


def _weighed(engine: Engine, scopes: Mapping[str, _Scope], max_error: MaxError) -> dict[str, _Weighed | None]:
    """Of each scope in mode `certified`, what its evidence says to a gateway; None where the bound is not known."""
    asked = {name: scope for name, scope in scopes.items() if scope.mode == CERTIFIED}
    if not asked:
        return {}
    book = SqlCacheBook(engine, use=lambda: CacheUse(semantic=True))
    book.refresh_now()
    priors: dict[int, Prior] = {}
    weighed: dict[str, _Weighed | None] = {}
    for name, scope in asked.items():
        bound = max_error(scope.team, scope.app, scope.tags)
        if bound is None or not 0 < bound < 1:
            weighed[name] = None
            continue
        pool = book.pool(name)
        if len(pool) not in priors:
            priors[len(pool)] = Prior.of(labelled(pool))
        weighed[name] = certified(book.labels(name), priors[len(pool)] if pool else None, bound)
    return weighed


def _figures(group: _Group, weighed: Mapping[str, _Weighed | None]) -> dict[str, Cell | Usd]:
    sums = group.sums
    hits = sums["exact"] + sums["semantic"]
    rate = low = high = None
    if group.checked:
        least = min(label.propensity for label in group.checked)
        rate, low, high = map(_share, interval(group.checked, min_propensity=least))
    mine = [weighed[scope] for scope in group.scopes if scope in weighed]
    standings = [found[0] for found in mine if found is not None and found[0].threshold is not None]
    stopped = sum(standing.broken for standing in standings)
    missing = [
        found[1].missing
        for found in mine
        if found is not None and found[0].threshold is None and found[1].missing is not None
    ]
    return {
        "requests": sums["requests"],
        "exact": sums["exact"],
        "semantic": sums["semantic"],
        "hit_rate": _share(hits / sums["requests"]) if sums["requests"] else None,
        "avoided_usd": Usd(sums["avoided"]),
        "would_serve": sums["would_serve"],
        "would_save_usd": Usd(sums["would_save"]),
        "labels": len(group.checked),
        "wrong_rate": rate,
        "wrong_low": low,
        "wrong_high": high,
        "reported_right": sum(group.reported),
        "reported_wrong": len(group.reported) - sum(group.reported),
        "certified": len(standings) - stopped,
        "stopped": stopped,
        "waiting": len(mine) - len(standings),
        "labels_missing": sum(missing) if missing else None,
    }


def _share(value: float) -> Decimal:
    return Decimal(value).quantize(Decimal("0.0001"))
