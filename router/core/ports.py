"""What the way of a request needs from outside. Each port has a memory twin that passes the same tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import Protocol

from msgspec import Struct

from router.core.policy import BudgetLimit, EffectivePolicy, LearnPolicy, ModelSpec, ProviderSpec
from router.core.types import (
    AttemptRecord,
    BudgetWindow,
    Caller,
    NanoUSD,
    OpenRecord,
    PriceRecord,
    RequestRecord,
    RequestStatus,
    Usage,
)


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds, for durations."""
        ...

    def now(self) -> datetime:
        """UTC, for records."""
        ...


class Identifiers(Protocol):
    def request_id(self) -> str:
        """A UUIDv7 (RFC 9562), canonical text."""
        ...


class Snapshot(Protocol):
    """Both files, compiled. Frozen: a request keeps the one it started with."""

    hash: str
    providers: Mapping[str, ProviderSpec]
    models: Mapping[str, ModelSpec]
    aliases: Mapping[str, str]
    unknown_model: str
    learn: LearnPolicy | None

    def resolve(
        self, team: str, app: str | None, tags: Mapping[str, frozenset[str]], at: datetime
    ) -> EffectivePolicy:
        """What holds for this caller at this moment (`at` in UTC).

        Raises InvalidRequest (code `unknown_tag`) for a tag key the policy does not know.
        """
        ...

    def price(self, model: str, at: datetime) -> PriceRecord | None:
        """The price in force, contracts applied; None where unknown. `model` is a policy name."""
        ...

    def budgets(self, at: datetime) -> tuple[tuple[BudgetLimit, ...], str]:
        """Every budget the policy names, and the month `at` falls in."""
        ...

    def catalogue_price(self, name: str, at: datetime) -> PriceRecord | None:
        """The list price of a provider's own model name that is not configured (for savings); None: unknown."""
        ...


class UpstreamCall(Struct, frozen=True):
    """One call to a provider. `path` is relative to the provider's base URL; `body` is what is sent as it is."""

    provider: ProviderSpec
    model: ModelSpec
    path: str
    body: bytes
    stream: bool
    request_id: str


class UpstreamReply(Protocol):
    """A provider's answer whose headers have arrived. Closing it early cancels the call upstream."""

    status: int
    headers: Mapping[str, str]
    """Lower-case names."""

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises UpstreamError (kind `cut`) when it breaks before its end."""
        ...

    def close(self) -> None:
        """Never blocks; safe to call twice and from a cancelled task."""
        ...


class Upstream(Protocol):
    """A wire. It retries nothing and follows no redirect; raises UpstreamError (kinds connect, timeout, protocol)."""

    async def send(self, call: UpstreamCall) -> UpstreamReply: ...

    async def close(self) -> None: ...


class BudgetCharge(Struct, frozen=True):
    """One window a reservation falls under. `cap` in nano-USD is the bound of this try; None: only counted."""

    window: BudgetWindow
    cap: NanoUSD | None


class BudgetReading(Struct, frozen=True):
    """What a window held when it was read."""

    window: BudgetWindow
    spent: NanoUSD
    held: NanoUSD


class Granted(Struct, frozen=True):
    readings: tuple[BudgetReading, ...]


class Denied(Struct, frozen=True):
    """`charge` is the first window that has no room. `only_held`: without the holds in flight it would fit."""

    charge: BudgetCharge
    reading: BudgetReading
    only_held: bool


class BudgetStore(Protocol):
    """Atomic reservations over several windows at once: all are granted or none is.

    A window nobody has counted yet is seeded from the ledger before its first use, never read as 0.
    Raises UnavailableError where the store is away and its last reading leaves no room to go on.
    """

    async def reserve(
        self, hold_id: str, charges: Sequence[BudgetCharge], amount: NanoUSD
    ) -> Granted | Denied:
        """Holds `amount` in every window, or adds it to the hold of the same id (a top-up)."""
        ...

    def settle(self, hold_id: str, windows: Sequence[BudgetWindow], cost: NanoUSD) -> None:
        """Releases the hold and books the true cost. Never blocks and never raises: it is called while a
        cancelled request unwinds; a store that is away gets it later. Idempotent by `hold_id`.
        """
        ...

    async def readings(self, windows: Sequence[BudgetWindow]) -> tuple[BudgetReading, ...]: ...

    async def close(self) -> None:
        """Delivers what is still to be settled, then closes."""
        ...


class SpendSource(Protocol):
    """Where missing budget counters are seeded from: SQL plus what is still in the journals."""

    async def spent(self, windows: Sequence[BudgetWindow]) -> Mapping[BudgetWindow, NanoUSD]: ...


class CacheStore(Protocol):
    """Bytes under a key with a time to live. `key` is a keyed hash that already holds the scope."""

    async def get(self, key: str) -> bytes | None:
        """None when missing, expired, or when the store is away (never an error to the request)."""
        ...

    def put(self, key: str, value: bytes, ttl: float) -> None:
        """Never blocks and never raises; stored in the background. `ttl` in seconds."""
        ...

    async def delete(self, key: str) -> None: ...

    async def close(self) -> None: ...


class CallBegun(Struct, frozen=True):
    """The answer of a call begins. `request_id`: the request that makes the call and books it. `stream`: whether the
    answer comes as a stream, or as JSON.
    """

    request_id: str
    prompt_class: str | None
    stream: bool
    model: str
    provider: str
    headers: Mapping[str, str]


class CallEnded(Struct, frozen=True):
    """How the request that made a call was booked. `cost` None: unpriced."""

    status: RequestStatus
    usage: Usage
    cost: NanoUSD | None


CallPart = CallBegun | CallEnded | tuple[bytes, ...]
"""What there is to hear of a call, in this order: that it begins, frames as they come, how it ended."""


class SharedCall(Protocol):
    """A call that this worker makes, as other workers may have it."""

    @property
    def joinable(self) -> bool:
        """Whether who comes now still gets it from its first byte."""
        ...

    def parts(self) -> AsyncGenerator[CallPart, None]:
        """The call goes on while this is read; closing it leaves. Ends without any part where it turns out to be no
        call. Raises CallLost where it fails before its answer begins, or is too large to be shared.
        """
        ...


class CallElsewhere(Protocol):
    """A call that another worker makes, or has just made."""

    @property
    def stored(self) -> bool:
        """It has ended, and its answer is in the cache or about to be."""
        ...

    def parts(self) -> AsyncGenerator[CallPart, None]:
        """Ends without any part where the call cannot be had: it is over, its worker or the board is away. Raises
        CallLost where it failed before its answer began, or broke off after. Closing it leaves the call.
        """
        ...


class FlightBoard(Protocol):
    """Which worker makes a call that several are asked for at the same time.

    `key` is a keyed hash that already holds the scope. Nothing here ever fails a request: with the board away each
    worker makes its own calls.
    """

    async def claim(
        self, key: str, call: SharedCall, over: CallElsewhere | None = None
    ) -> CallElsewhere | None:
        """The same call in another worker; None: this worker is to make it. `landed` must follow in either case.

        `over`: what an earlier claim gave and could not be had; its place is taken unless a third has it by now.
        """
        ...

    def landed(self, key: str, call: SharedCall, stored: bool) -> None:
        """The call has ended. `stored`: its answer was given to the cache. Never blocks and never raises."""
        ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...


class Journal(Protocol):
    """This worker's own locked file. Every call returns once the record is with the operating system."""

    def open(self, record: OpenRecord, *, attempt_follows: bool = False) -> None:
        """`attempt_follows`: nothing is sent before an `attempt` of this request, which takes the record along."""
        ...

    def attempt(self, record: AttemptRecord) -> None:
        """Raises UnavailableError where it cannot be written; an opening that it takes along is gone then."""
        ...

    def settle(self, record: RequestRecord) -> None: ...


class FeedbackStore(Protocol):
    """Scores of answers, each labelling the model that made the answer."""

    async def keep(self, caller: Caller, request_id: str, score: float, comment: str | None) -> None:
        """The latest score of a key counts; the same again changes nothing.

        Raises NotFound where the caller's team has no request of this id, InvalidRequest where no model answered it,
        Overloaded where it is still on its way to the ledger or the ledger is away.
        """
        ...


class KeyDirectory(Protocol):
    """API keys by keyed hash. `find` touches memory only; `find_new` may ask SQL for a hash not seen yet."""

    def find(self, key_hash: str) -> Caller | None: ...

    async def find_new(self, key_hash: str) -> Caller | None: ...
