"""Migration, append-only rows and the errors of a database, over SQLite and PostgreSQL."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError

from router.adapters.sql import schema
from router.adapters.sql.cache_book import invalidate
from router.adapters.sql.database import (
    migrate,
    migrations_folder,
    open_engine,
    schema_is_current,
    schema_problem,
    writing,
)
from router.adapters.sql.ledger import Ledger, adjust
from router.core.errors import ConfigurationError, UnavailableError
from router.core.types import Usage
from tests.contracts.ledger_records import OPENED, cache_labelled, candidate, labelled, new_id, settled
from tests.values import replace

pytest_plugins = ["tests.contracts.sql_databases"]


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_engine(database_url)
    yield engine
    engine.dispose()


def test_the_migration_makes_the_tables_the_code_uses(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []
    config = Config()
    config.set_main_option("script_location", str(migrations_folder()))
    assert ScriptDirectory.from_config(config).get_heads() == [schema.SCHEMA_VERSION]


def test_an_empty_database_says_what_to_do(empty_database_url: str) -> None:
    engine = open_engine(empty_database_url)
    assert schema_problem(engine) == "the ledger database has no tables yet: run `farthing migrate`"
    assert not schema_is_current(empty_database_url)
    assert migrate(empty_database_url) == schema.SCHEMA_VERSION
    assert migrate(empty_database_url) == schema.SCHEMA_VERSION
    assert schema_problem(engine) is None
    with writing(engine) as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    assert "at schema 9999" in (schema_problem(engine) or "")
    engine.dispose()


def test_starts_at_the_same_time_do_not_break_each_other(empty_database_url: str) -> None:
    script = "import sys; from router.adapters.sql.database import migrate; migrate(sys.argv[1])"
    command = [sys.executable, "-c", script, empty_database_url]
    root = Path(__file__).parents[2]
    running = [subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE) for _ in range(3)]
    for process in running:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()
    assert schema_is_current(empty_database_url)


@pytest.mark.parametrize("table", schema.APPEND_ONLY)
def test_rows_are_append_only(engine: Engine, table: str) -> None:
    request = settled(new_id(), usage=Usage(input=100))
    request = replace(
        request,
        labels=(labelled(request),),
        candidate=candidate(),
        cache_labels=(cache_labelled(request),),
    )
    Ledger(engine).write([request], fresh=True)
    adjust(engine, request.id, 5, "invoice", "finops", OPENED)
    invalidate(engine, "all", "", at=OPENED, by="cli")
    column = next(iter(schema.metadata.tables[table].columns)).name
    statements = [f"UPDATE {table} SET {column} = {column}", f"DELETE FROM {table}"]
    if engine.dialect.name == "sqlite":
        statements.append(f"INSERT OR REPLACE INTO {table} SELECT * FROM {table}")
    else:
        statements.append(f"TRUNCATE {table} CASCADE")
    for statement in statements:
        with pytest.raises(DBAPIError, match="append-only"), writing(engine) as connection:
            connection.exec_driver_sql(statement)
    with engine.connect() as connection:
        assert connection.scalar(sa.text(f"SELECT count(*) FROM {table}")) == 1


def test_a_missing_trigger_is_noticed(engine: Engine) -> None:
    drop = "DROP TRIGGER requests_no_update"
    if engine.dialect.name != "sqlite":
        drop = "ALTER TABLE requests DISABLE TRIGGER requests_append_only"
    with writing(engine) as connection:
        connection.exec_driver_sql(drop)
    assert "append-only triggers are missing (requests_" in (schema_problem(engine) or "")


def test_times_come_back_in_utc(engine: Engine) -> None:
    Ledger(engine).write([settled(new_id())], fresh=True)
    with engine.connect() as connection:
        assert connection.scalar(sa.select(schema.requests.c.opened_at)) == OPENED
        after = sa.select(sa.func.count()).where(schema.requests.c.opened_at > OPENED)
        assert connection.scalar(after) == 0


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql://root:hunter2@db/ledger", "names the database 'mysql'"),
        ("not a url hunter2", "is not a database URL"),
        ("postgresql://a:hunter2@db:port/x", "is not a database URL"),
        ("sqlite://", "names no SQLite file"),
    ],
)
def test_a_wrong_url_is_a_clear_error(url: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as raised:
        open_engine(url)
    assert "hunter2" not in str(raised.value)


def test_an_unreachable_database_tells_no_secret() -> None:
    url = "postgresql://farthing:hunter2@127.0.0.1:1/ledger"
    for attempt in (lambda: migrate(url), lambda: schema_is_current(url)):
        with pytest.raises(UnavailableError) as raised:
            attempt()
        assert str(raised.value) == "the ledger database did not answer (OperationalError)"
        assert raised.value.__suppress_context__
