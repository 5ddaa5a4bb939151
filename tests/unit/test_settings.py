"""The environment is read in one place, and what is wrong with it is said with the remedy."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from router.core.errors import ConfigurationError
from router.settings import Settings, read_settings, without_password

SECRET = "0123456789abcdef"


def read(tmp_path: Path, workers: int = 1, **environment: str) -> Settings:
    return read_settings(
        environment={"FARTHING_DATA_DIR": str(tmp_path / "data"), **environment}, workers=workers
    )


def test_the_defaults_are_one_machine(tmp_path: Path) -> None:
    settings = read(tmp_path)
    assert settings.embedded
    assert settings.database_url == f"sqlite:///{tmp_path / 'data' / 'farthing.db'}"
    assert settings.redis_url is None
    assert settings.admin_key is None
    assert settings.port == 8400


def test_a_secret_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    first, second = read(tmp_path), read(tmp_path)
    assert first.secret == second.secret
    assert len(first.secret) >= 32
    mode = (tmp_path / "data" / "secret").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    settings = read(
        tmp_path,
        FARTHING_SECRET=SECRET,
        FARTHING_ADMIN_KEY="admin-key-1234567",
        FARTHING_DATABASE_URL="postgresql://u:hunter2@db/x",
        OPENAI_API_KEY="sk-secret",
    )
    shown = repr(settings)
    for secret in (SECRET, "admin-key-1234567", "hunter2", "sk-secret"):
        assert secret not in shown


@pytest.mark.parametrize(
    ("environment", "workers", "words"),
    [
        ({"FARTHING_SECRET": "short"}, 1, ["FARTHING_SECRET", "16"]),
        ({"FARTHING_REDIS_URL": "redis://localhost"}, 1, ["FARTHING_SECRET", "openssl rand"]),
        ({"FARTHING_DATABASE_URL": "postgresql://localhost/x"}, 1, ["FARTHING_SECRET"]),
        ({}, 2, ["--workers", "FARTHING_REDIS_URL"]),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, environment: dict[str, str], workers: int, words: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path, workers, **environment)
    assert all(word in str(caught.value) for word in words)
    assert "short" not in str(caught.value).split("is shorter")[0]


def test_a_data_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="FARTHING_DATA_DIR"):
        read_settings(environment={"FARTHING_DATA_DIR": str(tmp_path / "file" / "data")})


def test_several_workers_with_redis(tmp_path: Path) -> None:
    settings = read(tmp_path, 4, FARTHING_REDIS_URL="redis://r", FARTHING_SECRET=SECRET)
    assert (settings.workers, settings.secret) == (4, SECRET.encode())


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://user:pass@db:5432/name?sslmode=require&password=x", "postgresql://db:5432/name"),
        ("redis://:pass@cache/0", "redis://cache/0"),
        ("sqlite:////data/farthing.db", "sqlite:////data/farthing.db"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    found = without_password(url)
    assert "pass" not in found
    if not url.startswith("sqlite"):
        assert found == shown
    else:
        assert found.endswith("/data/farthing.db")


def test_reading_makes_nothing_and_misses_a_ledger_that_is_not_there(tmp_path: Path) -> None:
    mistyped = tmp_path / "dat"
    with pytest.raises(ConfigurationError, match=r"There is no ledger at .*dat/farthing\.db"):
        read_settings(environment={"FARTHING_DATA_DIR": str(mistyped)}, reading=True)
    assert not mistyped.exists()


def test_reading_finds_the_ledger_of_a_gateway(tmp_path: Path) -> None:
    environment = {"FARTHING_DATA_DIR": str(tmp_path)}
    made = read_settings(environment=environment)
    (tmp_path / "farthing.db").touch()
    assert read_settings(environment=environment, reading=True) == made
    (tmp_path / "secret").unlink()
    read_settings(environment=environment, reading=True)
    assert not (tmp_path / "secret").exists()
