"""API keys: stored as keyed hashes, held in memory, refreshed from SQL."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Engine, Row
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from router.adapters.sql.database import unavailable, writing
from router.adapters.sql.ledger import mapping_json
from router.adapters.sql.schema import api_keys
from router.core.errors import ConfigurationError, UnavailableError
from router.core.types import CALLER_NAME, Caller
from router.stages.admit import key_hash

log = logging.getLogger(__name__)

PREFIX = "fk-"
MIN_ADOPTED, MAX_KEY = 16, 512
REFRESH_SECONDS = 1.0
KEY_GRACE_SECONDS = 3600.0
MISS_SECONDS = 1.0
MAX_MISSES = 10_000
LOOKUPS_PER_SECOND = 50.0
LOOKUP_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """A key as people see it: never the key itself."""

    id: str
    team: str
    app: str | None
    tags: Mapping[str, tuple[str, ...]]
    adopted: bool
    created_at: datetime
    revoked_at: datetime | None


def create_key(
    engine: Engine,
    secret: bytes,
    team: str,
    app: str | None = None,
    tags: Mapping[str, tuple[str, ...]] | None = None,
) -> tuple[str, KeyEntry]:
    """A new key, which is shown here and never again, and its entry.

    Raises ConfigurationError for a name that is not allowed, UnavailableError when SQL does not answer.
    """
    key = PREFIX + secrets.token_urlsafe(32)
    return key, _store(engine, secret, key, team, app, tags or {}, adopted=False)


def adopt_key(
    engine: Engine,
    secret: bytes,
    key: str,
    team: str,
    app: str | None = None,
    tags: Mapping[str, tuple[str, ...]] | None = None,
) -> KeyEntry:
    """Stores the hash of a key an app already sends.

    Raises ConfigurationError for a key that is too short or stored already, or a name that is not allowed.
    """
    key = key.strip()
    if not MIN_ADOPTED <= len(key) <= MAX_KEY:
        raise ConfigurationError(
            f"the key to adopt has {len(key)} characters: it must have {MIN_ADOPTED} to {MAX_KEY}, "
            "a shorter one could be guessed"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigurationError("the key to adopt holds spaces or characters that no header can carry")
    return _store(engine, secret, key, team, app, tags or {}, adopted=True)


def list_keys(engine: Engine) -> list[KeyEntry]:
    """Every key, revoked ones included, the oldest first. Raises UnavailableError."""
    try:
        with engine.connect() as connection:
            rows = connection.execute(sa.select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id))
            return [_entry(row) for row in rows]
    except SQLAlchemyError as error:
        raise unavailable(error) from None


def revoke_key(engine: Engine, key_id: str) -> KeyEntry:
    """Ends a key; running gateways stop accepting it within seconds. Revoking twice changes nothing.

    Raises ConfigurationError for an unknown id.
    """
    try:
        with writing(engine) as connection:
            connection.execute(
                sa.update(api_keys)
                .where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
                .values(revoked_at=datetime.now(UTC))
            )
            row = connection.execute(sa.select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
    except SQLAlchemyError as error:
        raise unavailable(error) from None
    if row is None:
        raise ConfigurationError("no key has this id: `farthing keys list` shows them")
    return _entry(row)


def _store(
    engine: Engine,
    secret: bytes,
    key: str,
    team: str,
    app: str | None,
    tags: Mapping[str, tuple[str, ...]],
    *,
    adopted: bool,
) -> KeyEntry:
    _check_name("team", team)
    if app is not None:
        _check_name("app", app)
    entry = KeyEntry(
        id="key_" + secrets.token_hex(8),
        team=team,
        app=app,
        tags=dict(tags),
        adopted=adopted,
        created_at=datetime.now(UTC),
        revoked_at=None,
    )
    try:
        with writing(engine) as connection:
            connection.execute(
                sa.insert(api_keys).values(
                    id=entry.id,
                    key_hash=key_hash(secret, key),
                    team=team,
                    app=app,
                    tags=mapping_json(tags),
                    adopted=adopted,
                    created_at=entry.created_at,
                )
            )
    except IntegrityError:
        raise ConfigurationError(
            "this key is stored already (a revoked key stays so): `farthing keys list` shows all"
        ) from None
    except SQLAlchemyError as error:
        raise unavailable(error) from None
    return entry


def _check_name(field: str, name: str) -> None:
    if not CALLER_NAME.fullmatch(name):
        raise ConfigurationError(
            f"{field}: a name has 1 to 63 letters, digits, '.', '_' or '-' and begins with a letter or digit"
        )


def _entry(row: Row[tuple[object, ...]]) -> KeyEntry:
    return KeyEntry(
        id=row.id,
        team=row.team,
        app=row.app,
        tags=_tags(row.tags),
        adopted=row.adopted,
        created_at=row.created_at,
        revoked_at=row.revoked_at,
    )


def _tags(text: str) -> dict[str, tuple[str, ...]]:
    return msgspec.json.decode(text, type=dict[str, tuple[str, ...]])


def _caller(row: Row[tuple[object, ...]]) -> Caller:
    tags = {name: frozenset(values) for name, values in _tags(row.tags).items()}
    return Caller(key_id=row.id, team=row.team, app=row.app, tags=tags)


class SqlKeyDirectory:
    """Every valid key in memory (`ports.KeyDirectory`).

    A thread reads all of them every second, so a revoked key stops within two. A hash that is not in memory
    is looked up in SQL once; misses are remembered for a second and lookups are limited, so that a flood of
    made-up keys does not reach the database. While SQL is away known keys stay valid for `grace` seconds.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        refresh: float = REFRESH_SECONDS,
        grace: float = KEY_GRACE_SECONDS,
        lookups_per_second: float = LOOKUPS_PER_SECOND,
    ) -> None:
        self._engine = engine
        self._refresh = refresh
        self._grace = grace
        self._rate = lookups_per_second
        self._tokens = lookups_per_second
        self._asked: dict[str, asyncio.Task[Caller | None]] = {}
        self._tokens_at = time.monotonic()
        self._callers: dict[str, Caller] = {}
        self._state: tuple[object, ...] = ()
        self._read_at: float | None = None
        self._misses: OrderedDict[str, float] = OrderedDict()
        # A pool of its own: a database that hangs holds up nobody else's work in threads.
        self._lookups = ThreadPoolExecutor(1, "key-lookup")
        self._stop = threading.Event()
        self._replacing = threading.Lock()
        self._thread: threading.Thread | None = None
        self.sql_up = True
        """False while the last refresh failed; an alarm, as a revoked key stays valid meanwhile."""

    def start(self) -> None:
        """Reads all keys once and keeps them fresh. SQL may be away: nobody is known then."""
        self._try_refresh()
        self._thread = threading.Thread(target=self._run, name="key-directory", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)
        self._lookups.shutdown(wait=False, cancel_futures=True)

    def refresh(self) -> None:
        """Reads all keys. Raises UnavailableError."""
        started = time.monotonic()
        table = api_keys.c
        # Keys are only added and revoked: while these stand still, so does the map.
        changes = sa.select(
            sa.func.count(),
            sa.func.count(table.revoked_at),
            sa.func.max(table.created_at),
            sa.func.max(table.revoked_at),
        ).select_from(api_keys)
        valid = sa.select(api_keys).where(table.revoked_at.is_(None))
        try:
            with self._replacing:
                with self._engine.connect() as connection:
                    state = tuple(connection.execute(changes).one())
                    if state != self._state:
                        self._callers = {row.key_hash: _caller(row) for row in connection.execute(valid)}
                        self._state = state
                self._read_at = started
        except SQLAlchemyError as error:
            raise unavailable(error) from None
        self.sql_up = True

    def find(self, key_hash: str) -> Caller | None:
        """From memory. Raises UnavailableError when the last reading is older than the grace.

        The map is searched by a keyed hash: what its timing tells says nothing about any key.
        """
        read_at = self._read_at
        if read_at is None or time.monotonic() - read_at > self._grace:
            if self.sql_up:
                return None
            raise UnavailableError("API keys cannot be checked: the ledger database is away")
        return self._callers.get(key_hash)

    async def find_new(self, key_hash: str) -> Caller | None:
        """Asks SQL for a hash that is not in memory.

        Raises UnavailableError when SQL does not answer: whether the key is valid is not known then.
        """
        asked = self._asked.get(key_hash)
        if asked is None:
            now = time.monotonic()
            missed_at = self._misses.get(key_hash)
            if missed_at is not None and now - missed_at < MISS_SECONDS:
                return None
            self._tokens = min(self._rate, self._tokens + (now - self._tokens_at) * self._rate)
            self._tokens_at = now
            if self._tokens < 1:
                # A flood of unknown keys: nobody is told that a key is unknown before it was looked up.
                raise UnavailableError("too many unknown API keys are being looked up")
            self._tokens -= 1
            # A burst of requests with one new key asks once.
            asked = asyncio.get_running_loop().create_task(self._ask(key_hash))
            self._asked[key_hash] = asked
            asked.add_done_callback(lambda _: self._asked.pop(key_hash, None))
        return await asyncio.shield(asked)

    async def _ask(self, key_hash: str) -> Caller | None:
        loop = asyncio.get_running_loop()
        try:
            caller = await asyncio.wait_for(
                loop.run_in_executor(self._lookups, self._look_up, key_hash), LOOKUP_SECONDS
            )
        except TimeoutError:
            raise UnavailableError("API keys cannot be checked: the ledger database is slow") from None
        if caller is None:
            self._misses[key_hash] = time.monotonic()
            self._misses.move_to_end(key_hash)
            while len(self._misses) > MAX_MISSES:
                self._misses.popitem(last=False)
        return caller

    def _look_up(self, key_hash: str) -> Caller | None:
        query = sa.select(api_keys).where(api_keys.c.key_hash == key_hash, api_keys.c.revoked_at.is_(None))
        try:
            with self._replacing:  # a refresh in progress must not put an older state over this one
                with self._engine.connect() as connection:
                    row = connection.execute(query).one_or_none()
                if row is None:
                    return None
                caller = _caller(row)
                self._callers = {**self._callers, key_hash: caller}
                return caller
        except SQLAlchemyError as error:
            raise unavailable(error) from None

    def _run(self) -> None:
        while not self._stop.wait(self._refresh):
            self._try_refresh()

    def _try_refresh(self) -> None:
        try:
            self.refresh()
        except UnavailableError as error:
            if self.sql_up:
                log.error("%s; known API keys stay valid for %d s", error, self._grace)
            self.sql_up = False
        except Exception:
            log.exception("the key directory could not be refreshed and goes on")
            self.sql_up = False
