"""The gateway of the run, as `farthing serve --workers 1` starts it, in a data folder of its own."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

from benchmarks.processes import Process, free_port

_PROVIDERS = """
apiVersion: farthing/v1
providers:
  upstream: {{ wire: openai, base_url: "{upstream}" }}
  simulated: {{ wire: openai, base_url: "{simulated}" }}
models:
  small: {{ provider: upstream, name: small, context: 32768, max_output: 8192, supports: [tools, json_schema],
           price: {{ input: "0.10", output: "0.40" }},
           quality: {{ simple: "0.95", medium: "0.80", complex: "0.45" }} }}
  middle: {{ provider: upstream, name: middle, context: 128000, max_output: 16384,
            supports: [tools, json_schema, vision], price: {{ input: "1", output: "4" }},
            quality: {{ simple: "0.97", medium: "0.93", complex: "0.75" }} }}
  frontier: {{ provider: upstream, name: frontier, context: 128000, max_output: 16384,
              supports: [tools, json_schema, vision], price: {{ input: "5", output: "20" }},
              quality: {{ simple: "0.99", medium: "0.97", complex: "0.94" }} }}
  {streams}
"""
_STREAM = (
    "{name}: {{ provider: simulated, name: {name}, context: 128000, max_output: 16384, "
    'price: {{ input: "1", output: "4" }} }}'
)
_POLICY = """
apiVersion: farthing/v1
baseline: frontier
organisation: { budget: { month: 900000, hard_cap: 1000000 } }
classes:
  simple:  { min_quality: 0.90, first_token_p95: 1500ms }
  medium:  { min_quality: 0.90, first_token_p95: 4s }
  complex: { min_quality: 0.90, first_token_p95: 15s }
defaults:
  allow: [small, middle, frontier, fast-stream, paced-stream]
  cache: { exact: true, semantic: never, ttl: 24h, scope: team }
teams:
  search:
    budget: { month: 500000, hard_cap: 600000 }
    apps: { bench: { budget: { month: 400000, hard_cap: 500000 } } }
"""
STREAMS = ("fast-stream", "paced-stream")


def farthing() -> list[str]:
    """How the command is started: the one installed beside this interpreter."""
    installed = Path(sys.executable).parent / "farthing"
    return [str(installed)] if installed.exists() else [sys.executable, "-m", "router.cli"]


class Installation:
    """Configuration, data folder and key of one gateway; `start` runs it."""

    def __init__(self, folder: Path, *, upstream: str, simulated: str, redis_url: str | None = None) -> None:
        folder.mkdir()
        self.folder = folder
        streams = "\n  ".join(_STREAM.format(name=name) for name in STREAMS)
        (folder / "providers.yaml").write_text(
            _PROVIDERS.format(upstream=upstream, simulated=simulated, streams=streams)
        )
        (folder / "policy.yaml").write_text(_POLICY)
        self.environment = {
            "FARTHING_CONFIG": str(folder),
            "FARTHING_DATA_DIR": str(folder / "data"),
            "FARTHING_DATABASE_URL": "",
            "FARTHING_REDIS_URL": redis_url or "",
            "FARTHING_SECRET": "a secret of the benchmark alone",
        }

    def key(self) -> str:
        made = subprocess.run(  # noqa: S603
            [*farthing(), "keys", "create", "--team", "search", "--app", "bench", "--json"],
            env={**self.environment, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        )
        return str(json.loads(made.stdout)["key"])

    def start(self) -> Gateway:
        return Gateway(self)


class Gateway:
    """A running gateway. `ready_after`: seconds from the start of the process until `/readyz` said 200."""

    def __init__(self, installation: Installation) -> None:
        port = free_port()
        self.origin = f"http://127.0.0.1:{port}"
        self.url = f"{self.origin}/v1"
        self._database = installation.folder / "data" / "farthing.db"
        self.process = Process(
            [*farthing(), "serve", "--port", str(port), "--workers", "1"],
            folder=installation.folder,
            log="gateway.log",
            environment=installation.environment,
        )
        self.ready_after = self.process.wait_until_answers(f"{self.origin}/readyz")

    def metrics(self) -> dict[str, float]:
        """Every series as it is printed, with its value."""
        with urllib.request.urlopen(f"{self.origin}/metrics") as answer:  # noqa: S310
            lines = answer.read().decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def attempts(self) -> int:
        """Calls to providers the gateway has booked."""
        found = self.metrics()
        return round(sum(v for n, v in found.items() if re.match(r"farthing_upstream_attempts_total\b", n)))

    def settled(self, seconds: float = 60.0) -> None:
        """Waits until every request is in the ledger, so that its writing is not measured with the next load."""
        end = time.monotonic() + seconds
        while self.metrics().get("farthing_journal_unsettled", 0.0):
            if time.monotonic() > end:
                raise RuntimeError("the ledger did not take every request within a minute")
            time.sleep(0.1)

    def ledger(self) -> Counter[tuple[str, str]]:
        """Requests in the ledger by (cache, encoder)."""
        with sqlite3.connect(f"file:{self._database}?mode=ro", uri=True) as connection:
            rows = connection.execute(
                "SELECT cache, coalesce(encoder, 'none'), count(*) FROM requests GROUP BY 1, 2"
            ).fetchall()
        connection.close()
        return Counter({(cache, encoder): count for cache, encoder, count in rows})

    def close(self) -> None:
        self.process.close()
