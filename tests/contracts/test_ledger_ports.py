"""What holds for every journal, key directory and spend source: the real ones and their memory twins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.engine import Engine

from router.adapters.journal import JournalFile, JournalReader, decode_attempt, decode_open, decode_settle
from router.adapters.memory import MemoryJournal, MemoryKeyDirectory, MemorySpendSource
from router.adapters.sql.database import open_engine
from router.adapters.sql.keys import SqlKeyDirectory, create_key
from router.adapters.sql.ledger import Ledger
from router.adapters.sql.spend import SqlSpendSource
from router.core.errors import UnavailableError
from router.core.ports import Journal, KeyDirectory, SpendSource
from router.core.types import BudgetWindow, Caller
from router.stages.admit import key_hash
from tests.contracts.ledger_records import attempted, new_id, opened, settled

pytest_plugins = ["tests.contracts.sql_databases"]


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_engine(database_url)
    yield engine
    engine.dispose()


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_journal_keeps_each_record_in_order(kind: str, tmp_path: Path) -> None:
    journal: Journal = MemoryJournal() if kind == "memory" else JournalFile(tmp_path)
    ids = [new_id(), new_id()]
    records = [(opened(name), attempted(name), settled(name)) for name in ids]
    for start, attempt, end in records:
        journal.open(start)
        journal.attempt(attempt)
        journal.settle(end)
    if isinstance(journal, MemoryJournal):
        found = list(zip(journal.opened, journal.attempts, journal.settled, strict=True))
    else:
        assert isinstance(journal, JournalFile)
        payloads = [frame.payload for frame in JournalReader(journal.folder).frames(journal.end)]
        decoders = (decode_open, decode_attempt, decode_settle)
        decoded = [decoders[at % 3](payload) for at, payload in enumerate(payloads)]
        found = [tuple(decoded[at : at + 3]) for at in (0, 3)]  # type: ignore[misc]
        journal.close()
    assert found == records


async def check_directory(directory: KeyDirectory, known: str, late: str) -> None:
    caller = directory.find(known)
    assert caller is not None
    assert (caller.team, caller.app) == ("search", "faq-bot")
    assert directory.find(late) is None
    found = await directory.find_new(late)
    assert found is not None
    assert found.team == "late"
    assert directory.find(late) == found
    unknown = key_hash(b"secret", "unknown")
    assert directory.find(unknown) is None
    assert await directory.find_new(unknown) is None


async def test_the_memory_twin_of_the_key_directory() -> None:
    known, late = Caller("1", "search", "faq-bot"), Caller("2", "late")
    await check_directory(MemoryKeyDirectory({"known": known}, {"new": late}), "known", "new")


async def test_the_key_directory_over_sql(engine: Engine) -> None:
    known, _ = create_key(engine, b"secret", "search", "faq-bot")
    directory = SqlKeyDirectory(engine, refresh=60)
    directory.start()
    late, _ = create_key(engine, b"secret", "late")
    await check_directory(directory, key_hash(b"secret", known), key_hash(b"secret", late))
    directory.stop()


async def check_source(source: SpendSource) -> None:
    team, month = BudgetWindow("team:search", "2026-11"), BudgetWindow("team:search", "2026-12")
    assert await source.spent([team, month]) == {team: 37_500, month: 0}
    assert await source.spent([]) == {}


async def test_the_memory_twin_of_the_spend_source() -> None:
    source = MemorySpendSource({BudgetWindow("team:search", "2026-11"): 37_500})
    await check_source(source)
    source.away = True
    with pytest.raises(UnavailableError):
        await source.spent([])


async def test_the_spend_source_over_sql(engine: Engine, tmp_path: Path) -> None:
    Ledger(engine).write([settled(new_id())], fresh=True)
    await check_source(SqlSpendSource(engine, tmp_path))
