"""`farthing` without the limits that a stalled machine strikes: `python -m tests.e2e.patient -m router.cli serve`.

As it ships, the gateway goes on without Redis after 50 ms and without a look-up by likeness after 250 ms, and takes
a worker for dead after 2 s. Each is right, and turns a hit into a miss where a machine of tests stands still for a
moment. Tests of what is found therefore run with these limits lifted; tests of the limits run it as it ships.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from typing import Any

PATIENT = (sys.executable, "-m", "tests.e2e.patient", "-m", "router.cli")
SECONDS = 30.0
LOOKS_EVERY = "TESTS_LOOKS_EVERY"
"""Seconds between two looks at the files of the configuration, in the environment."""


def lift() -> None:
    from router.adapters import configuration
    from router.adapters.sql import keys
    from router.stages import semantic

    semantic.LOOK_UP = semantic.LOADING = SECONDS
    keys.LOOKUP_SECONDS = SECONDS
    if LOOKS_EVERY in os.environ:
        configuration.POLL_SECONDS = float(os.environ[LOOKS_EVERY])
    if os.environ.get("FARTHING_REDIS_URL"):
        from router.adapters.redis_store import connection, flights

        connection.connect.__kwdefaults__["timeout"] = SECONDS  # type: ignore[index]
        flights.INBOX_MS = int(1000 * SECONDS)


class _PatientWorker(subprocess.Popen[bytes]):
    def __init__(self, command: list[str], **options: Any) -> None:
        super().__init__([command[0], "-m", "tests.e2e.patient", *command[1:]], **options)


def main() -> None:
    _, dash, module, *arguments = sys.argv
    assert dash == "-m"
    lift()
    if module == "router.cli":
        from router import serve

        serve.subprocess.Popen = _PatientWorker  # type: ignore[misc, assignment]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
