"""Processes of the run: started in folders of their own, measured through /proc, ended by their own handle."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_TICK = os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Memory:
    """MiB over all processes; PSS counts a shared page once."""

    rss: float
    pss: float


class Process:
    """A started program and all it started. `log` gets its output. End it with `close`."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        folder: Path,
        log: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._log: IO[bytes] = (folder / log).open("ab")
        self.log = folder / log
        self.started = time.perf_counter()
        self._process = subprocess.Popen(  # noqa: S603
            [str(part) for part in command],
            cwd=folder,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
        )

    @property
    def pids(self) -> list[int]:
        """This process and its descendants."""
        found, at = [self._process.pid], 0
        while at < len(found):
            for children in Path(f"/proc/{found[at]}/task").glob("*/children"):
                found.extend(int(pid) for pid in children.read_text().split())
            at += 1
        return found

    def cpu_seconds(self) -> float:
        """CPU time used so far, user and system, all processes."""
        ticks = 0
        for pid in self.pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / _TICK

    def memory(self) -> Memory:
        kilobytes = {"Rss:": 0, "Pss:": 0}
        for pid in self.pids:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                name, _, rest = line.partition(" ")
                if name in kilobytes:
                    kilobytes[name] += int(rest.split()[0])
        return Memory(kilobytes["Rss:"] / 1024, kilobytes["Pss:"] / 1024)

    def wait_until_answers(self, url: str, seconds: float = 60.0) -> float:
        """Seconds from the start until `url` answered 200. Raises RuntimeError with the end of the log."""
        while time.perf_counter() - self.started < seconds:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(url, timeout=2):  # noqa: S310
                    return time.perf_counter() - self.started
            except (OSError, urllib.error.URLError):
                time.sleep(0.005)
        self.close()
        raise RuntimeError(f"{self._process.args!r} did not get ready: {self.log.read_text()[-2000:]}")

    def close(self) -> None:
        """Ends it, however far it came; twice is once."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
