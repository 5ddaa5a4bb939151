"""A simulated provider in a process of its own, which also keeps the bodies it was sent.

`python -m tests.e2e.provider MODEL...` serves on a free port, prints its base URL, and ends with its stdin.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from router.simulate import Receive, Scope, Send, Simulator, application, parse_model, serve

REPOSITORY = Path(__file__).parents[2]
KEPT_BODIES = 20_000


class _Recorder(Simulator):
    """Adds `GET /bodies`: the raw request bodies, oldest first, as JSON lines of [x-request-id, body]."""

    bodies: deque[tuple[str, str]]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/bodies":
            if scope["method"] == "DELETE":
                self.bodies.clear()
            lines = "".join(json.dumps(pair) + "\n" for pair in self.bodies).encode()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": lines})
            return
        name = next((v.decode() for k, v in scope.get("headers", ()) if k == b"x-request-id"), "")
        parts: list[bytes] = []

        async def recorded() -> Any:
            message = await receive()
            if message["type"] == "http.request":
                parts.append(message.get("body", b""))
                if not message.get("more_body") and scope["path"].startswith("/v1/"):
                    self.bodies.append((name, b"".join(parts).decode()))
            return message

        await super().__call__(scope, recorded if scope["type"] == "http" else receive, send)


async def _main(models: list[str]) -> None:
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # a client that left is no news here
    plain = application([parse_model(text) for text in models])
    recorder = _Recorder(plain.models)
    recorder.bodies = deque(maxlen=KEPT_BODIES)
    running = await serve(recorder)
    print(running.origin, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await running.close()


class Provider:
    """Handle on such a process. `origin` has no path; `url` is what a provider is configured with."""

    def __init__(self, *models: str) -> None:
        self.models = {parse_model(text).name: text for text in models}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.provider", *models],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.origin = self._process.stdout.readline().strip()
        if not self.origin:
            raise RuntimeError("the simulated provider did not start")
        self.url = f"{self.origin}/v1"
        self._http = httpx.Client(base_url=self.origin, timeout=120)

    def set(self, model: str, **settings: Any) -> None:
        self._http.post("/control", json={"model": model, **settings}).raise_for_status()

    @contextlib.contextmanager
    def changed(self, model: str, **settings: Any) -> Iterator[None]:
        """For a block; afterwards the settings are what they were."""
        shown = self._http.get("/control").json()["models"]
        before = next(entry for entry in shown if entry["name"] == model)
        self.set(model, **settings)
        try:
            yield
        finally:
            self.set(model, **{name: before[name] for name in settings})

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._http.get("/log").text.splitlines()]

    def calls(self, request_id: str) -> list[dict[str, Any]]:
        return [call for call in self.log() if call["request_id"] == request_id]

    def bodies(self) -> list[tuple[str, str]]:
        return [tuple(json.loads(line)) for line in self._http.get("/bodies").text.splitlines()]

    def body(self, request_id: str) -> str:
        return next(body for name, body in reversed(self.bodies()) if name == request_id)

    def clear(self) -> None:
        self._http.delete("/log")
        self._http.delete("/bodies")

    def close(self) -> None:
        self._http.close()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1:]))
