"""Which two prompts an answer by likeness was for, so that a wrong one does not come back with the next entry."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("cache_candidates", sa.Column("pair", sa.Text(), nullable=True))
