"""Budget counters shared by all workers, in Redis.

One script call reserves over every window of a request or none (`scripts.py`). Settlements are queued and
delivered in the background: `settle` never waits.

**Seeding.** A missing window is read from the ledger before its first use. Two workers may both do it: the
first seed wins. A settlement that finds its window missing adds to a `late` sum that the seed takes in, so
none falls between reading and seeding. A settlement that finds a seeded window is booked unless it is older
than the reading by more than `ledger_lag`, the time a settled request needs to be in the ledger; then the
reading holds it. What lies within that lag may count twice and is never left out. This relies on the caller
writing the journal before it settles.

**A window lost** (Redis restarted empty, evicted): it is seeded again in the background, after `ledger_lag`,
so that what other workers settled just before is in the reading; until then each worker goes on as if Redis
were away. Then each worker puts its own holds in flight back.

**Redis away.** Of each window's last reading this worker may spend (cap - spent - held) / workers. Holds
granted that way are put into Redis, and settlements delivered, before the breaker closes. Until trials have
confirmed the outage (half a second) Redis may be silent to this worker alone, while the others spend what is
left: for that moment a window near its cap is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from router.adapters.redis_store.connection import RedisConnection
from router.adapters.redis_store.scripts import ANNOUNCE, KEEP_MS, READ, RESERVE, RESTORE, SEED, SETTLE
from router.core.errors import UnavailableError
from router.core.ports import BudgetCharge, BudgetReading, Clock, Denied, Granted, SpendSource
from router.core.types import BudgetWindow, NanoUSD

logger = logging.getLogger(__name__)

_TAG = "{farthing:budget}"
_SEED_TIMEOUT = 5.0
_LATE_MS = 30_000
_BATCH = 64
# A window is near its cap when less than half is left.
_NEAR = 2
_REFRESH_EVERY = 1.0
_WORKERS_KEY = f"{_TAG}:workers"
_SILENT_MS = 30_000
"""Long enough that a worker which just lost Redis, as the others may at that moment, still counts."""
_REFRESHED = 100
_NEVER_READ = "a budget cannot be read: Redis or the ledger is away, and this worker has not read it before"


def _window_key(window: BudgetWindow) -> str:
    return f"{_TAG}:{window.period}:{window.key}"


def _expiry_key(window: BudgetWindow) -> str:
    return f"{_TAG}:expiry:{window.period}:{window.key}"


def _late_key(window: BudgetWindow) -> str:
    return f"{_TAG}:late:{window.period}:{window.key}"


def _marker_key(hold_id: str) -> str:
    return f"{_TAG}:settled:{hold_id}"


@dataclass(frozen=True, slots=True)
class _Settlement:
    """`cost` None: only releases the hold of a reservation whose reply never came."""

    hold_id: str
    windows: tuple[BudgetWindow, ...]
    cost: int | None
    at: float


@dataclass(slots=True)
class _Hold:
    """What this worker holds for a request in flight; `alone` is the part granted while Redis was away."""

    expires: float = 0.0
    amounts: dict[BudgetWindow, int] = field(default_factory=dict)
    alone: dict[BudgetWindow, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Last:
    """The last reading of a window; `born` names its seed, `alone` is what was used since without Redis."""

    spent: int
    held: int
    born: bytes
    alone: int = 0


class RedisBudgetStore:
    """See the port `BudgetStore`. The connection is shared: `close` leaves it open.

    `workers`: how many processes share these budgets at least; those of other machines announce themselves.
    `hold_ttl`, `ledger_lag`: seconds. `max_pending`: settlements kept while Redis is away; beyond it the windows
    concerned are seeded anew instead.
    """

    def __init__(
        self,
        connection: RedisConnection,
        source: SpendSource,
        clock: Clock,
        workers: int = 1,
        hold_ttl: float = 900.0,
        ledger_lag: float = 2.0,
        max_pending: int = 100_000,
    ) -> None:
        self._connection = connection
        self._source = source
        self._clock = clock
        self._workers = max(1, workers)
        self._seen_workers = self._workers
        self._worker_id = secrets.token_hex(8)
        self._hold_ttl_ms = int(hold_ttl * 1000)
        self._ledger_lag = ledger_lag
        self._max_pending = max_pending
        # The one read longest ago comes first.
        self._last: OrderedDict[BudgetWindow, _Last] = OrderedDict()
        # In order of expiry: the time to live is one constant, and a renewed hold moves to the end.
        self._live: OrderedDict[str, _Hold] = OrderedDict()
        self._pending: deque[_Settlement] = deque()
        self._overflown: set[BudgetWindow] = set()
        self._seeding: dict[BudgetWindow, asyncio.Task[None]] = {}
        self._restoring: set[asyncio.Task[None]] = set()
        self._delivering: asyncio.Task[None] | None = None
        self._refreshing: asyncio.Task[None] | None = None
        connection.on_recovery(self._recover)

    @property
    def pending(self) -> int:
        """Settlements that Redis does not have yet."""
        return len(self._pending)

    async def reserve(
        self, hold_id: str, charges: Sequence[BudgetCharge], amount: NanoUSD
    ) -> Granted | Denied:
        """See the port. `Granted.readings` leaves out windows without a cap that nobody could read."""
        if amount < 0:
            raise ValueError("a reservation holds a negative amount")
        if not charges:
            return Granted(())
        if self._refreshing is None:
            self._refreshing = asyncio.get_running_loop().create_task(self._refresh())
        windows = tuple(charge.window for charge in charges)
        if not self._connection.up:
            return self._reserve_alone(hold_id, charges, amount)
        try:
            # A window seeded now may be lost again before its turn.
            for _ in range(3):
                outcome = await self._reserve_shared(hold_id, charges, amount)
                if not isinstance(outcome, list):
                    return outcome
                if not await self._seed(outcome):
                    break
        except UnavailableError:
            self._abandon(hold_id, windows)
        except asyncio.CancelledError:
            self._abandon(hold_id, windows)
            raise
        return self._reserve_alone(hold_id, charges, amount)

    def settle(self, hold_id: str, windows: Sequence[BudgetWindow], cost: NanoUSD) -> None:
        hold = self._live.pop(hold_id, None) or _Hold()
        for window in windows:
            last = self._last.get(window)
            if last is not None and (last.alone or not self._connection.up):
                last.alone += max(cost - hold.amounts.get(window, 0), -hold.alone.get(window, 0))
        self._owe(_Settlement(hold_id, tuple(windows), cost, self._clock.monotonic()))

    async def readings(self, windows: Sequence[BudgetWindow]) -> tuple[BudgetReading, ...]:
        """See the port. Without Redis: the last reading and what this worker used since."""
        if self._connection.up and windows:
            keys = [key for window in windows for key in (_window_key(window), _expiry_key(window))]
            with contextlib.suppress(UnavailableError):
                for _ in range(3):
                    missing = self._note(windows, await self._connection.run(READ, keys, ()))
                    if not missing or not await self._seed(missing):
                        break
        if any(window not in self._last for window in windows):
            raise UnavailableError(_NEVER_READ)
        return tuple(self._reading(window) for window in windows)

    async def close(self) -> None:
        """Delivers what is still to be settled, for at most two seconds; the ledger has all of it."""
        tasks = [*self._seeding.values(), *self._restoring]
        if self._refreshing is not None:
            tasks.append(self._refreshing)
        try:
            async with asyncio.timeout(2.0):
                while self._pending and self._connection.up:
                    self._deliver_soon()
                    if self._delivering is not None:
                        await asyncio.wait([self._delivering])
        except TimeoutError:
            logger.warning("%d settlements were not delivered to Redis in time", len(self._pending))
        for task in tasks:
            task.cancel()
        if self._delivering is not None:
            self._delivering.cancel()

    # With Redis

    async def _reserve_shared(
        self, hold_id: str, charges: Sequence[BudgetCharge], amount: int
    ) -> Granted | Denied | list[BudgetWindow]:
        """The windows that are missing, where there are any."""
        windows = tuple(charge.window for charge in charges)
        keys = [key for window in windows for key in (_window_key(window), _expiry_key(window))]
        rooms = ["" if charge.cap is None else str(charge.cap - amount) for charge in charges]
        verdict, index, *values = await self._connection.run(
            RESERVE, keys, (hold_id, amount, self._hold_ttl_ms, *rooms)
        )
        if missing := self._note(windows, values):
            return missing
        if verdict == 1:
            hold = self._hold(hold_id)
            for window in windows:
                hold.amounts[window] = hold.amounts.get(window, 0) + amount
            return Granted(tuple(self._reading(window) for window in windows))
        return self._denied(charges[index - 1], amount)

    def _hold(self, hold_id: str) -> _Hold:
        """This worker's entry of a hold, renewed."""
        now = self._clock.monotonic()
        while self._live and next(iter(self._live.values())).expires <= now:
            self._live.popitem(last=False)
        hold = self._live.pop(hold_id, None) or _Hold()
        hold.expires = now + self._hold_ttl_ms / 1000
        self._live[hold_id] = hold
        return hold

    def _note(self, windows: Sequence[BudgetWindow], values: Sequence[bytes]) -> list[BudgetWindow]:
        """Keeps what a script replied; the windows that are missing."""
        missing = []
        reborn = []
        for place, window in enumerate(windows):
            spent, used, born = values[3 * place : 3 * place + 3]
            if not spent:
                missing.append(window)
                continue
            last = self._last.get(window)
            if last is not None and last.born != born:
                reborn.append(window)
            # A reply that was on its way when the breaker opened does not know what was used since.
            alone = last.alone if last is not None and not self._connection.up else 0
            self._last[window] = _Last(int(spent), int(used) - int(spent), born, alone)
            self._last.move_to_end(window)
        if reborn:
            task = asyncio.get_running_loop().create_task(self._restore_soon(reborn))
            self._restoring.add(task)
            task.add_done_callback(self._restoring.discard)
        return missing

    async def _refresh(self) -> None:
        """Keeps the readings young of windows that only other workers use: should Redis go away, this worker's
        share is a part of what is left then. Also finds out that a window was seeded anew.
        """
        while True:
            await asyncio.sleep(_REFRESH_EVERY)
            windows = list(islice(self._last, _REFRESHED))
            if not self._connection.up:
                continue
            with contextlib.suppress(UnavailableError):
                self._seen_workers = int(
                    await self._connection.run(ANNOUNCE, [_WORKERS_KEY], [self._worker_id, _SILENT_MS])
                )
            if windows:
                keys = [key for window in windows for key in (_window_key(window), _expiry_key(window))]
                with contextlib.suppress(UnavailableError):
                    for window in self._note(windows, await self._connection.run(READ, keys, ())):
                        self._last.move_to_end(window)

    def _reading(self, window: BudgetWindow) -> BudgetReading:
        last = self._last[window]
        return BudgetReading(window, NanoUSD(last.spent), NanoUSD(last.held + last.alone))

    def _denied(self, charge: BudgetCharge, amount: int) -> Denied:
        reading = self._reading(charge.window)
        return Denied(charge, reading, charge.cap is not None and reading.spent + amount <= charge.cap)

    # Seeding

    async def _seed(self, missing: Sequence[BudgetWindow]) -> bool:
        """Seeds these windows and True; False where one was lost and is seeded in the background.

        Raises UnavailableError where the ledger or Redis is away.
        """
        lost = [window for window in missing if window in self._last]
        new = [window for window in missing if window not in self._last]
        for windows, delay in ((lost, self._ledger_lag), (new, 0.0)):
            if windows := [window for window in windows if window not in self._seeding]:
                task = asyncio.get_running_loop().create_task(self._seed_now(windows, delay))
                self._seeding.update(dict.fromkeys(windows, task))
                task.add_done_callback(partial(self._seeded, windows))
        # Shielded: the request that began a seed may be cancelled, those that wait for it are not.
        for task in {self._seeding[window] for window in new if window in self._seeding}:
            await asyncio.shield(task)
        return not lost

    def _seeded(self, windows: Sequence[BudgetWindow], task: asyncio.Task[None]) -> None:
        for window in windows:
            del self._seeding[window]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("budgets cannot be seeded: %s", error)

    async def _seed_now(self, windows: Sequence[BudgetWindow], delay: float) -> None:
        await asyncio.sleep(delay)
        began = self._clock.monotonic()
        try:
            async with asyncio.timeout(_SEED_TIMEOUT):
                spent = await self._source.spent(windows)
        except (OSError, TimeoutError) as error:
            raise UnavailableError("the ledger did not answer: budgets cannot be seeded") from error
        age = int((self._clock.monotonic() - began) * 1000)
        for window in windows:
            keys = [_window_key(window), _expiry_key(window), _late_key(window)]
            arguments: list[str | int] = [spent.get(window, 0), age, secrets.token_hex(4), KEEP_MS]
            arguments.append(self._hold_ttl_ms)
            for hold_id, hold in self._live.items():
                if window in hold.amounts:
                    keys.append(_marker_key(hold_id))
                    arguments += (hold_id, hold.amounts[window])
            if not await self._connection.run(SEED, keys, arguments):
                # Another worker was faster and knows nothing of the holds of this one.
                await self._restore([window])

    async def _restore_soon(self, windows: Sequence[BudgetWindow]) -> None:
        with contextlib.suppress(UnavailableError):
            await self._restore(windows)

    async def _restore(self, windows: Sequence[BudgetWindow]) -> None:
        """Puts this worker's holds in flight back into windows that lost them."""
        for hold_id, hold in list(self._live.items()):
            for window in windows:
                # No longer there: settled while this loop waited.
                if window in hold.amounts and hold_id in self._live:
                    await self._restore_hold(hold_id, window, hold.amounts[window], trial=False)

    async def _restore_hold(self, hold_id: str, window: BudgetWindow, amount: int, trial: bool) -> None:
        await self._connection.run(
            RESTORE,
            (_marker_key(hold_id), _window_key(window), _expiry_key(window)),
            (hold_id, amount, self._hold_ttl_ms),
            trial=trial,
        )

    # Settling

    def _owe(self, settlement: _Settlement) -> None:
        if len(self._pending) >= self._max_pending:
            self._overflown.update(settlement.windows)
            return
        self._pending.append(settlement)
        self._deliver_soon()

    def _abandon(self, hold_id: str, windows: tuple[BudgetWindow, ...]) -> None:
        """A reservation whose reply never came may have been made: unless the request goes on, release it."""
        if hold_id not in self._live:
            self._owe(_Settlement(hold_id, windows, None, self._clock.monotonic()))

    def _deliver_soon(self) -> None:
        if self._connection.up and (self._delivering is None or self._delivering.done()):
            # Without a running loop (the process is ending) the ledger alone has it.
            with contextlib.suppress(RuntimeError):
                self._delivering = asyncio.get_running_loop().create_task(self._deliver())

    async def _deliver(self, trial: bool = False) -> None:
        while self._overflown:
            window = next(iter(self._overflown))
            await self._connection.execute("DEL", _window_key(window), _expiry_key(window), trial=trial)
            self._overflown.discard(window)
        while self._pending:
            batch = list(islice(self._pending, _BATCH))
            try:
                await self._settle_now(batch, trial)
            except UnavailableError:
                if trial:
                    raise
                return
            for _ in batch:
                self._pending.popleft()

    async def _settle_now(self, batch: Sequence[_Settlement], trial: bool) -> None:
        keys: list[str] = []
        arguments: list[str | int] = [self._hold_ttl_ms, int(self._ledger_lag * 1000), _LATE_MS]
        now = self._clock.monotonic()
        for due in batch:
            if due.cost is None and due.hold_id in self._live:
                # The reservation was tried again, and the request goes on.
                continue
            keys.append(_marker_key(due.hold_id))
            for window in due.windows:
                keys += (_window_key(window), _expiry_key(window), _late_key(window))
            cost = "" if due.cost is None else due.cost
            arguments += (due.hold_id, cost, int((now - due.at) * 1000), len(due.windows))
        if keys:
            await self._connection.run(SETTLE, keys, arguments, trial=trial)

    async def _recover(self) -> None:
        """After an outage, before any reservation: settlements first, then the holds granted alone."""
        while self._pending or self._overflown or any(hold.alone for hold in self._live.values()):
            if self._delivering is not None and not self._delivering.done():
                await asyncio.wait([self._delivering])
            await self._deliver(trial=True)
            for hold_id, hold in list(self._live.items()):
                for window in list(hold.alone):
                    await self._restore_hold(hold_id, window, hold.amounts[window], trial=True)
                    hold.alone.pop(window, None)

    # Without Redis

    def _reserve_alone(
        self, hold_id: str, charges: Sequence[BudgetCharge], amount: NanoUSD
    ) -> Granted | Denied:
        for charge in charges:
            if charge.cap is None:
                continue
            last = self._last.get(charge.window)
            if last is None:
                raise UnavailableError(_NEVER_READ)
            left = max(0, charge.cap - last.spent - last.held)
            share = left // max(self._workers, self._seen_workers)
            if self._connection.suspected and left * _NEAR < charge.cap:
                share = 0
            if last.alone + amount > share:
                return self._denied(charge, amount)
        hold = self._hold(hold_id)
        for charge in charges:
            hold.amounts[charge.window] = hold.amounts.get(charge.window, 0) + amount
            hold.alone[charge.window] = hold.alone.get(charge.window, 0) + amount
            if (last := self._last.get(charge.window)) is not None:
                last.alone += amount
        return Granted(tuple(self._reading(c.window) for c in charges if c.window in self._last))
