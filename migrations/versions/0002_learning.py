"""What is learned from: features of prompts, labels of answers, and the artefacts fitted on them."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

TIME = sa.DateTime(timezone=True).with_variant(sa.Text(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "request_features",
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("encoder_id", sa.Text(), nullable=False),
        sa.Column("features", sa.LargeBinary(), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["request_id"], ["requests.id"], name="fk_request_features_request_id"),
        sa.PrimaryKeyConstraint("request_id", name="pk_request_features"),
    )
    op.create_table(
        "labels",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("score", sa.Float(53), nullable=False),
        sa.Column("weight", sa.Float(53), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("propensity", sa.Float(53), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("team", sa.Text(), nullable=False),
        sa.Column("comment", sa.Text(), nullable=True),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_labels"),
        sa.UniqueConstraint(
            "request_id", "model", "source", "key_id", "revision", name="uq_labels_request_id"
        ),
    )
    op.create_index("ix_labels_at", "labels", ["at"])
    op.create_table(
        "artefacts",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("encoder_id", sa.Text(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("card", sa.Text(), nullable=False),
        sa.Column("active", sa.Boolean(), nullable=False),
        sa.Column("activated_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_artefacts"),
    )
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("update", "delete"):
            op.execute(
                f"CREATE TRIGGER labels_no_{verb} BEFORE {verb.upper()} ON labels BEGIN "
                "SELECT RAISE(ABORT, 'labels is append-only: add a revision'); END"
            )
    else:
        op.execute(
            "CREATE TRIGGER labels_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON labels "
            "FOR EACH STATEMENT EXECUTE FUNCTION farthing_append_only()"
        )
