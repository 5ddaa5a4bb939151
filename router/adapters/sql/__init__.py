"""The ledger in SQL: SQLite by default, PostgreSQL in production, the same tables on both."""
