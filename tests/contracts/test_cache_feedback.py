"""Feedback on answers out of the caches: whose it may be, what it books, and that a wrong answer stays out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from router.adapters.journal import JournalFile
from router.adapters.memory import ManualClock
from router.adapters.sql import labels as labels_module
from router.adapters.sql import schema
from router.adapters.sql.cache_book import SqlCacheBook, invalidate, list_rules
from router.adapters.sql.database import open_engine
from router.adapters.sql.labels import SqlFeedback
from router.adapters.sql.ledger import Ledger
from router.adapters.sql.verify import verify
from router.adapters.system import RequestIdentifiers, SystemClock
from router.core.cached import JudgedHit, Origin
from router.core.errors import InvalidRequest, NotFound, Overloaded, RateLimited
from router.core.policy import CacheUse
from router.core.types import Caller, RequestRecord
from router.stages.feedback import BURST, MAX_COMMENT, CacheFeedback, read_verdict
from tests.contracts.ledger_records import OPENED, candidate, hit, new_id, opened, settled
from tests.values import replace

pytest_plugins = ["tests.contracts.sql_databases"]

MINE, COLLEAGUE, OTHER = (
    Caller("key_1", "search", "faq-bot"),
    Caller("key_2", "search"),
    Caller("key_3", "sales"),
)


class Rig:
    def __init__(self, url: str, folder: Path) -> None:
        self.folder = folder
        self.file = JournalFile(folder)
        self.engine = open_engine(url)
        self.store = SqlFeedback(self.engine, folder, SystemClock())
        self.book = SqlCacheBook(self.engine, use=lambda: CacheUse(semantic=True))

    def booked(self, record: RequestRecord) -> str:
        Ledger(self.engine).write([record], fresh=True)
        return record.id

    def labels(self) -> list[Any]:
        query = sa.select(schema.cache_labels).order_by(schema.cache_labels.c.id)
        with self.engine.connect() as connection:
            return list(connection.execute(query).mappings())


@pytest.fixture
async def rig(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr(labels_module, "LOOKS", (0.0, 0.02, 0.02))
    rig = Rig(database_url, tmp_path / "journal")
    yield rig
    rig.store.close()
    rig.file.close()
    rig.engine.dispose()


async def test_a_wrong_answer_is_named_by_a_rule_and_labelled(rig: Rig) -> None:
    request = rig.booked(hit("semantic", entry="entry-1"))
    assert await rig.store.judge(MINE, request, False, "wrong city") == JudgedHit("entry-1", quarantined=True)
    [label] = rig.labels()
    assert (label["request_id"], label["entry"], label["scope"]) == (request, "entry-1", "scope-1")
    assert (label["correct"], label["score"], label["source"]) == (False, 0.9, "feedback")
    assert (label["key_id"], label["team"], label["app"], label["comment"]) == (
        "key_1",
        "search",
        "faq-bot",
        "wrong city",
    )
    [rule] = list_rules(rig.engine)
    assert (rule.rule.kind, rule.rule.value, rule.by) == ("entry", "entry-1", "key_1")
    assert request in (rule.reason or "")
    rig.book.refresh_now()
    assert rig.book.invalidations.stale(Origin("entry-1", 99, "search", None, "mini"))
    assert list(rig.book.labels("scope-1")) == []  # hearsay is no evidence of the bound
    assert verify(rig.engine, rig.folder).differences == []


async def test_the_pair_of_prompts_is_named_beside_the_entry_and_once(rig: Rig) -> None:
    for entry in ("entry-1", "entry-2"):
        wrong = hit("semantic", entry=entry)
        assert wrong.candidate is not None
        request = rig.booked(replace(wrong, candidate=replace(wrong.candidate, pair="p1")))
        for _ in range(2):
            await rig.store.judge(MINE, request, False, None)
    named = [(rule.rule.kind, rule.rule.value) for rule in list_rules(rig.engine)]
    assert named == [("entry", "entry-2"), ("pair", "p1"), ("entry", "entry-1")]
    assert list_rules(rig.engine, without_entries=True) == []
    rig.book.refresh_now()
    assert rig.book.invalidations.pairs == {"p1"}


async def test_an_exact_hit_has_no_scope_and_is_quarantined_alike(rig: Rig) -> None:
    request = rig.booked(hit("exact", entry="entry-1"))
    assert await rig.store.judge(MINE, request, False, None) == JudgedHit("entry-1", quarantined=True)
    [label] = rig.labels()
    assert (label["scope"], label["score"]) == ("", 1.0)


async def test_the_same_again_changes_nothing_and_right_does_not_bring_it_back(rig: Rig) -> None:
    request = rig.booked(hit("semantic", entry="entry-1"))
    assert not (await rig.store.judge(MINE, request, True, None)).quarantined
    for _ in range(3):
        assert (await rig.store.judge(MINE, request, False, None)).quarantined
    assert (await rig.store.judge(COLLEAGUE, request, False, None)).quarantined
    assert (await rig.store.judge(MINE, request, True, None)).quarantined
    assert [(label["key_id"], label["correct"], label["revision"]) for label in rig.labels()] == [
        ("key_1", True, 0),
        ("key_1", False, 1),
        ("key_2", False, 0),
        ("key_1", True, 2),
    ]
    assert len(list_rules(rig.engine)) == 1


async def test_an_answer_of_a_model_is_not_judged_here(rig: Rig) -> None:
    request = rig.booked(replace(settled(new_id()), candidate=candidate()))
    with pytest.raises(InvalidRequest, match="no cache") as raised:
        await rig.store.judge(MINE, request, False, None)
    assert (raised.value.status, raised.value.param) == (400, "request_id")
    assert rig.labels() == []
    assert list_rules(rig.engine) == []


async def test_another_teams_hit_and_an_unknown_one_are_told_alike(rig: Rig) -> None:
    theirs = rig.booked(hit("semantic", entry="entry-1"))
    open_one = RequestIdentifiers().request_id()
    rig.file.open(opened(open_one))
    said = []
    for request in (theirs, open_one, new_id(), "no id at all", "x\0y", "\ud800"):
        with pytest.raises(NotFound) as raised:
            await rig.store.judge(OTHER, request, False, None)
        said.append((raised.value.status, raised.value.message, raised.value.param))
    with pytest.raises(NotFound) as raised:
        await rig.store.keep(OTHER, theirs, 1.0, None)
    said.append((raised.value.status, raised.value.message, raised.value.param))
    assert len(set(said)) == 1
    with pytest.raises(Overloaded):
        await rig.store.judge(MINE, open_one, False, None)
    assert list_rules(rig.engine) == []


async def test_many_verdicts_at_once_are_all_kept(rig: Rig) -> None:
    request = rig.booked(hit("semantic", entry="entry-1"))
    callers = [Caller(f"key_{at}", "search") for at in range(6)]
    comment = "odd \0 \ud800 text"
    judged = await asyncio.gather(*(rig.store.judge(one, request, False, comment) for one in callers))
    assert all(found.quarantined for found in judged)
    assert sorted(label["key_id"] for label in rig.labels()) == [caller.key_id for caller in callers]
    assert {label["comment"] for label in rig.labels()} == {"odd \ufffd ? text"}
    assert len(list_rules(rig.engine)) == 1
    invalidate(rig.engine, "all", "", at=OPENED, by="cli")
    assert [rule.rule.id for rule in list_rules(rig.engine)] == [2, 1]


async def test_without_a_database_it_is_asked_for_again(tmp_path: Path) -> None:
    engine = open_engine("postgresql://farthing:hunter2@127.0.0.1:1/ledger")
    store = SqlFeedback(engine, tmp_path, SystemClock())
    with pytest.raises(Overloaded) as raised:
        await store.judge(MINE, new_id(), False, None)
    assert (raised.value.status, raised.value.retry_after) == (503, 1)
    assert "hunter2" not in raised.value.message
    store.close()
    engine.dispose()


# ---- the stage ----

GOOD = {"request_id": "0199aa11-2233-7456-89ab-cdef01234567", "correct": False}


class Verdicts:
    def __init__(self) -> None:
        self.kept: list[tuple[str, str, bool, str | None]] = []
        self.quarantined: list[str] = []

    async def judge(self, caller: Caller, request_id: str, correct: bool, comment: str | None) -> JudgedHit:
        self.kept.append((caller.key_id, request_id, correct, comment))
        return JudgedHit("entry-1", quarantined=True)

    async def quarantine(self, entry: str) -> None:
        self.quarantined.append(entry)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"correct": 0}, "correct"),
        ({"correct": "false"}, "correct"),
        ({"correct": None}, "correct"),
        ({"request_id": 7}, "request_id"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "x" * 65}, "request_id"),
        ({"comment": ["bad"]}, "comment"),
        ({"comment": "x" * (MAX_COMMENT + 1)}, "comment"),
        ({"score": 1}, "score"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read_verdict(json.dumps({**GOOD, **changes}).encode())
    assert (raised.value.status, raised.value.param) == (400, field)
    assert field in raised.value.message


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"correct": true, "correct": false}', b"\xff"])
def test_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read_verdict(body)


async def test_only_a_wrong_answer_is_taken_out() -> None:
    verdicts = Verdicts()
    feedback = CacheFeedback(verdicts, verdicts.quarantine, ManualClock())
    verdict, judged = await feedback.give(MINE, json.dumps({**GOOD, "correct": True}).encode())
    assert (verdict.correct, judged.quarantined, verdicts.quarantined) == (True, True, [])
    await feedback.give(MINE, json.dumps({**GOOD, "comment": "no"}).encode())
    assert verdicts.kept[-1] == ("key_1", GOOD["request_id"], False, "no")
    assert verdicts.quarantined == ["entry-1"]


async def test_a_key_that_floods_is_slowed_and_others_are_not() -> None:
    clock, verdicts = ManualClock(), Verdicts()
    feedback = CacheFeedback(verdicts, verdicts.quarantine, clock)
    body = json.dumps(GOOD).encode()
    for _ in range(int(BURST)):
        await feedback.give(MINE, body)
    with pytest.raises(RateLimited) as raised:
        await feedback.give(MINE, body)
    assert raised.value.retry_after == 1
    await feedback.give(COLLEAGUE, body)
    clock.advance(1)
    await feedback.give(MINE, body)
