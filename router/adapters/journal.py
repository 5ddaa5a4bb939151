"""The journal: every admitted request is on disk here before a provider is called.

Each worker process owns one folder, `DATA_DIR/journal/NAME/`, for its whole life and holds an exclusive lock
(flock) on its `lock` file. Inside lie numbered segments. A folder whose lock is free is what a dead process
left behind: whoever gets its lock adopts it.

A frame is `length u32, crc32 u32, kind u8, id length u8, id, msgpack`, little endian; length counts all that
follows the checksum, the checksum covers it. A frame goes with one unbuffered write(), so a record survives
kill -9 the moment the call returns. What a crash of the machine may take is bounded by `sync`.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from msgspec import structs

from router.core.errors import UnavailableError
from router.core.types import AttemptRecord, OpenRecord, RequestRecord

log = logging.getLogger(__name__)

OPEN, ATTEMPT, SETTLE = 1, 2, 3

SEGMENT_BYTES = 8 * 1024 * 1024
# A frame above it cannot be one of ours: it bounds what a corrupt length makes a reader allocate.
MAX_FRAME_BYTES = 4 * 1024 * 1024
_READ_BYTES = 256 * 1024

_HEADER = struct.Struct("<II")
_BODY = struct.Struct("<BB")
_LOCK_NAME = "lock"
_SUFFIX = ".journal"


def _encodable(value: Any) -> Any:
    if isinstance(value, Mapping):  # a mappingproxy, for one
        return dict(value)
    raise NotImplementedError(f"{type(value).__name__} has no place in a journal record")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encodable)
_open_decoder = msgspec.msgpack.Decoder(OpenRecord)
_attempt_decoder = msgspec.msgpack.Decoder(AttemptRecord)
_settle_decoder = msgspec.msgpack.Decoder(RequestRecord)


class Frame(msgspec.Struct, frozen=True):
    """One record as it lies on disk, still encoded."""

    segment: int
    kind: int
    request_id: str
    payload: bytes


def decode_open(payload: bytes) -> OpenRecord:
    return _open_decoder.decode(payload)


def decode_attempt(payload: bytes) -> AttemptRecord:
    return _attempt_decoder.decode(payload)


def decode_settle(payload: bytes) -> RequestRecord:
    return _settle_decoder.decode(payload)


def _frame(kind: int, request_id: str, record: Any) -> bytes:
    try:
        payload = _encoder.encode(record)
        name = request_id.encode()
    except UnicodeEncodeError:  # a lone surrogate out of a caller's JSON
        payload = _encoder.encode(with_texts(record, _without_surrogates))
        name = request_id.encode(errors="replace")
    if len(name) > 255:
        raise ValueError("a request id has at most 255 bytes")
    body = _BODY.pack(kind, len(name)) + name + payload
    return _HEADER.pack(len(body), zlib.crc32(body)) + body


def _without_surrogates(text: str) -> str:
    return text.encode(errors="replace").decode()


def with_texts(value: Any, changed: Callable[[str], str]) -> Any:
    """The same record with every text in it as `changed` gives it."""
    if isinstance(value, str):
        return changed(value)
    if isinstance(value, msgspec.Struct):
        texts = {name: with_texts(getattr(value, name), changed) for name in value.__struct_fields__}
        return structs.replace(value, **texts)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: with_texts(getattr(value, f.name), changed) for f in fields(value)})
    if isinstance(value, Mapping):
        return {with_texts(key, changed): with_texts(item, changed) for key, item in value.items()}
    if isinstance(value, tuple | list | frozenset):
        return type(value)(with_texts(item, changed) for item in value)
    return value


class JournalFile:
    """This worker's journal (`ports.Journal`). One thread appends; another may read and retry.

    `open` and `attempt` raise UnavailableError when the record cannot be stored (a full disk): nothing may be
    dispatched then. `settle` never raises: what cannot be stored is kept in memory until `retry` stores it.
    """

    def __init__(
        self, folder: Path, worker_id: str = "worker", *, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        """Raises UnavailableError when the folder cannot be made or written."""
        self._segment_bytes = segment_bytes
        self._mutex = threading.Lock()
        self._waiting: deque[tuple[bytes, RequestRecord]] = deque()
        self._in_flight: set[str] = set()
        self._held: dict[str, bytes] = {}
        """Frames of `open` that go with their first attempt."""
        self.settled = 0
        """Requests settled by this worker, stored or still waiting for the disk."""
        self.appended = 0
        """Frames on disk."""
        name = f"{worker_id}-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Made and locked under a hidden name, so that nobody adopts it between the two.
            making = folder / f".{name}"
            making.mkdir(mode=0o700)
            self._lock = os.open(making / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.folder = folder / name
            making.rename(self.folder)
            self._start_segment(1)
        except OSError as error:
            raise UnavailableError(f"the journal cannot be written: {error.strerror}") from None

    def _start_segment(self, number: int) -> None:
        path = segment_path(self.folder, number)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = 0
        self._end = (number, 0)

    @property
    def end(self) -> tuple[int, int]:
        """(segment, offset) behind the last whole frame: a reader never sees one half written."""
        return self._end

    @property
    def in_flight(self) -> int:
        """Requests opened and not settled."""
        return len(self._in_flight)

    @property
    def waiting(self) -> int:
        """Settled records that the disk did not take yet."""
        return len(self._waiting)

    def open(self, record: OpenRecord, *, attempt_follows: bool = False) -> None:
        frame = _frame(OPEN, record.id, record)
        if attempt_follows:
            self._held[record.id] = frame
        else:
            self._append_or_raise(frame)
        self._in_flight.add(record.id)

    def attempt(self, record: AttemptRecord) -> None:
        frame = _frame(ATTEMPT, record.request_id, record)
        opening = self._held.pop(record.request_id, None)
        if opening is None:
            self._append_or_raise(frame)
            return
        try:
            self._append_or_raise(opening + frame, frames=2)
        except UnavailableError:
            self._in_flight.discard(record.request_id)
            raise

    def settle(self, record: RequestRecord) -> None:
        try:
            frame = _frame(SETTLE, record.id, record)
        except Exception:
            # A record that cannot be encoded is a defect; the open record still books the request.
            log.exception("a settled request could not be encoded for the journal")
            return
        self.settled += 1
        self._in_flight.discard(record.id)
        self._held.pop(record.id, None)
        try:
            with self._mutex:
                if self._waiting:
                    self._waiting.append((frame, record))
                else:
                    self._append(frame)
        except OSError as error:
            self._waiting.append((frame, record))
            log.error("the journal cannot be written, settled requests wait in memory: %s", error.strerror)

    def retry(self) -> None:
        """Stores what waits in memory, as far as the disk takes it."""
        if not self._waiting:
            return
        with self._mutex, suppress(OSError):
            while self._waiting:
                self._append(self._waiting[0][0])
                self._waiting.popleft()

    def waiting_records(self) -> list[RequestRecord]:
        """What waits in memory, the oldest first, for one who books it without the disk."""
        with self._mutex:
            return [record for _, record in self._waiting]

    def booked(self, number: int) -> None:
        """The oldest `number` of them are booked and wait no more."""
        with self._mutex:
            for _ in range(number):
                self._waiting.popleft()

    def sync(self) -> None:
        """Asks the operating system to bring this segment to the disk (for a crash of the machine)."""
        with suppress(OSError):
            os.fsync(self._file)

    def rotate(self) -> None:
        """Starts a new segment."""
        with self._mutex:
            self._rotate()

    def close(self) -> None:
        """Gives the lock back; an empty folder goes."""
        with self._mutex:
            if self._lock < 0:
                return
            if self._size == 0:
                segment_path(self.folder, self._end[0]).unlink(missing_ok=True)
            os.close(self._file)
            if not segment_numbers(self.folder):
                remove_folder(self.folder)
            os.close(self._lock)
            self._file = self._lock = -1

    def _append_or_raise(self, data: bytes, frames: int = 1) -> None:
        try:
            with self._mutex:
                self._append(data, frames)
        except OSError as error:
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise UnavailableError(f"the journal cannot be written: {reason}") from None

    def _append(self, data: bytes, frames: int = 1) -> None:
        """Appends whole frames: all of them, or none."""
        if self._size >= self._segment_bytes:
            self._rotate()
        try:
            written = os.write(self._file, data)
            if written != len(data):
                # A short write is how a filling disk announces itself; the rest fails with the true reason.
                os.write(self._file, data[written:])
                if os.fstat(self._file).st_size != self._size + len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._forget_torn_frame()
            raise
        self._size += len(data)
        self._end = (self._end[0], self._size)
        self.appended += frames

    def _forget_torn_frame(self) -> None:
        try:
            os.ftruncate(self._file, self._size)
        except OSError:
            # Half a frame stays: what follows must go where a reader is sure to find it.
            with suppress(OSError):
                self._rotate()

    def _rotate(self) -> None:
        old = self._file
        self._start_segment(self._end[0] + 1)
        os.close(old)


def segment_path(folder: Path, number: int) -> Path:
    return folder / f"{number:010d}{_SUFFIX}"


def segment_numbers(folder: Path) -> list[int]:
    try:
        return sorted(int(path.name[: -len(_SUFFIX)]) for path in folder.glob(f"*{_SUFFIX}"))
    except FileNotFoundError:
        return []


def journal_folders(folder: Path) -> list[Path]:
    """Every worker's folder, of the living and the dead."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def remove_folder(folder: Path) -> None:
    """Only for the holder of its lock, once every record is committed."""
    for number in segment_numbers(folder):
        segment_path(folder, number).unlink(missing_ok=True)
    (folder / _LOCK_NAME).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def adopt(folder: Path) -> int | None:
    """Takes the lock of a folder nobody holds. None while its owner lives or when it is gone.

    The caller closes the returned file descriptor to give the lock back.
    """
    path = folder / _LOCK_NAME
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between open and flock another adopter may have finished and removed it.
        if os.fstat(lock).st_ino == path.stat().st_ino:
            return lock
    except OSError:
        pass
    os.close(lock)
    return None


class JournalReader:
    """Reads one folder from its first segment on. `skipped` counts damaged frames and torn tails."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.skipped = 0
        self.frames_read = 0
        self._segment = 0
        self._offset = 0
        self._file = -1

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    @property
    def segment(self) -> int:
        """The segment it reads; all before it are read."""
        return self._segment

    def frames(self, end: tuple[int, int] | None = None) -> Iterator[Frame]:
        """What lies between the last call and `end` (the owner's; None: to the end of what is on disk)."""
        while True:
            if self._file < 0 and not self._open_next():
                return
            last = end is not None and self._segment >= end[0]
            yield from self._segment_frames(end[1] if last and end is not None else None)
            if last:
                return
            if not any(number > self._segment for number in segment_numbers(self.folder)):
                return
            self.close()

    def _open_next(self) -> bool:
        for number in segment_numbers(self.folder):
            if number > self._segment:
                try:
                    self._file = os.open(segment_path(self.folder, number), os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:  # committed and removed by its owner while we look on
                    continue
                self._segment, self._offset = number, 0
                return True
        return False

    def _segment_frames(self, limit: int | None) -> Iterator[Frame]:
        size = os.fstat(self._file).st_size if limit is None else limit
        while self._offset < size:
            wanted = _READ_BYTES
            chunk = os.pread(self._file, min(wanted, size - self._offset), self._offset)
            if len(chunk) >= _HEADER.size:
                wanted = _HEADER.size + _HEADER.unpack_from(chunk)[0]
                if len(chunk) < wanted <= min(MAX_FRAME_BYTES, size - self._offset):
                    chunk = os.pread(self._file, wanted, self._offset)
            before = self._offset
            yield from self._parse(chunk)
            if self._offset == before:
                # Nothing usable up to the end: a torn tail, or a length that cannot be true.
                self.skipped += 1
                self._offset = size

    def _parse(self, chunk: bytes) -> Iterator[Frame]:
        at, available = 0, len(chunk)
        while at + _HEADER.size <= available:
            length, checksum = _HEADER.unpack_from(chunk, at)
            start, stop = at + _HEADER.size, at + _HEADER.size + length
            if stop > available or length < _BODY.size:
                return
            body = chunk[start:stop]
            at = stop
            self._offset += _HEADER.size + length
            if zlib.crc32(body) != checksum:
                self.skipped += 1  # the length led to a next frame: only this one is lost
                continue
            kind, id_length = _BODY.unpack_from(body)
            name_end = _BODY.size + id_length
            self.frames_read += 1
            yield Frame(self._segment, kind, body[_BODY.size : name_end].decode(), body[name_end:])
