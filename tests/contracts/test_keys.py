"""API keys in SQL, over SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from router.adapters.sql import keys, schema
from router.adapters.sql.database import open_engine
from router.adapters.sql.keys import (
    SqlKeyDirectory,
    adopt_key,
    create_key,
    list_keys,
    revoke_key,
)
from router.core.errors import ConfigurationError, UnavailableError
from router.stages.admit import key_hash

pytest_plugins = ["tests.contracts.sql_databases"]

SECRET = b"0123456789abcdef"


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def directory(engine: Engine) -> Iterator[SqlKeyDirectory]:
    directory = SqlKeyDirectory(engine, refresh=0.1)
    directory.start()
    yield directory
    directory.stop()


async def until(condition: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_a_new_key_works_at_once_and_a_revoked_one_stops(
    engine: Engine, directory: SqlKeyDirectory
) -> None:
    key, entry = create_key(engine, SECRET, "search", "faq-bot", {"data": ("pii",)})
    hashed = key_hash(SECRET, key)
    assert key.startswith("fk-")
    assert len(key) == 46
    assert directory.find(hashed) is None
    caller = await directory.find_new(hashed)
    assert caller is not None
    assert (caller.key_id, caller.team, caller.app) == (entry.id, "search", "faq-bot")
    assert caller.tags == {"data": frozenset({"pii"})}
    assert directory.find(hashed) == caller
    assert revoke_key(engine, entry.id).revoked_at is not None
    await until(lambda: directory.find(hashed) is None)
    assert await directory.find_new(hashed) is None


async def test_every_directory_learns_keys_by_itself(engine: Engine, directory: SqlKeyDirectory) -> None:
    key, _ = create_key(engine, SECRET, "search")
    await until(lambda: directory.find(key_hash(SECRET, key)) is not None)


def test_a_key_is_stored_only_as_a_keyed_hash(engine: Engine) -> None:
    key, _ = create_key(engine, SECRET, "search")
    adopt_key(engine, SECRET, "sk-the-key-it-always-used", "search")
    with engine.connect() as connection:
        stored = str(connection.execute(sa.select(schema.api_keys)).all())
    assert key not in stored
    assert "always" not in stored
    assert key_hash(SECRET, key) in stored
    assert key_hash(b"another secret", key) not in stored


async def test_an_adopted_key_is_found(engine: Engine, directory: SqlKeyDirectory) -> None:
    entry = adopt_key(engine, SECRET, " sk-the-key-it-always-used\n", "search", "faq-bot")
    caller = await directory.find_new(key_hash(SECRET, "sk-the-key-it-always-used"))
    assert caller is not None
    assert caller.key_id == entry.id
    assert entry.adopted
    with pytest.raises(ConfigurationError, match="stored already"):
        adopt_key(engine, SECRET, "sk-the-key-it-always-used", "other")


@pytest.mark.parametrize("key", ["", "short", "x" * 600, "with a space in the middle", "schlüssel-schlüssel"])
def test_keys_that_cannot_be_adopted(sqlite_url: str, key: str) -> None:
    with pytest.raises(ConfigurationError, match="the key to adopt"):
        adopt_key(open_engine(sqlite_url), SECRET, key, "search")


@pytest.mark.parametrize("name", ["", "-search", "a b", "x" * 64, "a/b", "a\nb", "organisation:"])
def test_names_that_cannot_be_used(sqlite_url: str, name: str) -> None:
    engine = open_engine(sqlite_url)
    with pytest.raises(ConfigurationError, match=r"team: a name has"):
        create_key(engine, SECRET, name)
    with pytest.raises(ConfigurationError, match=r"app: a name has"):
        create_key(engine, SECRET, "search", name)


def test_keys_are_listed_without_the_key(engine: Engine) -> None:
    ids = [create_key(engine, SECRET, team)[1].id for team in ("a", "b")]
    revoke_key(engine, ids[0])
    first = revoke_key(engine, ids[0]).revoked_at
    assert [(key.id, key.revoked_at) for key in list_keys(engine)] == [(ids[0], first), (ids[1], None)]
    with pytest.raises(ConfigurationError, match="no key has this id"):
        revoke_key(engine, "key_unknown")


async def test_a_flood_of_unknown_keys_does_not_reach_sql(engine: Engine) -> None:
    directory = SqlKeyDirectory(engine, refresh=60, lookups_per_second=5)
    directory.start()
    asked = 0

    def count(connection: object, cursor: object, statement: str, *_: object) -> None:
        nonlocal asked
        asked += "api_keys" in statement

    sa.event.listen(engine, "before_cursor_execute", count)
    started = time.monotonic()
    unknown = unchecked = 0
    for number in range(2000):
        try:
            assert await directory.find_new(key_hash(SECRET, f"made-up-{number}")) is None
            unknown += 1
        except UnavailableError:
            unchecked += 1
    assert unknown == asked  # nobody is told that a key is unknown before it was looked up
    assert unknown + unchecked == 2000
    assert asked <= 6 + 5 * (time.monotonic() - started)
    assert len(directory._misses) <= 10_000
    directory.stop()


async def test_a_burst_with_one_new_key_asks_once(engine: Engine) -> None:
    directory = SqlKeyDirectory(engine, refresh=60, lookups_per_second=5)
    directory.start()
    key, entry = create_key(engine, SECRET, "search")
    hashed = key_hash(SECRET, key)
    found = await asyncio.gather(*(directory.find_new(hashed) for _ in range(200)))
    assert {caller.key_id for caller in found if caller is not None} == {entry.id}
    assert None not in found
    directory.stop()


async def test_a_miss_is_asked_once_a_second(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert keys.MISS_SECONDS == 1
    monkeypatch.setattr(keys, "MISS_SECONDS", 3600)
    directory = SqlKeyDirectory(engine, refresh=60)
    directory.start()
    hashed = key_hash(SECRET, "sk-not-adopted-yet-at-all")
    assert await directory.find_new(hashed) is None
    adopt_key(engine, SECRET, "sk-not-adopted-yet-at-all", "search")
    assert await directory.find_new(hashed) is None
    monkeypatch.setattr(keys, "MISS_SECONDS", 0)
    assert await directory.find_new(hashed) is not None
    directory.stop()


async def test_known_keys_outlive_sql_for_the_grace(tmp_path: Path, sqlite_url: str) -> None:
    engine = open_engine(sqlite_url)
    key, _ = create_key(engine, SECRET, "search")
    hashed = key_hash(SECRET, key)
    directory = SqlKeyDirectory(engine, refresh=0.02, grace=3600)
    directory.start()
    engine.dispose()
    take_away(tmp_path)
    await until(lambda: not directory.sql_up)
    assert directory.find(hashed) is not None
    with pytest.raises(UnavailableError, match="ledger database did not answer"):
        await directory.find_new(key_hash(SECRET, "another"))
    directory._grace = 0
    with pytest.raises(UnavailableError, match="cannot be checked"):
        directory.find(hashed)
    directory.stop()


def take_away(folder: Path) -> None:
    for path in folder.glob("ledger.db*"):
        path.rename(folder / f"away-{path.name}")
    (folder / "ledger.db").mkdir()
