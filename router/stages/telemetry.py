"""What the stages report about themselves. The adapter that counts it is chosen in `router/app.py`."""

from __future__ import annotations

from typing import Protocol

from router.core.types import RequestRecord


class Telemetry(Protocol):
    """Counters. Every call is cheap and never raises."""

    def settled(self, record: RequestRecord) -> None: ...

    def refused(self, reason: str) -> None: ...

    def semantic_shadow(self, near: bool) -> None:
        """The semantic cache looked; `near`: a stored prompt was close enough to be judged."""
        ...
