"""The pipeline of `pipeline_parts` with the semantic cache in it, over a likeness that is plain arithmetic."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np

from classifiers.encoder import DATA_DIRECTORY, StaticEncoder
from router.adapters.memory import ManualClock
from router.core.cached import CacheLabel
from router.core.types import RequestRecord
from router.pipeline import Pipeline
from router.stages.evidence import Evidence
from router.stages.likeness import Judged, Ranking, Stored, Vector
from router.stages.reply import Answer
from router.stages.semantic import LikenessCache
from router.stages.vector_index import VectorIndex
from tests.unit.pipeline_parts import SECRET, Rig, Script
from tests.unit.routed_parts import PROVIDERS, said

EXECUTOR = ThreadPoolExecutor(1)
OPEN = "How do I open an account?"
ALSO = "how do i open an account please?"
OTHER = "Please tell a joke about ducks"


def words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def bag(text: str, size: int) -> Vector:
    """Cosine 1 for the same words, 0 for none in common."""
    vector = np.zeros(size, dtype=np.float32)
    for word in words(text):
        vector[int.from_bytes(hashlib.sha256(word.encode()).digest()[:4]) % size] += 1
    return cast(Vector, vector / (np.linalg.norm(vector) or 1))


@functools.cache
def _encoder() -> StaticEncoder:
    return StaticEncoder.load(DATA_DIRECTORY)


class PlainLikeness:
    """The cosine of the words is the probability; different digits are refused; served from 0.8."""

    dimensions = 384

    def __init__(self) -> None:
        self.id = "plain"
        self.ready = True
        self.go_on = threading.Event()
        self.go_on.set()
        self.ranked: list[str] = []
        self.made: list[str] = []
        self.sketched: list[str] = []

    def load(self) -> None:
        self.ready = True

    def sketch(self, text: str) -> Vector:
        self.sketched.append(text)
        return bag(text, 256)

    def vector(self, text: str, owner: str = "") -> Vector:
        self.made.append(text)
        return bag(text, 384)

    def threshold(self, max_error: float) -> float:
        return 0.8

    def rank(
        self,
        text: str,
        stored: Sequence[Stored],
        max_error: float,
        least: float | None = None,
        owner: str = "",
    ) -> Ranking:
        assert self.go_on.wait(60)
        self.ranked.append(text)
        judged, refused = [], 0
        for at, one in enumerate(stored):
            cosine = float(bag(text, 384) @ bag(one.prompt, 384))
            if [w for w in words(text) if w.isdigit()] != [w for w in words(one.prompt) if w.isdigit()]:
                refused += 1
            elif cosine >= (0.8 if least is None else least):
                judged.append(Judged(at, cosine, cosine, ()))
        judged.sort(key=lambda one: -one.probability)
        return Ranking(tuple(judged), 0.8, refused)


class Outcomes(Counter[str]):
    """Telemetry of look-ups alone."""

    def settled(self, record: RequestRecord) -> None:
        """Counted nowhere."""

    def refused(self, reason: str) -> None:
        """Counted nowhere."""

    def semantic(self, outcome: str, seconds: float) -> None:
        self[outcome] += 1


def policy(mode: str = "enforce", cache: str = "", more: str = "", teams: str = "") -> str:
    entries = ", ".join(
        filter(None, (f"semantic: {mode}", "exact: false" if "exact" not in cache else "", cache))
    )
    return f"""\
apiVersion: farthing/v1
baseline: strong
classes: {{ simple: {{ min_quality: 0.9 }}, medium: {{ min_quality: 0.9 }}, complex: {{ min_quality: 0.9 }} }}
defaults: {{ allow: [cheap, strong, third], fallback: [strong], cache: {{ {entries} }} }}
teams:
  alone: {{ fallback: [cheap] }}
  capped: {{ budget: {{ month: 0.01, at_limit: refuse, hard_cap: 0.01 }} }}
{teams}
{more}
"""


class SemanticRig(Rig):
    """`ask(OPEN)` puts an answer into the cache; `store` and `index` are there to look at."""

    def __init__(self, policy_text: str | None = None, **options: Any) -> None:
        options.setdefault("encoder", _encoder())
        super().__init__(PROVIDERS, policy_text or policy(), **options)
        self.clock.advance(1)
        self.likeness = PlainLikeness()
        self.outcomes = Outcomes()
        self.index = VectorIndex(self.clock)
        self.semantic = LikenessCache(
            self.answers,
            self.index,
            self.book,
            self.likeness,
            Evidence(self.book, self.clock.monotonic),
            EXECUTOR,
            SECRET,
            self.outcomes,
            self.clock,
            lambda: self.draws(),
        )
        self.use(semantic=self.semantic)

    def use(self, **stages: Any) -> None:
        self.pipeline = cast(Pipeline, dataclasses.replace(self.pipeline, **stages))

    def says(self, *texts: str, model: str = "cheap") -> None:
        """What `model` answers, in turn; a look-up beside the call is over by then."""
        self.wire.scripts[model] = [Script(self.looked_up, said(text)) for text in texts]

    async def looked_up(self) -> None:
        await asyncio.gather(*self.semantic._tasks)

    async def chat(self, text: str, team: str = "search", **fields: Any) -> str:
        """What was said. Everything that happens beside and after it is over."""
        fields.setdefault("messages", [{"role": "user", "content": text}])
        fields.setdefault("model", "cheap")
        body = await self.ask(team, **fields)
        await self.quiet()
        return str(json.loads(body)["choices"][0]["message"]["content"])

    async def answered(self, text: str, team: str = "search", **fields: Any) -> tuple[Answer, bytes]:
        fields.setdefault("messages", [{"role": "user", "content": text}])
        inbound = self.inbound(team, **{"model": "cheap", **fields})
        async with self.pipeline.answer(inbound) as answer:
            body = b"".join([frame async for frame in answer.frames])
        await self.quiet()
        return answer, body

    async def quiet(self) -> None:
        while self.shadows._tasks:
            await asyncio.gather(*self.shadows._tasks)
        await self.semantic.settled()
        await asyncio.get_running_loop().run_in_executor(EXECUTOR, lambda: None)

    @property
    def last(self) -> RequestRecord:
        return [record for record in self.journal.settled if not record.endpoint.startswith("learn.")][-1]

    @property
    def labels(self) -> list[CacheLabel]:
        return [label for record in self.journal.settled for label in record.cache_labels]


def labelled(
    scope: str, count: int, clock: ManualClock, wrong: Callable[[int], bool] = lambda _: False
) -> list[CacheLabel]:
    """`count` labels of score 0.999, the newest last."""
    return [
        CacheLabel(
            request_id=f"r{number}",
            scope=scope,
            entry="e",
            score=0.999,
            right=not wrong(number),
            propensity=1.0,
            source="agreement",
            at=clock.now(),
            key_id="k",
            team="search",
            app=None,
        )
        for number in range(count)
    ]
