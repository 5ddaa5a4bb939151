"""The book of the caches over SQLite, PostgreSQL and in memory: rules, labels, their order, and SQL being away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from router.adapters.memory_cache_book import MemoryCacheBook
from router.adapters.sql import cache_book as module
from router.adapters.sql import schema
from router.adapters.sql.cache_book import Evidence, SqlCacheBook, first_day, first_id, invalidate, list_rules
from router.adapters.sql.database import open_engine, writing
from router.adapters.sql.ledger import Ledger, cache_label_row
from router.adapters.sql.rules import quarantine
from router.adapters.sql.verify import verify
from router.core.cached import CacheBook, CacheLabel, Invalidation, InvalidationKind, Origin
from router.core.errors import ConfigurationError, UnavailableError
from router.core.policy import CacheUse
from router.core.types import RequestRecord
from tests.contracts.ledger_records import OPENED, cache_labelled, candidate, hit, new_id, settled
from tests.values import replace

pytest_plugins = ["tests.contracts.sql_databases"]

ALL = CacheUse(exact=True, semantic=True)


def label(scope: str = "s", right: bool = True, **changes: Any) -> CacheLabel:
    made = CacheLabel(
        request_id=new_id(),
        scope=scope,
        entry="e",
        score=0.9,
        right=right,
        propensity=0.5,
        source="agreement",
        at=OPENED,
        key_id="key_1",
        team="search",
        app="faq-bot",
    )
    return replace(made, **changes)


class Rig:
    """A book with what writes into it, the same for each kind."""

    def __init__(self, kind: str, engine: Engine | None) -> None:
        self.kind, self.engine, self.now = kind, engine, OPENED
        self.use = ALL
        self.twin = MemoryCacheBook()
        self.sql = self.another() if engine is not None else None
        self.book: CacheBook = self.twin if self.sql is None else self.sql

    def another(self, **options: Any) -> SqlCacheBook:
        assert self.engine is not None
        return SqlCacheBook(self.engine, use=lambda: self.use, now=lambda: self.now, **options)

    def invalidate(self, kind: InvalidationKind, value: str = "", *, at: datetime = OPENED) -> Invalidation:
        if self.engine is None:
            return self.twin.invalidate(kind, value, at)
        rule = invalidate(self.engine, kind, value, at=at, by="cli")
        self.look()
        return rule

    def label(self, *labels: CacheLabel) -> None:
        """On the record of a request that found out."""
        if self.engine is None:
            self.twin.book(*labels)
            return
        Ledger(self.engine).write([replace(settled(new_id()), cache_labels=labels)], fresh=True)
        self.look()

    def look(self) -> None:
        if self.sql is not None:
            self.sql.refresh_now()


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    kind: str = request.param
    if kind == "memory":
        yield Rig(kind, None)
        return
    engine = open_engine(request.getfixturevalue(f"{kind}_url"))
    yield Rig(kind, engine)
    engine.dispose()


ANSWER = Origin(
    entry="e1", generation=0, team="search", app="faq-bot", model="mini", tags=("data=pii",), scope="abc"
)


@pytest.mark.parametrize(
    ("kind", "value", "other"),
    [
        ("all", "", None),
        ("team", "search", replace(ANSWER, team="ads")),
        ("app", "search/faq-bot", replace(ANSWER, app=None)),
        ("app", "search/faq-bot", replace(ANSWER, team="ads")),
        ("model", "mini", replace(ANSWER, model="frontier")),
        ("tag", "data=pii", replace(ANSWER, tags=("data=public",))),
        ("scope", "abc", replace(ANSWER, scope="")),
        ("entry", "e1", replace(ANSWER, entry="e2")),
    ],
)
def test_a_rule_names_what_was_admitted_before_it(
    rig: Rig, kind: InvalidationKind, value: str, other: Origin | None
) -> None:
    book = rig.book
    assert not book.invalidations.stale(ANSWER)
    rule = rig.invalidate(kind, value)
    assert book.invalidations.generation == rule.id == 1
    assert book.invalidations.stale(ANSWER)
    assert other is None or not book.invalidations.stale(other)
    later = replace(ANSWER, generation=rule.id)
    assert book.invalidations.stale(later) == (kind == "entry")  # an entry named stays out
    assert rig.invalidate(kind, value).id == 2
    assert book.invalidations.stale(later)


def test_labels_come_in_the_order_they_were_booked_and_once(rig: Rig) -> None:
    mine = [label("a", right=bool(at % 3)) for at in range(4)]
    before = rig.book.revision
    rig.label(mine[0], label("b"), mine[1])
    assert rig.book.revision > before
    rig.label(mine[2], label("c"), mine[3])
    rig.label(*mine)  # again, as another record may say
    seen = rig.book.revision
    rig.look()
    assert rig.book.revision == seen
    assert list(rig.book.labels("a")) == mine
    assert list(rig.book.labels("none")) == []


def test_the_pool_is_what_others_knew_before_the_scope_began(rig: Rig) -> None:
    first, second, third = label("a"), label("b", right=False), label("c")
    rig.label(first, second)
    assert list(rig.book.pool("c")) == [first, second]
    rig.label(third, label("a"))
    assert list(rig.book.pool("c")) == [first, second]
    assert list(rig.book.pool("a")) == []
    assert len(rig.book.pool("new")) == 4


def test_feedback_is_no_evidence(rig: Rig) -> None:
    rig.label(label("a", right=False, source="feedback"), label("a"))
    assert [found.right for found in rig.book.labels("a")] == [True]
    assert [found.source for found in rig.book.pool("z")] == ["agreement"]


# ---- SQL alone ----


def test_a_record_that_is_replayed_writes_nothing_twice(engine: Engine, tmp_path: Path) -> None:
    hit = replace(settled(new_id()), attempts=())
    found = candidate(served=True, would_serve=True, saved=1_234, reasons=("numbers differ",))
    record = replace(settled(new_id()), candidate=replace(found, served=False), cache_labels=(label("a"),))
    ledger = Ledger(engine)
    assert ledger.write([record], fresh=True) == 1
    assert ledger.write([record], fresh=False) == 0
    assert hit.candidate is None
    with engine.connect() as connection:
        [row] = connection.execute(sa.select(schema.cache_candidates)).mappings()
        [said] = connection.execute(sa.select(schema.cache_labels)).mappings()
    assert (row["request_id"], row["saved"], row["reasons"]) == (record.id, 1_234, '["numbers differ"]')
    assert (row["served"], row["would_serve"], row["mode"]) == (False, True, found.mode)
    assert (said["scope"], said["correct"], said["propensity"], said["revision"]) == ("a", True, 0.5, 0)
    assert verify(engine, tmp_path).differences == []


def test_a_record_that_is_refused_leaves_no_part_of_itself(engine: Engine) -> None:
    first = replace(settled(new_id()), candidate=candidate(), cache_labels=(label("a"),))
    ledger = Ledger(engine)
    ledger.write([first], fresh=True)
    with pytest.raises(sa.exc.IntegrityError):
        ledger.write([replace(settled(new_id()), cache_labels=(label("b"),)), first], fresh=True)
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(schema.cache_labels)) == 1


def test_what_was_served_and_found_wrong_is_quarantined_with_its_label(engine: Engine) -> None:
    ledger = Ledger(engine)
    served, kept_back = (
        hit("semantic", entry="e1"),
        replace(settled(new_id()), candidate=candidate(entry="e2")),
    )
    ledger.write([served, kept_back], fresh=True)

    def found(request: RequestRecord, *, right: bool, entry: str) -> RequestRecord:
        said = cache_labelled(request, right=right, entry=entry, source="judge")
        return replace(settled(new_id(), endpoint="learn.judge"), cache_labels=(said,))

    ledger.write(
        [found(served, right=True, entry="e1"), found(kept_back, right=False, entry="e2")], fresh=True
    )
    assert list_rules(engine) == []
    again = hit("semantic", entry="e3")
    assert again.candidate is not None
    again = replace(again, candidate=replace(again.candidate, pair="p3"))
    again = replace(again, cache_labels=(cache_labelled(again, right=False),))
    wrong = found(served, right=False, entry="e1")
    wrong = replace(wrong, cache_labels=(replace(wrong.cache_labels[0], source="agreement"),))
    ledger.write([wrong, again], fresh=True)
    ledger.write([wrong, again], fresh=False)
    assert [(rule.rule.kind, rule.rule.value, rule.by) for rule in list_rules(engine)] == [
        ("pair", "p3", "check"),
        ("entry", "e3", "check"),
        ("entry", "e1", "check"),
    ]


def test_rules_of_many_at_once_get_ids_in_the_order_of_commits(engine: Engine) -> None:
    books: list[list[int]] = []
    stop = threading.Event()

    def write() -> None:
        for _ in range(5):
            invalidate(engine, "all", "", at=OPENED, by="cli")

    def read() -> None:
        seen: list[int] = []
        last = False
        while not last:
            last = stop.is_set()
            with engine.connect() as connection:
                seen += connection.scalars(
                    sa.select(schema.cache_invalidations.c.id)
                    .where(schema.cache_invalidations.c.id > (seen[-1] if seen else 0))
                    .order_by(schema.cache_invalidations.c.id)
                )
            time.sleep(0.002)
        books.append(seen)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write) for _ in range(3)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert books == [list(range(1, 16))]


def test_labels_of_many_writers_are_all_read(engine: Engine) -> None:
    rig = Rig("sql", engine)
    assert rig.sql is not None
    made = [[label(f"scope-{at}") for _ in range(10)] for at in range(3)]

    def write(labels: list[CacheLabel]) -> None:
        ledger = Ledger(engine)
        for one in labels:
            ledger.write([replace(settled(new_id()), cache_labels=(one, label("noise")))], fresh=True)

    writers = [threading.Thread(target=write, args=(labels,)) for labels in made]
    for thread in writers:
        thread.start()
    while any(thread.is_alive() for thread in writers):
        rig.sql.refresh_now()
    rig.sql.refresh_now()
    for at, labels in enumerate(made):
        assert list(rig.sql.labels(f"scope-{at}")) == labels


def test_a_rule_outlives_every_answer_it_names_and_no_longer(engine: Engine) -> None:
    rig = Rig("sql", engine)
    assert rig.sql is not None
    rig.invalidate("team", "search")
    rig.now = OPENED + timedelta(days=7)
    rig.invalidate("model", "mini", at=rig.now)
    assert rig.sql.invalidations.stale(ANSWER)
    only_team = replace(ANSWER, model="frontier")
    rig.now = OPENED + timedelta(days=9)
    rig.invalidate("scope", "zzz", at=rig.now)
    fresh = rig.another()
    fresh.refresh_now()
    for book in (rig.sql, fresh):
        assert not book.invalidations.stale(only_team)
        assert book.invalidations.stale(ANSWER)
        assert book.invalidations.generation == 3
    rig.use = replace(ALL, longest_ttl=30 * 86_400.0)
    rig.sql.refresh_now()
    assert rig.sql.invalidations.stale(only_team)
    rig.use, rig.now = ALL, OPENED + timedelta(days=400)
    aged = rig.another()
    aged.refresh_now()
    assert (aged.invalidations.stale(ANSWER), aged.invalidations.generation) == (False, 3)


def test_pairs_of_prompts_stay_for_a_year_and_the_newest_are_kept(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PAIRS", 3)
    rig = Rig("sql", engine)
    assert rig.sql is not None

    def pairs() -> list[str]:
        assert rig.sql is not None
        rig.sql.refresh_now()
        fresh = rig.another()
        fresh.refresh_now()
        assert fresh.invalidations.pairs == rig.sql.invalidations.pairs
        return sorted(rig.sql.invalidations.pairs)

    def wrong(entry: str, pair: str) -> None:
        with writing(engine) as connection:
            quarantine(connection, entry, pair, at=rig.now, by="key_1", reason="wrong")

    wrong("e1", "p1")
    assert pairs() == ["p1"]
    rig.now = OPENED + timedelta(days=300)
    wrong("e2", "p2")
    assert pairs() == ["p1", "p2"]
    assert not rig.sql.invalidations.stale(replace(ANSWER, entry="e1")), "the entry is long gone"
    wrong("e3", "p3")
    wrong("e4", "p4")
    assert pairs() == ["p2", "p3", "p4"]
    rig.now = OPENED + timedelta(days=700)
    wrong("e5", "p5")
    assert pairs() == ["p5"]


def test_old_labels_go_by_the_month_and_by_number(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig("sql", engine)
    assert rig.sql is not None
    assert first_day(OPENED).isoformat() == "2026-08-01T00:00:00+00:00"
    rig.label(
        label("a", at=OPENED - timedelta(days=120)), label("a", at=OPENED - timedelta(days=80)), label("b")
    )
    assert len(rig.sql.labels("a")) == 1
    revision = rig.sql.revision
    rig.now = OPENED + timedelta(days=40)
    rig.look()
    assert (len(rig.sql.labels("a")), rig.sql.revision > revision) == (0, True)
    monkeypatch.setattr(module, "MAX_LABELS", 10)
    monkeypatch.setattr(module, "_LABEL_STEP", 2)
    for _ in range(4):
        rig.label(*(label("c", at=rig.now) for _ in range(5)))
    fresh = rig.another()
    fresh.refresh_now()
    assert 8 <= len(fresh.labels("c")) <= 10
    assert list(rig.sql.labels("c")) == list(fresh.labels("c"))


def test_a_reader_keeps_what_it_took() -> None:
    first, second, third = label("a"), label("b"), label("a")
    before = Evidence([first])
    after = before.with_more([second, third])
    assert (list(before.all()), list(before.pool("c")), list(before.labels("b"))) == ([first], [first], [])
    assert list(after.all()) == [first, second, third]
    assert (list(after.labels("a")), list(after.pool("b"))) == ([first, third], [first])


def test_the_window_moves_in_steps() -> None:
    assert [first_id(newest) for newest in (0, 49_999, 50_000, 50_001, 60_000, 60_001)] == [
        1,
        1,
        1,
        10_001,
        10_001,
        20_001,
    ]


def test_nothing_is_asked_where_no_policy_uses_a_cache(engine: Engine) -> None:
    asked: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *a: asked.append(a[2]))
    rig = Rig("sql", engine)
    assert rig.sql is not None
    rig.use = CacheUse(exact=False, semantic=False)
    rig.look()
    assert asked == []
    rig.use = CacheUse(exact=True, semantic=False)
    rig.look()
    assert asked
    assert not any("cache_labels" in statement for statement in asked)


def until(held: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not held():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_running_book_takes_up_what_others_write(engine: Engine) -> None:
    rig = Rig("sql", engine)
    invalidate(engine, "model", "mini", at=OPENED, by="admin")
    book = rig.another(every=0.02)
    book.start()
    try:
        assert book.invalidations.stale(ANSWER)
        invalidate(engine, "team", "ads", at=OPENED, by="cli")
        until(lambda: book.invalidations.generation == 2)
        Ledger(engine).write([replace(settled(new_id()), cache_labels=(label("a"),))], fresh=True)
        until(lambda: len(book.labels("a")) == 1)
    finally:
        book.stop()


def test_what_was_read_stays_while_sql_is_away(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig("sql", engine)
    invalidate(engine, "model", "mini", at=OPENED, by="admin")
    book = rig.another(every=0.02)
    book.start()
    try:
        away = "ALTER TABLE {} RENAME TO {}"
        with writing(engine) as connection:
            connection.exec_driver_sql(away.format("cache_invalidations", "gone"))
        until(lambda: not book.sql_up)
        time.sleep(0.1)
        assert book.invalidations.stale(ANSWER)
        assert caplog.text.count("stay in force") == 1
        with writing(engine) as connection:
            connection.exec_driver_sql(away.format("gone", "cache_invalidations"))
        until(lambda: book.sql_up)
    finally:
        book.stop()


def test_without_a_database_it_does_not_start() -> None:
    engine = open_engine("postgresql://farthing:hunter2@127.0.0.1:1/ledger")
    book = SqlCacheBook(engine, use=lambda: ALL)
    with pytest.raises(UnavailableError) as raised:
        book.start()
    assert "hunter2" not in str(raised.value)
    with pytest.raises(UnavailableError):
        invalidate(engine, "all", "", at=OPENED, by="cli")
    engine.dispose()


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("all", "x"),
        ("team", ""),
        ("team", "a" * 201),
        ("app", "search"),
        ("app", "/faq"),
        ("tag", "pii"),
        ("tag", "=pii"),
        ("entry", "a\nb"),
        ("colour", "red"),
    ],
)
def test_a_wrong_rule_is_refused_with_its_field(engine: Engine, kind: Any, value: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^(kind|value): "):
        invalidate(engine, kind, value, at=OPENED, by="cli")
    assert list_rules(engine) == []


def test_who_made_a_rule_and_why_is_kept(engine: Engine) -> None:
    invalidate(engine, "team", "search", at=OPENED, by="admin", reason="new\nprices")
    invalidate(engine, "entry", "e1", at=OPENED, by="key_1")
    newest, first = list_rules(engine)
    assert (first.rule, first.by, first.reason) == (
        Invalidation(1, "team", "search", OPENED),
        "admin",
        "new prices",
    )
    assert newest.by == "key_1"
    assert list_rules(engine, without_entries=True) == [first]
    with pytest.raises(ConfigurationError, match="reason: "):
        invalidate(engine, "all", "", at=OPENED, by="cli", reason="x" * 501)


def test_a_label_row_has_the_columns_of_its_table() -> None:
    row = dict(zip(schema.cache_labels.c.keys()[1:], cache_label_row(label("a"), OPENED, 3), strict=True))
    assert (row["scope"], row["correct"], row["revision"]) == ("a", True, 3)
