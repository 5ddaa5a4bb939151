"""Budgets and caches shared by several workers, in Redis or Valkey (7.2 or newer)."""

from router.adapters.redis_store.budgets import RedisBudgetStore
from router.adapters.redis_store.caches import RedisCacheStore
from router.adapters.redis_store.connection import RedisConnection, RedisStatus, connect
from router.adapters.redis_store.flights import RedisFlightBoard
from router.adapters.redis_store.semantic import RedisSemanticStore

__all__ = [
    "RedisBudgetStore",
    "RedisCacheStore",
    "RedisConnection",
    "RedisFlightBoard",
    "RedisSemanticStore",
    "RedisStatus",
    "connect",
]
