"""A pipeline in this process: real stages on the memory twins, and a wire that answers as it is told."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from classifiers.classifier import Classifier
from classifiers.encoder import Encoder
from router.adapters.memory import (
    ManualClock,
    MemoryBudgetStore,
    MemoryCacheStore,
    MemoryFlightBoard,
    MemoryJournal,
    MemoryKeyDirectory,
    MemorySpendSource,
)
from router.adapters.memory_cache_book import MemoryCacheBook
from router.adapters.memory_semantic import MemorySemanticStore
from router.adapters.price_catalogue import shipped_catalogue
from router.adapters.system import RequestIdentifiers
from router.core.errors import UpstreamError
from router.core.health import Health
from router.core.lint import load
from router.core.ports import Snapshot, UpstreamCall
from router.core.types import BudgetWindow, Caller, RequestRecord
from router.pipeline import Inbound, Pipeline
from router.stages.admit import Admission, key_hash
from router.stages.cascade import Cascade
from router.stages.check import CacheChecks
from router.stages.classify import Classify
from router.stages.decide import Decide
from router.stages.dispatch import Dispatch
from router.stages.exact import ExactCache
from router.stages.flight import Flights
from router.stages.learn import Learn
from router.stages.reserve import Reserve
from router.stages.settle import Settle
from router.stages.shadow import Shadows
from router.stages.sharing import Sharing

SECRET = b"0123456789abcdef"
DONE = b"data: [DONE]\n\n"

PROVIDERS = """\
apiVersion: farthing/v1
providers:
  one: { wire: openai, base_url: "http://127.0.0.1:1/v1", timeouts: { first_token: 300ms, idle: 300ms, total: 5s } }
  two: { wire: openai, base_url: "http://127.0.0.1:2/v1" }
models:
  first: { provider: one, name: first-1, context: 10000, max_output: 1000, price: { input: "1", output: "4" },
           rename: { max_tokens: max_completion_tokens } }
  second: { provider: two, name: second-1, context: 10000, max_output: 1000, price: { input: "2", output: "8" } }
"""
POLICY = """\
apiVersion: farthing/v1
classes: { simple: { min_quality: 0.9 }, medium: { min_quality: 0.9 }, complex: { min_quality: 0.9 } }
defaults: { allow: [first, second], fallback: [second] }
teams:
  alone: { fallback: [] }
  capped: { budget: { month: 0.01, at_limit: refuse, hard_cap: 0.01 }, fallback: [] }
"""


def chunk(
    text: str | None = None, finish: str | None = None, usage: Mapping[str, Any] | None = None
) -> bytes:
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish}
    body: dict[str, Any] = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    body |= {"choices": [] if usage is not None else [choice], "usage": usage}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


USAGE = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
GOOD_STREAM: tuple[Any, ...] = (
    chunk("Hello"),
    chunk(" there"),
    chunk(finish="stop"),
    chunk(usage=USAGE),
    DONE,
)
GOOD_ANSWER = json.dumps(
    {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "Hello there"}, "finish_reason": "stop"}
        ],
        "usage": USAGE,
    }
).encode()


class Script:
    """One answer: `parts` are bytes, seconds to wait, what is to be waited for, or an exception to raise."""

    def __init__(self, *parts: Any, status: int = 200, **headers: str) -> None:
        self.parts = parts
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class _Reply:
    def __init__(self, script: Script) -> None:
        self.status = script.status
        self.headers: Mapping[str, str] = script.headers
        self.closed = False
        self._parts = script.parts

    async def chunks(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            if isinstance(part, bytes):
                yield part
            elif isinstance(part, BaseException):
                raise part
            elif callable(part):
                await part()
            else:
                await asyncio.sleep(part)

    def close(self) -> None:
        self.closed = True


class ScriptedWire:
    """Answers by the upstream's model name, each script once, the last one for ever."""

    def __init__(self) -> None:
        self.scripts: dict[str, list[Script | BaseException]] = {}
        self.calls: list[UpstreamCall] = []
        self.replies: list[_Reply] = []

    async def send(self, call: UpstreamCall) -> _Reply:
        self.calls.append(call)
        waiting = self.scripts.get(call.model.name)
        default = Script(*GOOD_STREAM) if call.stream else Script(GOOD_ANSWER)
        script = default if not waiting else waiting.pop(0) if len(waiting) > 1 else waiting[0]
        if isinstance(script, BaseException):
            raise script
        reply = _Reply(script)
        self.replies.append(reply)
        return reply

    async def close(self) -> None:
        """Nothing is open."""


class _Quiet:
    def settled(self, record: RequestRecord) -> None:
        """Counted nowhere."""

    def refused(self, reason: str) -> None:
        """Counted nowhere."""

    def semantic(self, outcome: str, seconds: float) -> None:
        """Counted nowhere."""


class _NoSemantic:
    async def find(self, exchange: Any) -> None:
        return None

    def landed(self, exchange: Any) -> None:
        """Nothing was looked up."""

    def keep(self, exchange: Any, record: RequestRecord, body: bytes, draw: float) -> None:
        """Nothing is kept."""


@functools.cache
def _snapshot(providers: str, policy: str) -> Snapshot:
    loaded = load(providers, policy, shipped_catalogue(), ManualClock().now())
    assert loaded.snapshot is not None, [str(error) for error in loaded.errors]
    return loaded.snapshot


class Rig:
    """`ask` runs one request to its end; the parts are there to look at."""

    def __init__(
        self,
        providers: str = PROVIDERS,
        policy: str = POLICY,
        encoder: Encoder | None = None,
        beside: Rig | None = None,
    ) -> None:
        """`beside`: another worker of the same installation, with the same provider, cache and budgets."""
        self.clock = ManualClock()
        self.wire = ScriptedWire() if beside is None else beside.wire
        self.journal = MemoryJournal()
        self.health = Health()
        self.budgets = (
            MemoryBudgetStore(MemorySpendSource(), self.clock) if beside is None else beside.budgets
        )
        self.caches = MemoryCacheStore(self.clock) if beside is None else beside.caches
        self.board = MemoryFlightBoard({}) if beside is None else MemoryFlightBoard(beside.board.calls)
        self.flights = Flights()
        self.book = MemoryCacheBook()
        self.ids = RequestIdentifiers()
        self.snapshot = _snapshot(providers, policy)
        teams = ("search", "alone", "capped")
        keys = {key_hash(SECRET, team): Caller(f"key-{team}", team) for team in teams}
        self.admission = Admission(MemoryKeyDirectory(keys), SECRET)
        reserve = Reserve(self.budgets)
        dispatch = Dispatch(
            {"openai": self.wire}, reserve, self.journal, self.health, self.clock, lambda: 0.0
        )
        settle = Settle(self.journal, self.budgets, _Quiet(), self.clock)
        self.draws: Callable[[], float] = lambda: 0.5
        self.shadows = Shadows(
            dispatch, reserve, settle, cast(Encoder, encoder), self.clock, self.ids, lambda: self.draws()
        )
        exact = ExactCache(self.caches, SECRET, lambda: self.book.invalidations)
        self.answers = MemorySemanticStore(self.clock)
        self.pipeline = Pipeline(
            configuration=lambda: self.snapshot,
            admission=self.admission,
            exact=exact,
            flights=self.flights,
            sharing=Sharing(self.board, exact, self.clock),
            classify=Classify(cast(Classifier, None), ThreadPoolExecutor(1)),
            learn=Learn(cast(Encoder, encoder), self.clock),
            semantic=_NoSemantic(),
            decide=Decide(self.health, self.clock),
            reserve=reserve,
            cascade=Cascade(dispatch, reserve, self.clock),
            settle=settle,
            shadows=self.shadows,
            checks=CacheChecks(self.shadows, self.answers, self.clock),
            book=self.book,
            clock=self.clock,
            draw=lambda: 0.5,
        )

    def inbound(
        self, team: str = "search", headers: Mapping[str, str] | None = None, **fields: Any
    ) -> Inbound:
        body = {"model": "first", "messages": [{"role": "user", "content": "hi"}], **fields}
        sent = {"authorization": f"Bearer {team}", **(headers or {})}
        key = self.admission.hashed(sent.get("authorization"))
        return Inbound(self.ids.request_id(), "chat.completions", sent, key, json.dumps(body).encode(), True)

    async def ask(
        self, team: str = "search", headers: Mapping[str, str] | None = None, **fields: Any
    ) -> bytes:
        """The answer's body. Raises what the pipeline raises."""
        async with self.pipeline.answer(self.inbound(team, headers, **fields)) as answer:
            return b"".join([frame async for frame in answer.frames])

    @property
    def record(self) -> RequestRecord:
        """The only ledger entry."""
        (record,) = self.journal.settled
        return record

    async def held(self) -> int:
        """Nano-USD held in the capped team's budget."""
        limits, period = self.snapshot.budgets(self.clock.now())
        readings = await self.budgets.readings([BudgetWindow(limit.key, period) for limit in limits])
        return sum(reading.held for reading in readings)


async def eventually(found: Callable[[], Any], seconds: float = 60.0) -> Any:
    end = asyncio.get_running_loop().time() + seconds
    while not (answer := found()):
        assert asyncio.get_running_loop().time() < end, "waited in vain"
        await asyncio.sleep(0.005)
    return answer


def events(body: bytes) -> Sequence[str]:
    lines = body.decode().splitlines()
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def failure(kind: str, **details: Any) -> UpstreamError:
    return UpstreamError(kind, kind, **details)
