"""Alembic's entry. The connection and its transaction are the caller's (`router.adapters.sql.database`)."""

from alembic import context

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=None, transactional_ddl=False)
context.run_migrations()
