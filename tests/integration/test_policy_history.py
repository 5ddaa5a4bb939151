"""`farthing policy history` and `rollback` over a real database."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from router.adapters.configuration import load
from router.adapters.price_catalogue import shipped_catalogue, shipped_policies
from router.adapters.sql.database import migrate, open_engine
from router.adapters.sql.policies import PolicyVersion, record_policy
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
