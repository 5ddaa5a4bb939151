"""Which worker makes a call that several are asked for at the same time, in Redis.

**Lease.** One key a call names the worker that makes it; claiming it is one round trip, giving it back another, off
the path. It is not renewed: it counts as long as its worker lives and says that it makes that call. Where the answer
went into the cache, a mark takes its place for a second, so that who missed the answer just before looks again.

**Inbox.** One stream a worker, which this worker alone reads, on a connection of its own. It expires two seconds
after its worker's last sign of life, and nobody else makes it anew: a send that finds none found a dead worker.
A follower asks there for the call; its worker then sends what there is of it and what comes, into the follower's
inbox, at most AHEAD bytes before the follower has taken them. Nothing is sent of a call nobody asked for. Words are
numbered: what a lost, emptied or restarted Redis swallowed is asked for again, from the byte it is missing at.

**Leaving.** A follower counts as a reader of the call: while one is left in any worker it goes on. One that leaves
says so; one that died is found out by its inbox.

**Trust.** Every word is signed (HMAC-SHA256, RFC 2104) for the inbox it goes to, with a key made of the secret that
all workers share, and answers name a follower by a random id: who can write to Redis cannot forge an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import count
from typing import Any

import msgspec

from router.adapters.redis_store.connection import RedisConnection, Script
from router.core.errors import CallLost, UnavailableError
from router.core.ports import CallBegun, CallElsewhere, CallEnded, CallPart, SharedCall
from router.stages.flight import AHEAD, UsageFrame

logger = logging.getLogger(__name__)

_LEASE = "farthing:flight:"
_INBOX = "farthing:inbox:"
_LANDED = b"landed"
LEASE_MS = 600_000
LANDED_MS = 1_000
INBOX_MS = 2_000
BEAT = 0.5
"""Seconds between the signs of life of a worker, and of a call that has nothing to say."""
TICK = 0.25
SILENCE = 2.0
"""Seconds without a word after which a call's worker is taken for dead; after half of it the call is asked for
anew.
"""
AWAY = 10.0
"""Seconds an answer that has begun waits for a Redis that is away."""
BLOCK = 2.0
PIECE = 64 * 1024
"""Bytes of an answer that travel at once."""
KEPT_WORDS = 10_000
MAX_RELEASES = 10_000

# KEYS: lease. ARGV: what may be replaced, the new lease, its life in ms. Reply: '' where it was taken, else what is
# there.
_CLAIM = Script("""#!lua
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] then return held end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return ''
""")

# KEYS: lease. ARGV: what it must be, the mark that takes its place ('': none), the mark's life in ms.
_RELEASE = Script("""#!lua
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == '' then redis.call('DEL', KEYS[1]) else redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) end
return 1
""")


class _Ask(msgspec.Struct, array_like=True, tag="ask", frozen=True):
    """`attempt` counts the asks of one follower. `after`: bytes of the answer it has."""

    follow: str
    attempt: int
    sender: str
    key: str
    lease: bytes
    after: int


class _Took(msgspec.Struct, array_like=True, tag="took", frozen=True):
    """Bytes of the answer that the follower has taken in all."""

    follow: str
    size: int


class _Leave(msgspec.Struct, array_like=True, tag="leave", frozen=True):
    follow: str


class _Here(msgspec.Struct, array_like=True, tag="here", frozen=True):
    """A sign of life; `number` words were said so far."""

    follow: str
    attempt: int
    sender: str
    number: int


class _Word(msgspec.Struct, array_like=True, tag="word", frozen=True):
    """One of: that the call begins, frames (`usage`: which of them only carry usage), how it ended, that it failed
    (`lost`), that there is no such call here any more (neither).
    """

    follow: str
    attempt: int
    number: int
    key: str
    begun: CallBegun | None = None
    frames: tuple[bytes, ...] = ()
    usage: tuple[int, ...] = ()
    ended: CallEnded | None = None
    lost: bool = False
    stored: bool = False


_Message = _Ask | _Took | _Leave | _Here | _Word
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Message).decode


@dataclass(slots=True)
class _Ear:
    """Where a follower hears the words to its latest ask."""

    follow: str = field(default_factory=lambda: secrets.token_hex(12))
    attempt: int = 0
    words: asyncio.Queue[_Word | _Here] = field(default_factory=asyncio.Queue)
    expected: int = 0
    told: int = 0

    async def next(self, seconds: float) -> _Word | _Here | None:
        with contextlib.suppress(asyncio.QueueEmpty):
            return self.words.get_nowait()
        # Not `wait_for`: before Python 3.12 it may swallow that its caller is cancelled.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                return await self.words.get()
        return None


@dataclass(slots=True)
class _Pump:
    """Sends a call to one follower. `sent` and `taken` count bytes of the answer."""

    ask: _Ask
    call: SharedCall
    sent: int
    taken: int
    room: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    number: int = 0
    beating: bool = False


class _Unheard(Exception):
    """The follower's worker does not hear what is sent to it."""


class RedisFlightBoard:
    """See the port `FlightBoard`. The connection is shared: `close` leaves it open. `secret`: that of all workers."""

    def __init__(self, connection: RedisConnection, secret: bytes) -> None:
        self._connection = connection
        self._signing = hmac.new(secret, b"farthing words between workers", sha256).digest()
        self._worker = secrets.token_hex(8)
        self._inbox = _INBOX + self._worker
        self._numbers = count()
        self._leading: dict[str, tuple[bytes, SharedCall]] = {}
        self._releases: OrderedDict[bytes, tuple[str, bool]] = OrderedDict()
        self._releaser: asyncio.Task[None] | None = None
        self._pumps: dict[str, _Pump] = {}
        self._ears: dict[str, _Ear] = {}
        self._last: bytes | str = "0"
        self._tasks: list[asyncio.Task[None]] = []
        self._aside: set[asyncio.Task[Any]] = set()
        self._warned = False
        connection.on_recovery(self._recover)

    async def start(self) -> None:
        with contextlib.suppress(UnavailableError):
            await self._sign_of_life()
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._read()), loop.create_task(self._live())]

    async def close(self) -> None:
        if self._releaser is not None:
            await asyncio.wait([self._releaser], timeout=0.5)
        pumps = [pump.task for pump in self._pumps.values() if pump.task is not None]
        ended = [*self._tasks, *pumps, *self._aside]
        if self._releaser is not None:
            ended.append(self._releaser)
        for task in ended:
            task.cancel()
        await asyncio.gather(*ended, return_exceptions=True)
        with contextlib.suppress(UnavailableError):
            await self._connection.execute("UNLINK", self._inbox)

    async def claim(
        self, key: str, call: SharedCall, over: CallElsewhere | None = None
    ) -> CallElsewhere | None:
        if key in self._leading or not self._connection.up:
            return None
        lease = f"{self._worker}/{next(self._numbers)}".encode()
        self._leading[key] = (lease, call)
        replaced = over.lease if isinstance(over, _Elsewhere) else b""
        try:
            held = await self._claimed(key, replaced, lease)
            if held.startswith(self._worker.encode()):
                held = await self._claimed(key, held, lease)  # of an earlier call, not given back yet
        except UnavailableError:
            return None
        except asyncio.CancelledError:
            self.landed(key, call, stored=False)
            raise
        if not held:
            return None
        self._leading.pop(key, None)
        return _Elsewhere(self, key, held)

    async def _claimed(self, key: str, replaced: bytes, lease: bytes) -> bytes:
        held = await self._connection.run(_CLAIM, [_LEASE + key], [replaced, lease, LEASE_MS])
        return held if isinstance(held, bytes) else b""

    def landed(self, key: str, call: SharedCall, stored: bool) -> None:
        lease, led = self._leading.get(key, (b"", None))
        if led is not call:
            return
        del self._leading[key]
        self._releases[lease] = (key, stored)
        while len(self._releases) > MAX_RELEASES:
            self._releases.popitem(last=False)
        if self._releaser is None or self._releaser.done():
            self._releaser = asyncio.get_running_loop().create_task(self._release())

    async def _release(self) -> None:
        while self._releases:
            lease, (key, stored) = next(iter(self._releases.items()))
            try:
                mark = _LANDED if stored else b""
                await self._connection.run(_RELEASE, [_LEASE + key], [lease, mark, LANDED_MS])
            except UnavailableError:
                self._releases.clear()  # who finds such a lease asks, and hears that there is no such call
                return
            self._releases.pop(lease, None)

    # This worker's inbox

    async def _sign_of_life(self, *, trial: bool = False) -> None:
        execute = self._connection.execute
        if not await execute("PEXPIRE", self._inbox, INBOX_MS, trial=trial):
            made = await execute("XADD", self._inbox, "MAXLEN", 1, "*", "hello", "", trial=trial)
            await execute("PEXPIRE", self._inbox, INBOX_MS, trial=trial)
            if isinstance(made, bytes):
                self._last = made

    async def _recover(self) -> None:
        if self._tasks:
            await self._sign_of_life(trial=True)

    async def _live(self) -> None:
        while True:
            with contextlib.suppress(UnavailableError):
                await self._sign_of_life()
            for pump in self._pumps.values():
                if not pump.beating:
                    self._later(self._beat(pump))
            await asyncio.sleep(BEAT)

    async def _read(self) -> None:
        while True:
            words = ("XREAD", "COUNT", 64, "BLOCK", int(BLOCK * 1000), "STREAMS", self._inbox, self._last)
            try:
                reply = await self._connection.listen(*words, seconds=BLOCK)
                for name, fields in _entries(reply):
                    self._last = name
                    self._heard(fields)
                if reply:
                    await self._connection.execute("XTRIM", self._inbox, "MINID", self._last)
            except UnavailableError:
                await asyncio.sleep(0.1)

    def _heard(self, fields: dict[bytes, bytes]) -> None:
        signed = fields.get(b"word", b"")
        if not signed:
            return
        if not hmac.compare_digest(signed[:32], self._signature(self._inbox, signed[32:])):
            if not self._warned:
                logger.warning(
                    "a word between workers is not signed with this FARTHING_SECRET; it is ignored"
                )
            self._warned = True
            return
        try:
            message = _decode(signed[32:])
        except msgspec.MsgspecError:
            return  # of another version
        if isinstance(message, _Word | _Here):
            ear = self._ears.get(message.follow)
            if ear is not None:
                if message.attempt == ear.attempt:
                    ear.words.put_nowait(message)
            elif isinstance(message, _Here):
                self._tell(message.sender, _Leave(message.follow))
        elif isinstance(message, _Ask):
            self._asked(message)
        elif (pump := self._pumps.get(message.follow)) is not None:
            if isinstance(message, _Took):
                pump.taken = max(pump.taken, message.size)
                pump.room.set()
            elif pump.task is not None:
                pump.task.cancel()

    def _signature(self, inbox: str, payload: bytes) -> bytes:
        return hmac.digest(self._signing, inbox.encode() + b"\0" + payload, "sha256")

    async def send(self, worker: str, message: _Message) -> bool:
        """False: that worker is dead. Raises UnavailableError."""
        inbox = _INBOX + worker
        payload = _encode(message)
        signed = self._signature(inbox, payload) + payload
        reply = await self._connection.execute(
            "XADD", inbox, "NOMKSTREAM", "MAXLEN", "~", KEPT_WORDS, "*", "word", signed
        )
        return reply is not None

    def _tell(self, worker: str, message: _Message) -> None:
        async def tell() -> None:
            with contextlib.suppress(UnavailableError):
                await self.send(worker, message)

        self._later(tell())

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)

    # Calls of this worker that others follow

    def _asked(self, ask: _Ask) -> None:
        earlier = self._pumps.get(ask.follow)
        if earlier is not None and earlier.ask.attempt >= ask.attempt:
            return
        call = self._shared(ask)
        if call is None:
            _, stored = self._releases.get(ask.lease, ("", False))
            self._tell(ask.sender, _Word(ask.follow, ask.attempt, 0, ask.key, stored=stored))
            return
        if earlier is not None and earlier.task is not None:
            earlier.task.cancel()
        pump = self._pumps[ask.follow] = _Pump(ask, call, ask.after, ask.after)
        pump.task = asyncio.get_running_loop().create_task(self._pumped(pump, call))
        pump.task.add_done_callback(lambda _: self._pumped_out(pump))

    def _pumped_out(self, pump: _Pump) -> None:
        if self._pumps.get(pump.ask.follow) is pump:
            del self._pumps[pump.ask.follow]

    def _shared(self, ask: _Ask) -> SharedCall | None:
        lease, call = self._leading.get(ask.key, (b"", None))
        if call is not None and lease == ask.lease and call.joinable:
            return call
        # It has ended, and a follower of it missed the last words.
        pumps = self._pumps.values()
        return next(
            (pump.call for pump in pumps if pump.ask.key == ask.key and pump.ask.lease == ask.lease), None
        )

    async def _pumped(self, pump: _Pump, call: SharedCall) -> None:
        skipped = 0
        try:
            async with aclosing(call.parts()) as parts:
                async for part in parts:
                    if isinstance(part, CallBegun):
                        await self._say(pump, begun=part)
                    elif isinstance(part, CallEnded):
                        await self._say(pump, ended=part)
                    else:
                        for pieces in _pieces(part):
                            size = sum(map(len, pieces))
                            if skipped + size <= pump.ask.after:
                                skipped += size
                                continue
                            left = _without(pieces, pump.ask.after - skipped)
                            skipped = pump.ask.after
                            await self._say_frames(pump, left)
            if not pump.number:
                await self._say(pump)
            # Until the follower, who has heard it all, leaves: the last words may get lost.
            await asyncio.sleep(AWAY)
        except CallLost:
            with contextlib.suppress(_Unheard):
                await self._say(pump, lost=True)
        except _Unheard:
            return
        except Exception:
            logger.exception("a call could not be shared")

    async def _say_frames(self, pump: _Pump, frames: tuple[bytes, ...]) -> None:
        while pump.sent - pump.taken > AHEAD:
            pump.room.clear()
            await pump.room.wait()
        pump.sent += sum(map(len, frames))
        usage = tuple(at for at, frame in enumerate(frames) if isinstance(frame, UsageFrame))
        await self._say(pump, frames=tuple(bytes(frame) for frame in frames), usage=usage)

    async def _say(self, pump: _Pump, **what: Any) -> None:
        word = _Word(pump.ask.follow, pump.ask.attempt, pump.number, pump.ask.key, **what)
        pump.number += 1
        await self._deliver(pump, word)

    async def _deliver(self, pump: _Pump, message: _Message) -> None:
        """Raises _Unheard where the follower's worker is dead, or Redis stays away."""
        loop = asyncio.get_running_loop()
        end, was_away = loop.time() + SILENCE, False
        while True:
            away = False
            try:
                if await self.send(pump.ask.sender, message):
                    return
            except UnavailableError:
                away = True
            if away != was_away:
                end, was_away = loop.time() + (AWAY if away else SILENCE), away
            if loop.time() > end:
                raise _Unheard
            await asyncio.sleep(0.1)

    async def _beat(self, pump: _Pump) -> None:
        pump.beating = True
        try:
            await self._deliver(pump, _Here(pump.ask.follow, pump.ask.attempt, self._worker, pump.number))
        except _Unheard:
            if pump.task is not None:
                pump.task.cancel()
        finally:
            pump.beating = False

    # Calls of others that this worker follows

    async def follow(self, elsewhere: _Elsewhere) -> AsyncGenerator[CallPart, None]:
        """See the port `CallElsewhere`."""
        key, lease = elsewhere.key, elsewhere.lease
        worker = lease.partition(b"/")[0].decode("ascii", "replace")
        begun, taken = False, 0
        silent = away = 0.0
        ear = _Ear()
        self._ears[ear.follow] = ear
        anew = True
        try:
            while True:
                if anew:
                    anew = False
                    ear.attempt, ear.expected, ear.words = ear.attempt + 1, 0, asyncio.Queue()
                    ask = _Ask(ear.follow, ear.attempt, self._worker, key, lease, taken)
                    if not await self._sent(worker, ask) and not begun:
                        return
                word = await ear.next(TICK)
                if word is None:
                    # A call that has not begun is left only once an outage is confirmed; one that has waits.
                    if self._connection.up or (self._connection.suspected and not begun):
                        if away:
                            silent, away = -SILENCE / 2, 0.0  # the other worker finds out a little later
                        silent += TICK
                    elif not begun:
                        return
                    else:
                        away += TICK
                    if silent >= SILENCE or away >= AWAY:
                        if begun:
                            raise CallLost("its worker is gone")
                        return
                    anew = silent == SILENCE / 2
                    if taken > 0:
                        self._tell(worker, _Took(ear.follow, taken))
                    continue
                silent = away = 0.0
                if word.number > ear.expected:
                    anew = True
                    continue
                if isinstance(word, _Here) or word.key != key or word.number < ear.expected:
                    continue
                ear.expected += 1
                if word.begun is not None:
                    if not begun:
                        begun = True
                        yield word.begun
                elif word.frames:
                    taken += sum(map(len, word.frames))
                    yield tuple(
                        UsageFrame(frame) if at in word.usage else frame
                        for at, frame in enumerate(word.frames)
                    )
                    if taken - ear.told > AHEAD // 4:
                        ear.told = taken
                        self._tell(worker, _Took(ear.follow, taken))
                else:
                    if word.ended is not None:
                        yield word.ended
                        return
                    if word.lost or begun:
                        raise CallLost("the call failed")
                    elsewhere.stored = word.stored
                    return
        finally:
            del self._ears[ear.follow]
            self._tell(worker, _Leave(ear.follow))

    async def _sent(self, worker: str, message: _Message) -> bool:
        try:
            return await self.send(worker, message)
        except UnavailableError:
            return False


class _Elsewhere:
    """A lease that another worker holds, or the mark of one that was given back."""

    def __init__(self, board: RedisFlightBoard, key: str, lease: bytes) -> None:
        self.key = key
        self.lease = lease
        self.stored = lease == _LANDED
        self._board = board

    async def parts(self) -> AsyncGenerator[CallPart, None]:
        if self.lease == _LANDED:
            return
        async with aclosing(self._board.follow(self)) as parts:
            async for part in parts:
                yield part


def _entries(reply: Any) -> Iterator[tuple[bytes, dict[bytes, bytes]]]:
    """The entries of one stream out of what XREAD replied."""
    for _, entries in reply or ():
        yield from entries


def _pieces(frames: tuple[bytes, ...]) -> Iterator[tuple[bytes, ...]]:
    """The same bytes in the same order, at most PIECE at once; a frame larger than that is cut."""
    pieces: list[bytes] = []
    size = 0
    for frame in frames:
        if size + len(frame) > PIECE and pieces:
            yield tuple(pieces)
            pieces, size = [], 0
        if len(frame) > PIECE:
            for at in range(0, len(frame), PIECE):
                yield (_like(frame, frame[at : at + PIECE]),)
        else:
            pieces.append(frame)
            size += len(frame)
    if pieces:
        yield tuple(pieces)


def _without(frames: tuple[bytes, ...], count: int) -> tuple[bytes, ...]:
    """Without the first `count` bytes."""
    left = []
    for frame in frames:
        if count < len(frame):
            left.append(_like(frame, frame[count:]) if count else frame)
        count = max(0, count - len(frame))
    return tuple(left)


def _like(frame: bytes, piece: bytes) -> bytes:
    return UsageFrame(piece) if isinstance(frame, UsageFrame) else piece
