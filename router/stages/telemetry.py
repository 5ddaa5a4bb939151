"""What the stages report about themselves. The adapter that counts it is chosen in `router/app.py`."""

from __future__ import annotations

from typing import Protocol

from router.core.types import RequestRecord


class Telemetry(Protocol):
    """Counters. Every call is cheap and never raises."""

    def settled(self, record: RequestRecord) -> None: ...

    def refused(self, reason: str) -> None: ...

    def semantic(self, outcome: str, seconds: float) -> None:
        """The semantic cache looked. `outcome`: hit, would_serve, below (the threshold), refused (by the guard), none
        (nothing near), or why it did not: busy, loading, away, timeout, late, error.
        """
        ...
