"""Opening the database: engines for both dialects, the migration and the check at start."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from router.adapters.sql.schema import APPEND_ONLY, SCHEMA_VERSION
from router.core.errors import ConfigurationError, UnavailableError

log = logging.getLogger(__name__)

BUSY_TIMEOUT_SECONDS = 10.0
CONNECT_TIMEOUT_SECONDS = 3
# Any constant: starts of the same installation must agree on it, nothing else takes it.
MIGRATION_LOCK = 7_306_111_402

_REMEDY = "use sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME"


def database_url(text: str) -> URL:
    """The URL with the driver this project ships. Never put into a message: it may hold a password.

    Raises ConfigurationError for what is neither SQLite nor PostgreSQL.
    """
    try:
        url = sa.make_url(text)
    except (ArgumentError, ValueError):
        raise ConfigurationError(f"FARTHING_DATABASE_URL is not a database URL: {_REMEDY}") from None
    backend = url.drivername.partition("+")[0]
    if backend in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if backend == "sqlite":
        if not url.database or url.database == ":memory:":
            raise ConfigurationError(f"FARTHING_DATABASE_URL names no SQLite file: {_REMEDY}")
        return url.set(drivername="sqlite+pysqlite")
    raise ConfigurationError(f"FARTHING_DATABASE_URL names the database {backend!r}: {_REMEDY}")


def open_engine(text: str) -> Engine:
    """A small synchronous pool; nothing is connected yet. Parameters never appear in its errors."""
    url = database_url(text)
    if url.get_backend_name() == "sqlite":
        assert url.database is not None
        engine = sa.create_engine(url, hide_parameters=True, connect_args={"timeout": BUSY_TIMEOUT_SECONDS})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    return sa.create_engine(
        url,
        hide_parameters=True,
        pool_size=3,
        max_overflow=2,
        pool_pre_ping=True,
        pool_timeout=5,
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_SECONDS,
            "application_name": "farthing",
            "options": "-c statement_timeout=60000 -c lock_timeout=30000 -c timezone=UTC",
            "tcp_user_timeout": 10_000,
        },
    )


def _prepare_sqlite(connection: sqlite3.Connection, record: Any) -> None:
    # The driver's own transaction control begins none before DDL: SQLAlchemy's begin event does it instead.
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout={int(BUSY_TIMEOUT_SECONDS * 1000)}")
    deadline = time.monotonic() + BUSY_TIMEOUT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError:  # the switch does not always wait for a lock
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")
    # Without it INSERT OR REPLACE deletes rows past the append-only triggers.
    connection.execute("PRAGMA recursive_triggers=ON")


def _begin_sqlite(connection: Connection) -> None:
    immediate = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that writes: SQLite takes its write lock at once, so that it cannot fail half-way."""
    with engine.execution_options(writes=True).begin() as connection:
        yield connection


@contextmanager
def one_snapshot(engine: Engine) -> Iterator[Connection]:
    """A transaction whose queries all see the same rows."""
    if engine.dialect.name == "postgresql":
        engine = engine.execution_options(isolation_level="REPEATABLE READ")
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            # A report over years may take longer than any statement a request waits for.
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        yield connection


def unavailable(error: Exception) -> UnavailableError:
    """What is told outside: the kind of failure, and nothing the driver wrote."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return UnavailableError(f"the ledger database did not answer ({type(cause).__name__})")


def migrations_folder() -> Path:
    """In an installed wheel the scripts lie inside the package, in a checkout beside it."""
    package = Path(__file__).resolve().parents[2]
    inside = package / "_data" / "migrations"
    return inside if inside.is_dir() else package.parent / "migrations"


def migrate(url: str) -> str:
    """Brings the schema to this version and returns it. Concurrent starts wait for each other.

    Raises UnavailableError when the database does not answer.
    """
    from alembic import command
    from alembic.config import Config

    engine = open_engine(url)
    config = Config()
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    try:
        with writing(engine) as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.text("SET LOCAL lock_timeout = 0"))
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATION_LOCK)))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except SQLAlchemyError as error:
        raise unavailable(error) from None
    finally:
        engine.dispose()
    return SCHEMA_VERSION


def prepare_schema(engine: Engine, url: str, *, embedded: bool) -> str | None:
    """What is wrong with the schema, once the `embedded` database has been brought up to date; None: nothing.

    Alembic takes a fifth of a second to import, so it is asked only where the schema is behind. Raises
    UnavailableError when SQL does not answer.
    """
    problem = schema_problem(engine)
    if problem is not None and embedded:
        migrate(url)
        problem = schema_problem(engine)
    return problem


def schema_problem(engine: Engine) -> str | None:
    """None when the schema is this version's and its append-only triggers stand; else what to do.

    Raises UnavailableError when the database does not answer.
    """
    try:
        with engine.connect() as connection:
            if not sa.inspect(connection).has_table("alembic_version"):
                return "the ledger database has no tables yet: run `farthing migrate`"
            found = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
            if found != SCHEMA_VERSION:
                return (
                    f"the ledger database is at schema {found}, this version needs {SCHEMA_VERSION}: "
                    "run `farthing migrate` with the newest version in use"
                )
            missing = sorted(set(_expected_triggers(engine)) - set(_triggers(connection)))
    except SQLAlchemyError as error:
        raise unavailable(error) from None
    if missing:
        return f"the ledger's append-only triggers are missing ({', '.join(missing)}): restore them"
    return None


def schema_is_current(url: str) -> bool:
    engine = open_engine(url)
    try:
        return schema_problem(engine) is None
    finally:
        engine.dispose()


def _expected_triggers(engine: Engine) -> list[str]:
    if engine.dialect.name == "sqlite":
        return [f"{table}_no_{verb}" for table in APPEND_ONLY for verb in ("update", "delete")]
    return [f"{table}_append_only" for table in APPEND_ONLY]


def _triggers(connection: Connection) -> list[str]:
    if connection.dialect.name == "sqlite":
        query = "SELECT name FROM sqlite_master WHERE type = 'trigger'"
    else:
        query = (
            "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal AND tgenabled <> 'D' "
            "AND tgrelid IN (SELECT oid FROM pg_class WHERE relnamespace = current_schema()::regnamespace)"
        )
    return [row[0] for row in connection.execute(sa.text(query))]
