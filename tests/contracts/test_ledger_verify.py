"""Verification, seeding of budgets and writers side by side, over SQLite and PostgreSQL."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from router.adapters.journal import JournalFile
from router.adapters.sql.database import open_engine, writing
from router.adapters.sql.ledger import Ledger, adjust
from router.adapters.sql.policies import PolicyVersion, policy_history, policy_version, record_policy
from router.adapters.sql.spend import SqlSpendSource
from router.adapters.sql.verify import verify
from router.adapters.sql.writer import cancelled
from router.core.errors import ConfigurationError, UnavailableError
from router.core.types import BudgetWindow, RequestRecord
from tests.contracts.ledger_records import OPENED, attempted, new_id, opened, settled
from tests.values import replace

pytest_plugins = ["tests.contracts.sql_databases"]


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_engine(database_url)
    yield engine
    engine.dispose()


def several(number: int = 20) -> list[RequestRecord]:
    found = [
        settled(
            new_id(), team=f"team-{at % 3}", failed_first=at % 4 == 0, baseline=None if at % 5 == 0 else 9
        )
        for at in range(number)
    ]
    unpriced = settled(new_id(), baseline=None, cost=None, unpriced=True)
    attempt = replace(unpriced.attempts[0], cost=None, lines=(), price=None)
    found.append(replace(unpriced, attempts=(attempt,)))
    hit = settled(new_id(), cache="exact", cost=0, routing_savings=70_000, cache_savings=30_000, attempts=())
    found.append(hit)
    dead = new_id()
    found.append(cancelled(opened(dead), [attempted(dead), attempted(dead, 1)], OPENED))
    return found


def test_what_the_writer_books_verifies(engine: Engine, tmp_path: Path) -> None:
    records = several()
    Ledger(engine).write(records, fresh=True)
    adjust(engine, records[0].id, -17, "refund", "finops", OPENED)
    result = verify(engine, tmp_path, batch=7)
    assert [str(difference) for difference in result.differences] == []
    assert (result.requests, result.unsettled) == (len(records), 0)
    with pytest.raises(ConfigurationError):
        adjust(engine, "unknown", 1, "refund", "finops", OPENED)


def test_an_empty_ledger_verifies(engine: Engine, tmp_path: Path) -> None:
    result = verify(engine, tmp_path)
    assert (result.differences, result.requests) == ([], 0)


MANIPULATIONS = {
    "cost_lines": (
        "UPDATE cost_lines SET amount = amount + 1 WHERE bucket = 'input'",
        "input: amount is 25001",
    ),
    "cost_lines price": ("UPDATE cost_lines SET unit_price = unit_price * 2", "unit_price is 500000000"),
    "cost_lines list": ("UPDATE cost_lines SET list_amount = 1 WHERE bucket = 'output'", "list_amount is 1"),
    "attempts": ("UPDATE attempts SET cost = cost - 1", "attempt 0: cost is 37499"),
    "attempts tokens": ("UPDATE attempts SET tokens_output = 51", "billed tokens is"),
    "requests": ("UPDATE requests SET cost = cost + 1", "cost is 37501, its rows give 37500"),
    "requests saving": ("UPDATE requests SET routing_savings = 1", "routing + cache - overhead is 1"),
    "requests half": ("UPDATE requests SET overhead = NULL", "parts of the saving"),
    "requests unpriced": ("UPDATE requests SET unpriced = (1 = 1)", "unpriced is True"),
    "price_records": (
        "UPDATE price_records SET unit_prices = replace(unit_prices, '0.25', '0.26')",
        "unit_price is 250000000, its rows give 260000000",
    ),
    "cost_lines gone": (
        "DELETE FROM cost_lines WHERE bucket = 'output'",
        "cost is 37500, its rows give 25000",
    ),
    "adjustments": (
        "INSERT INTO adjustments SELECT 'adj', id, opened_at, 5, '', '' FROM requests",
        "spent is",
    ),
    "spend_rollup": ("UPDATE spend_rollup SET tokens_input = 0", "tokens_input is 0, its rows give 100"),
    "spend_rollup gone": ("DELETE FROM spend_rollup", "is missing"),
    "budget_spend": (
        "UPDATE budget_spend SET spent = spent + 1 WHERE key = 'organisation'",
        "spent is 37501",
    ),
}


@pytest.mark.parametrize("name", MANIPULATIONS)
def test_a_manipulated_row_is_found(engine: Engine, tmp_path: Path, name: str) -> None:
    statement, says = MANIPULATIONS[name]
    Ledger(engine).write([settled(new_id())], fresh=True)
    manipulate(engine, statement)
    assert says in "\n".join(map(str, verify(engine, tmp_path).differences))


def test_orphan_rows_are_found(engine: Engine, tmp_path: Path) -> None:
    Ledger(engine).write([settled(new_id()), settled(new_id())], fresh=True)
    manipulate(engine, "DELETE FROM attempts")
    manipulate(engine, "DELETE FROM price_records")
    found = "\n".join(map(str, verify(engine, tmp_path).differences))
    assert "cost_lines: rows without attempts is 4" in found
    assert "cost_lines: rows without price_records is 4" in found


def manipulate(engine: Engine, statement: str) -> None:
    """What somebody with the database's own rights could do: past triggers and keys, which stand again after."""
    if engine.dialect.name == "postgresql":
        with engine.begin() as connection:
            connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
            connection.exec_driver_sql(statement)
        return
    with engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.execute("PRAGMA foreign_keys=OFF")
        triggers = driver.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            driver.execute(f"DROP TRIGGER {name}")
        driver.execute(statement)
        for _, definition in triggers:
            driver.execute(definition)
        driver.execute("PRAGMA foreign_keys=ON")


async def test_budgets_are_seeded_from_sql_and_journals(engine: Engine, tmp_path: Path) -> None:
    booked, waiting, other = settled(new_id()), settled(new_id()), settled(new_id(), team="other")
    unknown = settled(new_id(), cost=None, unpriced=True)
    Ledger(engine).write([booked], fresh=True)
    adjust(engine, booked.id, -500, "refund", "finops", OPENED)
    journal = JournalFile(tmp_path)
    for record in (booked, waiting, other, unknown):  # the first is committed, its segment not gone yet
        journal.settle(record)
    journal.open(opened(new_id()))
    team, organisation, nobody = (
        BudgetWindow("team:search", "2026-11"),
        BudgetWindow("organisation", "2026-11"),
        BudgetWindow("team:search", "2026-10"),
    )
    spent = await SqlSpendSource(engine, tmp_path).spent([team, organisation, nobody])
    assert spent == {
        team: 2 * 37_500 - 500 + 1_000_000,
        organisation: 3 * 37_500 - 500 + 1_000_000,
        nobody: 0,
    }
    assert verify(engine, tmp_path).unsettled == 4
    journal.close()


async def test_spend_that_cannot_be_read_is_never_zero(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path / 'nowhere' / 'ledger.db'}")
    with pytest.raises(UnavailableError):
        await SqlSpendSource(engine, tmp_path).spent([BudgetWindow("organisation", "2026-11")])


def test_two_writers_at_once_lose_and_block_nothing(engine: Engine, tmp_path: Path) -> None:
    rng = random.Random(7)  # the same rows from both sides, each in its own order
    batches = [[[settled(new_id(), team=f"team-{at}") for at in range(20)] for _ in range(15)] for _ in "ab"]
    for batch in (*batches[0], *batches[1]):
        rng.shuffle(batch)
    errors: list[BaseException] = []

    def write(part: list[list[RequestRecord]]) -> None:
        ledger = Ledger(engine)
        try:
            for batch in part:
                ledger.write(batch, fresh=True)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(part,)) for part in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    result = verify(engine, tmp_path)
    assert (result.requests, result.differences) == (600, [])


def test_the_history_of_the_policy(engine: Engine) -> None:
    versions = [
        PolicyVersion(name, OPENED, f"providers {name}", f"policy {name}") for name in ("aa", "ab", "aa")
    ]
    assert [record_policy(engine, version) for version in versions] == [True, True, True]
    assert record_policy(engine, versions[-1]) is False
    assert policy_history(engine) == versions[::-1]
    assert policy_version(engine, "ab") == versions[1]
    assert policy_version(engine, "%") is None


def test_two_workers_that_record_late_keep_one_history(engine: Engine) -> None:
    first, second, back = (
        PolicyVersion(name, OPENED + timedelta(minutes=minute), f"providers {name}", f"policy {name}")
        for minute, name in enumerate(("aa", "ab", "aa"))
    )
    assert [record_policy(engine, version) for version in (first, second, back)] == [True, True, True]
    later = [
        replace(version, loaded_at=version.loaded_at + timedelta(seconds=2))
        for version in (first, second, back)
    ]
    assert [record_policy(engine, version) for version in later] == [False, False, False]
    assert policy_history(engine) == [back, second, first]


def test_a_journal_folder_that_does_not_exist_holds_nothing(engine: Engine, tmp_path: Path) -> None:
    assert verify(engine, tmp_path / "none").unsettled == 0
    assert not os.path.exists(tmp_path / "none")


def test_sums_are_exact_over_many_rows(engine: Engine) -> None:
    Ledger(engine).write([settled(new_id()) for _ in range(500)], fresh=True)
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT sum(cost) FROM requests")) == 500 * 37_500
        assert connection.scalar(sa.text("SELECT sum(cost) FROM spend_rollup")) == 500 * 37_500
    with writing(engine) as connection:
        assert (
            connection.scalar(sa.text("SELECT spent FROM budget_spend WHERE key = 'organisation'"))
            == 18_750_000
        )
