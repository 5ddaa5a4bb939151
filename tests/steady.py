"""Time that passes only while this process is let run.

A machine of tests stands still now and then, for a second or two, or runs at a quarter of its speed. A time limit
that is reached meanwhile says nothing about the product. So time is counted in small steps here, and a step that
took longer counts as LONGEST: what comes late because nobody ran does not come too late.
"""

from __future__ import annotations

import asyncio
import selectors
import threading
import time

STEP = 0.005
LONGEST = 0.01
"""Seconds. Whoever sleeps for a few hundredths has thus slept for steps in which all others ran as well."""


class _Steps(selectors.DefaultSelector):
    """Waits for a step at most."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(STEP if timeout is None else min(timeout, STEP))


class SteadyLoop(asyncio.SelectorEventLoop):
    """An event loop by this time: `sleep`, `timeout` and every limit built on them."""

    def __init__(self) -> None:
        self._seen = self._now = time.monotonic()
        super().__init__(_Steps())

    def time(self) -> float:
        seen = time.monotonic()
        self._now += min(seen - self._seen, LONGEST)
        self._seen = seen
        return self._now


class Stopwatch:
    """Measures a block by this time, for tests without an event loop: `with Stopwatch() as watch: ...`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._count, daemon=True)

    def __enter__(self) -> Stopwatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _count(self) -> None:
        seen = time.monotonic()
        ended = False
        while not ended:
            ended = self._end.wait(STEP)
            now = time.monotonic()
            self.seconds += min(now - seen, LONGEST)
            seen = now
