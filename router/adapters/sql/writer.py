"""The one writer of a worker: its journal, and what dead workers left, into SQL."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import msgspec
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from router.adapters.journal import (
    ATTEMPT,
    OPEN,
    SETTLE,
    Frame,
    JournalFile,
    JournalReader,
    adopt,
    decode_attempt,
    decode_open,
    decode_settle,
    journal_folders,
    remove_folder,
    segment_path,
)
from router.adapters.sql.database import unavailable
from router.adapters.sql.ledger import Ledger, without_nul
from router.core.errors import UnavailableError
from router.core.ports import Clock
from router.core.pricing import price_usage, total
from router.core.types import (
    Attempt,
    AttemptRecord,
    NanoUSD,
    OpenRecord,
    RequestRecord,
    Usage,
)

log = logging.getLogger(__name__)

BATCH = 500
POLL_SECONDS = 0.2
ADOPT_SECONDS = 5.0
SYNC_SECONDS = 1.0
FIRST_BACKOFF, LAST_BACKOFF = 0.1, 5.0
REJECTED_FILE = "rejected.jsonl"
RESTARTED = "gateway_restarted"


def cancelled(opened: OpenRecord, attempts: Sequence[AttemptRecord], settled_at: datetime) -> RequestRecord:
    """The entry of a request whose process died. The attempt in progress is booked at its forecast, those
    before it had failed and are booked at nothing; all of it is flagged as an estimate. `http_status` is 0:
    the caller saw a lost connection.
    """
    forecast = Usage(input=opened.input_tokens, output=opened.output_tokens)
    booked: list[Attempt] = []
    for number, attempt in enumerate(sorted(attempts, key=lambda item: item.index), start=1):
        in_progress = number == len(attempts)
        usage = forecast if in_progress else Usage()
        lines = price_usage(usage, attempt.price) if attempt.price is not None and in_progress else ()
        cost = None if attempt.price is None and in_progress else total(lines)
        booked.append(
            Attempt(
                index=attempt.index,
                provider=attempt.provider,
                model=attempt.model,
                upstream_model=attempt.upstream_model,
                started_at=attempt.started_at,
                outcome="cancelled" if in_progress else "failed",
                error=RESTARTED,
                usage=usage,
                estimated=True,
                lines=lines,
                cost=cost,
                price=attempt.price,
            )
        )
    last = booked[-1] if booked else None
    return RequestRecord(
        id=opened.id,
        opened_at=opened.opened_at,
        settled_at=settled_at,
        key_id=opened.key_id,
        team=opened.team,
        app=opened.app,
        cost_center=opened.cost_center,
        tags={},
        endpoint=opened.endpoint,
        caller_request_id=opened.caller_request_id,
        requested_model=opened.requested_model,
        baseline_model=None,
        served_model=last.model if last else None,
        served_provider=last.provider if last else None,
        streamed=opened.streamed,
        prompt_class=opened.prompt_class,
        difficulty=None,
        confidence=None,
        encoder=None,
        decision="",
        dropped={},
        propensity=1.0,
        policy_hash=opened.policy_hash,
        exceptions=(),
        budgets=opened.budgets,
        cache="miss",
        cache_entry=None,
        status="cancelled",
        http_status=0,
        error=RESTARTED,
        estimated=True,
        unpriced=last is not None and last.cost is None,
        usage=last.usage if last else Usage(),
        worst_case=opened.worst_case,
        cost=last.cost if last else NanoUSD(0),
        baseline=None,
        routing_savings=None,
        cache_savings=None,
        overhead=None,
        potential_savings=None,
        first_token_ms=None,
        duration_ms=max(0.0, (settled_at - opened.opened_at).total_seconds() * 1000),
        attempts=tuple(booked),
    )


@dataclass(slots=True)
class _Unfinished:
    """Which requests still need which segment of a journal."""

    by_segment: dict[int, set[str]] = field(default_factory=dict)

    def seen(self, segment: int, request_id: str) -> None:
        self.by_segment.setdefault(segment, set()).add(request_id)

    def committed(self, request_ids: Sequence[str]) -> None:
        for ids in self.by_segment.values():
            ids.difference_update(request_ids)

    def spent_segments(self, before: int) -> list[int]:
        return [number for number, ids in self.by_segment.items() if number < before and not ids]


class LedgerWriter:
    """Brings this worker's journal to SQL, and the journals of dead workers.

    One thread; a settled request is in SQL within `POLL_SECONDS` and the time of a commit. While SQL is away
    it holds one batch and the ids in flight, the rest waits on disk.
    """

    def __init__(
        self,
        engine: Engine,
        journal: JournalFile,
        folder: Path,
        clock: Clock,
        *,
        batch: int = BATCH,
        poll: float = POLL_SECONDS,
        adopt_every: float = ADOPT_SECONDS,
        sync: bool = False,
    ) -> None:
        """`folder` holds all journals (`DATA_DIR/journal`). `sync`: fsync once a second."""
        self._ledger = Ledger(engine)
        self._journal = journal
        self._folder = folder
        self._clock = clock
        self._batch_size = batch
        self._poll = poll
        self._adopt_every = adopt_every
        self._sync = sync
        self._reader = JournalReader(journal.folder)
        self._unfinished = _Unfinished()
        self._batch: list[RequestRecord] = []
        self._tried = False
        self._adopting = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self.on_cancelled: Callable[[RequestRecord], None] = lambda _: None
        """Told, in the writer's thread, of each request of a dead worker that had not settled: it may still be held
        in budgets.
        """
        self.sql_up = True
        """False from a failed write until the next that succeeds."""
        self.committed = 0
        """Requests of this worker that are in SQL."""
        self.adopted = 0
        """Requests booked for dead workers."""
        self.rejected = 0
        """Requests SQL refused for their content; they lie in `rejected.jsonl` and need a person."""
        self.skipped = 0
        """Damaged frames passed over in the journals of dead workers (torn tails included)."""
        self._frames_done = 0

    @property
    def unsettled(self) -> int:
        """Admitted requests of this worker that are not in SQL yet, those in flight included."""
        return self._journal.in_flight + self.backlog

    @property
    def backlog(self) -> int:
        """Settled requests of this worker that are not in SQL yet."""
        return self._journal.settled - self.committed

    async def replay(self) -> int:
        """Books what dead workers left behind; returns how many requests were new to SQL. Before readiness.

        Raises UnavailableError when SQL does not answer: nothing is lost, call it again.
        """
        return await asyncio.to_thread(self.adopt_orphans)

    async def flush(self, timeout: float = 10.0) -> None:  # noqa: ASYNC109
        """Returns once everything settled before the call is in SQL.

        Raises UnavailableError after `timeout` seconds.
        """
        target: int | None = None
        deadline = time.monotonic() + timeout
        self._wake.set()
        while target is None or self._frames_done < target:
            if time.monotonic() > deadline:
                raise UnavailableError("the ledger did not take every record in time")
            if target is None and not self._journal.waiting:
                target = self._journal.appended
                continue
            await asyncio.sleep(0.005)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> bool:
        """Writes what is left, as far as SQL takes it within `timeout` seconds, and closes the journal.

        True when everything settled is in SQL; else the next start does it.
        """
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return False
        self._reader.close()
        done = self.unsettled == 0 and self._frames_done == self._journal.appended
        if done:
            remove_folder(self._journal.folder)
        self._journal.close()
        return done

    def _run(self) -> None:
        backoff = FIRST_BACKOFF
        adopt_at = time.monotonic() + self._adopt_every
        sync_at = 0.0
        while True:
            stopping = self._stopping
            pause = self._poll
            try:
                self._journal.retry()
                self._drain()
                self._book_waiting()
                if not stopping and time.monotonic() >= adopt_at:
                    adopt_at = time.monotonic() + self._adopt_every
                    self.adopt_orphans()
                backoff = FIRST_BACKOFF
            except (SQLAlchemyError, UnavailableError) as error:
                reason = error if isinstance(error, UnavailableError) else unavailable(error)
                if self.sql_up:
                    log.error("%s; settled requests wait in the journal", reason)
                self.sql_up = False
                pause, backoff = backoff, min(backoff * 2, LAST_BACKOFF)
            except Exception:
                log.exception("the ledger writer failed and goes on")
                pause = LAST_BACKOFF
            if self._sync and time.monotonic() >= sync_at:
                sync_at = time.monotonic() + SYNC_SECONDS
                self._journal.sync()
            if stopping:
                return
            self._wake.wait(pause)
            self._wake.clear()

    def _drain(self) -> None:
        while True:
            if not self._batch and not self._read_batch():
                return
            self._commit(self._batch, fresh=not self._tried)
            ids = [record.id for record in self._batch]
            self.committed += len(ids)
            self._unfinished.committed(ids)
            self._batch = []
            for number in self._unfinished.spent_segments(before=self._reader.segment):
                segment_path(self._journal.folder, number).unlink(missing_ok=True)
                del self._unfinished.by_segment[number]
            # Last: who waits for it in `flush` finds everything done.
            self._frames_done = self._reader.frames_read + self._reader.skipped

    def _book_waiting(self) -> None:
        """What a full disk did not take goes straight to SQL, which may have a disk of its own."""
        while records := self._journal.waiting_records()[: self._batch_size]:
            self._commit(records, fresh=False)
            self.committed += len(records)
            self._unfinished.committed([record.id for record in records])
            self._journal.booked(len(records))

    def _read_batch(self) -> bool:
        self._tried = False
        for frame in self._reader.frames(self._journal.end):
            self._unfinished.seen(frame.segment, frame.request_id)
            if frame.kind != SETTLE:
                continue
            record = self._decoded(frame)
            if record is None:
                self.committed += 1
                self._unfinished.committed([frame.request_id])
                continue
            self._batch.append(record)
            if len(self._batch) >= self._batch_size:
                break
        if not self._batch:
            self._frames_done = self._reader.frames_read + self._reader.skipped
        return bool(self._batch)

    def _commit(self, records: Sequence[RequestRecord], *, fresh: bool) -> int:
        """Raises SQLAlchemyError when SQL is away; a record SQL refuses for its content is set aside."""
        self._tried = True
        try:
            written = self._ledger.write(records, fresh=fresh)
        except (DataError, IntegrityError):
            written = self._commit_one_by_one(records)
        self.sql_up = True
        return written

    def _commit_one_by_one(self, records: Sequence[RequestRecord]) -> int:
        try:
            return self._ledger.write([without_nul(record) for record in records], fresh=False)
        except (DataError, IntegrityError):
            pass
        written = 0
        for record in records:
            try:
                written += self._ledger.write([without_nul(record)], fresh=False)
            except (DataError, IntegrityError) as error:
                self._set_aside(record.id, record, type(error).__name__)
        return written

    def _decoded(self, frame: Frame) -> RequestRecord | None:
        """None for a record this version cannot read (another version wrote it); it is set aside."""
        try:
            return decode_settle(frame.payload)
        except (msgspec.DecodeError, ValueError) as error:
            self._set_aside(frame.request_id, frame.payload, type(error).__name__)
            return None

    def _set_aside(self, request_id: str, record: RequestRecord | bytes, reason: str) -> None:
        self.rejected += 1
        log.error("the ledger cannot book request %s (%s): kept in %s", request_id, reason, REJECTED_FILE)
        kept: dict[str, object] = {"request_id": request_id, "reason": reason}
        try:
            kept["record"] = msgspec.msgpack.decode(record) if isinstance(record, bytes) else record
            line = msgspec.json.encode(kept, enc_hook=dict)
        except (msgspec.MsgspecError, ValueError):
            line = msgspec.json.encode({**kept, "record": record})  # bytes become base64
        path = self._folder / REJECTED_FILE
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(file, line + b"\n")
        finally:
            os.close(file)

    def adopt_orphans(self) -> int:
        """Books every journal whose owner is dead and removes it. Blocks; raises UnavailableError."""
        written = 0
        with self._adopting:
            for folder in journal_folders(self._folder):
                if folder == self._journal.folder:
                    continue
                lock = adopt(folder)
                if lock is None:
                    continue
                try:
                    written += self._book_orphan(folder)
                    remove_folder(folder)
                except SQLAlchemyError as error:
                    raise unavailable(error) from None
                finally:
                    with suppress(OSError):
                        os.close(lock)
        self.adopted += written
        return written

    def _book_orphan(self, folder: Path) -> int:
        reader = JournalReader(folder)
        written = 0
        try:
            for batch in self._orphan_batches(reader):
                written += self._commit(batch, fresh=False)
                for record in batch:
                    if record.error == RESTARTED:
                        self.on_cancelled(record)
        finally:
            reader.close()
        self.skipped += reader.skipped
        return written

    def _orphan_batches(self, reader: JournalReader) -> Iterator[list[RequestRecord]]:
        unfinished: dict[str, list[Frame]] = {}
        batch: list[RequestRecord] = []
        for frame in reader.frames():
            if frame.kind == SETTLE:
                unfinished.pop(frame.request_id, None)
                if (record := self._decoded(frame)) is not None:
                    batch.append(record)
            else:
                unfinished.setdefault(frame.request_id, []).append(frame)
            if len(batch) >= self._batch_size:
                yield batch
                batch = []
        if batch:
            yield batch
        rest = [booked for frames in unfinished.values() if (booked := self._cancelled(frames)) is not None]
        for start in range(0, len(rest), self._batch_size):
            yield rest[start : start + self._batch_size]

    def _cancelled(self, frames: list[Frame]) -> RequestRecord | None:
        try:
            opened = next((decode_open(frame.payload) for frame in frames if frame.kind == OPEN), None)
            attempts = [decode_attempt(frame.payload) for frame in frames if frame.kind == ATTEMPT]
        except (msgspec.DecodeError, ValueError) as error:
            self._set_aside(frames[0].request_id, frames[0].payload, type(error).__name__)
            return None
        if opened is None:  # its open record was in a segment that went after COMMIT, or is damaged
            return None
        return cancelled(opened, attempts, self._clock.now())
