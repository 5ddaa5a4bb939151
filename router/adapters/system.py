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

    def __init__(self) -> None:
        self._random = b""
        self._at = 0

    def request_id(self) -> str:
        milliseconds = time.time_ns() // 1_000_000
        if self._at >= len(self._random):  # asked for many at once: each time costs a system call
            self._random, self._at = os.urandom(10 * 256), 0
        value = bytearray(milliseconds.to_bytes(6, "big") + self._random[self._at : self._at + 10])
        self._at += 10
        value[6] = 0x70 | (value[6] & 0x0F)
        value[8] = 0x80 | (value[8] & 0x3F)
        text = value.hex()
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
