"""The index of one worker against a plain search, its bounds, and what it never returns."""

from __future__ import annotations

import asyncio
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from router.adapters.memory import ManualClock
from router.core.cached import Origin, SemanticEntry
from router.stages.vector_index import VectorIndex
from tests.values import replace

SKETCH, VECTOR = 16, 24
Floats = NDArray[np.float32]


def unit(seed: int, size: int) -> Floats:
    vector = np.random.default_rng(seed).standard_normal(size)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def entry_of(
    number: int, partition: str = "p", *, ends: float = 1000.0, prompt: str = "Why?"
) -> SemanticEntry:
    now = ManualClock().now().timestamp()
    return SemanticEntry(
        origin=Origin(f"id-{number}", number, "search", "faq", "mini", ("env=prod",), "scope"),
        tenant="tenant",
        partition=partition,
        prompt=f"{prompt} {number}",
        vector=unit(number, VECTOR).astype("<f2").tobytes(),
        sketch=unit(number, SKETCH).astype("<f2").tobytes(),
        encoder_id="minilm-1",
        stored_at=now + number / 1000,
        expires_at=now + ends,
        provider="openai",
        upstream_model="gpt",
        prompt_class="simple",
        usage=(1, 2, 3),
        cost=number,
        policy_hash="rules",
        stream=bool(number % 2),
        body_bytes=10,
    )


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def index(clock: ManualClock) -> VectorIndex:
    return VectorIndex(clock, VECTOR, SKETCH)


def test_entries_come_back_as_they_were(index: VectorIndex) -> None:
    entries = [entry_of(i) for i in range(20)]
    index.replace("p", entries[:10])
    for entry in entries[10:]:
        index.add(entry)
    for i, entry in enumerate(entries):
        (near,) = index.near("p", unit(i, SKETCH), limit=1)
        assert replace(near.entry, sketch=entry.sketch) == entry
        assert near.similarity == pytest.approx(1.0, abs=2e-2)


def test_only_loaded_partitions_are_kept_and_searched(index: VectorIndex) -> None:
    index.add(entry_of(1))
    assert not index.loaded("p")
    assert index.near("p", unit(1, SKETCH), floor=-1.0) == ()
    index.replace("p", [])
    index.replace("q", [entry_of(2, "q"), entry_of(3, "p")])
    assert index.loaded("p")
    assert index.near("p", unit(2, SKETCH), floor=-1.0) == ()
    near = index.near("q", unit(2, SKETCH), floor=-1.0)
    assert [one.entry.id for one in near] == ["id-2"]
    index.forget()
    assert not index.loaded("q")
    assert (index.entries, index.partitions, index.bytes) == (0, 0, 0)


def test_what_has_expired_is_not_returned_and_swept(index: VectorIndex, clock: ManualClock) -> None:
    index.replace("p", [entry_of(i, ends=10.0 + i) for i in range(300)])
    near = index.near("p", unit(5, SKETCH))
    assert near[0].entry.id == "id-5"
    clock.advance(16)
    assert all(int(one.entry.id[3:]) > 6 for one in index.near("p", unit(5, SKETCH), 300, -1.0))
    assert index.entries == 293
    clock.advance(300)
    # A bounded number is swept at a time, none of the others is returned.
    assert index.near("p", unit(5, SKETCH), 300, -1.0) == ()
    for _ in range(5):
        index.near("p", unit(5, SKETCH))
    assert index.entries == 0
    index.add(entry_of(7, ends=5.0))
    assert index.entries == 0


def test_entries_of_another_encoder_are_left_out(index: VectorIndex) -> None:
    entry = entry_of(1)
    index.replace("p", [replace(entry, vector=entry.vector + b"xx"), replace(entry, sketch=b"")])
    assert index.entries == 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_it_holds_what_a_plain_search_holds(data: st.DataObject) -> None:
    index = VectorIndex(ManualClock(), VECTOR, SKETCH)
    index.replace("p", [])
    kept: dict[str, SemanticEntry] = {}
    for number in data.draw(st.lists(st.integers(0, 40), max_size=80)):
        entry = entry_of(number)
        if entry.id in kept and data.draw(st.booleans()):
            index.remove("p", entry.id)
            del kept[entry.id]
        else:
            index.add(entry)
            kept[entry.id] = entry
    assert index.entries == len(kept)
    asked = unit(data.draw(st.integers(0, 60)), SKETCH)
    found = index.near("p", asked, len(kept) + 1, -1.0)
    truth = {
        id: float(np.frombuffer(entry.sketch, "<f2").astype(np.float32) @ asked) for id, entry in kept.items()
    }
    assert {one.entry.id for one in found} == set(kept)
    for one in found:
        assert one.similarity == pytest.approx(truth[one.entry.id], abs=0.02)
    assert [one.similarity for one in found] == sorted((one.similarity for one in found), reverse=True)
    few = index.near("p", asked, 3, 0.1)
    assert few == tuple(one for one in found if one.similarity >= 0.1)[:3]


def test_memory_is_bounded_and_the_least_recently_used_partition_goes(clock: ManualClock) -> None:
    index = VectorIndex(clock, VECTOR, SKETCH, max_bytes=100_000)
    for name in ("a", "b", "c"):
        index.replace(name, [entry_of(i, name) for i in range(60)])
    index.near("a", unit(1, SKETCH))
    index.replace("d", [entry_of(i, "d") for i in range(60)])
    assert index.bytes <= 100_000
    assert [index.loaded(name) for name in ("a", "b", "c", "d")] == [True, False, True, True]
    index.replace("e", [entry_of(i, "e") for i in range(60)])
    assert [index.loaded(name) for name in ("a", "c", "d", "e")] == [True, False, True, True]
    for i in range(1000):
        index.add(entry_of(1000 + i, "e"))
        assert index.bytes <= 100_000
    # Of a partition larger than all, the newest are kept.
    index.replace("huge", [entry_of(i, "huge") for i in range(2000)])
    assert index.bytes <= 100_000
    assert 80 < index.entries < 2000
    assert index.near("huge", unit(1999, SKETCH))[0].entry.id == "id-1999"
    assert all(one.entry.id != "id-0" for one in index.near("huge", unit(0, SKETCH)))


async def test_a_large_partition_is_taken_in_step_by_step(clock: ManualClock) -> None:
    index = VectorIndex(clock, VECTOR, SKETCH)
    task = asyncio.create_task(index.fill("p", [entry_of(i) for i in range(1000)]))
    await asyncio.sleep(0)
    assert index.loaded("p")
    assert not index.ready("p")
    assert index.near("p", unit(1, SKETCH), floor=-1.0) == ()
    # What happens meanwhile counts, whether its place has been read by then or not.
    for number in (0, 999):
        index.remove("p", f"id-{number}")
    changed = replace(entry_of(5), cost=77)
    index.add(changed)
    index.add(entry_of(2000))
    assert not task.done()
    assert await task
    assert index.ready("p")
    assert index.entries == 999
    found = {one.entry.id: one.entry for one in index.near("p", unit(1, SKETCH), 2000, -1.0)}
    assert len(found) == 999
    assert "id-2000" in found
    assert found.keys().isdisjoint({"id-0", "id-999"})
    assert found["id-5"].cost == 77
    assert found["id-400"] == replace(entry_of(400), sketch=b"")


@pytest.mark.parametrize("ends", ["forgotten", "broken off", "begun anew"])
async def test_what_is_forgotten_while_it_is_taken_in_is_not_there(clock: ManualClock, ends: str) -> None:
    index = VectorIndex(clock, VECTOR, SKETCH)
    task = asyncio.create_task(index.fill("p", [entry_of(i) for i in range(1000)]))
    await asyncio.sleep(0)
    if ends == "forgotten":
        index.forget()
    elif ends == "broken off":
        task.cancel()
    else:
        index.replace("p", [entry_of(1)])
    assert await asyncio.gather(task, return_exceptions=True) != [True]
    assert index.loaded("p") == index.ready("p") == (ends == "begun anew")
    assert index.entries == (ends == "begun anew")
    if ends != "begun anew":
        assert index.bytes == 0


def test_adding_does_not_copy_all(clock: ManualClock) -> None:
    index = VectorIndex(clock, VECTOR, SKETCH)
    index.replace("p", [])
    arrays = []
    for i in range(2000):
        index.add(entry_of(i))
        arrays.append(id(index._partitions["p"].vectors))
    assert len(set(arrays)) < 40


def test_counted_memory_is_what_is_used(clock: ManualClock) -> None:
    index = VectorIndex(clock)
    wide = [
        replace(
            entry_of(i, prompt="How do I change the address of an order that was paid already?"),
            vector=unit(i, 384).astype("<f2").tobytes(),
            sketch=unit(i, 256).astype("<f2").tobytes(),
        )
        for i in range(2000)
    ]
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    # Ids and prompts of their own, as they come from the store.
    index.replace("p", (replace(one, origin=replace(one.origin, entry=one.id + "-")) for one in wide))
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert 0.85 < index.bytes / used < 1.2
