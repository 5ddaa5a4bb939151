"""What holds for every test."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Two cores that others use as well: how long one example takes says nothing.
settings.register_profile("farthing", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("farthing")
