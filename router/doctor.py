"""`farthing doctor`: looks at everything a gateway depends on and says what is wrong and what to do.

It calls no model and prints no secret. It changes nothing a gateway would not make itself: the data folder, the
secret in it, and the secret's fingerprint in Redis. Findings are OK, WARN (a gateway starts and serves, with less) or
FAIL.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from router.adapters.configuration import lint
from router.adapters.journal import adopt, journal_folders
from router.adapters.price_catalogue import shipped_catalogue
from router.adapters.redis_store.connection import RedisConnection, connect
from router.adapters.redis_store.secret_check import FINGERPRINT_KEY, shares_secret
from router.adapters.sql.database import database_url, open_engine, schema_problem
from router.adapters.sql.ledger import existing_ids
from router.adapters.sql.schema import requests
from router.adapters.sql.spend import journalled_ids
from router.adapters.sql.writer import REJECTED_FILE
from router.core.compile import CompiledSnapshot
from router.core.errors import ConfigurationError, FarthingError
from router.core.policy import ProviderSpec
from router.settings import MIN_SECRET, Settings, without_password

Level = Literal["OK", "WARN", "FAIL"]

SUPPORTED = ((3, 11), (3, 13))
LITTLE_DISK, NO_DISK = 1024**3, 64 * 1024**2
REACH_SECONDS = 3.0
REDIS_SECONDS = 2.0
CLOCK_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Finding:
    level: Level
    subject: str
    text: str

    def __str__(self) -> str:
        first, *rest = self.text.splitlines() or [""]
        lines = [f"{self.level:<4}  {self.subject:<9} {first}", *(f"{'':16}{line}" for line in rest)]
        return "\n".join(lines)


Findings = Iterator[Finding]


def examine(read: Callable[[], Settings], write: Callable[[str], None] = print) -> int:
    """Checks everything and writes a line for each finding. 0: a gateway can start and serve; 1: something fails."""
    failed = warned = 0
    for finding in findings(read):
        write(str(finding))
        failed += finding.level == "FAIL"
        warned += finding.level == "WARN"
    if failed:
        write(f"\n{failed} to repair before a gateway serves truthfully, {warned} to look at.")
    else:
        write(f"\nNothing stands in the way of a gateway; {warned} to look at.")
    return 1 if failed else 0


def findings(read: Callable[[], Settings]) -> Findings:
    yield from _guarded("python", _python)
    try:
        settings = read()
    except ConfigurationError as error:
        yield Finding("FAIL", "settings", str(error))
        return
    yield from _guarded("data", lambda: _data(settings))
    yield from _guarded("secret", lambda: _secret(settings))
    snapshot: list[CompiledSnapshot] = []
    yield from _guarded("config", lambda: _configuration(settings, snapshot))
    for compiled in snapshot:
        yield from _guarded("provider", lambda found=compiled: _providers(settings, found))  # type: ignore[misc]
    yield from _guarded("database", lambda: _database(settings))
    yield from _guarded("redis", lambda: _redis(settings))
    yield from _guarded("encoders", _encoders)
    yield from _guarded("ports", lambda: _ports(settings))


def _guarded(subject: str, check: Callable[[], Findings]) -> Findings:
    """A check that breaks is a finding itself, and the others still run."""
    try:
        yield from check()
    except FarthingError as error:
        yield Finding("FAIL", subject, str(error))
    except Exception as error:
        # Its text may hold what must not be shown, such as a URL with a password.
        yield Finding("FAIL", subject, f"this check broke ({type(error).__name__}); please report it")


# -- this machine --


def _python() -> Findings:
    shown = ".".join(str(part) for part in sys.version_info[:3])
    (low, high), found = SUPPORTED, tuple(sys.version_info[:2])
    if found < low:
        yield Finding(
            "FAIL", "python", f"{shown} is too old. Install Farthing with Python 3.11, 3.12 or 3.13."
        )
    elif found > high:
        yield Finding("WARN", "python", f"{shown} is newer than what is tested. Prefer Python 3.11 to 3.13.")
    else:
        yield Finding("OK", "python", shown)


def _data(settings: Settings) -> Findings:
    folder = settings.data
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"farthing")
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield Finding(
            "FAIL",
            "data",
            f"{folder} cannot be written ({error.strerror}). The journal needs it: correct its permissions, or name "
            "another folder with FARTHING_DATA_DIR.",
        )
        return
    shown = f"{free / 1024**3:.1f} GiB free"
    if free < NO_DISK:
        yield Finding("FAIL", "data", f"{folder} has {shown}: no request can be journalled. Make room.")
    elif free < LITTLE_DISK:
        yield Finding(
            "WARN",
            "data",
            f"{folder} has only {shown}: while SQL is away the journal grows there. Make room.",
        )
    else:
        yield Finding("OK", "data", f"{folder} can be written, {shown}")
    if folder.stat().st_mode & 0o022:
        yield Finding("WARN", "data", f"others may write in {folder}. Run 'chmod go-w {folder}'.")


def _secret(settings: Settings) -> Findings:
    if settings.environment.get("FARTHING_SECRET"):
        yield Finding("OK", "secret", "from FARTHING_SECRET")
    else:
        path = settings.data / "secret"
        if path.stat().st_mode & 0o077:
            yield Finding("WARN", "secret", f"others may read {path}. Run 'chmod 600 {path}'.")
        else:
            yield Finding(
                "OK", "secret", f"from {path}, which only you can read; keep a copy with your backups"
            )
    if settings.admin_key is not None and len(settings.admin_key) < MIN_SECRET:
        yield Finding(
            "WARN",
            "secret",
            f"FARTHING_ADMIN_KEY is shorter than {MIN_SECRET} characters and could be guessed. Use the output "
            "of 'openssl rand -hex 32'.",
        )


def _configuration(settings: Settings, snapshot: list[CompiledSnapshot]) -> Findings:
    loaded = lint(settings.config, shipped_catalogue())
    for problem in loaded.problems:
        yield Finding("FAIL" if problem.severity == "error" else "WARN", "config", str(problem))
    if loaded.snapshot is not None:
        snapshot.append(loaded.snapshot)
        compiled = loaded.snapshot
        yield Finding(
            "OK",
            "config",
            f"{settings.config}: {len(compiled.models)} models, {len(compiled.providers)} providers, policy "
            f"{compiled.hash}",
        )


# -- providers --


def _providers(settings: Settings, snapshot: CompiledSnapshot) -> Findings:
    providers = list(snapshot.providers.values())
    usable = [provider for provider in providers if _key_is_set(provider, settings.environment)]
    with ThreadPoolExecutor(8) as threads:
        reached = dict(zip((p.name for p in usable), threads.map(_reach, usable), strict=True))
    for provider in providers:
        if provider not in usable:
            # The gateway serves with the others, and refuses to start where there is no other.
            yield Finding(
                "WARN" if usable else "FAIL",
                "provider",
                f"{provider.name}: {provider.api_key_env} is not set, so its models are left out. Set it, or remove "
                "the provider.",
            )
            continue
        problem, told = reached[provider.name]
        key = f", key from {provider.api_key_env}" if provider.api_key_env else ""
        yield Finding(
            "FAIL" if problem else "OK", "provider", f"{provider.name}: {told}{'' if problem else key}"
        )


def _key_is_set(provider: ProviderSpec, environment: Mapping[str, str]) -> bool:
    return provider.api_key_env is None or bool(environment.get(provider.api_key_env))


def _reach(provider: ProviderSpec) -> tuple[bool, str]:
    """(is it a problem, what is known of its endpoint). A connection and its TLS handshake, no request."""
    if provider.wire == "litellm" and find_spec("litellm") is None:
        return True, "its wire needs litellm, which is not installed. Reinstall farthing."
    if provider.base_url is None:
        return False, f"wire {provider.wire} without a base_url: it is reached with its first request"
    parts = urlsplit(provider.base_url)
    secure, host = parts.scheme == "https", parts.hostname or ""
    port = parts.port or (443 if secure else 80)
    shown = without_password(provider.base_url)
    started = time.monotonic()
    try:
        with socket.create_connection((host, port), REACH_SECONDS) as connection:
            if secure:
                ssl.create_default_context().wrap_socket(connection, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        return True, (
            f"{shown}: its certificate is not trusted ({error.verify_message}). Correct base_url, or name the "
            "authority with SSL_CERT_FILE."
        )
    except ssl.SSLError:
        return True, f"{shown} does not speak TLS. Correct base_url (http:// where it has none)."
    except socket.gaierror:
        return True, f"{shown}: no host has this name. Correct base_url in providers.yaml, or the DNS."
    except TimeoutError:
        return True, f"{shown} did not answer within {REACH_SECONDS:g} s. Check base_url and the firewall."
    except OSError as error:
        return True, f"{shown} cannot be reached ({error.strerror}). Start it, or correct base_url."
    return False, f"{shown} is reached in {1000 * (time.monotonic() - started):.0f} ms"


# -- database and journal --


def _database(settings: Settings) -> Findings:
    shown = without_password(settings.database_url)
    url = database_url(settings.database_url)
    if settings.embedded and not Path(url.database or "").exists():
        yield Finding("OK", "database", f"{shown} does not exist yet: 'farthing serve' makes it")
        yield from _journals(settings, None)
        return
    engine = open_engine(settings.database_url)
    try:
        started = time.monotonic()
        try:
            problem = schema_problem(engine)
        except FarthingError as error:
            yield Finding(
                "FAIL", "database", f"{shown}: {error}. Start it, or correct FARTHING_DATABASE_URL."
            )
            yield from _journals(settings, None)
            return
        took = 1000 * (time.monotonic() - started)
        if problem is None:
            yield Finding(
                "OK", "database", f"{shown} answers in {took:.0f} ms; schema and triggers as they must be"
            )
        else:
            # `serve` migrates its embedded database itself, and cannot bring triggers back.
            repaired = settings.embedded and "trigger" not in problem
            yield Finding("WARN" if repaired else "FAIL", "database", f"{shown}: {problem}")
        yield from _clock(engine, problem is None)
        yield from _journals(settings, engine if problem is None else None)
    finally:
        engine.dispose()


def _clock(engine: Engine, has_tables: bool) -> Findings:
    try:
        with engine.connect() as connection:
            if engine.dialect.name == "postgresql":
                asked = datetime.now(UTC)
                theirs = connection.execute(sa.text("SELECT clock_timestamp()")).scalar_one()
                yield from _compared_clock("database", asked, theirs.astimezone(UTC))
            newest = connection.scalar(sa.select(sa.func.max(requests.c.opened_at))) if has_tables else None
    except SQLAlchemyError as error:
        yield Finding("FAIL", "database", f"it stopped answering ({type(error).__name__})")
        return
    if newest is not None and newest > datetime.now(UTC) + timedelta(minutes=1):
        yield Finding(
            "WARN",
            "clock",
            f"the newest request in the ledger is of {newest.isoformat(timespec='seconds')}, which this clock has "
            "yet to reach: budgets may count in the wrong month. Synchronise the clock (NTP).",
        )


def _compared_clock(name: str, asked: datetime, theirs: datetime) -> Findings:
    # They read their clock some time after they were asked and before they are heard.
    apart = max(asked - theirs, theirs - datetime.now(UTC), timedelta()).total_seconds()
    if apart > CLOCK_SECONDS:
        yield Finding(
            "WARN",
            "clock",
            f"this machine and {name} differ by {apart:.0f} s. Synchronise both (NTP): holds and records rely on it.",
        )
    else:
        yield Finding("OK", "clock", f"agrees with {name} within {CLOCK_SECONDS:g} s")


def _journals(settings: Settings, engine: Engine | None) -> Findings:
    folder = settings.journals
    in_use = orphans = 0
    for journal in journal_folders(folder):
        lock = adopt(journal)
        if lock is None:
            in_use += 1
        else:
            os.close(lock)
            orphans += 1
    ids = journalled_ids(folder)
    unsettled = len(ids)
    if engine is not None:
        with engine.connect() as connection:
            unsettled -= len(existing_ids(connection, sorted(ids)))
    told = f"{in_use} in use, {unsettled} requests not in SQL yet"
    if orphans and unsettled:
        yield Finding(
            "WARN",
            "journal",
            f"{told}; {orphans} left behind by gateways that died. The next 'farthing serve' with this "
            "FARTHING_DATA_DIR books them.",
        )
    else:
        yield Finding("OK", "journal", told + (f"; {orphans} to be cleared away" if orphans else ""))
    rejected = folder / REJECTED_FILE
    if rejected.exists():
        with rejected.open("rb") as file:
            count = sum(1 for _ in file)
        yield Finding(
            "WARN",
            "journal",
            f"{count} requests could not be booked and are kept in {rejected} with the reason. Reports count them as "
            "'rejected'.",
        )


# -- Redis --


def _redis(settings: Settings) -> Findings:
    if settings.redis_url is None:
        yield Finding("OK", "redis", "not used: budgets and caches live in the one worker")
        return
    yield from asyncio.run(_examined_redis(settings, settings.redis_url))


async def _examined_redis(settings: Settings, url: str) -> list[Finding]:
    shown = without_password(url)
    connection = connect(url, timeout=REDIS_SECONDS, connections=2)
    try:
        started = time.monotonic()
        if not await connection.ping():
            return [
                Finding(
                    "FAIL",
                    "redis",
                    f"{shown} does not take a write ({connection.status().last_error or 'no answer'}). Start it, or "
                    "correct FARTHING_REDIS_URL.",
                )
            ]
        took = 1000 * (time.monotonic() - started)
        found = [*_server(shown, took, url, await _info(connection))]
        found += await _redis_clock(connection)
        found.append(await _compared_secret(connection, settings.secret))
        return found
    finally:
        await connection.close()


async def _info(connection: RedisConnection) -> Mapping[str, Any]:
    """INFO of the server (of one node of a cluster). Empty where it is not allowed."""
    try:
        reply: Any = await connection.execute("INFO", trial=True)
    except FarthingError:
        return {}
    if isinstance(reply, dict) and reply and all(isinstance(node, dict) for node in reply.values()):
        nodes = [node for node in reply.values() if "redis_version" in node]
        reply = nodes[0] if nodes else reply
    return reply if isinstance(reply, dict) else {}


def _server(shown: str, took: float, url: str, info: Mapping[str, Any]) -> Findings:
    if not info:
        yield Finding("OK", "redis", f"{shown} takes writes in {took:.0f} ms")
        yield Finding("WARN", "redis", "INFO is not allowed here: its memory policy could not be read")
        return
    name = "Valkey" if "valkey_version" in info else "Redis"
    version = info.get("valkey_version") or info.get("redis_version") or "of unknown version"
    clustered = str(info.get("cluster_enabled", 0)) == "1" or info.get("redis_mode") == "cluster"
    mode = "a cluster" if clustered else "one server"
    yield Finding("OK", "redis", f"{shown}: {name} {version}, {mode}, takes writes in {took:.0f} ms")
    if clustered and "+cluster" not in urlsplit(url).scheme:
        yield Finding(
            "FAIL", "redis", "it is part of a cluster. Write FARTHING_REDIS_URL as redis+cluster://HOST:PORT."
        )
    policy = info.get("maxmemory_policy")
    if policy not in (None, "noeviction"):
        yield Finding(
            "WARN",
            "redis",
            f"maxmemory-policy is {policy}: a full server may drop budget counters, and the holds of requests in "
            "flight with them. Set it to noeviction, or give the gateway a server of its own.",
        )


async def _redis_clock(connection: RedisConnection) -> list[Finding]:
    asked = datetime.now(UTC)
    try:
        reply: Any = await connection.execute("TIME", trial=True)
        if isinstance(reply, dict):
            reply = next(iter(reply.values()))
        theirs = datetime.fromtimestamp(int(reply[0]), UTC)
    except (FarthingError, ValueError, TypeError, IndexError):
        return []
    return list(_compared_clock("Redis", asked, theirs))


async def _compared_secret(connection: RedisConnection, secret: bytes) -> Finding:
    try:
        shared = await shares_secret(connection, secret)
    except FarthingError:
        return Finding("FAIL", "secret", "it could not be compared with the other workers': Redis went away")
    if shared:
        return Finding("OK", "secret", "the same as that of every worker that was compared on this Redis")
    return Finding(
        "FAIL",
        "secret",
        "another worker on this Redis uses another FARTHING_SECRET: keys it knows are unknown here. Set the same on "
        f"all. If you have changed it on all, delete the Redis key {FINGERPRINT_KEY} and run this again.",
    )


# -- encoders --


def _encoders() -> Findings:
    from classifiers.classifier import Classifier
    from classifiers.encoder import ArtefactError, EncoderUnavailableError

    text = "What is the capital of France?"
    try:
        classifier = Classifier.load()
        verdict = classifier.classify(text)
        yield Finding(
            "OK",
            "encoders",
            f"static: hashes match; a test prompt is {verdict.prompt_class} [{verdict.artefact}]",
        )
    except ArtefactError as error:
        yield Finding("FAIL", "encoders", str(error))
        return
    try:
        started = time.monotonic()
        classifier.minilm  # noqa: B018 - reading it loads it
        loaded = time.monotonic()
        classifier.refine(text, verdict)
        done = time.monotonic()
    except (ArtefactError, EncoderUnavailableError) as error:
        yield Finding("WARN", "encoders", f"minilm: {error}; the static verdict decides alone")
        return
    yield Finding(
        "OK",
        "encoders",
        f"minilm: hashes match; loaded in {1000 * (loaded - started):.0f} ms, a short prompt takes "
        f"{1000 * (done - loaded):.0f} ms",
    )


# -- ports --


def _ports(settings: Settings) -> Findings:
    yield _port(settings.host, settings.port, "--port")
    if settings.admin_key is not None:
        yield _port(settings.host, settings.admin_port or settings.port + 1, "--admin-port")


def _port(host: str, port: int, option: str) -> Finding:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if _is_gateway(host, port):
                return Finding("OK", "ports", f"{host}:{port} is served by a Farthing gateway")
            return Finding(
                "WARN",
                "ports",
                f"{host}:{port} cannot be had ({error.strerror}). Start with another {option}, or free it.",
            )
    return Finding("OK", "ports", f"{host}:{port} is free")


def _is_gateway(host: str, port: int) -> bool:
    """By its answer without a key: the id every answer carries on the data plane, the refusal on the admin plane."""
    with closing(HTTPConnection(host, port, timeout=REACH_SECONDS)) as connection:
        try:
            connection.request("GET", "/healthz")
            reply = connection.getresponse()
            return reply.getheader("x-request-id") is not None or b"invalid_admin_key" in reply.read(4096)
        except (OSError, HTTPException):
            return False
