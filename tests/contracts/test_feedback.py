"""Feedback: whose it may be, what is kept of it, and what is told where it cannot be kept; over SQL and in memory."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from router.adapters.journal import JournalFile
from router.adapters.memory import ManualClock, MemoryFeedbackStore, MemoryJournal
from router.adapters.sql import labels as labels_module
from router.adapters.sql import schema
from router.adapters.sql.database import open_engine
from router.adapters.sql.labels import SqlFeedback
from router.adapters.sql.ledger import Ledger
from router.adapters.system import RequestIdentifiers, SystemClock
from router.core.errors import InvalidRequest, NotFound, Overloaded, RateLimited
from router.core.types import Caller, OpenRecord, RequestRecord
from router.stages.feedback import BURST, MAX_COMMENT, Feedback, read_score
from tests.contracts.ledger_records import new_id, opened, settled
from tests.values import replace

pytest_plugins = ["tests.contracts.sql_databases"]

MINE, COLLEAGUE, OTHER = Caller("key_1", "search"), Caller("key_2", "search"), Caller("key_3", "sales")


class Rig:
    """A store with what it reads from, filled alike for both kinds."""

    def __init__(self, kind: str, url: str, folder: Path) -> None:
        self.memory = MemoryJournal()
        self.file = JournalFile(folder)
        self.engine = open_engine(url)
        self.sql = SqlFeedback(self.engine, folder, SystemClock())
        self.kind = kind
        self.twin = MemoryFeedbackStore(self.memory, SystemClock())
        self.store = self.twin if kind == "memory" else self.sql

    def book(self, record: RequestRecord) -> str:
        self.memory.settle(record)
        Ledger(self.engine).write([record], fresh=True)
        return record.id

    def open(self, record: OpenRecord) -> str:
        self.memory.open(record)
        self.file.open(record)
        return record.id

    def kept(self) -> list[tuple[str, str, float, str | None]]:
        if self.kind == "memory":
            return [(label.model, label.key_id, label.score, label.comment) for label in self.twin.labels]
        table = schema.labels.c
        query = sa.select(table.model, table.key_id, table.score, table.comment).order_by(
            table.key_id, table.revision
        )
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(query)]  # type: ignore[misc]


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
async def rig(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Rig]:
    monkeypatch.setattr(labels_module, "LOOKS", (0.0, 0.02, 0.02))
    kind: str = request.param
    url = request.getfixturevalue("postgresql_url" if kind == "postgresql" else "sqlite_url")
    rig = Rig(kind, url, tmp_path / "journal")
    yield rig
    rig.sql.close()
    rig.file.close()
    rig.engine.dispose()


async def test_a_score_labels_the_model_that_answered(rig: Rig) -> None:
    request = rig.book(settled(new_id(), propensity=0.25))
    await rig.store.keep(MINE, request, 0.75, "almost")
    assert rig.kept() == [("mini", "key_1", 0.75, "almost")]
    if rig.kind != "memory":
        with rig.engine.connect() as connection:
            row = connection.execute(sa.select(schema.labels)).mappings().one()
        assert (row["request_id"], row["weight"], row["propensity"]) == (request, 1.0, 0.25)
        assert (row["source"], row["team"], row["revision"]) == ("feedback", "search", 0)


async def test_the_same_again_changes_nothing_and_another_score_corrects(rig: Rig) -> None:
    request = rig.book(settled(new_id()))
    for score in (1.0, 1.0, 0.0, 0.0, 1.0):
        await rig.store.keep(MINE, request, score, None)
    await rig.store.keep(COLLEAGUE, request, 0.5, None)
    mine = [kept[2] for kept in rig.kept() if kept[1] == "key_1"]
    assert mine == [1.0, 0.0, 1.0]
    assert [kept[2] for kept in rig.kept() if kept[1] == "key_2"] == [0.5]


async def test_a_cache_hit_labels_the_model_that_made_the_answer(rig: Rig) -> None:
    hit = replace(
        settled(new_id(), cache="exact", cache_entry="earlier", served_model="frontier"), attempts=()
    )
    await rig.store.keep(MINE, rig.book(hit), 0.0, None)
    assert rig.kept() == [("frontier", "key_1", 0.0, None)]


async def test_another_teams_request_and_an_unknown_one_are_told_alike(rig: Rig) -> None:
    theirs = rig.book(settled(new_id()))
    in_flight = rig.open(opened(RequestIdentifiers().request_id()))
    said = []
    for request in (
        theirs,
        in_flight,
        new_id(),
        RequestIdentifiers().request_id(),
        "no id at all",
        "x\0y",
        "\ud800",
    ):
        with pytest.raises(NotFound) as raised:
            await rig.store.keep(OTHER, request, 1.0, None)
        said.append((raised.value.status, raised.value.message, raised.value.param))
    assert len(set(said)) == 1
    assert rig.kept() == []


async def test_a_request_on_its_way_to_the_ledger_is_asked_for_again(rig: Rig) -> None:
    for request_id in (RequestIdentifiers().request_id(), new_id()):
        with pytest.raises(Overloaded) as raised:
            await rig.store.keep(MINE, rig.open(opened(request_id)), 1.0, None)
        assert raised.value.retry_after == 1


async def test_a_request_nobody_answered_cannot_be_scored(rig: Rig) -> None:
    request = rig.book(settled(new_id(), served_model=None, status="failed"))
    with pytest.raises(InvalidRequest, match="No model answered"):
        await rig.store.keep(MINE, request, 1.0, None)


async def test_a_request_that_arrives_while_we_look_is_found(rig: Rig) -> None:
    if rig.kind == "memory":
        pytest.skip("the twin knows no delay")
    record = settled(RequestIdentifiers().request_id())

    async def later() -> None:
        await asyncio.sleep(0.01)
        await asyncio.to_thread(rig.book, record)

    await asyncio.gather(rig.store.keep(MINE, record.id, 1.0, "odd \0 \ud800 text"), later())
    [(_, _, score, comment)] = rig.kept()
    assert (score, comment) == (1.0, "odd \ufffd ? text")


async def test_two_corrections_at_once_are_both_kept(rig: Rig) -> None:
    request = rig.book(settled(new_id()))
    await asyncio.gather(*(rig.store.keep(MINE, request, score / 10, None) for score in range(8)))
    assert sorted(kept[2] for kept in rig.kept()) == [score / 10 for score in range(8)]


async def test_without_a_database_it_is_asked_for_again(tmp_path: Path) -> None:
    engine = open_engine("postgresql://farthing:hunter2@127.0.0.1:1/ledger")
    store = SqlFeedback(engine, tmp_path, SystemClock())
    with pytest.raises(Overloaded) as raised:
        await store.keep(MINE, new_id(), 1.0, None)
    assert raised.value.retry_after == 1
    assert "hunter2" not in raised.value.message
    store.close()
    engine.dispose()


# ---- what may be sent ----

GOOD = {"request_id": "0199aa11-2233-7456-89ab-cdef01234567", "score": 1}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"score": 1.0001}, "score"),
        ({"score": -0.1}, "score"),
        ({"score": True}, "score"),
        ({"score": "1"}, "score"),
        ({"score": None}, "score"),
        ({"score": 10**400}, "score"),
        ({"request_id": 7}, "request_id"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": "x" * 65}, "request_id"),
        ({"comment": ["good"]}, "comment"),
        ({"comment": "x" * (MAX_COMMENT + 1)}, "comment"),
        ({"rating": 5}, "rating"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read_score(json.dumps({**GOOD, **changes}).encode())
    assert (raised.value.status, raised.value.param) == (400, field)
    assert field in raised.value.message


@pytest.mark.parametrize("field", ["request_id", "score"])
def test_what_is_missing_is_named(field: str) -> None:
    body = {name: value for name, value in GOOD.items() if name != field}
    with pytest.raises(InvalidRequest) as raised:
        read_score(json.dumps(body).encode())
    assert raised.value.param == field


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"score": NaN}', b'{"score": 1, "score": 0}', b"\xff"])
def test_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read_score(body)


@given(st.floats(0, 1), st.none() | st.text(max_size=MAX_COMMENT))
def test_every_good_score_is_taken_as_it_is(value: float, comment: str | None) -> None:
    score = read_score(json.dumps({**GOOD, "score": value, "comment": comment}).encode())
    assert (score.score, score.comment) == (value, comment or None)


async def test_a_key_that_floods_is_slowed_and_others_are_not() -> None:
    clock, journal = ManualClock(), MemoryJournal()
    feedback = Feedback(MemoryFeedbackStore(journal, clock), clock)
    journal.settle(settled(str(GOOD["request_id"])))
    body = json.dumps(GOOD).encode()
    for _ in range(int(BURST)):
        await feedback.give(MINE, body)
    with pytest.raises(RateLimited) as raised:
        await feedback.give(MINE, body)
    assert raised.value.retry_after == 1
    await feedback.give(COLLEAGUE, body)
    clock.advance(1)
    await feedback.give(MINE, body)


def test_the_time_of_an_id_is_read_from_it(tmp_path: Path) -> None:
    store = SqlFeedback(open_engine("sqlite:////nowhere/x.db"), tmp_path, SystemClock())
    assert store._may_be_on_its_way(RequestIdentifiers().request_id())
    assert not store._may_be_on_its_way(str(uuid.uuid4()))
    old = (int((time.time() - 3600) * 1000) << 80) | (7 << 76) | (2 << 62)
    assert not store._may_be_on_its_way(str(uuid.UUID(int=old)))
    store.close()
