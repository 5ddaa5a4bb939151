"""Clock, identifiers and randomness of the real world."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def now(self) -> datetime:
        return datetime.now(UTC)


class RequestIdentifiers:
    """UUIDv7 (RFC 9562, section 5.7): milliseconds, then random bits; sorts by time of creation."""

    def request_id(self) -> str:
        milliseconds = time.time_ns() // 1_000_000
        value = bytearray(milliseconds.to_bytes(6, "big") + os.urandom(10))
        value[6] = 0x70 | (value[6] & 0x0F)
        value[8] = 0x80 | (value[8] & 0x3F)
        text = value.hex()
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
