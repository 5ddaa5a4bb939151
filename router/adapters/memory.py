"""In-process twins of the ports: what one worker without Redis runs on, and what tests take the place of.

`MemoryBudgetStore` and `MemoryCacheStore` pass the same contract suites as their Redis counterparts. They
rely on asyncio's single thread: a method without an `await` is atomic.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from router.core.errors import InvalidRequest, NotFound, Overloaded, UnavailableError
from router.core.learning import Label
from router.core.ports import (
    BudgetCharge,
    BudgetReading,
    CallElsewhere,
    CallPart,
    Clock,
    Denied,
    Granted,
    SharedCall,
    SpendSource,
)
from router.core.types import AttemptRecord, BudgetWindow, Caller, NanoUSD, OpenRecord, RequestRecord


@dataclass(slots=True)
class _Counter:
    spent: int
    held: int = 0


@dataclass(slots=True)
class _Hold:
    expires: float
    amounts: dict[BudgetWindow, int] = field(default_factory=dict)


class MemoryBudgetStore:
    """Budget counters of one process. `hold_ttl` is seconds: a hold nobody settles is released after it.

    Seeding: `source.spent` awaits, so a settlement can arrive while it reads, and whether the reading holds
    it is unknown. The reading is then repeated; after the third the settlement is added, which can count it
    twice but never leaves it out. A settlement of a window nobody counts is dropped: the ledger has it, and
    the seed will be read from the ledger.
    """

    _SEED_TIMEOUT = 5.0

    def __init__(self, source: SpendSource, clock: Clock, hold_ttl: float = 900.0) -> None:
        self._source = source
        self._clock = clock
        self._hold_ttl = hold_ttl
        self._counters: dict[BudgetWindow, _Counter] = {}
        # Both in order of expiry: the time to live is one constant, and a renewed entry moves to the end.
        self._holds: OrderedDict[str, _Hold] = OrderedDict()
        self._settled: OrderedDict[str, float] = OrderedDict()
        self._during_read: dict[BudgetWindow, int] = {}
        self._seeding = asyncio.Lock()

    async def reserve(
        self, hold_id: str, charges: Sequence[BudgetCharge], amount: NanoUSD
    ) -> Granted | Denied:
        """See the port. Raises UnavailableError where a window has to be seeded and the ledger is away."""
        if amount < 0:
            raise ValueError("a reservation holds a negative amount")
        await self._seed([charge.window for charge in charges])
        self._expire()
        for charge in charges:
            counter = self._counters[charge.window]
            if charge.cap is not None and counter.spent + counter.held + amount > charge.cap:
                return Denied(
                    charge=charge,
                    reading=self._reading(charge.window),
                    only_held=counter.spent + amount <= charge.cap,
                )
        hold = self._holds.pop(hold_id, None) or _Hold(0.0)
        hold.expires = self._clock.monotonic() + self._hold_ttl
        self._holds[hold_id] = hold
        for charge in charges:
            hold.amounts[charge.window] = hold.amounts.get(charge.window, 0) + amount
            self._counters[charge.window].held += amount
        return Granted(tuple(self._reading(charge.window) for charge in charges))

    def settle(self, hold_id: str, windows: Sequence[BudgetWindow], cost: NanoUSD) -> None:
        self._expire()
        if hold_id in self._settled:
            return
        self._settled[hold_id] = self._clock.monotonic() + self._hold_ttl
        if (hold := self._holds.pop(hold_id, None)) is not None:
            self._release(hold)
        for window in windows:
            if (counter := self._counters.get(window)) is not None:
                counter.spent += cost
            elif window in self._during_read:
                self._during_read[window] += cost

    async def readings(self, windows: Sequence[BudgetWindow]) -> tuple[BudgetReading, ...]:
        await self._seed(windows)
        self._expire()
        return tuple(self._reading(window) for window in windows)

    async def close(self) -> None:
        """Nothing to deliver: every settlement was booked when it was called."""

    def _reading(self, window: BudgetWindow) -> BudgetReading:
        counter = self._counters[window]
        return BudgetReading(window, NanoUSD(counter.spent), NanoUSD(counter.held))

    def _release(self, hold: _Hold) -> None:
        for window, amount in hold.amounts.items():
            self._counters[window].held -= amount

    def _expire(self) -> None:
        now = self._clock.monotonic()
        while self._holds and next(iter(self._holds.values())).expires <= now:
            self._release(self._holds.popitem(last=False)[1])
        while self._settled and next(iter(self._settled.values())) <= now:
            self._settled.popitem(last=False)

    async def _seed(self, windows: Sequence[BudgetWindow]) -> None:
        if all(window in self._counters for window in windows):
            return
        async with self._seeding:
            missing = [window for window in windows if window not in self._counters]
            if not missing:
                return
            try:
                async with asyncio.timeout(self._SEED_TIMEOUT):
                    for _ in range(3):
                        self._during_read = dict.fromkeys(missing, 0)
                        spent = await self._source.spent(missing)
                        if not any(self._during_read.values()):
                            break
                for window in missing:
                    self._counters[window] = _Counter(spent.get(window, 0) + self._during_read[window])
            except (OSError, TimeoutError) as error:
                raise UnavailableError("the ledger did not answer: budgets cannot be seeded") from error
            finally:
                self._during_read = {}


class MemoryCacheStore:
    """Cached answers of one process, the least recently used dropped first.

    `max_bytes` bounds keys and values, each entry with `_OVERHEAD` on top; a value above `max_value_bytes`
    is not kept.
    """

    _OVERHEAD = 200

    def __init__(
        self, clock: Clock, max_bytes: int = 64 * 1024 * 1024, max_value_bytes: int = 1024 * 1024
    ) -> None:
        self._clock = clock
        self._max_bytes = max_bytes
        self._max_value_bytes = max_value_bytes
        self._entries: OrderedDict[str, tuple[bytes, float]] = OrderedDict()
        self.size = 0

    async def get(self, key: str) -> bytes | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        value, expires = entry
        if expires <= self._clock.monotonic():
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return value

    def put(self, key: str, value: bytes, ttl: float) -> None:
        self._drop(key)
        if ttl <= 0 or len(value) > self._max_value_bytes:
            return
        self._entries[key] = (value, self._clock.monotonic() + ttl)
        self.size += self._weight(key, value)
        while self.size > self._max_bytes:
            self._drop(next(iter(self._entries)))

    async def delete(self, key: str) -> None:
        self._drop(key)

    async def close(self) -> None:
        self._entries.clear()
        self.size = 0

    def _weight(self, key: str, value: bytes) -> int:
        return len(key) + len(value) + self._OVERHEAD

    def _drop(self, key: str) -> None:
        if (entry := self._entries.pop(key, None)) is not None:
            self.size -= self._weight(key, entry[0])


class MemoryFlightBoard:
    """Calls of several workers in one process, for tests: they share `calls`. A worker alone makes every call."""

    def __init__(self, calls: dict[str, SharedCall] | None = None) -> None:
        self.calls = calls if calls is not None else {}
        self._alone = calls is None

    async def claim(
        self, key: str, call: SharedCall, over: CallElsewhere | None = None
    ) -> CallElsewhere | None:
        if self._alone:
            return None
        held = self.calls.get(key)
        if held is not None and held.joinable and not (isinstance(over, _MemoryCall) and over.call is held):
            return _MemoryCall(held)
        self.calls[key] = call
        return None

    def landed(self, key: str, call: SharedCall, stored: bool) -> None:
        if self.calls.get(key) is call:
            del self.calls[key]

    async def start(self) -> None:
        """Nothing to open."""

    async def close(self) -> None:
        """Nothing is open."""


class _MemoryCall:
    stored = False

    def __init__(self, call: SharedCall) -> None:
        self.call = call

    def parts(self) -> AsyncGenerator[CallPart, None]:
        return self.call.parts()


class MemorySpendSource:
    """What a ledger would have booked. `away` makes every reading fail, as a database that is down does."""

    def __init__(self, amounts: Mapping[BudgetWindow, int] | None = None) -> None:
        self.amounts = dict(amounts or {})
        self.away = False
        self.reads = 0

    async def spent(self, windows: Sequence[BudgetWindow]) -> Mapping[BudgetWindow, NanoUSD]:
        self.reads += 1
        if self.away:
            raise UnavailableError("the ledger is away")
        return {window: NanoUSD(self.amounts.get(window, 0)) for window in windows}


class MemoryJournal:
    """Records in the order they were written."""

    def __init__(self) -> None:
        self.opened: list[OpenRecord] = []
        self.attempts: list[AttemptRecord] = []
        self.settled: list[RequestRecord] = []

    def open(self, record: OpenRecord, *, attempt_follows: bool = False) -> None:
        self.opened.append(record)

    def attempt(self, record: AttemptRecord) -> None:
        self.attempts.append(record)

    def settle(self, record: RequestRecord) -> None:
        self.settled.append(record)


class MemoryKeyDirectory:
    """Callers by keyed hash. `late` are those that only `find_new` sees, as a key made a moment ago."""

    def __init__(
        self, callers: Mapping[str, Caller] | None = None, late: Mapping[str, Caller] | None = None
    ) -> None:
        self.callers = dict(callers or {})
        self.late = dict(late or {})

    def find(self, key_hash: str) -> Caller | None:
        return self.callers.get(key_hash)

    async def find_new(self, key_hash: str) -> Caller | None:
        if (caller := self.late.pop(key_hash, None)) is not None:
            self.callers[key_hash] = caller
        return self.callers.get(key_hash)


class MemoryFeedbackStore:
    """Scores beside the records of a `MemoryJournal`; `labels` holds every revision, the newest last."""

    def __init__(self, journal: MemoryJournal, clock: Clock) -> None:
        self._journal = journal
        self._clock = clock
        self.labels: list[Label] = []

    async def keep(self, caller: Caller, request_id: str, score: float, comment: str | None) -> None:
        asked = (request_id, caller.team)
        settled = [record for record in self._journal.settled if (record.id, record.team) == asked]
        if not settled:
            if any((record.id, record.team) == asked for record in self._journal.opened):
                raise Overloaded("This request is not in the ledger yet.", retry_after=1)
            raise NotFound("No request of this team has this id.", param="request_id")
        model = settled[0].served_model
        if model is None:
            raise InvalidRequest("No model answered this request.", param="request_id")
        said = [
            label for label in self.labels if (label.request_id, label.key_id) == (request_id, caller.key_id)
        ]
        if said and (said[-1].score, said[-1].comment) == (score, comment):
            return
        self.labels.append(
            Label(
                request_id=request_id,
                model=model,
                score=score,
                weight=1.0,
                source="feedback",
                propensity=settled[0].propensity,
                at=self._clock.now(),
                key_id=caller.key_id,
                team=caller.team,
                comment=comment,
            )
        )


class ManualClock:
    """A clock that moves when told."""

    def __init__(self, start: datetime = datetime(2026, 11, 1, tzinfo=UTC)) -> None:
        self._start = start
        self._elapsed = 0.0

    def monotonic(self) -> float:
        return self._elapsed

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self._elapsed)

    def advance(self, seconds: float) -> None:
        self._elapsed += seconds
