"""The registry of learned artefacts, over SQLite and PostgreSQL: what is refused, what stays, how soon it is used."""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from classifiers.encoder import ArtefactError
from classifiers.success import SuccessHeads
from router.adapters.sql import artefacts, schema
from router.adapters.sql.artefacts import (
    ArtefactWatch,
    activate,
    active,
    content,
    listed,
    opened,
    packed,
    store,
)
from router.adapters.sql.database import open_engine, writing
from router.core.errors import ConfigurationError, UnavailableError
from tests.contracts.ledger_records import OPENED
from tests.contracts.own_traffic_parts import MODELS, encoder, good_heads, other_heads, read

pytest_plugins = ["tests.contracts.sql_databases"]

ENCODER = encoder().id


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_engine(database_url)
    yield engine
    engine.dispose()


def kept(engine: Engine, heads: SuccessHeads, hours: int = 0) -> str:
    id, data = packed(heads)
    at = OPENED + timedelta(hours=hours)
    store(engine, artefacts.SUCCESS, id, heads.encoder_id, data, {"labels": 480, "auroc": 0.9}, at)
    return id


def damage(engine: Engine, id: str, **columns: Any) -> None:
    with writing(engine) as connection:
        connection.execute(sa.update(schema.artefacts).where(schema.artefacts.c.id == id).values(**columns))


def test_what_is_stored_comes_back_whole(engine: Engine) -> None:
    heads = good_heads()
    id = kept(engine, heads)
    assert kept(engine, heads) == id  # again: nothing changes
    [row] = listed(engine)
    assert (row.id, row.active, row.activated_at, row.card["labels"]) == (id, False, None, 480)
    found = opened(content(engine, id), sha256=row.sha256, id=id, encoder_id=ENCODER)
    assert found.id == id
    prompt = read("sum", 77)
    mine = found.predict(prompt, "medium", {**dict.fromkeys(MODELS, 0.8), "unknown": 0.7})
    theirs = heads.predict(prompt, "medium", dict.fromkeys(MODELS, 0.8))
    for model in MODELS:
        assert mine[model].success == pytest.approx(theirs[model].probability)
        assert mine[model].lower <= mine[model].success <= mine[model].upper
        assert not mine[model].fallback
    assert (mine["unknown"].success, mine["unknown"].fallback, mine["unknown"].unfamiliar) == (
        0.7,
        True,
        False,
    )
    carried = artefacts.learned(found).calibration
    assert carried is not None
    assert carried.models == MODELS


def test_one_is_in_force_at_a_time_and_any_can_be_again(engine: Engine) -> None:
    first, second = kept(engine, good_heads()), kept(engine, other_heads(), hours=1)
    assert active(engine) is None
    for id in (first, second, first):
        activate(engine, id, ENCODER, OPENED)
        assert [row.id for row in listed(engine) if row.active] == [id]
    assert [row.id for row in listed(engine)] == [second, first]
    activate(engine, None, ENCODER, OPENED)
    assert active(engine) is None
    assert all(row.activated_at == OPENED for row in listed(engine))
    with pytest.raises(ConfigurationError, match="no artefact has this id"):
        activate(engine, "success-1-000000000000", ENCODER, OPENED)


def newer_format(data: bytes) -> bytes:
    files = msgspec.msgpack.decode(zlib.decompress(data))
    return zlib.compress(msgspec.msgpack.encode([2, *files[1:]]))


BROKEN: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("not an artefact", lambda data: b"PK\x03\x04 something else"),
    ("not an artefact", lambda data: zlib.compress(b"\x93nonsense")),
    ("format 2 is unknown", newer_format),
    ("that of", lambda data: packed(other_heads())[1]),
]


@pytest.mark.parametrize(("says", "broken"), BROKEN)
def test_content_that_is_no_artefact_is_refused(says: str, broken: Callable[[bytes], bytes]) -> None:
    id, data = packed(good_heads())
    wrong = broken(data)
    with pytest.raises(ArtefactError, match=says):
        opened(wrong, sha256=hashlib.sha256(wrong).hexdigest(), id=id, encoder_id=ENCODER)


def test_a_wrong_hash_and_another_encoder_are_refused_and_the_old_one_stays(engine: Engine) -> None:
    first, second = kept(engine, good_heads()), kept(engine, other_heads(), hours=1)
    activate(engine, first, ENCODER, OPENED)
    data = content(engine, second)
    damage(engine, second, content=data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtefactError, match="does not match its hash"):
        activate(engine, second, ENCODER, OPENED)
    damage(engine, second, content=data)
    with pytest.raises(ArtefactError, match="encoder"):
        activate(engine, second, "static-000000000000", OPENED)
    found = active(engine)
    assert found is not None
    assert found.id == first


def test_a_running_gateway_takes_up_a_new_one_and_refuses_a_bad_one(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = kept(engine, good_heads()), kept(engine, other_heads(), hours=1)
    watch = ArtefactWatch(engine, ENCODER, every=0.02)
    watch.start()

    def in_use() -> str | None:
        return watch.current.predictor.id if watch.current is not None else None

    def until(id: str | None) -> None:
        end = time.monotonic() + 60
        while in_use() != id:
            assert time.monotonic() < end
            time.sleep(0.01)

    assert in_use() is None
    activate(engine, first, ENCODER, OPENED)
    until(first)
    before = watch.current
    with writing(engine) as connection:  # in one step, lest it look in between
        table = schema.artefacts
        connection.execute(sa.update(table).values(active=table.c.id == second))
        connection.execute(sa.update(table).where(table.c.id == second).values(sha256="0" * 64))
    end = time.monotonic() + 60
    while watch.refused is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.1)
    assert watch.current is before
    assert "does not match its hash" in watch.refused
    assert sum("refused" in record.message for record in caplog.records) == 1
    activate(engine, first, ENCODER, OPENED)
    until(first)
    activate(engine, None, ENCODER, OPENED)
    until(None)
    watch.stop()


def test_without_a_database_the_one_in_force_stays(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    activate(engine, kept(engine, good_heads()), ENCODER, OPENED)
    watch = ArtefactWatch(engine, ENCODER)
    watch.look()
    before = watch.current
    assert before is not None
    gone = open_engine("postgresql://farthing:hunter2@127.0.0.1:1/ledger")
    watch._engine = gone
    watch.look()
    assert (watch.current, watch.refused) == (before, None)
    for ask in (
        lambda: listed(gone),
        lambda: content(gone, "x"),
        lambda: activate(gone, None, ENCODER, OPENED),
    ):
        with pytest.raises(UnavailableError) as raised:
            ask()
        assert "hunter2" not in str(raised.value)
    gone.dispose()


def test_nobody_asks_sql_where_nothing_is_learned(engine: Engine) -> None:
    activate(engine, kept(engine, good_heads()), ENCODER, OPENED)
    wanted = False
    watch = ArtefactWatch(engine, ENCODER, wanted=lambda: wanted)
    watch.look()
    assert watch.current is None
    wanted = True
    watch.look()
    assert watch.current is not None
