"""What a scope's labels say while nobody has weighed them, and where they cannot be weighed."""

from __future__ import annotations

import dataclasses
import random

import pytest

from router.adapters.memory import ManualClock
from router.adapters.memory_cache_book import MemoryCacheBook
from router.core.cached import CacheLabel
from router.stages.evidence import JUDGE, Evidence, certified, counted
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


def said(clock: ManualClock, keys: str, wrong: str = "") -> list[CacheLabel]:
    """A label of each letter's key; of keys in `wrong` the stored answer is wrong."""
    labels = labelled("s", len(keys), clock, lambda _: False)
    return [
        dataclasses.replace(label, key_id=key, right=key not in wrong)
        for label, key in zip(labels, keys, strict=True)
    ]


def counting(keys: str) -> str:
    return "".join(label.key_id for label in counted(said(ManualClock(), keys)))


def test_a_key_counts_at_most_as_often_as_all_others() -> None:
    assert counting("aaaa") == "aaaa"
    assert counting("aaaab") == "ab"
    assert counting("aaaabcc") == "abacac"
    assert counting("abcabc") == "abcabc"
    assert counting("") == ""


def test_what_counts_is_only_added_to_and_depends_on_nothing_later() -> None:
    rng = random.Random(4)
    keys = "ab" + "".join(rng.choices("aaaaaabcd", k=300))
    last = ""
    for end in range(2, len(keys)):
        now = counting(keys[:end])
        assert now.startswith(last)
        last = now
    for key in "abcd":
        assert last.count(key) <= len(keys[:-1]) - keys[:-1].count(key)


def test_labels_of_one_key_do_not_certify_for_the_others() -> None:
    clock = ManualClock()
    rng = random.Random(1)
    keys = ["f"] * 1500 + ["w"] * 5 + ["r"] * 10
    rng.shuffle(keys)
    standing, _ = certified(said(clock, "".join(keys), wrong="w"), None, 0.01)
    assert standing.threshold is None
    alone, _ = certified(said(clock, "f" * 1500), None, 0.01)
    assert alone.threshold is not None
    shared, _ = certified(said(clock, "abc" * 500), None, 0.01)
    assert shared.threshold == alone.threshold


def test_labels_of_one_key_do_not_drown_what_others_find() -> None:
    clock = ManualClock()
    labels = said(clock, "ab" * 800 + "aaaaaaaaaaaaaaaaaaaaw" * 40, wrong="w")
    standing, _ = certified(labels, None, 0.05)
    assert standing.threshold is not None
    assert standing.broken
