"""Whether all workers on one Redis hash keys alike: a fingerprint of the secret lies in Redis, and each compares."""

from __future__ import annotations

import hmac
from hashlib import sha256
from typing import Any

from router.adapters.redis_store.connection import RedisConnection

FINGERPRINT_KEY = "farthing:secret-check"


def secret_fingerprint(secret: bytes) -> str:
    """Tells two secrets apart and nothing else about them: HMAC-SHA256 (RFC 2104), 16 bytes as hex."""
    return hmac.new(secret, FINGERPRINT_KEY.encode(), sha256).hexdigest()[:32]


async def shares_secret(connection: RedisConnection, secret: bytes) -> bool:
    """Stores the fingerprint where there is none yet, and compares. Raises UnavailableError when Redis is away."""
    ours = secret_fingerprint(secret)
    await connection.execute("SET", FINGERPRINT_KEY, ours, "NX", trial=True)
    reply: Any = await connection.execute("GET", FINGERPRINT_KEY, trial=True)
    stored = reply if isinstance(reply, bytes) else str(reply).encode()
    return hmac.compare_digest(stored, ours.encode())
