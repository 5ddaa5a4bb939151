"""A real `farthing serve` on a free port, for tests and acceptance scripts.

with Gateway(folder, provider_yaml, policy_yaml) as gateway:
    client = gateway.openai(gateway.key("search"))
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa
from openai import AsyncOpenAI, OpenAI

from router.adapters.sql.database import migrate, open_engine
from router.adapters.sql.keys import create_key
from router.adapters.sql.schema import attempts, cost_lines, requests

REPOSITORY = Path(__file__).parents[2]
SECRET = "0123456789abcdef0123456789abcdef"
PATIENCE = 60.0


def providers_yaml(models: Mapping[str, str], providers: Mapping[str, str]) -> str:
    """The file of these providers and models, each given as the text behind its name."""
    lines = ["apiVersion: farthing/v1", "providers:"]
    lines += [f"  {name}: {text}" for name, text in providers.items()]
    lines += ["models:"]
    lines += [f"  {name}: {text}" for name, text in models.items()]
    return "\n".join(lines) + "\n"


class Gateway:
    """`folder` gets the two files, the data folder and the log. `database_url` None: SQLite in the data folder.

    Starting waits for `/readyz`. Leaving the block ends the process by its handle.
    """

    def __init__(
        self,
        folder: Path,
        providers: str,
        policy: str,
        *,
        database_url: str | None = None,
        redis_url: str | None = None,
        workers: int = 1,
        admin: bool = False,
        environment: Mapping[str, str] | None = None,
        python: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.config = folder / "config"
        self.data = folder / "data"
        self.config.mkdir(parents=True, exist_ok=True)
        self.data.mkdir(exist_ok=True)
        self.log_path = folder / "gateway.log"
        self.write(providers, policy)
        self.database_url = database_url or f"sqlite:///{self.data / 'farthing.db'}"
        self.workers = workers
        self.admin = admin
        self.port = 0
        self.admin_port: int | None = None
        self.startup_seconds = 0.0
        self.environment = {
            "PATH": os.environ.get("PATH", ""),
            "HOME": str(folder),
            "PYTHONPATH": str(REPOSITORY),
            "FARTHING_DATA_DIR": str(self.data),
            "FARTHING_SECRET": SECRET,
            "FARTHING_CONFIG": str(self.config),
            "FARTHING_ADMIN_KEY": "admin-key-for-tests",
            **({"FARTHING_DATABASE_URL": database_url} if database_url else {}),
            **({"FARTHING_REDIS_URL": redis_url} if redis_url else {}),
            **(environment or {}),
        }
        self._python = list(python) or [sys.executable, "-m", "router.cli"]
        self._process: subprocess.Popen[str] | None = None
        self._keys: dict[tuple[str, str | None], str] = {}
        migrate(self.database_url)
        self.engine = open_engine(self.database_url)

    # -- process --

    def __enter__(self) -> Gateway:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it, on the port it had before where it was started once."""
        began = time.monotonic()
        command = [*self._python, "serve", "--port", str(self.port), "--workers", str(self.workers)]
        if self.admin:
            command += ["--admin-port", str(self.admin_port or 0)]
        with self.log_path.open("a") as log:
            self._process = subprocess.Popen(
                command, env=self.environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("Farthing serves "):
            self.kill()
            raise RuntimeError(f"the gateway did not start: {line}{self.log_path.read_text()[-2000:]}")
        self.port = _port(line)
        if self.admin:
            self.admin_port = _port(self._process.stdout.readline())
        with httpx.Client(timeout=10) as http:

            def is_ready() -> bool:
                if self._process is not None and self._process.poll() is not None:
                    raise RuntimeError(f"the gateway ended: {self.log_path.read_text()[-2000:]}")
                with contextlib.suppress(httpx.HTTPError):
                    return http.get(f"{self.url}/readyz").status_code == 200
                return False

            until(is_ready, "the gateway is ready")
        self.startup_seconds = time.monotonic() - began

    def stop(self) -> int:
        """SIGTERM, and wait. The exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.terminate()
        try:
            status = process.wait(90)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        assert process.stdout is not None
        process.stdout.close()
        return status

    def kill(self) -> None:
        """kill -9. Only the one process: with several workers their supervisor dies and they go on."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def reload(self) -> None:
        os.kill(self.pid, signal.SIGHUP)

    def close(self) -> None:
        self.stop()
        self.engine.dispose()

    # -- configuration and keys --

    def write(self, providers: str | None = None, policy: str | None = None) -> None:
        for name, text in (("providers.yaml", providers), ("policy.yaml", policy)):
            if text is not None:
                fresh = self.config / f".{name}"
                fresh.write_text(text)
                fresh.rename(self.config / name)

    def key(
        self, team: str, app: str | None = None, tags: Mapping[str, tuple[str, ...]] | None = None
    ) -> str:
        if tags is None and (team, app) in self._keys:
            return self._keys[team, app]
        key, _ = create_key(self.engine, SECRET.encode(), team, app, tags)
        if tags is None:
            self._keys[team, app] = key
        return key

    def cli(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "router.cli", *arguments],
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=180,
        )

    # -- talking to it --

    def openai(self, key: str, **options: Any) -> OpenAI:
        options.setdefault("max_retries", 0)
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, **options)

    def async_openai(self, key: str, **options: Any) -> AsyncOpenAI:
        options.setdefault("max_retries", 0)
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, **options)

    def http(self, key: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {key}"}, timeout=PATIENCE)

    def post(
        self, key: str, body: Mapping[str, Any] | bytes, headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        with self.http(key) as http:
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            return http.post(
                "/v1/chat/completions",
                content=raw,
                headers={"content-type": "application/json", **(headers or {})},
            )

    def chat(
        self, key: str, content: str, *, headers: Mapping[str, str] | None = None, **fields: Any
    ) -> httpx.Response:
        body = {"model": "auto", "messages": [{"role": "user", "content": content}], **fields}
        return self.post(key, body, headers)

    # -- the ledger --

    def row(self, request_id: str) -> dict[str, Any]:
        """The ledger row of a request, once it is written."""
        found: dict[str, Any] = until(
            lambda: self._find(request_id), f"request {request_id} is in the ledger"
        )
        return found

    def _find(self, request_id: str) -> dict[str, Any] | None:
        with self.engine.connect() as connection:
            found = (
                connection.execute(sa.select(requests).where(requests.c.id == request_id)).mappings().first()
            )
            return dict(found) if found is not None else None

    def rows(self) -> list[dict[str, Any]]:
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(sa.select(requests)).mappings()]

    def attempts(self, request_id: str | None = None) -> list[dict[str, Any]]:
        query = sa.select(attempts).order_by(attempts.c.request_id, attempts.c.attempt)
        if request_id is not None:
            self.row(request_id)
            query = query.where(attempts.c.request_id == request_id)
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def cost_lines(self) -> list[dict[str, Any]]:
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(sa.select(cost_lines)).mappings()]

    def in_flight(self) -> int:
        """Requests that are admitted and not in the ledger yet, as the gateway says."""
        with httpx.Client(base_url=self.url, timeout=PATIENCE) as http:
            shown = http.get("/metrics").text
        found = re.search(r"^farthing_journal_unsettled(?:\{[^}]*\})? ([0-9.]+)$", shown, re.M)
        return 0 if found is None else int(float(found[1]))

    def booked(self) -> None:
        """Waits until every request that was admitted is in the ledger."""
        until(lambda: self.in_flight() == 0, "nothing is left in the journal")

    def settled(self) -> None:
        """As `booked`, by what the report says."""

        def empty() -> bool:
            report = json.loads(self.cli("report", "spend", "--format", "json").stdout)
            return bool(report["data_health"]["unsettled"] == 0)

        until(empty, "the journal is settled")


def _port(line: str) -> int:
    return int(line.strip().rsplit(":", 1)[1].split("/")[0])


def until(found: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Asks until the answer is true, and gives it back. Raises AssertionError after `patience` seconds."""
    end = time.monotonic() + patience
    while True:
        answer = found()
        if answer:
            return answer
        if time.monotonic() > end:
            raise AssertionError(f"waited {patience:g} s in vain until {what}")
        time.sleep(0.02)
