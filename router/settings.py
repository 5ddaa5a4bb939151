"""Settings from the environment and the command line. Nothing else reads the environment."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from router.core.errors import ConfigurationError

MIN_SECRET = 16


@dataclass(frozen=True, slots=True)
class Settings:
    """`secret` keys every hash (API keys, cache keys); all workers of an installation share it.

    `environment` holds provider keys by variable name; it is never shown.
    """

    config: Path
    data: Path
    database_url: str = field(repr=False)
    redis_url: str | None = field(repr=False)
    admin_key: str | None = field(repr=False)
    secret: bytes = field(repr=False)
    host: str = "127.0.0.1"
    port: int = 8400
    admin_port: int | None = None
    workers: int = 1
    open_team: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def journals(self) -> Path:
        return self.data / "journal"

    @property
    def metrics(self) -> Path:
        return self.data / "metrics"

    @property
    def embedded(self) -> bool:
        """SQLite: one machine, migrated by `serve` itself."""
        return self.database_url.startswith("sqlite")


def read_settings(
    *,
    config: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8400,
    admin_port: int | None = None,
    workers: int = 1,
    open_team: str | None = None,
    environment: Mapping[str, str] | None = None,
    reading: bool = False,
) -> Settings:
    """Settings of this process. Creates the data folder, and a secret in it where none is set.

    `reading`: for a command that only reads what was recorded. It creates nothing, and an embedded database must be
    there: a mistyped folder would else look like an empty ledger.

    Raises ConfigurationError naming the variable and the remedy.
    """
    env = dict(os.environ if environment is None else environment)
    data = Path(env.get("FARTHING_DATA_DIR") or _default_data(env)).expanduser().absolute()
    redis_url = env.get("FARTHING_REDIS_URL") or None
    database_url = env.get("FARTHING_DATABASE_URL") or f"sqlite:///{data / 'farthing.db'}"
    if reading:
        _find(database_url)
    else:
        try:
            data.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigurationError(
                f"FARTHING_DATA_DIR: the folder {data} cannot be made ({error.strerror}). "
                "Name one that can be written."
            ) from None
    if workers > 1 and redis_url is None:
        raise ConfigurationError(
            "--workers above 1 needs FARTHING_REDIS_URL: without it each worker would keep budgets of its own."
        )
    shared = redis_url is not None or not database_url.startswith("sqlite")
    return Settings(
        config=Path(config or env.get("FARTHING_CONFIG") or ".").expanduser().absolute(),
        data=data,
        database_url=database_url,
        redis_url=redis_url,
        admin_key=env.get("FARTHING_ADMIN_KEY") or None,
        secret=_secret(env, data, shared, reading),
        host=host,
        port=port,
        admin_port=admin_port,
        workers=workers,
        open_team=open_team,
        environment=env,
    )


def _find(database_url: str) -> None:
    """Raises ConfigurationError where this names the file of an embedded database, and there is none."""
    scheme, _, path = database_url.partition(":///")
    if scheme == "sqlite" and path and not Path(path).is_file():
        raise ConfigurationError(
            f"There is no ledger at {path}. Set FARTHING_DATA_DIR (or FARTHING_DATABASE_URL) to the gateway's; "
            "before its first start there is nothing to read."
        )


def worker_environment(settings: Settings) -> dict[str, str]:
    """The environment a worker process is started with."""
    return {
        **settings.environment,
        "FARTHING_CONFIG": str(settings.config),
        "FARTHING_DATA_DIR": str(settings.data),
    }


def collect_metrics_in(folder: Path) -> None:
    """Makes this process count into files that all workers share; to be called before the first metric is made."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)


def _default_data(env: Mapping[str, str]) -> Path:
    base = env.get("XDG_DATA_HOME") or str(Path(env.get("HOME", "~")) / ".local" / "share")
    return Path(base) / "farthing"


def _secret(env: Mapping[str, str], data: Path, shared: bool, reading: bool) -> bytes:
    text = env.get("FARTHING_SECRET")
    if text:
        if len(text) < MIN_SECRET:
            raise ConfigurationError(
                f"FARTHING_SECRET is shorter than {MIN_SECRET} characters. Use a longer one."
            )
        return text.encode("utf-8")
    if shared:
        raise ConfigurationError(
            "FARTHING_SECRET is not set. With Redis or PostgreSQL every worker must hash keys alike: set it to the "
            "same random text on each, for example the output of 'openssl rand -hex 32'."
        )
    path = data / "secret"
    if reading and not path.exists():
        return b""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    else:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    secret = path.read_text().strip()
    if len(secret) < MIN_SECRET:
        raise ConfigurationError(
            f"The secret in {path} is too short. Remove the file only if no key was made yet."
        )
    return secret.encode("utf-8")


def without_password(url: str) -> str:
    """A URL that can be shown: user, password and query are left out."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{host}{port}{parts.path}"


def demo_environment(data: Path) -> dict[str, str]:
    """The process's environment without Farthing's own variables: the demo keeps to its own folder `data`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FARTHING_")}
    return {**kept, "FARTHING_DATA_DIR": str(data)}


def found_keys(names: Iterable[str]) -> tuple[str, ...]:
    """Those of the variables `names` that are set and not empty; never their values."""
    return tuple(name for name in names if os.environ.get(name, "").strip())
