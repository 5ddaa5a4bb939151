"""Bad input gets a clear error with field and remedy; the process stays up where it can serve, and does not start
where it cannot serve truthfully.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.gateway import REPOSITORY, SECRET, Gateway, providers_yaml
from tests.e2e.provider import Provider
from tests.e2e.setting import model, policy, providers

Unique = Callable[[str], str]
StartGateway = Callable[..., Gateway]


def started_with(
    tmp_path: Path, providers_text: str, policy_text: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`farthing serve`, which is expected to end by itself."""
    config = tmp_path / "config"
    config.mkdir()
    (config / "providers.yaml").write_text(providers_text)
    (config / "policy.yaml").write_text(policy_text)
    return subprocess.run(
        [sys.executable, "-m", "router.cli", "serve", "--config", str(config), "--port", "0", *arguments],
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(REPOSITORY),
            "FARTHING_DATA_DIR": str(tmp_path / "data"),
            "FARTHING_SECRET": SECRET,
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


GOOD = providers("http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    ("providers_text", "policy_text", "words"),
    [
        (GOOD, policy() + "  broken: [unclosed\n", ["policy.yaml:", "error"]),
        (GOOD, policy(defaults="  deny: [smal]"), ["policy.yaml:", "smal", "did you mean 'small'?"]),
        (GOOD, policy(teams="  x: { budget: { month: $3000 } }"), ["policy.yaml:", "write 3000"]),
    ],
    ids=["yaml", "unknown model", "money"],
)
def test_a_broken_file_is_refused_with_its_place(
    tmp_path: Path, providers_text: str, policy_text: str, words: list[str]
) -> None:
    ended = started_with(tmp_path, providers_text, policy_text)
    assert ended.returncode == 2, ended.stderr
    assert all(word in ended.stderr for word in words), ended.stderr
    assert re.search(r"\.yaml:\d+:\d+", ended.stderr), "line and column"
    assert "Traceback" not in ended.stderr


def test_missing_files_name_the_command_that_makes_them(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    ended = subprocess.run(
        [sys.executable, "-m", "router.cli", "serve", "--config", str(empty), "--port", "0"],
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(REPOSITORY),
            "FARTHING_DATA_DIR": str(tmp_path / "data"),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 2
    assert "farthing init" in ended.stderr
    assert ended.stdout == "", "nothing says that it serves"


def with_key(url: str, more: str = "") -> str:
    named = {"keyed": f'{{ wire: openai, base_url: "{url}", api_key_env: MY_PROVIDER_KEY }}'}
    models = {"small": model("small", "keyed")}
    if more:
        named["sim"] = f'{{ wire: openai, base_url: "{url}" }}'
        models["middle"] = model("middle")
    return providers_yaml(models, named)


SMALL_POLICY = """\
apiVersion: farthing/v1
classes: { simple: { min_quality: 0.9 }, medium: { min_quality: 0.5 }, complex: { min_quality: 0.1 } }
defaults: { allow: [small, middle] }
"""


def test_no_provider_key_at_all_does_not_start(tmp_path: Path) -> None:
    ended = started_with(
        tmp_path, with_key("http://127.0.0.1:9/v1"), SMALL_POLICY.replace("small, middle", "small")
    )
    assert ended.returncode == 2
    assert "MY_PROVIDER_KEY is not set" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_one_missing_provider_key_leaves_its_models_out(
    start_gateway: StartGateway, provider: Provider
) -> None:
    gateway = start_gateway(providers=with_key(provider.url, "and another"), policy=SMALL_POLICY)
    answer = gateway.chat(gateway.key("search"), "What is 2 + 2?")
    assert answer.headers["x-farthing-model"] == "middle"
    named = gateway.chat(gateway.key("search"), "What is 2 + 2?", model="small")
    assert named.status_code == 503
    assert "MY_PROVIDER_KEY is not set" in named.json()["error"]["message"]
    assert "MY_PROVIDER_KEY is not set" in gateway.log_path.read_text()


def test_a_provider_key_is_sent_and_shown_nowhere(
    start_gateway: StartGateway, provider: Provider, unique: Unique
) -> None:
    key = "sk-provider-secret-1234567890"
    gateway = start_gateway(
        providers=with_key(provider.url, "and another"),
        policy=SMALL_POLICY,
        environment={"MY_PROVIDER_KEY": key},
    )
    answer = gateway.chat(gateway.key("search"), unique("What is 2 + 2?"), model="small")
    (call,) = provider.calls(answer.headers["x-request-id"])
    assert "authorization" in call["headers"]
    gateway.row(answer.headers["x-request-id"])
    for path in gateway.folder.rglob("*"):
        if path.is_file():
            assert key.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    "url", ["postgresql://nobody:hunter2@127.0.0.1:1/none", "postgresql://x:hunter2@[::1"]
)
def test_a_database_that_does_not_answer_does_not_start(tmp_path: Path, url: str) -> None:
    ended = started_with(tmp_path, GOOD, policy(), FARTHING_DATABASE_URL=url)
    assert ended.returncode == 2, ended.stderr
    assert "FARTHING_DATABASE_URL" in ended.stderr
    assert "hunter2" not in ended.stderr + ended.stdout
    assert "Traceback" not in ended.stderr


def test_a_redis_that_does_not_answer_is_told_and_requests_go_on(
    start_gateway: StartGateway, unique: Unique
) -> None:
    gateway = start_gateway(
        policy=policy(teams="  strict: { budget: { month: 10, hard_cap: 10 } }"),
        redis_url="redis://:hunter2@127.0.0.1:1/0",
    )
    log = gateway.log_path.read_text()
    assert "127.0.0.1:1" in log
    assert "hunter2" not in log
    answer = gateway.chat(gateway.key("search"), unique("Hi"))
    assert answer.status_code == 200
    capped = gateway.chat(gateway.key("strict"), unique("Hi"))
    assert capped.status_code in (200, 503)
    if capped.status_code == 503:
        assert capped.json()["error"]["code"] == "overloaded"


def test_a_malformed_redis_url_does_not_start(tmp_path: Path) -> None:
    ended = started_with(tmp_path, GOOD, policy(), FARTHING_REDIS_URL="rediss//:hunter2@nowhere")
    assert ended.returncode == 2, ended.stderr
    assert "FARTHING_REDIS_URL" in ended.stderr
    assert "hunter2" not in ended.stderr
    assert "Traceback" not in ended.stderr


def test_several_workers_without_redis_do_not_start(tmp_path: Path) -> None:
    ended = started_with(tmp_path, GOOD, policy(), "--workers", "2")
    assert ended.returncode == 2
    assert "FARTHING_REDIS_URL" in ended.stderr


def test_an_admin_plane_without_a_key_does_not_start(tmp_path: Path) -> None:
    ended = started_with(tmp_path, GOOD, policy(), "--admin-port", "0")
    assert ended.returncode == 2
    assert "FARTHING_ADMIN_KEY" in ended.stderr


def test_a_guessable_admin_key_does_not_start(tmp_path: Path) -> None:
    ended = started_with(tmp_path, GOOD, policy(), "--admin-port", "0", FARTHING_ADMIN_KEY="short")
    assert ended.returncode == 2
    assert "FARTHING_ADMIN_KEY is shorter" in ended.stderr


@pytest.mark.parametrize("port", ["99999", "-1"])
def test_an_impossible_port_is_refused(tmp_path: Path, port: str) -> None:
    ended = started_with(tmp_path, GOOD, policy(), "--port", port)
    assert ended.returncode == 2
    assert "--port" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_taken_port_is_named(tmp_path: Path, gateway: Gateway) -> None:
    ended = started_with(tmp_path, GOOD, policy(), "--port", str(gateway.port))
    assert ended.returncode == 2
    assert str(gateway.port) in ended.stderr


# -- bodies --


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"hello", 400, "invalid_json"),
        (b"[1]", 400, "invalid_json"),
        (b'{"model": "auto", "messages": [}', 400, "invalid_json"),
        (b"\xff\xfe{}", 400, "invalid_json"),
        (b'{"model": "auto", "messages": [], "model": "x"}', 400, "duplicate_field"),
        (b'{"model": "auto", "messages": ' + b"[" * 70 + b"]" * 70 + b"}", 400, "too_deep"),
        (b'{"model": "auto", "messages": ' + b"[" * 1_000_000, 400, "too_deep"),
        (b'{"model": "auto", "messages": [{"role": "user", "content": NaN}]}', 400, "invalid_json"),
        (b'{"model": "auto"}', 400, "invalid_request"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', 400, "invalid_request"),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else None,
)
def test_a_bad_body_is_refused(gateway: Gateway, raw: bytes, status: int, code: str) -> None:
    answer = gateway.post(gateway.key("search"), raw)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert answer.headers["x-should-retry"] == "false"
    gateway.booked()
    refused = answer.headers["x-request-id"]
    assert refused not in {row["id"] for row in gateway.rows()}, "what is refused is a counter and no row"


def test_too_large_is_refused_before_it_is_read(gateway: Gateway) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer "
            + gateway.key("search").encode()
            + b"\r\ncontent-length: 99999999999\r\n\r\n"
        )
        answer = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 413")
        while b"request_too_large" not in answer:  # the body may come on its own
            more = connection.recv(4096)
            assert more, answer
            answer += more


def test_a_caller_without_a_key_is_refused_before_the_body_is_read(gateway: Gateway) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer nobody-knows-this-one"
            b"\r\ncontent-length: 1000000\r\n\r\n"
        )
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 401")


def test_too_large_without_a_length_is_refused(gateway: Gateway) -> None:
    def pieces() -> Any:
        yield b'{"model": "auto", "messages": [{"role": "user", "content": "'
        for _ in range(33):
            yield b"x" * 1024 * 1024

    with gateway.http(gateway.key("search")) as http:
        try:
            answer = http.post("/v1/chat/completions", content=pieces())
        except httpx.WriteError:
            pytest.skip("the gateway closed the connection before the client had read its answer")
    assert answer.status_code == 413


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_compressed_body_is_taken(gateway: Gateway, unique: Unique, encoding: str) -> None:
    import zlib

    body = json.dumps({"model": "small", "messages": [{"role": "user", "content": unique("Hi")}]}).encode()
    packed = gzip.compress(body) if encoding == "gzip" else zlib.compress(body)
    answer = gateway.post(gateway.key("search"), packed, {"content-encoding": encoding})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("rest", [gzip.compress(b',{"more": 1}'), b"junk"], ids=["a member", "junk"])
def test_what_follows_a_compressed_body_is_not_dropped(gateway: Gateway, unique: Unique, rest: bytes) -> None:
    body = json.dumps({"model": "small", "messages": [{"role": "user", "content": unique("Hi")}]}).encode()
    answer = gateway.post(gateway.key("search"), gzip.compress(body) + rest, {"content-encoding": "gzip"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "content-encoding"


def test_a_bomb_is_refused(gateway: Gateway) -> None:
    packed = gzip.compress(b" " * 100 * 1024 * 1024)
    answer = gateway.post(gateway.key("search"), packed, {"content-encoding": "gzip"})
    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("headers", "param"),
    [
        ({"x-farthing-tags": "nonsense=1"}, "x-farthing-tags"),
        ({"x-farthing-tags": "nonsense"}, "x-farthing-tags"),
        ({"x-farthing-quality": "best"}, "x-farthing-quality"),
        ({"x-farthing-max-cost": "little"}, "x-farthing-max-cost"),
        ({"x-farthing-cache": "maybe"}, "x-farthing-cache"),
        ({"content-encoding": "br"}, "content-encoding"),
        ({"content-encoding": "gzip"}, "content-encoding"),
    ],
)
def test_a_bad_header_is_named(gateway: Gateway, headers: dict[str, str], param: str) -> None:
    answer = gateway.chat(gateway.key("search"), "Hi", headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_an_unknown_tag_is_named_with_those_that_are_known(gateway: Gateway) -> None:
    answer = gateway.chat(gateway.key("search"), "Hi", headers={"x-farthing-tags": "nonsense=1"})
    error = answer.json()["error"]
    assert error["code"] == "unknown_tag"
    assert "known keys: data" in error["message"]


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer wrong", "Basic eDp5", f"Bearer {'x' * 5000}"]
)
def test_without_a_known_key_nothing_is_served(gateway: Gateway, authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    with httpx.Client(base_url=gateway.url, timeout=60) as http:
        for path in ("/v1/chat/completions", "/chat/completions"):
            answer = http.post(path, json={"model": "auto", "messages": []}, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert http.get("/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/healthz", 405),
        ("GET", "/", 404),
        ("GET", "/v1/none", 404),
        ("GET", "/v1//chat/completions", 404),
        ("POST", "/v1/v1/chat/completions", 404),
        ("GET", "/admin/keys", 404),
        ("GET", "/v1/%2e%2e/metrics", 404),
    ],
)
def test_other_routes_and_methods(gateway: Gateway, method: str, path: str, status: int) -> None:
    with gateway.http(gateway.key("search")) as http:
        answer = http.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert ("allow" in answer.headers) == (status == 405)


# -- connections --

CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"


def until_closed(connection: socket.socket) -> bytes:
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def flood(connection: socket.socket, more: bytes) -> None:
    for _ in range(36_000_000 // len(more)):  # loopback does not buffer as much
        connection.sendall(more)


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (CHAT, b"x-many: of these\r\n" * 1000),
        (CHAT + b"x-long: ", b"y" * 65536),
        (b"GET /", b"z" * 65536),
        (CHAT + b"transfer-encoding: chunked\r\n\r\n0\r\n", b"x-trailer: of many\r\n" * 1000),
        (CHAT + b"transfer-encoding: chunked\r\n\r\n", b"1;" + b"e" * 65000 + b"\r\nx\r\n"),
    ],
    ids=["headers", "one-header", "url", "trailers", "chunk-extensions"],
)
def test_what_is_no_body_is_bounded(gateway: Gateway, start: bytes, more: bytes) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as connection:
        connection.sendall(start)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            flood(connection, more)


def test_what_is_not_http_is_told_so_in_openais_shape(gateway: Gateway) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as connection:
        connection.sendall(b"no http\r\n\r\n")
        answer = until_closed(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert "message" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_old_client_gets_no_chunks(gateway: Gateway, unique: Unique, stream: bool) -> None:
    message = {"role": "user", "content": unique("Hi")}
    body = json.dumps({"model": "small", "messages": [message], "stream": stream}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.0\r\nauthorization: Bearer {gateway.key('search')}\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as connection:
        connection.sendall(head.encode() + body)
        told, _, answer = until_closed(connection).partition(b"\r\n\r\n")
    assert b"HTTP/1.1 200 OK" in told
    assert b"transfer-encoding" not in told
    if stream:
        events = answer.split(b"\n\n")
        assert events[-2:] == [b"data: [DONE]", b""]
        assert all(json.loads(event.removeprefix(b"data: ")) for event in events[:-2])
    else:
        assert json.loads(answer)["choices"]


def test_one_gateway_without_redis_to_a_data_folder(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = start_gateway()
    second = subprocess.run(
        [sys.executable, "-m", "router.cli", "serve", "--config", str(gateway.config), "--port", "0"],
        env={**gateway.environment, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert second.returncode == 2, second.stderr
    assert "Another gateway serves from the data folder" in second.stderr
    assert gateway.chat(gateway.key("search"), "Hi").status_code == 200


# -- injection --


def test_nothing_a_caller_sends_can_add_a_header_or_a_line(gateway: Gateway, unique: Unique) -> None:
    evil = "x\r\nset-cookie: a=b\r\n\r\n<script>\x1b[31m\u2028"
    asked = gateway.chat(
        gateway.key("search"),
        unique("Hi") + evil,
        model=f"auto{evil}",
        user=evil,
        metadata={evil: evil},
    )
    assert asked.status_code == 200
    assert "set-cookie" not in asked.headers
    assert all(32 <= ord(c) < 127 for value in asked.headers.values() for c in value)
    row = gateway.row(asked.headers["x-request-id"])
    assert row["requested_model"].startswith("auto")
    log = gateway.log_path.read_text()
    assert "set-cookie" not in log
    assert "\x1b" not in log
    shown = gateway.cli("report", "spend", "--by", "team,model")
    assert "\x1b" not in shown.stdout
    assert "<script>" not in shown.stdout


def test_a_refused_name_is_shown_without_what_could_do_harm(start_gateway: StartGateway) -> None:
    gateway = start_gateway(policy=policy(more="unknown_model: refuse"))
    evil = "gpt\r\nx: y\x1b[31m'\"\\"
    answer = gateway.chat(gateway.key("search"), "Hi", model=evil)
    assert answer.status_code == 404
    message = answer.json()["error"]["message"]
    assert "\r" not in message
    assert "\n" not in message
    assert "\x1b" not in message
    assert "x" not in answer.headers
    assert "\x1b" not in gateway.log_path.read_text()


@pytest.mark.parametrize("value", ["a" * 200, "id with blanks", "\x01\x02", "ok-id-1"])
def test_a_callers_request_id_is_a_column_and_never_a_key(
    gateway: Gateway, unique: Unique, value: str
) -> None:
    raw = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: evil.example\r\n"
        f"authorization: Bearer {gateway.key('search')}\r\n"
        f"x-request-id: {value}\r\nconnection: close\r\n"
    )
    body = json.dumps({"model": "small", "messages": [{"role": "user", "content": unique("Hi")}]})
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as connection:
        connection.sendall(f"{raw}content-length: {len(body)}\r\n\r\n{body}".encode("latin-1"))
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    if value == "\x01\x02":
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 200"))
        return
    assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
    found = re.search(rb"x-request-id: ([0-9a-f-]{36})\r\n", answer)
    assert found is not None
    row = gateway.row(found[1].decode())
    assert row["caller_request_id"] == ("ok-id-1" if value == "ok-id-1" else None)


def test_a_header_with_a_line_break_is_no_second_header(gateway: Gateway) -> None:
    raw = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-farthing-tags: data=pii\r\n injected: 1\r\n"
        b"authorization: Bearer " + gateway.key("search").encode() + b"\r\ncontent-length: 2\r\n\r\n{}"
    )
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as connection:
        connection.sendall(raw)
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 400")


def test_the_process_is_still_up_after_all_this(gateway: Gateway, unique: Unique) -> None:
    assert gateway.chat(gateway.key("search"), unique("Hi")).status_code == 200
    assert "Traceback" not in gateway.log_path.read_text()
