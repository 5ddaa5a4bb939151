"""What a scope's labels say while nobody has weighed them, and where they cannot be weighed."""

from __future__ import annotations

import dataclasses

import pytest

from router.adapters.memory import ManualClock
from router.adapters.memory_cache_book import MemoryCacheBook
from router.stages.evidence import JUDGE, Evidence
from tests.unit.semantic_parts import labelled


def judged(clock: ManualClock, right: bool) -> MemoryCacheBook:
    book = MemoryCacheBook()
    labels = labelled("s", 200, clock, lambda _: not right)
    book.book(*(dataclasses.replace(label, source=JUDGE) for label in labels))
    return book


@pytest.mark.parametrize("right", [True, False])
async def test_what_is_not_weighed_yet_serves_nothing(right: bool) -> None:
    clock = ManualClock()
    evidence = Evidence(judged(clock, right), clock.monotonic)
    assert evidence.standing("s", 0.05, lambda: 0.9).broken
    assert not evidence.standing("without labels", 0.05, lambda: 0.9).broken
    await evidence.settled()
    assert evidence.standing("s", 0.05, lambda: 0.9).broken is not right


async def test_what_cannot_be_weighed_serves_nothing_and_is_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = ManualClock()
    evidence = Evidence(judged(clock, True), clock.monotonic)
    tries = 0

    def shipped() -> float:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise RuntimeError("no memory")
        return 0.9

    async def later(seconds: float) -> bool:
        clock.advance(seconds)
        evidence.standing("s", 0.05, shipped)
        await evidence.settled()
        return evidence.standing("s", 0.05, shipped).broken

    assert await later(0)
    assert "could not be weighed" in caplog.text
    assert await later(30)
    assert tries == 1
    assert not await later(31)
