"""Labels and features in SQL: feedback as it comes in, and all of it for learning."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from router.adapters.journal import ATTEMPT, JournalReader, journal_folders
from router.adapters.sql.database import one_snapshot, unavailable, writing
from router.adapters.sql.ledger import cache_label_row, label_row, without_nul
from router.adapters.sql.rules import lock_rows, quarantine, quarantined
from router.adapters.sql.schema import (
    TOKEN_COLUMNS,
    cache_candidates,
    cache_labels,
    labels,
    request_features,
    requests,
)
from router.core.cached import CacheLabel, JudgedHit
from router.core.errors import InvalidRequest, NotFound, Overloaded, UnavailableError
from router.core.learning import DRAWN_SOURCES, Label
from router.core.ports import Clock
from router.core.types import Caller, Usage

Booked = TypeVar("Booked")
Found = TypeVar("Found")

FEEDBACK = "feedback"
LOOKS = (0.0, 0.1, 0.2, 0.4)
"""Seconds before each look for a request that may have ended a moment ago; a settled one is in SQL within 0.5 s."""
YOUNG = 900.0
"""Seconds since its id was made within which a request may still be on its way to SQL."""
MAX_WAITING = 200


class _Owner(msgspec.Struct):
    """The part of a journalled record that says whose it is; the rest is not decoded."""

    team: str


_owner = msgspec.msgpack.Decoder(_Owner)


class SqlFeedback:
    """`ports.FeedbackStore` and `core.cached.HitFeedbackStore` over the ledger. SQL and the journals are read in a
    thread of its own.
    """

    def __init__(self, engine: Engine, journals: Path, clock: Clock) -> None:
        self._engine = engine
        self._journals = journals
        self._clock = clock
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="feedback")
        self._waiting = 0

    async def keep(self, caller: Caller, request_id: str, score: float, comment: str | None) -> None:
        await self._about(
            caller,
            request_id,
            lambda at: keep_feedback(self._engine, caller, request_id, score, comment, at) or None,
        )

    async def judge(self, caller: Caller, request_id: str, correct: bool, comment: str | None) -> JudgedHit:
        return await self._about(
            caller,
            request_id,
            lambda at: judge_hit(self._engine, caller, request_id, correct, comment, at),
        )

    async def _about(
        self, caller: Caller, request_id: str, book: Callable[[datetime], Booked | None]
    ) -> Booked:
        """`book` gives None where SQL knows no such request of this team."""
        if self._waiting >= MAX_WAITING:
            raise Overloaded("More feedback comes in than can be kept. Send it again.", retry_after=1)
        self._waiting += 1
        try:
            looks = LOOKS if self._may_be_on_its_way(request_id) else LOOKS[:1]
            for pause in looks:
                await asyncio.sleep(pause)
                if (booked := await self._run(lambda: self._booked(request_id, book))) is not None:
                    return booked
            if await self._run(lambda: self._journalled(request_id, caller.team)):
                raise Overloaded(
                    "This request is not in the ledger yet. Send the feedback again.", retry_after=1
                )
        except UnavailableError:
            raise Overloaded("The ledger does not answer. Send the feedback again.", retry_after=1) from None
        finally:
            self._waiting -= 1
        # One answer for what is unknown and for what belongs to another team.
        raise NotFound(
            "No request of this team has this id. It is the answer's header x-request-id.", param="request_id"
        )

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], Found]) -> Found:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def _may_be_on_its_way(self, request_id: str) -> bool:
        """By the time in a UUIDv7 (RFC 9562, 5.7)."""
        try:
            found = uuid.UUID(request_id)
        except ValueError:
            return False
        age = self._clock.now().timestamp() - (found.int >> 80) / 1000
        return found.version == 7 and -60 < age < YOUNG

    def _booked(self, request_id: str, book: Callable[[datetime], Booked | None]) -> Booked | None:
        """A race of two corrections is run again."""
        if not request_id.isascii() or not request_id.isprintable():
            return None  # no id of ours, and PostgreSQL would not take it
        try:
            return book(self._clock.now())
        except IntegrityError:
            try:
                return book(self._clock.now())
            except SQLAlchemyError as error:
                raise unavailable(error) from None
        except SQLAlchemyError as error:
            raise unavailable(error) from None

    def _journalled(self, request_id: str, team: str) -> bool:
        """Whether a journal of this data folder holds the request, and it is this team's."""
        for folder in journal_folders(self._journals):
            reader = JournalReader(folder)
            try:
                for frame in reader.frames():
                    if frame.request_id == request_id and frame.kind != ATTEMPT:
                        return _owner.decode(frame.payload).team == team
            except msgspec.MsgspecError:
                continue
            finally:
                reader.close()
        return False


def keep_feedback(
    engine: Engine, caller: Caller, request_id: str, score: float, comment: str | None, at: datetime
) -> bool:
    """Books a score as a row of its own, unless it is what this key said last. False: no such request of this team.

    Raises InvalidRequest where no model answered the request, and what SQLAlchemy raises.
    """
    columns = requests.c
    found = sa.select(columns.served_model, columns.propensity).where(
        columns.id == request_id, columns.team == caller.team
    )
    comment = _plain(comment)
    with writing(engine) as connection:
        request = connection.execute(found).one_or_none()
        if request is None:
            return False
        if request.served_model is None:
            raise InvalidRequest(
                "No model answered this request, so there is nothing to score.", param="request_id"
            )
        said = (
            sa.select(labels.c.score, labels.c.comment, labels.c.revision)
            .where(
                labels.c.request_id == request_id,
                labels.c.model == request.served_model,
                labels.c.source == FEEDBACK,
                labels.c.key_id == caller.key_id,
            )
            .order_by(labels.c.revision.desc())
            .limit(1)
        )
        last = connection.execute(said).one_or_none()
        if last is not None and (last.score, last.comment) == (score, comment):
            return True
        label = Label(
            request_id=request_id,
            model=request.served_model,
            score=score,
            weight=1.0,
            source=FEEDBACK,
            propensity=request.propensity,
            at=at,
            key_id=caller.key_id,
            team=caller.team,
            comment=comment,
        )
        revision = 0 if last is None else last.revision + 1
        row = dict(zip(labels.c.keys(), label_row(label, at, revision), strict=True))
        connection.execute(sa.insert(labels).values(row))
    return True


def judge_hit(
    engine: Engine, caller: Caller, request_id: str, correct: bool, comment: str | None, at: datetime
) -> JudgedHit | None:
    """Books a verdict on an answer out of a cache, and the rule against its entry where it is wrong. None: no such
    request of this team.

    Raises InvalidRequest where no cache answered the request, and what SQLAlchemy raises.
    """
    columns, found = requests.c, cache_candidates.c
    query = (
        sa.select(columns.cache, columns.cache_entry, found.scope, found.entry, found.probability, found.pair)
        .select_from(requests.outerjoin(cache_candidates, found.request_id == columns.id))
        .where(columns.id == request_id, columns.team == caller.team)
    )
    comment = _plain(comment)
    with writing(engine) as connection:
        request = connection.execute(query).one_or_none()
        if request is None:
            return None
        entry = request.cache_entry
        if request.cache == "miss" or entry is None:
            raise InvalidRequest(
                "'request_id': a model answered this request, no cache. Send how good it was to /v1/feedback.",
                param="request_id",
            )
        lock_rows(connection, cache_labels)
        said = (
            sa.select(cache_labels.c.correct, cache_labels.c.comment, cache_labels.c.revision)
            .where(
                cache_labels.c.request_id == request_id,
                cache_labels.c.entry == entry,
                cache_labels.c.source == FEEDBACK,
                cache_labels.c.key_id == caller.key_id,
            )
            .order_by(cache_labels.c.revision.desc())
            .limit(1)
        )
        last = connection.execute(said).one_or_none()
        if last is None or (last.correct, last.comment) != (correct, comment):
            likened = request.entry == entry
            label = CacheLabel(
                request_id=request_id,
                scope=request.scope if likened else "",
                entry=entry,
                score=request.probability if likened else 1.0,
                right=correct,
                propensity=1.0,
                source=FEEDBACK,
                at=at,
                key_id=caller.key_id,
                team=caller.team,
                app=caller.app,
                comment=comment,
            )
            row = cache_label_row(label, at, 0 if last is None else last.revision + 1)
            values = dict(zip(cache_labels.c.keys()[1:], row, strict=True))
            connection.execute(sa.insert(cache_labels).values(values))
        if not correct:
            reason = f"reported wrong: {request_id}"
            pair = request.pair if request.entry == entry else None
            quarantine(connection, entry, pair, at=at, by=caller.key_id, reason=reason)
        return JudgedHit(entry, quarantined(connection, entry))


def _plain(comment: str | None) -> str | None:
    return None if comment is None else without_nul(comment).encode(errors="replace").decode()


# ---- what is learned from ----

MAX_LABELS = 50_000
"""So many are read at most, each with a few hundred bytes of features: the newest of each key in turn, so that no key
can crowd out the others. As many again of those that quality floors rest on, the newest of all: these are drawn from
the traffic, and must go back as far for every key.
"""


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A label with what is known of its request. `prompt_id` is the request whose features these are: of a cache hit
    the one that was answered first. `usage` is that of the labelled request.
    """

    label: Label
    prompt_id: str
    features: bytes
    prompt_class: str | None
    usage: Usage


@dataclass(frozen=True, slots=True)
class LabelledTraffic:
    """`rows`, the oldest first; `without_features`: labels of requests nothing else was kept of, or for another
    encoder; `served`: how many requests with features each model answered.
    """

    rows: tuple[LabelledRow, ...]
    without_features: int
    served: Mapping[str, int]


def labelled_traffic(engine: Engine, encoder_id: str, limit: int = MAX_LABELS) -> LabelledTraffic:
    """The newest revision of each label with its features, from one snapshot. Raises UnavailableError."""
    one_judgement = (labels.c.request_id, labels.c.model, labels.c.source, labels.c.key_id)
    number = sa.func.row_number().over(partition_by=one_judgement, order_by=labels.c.revision.desc())
    revisions = sa.select(labels, number.label("number")).subquery()
    turn = sa.func.row_number().over(
        partition_by=revisions.c.key_id, order_by=(revisions.c.at.desc(), revisions.c.id)
    )
    newest = sa.select(revisions, turn.label("turn")).where(revisions.c.number == 1).subquery()
    own, first = request_features.alias("own"), request_features.alias("first")
    joined = (
        newest.outerjoin(requests, requests.c.id == newest.c.request_id)
        .outerjoin(own, sa.and_(own.c.request_id == requests.c.id, own.c.encoder_id == encoder_id))
        .outerjoin(
            first, sa.and_(first.c.request_id == requests.c.cache_entry, first.c.encoder_id == encoder_id)
        )
    )
    drawn = newest.c.source.in_(DRAWN_SOURCES)
    query = (
        sa.select(
            newest,
            sa.func.coalesce(own.c.request_id, first.c.request_id).label("prompt_id"),
            sa.func.coalesce(own.c.features, first.c.features).label("features"),
            requests.c.prompt_class,
            *(requests.c[name] for name in TOKEN_COLUMNS),
        )
        .select_from(joined)
        .limit(limit)
    )
    by_time = (newest.c.at.desc(), newest.c.id)
    parts = (
        query.where(drawn).order_by(*by_time),
        query.where(~drawn).order_by(newest.c.turn, *by_time),
    )
    counted = (
        sa.select(requests.c.served_model, sa.func.count())
        .join(request_features, request_features.c.request_id == requests.c.id)
        .where(requests.c.served_model.is_not(None), request_features.c.encoder_id == encoder_id)
        .group_by(requests.c.served_model)
    )
    rows: list[LabelledRow] = []
    without = 0
    try:
        with one_snapshot(engine) as connection:
            for row in (row for part in parts for row in connection.execute(part).mappings()):
                if row["features"] is None:
                    without += 1
                    continue
                rows.append(
                    LabelledRow(
                        label=Label(**{name: row[name] for name in _LABEL_FIELDS}),
                        prompt_id=row["prompt_id"],
                        features=bytes(row["features"]),
                        prompt_class=row["prompt_class"],
                        usage=Usage(*(row[name] for name in TOKEN_COLUMNS)),
                    )
                )
            served = {row[0]: row[1] for row in connection.execute(counted)}
    except SQLAlchemyError as error:
        raise unavailable(error) from None
    rows.sort(key=lambda row: (row.label.at, row.label.request_id))
    return LabelledTraffic(tuple(rows), without, served)


_LABEL_FIELDS = tuple(field.name for field in fields(Label))
