"""What holds for every test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from hypothesis import HealthCheck, settings

from tests.steady import SteadyLoop

# Two cores that others use as well: how long one example takes says nothing.
settings.register_profile("farthing", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("farthing")


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """A machine that stands still for a moment must not strike the time limits under test."""
    return {"steady": SteadyLoop}
