"""How old an answer from the exact cache may be."""

from __future__ import annotations

import pytest

from tests.unit.pipeline_parts import POLICY, PROVIDERS, Rig, _snapshot


@pytest.mark.parametrize(("ttl", "calls"), [("1h", 2), ("23h", 1)])
async def test_the_time_to_live_is_the_readers_not_the_writers(ttl: str, calls: int) -> None:
    rig = Rig()
    await rig.ask()
    rig.snapshot = _snapshot(
        PROVIDERS, POLICY.replace("fallback: [second] }", f"fallback: [second], cache: {{ ttl: {ttl} }} }}")
    )
    rig.clock.advance(2 * 3600)
    await rig.ask()
    assert len(rig.wire.calls) == calls
