"""A `certified` scope from its first request on: what is served holds the bound, on a stream with known answers."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from router.core.ports import UpstreamCall
from router.stages.likeness import Judged, Ranking, Stored, Vector
from tests.unit.pipeline_parts import Script, _Reply
from tests.unit.routed_parts import said
from tests.unit.semantic_parts import PlainLikeness, SemanticRig, bag, policy

MAX_ERROR = 0.05
REQUESTS, AT_ONCE = 800, 8
STORED = "base prompt"


class KnownLikeness(PlainLikeness):
    """Prompts read `base prompt NUMBER PROBABILITY`; only the stored one is a candidate."""

    def sketch(self, text: str) -> Vector:
        own = [f"n{number}" for number in text.split()[2:3]]
        # Nearer to the stored one than to each other.
        return bag(" ".join(["base prompt"] * 3 + own), 256)

    def rank(self, text: str, stored: Sequence[Stored], *_: Any, **__: Any) -> Ranking:
        at = next((at for at, one in enumerate(stored) if one.prompt == STORED), None)
        judged = () if at is None else (Judged(at, 0.9, float(text.split()[-1]), ()),)
        return Ranking(judged, 0.8, 0)


class KnownWire:
    """Answers as the stored prompt is answered, but for the numbers in `wrong`."""

    def __init__(self, wrong: frozenset[int], looked_up: Callable[[], Awaitable[None]]) -> None:
        self._wrong = wrong
        self.looked_up = looked_up
        self.calls = 0

    async def send(self, call: UpstreamCall) -> _Reply:
        self.calls += 1
        words = json.loads(call.body)["messages"][-1]["content"].split()
        await self.looked_up()
        right = len(words) == 2 or int(words[2]) not in self._wrong
        return _Reply(Script(said("the same" if right else "something else")))


async def test_what_a_certified_scope_serves_holds_its_bound() -> None:
    draw = random.Random(4)
    scores = [round(1 - 0.5 * draw.random() ** 3, 6) for _ in range(REQUESTS)]
    wrong = frozenset(at for at, score in enumerate(scores) if draw.random() < 0.8 * (1 - score))
    assert len(wrong) / REQUESTS > MAX_ERROR, "serving everything would break it"
    more = "learn: { budget: { month: 100 } }"
    rig = SemanticRig(policy("certified", cache="max_error: 5%, check: 50%", more=more))
    likeness = KnownLikeness()
    rig.semantic._likeness = likeness
    wire = KnownWire(wrong, rig.looked_up)
    rig.shadows._dispatch._wires["openai"] = wire  # type: ignore[index]
    rig.draws = draw.random
    booked = 0
    for start in range(0, REQUESTS, AT_ONCE):
        await rig.chat(STORED, headers={"cache-control": "no-cache"})  # whatever a check took away
        texts = [f"{STORED} {at} {scores[at]}" for at in range(start, start + AT_ONCE)]
        await asyncio.gather(*(rig.chat(text) for text in texts))
        for record in rig.journal.settled[booked:]:
            rig.book.book(*record.cache_labels)
        booked = len(rig.journal.settled)
        rig.clock.advance(3)
    by_request = {record.id: record for record in rig.journal.settled}
    hits = [record for record in by_request.values() if record.cache == "semantic"]
    found = [record.candidate for record in hits]
    served = [candidate.probability for candidate in found if candidate is not None]
    numbers = {score: at for at, score in enumerate(scores)}
    bad = sum(numbers[score] in wrong for score in served)
    assert len(served) > REQUESTS / 4
    assert bad / len(served) <= MAX_ERROR
    assert min(served) >= 0.6, "at 0.5 the error is above the bound"
    assert not any(record.cache == "semantic" for record in list(by_request.values())[:71]), (
        "71 labels at the least"
    )
    labels = rig.labels
    first = hits[0].settled_at
    before = [label for label in labels if label.at < first]
    after = [label for label in labels if label.at > first]
    assert {label.propensity for label in before} == {1.0}
    assert {label.propensity for label in after} <= {1.0, 0.5}
    judged = {label.request_id for label in after}
    candidates = [r for r in by_request.values() if r.candidate is not None and r.settled_at > first]
    share = len(judged) / len(candidates)
    assert 0.4 < share < 0.6, "served or not, every other candidate is checked"
    for served_too in (True, False):
        mine = [r for r in candidates if r.candidate is not None and r.candidate.served == served_too]
        assert 0.3 < sum(r.id in judged for r in mine) / len(mine) < 0.7
