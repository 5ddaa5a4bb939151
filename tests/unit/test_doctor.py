"""`farthing doctor`: what it finds on a machine in order, and on one where each thing in turn is wrong."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from router import doctor
from router.adapters.journal import JournalFile
from router.adapters.redis_store.secret_check import secret_fingerprint
from router.adapters.sql.database import migrate, open_engine
from router.adapters.sql.ledger import Ledger
from router.core.errors import ConfigurationError
from router.doctor import Finding, examine, findings
from router.settings import Settings, read_settings
from tests.contracts.ledger_records import new_id, opened, settled
from tests.contracts.valkey_server import ValkeyServer

pytest_plugins = ["tests.contracts.sql_databases"]

POLICY = """
apiVersion: farthing/v1
baseline: frontier
classes: { simple: { min_quality: 0.90 }, medium: { min_quality: 0.90 }, complex: { min_quality: 0.90 } }
defaults: { allow: [frontier] }
"""
PROVIDERS = """
apiVersion: farthing/v1
providers:
  sim: {{ wire: openai, base_url: "{url}", api_key_env: SIM_KEY }}
models:
  frontier: {{ provider: sim, name: frontier, context: 128000, max_output: 16384,
              price: {{ input: "5", output: "20" }},
              quality: {{ simple: "0.99", medium: "0.97", complex: "0.94" }} }}
"""
SECRET = "a-secret-that-must-not-be-shown"


@pytest.fixture
def listening() -> Iterator[str]:
    """A provider that accepts connections and is never asked anything."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"


@pytest.fixture
def folder(tmp_path: Path, listening: str) -> Path:
    (tmp_path / "providers.yaml").write_text(PROVIDERS.format(url=listening))
    (tmp_path / "policy.yaml").write_text(POLICY)
    return tmp_path


def settings(folder: Path, **more: str) -> Settings:
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    environment = {"FARTHING_DATA_DIR": str(folder / "data"), "SIM_KEY": "sk-provider", **more}
    return read_settings(config=str(folder), port=port, environment=environment)


def of(found: Settings, subject: str) -> list[Finding]:
    return [finding for finding in findings(lambda: found) if finding.subject == subject]


def only(found: Settings, subject: str) -> tuple[str, str]:
    (finding,) = of(found, subject)
    return finding.level, finding.text


def test_a_machine_in_order(folder: Path) -> None:
    found = settings(folder, FARTHING_SECRET=SECRET)
    migrate(found.database_url)
    lines: list[str] = []
    assert examine(lambda: found, lines.append) == 0
    text = "\n".join(lines)
    assert {line.split()[1] for line in lines[:-1]} == {
        *(
            "python",
            "data",
            "secret",
            "config",
            "provider",
            "database",
            "journal",
            "redis",
            "encoders",
            "ports",
        )
    }
    assert all(line.startswith("OK ") for line in lines[:-1]), text
    assert lines[-1].strip() == "Nothing stands in the way of a gateway; 0 to look at."
    assert SECRET not in text
    assert "sk-provider" not in text


def test_settings_that_cannot_be_read() -> None:
    def broken() -> Settings:
        raise ConfigurationError("FARTHING_SECRET is not set. Set it.")

    lines: list[str] = []
    assert examine(broken, lines.append) == 1
    assert "FAIL  settings  FARTHING_SECRET is not set. Set it." in lines


def test_a_check_that_breaks_tells_no_secret_and_stops_no_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Iterator[Finding]:
        raise RuntimeError(f"postgresql://me:{SECRET}@db")

    monkeypatch.setattr(doctor, "_database", broken)
    lines: list[str] = []
    assert examine(lambda: settings(folder), lines.append) == 1
    assert any(line.startswith("FAIL  database  this check broke (RuntimeError)") for line in lines)
    assert any("encoders" in line for line in lines)
    assert SECRET not in "\n".join(lines)


@pytest.mark.parametrize(
    ("version", "level"), [((3, 10, 4), "FAIL"), ((3, 12, 1), "OK"), ((3, 15, 0), "WARN")]
)
def test_python(version: tuple[int, ...], level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sys, "version_info", version)
    (finding,) = doctor._python()
    assert finding.level == level


@pytest.mark.parametrize(("free", "level"), [(10 * 1024**3, "OK"), (500 * 1024**2, "WARN"), (1024, "FAIL")])
def test_free_disk(folder: Path, free: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    assert only(settings(folder), "data")[0] == level


def test_a_data_folder_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(dir: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refused)
    level, text = only(settings(folder), "data")
    assert (level, "FARTHING_DATA_DIR" in text) == ("FAIL", True)


def test_a_secret_others_may_read(folder: Path) -> None:
    found = settings(folder, FARTHING_ADMIN_KEY="short")
    (found.data / "secret").chmod(0o644)
    first, second = of(found, "secret")
    assert (first.level, "chmod 600" in first.text) == ("WARN", True)
    assert (second.level, "FARTHING_ADMIN_KEY" in second.text) == ("WARN", True)


def test_files_with_errors_and_warnings(folder: Path) -> None:
    (folder / "policy.yaml").write_text(POLICY.replace("[frontier]", "[frontir]"))
    (first,) = of(settings(folder), "config")
    assert first.level == "FAIL"
    assert "policy.yaml:5" in first.text
    assert "frontier" in first.text
    assert of(settings(folder), "provider") == []
    (folder / "policy.yaml").write_text(POLICY + "aliases: { mini: frontier }\n")
    levels = [finding.level for finding in of(settings(folder), "config")]
    assert levels[-1] == "OK"
    assert "FAIL" not in levels
    (folder / "policy.yaml").unlink()
    assert "farthing init" in only(settings(folder), "config")[1]


def test_a_provider_without_its_key(folder: Path, listening: str) -> None:
    found = settings(folder, SIM_KEY="")
    level, text = only(found, "provider")
    assert (level, "SIM_KEY is not set" in text) == ("FAIL", True)
    providers = PROVIDERS.format(url=listening).replace(
        "models:", f'  free: {{ wire: openai, base_url: "{listening}" }}\nmodels:'
    )
    (folder / "providers.yaml").write_text(providers)
    assert sorted(finding.level for finding in of(found, "provider")) == ["OK", "WARN"]


def test_a_provider_that_cannot_be_reached(folder: Path, listening: str) -> None:
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        for url, said in (
            (f"http://127.0.0.1:{port}/v1", "cannot be reached (Connection refused)"),
            ("http://no-such-host.invalid/v1", "no host has this name"),
        ):
            (folder / "providers.yaml").write_text(PROVIDERS.format(url=url))
            level, text = only(settings(folder), "provider")
            assert (level, said in text) == ("FAIL", True), text


def test_a_provider_that_does_not_speak_tls(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REACH_SECONDS", 0.3)
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        (folder / "providers.yaml").write_text(PROVIDERS.format(url=f"https://127.0.0.1:{port}/v1"))
        level, text = only(settings(folder), "provider")
    assert (level, f"https://127.0.0.1:{port}/v1" in text) == ("FAIL", True)


def test_a_database_that_is_not_there(folder: Path) -> None:
    assert "does not exist yet" in only(settings(folder), "database")[1]
    away = settings(
        folder, FARTHING_DATABASE_URL=f"postgresql://me:{SECRET}@127.0.0.1:9/farthing", FARTHING_SECRET=SECRET
    )
    level, text = only(away, "database")
    assert (level, "FARTHING_DATABASE_URL" in text) == ("FAIL", True)
    assert SECRET not in text
    level, text = only(
        settings(folder, FARTHING_DATABASE_URL="mysql://x", FARTHING_SECRET=SECRET), "database"
    )
    assert (level, "postgresql://" in text) == ("FAIL", True)


def test_postgresql_in_order(folder: Path, postgresql_url: str) -> None:
    found = settings(folder, FARTHING_DATABASE_URL=postgresql_url, FARTHING_SECRET=SECRET)
    assert only(found, "database")[0] == "OK"
    assert only(found, "clock") == ("OK", "agrees with database within 2 s")


def test_a_schema_that_is_behind_and_triggers_that_are_gone(folder: Path) -> None:
    found = settings(folder)
    engine = open_engine(found.database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE something (id INTEGER)")
    level, text = only(found, "database")
    assert (level, "farthing migrate" in text) == ("WARN", True)
    migrate(found.database_url)
    assert only(found, "database")[0] == "OK"
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER requests_no_delete")
    engine.dispose()
    level, text = only(found, "database")
    assert (level, "requests_no_delete" in text) == ("FAIL", True)


def test_journals_in_use_and_left_behind(folder: Path) -> None:
    found = settings(folder)
    migrate(found.database_url)
    living, dead = JournalFile(found.journals, "living"), JournalFile(found.journals, "dead")
    record = settled(new_id())
    engine = open_engine(found.database_url)
    Ledger(engine).write([record], fresh=True)
    engine.dispose()
    try:
        living.settle(record)  # booked, and still in the journal
        living.open(opened(new_id()))
        dead.open(opened(new_id()))
        assert only(found, "journal") == ("OK", "2 in use, 2 requests not in SQL yet")
        os.close(dead._lock)
        dead._lock = -1
        level, text = only(found, "journal")
        assert (level, "1 in use, 2 requests" in text, "1 left behind" in text) == ("WARN", True, True)
        (found.journals / "rejected.jsonl").write_text('{"request_id": "1"}\n')
        assert [finding.level for finding in of(found, "journal")] == ["WARN", "WARN"]
    finally:
        living.close()
        os.close(dead._file)


def test_a_clock_that_went_back(folder: Path) -> None:
    found = settings(folder)
    migrate(found.database_url)
    engine = open_engine(found.database_url)
    Ledger(engine).write([settled(new_id(), opened_at=datetime.now(UTC) + timedelta(days=2))], fresh=True)
    engine.dispose()
    level, text = only(found, "clock")
    assert (level, "NTP" in text) == ("WARN", True)


def test_encoders_that_are_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from classifiers import classifier

    monkeypatch.setattr(classifier, "DATA_DIRECTORY", folder)
    assert only(settings(folder), "encoders")[0] == "FAIL"


def test_ports_that_are_taken(folder: Path) -> None:
    found = settings(folder)
    with closing(socket.create_server((found.host, found.port))):
        level, text = only(found, "ports")
    assert (level, "--port" in text) == ("WARN", True)
    both = settings(folder, FARTHING_ADMIN_KEY="a" * 32)
    assert len(of(both, "ports")) == 2


# -- Redis --


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyServer]:
    server = ValkeyServer("--requirepass", "password-of-redis")
    yield server
    server.close()


@pytest.fixture
def shared(folder: Path, server: ValkeyServer) -> Settings:
    url = f"redis://:password-of-redis@127.0.0.1:{server.port}/0"
    return settings(folder, FARTHING_REDIS_URL=url, FARTHING_SECRET=SECRET)


async def command(shared: Settings, *words: str) -> None:
    from router.adapters.redis_store.connection import connect

    connection = connect(shared.redis_url or "", timeout=5)
    await connection.execute(*words)
    await connection.close()


def test_redis_in_order(shared: Settings) -> None:
    level, text = only(shared, "redis")
    assert (level, "Valkey" in text, "one server" in text) == ("OK", True, True)
    assert "password" not in text
    assert [finding.level for finding in of(shared, "clock")] == ["OK"]
    lines: list[str] = []
    assert examine(lambda: shared, lines.append) == 0
    assert "password-of-redis" not in "\n".join(lines)
    assert SECRET not in "\n".join(lines)


def test_a_clock_that_is_wrong_is_told_from_an_answer_that_came_late() -> None:
    asked = datetime.now(UTC) - timedelta(seconds=10)
    for seconds, level in ((-5, "WARN"), (0, "OK"), (7, "OK"), (20, "WARN")):
        (finding,) = doctor._compared_clock("Redis", asked, asked + timedelta(seconds=seconds))
        assert finding.level == level


def test_workers_with_other_secrets(folder: Path, shared: Settings) -> None:
    import asyncio

    asyncio.run(command(shared, "DEL", "farthing:secret-check"))
    assert [finding.level for finding in of(shared, "secret")] == ["OK", "OK"]
    other = settings(
        folder, FARTHING_REDIS_URL=shared.redis_url or "", FARTHING_SECRET="another-secret-altogether"
    )
    levels = [finding.level for finding in of(other, "secret")]
    assert levels == ["OK", "FAIL"]
    assert [finding.level for finding in of(shared, "secret")] == ["OK", "OK"]
    assert secret_fingerprint(b"one-secret") != secret_fingerprint(b"two-secret")
    assert "one-secret" not in secret_fingerprint(b"one-secret")


def test_a_redis_that_may_drop_budgets(shared: Settings) -> None:
    import asyncio

    asyncio.run(command(shared, "CONFIG", "SET", "maxmemory-policy", "allkeys-lru"))
    try:
        first, second = of(shared, "redis")
    finally:
        asyncio.run(command(shared, "CONFIG", "SET", "maxmemory-policy", "noeviction"))
    assert (first.level, second.level) == ("OK", "WARN")
    assert "noeviction" in second.text


def test_a_redis_that_is_away(folder: Path) -> None:
    found = settings(
        folder,
        FARTHING_REDIS_URL=f"redis://:{SECRET}@127.0.0.1:9/0",
        FARTHING_SECRET="another-secret-altogether",
    )
    level, text = only(found, "redis")
    assert (level, "FARTHING_REDIS_URL" in text) == ("FAIL", True)
    assert SECRET not in text
