"""The way from the journal to SQL, over SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from router.adapters.journal import SETTLE, JournalFile, journal_folders, segment_numbers, segment_path
from router.adapters.sql import schema
from router.adapters.sql.database import open_engine
from router.adapters.sql.verify import verify
from router.adapters.sql.writer import LedgerWriter
from router.core.errors import UnavailableError
from router.core.types import NanoUSD, Usage
from tests.contracts.ledger_records import (
    OPENED,
    FixedClock,
    attempted,
    labelled,
    new_id,
    opened,
    price,
    settled,
)
from tests.values import replace

pytest_plugins = ["tests.contracts.sql_databases"]


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_engine(database_url)
    yield engine
    engine.dispose()


@contextmanager
def worker(engine: Engine, folder: Path, **options: Any) -> Iterator[tuple[JournalFile, LedgerWriter]]:
    journal = JournalFile(folder, segment_bytes=options.pop("segment_bytes", 8 * 1024 * 1024))
    writer = LedgerWriter(engine, journal, folder, FixedClock(), poll=0.01, **options)
    writer.start()
    yield journal, writer
    writer.stop()


def kill(journal: JournalFile) -> None:
    """What kill -9 does to a journal: its files are closed, nothing else happens."""
    os.close(journal._file)
    os.close(journal._lock)


def rows(engine: Engine, table: sa.Table) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(sa.select(table)).mappings()]


async def test_a_settled_request_is_in_sql_with_all_it_carries(engine: Engine, tmp_path: Path) -> None:
    request = settled(new_id(), failed_first=True)
    with worker(engine, tmp_path) as (journal, writer):
        journal.open(opened(request.id))
        journal.attempt(attempted(request.id))
        journal.attempt(attempted(request.id, 1))
        assert writer.unsettled == 1
        journal.settle(request)
        await writer.flush()
        assert (writer.unsettled, writer.backlog, writer.sql_up) == (0, 0, True)
    [row] = rows(engine, schema.requests)
    assert (row["id"], row["opened_at"], row["cost"]) == (request.id, request.opened_at, request.cost)
    assert (row["tokens_input"], row["tokens_output"], row["streamed"]) == (100, 50, False)
    assert row["tags"] == '{"data":["pii"]}'
    assert row["budgets"].startswith('[["organisation","2026-11"]')
    booked = rows(engine, schema.attempts)
    assert [(item["attempt"], item["outcome"]) for item in booked] == [(0, "cut"), (1, "complete")]
    assert sum(line["amount"] for line in rows(engine, schema.cost_lines)) == request.cost == 39_250
    [priced] = rows(engine, schema.price_records)
    assert priced["id"] == price().id
    [rollup] = rows(engine, schema.spend_rollup)
    assert (rollup["day"], rollup["requests"], rollup["cost"]) == ("2026-11-24", 1, 39_250)
    spent = {(item["key"], item["period"]): item["spent"] for item in rows(engine, schema.budget_spend)}
    assert spent == {
        ("organisation", "2026-11"): 39_250,
        ("team:search", "2026-11"): 39_250,
        ("app:search/faq-bot", "2026-11"): 39_250,
    }


async def test_visible_within_half_a_second_without_being_asked(engine: Engine, tmp_path: Path) -> None:
    with worker(engine, tmp_path) as (journal, _):
        journal.settle(settled(new_id()))
        loop = asyncio.get_running_loop()
        began = loop.time()
        while not rows(engine, schema.requests):
            assert loop.time() - began < 0.5
            await asyncio.sleep(0.01)


async def test_a_request_settled_twice_counts_once(engine: Engine, tmp_path: Path) -> None:
    request = settled(new_id())
    with worker(engine, tmp_path) as (journal, writer):
        journal.settle(request)
        await writer.flush()
        journal.settle(request)
        journal.settle(settled(new_id()))
        await writer.flush()
    assert len(rows(engine, schema.requests)) == 2
    assert sum(row["requests"] for row in rows(engine, schema.spend_rollup)) == 2


async def test_a_dead_workers_journal_is_booked_once(engine: Engine, tmp_path: Path) -> None:
    dead = JournalFile(tmp_path)
    done, priced, bare, unpriced = (new_id() for _ in range(4))
    for request_id in (done, priced, bare, unpriced):
        dead.open(opened(request_id))
    dead.attempt(attempted(done))
    dead.attempt(attempted(priced))
    dead.attempt(attempted(priced, 1))
    dead.attempt(replace(attempted(unpriced), price=None))
    dead.settle(settled(done))
    with worker(engine, tmp_path, adopt_every=60) as (_, writer):
        assert await writer.replay() == 0, "its owner lives"
        kill(dead)
        assert await writer.replay() == 4
        assert await writer.replay() == 0
        assert writer.adopted == 4
    found = {row["id"]: row for row in rows(engine, schema.requests)}
    assert found[done]["status"] == "complete"
    for request_id in (priced, bare, unpriced):
        row = found[request_id]
        assert (row["status"], row["error"], row["estimated"]) == ("cancelled", "gateway_restarted", True)
    assert found[priced]["cost"] == (100 + 200) * 250
    assert (found[bare]["cost"], found[bare]["unpriced"]) == (0, False)
    assert (found[unpriced]["cost"], found[unpriced]["unpriced"]) == (None, True)
    outcomes = {(a["request_id"], a["attempt"]): a["outcome"] for a in rows(engine, schema.attempts)}
    assert (outcomes[priced, 0], outcomes[priced, 1]) == ("failed", "cancelled")
    assert journal_folders(tmp_path) == []


async def test_an_orphan_read_again_after_a_lost_commit_counts_once(engine: Engine, tmp_path: Path) -> None:
    request = settled(new_id())
    for _ in range(2):
        dead = JournalFile(tmp_path)
        dead.open(opened(request.id))
        dead.settle(request)
        kill(dead)
        with worker(engine, tmp_path) as (_, writer):
            await writer.replay()
    assert [row["spent"] for row in rows(engine, schema.budget_spend)] == [37_500] * 3


async def test_a_torn_tail_is_passed_over(engine: Engine, tmp_path: Path) -> None:
    dead = JournalFile(tmp_path)
    request_id = new_id()
    dead.open(opened(request_id))
    path = segment_path(dead.folder, segment_numbers(dead.folder)[0])
    whole = path.stat().st_size
    dead.settle(settled(request_id))
    os.truncate(path, whole + 40)
    kill(dead)
    with worker(engine, tmp_path) as (_, writer):
        assert await writer.replay() == 1
        assert writer.skipped == 1
    assert [row["status"] for row in rows(engine, schema.requests)] == ["cancelled"]


async def test_segments_go_only_after_commit(engine: Engine, tmp_path: Path) -> None:
    with worker(engine, tmp_path, segment_bytes=20_000) as (journal, writer):
        long_lived = new_id()
        journal.open(opened(long_lived))
        for _ in range(50):
            request_id = new_id()
            journal.open(opened(request_id))
            journal.settle(settled(request_id))
        await writer.flush()
        assert segment_numbers(journal.folder) == [1, journal.end[0]], "the first holds an unsettled request"
        journal.settle(settled(long_lived))
        await writer.flush()
        assert segment_numbers(journal.folder) == [journal.end[0]]
    assert len(rows(engine, schema.requests)) == 51


async def test_a_clean_stop_leaves_nothing_behind(engine: Engine, tmp_path: Path) -> None:
    journal = JournalFile(tmp_path)
    writer = LedgerWriter(engine, journal, tmp_path, FixedClock(), poll=5.0)
    writer.start()
    await asyncio.sleep(0.05)
    journal.settle(settled(new_id()))
    assert writer.stop() is True
    assert journal_folders(tmp_path) == []
    assert len(rows(engine, schema.requests)) == 1


async def test_text_a_database_refuses_does_not_stop_the_ledger(engine: Engine, tmp_path: Path) -> None:
    with worker(engine, tmp_path) as (journal, writer):
        journal.settle(settled(new_id(), requested_model="nul\0"))
        journal.settle(settled(new_id(), requested_model="half \ud83d"))
        journal.settle(settled(new_id()))
        await writer.flush()
        assert writer.rejected == 0
    assert len(rows(engine, schema.requests)) == 3


async def test_a_record_sql_refuses_is_set_aside_alone(engine: Engine, tmp_path: Path) -> None:
    bad = settled(new_id())
    bad = replace(bad, attempts=(bad.attempts[0], bad.attempts[0]))  # the same key twice
    with worker(engine, tmp_path) as (journal, writer):
        journal.settle(bad)
        journal.settle(settled(new_id()))
        await writer.flush()
        assert writer.rejected == 1
    assert len(rows(engine, schema.requests)) == 1
    assert bad.id in (tmp_path / "rejected.jsonl").read_text()


async def test_money_is_exact_to_the_nano_usd(engine: Engine, tmp_path: Path) -> None:
    usage = Usage(input=1, output=10**12 + 1)
    request = settled(new_id(), usage=usage)
    with worker(engine, tmp_path) as (journal, writer):
        for _ in range(3):
            journal.settle(settled(new_id(), usage=usage))
        await writer.flush()
    [row] = [row for row in rows(engine, schema.budget_spend) if row["key"] == "organisation"]
    assert request.cost == NanoUSD(250_000_000_000_500)
    assert row["spent"] == 3 * 250_000_000_000_500


@contextmanager
def sqlite_away(url: str) -> Iterator[None]:
    database = Path(url.removeprefix("sqlite:///"))
    away = database.with_suffix(".away")
    database.rename(away)
    database.mkdir()  # opening it fails until it is back
    yield
    database.rmdir()
    away.rename(database)


@contextmanager
def postgresql_away(url: str, server: Any) -> Iterator[None]:
    name = sa.make_url(url).database
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name]
        )
        yield
        connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')


async def test_sql_away_and_back(database_url: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    engine = open_engine(database_url)
    journal = JournalFile(tmp_path / "journal", segment_bytes=500_000)
    writer = LedgerWriter(engine, journal, tmp_path / "journal", FixedClock(), poll=0.01)
    writer.start()
    if engine.dialect.name == "sqlite":
        gone = sqlite_away(database_url)
    else:
        journal.settle(settled(new_id()))  # a connection that breaks
        await writer.flush()
        gone = postgresql_away(database_url, request.getfixturevalue("postgresql_server"))
    before = writer.committed
    with gone:
        for _ in range(1200):
            journal.settle(settled(new_id()))
        with pytest.raises(UnavailableError):
            await writer.flush(0.3)
        assert (writer.sql_up, writer.backlog, writer.unsettled) == (False, 1200, 1200)
        assert len(writer._batch) <= 500
        assert segment_numbers(journal.folder)[0] == 1, "nothing goes before COMMIT"
    await writer.flush()
    assert (writer.sql_up, writer.backlog) == (True, 0)
    assert len(rows(engine, schema.requests)) == before + 1200
    assert writer.stop() is True
    engine.dispose()


async def test_replay_without_sql_loses_nothing(tmp_path: Path, sqlite_url: str) -> None:
    dead = JournalFile(tmp_path / "journal")
    dead.settle(settled(new_id()))
    kill(dead)
    engine = open_engine(sqlite_url)
    writer = LedgerWriter(engine, JournalFile(tmp_path / "journal"), tmp_path / "journal", FixedClock())
    with sqlite_away(sqlite_url), pytest.raises(UnavailableError):
        await writer.replay()
    assert await writer.replay() == 1
    assert writer.stop() is True
    engine.dispose()


async def test_what_a_full_disk_refused_goes_to_sql(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = settled(new_id())
    with worker(engine, tmp_path) as (journal, writer):
        journal.open(opened(request.id))
        with monkeypatch.context() as patched:
            patched.setattr(journal, "_append", full)
            journal.settle(request)
            await writer.flush()
        assert [row["id"] for row in rows(engine, schema.requests)] == [request.id]
        assert (writer.unsettled, journal.waiting) == (0, 0)
    [spent] = {row["spent"] for row in rows(engine, schema.budget_spend)}
    assert spent == request.cost


def full(frame: bytes) -> None:
    raise OSError(28, "No space left on device")


async def test_a_record_of_another_version_is_set_aside(engine: Engine, tmp_path: Path) -> None:
    with worker(engine, tmp_path) as (journal, writer):
        body = struct.pack("<BB", SETTLE, 5) + b"other" + msgspec.msgpack.encode({"id": "other"})
        journal._append(struct.pack("<II", len(body), zlib.crc32(body)) + body)
        journal.settled += 1
        journal.settle(settled(new_id()))
        await writer.flush()
        assert (writer.rejected, writer.unsettled) == (1, 0)
    assert len(rows(engine, schema.requests)) == 1
    [line] = (tmp_path / "rejected.jsonl").read_bytes().splitlines()
    assert msgspec.json.decode(line)["record"] == {"id": "other"}


WORKER = """
import itertools, sys, threading
from pathlib import Path
from router.adapters.journal import JournalFile
from router.adapters.sql.database import open_engine
from router.adapters.sql.verify import verify
from router.adapters.sql.writer import LedgerWriter
from tests.contracts.ledger_records import FixedClock, attempted, opened, settled
url, folder, name = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
journal = JournalFile(folder, segment_bytes=50_000)
LedgerWriter(open_engine(url), journal, folder, FixedClock(), poll=0.005, batch=20).start()
for number in itertools.count():
    request_id = f"{name}-{number}"
    journal.open(opened(request_id))
    sys.stdout.write(request_id + "\\n"); sys.stdout.flush()
    journal.attempt(attempted(request_id))
    if number % 3:
        journal.settle(settled(request_id))
"""


async def test_kill_9_loses_no_request_and_books_none_twice(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    admitted: set[str] = set()
    for round_number in range(3):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            WORKER,
            database_url,
            str(tmp_path),
            f"round-{round_number}",
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        for _ in range(400 + 137 * round_number):
            admitted.add((await process.stdout.readline()).decode().strip())
        process.kill()
        admitted.update(line.decode() for line in (await process.stdout.read()).split(b"\n")[:-1])
        await process.wait()
        with worker(engine, tmp_path) as (_, writer):
            await writer.replay()
    booked = [row["id"] for row in rows(engine, schema.requests)]
    assert len(booked) == len(set(booked))
    assert admitted <= set(booked)
    assert len(set(booked) - admitted) <= 3, "at most the one each round that was opened and not printed"
    result = verify(engine, tmp_path)
    assert (result.differences, result.unsettled) == ([], 0)
    assert journal_folders(tmp_path) == []


async def test_features_and_labels_are_booked_with_their_request(engine: Engine, tmp_path: Path) -> None:
    first = settled(
        new_id(), features=b"\x00\x01\xff", features_encoder="static-1", prompt="Wie geht\u0000s?"
    )
    again = settled(new_id())
    repeated = labelled(first, "repeated", weight=0.1)
    first = replace(first, labels=(labelled(first), labelled(first, "truncated", score=0.25)))
    again = replace(again, labels=(repeated, labelled(again)))
    third = replace(settled(new_id()), labels=(repeated,))
    with worker(engine, tmp_path) as (journal, writer):
        for request in (first, again, third):
            journal.settle(request)
        await writer.flush()
        assert writer.rejected == 0
    [row] = rows(engine, schema.request_features)
    assert (row["request_id"], row["encoder_id"]) == (first.id, "static-1")
    assert bytes(row["features"]) == b"\x00\x01\xff"
    assert row["prompt"] == ("Wie geht\ufffds?" if engine.dialect.name == "postgresql" else first.prompt)
    found = {(row["request_id"], row["source"], row["score"]) for row in rows(engine, schema.labels)}
    assert found == {
        (first.id, "refusal", 0.0),
        (first.id, "truncated", 0.25),
        (first.id, "repeated", 0.0),
        (again.id, "refusal", 0.0),
    }
    assert len(rows(engine, schema.labels)) == 4
    assert {row["at"] for row in rows(engine, schema.labels)} == {OPENED}


async def test_a_journal_of_before_learning_replays(engine: Engine, tmp_path: Path) -> None:
    dead = JournalFile(tmp_path)
    request = settled(new_id())
    old = msgspec.to_builtins(request, builtin_types=(datetime,))
    for name in ("features", "features_encoder", "prompt", "labels"):
        del old[name]
    body = struct.pack("<BB", SETTLE, len(request.id)) + request.id.encode() + msgspec.msgpack.encode(old)
    os.write(dead._file, struct.pack("<II", len(body), zlib.crc32(body)) + body)
    kill(dead)
    with worker(engine, tmp_path, adopt_every=60) as (_, writer):
        assert await writer.replay() == 1
        assert writer.rejected == 0
    [row] = rows(engine, schema.requests)
    assert (row["id"], row["cost"]) == (request.id, request.cost)
    assert rows(engine, schema.request_features) == rows(engine, schema.labels) == []
