"""The admin plane of a real gateway process over SQLite, in front of a simulated provider."""

from __future__ import annotations

import asyncio
import csv
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from router.simulate import Running, application, parse_model
from router.simulate import serve as simulate
from tests.steady import Stopwatch

ADMIN_KEY = "admin-key-of-this-test-0123456789"
MODELS = ("small", "middle", "frontier")

PROVIDERS = """
apiVersion: farthing/v1
providers:
  sim: {{ wire: openai, base_url: "{url}" }}
  spare: {{ wire: openai, base_url: "{url}", api_key_env: KEY_NOBODY_SET }}
models:
  small: {{ provider: sim, name: small, context: 32768, max_output: 8192, supports: [tools],
           price: {{ input: "0.10", output: "0.40" }},
           quality: {{ simple: "0.95", medium: "0.80", complex: "0.45" }} }}
  middle: {{ provider: sim, name: middle, context: 128000, max_output: 16384, supports: [tools],
            price: {{ input: "1", output: "4" }}, quality: {{ simple: "0.97", medium: "0.93", complex: "0.75" }} }}
  frontier: {{ provider: sim, name: frontier, context: 128000, max_output: 16384, supports: [tools],
              price: {{ input: "5", output: "20" }}, quality: {{ simple: "0.99", medium: "0.97", complex: "0.94" }} }}
  other: {{ provider: spare, name: other, context: 128000, max_output: 16384,
           price: {{ input: "5", output: "20" }} }}
"""
POLICY = """
apiVersion: farthing/v1
baseline: frontier
classes:
  simple: { min_quality: 0.90, first_token_p95: none }
  medium: { min_quality: 0.90, first_token_p95: none }
  complex: { min_quality: 0.90, first_token_p95: none }
defaults: { allow: [small, middle, frontier] }
teams:
  search: { budget: { month: 3000, hard_cap: 3300 } }
"""


def gateway_environment(data: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FARTHING_")}
    return {**kept, "FARTHING_DATA_DIR": str(data), "FARTHING_ADMIN_KEY": ADMIN_KEY}


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body, parse_float=Decimal)


@dataclass
class Gateway:
    config: Path
    data: Path
    port: int
    admin_port: int
    log: Path

    def admin(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        raw: bytes | None = None,
        authorization: str | None = f"Bearer {ADMIN_KEY}",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        sent = dict(headers or {})
        if authorization is not None:
            sent["authorization"] = authorization
        if body is not None or raw is not None:
            sent.setdefault("content-type", "application/json")
        return self._ask(self.admin_port, method, path, raw if raw is not None else _encoded(body), sent)

    def chat(self, key: str, text: str, model: str = "auto") -> Answer:
        body = {"model": model, "messages": [{"role": "user", "content": text}]}
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        return self._ask(self.port, "POST", "/v1/chat/completions", _encoded(body), headers)

    def _ask(
        self, port: int, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request(method, path, body, dict(headers))
            reply = connection.getresponse()
            return Answer(reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read())
        finally:
            connection.close()

    def booked(self, request_id: str) -> Answer:
        """A request a moment after it was answered."""
        deadline = time.monotonic() + 60
        while True:
            answer = self.admin("GET", f"/admin/requests/{request_id}")
            if answer.status != 503 or time.monotonic() > deadline:
                return answer
            time.sleep(0.05)


def _encoded(body: Any) -> bytes | None:
    return None if body is None else json.dumps(body).encode()


@pytest.fixture(scope="module")
def provider_url() -> Iterator[str]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> Running:
        return await simulate(application([parse_model(name) for name in MODELS]))

    running = asyncio.run_coroutine_threadsafe(start(), loop).result(60)
    yield running.url
    asyncio.run_coroutine_threadsafe(running.close(), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(20)
    loop.close()


def write_configuration(folder: Path, url: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "providers.yaml").write_text(PROVIDERS.format(url=url))
    (folder / "policy.yaml").write_text(POLICY)
    return folder


@pytest.fixture(scope="module")
def gateway(provider_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("admin")
    config = write_configuration(folder / "config", provider_url)
    log = folder / "gateway.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "router.cli", "serve", "--config", str(config)),
                *("--port", "0", "--admin-port", "0"),
            ],
            env=gateway_environment(folder / "data"),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert process.stdout is not None
        ports = [int(re.findall(r":(\d+)/", process.stdout.readline())[0]) for _ in range(2)]
        found = Gateway(config, folder / "data", ports[0], ports[1], log)
        deadline = time.monotonic() + 90
        while True:
            try:
                if found._ask(found.port, "GET", "/readyz", None, {}).status == 200:
                    break
            except OSError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text())
            time.sleep(0.05)
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout and process.stdout.close()


def new_key(gateway: Gateway, team: str = "search", **more: Any) -> tuple[str, str]:
    answer = gateway.admin("POST", "/admin/keys", {"team": team, **more})
    assert answer.status == 201, answer.body
    return answer.json["key"], answer.json["id"]


ROUTES = [
    ("GET", "/admin/keys"),
    ("POST", "/admin/keys"),
    ("POST", "/admin/keys/adopt"),
    ("DELETE", "/admin/keys/key_1"),
    ("GET", "/admin/policy"),
    ("POST", "/admin/policy/reload"),
    ("GET", "/admin/reports/spend"),
    ("GET", "/admin/cache"),
    ("POST", "/admin/cache/invalidations"),
    ("GET", "/admin/requests/1"),
    ("GET", "/admin/health"),
    ("GET", "/admin/ledger/verify"),
    ("GET", "/admin/openapi.json"),
    ("GET", "/admin/nothing"),
    ("GET", "/docs"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        f"Basic {ADMIN_KEY}",
        f"Bearer {ADMIN_KEY}x",
        f"Bearer {ADMIN_KEY[:-1]}",
    ],
)
def test_every_route_needs_the_admin_key(
    gateway: Gateway, method: str, path: str, authorization: str | None
) -> None:
    answer = gateway.admin(method, path, authorization=authorization)
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == "invalid_admin_key"
    assert "FARTHING_ADMIN_KEY" in error["message"]


def test_openapi_lists_every_route(gateway: Gateway) -> None:
    paths = gateway.admin("GET", "/admin/openapi.json").json["paths"]
    assert set(paths) == {
        "/admin/keys",
        "/admin/keys/adopt",
        "/admin/keys/{id}",
        "/admin/policy",
        "/admin/policy/reload",
        "/admin/reports/{kind}",
        "/admin/cache",
        "/admin/cache/invalidations",
        "/admin/requests/{id}",
        "/admin/health",
        "/admin/ledger/verify",
    }


def test_a_created_key_works_at_once_and_a_revoked_one_stops(gateway: Gateway) -> None:
    answer = gateway.admin("POST", "/admin/keys", {"team": "search", "app": "faq", "tags": {}})
    assert answer.status == 201
    assert answer.headers["cache-control"] == "no-store"
    created = answer.json
    assert gateway.chat(created["key"], "Say hello.").status == 200
    listed = gateway.admin("GET", "/admin/keys")
    assert created["key"].encode() not in listed.body
    entry = next(entry for entry in listed.json["keys"] if entry["id"] == created["id"])
    assert (entry["team"], entry["app"], entry["adopted"], entry["revoked_at"]) == (
        "search",
        "faq",
        False,
        None,
    )

    revoked = gateway.admin("DELETE", f"/admin/keys/{created['id']}")
    assert revoked.status == 200
    assert revoked.json["revoked_at"] is not None
    with Stopwatch() as watch:
        while gateway.chat(created["key"], "Say hello.").status != 401:
            assert watch.seconds < 5, "a revoked key works for more than 5 s"
            time.sleep(0.2)


def test_an_adopted_key_works_and_is_never_written_down(gateway: Gateway) -> None:
    sent = f"sk-adopted-{time.time_ns()}-0123456789"
    answer = gateway.admin("POST", "/admin/keys/adopt", {"team": "search", "key": sent})
    assert (answer.status, answer.json["adopted"]) == (201, True)
    assert sent.encode() not in answer.body
    assert gateway.chat(sent, "Say hello.").status == 200
    again = gateway.admin("POST", "/admin/keys/adopt", {"team": "search", "key": sent})
    assert again.status == 400
    assert "stored already" in again.json["error"]["message"]
    # Sent in the wrong place, it is not repeated either.
    wrong = gateway.admin("POST", "/admin/keys/adopt", {"team": "search", "key": [sent]})
    assert wrong.status == 400
    assert wrong.json["error"]["param"] == "key"
    assert sent.encode() not in wrong.body
    assert sent not in gateway.log.read_text()


def test_an_unknown_key_cannot_be_revoked(gateway: Gateway) -> None:
    answer = gateway.admin("DELETE", "/admin/keys/key_nobody")
    assert (answer.status, answer.json["error"]["code"]) == (404, "key_not_found")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/admin/keys", {}, "team"),
        ("/admin/keys", {"team": "search", "colour": "blue"}, "colour"),
        ("/admin/keys", {"team": 7}, "team"),
        ("/admin/keys", {"team": "se arch"}, "team"),
        ("/admin/keys", {"team": "search", "app": "../x"}, "app"),
        ("/admin/keys", {"team": "search", "tags": {"Data": ["pii"]}}, "tags"),
        ("/admin/keys", {"team": "search", "tags": {"data": "pii"}}, "tags"),
        ("/admin/keys/adopt", {"team": "search"}, "key"),
        ("/admin/keys/adopt", {"team": "search", "key": "short"}, None),
        ("/admin/keys", ["team"], None),
    ],
)
def test_bad_input_names_the_field(gateway: Gateway, path: str, body: Any, param: str | None) -> None:
    answer = gateway.admin("POST", path, body)
    assert answer.status == 400, answer.body
    error = answer.json["error"]
    assert error["param"] == param
    assert len(error["message"]) > 10


@pytest.mark.parametrize("raw", [b"{", b"not json", b"[" * 60_000, b'{"team": "a"', b"\xff\xfe"])
def test_a_body_that_is_not_json(gateway: Gateway, raw: bytes) -> None:
    answer = gateway.admin("POST", "/admin/keys", raw=raw)
    assert answer.status == 400
    assert answer.json["error"]["code"] in ("invalid_json", "too_deep")
    assert "body" in answer.json["error"]["message"]


def test_a_field_given_twice(gateway: Gateway) -> None:
    answer = gateway.admin("POST", "/admin/keys", raw=b'{"team": "once", "team": "twice"}')
    assert (answer.status, answer.json["error"]["code"]) == (400, "duplicate_field")
    assert answer.json["error"]["param"] == "team"
    assert "twice" not in {key["team"] for key in gateway.admin("GET", "/admin/keys").json["keys"]}


def test_a_body_that_is_too_large(gateway: Gateway) -> None:
    answer = gateway.admin("POST", "/admin/keys", raw=b'{"team": "' + b"a" * 70_000 + b'"}')
    assert (answer.status, answer.json["error"]["code"]) == (413, "request_too_large")
    assert gateway.admin("GET", f"/admin/keys?x={'a' * 5_000}").status == 400


def test_other_methods_and_routes(gateway: Gateway) -> None:
    assert gateway.admin("PUT", "/admin/keys").status == 405
    assert gateway.admin("GET", "/admin/nothing").json["error"]["code"] == "not_found"
    assert gateway.admin("GET", "/v1/models").status == 404


def test_reports_have_the_same_digits_as_json_and_csv(gateway: Gateway) -> None:
    key, _ = new_key(gateway, "reports")
    answers = [gateway.chat(key, f"What is {number} plus {number}?") for number in range(3)]
    for answer in answers:
        assert answer.status == 200
        assert gateway.booked(answer.headers["x-request-id"]).status == 200
    cost = sum(Decimal(answer.headers["x-farthing-cost-usd"]) for answer in answers)
    report = gateway.admin("GET", "/admin/reports/spend?by=team&since=1d").json
    row = next(row for row in report["rows"] if row["team"] == "reports")
    assert (row["requests"], row["cost_usd"]) == (3, cost)
    assert report["data_health"]["rejected"] == 0

    answer = gateway.admin("GET", "/admin/reports/spend?by=team&since=1d&format=csv")
    assert answer.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(answer.body.decode())))
    assert Decimal(next(row["cost_usd"] for row in rows if row["team"] == "reports")) == cost

    savings = gateway.admin("GET", "/admin/reports/savings?by=team,model").json["rows"]
    row = next(row for row in savings if row["team"] == "reports")
    assert row["saved_usd"] == row["routing_usd"] + row["cache_usd"] - row["overhead_usd"]
    budgets = gateway.admin("GET", "/admin/reports/budgets").json["rows"]
    assert next(row for row in budgets if row["budget"] == "team:search")["hard_cap_usd"] == 3300


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ("spend?by=colour", 400, "by"),
        ("spend?by=team,team", 400, "by"),
        ("spend?since=yesterday", 400, None),
        ("spend?format=html", 400, "format"),
        ("spend?group=team", 400, "group"),
        ("budgets?by=team", 400, "by"),
        ("quality", 404, "kind"),
    ],
)
def test_a_report_nobody_has(gateway: Gateway, query: str, status: int, param: str | None) -> None:
    answer = gateway.admin("GET", f"/admin/reports/{query}")
    assert (answer.status, answer.json["error"]["param"]) == (status, param)


def test_a_request_is_explained(gateway: Gateway) -> None:
    key, key_id = new_key(gateway, "explained", app="bot")
    answer = gateway.chat(key, "What is the capital of France?")
    request_id = answer.headers["x-request-id"]
    assert answer.headers["x-farthing-decision"].endswith(request_id)
    found = gateway.booked(request_id).json
    assert found["caller"] == {
        "key_id": key_id,
        "team": "explained",
        "app": "bot",
        "cost_center": None,
        "tags": {},
    }
    assert found["decision"]["served_model"] == answer.headers["x-farthing-model"]
    assert found["decision"]["class"] == answer.headers["x-farthing-class"]
    assert "defaults" in found["decision"]["dropped"]["other"]
    money, (attempt,) = found["money"], found["attempts"]
    assert money["cost_usd"] == Decimal(answer.headers["x-farthing-cost-usd"])
    assert money["cost_usd"] == sum(line["amount_usd"] for line in attempt["cost_lines"])
    assert money["baseline_usd"] - money["cost_usd"] == (
        money["routing_usd"] + money["cache_usd"] - money["overhead_usd"]
    )
    usage = answer.json["usage"]
    assert found["usage"] == {"input": usage["prompt_tokens"], "output": usage["completion_tokens"]}

    again = gateway.chat(key, "What is the capital of France?")
    assert again.headers["x-farthing-cache"] == "exact"
    hit = gateway.booked(again.headers["x-request-id"]).json
    assert (hit["money"]["cost_usd"], hit["attempts"], hit["decision"]["cache"]) == (0, [], "exact")


def run_command(gateway: Gateway, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "router.cli", *arguments, "--config", str(gateway.config)],
        env=gateway_environment(gateway.data),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_the_command_explains_a_request_as_the_admin_plane_does(gateway: Gateway) -> None:
    key, _ = new_key(gateway, "compared")
    answer = gateway.chat(key, "Name three colours of the rainbow.")
    request_id = answer.headers["x-request-id"]
    shown = gateway.booked(request_id)
    done = run_command(gateway, "policy", "explain", "--request-id", request_id, "--json")
    assert (done.returncode, done.stdout.strip()) == (0, shown.body.decode().strip())


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("What is 2 plus 2?", "auto"),
        ("Prove that there are infinitely many primes, step by step, and generalise the proof.", "auto"),
        ("Summarise in two sentences why the sea is salty and compare it with a lake.", "auto"),
        ("Say hello.", "middle"),
    ],
)
def test_a_prompt_is_explained_as_it_is_answered(gateway: Gateway, text: str, model: str) -> None:
    key, _ = new_key(gateway, "search")
    answer = gateway.chat(key, text, model)
    done = run_command(
        gateway, "policy", "explain", "--prompt", text, "--model", model, "--team", "search", "--json"
    )
    found = json.loads(done.stdout, parse_float=Decimal)
    booked = gateway.booked(answer.headers["x-request-id"]).json
    assert found["decision"]["model"] == answer.headers["x-farthing-model"]
    assert found["decision"]["reason"] == booked["decision"]["reason"]
    said = found["classification"]
    assert (said["class"] if said["decides"] else "none") == answer.headers["x-farthing-class"]
    assert found["policy_hash"] == booked["decision"]["policy_hash"]
    assert found["decision"]["held_usd"] == booked["money"]["held_usd"] > 0
    assert {entry["budget"] for entry in found["budgets"]} == {entry["budget"] for entry in booked["budgets"]}
    (attempt,) = booked["attempts"]
    assert attempt["price"]["id"] == found["models"][0]["price"]["id"]


def test_the_doctor_knows_a_running_gateway(gateway: Gateway) -> None:
    from router import doctor

    for port in (gateway.port, gateway.admin_port):
        found = doctor._port("127.0.0.1", port, "--port")
        assert (found.level, found.text) == ("OK", f"127.0.0.1:{port} is served by a Farthing gateway")
    done = run_command(gateway, "doctor")
    assert "FAIL" not in done.stdout
    assert done.returncode == 0
    assert re.search(r"OK +journal +1 in use", done.stdout)
    assert ADMIN_KEY not in done.stdout


def test_a_request_nobody_sent(gateway: Gateway) -> None:
    answer = gateway.admin("GET", "/admin/requests/0199aa11-2233-7456-89ab-cdef01234567")
    assert (answer.status, answer.json["error"]["code"]) == (404, "request_not_found")
    assert "x-farthing-decision" in answer.json["error"]["message"]
    assert gateway.admin("GET", f"/admin/requests/{'a' * 300}").status == 404


def test_health_and_verification(gateway: Gateway) -> None:
    health = gateway.admin("GET", "/admin/health").json
    assert (health["ready"], health["missing"], health["sql_up"]) == (True, [], True)
    assert health["redis_up"] is None
    assert health["open_breakers"] == []
    assert "KEY_NOBODY_SET" in health["unusable_providers"]["spare"]
    verification = gateway.admin("GET", "/admin/ledger/verify").json
    assert (verification["agrees"], verification["differences"]) == (True, [])


def test_a_policy_is_reloaded_and_a_broken_one_is_not(gateway: Gateway) -> None:
    path = gateway.config / "policy.yaml"
    before = gateway.admin("GET", "/admin/policy").json
    assert before["last_error"] is None
    assert gateway.admin("POST", "/admin/policy/reload").json["changed"] is False
    path.write_text(POLICY.replace("month: 3000", "month: 2000"))
    try:
        gateway.admin("POST", "/admin/policy/reload")  # the watch may have been first
        after = gateway.admin("GET", "/admin/policy").json
        assert after["hash"] != before["hash"]
        path.write_text(POLICY.replace("allow: [small", "allow: [smal"))
        answer = gateway.admin("POST", "/admin/policy/reload")
        assert (answer.status, answer.json["error"]["code"]) == (400, "invalid_configuration")
        assert "policy.yaml:8" in answer.json["error"]["message"]
        status = gateway.admin("GET", "/admin/policy").json
        assert status["hash"] == after["hash"]
        assert "smal" in status["last_error"]
    finally:
        path.write_text(POLICY)
    gateway.admin("POST", "/admin/policy/reload")
    restored = gateway.admin("GET", "/admin/policy").json
    assert (restored["hash"], restored["last_error"]) == (before["hash"], None)


def test_fastapi_is_not_imported_before_the_first_admin_request(provider_url: str, tmp_path: Path) -> None:
    config = write_configuration(tmp_path / "config", provider_url)
    script = textwrap.dedent(
        """
        import asyncio, json, os, signal, sys, urllib.error, urllib.request
        from router.serve import listen, run_worker
        from router.settings import read_settings

        async def main():
            settings = read_settings(config=sys.argv[1])
            data, admin = listen("127.0.0.1", 0), listen("127.0.0.1", 0)
            worker = asyncio.create_task(run_worker(settings, data, admin))

            def ask(sock, path, key=""):
                url = f"http://127.0.0.1:{sock.getsockname()[1]}{path}"
                asked = urllib.request.Request(url, headers={"authorization": f"Bearer {key}"})
                try:
                    with urllib.request.urlopen(asked, timeout=60) as reply:
                        return reply.status
                except urllib.error.HTTPError as error:
                    return error.code

            seen = []
            for sock, path, key in (
                (data, "/readyz", ""),
                (data, "/v1/models", "x"),
                (admin, "/admin/health", "wrong"),
                (admin, "/admin/health", settings.admin_key),
            ):
                status = await asyncio.to_thread(ask, sock, path, key)
                seen.append([path, status, [n for n in ("fastapi", "litellm", "torch") if n in sys.modules]])
            print(json.dumps(seen))
            os.kill(os.getpid(), signal.SIGTERM)
            await worker

        asyncio.run(main())
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(config)],
        env=gateway_environment(tmp_path / "data"),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        ["/readyz", 200, []],
        ["/v1/models", 401, []],
        ["/admin/health", 401, []],
        ["/admin/health", 200, ["fastapi"]],
    ]
