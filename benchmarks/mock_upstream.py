"""An OpenAI-wire provider that answers every chat completion at once with the same realistic JSON.

nginx where it is installed, so that the provider is never the bottleneck; else a bare asyncio protocol. Both
count their calls.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import sys
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.processes import Process, free_port

ANSWER = json.dumps(
    {
        "id": "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT",
        "object": "chat.completion",
        "created": 1760000000,
        "model": "gpt-4o-2024-08-06",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "The sky looks blue because the air scatters the short waves of sunlight more than "
                    "the long ones, so blue reaches our eyes from everywhere.",
                    "refusal": None,
                    "annotations": [],
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 29,
            "completion_tokens": 31,
            "total_tokens": 60,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        },
        "service_tier": "default",
        "system_fingerprint": "fp_06737a9306",
    },
    separators=(",", ":"),
)

_NGINX = """
daemon off; pid {folder}/{name}.pid; error_log {folder}/{name}.log warn; worker_processes 1;
events {{ worker_connections 2048; }}
http {{
  access_log off; keepalive_requests 1000000000; keepalive_timeout 75s; tcp_nodelay on;
  client_body_temp_path {folder}/{name}-body; proxy_temp_path {folder}/{name}-proxy;
  fastcgi_temp_path {folder}/{name}-a; uwsgi_temp_path {folder}/{name}-b; scgi_temp_path {folder}/{name}-c;
  {servers}
}}
"""


def nginx_path() -> str | None:
    return shutil.which("nginx") or shutil.which("/usr/sbin/nginx")


def nginx(folder: Path, name: str, servers: str) -> Process:
    """An unprivileged nginx of one worker with a configuration of its own."""
    config = folder / f"{name}.conf"
    config.write_text(_NGINX.format(folder=folder, name=name, servers=servers))
    return Process(
        [str(nginx_path()), "-p", folder, "-c", config, "-e", folder / f"{name}.log"],
        folder=folder,
        log=f"{name}.out",
    )


class MockUpstream:
    """`url` ends in /v1. `calls` is the number of chat completions answered so far."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}/v1"
        self._count_url = f"http://127.0.0.1:{port}/count"
        self._looks = 0
        self._nginx = nginx_path() is not None
        if self._nginx:
            self.name = "nginx"
            self.process = nginx(
                folder,
                "upstream",
                f"""server {{
                  listen 127.0.0.1:{port} backlog=2048;
                  location /v1/ {{ default_type application/json; return 200 '{ANSWER}'; }}
                  location = /count {{ stub_status; }}
                }}""",
            )
        else:
            self.name = "a Python protocol (nginx is not installed)"
            self.process = Process(
                [sys.executable, "-m", "benchmarks.mock_upstream", str(port)],
                folder=Path(__file__).parent.parent,
                log="/dev/null",
            )
        self.process.wait_until_answers(self._count_url)
        self._looks = self._requests()

    def _requests(self) -> int:
        with urllib.request.urlopen(self._count_url) as answer:  # noqa: S310
            text = answer.read().decode()
        if not self._nginx:
            return int(text)
        # The line below "server accepts handled requests"; it counts the look at itself as well.
        return int(text.splitlines()[2].split()[2])

    def calls(self) -> int:
        if not self._nginx:
            return self._requests()
        self._looks += 1
        return self._requests() - self._looks


class _Answering(asyncio.Protocol):
    calls = 0

    def __init__(self) -> None:
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, blank, rest = self._buffer.partition(b"\r\n\r\n")
        if not blank:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        if len(rest) < length:
            return
        self._buffer = rest[length:]
        body = ANSWER.encode()
        if head.startswith(b"GET /count"):
            body = str(_Answering.calls).encode()
        else:
            _Answering.calls += 1
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            % (len(body), body)
        )


async def _answer_on(port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Answering, "127.0.0.1", port, family=socket.AF_INET, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_answer_on(int(sys.argv[1])))
