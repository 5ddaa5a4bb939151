"""The book of the caches in SQL: rules of what may no longer be served, and labels of answers found by likeness.

Each worker reads both in a thread of its own. Ids rise in the order of commits, so a worker that asks for what is
newer than the last it saw misses nothing, and needs no clock.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from sys import intern
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from router.adapters.sql.database import unavailable, writing
from router.adapters.sql.rules import add_rule
from router.adapters.sql.schema import (
    cache_candidates,
    cache_invalidations,
    cache_labels,
    requests,
    spend_rollup,
)
from router.core.cached import (
    INVALIDATION_KINDS,
    CacheLabel,
    Invalidation,
    InvalidationKind,
    Invalidations,
)
from router.core.errors import ConfigurationError, UnavailableError
from router.core.policy import CacheUse

log = logging.getLogger("farthing")

FEEDBACK = "feedback"
WATCH_SECONDS = 2.0
DAY = 86_400.0
LABEL_DAYS = 90
MAX_LABELS = 50_000
_LABEL_STEP = MAX_LABELS // 5
LEAST_DAYS = 8
"""A rule stays in force this long at least, and a day longer than any answer may be kept."""
PAIR_DAYS, MAX_PAIRS = 365, 10_000
"""What is known of a pair of prompts outlives the answers; the newest are kept."""
MAX_VALUE = 200
MAX_REASON = 500


# ---- rules ----


def invalidate(
    engine: Engine, kind: InvalidationKind, value: str, *, at: datetime, by: str, reason: str | None = None
) -> Invalidation:
    """Books a rule. `by`: `admin`, `cli` or the id of a key.

    Raises ConfigurationError naming the field, UnavailableError when SQL does not answer.
    """
    value = _checked(kind, value)
    if reason is not None and len(reason) > MAX_REASON:
        raise ConfigurationError(f"reason: is longer than {MAX_REASON} characters")
    try:
        with writing(engine) as connection:
            return add_rule(connection, kind, value, at=at, by=by, reason=reason)
    except SQLAlchemyError as error:
        raise unavailable(error) from None


def _checked(kind: InvalidationKind, value: str) -> str:
    if kind not in INVALIDATION_KINDS:
        raise ConfigurationError(f"kind: must be one of {', '.join(INVALIDATION_KINDS)}")
    if kind == "all":
        if value:
            raise ConfigurationError("value: `all` takes none")
        return ""
    if not value or len(value) > MAX_VALUE or not value.isprintable():
        raise ConfigurationError(f"value: write the {kind}, at most {MAX_VALUE} printable characters")
    if kind == "tag" and ("=" not in value or value.startswith("=") or value.endswith("=")):
        raise ConfigurationError("value: a tag is written key=value, such as data=pii")
    if kind == "app":
        team, slash, app = value.partition("/")
        if not (slash and team and app):
            raise ConfigurationError("value: an app is written TEAM/APP, such as search/faq-bot")
    return value


@dataclass(frozen=True, slots=True)
class BookedRule:
    """A rule with who made it and why."""

    rule: Invalidation
    by: str
    reason: str | None


def list_rules(engine: Engine, limit: int = 50, *, without_entries: bool = False) -> list[BookedRule]:
    """The newest first. `without_entries`: leaves out what single wrong answers brought. Raises UnavailableError."""
    table = cache_invalidations
    query = sa.select(table).order_by(table.c.id.desc()).limit(limit)
    if without_entries:
        query = query.where(table.c.kind.not_in(("entry", "pair")))
    try:
        with engine.connect() as connection:
            return [BookedRule(_rule(row), row.by, row.reason) for row in connection.execute(query)]
    except SQLAlchemyError as error:
        raise unavailable(error) from None


def names_something(engine: Engine, rule: Invalidation) -> bool:
    """False where no booked request can be meant, so that a slip of the pen is noticed; tags are not looked up.

    Raises UnavailableError.
    """
    kind, value, rollup = rule.kind, rule.value, spend_rollup.c
    if kind in ("all", "tag"):
        return True
    team, _, app = value.partition("/")
    meant = {
        "team": rollup.team == value,
        "app": sa.and_(rollup.team == team, rollup.app == app),
        "model": rollup.model == value,
        "scope": cache_candidates.c.scope == value,
        "entry": requests.c.id == value,
    }
    try:
        with engine.connect() as connection:
            return bool(connection.scalar(sa.select(sa.exists().where(meant[kind]))))
    except SQLAlchemyError as error:
        raise unavailable(error) from None


def _rule(row: Any) -> Invalidation:
    return Invalidation(row.id, row.kind, row.value, row.at)


# ---- a running gateway ----


class Evidence:
    """Labels that the bound may use, in the order they were booked. Nothing in it changes for a reader, who sees
    those that were there when he took it: later ones are behind `count`.
    """

    __slots__ = ("_by_scope", "_count", "_ordered", "_starts")

    def __init__(self, labels: Sequence[CacheLabel] = ()) -> None:
        self._ordered: list[CacheLabel] = []
        self._count = 0
        self._by_scope: dict[str, tuple[CacheLabel, ...]] = {}
        self._starts: dict[str, int] = {}
        self._add(labels)

    def labels(self, scope: str) -> Sequence[CacheLabel]:
        return self._by_scope.get(scope, ())

    def pool(self, scope: str) -> Sequence[CacheLabel]:
        return self._ordered[: self._starts.get(scope, self._count)]

    def all(self) -> Sequence[CacheLabel]:
        return self._ordered[: self._count]

    def with_more(self, labels: Sequence[CacheLabel]) -> Evidence:
        """The same and these, which cost what they are and not what is there. Only of the newest, by one thread."""
        more = Evidence()
        more._ordered, more._count = self._ordered, self._count
        more._by_scope, more._starts = dict(self._by_scope), dict(self._starts)
        more._add(labels)
        return more

    def __len__(self) -> int:
        return self._count

    def _add(self, labels: Sequence[CacheLabel]) -> None:
        added: dict[str, list[CacheLabel]] = {}
        for at, label in enumerate(labels, self._count):
            self._starts.setdefault(label.scope, at)
            added.setdefault(label.scope, []).append(label)
        for scope, more in added.items():
            self._by_scope[scope] = (*self._by_scope.get(scope, ()), *more)
        self._ordered.extend(labels)
        self._count = len(self._ordered)


def first_id(newest: int) -> int:
    """The first label id that is read. It moves in steps, the same in every worker, so that a scope's evidence is
    not trimmed with each label that comes in; between 40,000 and 50,000 are read.
    """
    return max(0, -(-newest // _LABEL_STEP) * _LABEL_STEP - MAX_LABELS) + 1


def first_day(now: datetime) -> datetime:
    """The moment from which labels are read: the beginning of the month that was `LABEL_DAYS` ago."""
    return (now.astimezone(UTC) - timedelta(days=LABEL_DAYS)).replace(
        day=1, hour=0, minute=0, second=0, microsecond=0
    )


class SqlCacheBook:
    """`core.cached.CacheBook` over SQL. What was read stays in force while SQL is away.

    `use` says what the policy in force wants of the caches; where no team uses any, SQL is not asked.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        use: Callable[[], CacheUse],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        every: float = WATCH_SECONDS,
    ) -> None:
        self._engine = engine
        self._use = use
        self._now = now
        self._every = every
        self._looking = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._rules: dict[tuple[str, str], Invalidation] = {}
        self._newest_rule = 0
        self._reaches = 0.0
        self._label_ids: list[int] = []
        self._newest_label = 0
        self._from: datetime | None = None
        self._invalidations = Invalidations()
        self._evidence = Evidence()
        self._revision = 0
        self.sql_up = True
        """False from a failed look until the next that succeeds."""

    # -- the port --

    @property
    def invalidations(self) -> Invalidations:
        return self._invalidations

    @property
    def revision(self) -> int:
        return self._revision

    def labels(self, scope: str) -> Sequence[CacheLabel]:
        return self._evidence.labels(scope)

    def pool(self, scope: str) -> Sequence[CacheLabel]:
        return self._evidence.pool(scope)

    # -- reading --

    def start(self) -> None:
        """The first look is made before it returns. Raises UnavailableError: without the rules an answer that may
        no longer be served could be.
        """
        self.refresh_now()
        self._thread = threading.Thread(target=self._run, name="cache-book", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(5)

    def wake(self) -> None:
        """Looks at once, in its own thread: after a new configuration."""
        self._wake.set()

    def refresh_now(self) -> None:
        """Reads what is new before it returns: after a local write. Blocks; raises UnavailableError."""
        use = self._use()
        if not use.any:
            return
        with self._looking:
            try:
                with self._engine.connect() as connection:
                    self._read_rules(connection, use)
                    if use.semantic:
                        self._read_labels(connection)
            except SQLAlchemyError as error:
                self.sql_up = False
                raise unavailable(error) from None
            self.sql_up = True

    def _run(self) -> None:
        while True:
            self._wake.wait(self._every)
            self._wake.clear()
            if self._stopping:
                return
            was_up = self.sql_up
            try:
                self.refresh_now()
            except UnavailableError as error:
                if was_up:
                    log.warning("%s; the rules of the caches known so far stay in force", error)
            except Exception:
                self.sql_up = False
                if was_up:
                    log.exception(
                        "the rules of the caches could not be read; those known so far stay in force"
                    )

    def _read_rules(self, connection: Connection, use: CacheUse) -> None:
        table = cache_invalidations
        keep = max(LEAST_DAYS * DAY, use.longest_ttl + DAY)
        now = self._now()
        since, pairs_since = (
            now - timedelta(seconds=keep),
            now - timedelta(seconds=max(keep, PAIR_DAYS * DAY)),
        )
        if keep > self._reaches:  # answers may now live longer than the rules that were read
            newest = sa.select(sa.func.max(table.c.id).label("id")).where(
                table.c.kind != "pair", table.c.at >= since
            )
            pairs = (
                sa.select(table.c.id)
                .where(table.c.kind == "pair", table.c.at >= pairs_since)
                .order_by(table.c.id.desc())
                .limit(MAX_PAIRS)
            )
            query = sa.select(table).where(
                table.c.id.in_(newest.group_by(table.c.kind, table.c.value)) | table.c.id.in_(pairs)
            )
            last = connection.scalar(sa.select(sa.func.max(table.c.id))) or 0
            rules: dict[tuple[str, str], Invalidation] = {}
        else:
            query = sa.select(table).where(table.c.id > self._newest_rule).order_by(table.c.id)
            last = self._newest_rule
            rules = self._rules
        found = [_rule(row) for row in connection.execute(query)]
        self._reaches = keep
        if not found and rules is self._rules:
            return
        rules = {
            key: rule
            for key, rule in rules.items()
            if rule.at >= (pairs_since if rule.kind == "pair" else since)
        }
        for rule in sorted(found, key=lambda rule: rule.id):
            rules[rule.kind, rule.value] = rule
        known = sorted(rule.id for rule in rules.values() if rule.kind == "pair")[:-MAX_PAIRS]
        if known:
            rules = {key: rule for key, rule in rules.items() if rule.kind != "pair" or rule.id > known[-1]}
        self._rules = rules
        # Rules grow old, generations do not: the newest id counts even where its rule is no longer kept.
        self._newest_rule = max([last, *(rule.id for rule in found)])
        self._invalidations = Invalidations(rules.values(), newest=self._newest_rule)

    def _read_labels(self, connection: Connection) -> None:
        table = cache_labels
        start = first_day(self._now())
        newest = connection.scalar(sa.select(sa.func.max(table.c.id))) or 0
        if newest <= self._newest_label and start == self._from:
            return
        first = first_id(newest)
        query = (
            sa.select(table)
            .where(
                table.c.id > self._newest_label,
                table.c.id >= first,
                table.c.id <= newest,
                table.c.at >= start,
                table.c.source != FEEDBACK,
            )
            .order_by(table.c.id)
        )
        ids, found = [], []
        for row in connection.execute(query):
            ids.append(row.id)
            found.append(_label(row))
        evidence = self._evidence
        if start != self._from or (self._label_ids and self._label_ids[0] < first):
            pairs = zip(self._label_ids, evidence.all(), strict=True)
            kept = [(id, label) for id, label in pairs if id >= first and label.at >= start]
            evidence = Evidence([label for _, label in kept])
            self._label_ids = [id for id, _ in kept]
        if found:
            evidence = evidence.with_more(found)
            self._label_ids += ids
        if found or len(evidence) != len(self._evidence):
            self._revision += 1
        self._evidence, self._newest_label, self._from = evidence, newest, start


def _label(row: Any) -> CacheLabel:
    return CacheLabel(
        request_id=row.request_id,
        scope=intern(row.scope),
        entry=row.entry,
        score=row.score,
        right=row.correct,
        propensity=row.propensity,
        source=intern(row.source),
        at=row.at,
        key_id=intern(row.key_id),
        team=intern(row.team),
        app=None if row.app is None else intern(row.app),
        comment=row.comment,
    )
