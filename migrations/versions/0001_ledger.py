"""The ledger, its rollups, keys and policy history."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

TIME = sa.DateTime(timezone=True).with_variant(sa.Text(), "sqlite")
SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
APPEND_ONLY = ("price_records", "requests", "attempts", "cost_lines", "adjustments")


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("key_hash", sa.Text(), nullable=False),
        sa.Column("team", sa.Text(), nullable=False),
        sa.Column("app", sa.Text(), nullable=True),
        sa.Column("tags", sa.Text(), nullable=False),
        sa.Column("adopted", sa.Boolean(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("revoked_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("key_hash", name="uq_api_keys_key_hash"),
    )
    op.create_table(
        "budget_spend",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("period", sa.Text(), nullable=False),
        sa.Column("spent", sa.BigInteger(), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("key", "period", name="pk_budget_spend"),
    )
    op.create_table(
        "policy_versions",
        sa.Column("id", SERIAL, nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.Column("loaded_at", TIME, nullable=False),
        sa.Column("providers", sa.Text(), nullable=False),
        sa.Column("policy", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_policy_versions"),
    )
    op.create_index("ix_policy_versions_hash", "policy_versions", ["hash"])
    op.create_table(
        "price_records",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("effective_from", TIME, nullable=False),
        sa.Column("unit_prices", sa.Text(), nullable=False),
        sa.Column("list_prices", sa.Text(), nullable=False),
        sa.Column("marginal_prices", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("contract", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_price_records"),
    )
    op.create_table(
        "requests",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("opened_at", TIME, nullable=False),
        sa.Column("settled_at", TIME, nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("team", sa.Text(), nullable=False),
        sa.Column("app", sa.Text(), nullable=True),
        sa.Column("cost_center", sa.Text(), nullable=True),
        sa.Column("tags", sa.Text(), nullable=False),
        sa.Column("endpoint", sa.Text(), nullable=False),
        sa.Column("caller_request_id", sa.Text(), nullable=True),
        sa.Column("requested_model", sa.Text(), nullable=False),
        sa.Column("baseline_model", sa.Text(), nullable=True),
        sa.Column("served_model", sa.Text(), nullable=True),
        sa.Column("served_provider", sa.Text(), nullable=True),
        sa.Column("streamed", sa.Boolean(), nullable=False),
        sa.Column("prompt_class", sa.Text(), nullable=True),
        sa.Column("difficulty", sa.Float(53), nullable=True),
        sa.Column("confidence", sa.Float(53), nullable=True),
        sa.Column("encoder", sa.Text(), nullable=True),
        sa.Column("decision", sa.Text(), nullable=False),
        sa.Column("dropped", sa.Text(), nullable=False),
        sa.Column("propensity", sa.Float(53), nullable=False),
        sa.Column("policy_hash", sa.Text(), nullable=False),
        sa.Column("exceptions", sa.Text(), nullable=False),
        sa.Column("budgets", sa.Text(), nullable=False),
        sa.Column("cache", sa.Text(), nullable=False),
        sa.Column("cache_entry", sa.Text(), nullable=True),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("http_status", sa.Integer(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("estimated", sa.Boolean(), nullable=False),
        sa.Column("unpriced", sa.Boolean(), nullable=False),
        sa.Column("tokens_input", sa.BigInteger(), nullable=False),
        sa.Column("tokens_input_cached", sa.BigInteger(), nullable=False),
        sa.Column("tokens_cache_write", sa.BigInteger(), nullable=False),
        sa.Column("tokens_input_audio", sa.BigInteger(), nullable=False),
        sa.Column("tokens_input_image", sa.BigInteger(), nullable=False),
        sa.Column("tokens_output", sa.BigInteger(), nullable=False),
        sa.Column("tokens_output_reasoning", sa.BigInteger(), nullable=False),
        sa.Column("tokens_output_audio", sa.BigInteger(), nullable=False),
        sa.Column("worst_case", sa.BigInteger(), nullable=False),
        sa.Column("cost", sa.BigInteger(), nullable=True),
        sa.Column("baseline", sa.BigInteger(), nullable=True),
        sa.Column("routing_savings", sa.BigInteger(), nullable=True),
        sa.Column("cache_savings", sa.BigInteger(), nullable=True),
        sa.Column("overhead", sa.BigInteger(), nullable=True),
        sa.Column("potential_savings", sa.BigInteger(), nullable=True),
        sa.Column("first_token_ms", sa.Float(53), nullable=True),
        sa.Column("duration_ms", sa.Float(53), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_requests"),
    )
    op.create_index("ix_requests_opened_at", "requests", ["opened_at"])
    op.create_table(
        "spend_rollup",
        sa.Column("day", sa.Text(), nullable=False),
        sa.Column("period", sa.Text(), nullable=False),
        sa.Column("team", sa.Text(), nullable=False),
        sa.Column("app", sa.Text(), nullable=False),
        sa.Column("cost_center", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("prompt_class", sa.Text(), nullable=False),
        sa.Column("cache", sa.Text(), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("estimated", sa.BigInteger(), nullable=False),
        sa.Column("unpriced", sa.BigInteger(), nullable=False),
        sa.Column("failed", sa.BigInteger(), nullable=False),
        sa.Column("tokens_input", sa.BigInteger(), nullable=False),
        sa.Column("tokens_input_cached", sa.BigInteger(), nullable=False),
        sa.Column("tokens_cache_write", sa.BigInteger(), nullable=False),
        sa.Column("tokens_input_audio", sa.BigInteger(), nullable=False),
        sa.Column("tokens_input_image", sa.BigInteger(), nullable=False),
        sa.Column("tokens_output", sa.BigInteger(), nullable=False),
        sa.Column("tokens_output_reasoning", sa.BigInteger(), nullable=False),
        sa.Column("tokens_output_audio", sa.BigInteger(), nullable=False),
        sa.Column("cost", sa.BigInteger(), nullable=False),
        sa.Column("saving_requests", sa.BigInteger(), nullable=False),
        sa.Column("saving_cost", sa.BigInteger(), nullable=False),
        sa.Column("baseline", sa.BigInteger(), nullable=False),
        sa.Column("routing_savings", sa.BigInteger(), nullable=False),
        sa.Column("cache_savings", sa.BigInteger(), nullable=False),
        sa.Column("overhead", sa.BigInteger(), nullable=False),
        sa.Column("potential_requests", sa.BigInteger(), nullable=False),
        sa.Column("potential_savings", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint(
            "day",
            "period",
            "team",
            "app",
            "cost_center",
            "model",
            "provider",
            "prompt_class",
            "cache",
            name="pk_spend_rollup",
        ),
    )
    op.create_table(
        "adjustments",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("author", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["request_id"], ["requests.id"], name="fk_adjustments_request_id"),
        sa.PrimaryKeyConstraint("id", name="pk_adjustments"),
    )
    op.create_index("ix_adjustments_request_id", "adjustments", ["request_id"])
    op.create_table(
        "attempts",
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("upstream_model", sa.Text(), nullable=False),
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("status_code", sa.Integer(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("first_token_ms", sa.Float(53), nullable=True),
        sa.Column("duration_ms", sa.Float(53), nullable=False),
        sa.Column("tokens_input", sa.BigInteger(), nullable=False),
        sa.Column("tokens_input_cached", sa.BigInteger(), nullable=False),
        sa.Column("tokens_cache_write", sa.BigInteger(), nullable=False),
        sa.Column("tokens_input_audio", sa.BigInteger(), nullable=False),
        sa.Column("tokens_input_image", sa.BigInteger(), nullable=False),
        sa.Column("tokens_output", sa.BigInteger(), nullable=False),
        sa.Column("tokens_output_reasoning", sa.BigInteger(), nullable=False),
        sa.Column("tokens_output_audio", sa.BigInteger(), nullable=False),
        sa.Column("estimated", sa.Boolean(), nullable=False),
        sa.Column("cost", sa.BigInteger(), nullable=True),
        sa.Column("price_id", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["price_id"], ["price_records.id"], name="fk_attempts_price_id"),
        sa.ForeignKeyConstraint(["request_id"], ["requests.id"], name="fk_attempts_request_id"),
        sa.PrimaryKeyConstraint("request_id", "attempt", name="pk_attempts"),
    )
    op.create_table(
        "cost_lines",
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False, autoincrement=False),
        sa.Column("bucket", sa.Text(), nullable=False),
        sa.Column("quantity", sa.BigInteger(), nullable=False),
        sa.Column("unit_price", sa.BigInteger(), nullable=False),
        sa.Column("list_price", sa.BigInteger(), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("list_amount", sa.BigInteger(), nullable=False),
        sa.Column("price_id", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["price_id"], ["price_records.id"], name="fk_cost_lines_price_id"),
        sa.ForeignKeyConstraint(
            ["request_id", "attempt"],
            ["attempts.request_id", "attempts.attempt"],
            name="fk_cost_lines_request_id",
        ),
        sa.PrimaryKeyConstraint("request_id", "attempt", "bucket", name="pk_cost_lines"),
    )
    if op.get_bind().dialect.name == "sqlite":
        _sqlite_triggers()
    else:
        _postgresql_triggers()


def _sqlite_triggers() -> None:
    for table in APPEND_ONLY:
        for verb in ("update", "delete"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{verb} BEFORE {verb.upper()} ON {table} BEGIN "
                f"SELECT RAISE(ABORT, '{table} is append-only: book an adjustment'); END"
            )


def _postgresql_triggers() -> None:
    op.execute(
        "CREATE FUNCTION farthing_append_only() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE EXCEPTION '% is append-only: book an adjustment', TG_TABLE_NAME; END $$"
    )
    for table in APPEND_ONLY:
        op.execute(
            f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION farthing_append_only()"
        )
