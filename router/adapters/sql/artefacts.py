"""Learned artefacts in SQL: kept by hash, one of a kind active, and picked up by every running worker.

`content` is msgpack of the two files an artefact consists of (`classifiers.artefact`), compressed. Before one is
used, its SHA-256 is compared with the row's, and the files' own hashes, format and encoder are checked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import threading
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from classifiers.artefact import MAX_BYTES
from classifiers.encoder import ArtefactError
from classifiers.floor import Calibration
from classifiers.success import SuccessHeads
from classifiers.success_features import PromptFeatures
from router.adapters.sql.database import unavailable, writing
from router.adapters.sql.schema import artefacts
from router.core.errors import ConfigurationError, UnavailableError
from router.core.learning import Estimate, Learned

log = logging.getLogger("farthing")

SUCCESS = "success"
WATCH_SECONDS = 2.0
FORMAT = 1


class _Files(msgspec.Struct, array_like=True):
    format: int
    id: str
    description: bytes
    arrays: bytes


@dataclass(frozen=True, slots=True)
class StoredArtefact:
    """A row of `artefacts` without its content. `card` is the model card."""

    id: str
    kind: str
    created_at: datetime
    encoder_id: str
    sha256: str
    card: Mapping[str, Any]
    active: bool
    activated_at: datetime | None


class LearnedHeads:
    """`core.learning.SuccessPredictor` over heads fitted by `farthing learn`."""

    def __init__(self, id: str, heads: SuccessHeads) -> None:
        self.id = id
        self.encoder_id = heads.encoder_id
        self.heads = heads

    def predict(
        self, features: PromptFeatures, prompt_class: str, priors: Mapping[str, float]
    ) -> dict[str, Estimate]:
        return {
            model: Estimate(
                success=found.probability,
                lower=found.lower,
                upper=found.upper,
                evidence=found.evidence,
                fallback=found.source != "learned",
                unfamiliar=found.source == "unfamiliar",
            )
            for model, found in self.heads.predict(features, prompt_class, priors).items()
        }


def learned(predictor: LearnedHeads) -> Learned:
    """With the held-out rows the artefact carries. Raises ArtefactError where they are missing or wrong."""
    return Learned(predictor, Calibration.of(predictor.heads.models, predictor.heads.arrays))


# ---- content ----


def packed(heads: SuccessHeads) -> tuple[str, bytes]:
    """The artefact's id and its content."""
    with tempfile.TemporaryDirectory(prefix="farthing-") as folder:
        path = Path(folder) / "success.json"
        id = heads.save(path)
        files = _Files(FORMAT, id, path.read_bytes(), path.with_suffix(".npz").read_bytes())
    return id, zlib.compress(msgspec.msgpack.encode(files), 6)


def opened(content: bytes, *, sha256: str, id: str, encoder_id: str) -> LearnedHeads:
    """Raises ArtefactError where the content is not what the row says, damaged, of an unknown format, or made for
    another encoder.
    """
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ArtefactError(f"{id}: the content does not match its hash; it was damaged or replaced")
    try:
        inflater = zlib.decompressobj()
        raw = inflater.decompress(content, 2 * MAX_BYTES)
        files = msgspec.msgpack.decode(raw, type=_Files)
    except (zlib.error, msgspec.MsgspecError) as error:
        raise ArtefactError(
            f"{id}: not an artefact of this version: upgrade farthing, or learn again"
        ) from error
    if files.format != FORMAT:
        raise ArtefactError(
            f"{id}: format {files.format} is unknown, this version reads {FORMAT}: learn again"
        )
    if files.id != id:
        raise ArtefactError(f"{id}: the content is that of {files.id}")
    with tempfile.TemporaryDirectory(prefix="farthing-") as folder:
        path = Path(folder) / "success.json"
        path.write_bytes(files.description)
        path.with_suffix(".npz").write_bytes(files.arrays)
        heads = SuccessHeads.load(path, encoder_id=encoder_id)
    return LearnedHeads(id, heads)


# ---- the registry ----


def store(
    engine: Engine, kind: str, id: str, encoder_id: str, content: bytes, card: Mapping[str, Any], at: datetime
) -> StoredArtefact:
    """Keeps an artefact, not active yet; one of this id that is there already stays. Raises UnavailableError."""
    found = StoredArtefact(
        id, kind, at, encoder_id, hashlib.sha256(content).hexdigest(), dict(card), False, None
    )
    row = {
        "id": id,
        "kind": kind,
        "created_at": at,
        "encoder_id": encoder_id,
        "content": content,
        "sha256": found.sha256,
        "card": json.dumps(found.card, sort_keys=True),
        "active": False,
        "activated_at": None,
    }
    try:
        with writing(engine) as connection:
            connection.execute(sa.insert(artefacts).values(row))
    except IntegrityError:
        pass
    except SQLAlchemyError as error:
        raise unavailable(error) from None
    return found


def listed(engine: Engine, kind: str = SUCCESS) -> list[StoredArtefact]:
    """The newest first. Raises UnavailableError."""
    columns = [column for column in artefacts.c if column.name != "content"]
    query = sa.select(*columns).where(artefacts.c.kind == kind).order_by(artefacts.c.created_at.desc())
    try:
        with engine.connect() as connection:
            return [_stored(row) for row in connection.execute(query)]
    except SQLAlchemyError as error:
        raise unavailable(error) from None


def active(engine: Engine, kind: str = SUCCESS) -> StoredArtefact | None:
    """Raises UnavailableError."""
    return next((artefact for artefact in listed(engine, kind) if artefact.active), None)


def content(engine: Engine, id: str) -> bytes:
    """Raises ConfigurationError where there is none, UnavailableError."""
    try:
        with engine.connect() as connection:
            found = connection.scalar(sa.select(artefacts.c.content).where(artefacts.c.id == id))
    except SQLAlchemyError as error:
        raise unavailable(error) from None
    if found is None:
        raise ConfigurationError("no artefact has this id: `farthing learn --list` shows them")
    return bytes(found)


def activate(engine: Engine, id: str | None, encoder_id: str, at: datetime, kind: str = SUCCESS) -> None:
    """Makes an artefact the one in force, after reading it whole; None: none, the priors decide.

    Raises ConfigurationError for an unknown id, ArtefactError for one this version could not use, UnavailableError.
    """
    if id is not None:
        row = next((artefact for artefact in listed(engine, kind) if artefact.id == id), None)
        if row is None:
            raise ConfigurationError("no artefact has this id: `farthing learn --list` shows them")
        learned(opened(content(engine, id), sha256=row.sha256, id=id, encoder_id=encoder_id))
    others = sa.update(artefacts).where(artefacts.c.kind == kind, artefacts.c.active)
    try:
        with writing(engine) as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.text("LOCK TABLE artefacts IN SHARE ROW EXCLUSIVE MODE"))
            connection.execute(others.values(active=False))
            if id is not None:
                chosen = sa.update(artefacts).where(artefacts.c.id == id, artefacts.c.kind == kind)
                connection.execute(chosen.values(active=True, activated_at=at))
    except SQLAlchemyError as error:
        raise unavailable(error) from None


def _stored(row: Any) -> StoredArtefact:
    return StoredArtefact(
        id=row.id,
        kind=row.kind,
        created_at=row.created_at,
        encoder_id=row.encoder_id,
        sha256=row.sha256,
        card=json.loads(row.card),
        active=row.active,
        activated_at=row.activated_at,
    )


# ---- a running gateway ----


class ArtefactWatch:
    """Looks every `WATCH_SECONDS` which artefact is active and loads it, in a thread of its own.

    `current` is None while no artefact is active. One that cannot be used is logged once and refused; the one in
    force stays. While SQL is away nothing changes.
    """

    def __init__(
        self,
        engine: Engine,
        encoder_id: str,
        *,
        wanted: Callable[[], bool] = lambda: True,
        every: float = WATCH_SECONDS,
    ) -> None:
        """`wanted`: whether anything is learned at all; while not, SQL is not asked and `current` stays."""
        self._engine = engine
        self._encoder_id = encoder_id
        self._wanted = wanted
        self._every = every
        self._seen: tuple[str, str] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.current: Learned | None = None
        self.refused: str | None = None
        """Why the active artefact is not in use."""

    def start(self) -> None:
        """The first look is made before it returns."""
        self.look()
        self._thread = threading.Thread(target=self._run, name="artefact-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            self.look()

    def look(self) -> None:
        """Never raises."""
        if not self._wanted():
            return
        found = self._seen
        try:
            found = self._active()
            if found == self._seen:
                return
            if found is None:
                self.current, self.refused = None, None
                log.info("no learned artefact is active: the priors decide")
            else:
                id, sha256 = found
                stored = content(self._engine, id)
                self.current = learned(opened(stored, sha256=sha256, id=id, encoder_id=self._encoder_id))
                self.refused = None
                log.info("learned artefact %s is in use", id)
            self._seen = found
        except (UnavailableError, ConfigurationError):
            pass  # asked again in a moment
        except Exception as error:
            self._seen, self.refused = found, str(error)
            kept = self.current.predictor.id if self.current is not None else "priors"
            unforeseen = not isinstance(error, ArtefactError)
            log.error("the active artefact is refused, %s stay in use: %s", kept, error, exc_info=unforeseen)

    def _active(self) -> tuple[str, str] | None:
        query = sa.select(artefacts.c.id, artefacts.c.sha256).where(
            artefacts.c.kind == SUCCESS, artefacts.c.active
        )
        try:
            with self._engine.connect() as connection:
                row = connection.execute(query).first()
        except SQLAlchemyError as error:
            raise unavailable(error) from None
        return None if row is None else (row.id, row.sha256)
