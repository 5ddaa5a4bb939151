"""A Valkey of a test's own, to be frozen, killed and emptied, and a worker's connection to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from router.adapters.redis_store.connection import RedisConnection
from tests.contracts.valkey_server import ValkeyServer, patient


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    server = ValkeyServer()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
async def connection(server: ValkeyServer) -> AsyncIterator[RedisConnection]:
    connection = patient(server.url)
    yield connection
    await connection.close()
