"""`farthing policy history` and `rollback` over a real database."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from datetime import UTC, datetime
from pathlib import Path

import pytest

from router import app
from router.adapters.configuration import ConfigurationWatch, load
from router.adapters.price_catalogue import shipped_catalogue, shipped_policies
from router.adapters.sql import database
from router.adapters.sql.database import migrate, open_engine
from router.adapters.sql.policies import PolicyVersion, policy_history, record_policy
from router.adapters.system import SystemClock
from router.cli import main


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    config = tmp_path / "config"
    config.mkdir()
    for name in ("providers.yaml", "policy.yaml"):
        (config / name).write_text((shipped_policies() / name).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setenv("FARTHING_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("FARTHING_CONFIG", str(config))
    for name in ("FARTHING_DATABASE_URL", "FARTHING_REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    return config


def _record(tmp_path: Path, config: Path) -> str:
    url = f"sqlite:///{tmp_path / 'data' / 'farthing.db'}"
    (tmp_path / "data").mkdir(exist_ok=True)
    migrate(url)
    engine = open_engine(url)
    snapshot = load(config, shipped_catalogue())
    texts = [(config / name).read_text(encoding="utf-8") for name in ("providers.yaml", "policy.yaml")]
    record_policy(engine, PolicyVersion(snapshot.hash, datetime.now(UTC), *texts))
    engine.dispose()
    return snapshot.hash


def test_a_version_is_listed_and_comes_back(
    installation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = _record(tmp_path, installation)
    before = (installation / "policy.yaml").read_text(encoding="utf-8")
    assert "month: 3000" in before
    (installation / "policy.yaml").write_text(before.replace("month: 3000", "month: 2000"), encoding="utf-8")
    second = _record(tmp_path, installation)
    assert main(["policy", "history", "--json"]) == 0
    assert [row["hash"] for row in json.loads(capsys.readouterr().out)] == [second, first]
    assert main(["policy", "rollback", first[:8]]) == 0
    assert (installation / "policy.yaml").read_text(encoding="utf-8") == before
    assert sorted(path.name for path in installation.iterdir()) == ["policy.yaml", "providers.yaml"]


def test_an_unknown_version_changes_nothing(
    installation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _record(tmp_path, installation)
    before = (installation / "policy.yaml").read_bytes()
    assert main(["policy", "rollback", "ffffffff"]) == 2
    assert "policy history" in capsys.readouterr().err
    assert (installation / "policy.yaml").read_bytes() == before


async def test_what_came_into_force_while_the_database_was_locked_is_kept(
    installation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_SECONDS", 0.02)
    monkeypatch.setattr(app, "RECORD_AGAIN_SECONDS", 0.02)
    url = f"sqlite:///{tmp_path / 'data' / 'farthing.db'}"
    (tmp_path / "data").mkdir()
    migrate(url)
    gateway = app.Gateway.__new__(app.Gateway)
    gateway._clock, gateway._unrecorded, gateway._engine = SystemClock(), asyncio.Queue(), open_engine(url)
    gateway.watch = ConfigurationWatch(installation, shipped_catalogue(), on_change=gateway._record_later)
    recording = asyncio.create_task(gateway._record_policies())
    locked = sqlite3.connect(tmp_path / "data" / "farthing.db", isolation_level=None)
    locked.execute("BEGIN EXCLUSIVE")
    before, hashes = (installation / "policy.yaml").read_text(encoding="utf-8"), []
    for month in (2000, 1000):
        text = before.replace("month: 3000", f"month: {month}")
        (installation / "policy.yaml").write_text(text, encoding="utf-8")
        assert gateway.watch.reload()
        hashes.append(gateway.watch.current.hash)
        await asyncio.sleep(0.1)
    locked.execute("ROLLBACK")
    for _ in range(200):
        if len(kept := [version.hash for version in policy_history(gateway._engine)]) == 2:
            break
        await asyncio.sleep(0.02)
    assert kept == hashes[::-1]
    recording.cancel()
    locked.close()
    gateway._engine.dispose()
