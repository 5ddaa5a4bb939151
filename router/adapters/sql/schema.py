"""The tables. `migrations/` creates them; a test holds both equal.

Money is BIGINT nano-USD. Times are UTC: TIMESTAMPTZ on PostgreSQL, on SQLite ISO 8601 text of fixed width
(microseconds, `+00:00`), which sorts as time does. Lists and mappings are JSON text. Rollups say '' where a
request has no value, because a primary key holds no NULL.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator, TypeEngine

from router.core.types import BUCKETS

SCHEMA_VERSION = "0004"
"""The migration this code needs; compared at start without loading alembic."""

APPEND_ONLY = (
    "price_records",
    "requests",
    "attempts",
    "cost_lines",
    "adjustments",
    "labels",
    "cache_candidates",
    "cache_labels",
    "cache_invalidations",
)


def iso_utc(value: datetime) -> str:
    """SQLite's form of a time. `value` must know its offset."""
    if value.tzinfo is not UTC:
        value = value.astimezone(UTC)
    return value.isoformat(timespec="microseconds")


class UTCTime(TypeDecorator[datetime]):
    """An aware datetime in UTC on both databases."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "sqlite":
            return dialect.type_descriptor(Text())
        return dialect.type_descriptor(DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None or dialect.name != "sqlite":
            return value
        return iso_utc(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if isinstance(value, str):
            return datetime.fromisoformat(value)
        assert isinstance(value, datetime)
        return value.astimezone(UTC)


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

SERIAL = BigInteger().with_variant(Integer(), "sqlite")


def _tokens(prefix: str = "tokens_") -> list[Column[int]]:
    return [Column(prefix + bucket, BigInteger, nullable=False) for bucket in BUCKETS]


TOKEN_COLUMNS = tuple("tokens_" + bucket for bucket in BUCKETS)

price_records = Table(
    "price_records",
    metadata,
    Column("id", Text, primary_key=True),
    Column("provider", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("effective_from", UTCTime, nullable=False),
    Column("unit_prices", Text, nullable=False),
    Column("list_prices", Text, nullable=False),
    Column("marginal_prices", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("contract", Text),
)

requests = Table(
    "requests",
    metadata,
    Column("id", Text, primary_key=True),
    Column("opened_at", UTCTime, nullable=False),
    Column("settled_at", UTCTime, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("team", Text, nullable=False),
    Column("app", Text),
    Column("cost_center", Text),
    Column("tags", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("caller_request_id", Text),
    Column("requested_model", Text, nullable=False),
    Column("baseline_model", Text),
    Column("served_model", Text),
    Column("served_provider", Text),
    Column("streamed", Boolean, nullable=False),
    Column("prompt_class", Text),
    Column("difficulty", Float(53)),
    Column("confidence", Float(53)),
    Column("encoder", Text),
    Column("decision", Text, nullable=False),
    Column("dropped", Text, nullable=False),
    Column("propensity", Float(53), nullable=False),
    Column("policy_hash", Text, nullable=False),
    Column("exceptions", Text, nullable=False),
    Column("budgets", Text, nullable=False),
    Column("cache", Text, nullable=False),
    Column("cache_entry", Text),
    Column("status", Text, nullable=False),
    Column("http_status", Integer, nullable=False),
    Column("error", Text),
    Column("estimated", Boolean, nullable=False),
    Column("unpriced", Boolean, nullable=False),
    *_tokens(),
    Column("worst_case", BigInteger, nullable=False),
    Column("cost", BigInteger),
    Column("baseline", BigInteger),
    Column("routing_savings", BigInteger),
    Column("cache_savings", BigInteger),
    Column("overhead", BigInteger),
    Column("potential_savings", BigInteger),
    Column("first_token_ms", Float(53)),
    Column("duration_ms", Float(53), nullable=False),
    Index("ix_requests_opened_at", "opened_at"),
)

attempts = Table(
    "attempts",
    metadata,
    Column("request_id", Text, ForeignKey("requests.id"), primary_key=True),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("provider", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("upstream_model", Text, nullable=False),
    Column("started_at", UTCTime, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("status_code", Integer),
    Column("error", Text),
    Column("first_token_ms", Float(53)),
    Column("duration_ms", Float(53), nullable=False),
    *_tokens(),
    Column("estimated", Boolean, nullable=False),
    Column("cost", BigInteger),
    Column("price_id", Text, ForeignKey("price_records.id")),
)

cost_lines = Table(
    "cost_lines",
    metadata,
    Column("request_id", Text, primary_key=True),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("bucket", Text, primary_key=True),
    Column("quantity", BigInteger, nullable=False),
    Column("unit_price", BigInteger, nullable=False),
    Column("list_price", BigInteger, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("list_amount", BigInteger, nullable=False),
    Column("price_id", Text, ForeignKey("price_records.id"), nullable=False),
    ForeignKeyConstraint(["request_id", "attempt"], ["attempts.request_id", "attempts.attempt"]),
)

adjustments = Table(
    "adjustments",
    metadata,
    Column("id", Text, primary_key=True),
    Column("request_id", Text, ForeignKey("requests.id"), nullable=False),
    Column("created_at", UTCTime, nullable=False),
    Column("amount", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    Column("author", Text, nullable=False),
    Index("ix_adjustments_request_id", "request_id"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("key_hash", Text, nullable=False, unique=True),
    Column("team", Text, nullable=False),
    Column("app", Text),
    Column("tags", Text, nullable=False),
    Column("adopted", Boolean, nullable=False),
    Column("created_at", UTCTime, nullable=False),
    Column("revoked_at", UTCTime),
)

policy_versions = Table(
    "policy_versions",
    metadata,
    Column("id", SERIAL, primary_key=True, autoincrement=True),
    Column("hash", Text, nullable=False),
    Column("loaded_at", UTCTime, nullable=False),
    Column("providers", Text, nullable=False),
    Column("policy", Text, nullable=False),
    Index("ix_policy_versions_hash", "hash"),
)

ROLLUP_KEY = (
    "day",
    "period",
    "team",
    "app",
    "cost_center",
    "model",
    "provider",
    "prompt_class",
    "cache",
)
ROLLUP_SUMS = (
    "requests",
    "estimated",
    "unpriced",
    "failed",
    *TOKEN_COLUMNS,
    "cost",
    "saving_requests",
    "saving_cost",
    "baseline",
    "routing_savings",
    "cache_savings",
    "overhead",
    "potential_requests",
    "potential_savings",
)
"""`saving_*`, `baseline` and the parts of the saving sum only the requests whose saving is known, so that
baseline - saving_cost = routing_savings + cache_savings - overhead holds in every row."""

spend_rollup = Table(
    "spend_rollup",
    metadata,
    *(Column(name, Text, primary_key=True) for name in ROLLUP_KEY),
    *(Column(name, BigInteger, nullable=False) for name in ROLLUP_SUMS),
)

budget_spend = Table(
    "budget_spend",
    metadata,
    Column("key", Text, primary_key=True),
    Column("period", Text, primary_key=True),
    Column("spent", BigInteger, nullable=False),
    Column("requests", BigInteger, nullable=False),
)

request_features = Table(
    "request_features",
    metadata,
    Column("request_id", Text, ForeignKey("requests.id"), primary_key=True),
    Column("encoder_id", Text, nullable=False),
    Column("features", LargeBinary, nullable=False),
    Column("prompt", Text),
)
"""Not append-only: what a person wrote can be taken out again."""

labels = Table(
    "labels",
    metadata,
    Column("id", Text, primary_key=True),
    Column("request_id", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("score", Float(53), nullable=False),
    Column("weight", Float(53), nullable=False),
    Column("source", Text, nullable=False),
    Column("propensity", Float(53), nullable=False),
    Column("at", UTCTime, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("team", Text, nullable=False),
    Column("comment", Text),
    Column("revision", Integer, nullable=False),
    UniqueConstraint("request_id", "model", "source", "key_id", "revision", name="uq_labels_request_id"),
    Index("ix_labels_at", "at"),
)
"""The newest revision counts. No foreign key: a label about an earlier request must never keep its own from being
booked."""

artefacts = Table(
    "artefacts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("created_at", UTCTime, nullable=False),
    Column("encoder_id", Text, nullable=False),
    Column("content", LargeBinary, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("card", Text, nullable=False),
    Column("active", Boolean, nullable=False),
    Column("activated_at", UTCTime),
)
"""`sha256` is of `content`, `card` JSON. At most one of a kind is active; none: the priors decide."""

cache_candidates = Table(
    "cache_candidates",
    metadata,
    Column("request_id", Text, ForeignKey("requests.id"), primary_key=True),
    Column("scope", Text, nullable=False),
    Column("entry", Text, nullable=False),
    Column("similarity", Float(53), nullable=False),
    Column("probability", Float(53), nullable=False),
    Column("threshold", Float(53), nullable=False),
    Column("mode", Text, nullable=False),
    Column("served", Boolean, nullable=False),
    Column("would_serve", Boolean, nullable=False),
    Column("saved", BigInteger),
    Column("reasons", Text, nullable=False),
    Column("pair", Text),
)
"""`pair` is empty before schema 0004."""

cache_labels = Table(
    "cache_labels",
    metadata,
    Column("id", SERIAL, primary_key=True, autoincrement=True),
    Column("request_id", Text, nullable=False),
    Column("scope", Text, nullable=False),
    Column("entry", Text, nullable=False),
    Column("score", Float(53), nullable=False),
    Column("correct", Boolean, nullable=False),
    Column("propensity", Float(53), nullable=False),
    Column("source", Text, nullable=False),
    Column("at", UTCTime, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("team", Text, nullable=False),
    Column("app", Text),
    Column("comment", Text),
    Column("revision", Integer, nullable=False),
    UniqueConstraint(
        "request_id", "entry", "source", "key_id", "revision", name="uq_cache_labels_request_id"
    ),
    Index("ix_cache_labels_at", "at"),
)
"""Ids rise in the order of commits (`rules.lock_rows`): the bound reads labels in the order they were booked, and
a reader that has seen an id has seen all before it. Of feedback the newest revision counts.
"""

cache_invalidations = Table(
    "cache_invalidations",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("at", UTCTime, nullable=False),
    Column("kind", Text, nullable=False),
    Column("value", Text, nullable=False),
    Column("by", Text, nullable=False),
    Column("reason", Text),
    Index("ix_cache_invalidations_kind", "kind", "value"),
)
"""Rules of `core.cached.Invalidation`; `by` is `admin`, `cli`, `check` or the id of a key."""
