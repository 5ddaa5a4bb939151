"""The history of the two files, for `policy history` and `rollback`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from router.adapters.sql.database import unavailable, writing
from router.adapters.sql.schema import policy_versions

TAKEN_UP_WITHIN = timedelta(seconds=5)
"""Every worker loads a change within this time."""


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """A pair of files as it was loaded; they hold no secret."""

    hash: str
    loaded_at: datetime
    providers: str
    policy: str


def record_policy(engine: Engine, version: PolicyVersion) -> bool:
    """Keeps a loaded pair unless it is the newest one of its time already: when the database was away, another worker
    may have kept later ones too. Blocks; raises UnavailableError.
    """
    newest = (
        sa.select(policy_versions.c.hash)
        .where(policy_versions.c.loaded_at <= version.loaded_at + TAKEN_UP_WITHIN)
        .order_by(policy_versions.c.id.desc())
        .limit(1)
    )
    try:
        with writing(engine) as connection:
            if connection.dialect.name == "postgresql":
                # Workers load the same change at the same moment: one of them records it.
                connection.execute(sa.text("LOCK TABLE policy_versions IN SHARE ROW EXCLUSIVE MODE"))
            if connection.scalar(newest) == version.hash:
                return False
            connection.execute(
                sa.insert(policy_versions).values(
                    hash=version.hash,
                    loaded_at=version.loaded_at,
                    providers=version.providers,
                    policy=version.policy,
                )
            )
    except SQLAlchemyError as error:
        raise unavailable(error) from None
    return True


def policy_history(engine: Engine, limit: int = 50) -> list[PolicyVersion]:
    """The newest first. Raises UnavailableError."""
    query = sa.select(policy_versions).order_by(policy_versions.c.id.desc()).limit(limit)
    return _versions(engine, query)


def policy_version(engine: Engine, hash_prefix: str) -> PolicyVersion | None:
    """The newest load of the version whose hash begins so; None: there is none. Raises UnavailableError."""
    begins = policy_versions.c.hash.startswith(hash_prefix, autoescape=True)
    query = sa.select(policy_versions).where(begins).order_by(policy_versions.c.id.desc()).limit(1)
    return next(iter(_versions(engine, query)), None)


def _versions(engine: Engine, query: sa.Select[tuple[object, ...]]) -> list[PolicyVersion]:
    try:
        with engine.connect() as connection:
            return [
                PolicyVersion(row.hash, row.loaded_at, row.providers, row.policy)
                for row in connection.execute(query)
            ]
    except SQLAlchemyError as error:
        raise unavailable(error) from None
