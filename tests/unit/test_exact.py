"""How old an answer from the exact cache may be, and what becomes of a hit whose caller leaves."""

from __future__ import annotations

import asyncio
from typing import NoReturn

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


async def test_who_leaves_while_a_hit_is_put_into_form_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    await rig.ask()
    left = asyncio.Event()

    async def slow(*_: object) -> NoReturn:
        left.set()
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr("router.pipeline.stored_answer", slow)
    asking = asyncio.create_task(rig.ask())
    await left.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    first, hit = rig.journal.settled
    assert (hit.status, hit.cache, hit.cache_entry, hit.cost) == ("cancelled", "exact", first.id, 0)
