"""One suite for both cache stores."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest

from router.adapters.memory import ManualClock, MemoryCacheStore
from router.adapters.redis_store import RedisCacheStore
from router.adapters.system import SystemClock
from router.core.ports import CacheStore
from tests.contracts.valkey_server import patient, valkey_server  # noqa: F401


@pytest.fixture(params=["memory", "valkey"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[CacheStore]:
    if request.param == "memory":
        memory = MemoryCacheStore(SystemClock(), max_value_bytes=10_000)
        yield memory
        await memory.close()
    else:
        connection = patient(request.getfixturevalue("valkey_server").url)
        redis = RedisCacheStore(connection, max_value_bytes=10_000)
        yield redis
        await redis.close()
        await connection.close()


@pytest.fixture
def key() -> str:
    return uuid.uuid4().hex


async def test_a_value_comes_back_byte_for_byte(store: CacheStore, key: str) -> None:
    value = bytes(range(256)) * 10
    assert await store.get(key) is None
    store.put(key, value, 60)
    assert await store.get(key) == value
    await asyncio.sleep(0.05)
    assert await store.get(key) == value


async def test_the_newest_value_wins(store: CacheStore, key: str) -> None:
    store.put(key, b"one", 60)
    store.put(key, b"two", 60)
    assert await store.get(key) == b"two"
    await asyncio.sleep(0.05)
    assert await store.get(key) == b"two"


async def test_a_value_expires(store: CacheStore, key: str) -> None:
    store.put(key, b"short", 0.15)
    store.put(key + "b", b"long", 60)
    for _ in range(3000):
        await asyncio.sleep(0.02)
        if await store.get(key) is None:
            break
    assert await store.get(key) is None
    assert await store.get(key + "b") == b"long"


async def test_a_life_of_nothing_is_not_stored(store: CacheStore, key: str) -> None:
    store.put(key, b"never", 0)
    await asyncio.sleep(0.03)
    assert await store.get(key) is None


async def test_a_deleted_value_is_gone_even_while_it_is_written(store: CacheStore, key: str) -> None:
    store.put(key, b"value", 60)
    await asyncio.sleep(0)
    await store.delete(key)
    assert await store.get(key) is None
    await asyncio.sleep(0.05)
    assert await store.get(key) is None
    await store.delete(key)


async def test_a_value_too_large_is_not_kept(store: CacheStore, key: str) -> None:
    store.put(key, b"x" * 10_001, 60)
    await asyncio.sleep(0.03)
    assert await store.get(key) is None


async def test_memory_is_bounded_and_the_least_recently_used_goes_first() -> None:
    clock = ManualClock()
    store = MemoryCacheStore(clock, max_bytes=10_000)
    for name in ("a", "b", "c"):
        store.put(name, b"x" * 3000, 60)
    assert await store.get("a") is not None
    store.put("d", b"x" * 3000, 60)
    assert await store.get("b") is None
    assert [await store.get(name) is not None for name in ("a", "c", "d")] == [True, True, True]
    assert store.size <= 10_000
    clock.advance(60)
    assert await store.get("a") is None
    for name in ("c", "d"):
        await store.delete(name)
    assert store.size == 0
