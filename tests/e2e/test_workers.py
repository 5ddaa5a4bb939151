"""Several workers behind one port, on Valkey and PostgreSQL."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import httpx
import pytest

from tests.contracts.valkey_server import ValkeyServer
from tests.e2e.gateway import Gateway, until
from tests.e2e.provider import Provider
from tests.steady import Stopwatch

Unique = Callable[[str], str]


@pytest.fixture
def workers(
    start_gateway: Callable[..., Gateway], postgresql_url: str, valkey_server: ValkeyServer
) -> Gateway:
    gateway = start_gateway(database_url=postgresql_url, redis_url=valkey_server.url, workers=2)
    until(lambda: len(children(gateway)) == 2, "both workers run")
    return gateway


def children(gateway: Gateway) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(gateway.pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return not shown.stdout.strip().startswith("Z")


def test_a_killed_worker_is_replaced_and_its_requests_are_booked(
    workers: Gateway, provider: Provider, unique: Unique
) -> None:
    key = workers.key("search")

    def stream(number: int) -> str:
        try:
            return workers.chat(key, unique(f"{number}"), model="slow", stream=True, max_tokens=40).text
        except httpx.HTTPError:
            return ""

    victim = children(workers)[0]
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(stream, number) for number in range(16)]
        until(lambda: len(provider.log()) == 16, "all are under way")
        os.kill(victim, signal.SIGKILL)
        texts = [future.result() for future in asked]
    until(lambda: len(children(workers)) == 2 and victim not in children(workers), "it is replaced")
    called = {call["request_id"] for call in provider.log()}
    until(lambda: called <= {row["id"] for row in workers.rows()}, "every request has its row")
    statuses = Counter(row["status"] for row in workers.rows())
    assert statuses["complete"] == sum(text.endswith("data: [DONE]\n\n") for text in texts)
    assert statuses["complete"] + statuses["cancelled"] == 16
    assert all(row["estimated"] for row in workers.rows() if row["status"] == "cancelled")
    assert workers.cli("ledger", "verify").returncode == 0


def test_workers_end_with_their_supervisor(workers: Gateway, unique: Unique) -> None:
    left = children(workers)
    workers.kill()
    until(lambda: not any(running(pid) for pid in left), "the workers end")
    workers.start()
    assert workers.chat(workers.key("search"), unique("Hi")).status_code == 200


def test_metrics_are_summed_and_caches_are_shared(
    workers: Gateway, valkey_server: ValkeyServer, unique: Unique
) -> None:
    valkey_server.command("FLUSHALL")
    key, content = workers.key("search"), unique("the same")
    first = workers.chat(key, content, model="small")
    # It is written beside the answer.
    until(lambda: valkey_server.command("KEYS", "farthing:cache:*") != b"*0", "it is stored")
    # Each on a connection of its own, so that both workers answer.
    again = [workers.chat(key, content, model="small") for _ in range(19)]
    assert {answer.headers["x-farthing-cache"] for answer in again} == {"exact"}
    assert {answer.content for answer in again} == {first.content}

    def counted() -> float:
        with httpx.Client(base_url=workers.url, timeout=60) as http:
            text = http.get("/metrics").text
        return sum(
            float(n) for n in re.findall(r"^farthing_requests_total\{[^}]*\} ([0-9.e+]+)$", text, re.M)
        )

    until(lambda: counted() >= 20, "all are counted")
    assert {counted() for _ in range(10)} == {20.0}


def test_a_key_works_on_every_worker_at_once(workers: Gateway, unique: Unique) -> None:
    made = json.loads(workers.cli("keys", "create", "--team", "search", "--json").stdout)
    with ThreadPoolExecutor(20) as pool:
        answers = list(
            pool.map(lambda n: workers.chat(made["key"], unique(f"{n}"), model="small"), range(60))
        )
    assert {answer.status_code for answer in answers} == {200}


def test_a_frozen_valkey_costs_little(
    start_gateway: Callable[..., Gateway], provider: Provider, unique: Unique
) -> None:
    server = ValkeyServer()
    try:
        gateway = start_gateway(redis_url=server.url, python=())
        key = gateway.key("search")

        def seconds() -> float:
            with Stopwatch() as watch:
                assert gateway.chat(key, unique("Hi"), model="small").status_code == 200
            return watch.seconds

        until(lambda: gateway.chat(key, "Hi", model="small").status_code == 200, "the key is known")
        usual = median(seconds() for _ in range(10))
        server.freeze()
        frozen = [seconds() for _ in range(20)]
        assert sorted(frozen)[-3] < 0.25 + 2 * usual, (usual, frozen)
        server.thaw()
        content = unique("cached again")

        def cached() -> bool:
            return gateway.chat(key, content, model="small").headers["x-farthing-cache"] == "exact"

        until(cached, "the cache is back")
    finally:
        server.thaw()
        server.close()
