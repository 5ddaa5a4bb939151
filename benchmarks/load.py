"""Load on one URL: wrk where it is installed, else the bundled client."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.prompts import WORDS, PromptNumbers

ROOT = Path(__file__).parent.parent
SCRIPT = Path(__file__).parent / "wrk.lua"
# Prompts set apart for a second of load on a gateway: more than it answers.
RATE_BOUND = 5_000


@dataclass(frozen=True, slots=True)
class Load:
    """One run. `sent` counts requests handed to a connection; those above `completed` were cut off at the end."""

    completed: int
    sent: int
    seconds: float
    p50_us: float
    p99_us: float
    non_2xx: int
    broken: int

    @property
    def per_second(self) -> float:
        return self.completed / self.seconds


class LoadGenerator:
    """`folder` takes the files that wrk reads. `key` is the API key every request carries."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = folder
        self.key = key
        self._numbers = PromptNumbers()
        self._wrk = shutil.which("wrk")
        (folder / "words.txt").write_text("\n".join(WORDS) + "\n")

    @property
    def name(self) -> str:
        if self._wrk:
            return "wrk"
        return "the bundled Python client (wrk is not installed; its ceiling is lower)"

    def run(
        self,
        url: str,
        *,
        model: str,
        templates: Sequence[str],
        connections: int,
        seconds: int,
        unique: bool = True,
    ) -> Load:
        """Closed loop for `seconds`. `unique`: with prompts that no other run sends; a target without a cache does
        not need them. Raises RuntimeError where the generator itself failed.
        """
        filled = "%s" in templates[0]
        room = RATE_BOUND * seconds if filled else len(templates)
        first = self._numbers.take(room) if unique and filled else 0
        url += "/chat/completions"
        if self._wrk:
            found = self._with_wrk(url, model, templates, connections, seconds, first)
        else:
            given = {
                "url": url,
                "key": self.key,
                "model": model,
                "templates": templates,
                "connections": connections,
                "seconds": seconds,
                "first": first,
            }
            found = own_client("load", given)
        load = Load(**found)
        if unique and (filled or len(templates) > 1) and load.sent > room:
            raise RuntimeError(f"{load.sent} requests in {seconds} s: more than prompts were set apart for")
        return load

    def _with_wrk(
        self, url: str, model: str, templates: Sequence[str], connections: int, seconds: int, first: int
    ) -> dict[str, Any]:
        prompts = self._folder / "prompts.txt"
        prompts.write_text("\n".join(templates) + "\n")
        command = [
            *(str(self._wrk), "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s"),
            *("-s", str(SCRIPT), url, "--", self.key, model, str(first)),
            *(str(prompts), str(self._folder / "words.txt")),
        ]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        for line in ended.stdout.splitlines():
            if line.startswith("RESULT "):
                found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
                return found
        raise RuntimeError(f"wrk gave no result: {ended.stdout}{ended.stderr}")


def own_client(work: str, given: dict[str, Any]) -> dict[str, Any]:
    """Runs `benchmarks.client` in a process of its own."""
    ended = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "benchmarks.client", work, json.dumps(given)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode != 0:
        raise RuntimeError(f"the client failed: {ended.stderr}")
    found: dict[str, Any] = json.loads(ended.stdout)
    return found
