"""Smaller versions of `benchmarks/acceptance`, each a few seconds."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.acceptance import accounting, budgets, modules
from benchmarks.acceptance.common import Answer, Verdict, ask, session
from benchmarks.acceptance.kill9 import few, tear_last_frame
from tests.contracts.valkey_server import ValkeyServer
from tests.e2e.gateway import Gateway, until
from tests.e2e.patient import PATIENT
from tests.e2e.provider import Provider

StartGateway = Callable[..., Gateway]


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_the_ledger_agrees_with_the_providers_log(
    tmp_path: Path, database: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("postgresql_url") if database == "postgresql" else None
    verdict = Verdict("accounting")
    await accounting.one_run(verdict, url, 150, tmp_path)
    assert not verdict.failed


async def test_kill_9_loses_no_admitted_request(start_gateway: StartGateway, provider: Provider) -> None:
    gateway = start_gateway()
    key = gateway.key("search")
    dice = random.Random(5)
    admitted: set[str] = set()
    for number in range(3):
        provider.clear()
        answers: list[Answer] = []

        async def one(http: Any, at: int, number: int = number, answers: list[Answer] = answers) -> None:
            body = {
                "model": "slow",
                "messages": [{"role": "user", "content": f"{number} {at // 2}"}],
                "stream": True,
            }
            with contextlib.suppress(Exception):
                answers.append(await ask(http, gateway.url, key, body, leave_after=None))

        async with session() as http:
            tasks = [asyncio.create_task(one(http, at)) for at in range(20)]
            await asyncio.to_thread(until, lambda: len(provider.log()) == 10, "all pairs are under way")
            await asyncio.to_thread(gateway.kill)
            await asyncio.gather(*tasks)
        called = {call["request_id"] for call in provider.log()}
        torn = number == 2 and tear_last_frame(gateway.data / "journal", dice)
        await asyncio.to_thread(gateway.start)

        def missing(called: set[str] = called) -> set[str]:
            return called - {row["id"] for row in gateway.rows()}

        until(partial(few, missing, int(torn)), "every request has its row")
        admitted |= called - missing()
    rows = gateway.rows()
    assert len(admitted) >= 29
    assert not [i for i, n in Counter(row["id"] for row in rows).items() if n > 1]
    dead = [row for row in rows if row["error"] == "gateway_restarted"]
    assert {row["status"] for row in dead} == {"cancelled"}
    assert all(row["estimated"] for row in dead)
    assert gateway.chat(key, "still there?").status_code == 200
    verified = gateway.cli("ledger", "verify")
    assert verified.returncode == 0, verified.stdout


@pytest.mark.parametrize("store", ["memory", "valkey"])
async def test_a_cap_holds_under_load(
    tmp_path: Path, store: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "CONCURRENT", 50)
    monkeypatch.setattr(budgets, "CAP", 0.1)
    monkeypatch.setattr(budgets, "Gateway", partial(Gateway, python=PATIENT))
    verdict = Verdict("budgets")
    if store == "valkey":
        server: ValkeyServer = request.getfixturevalue("valkey_server")
        url = request.getfixturevalue("postgresql_url")
        await budgets.one_run(verdict, tmp_path, url, server.url, 2, 60.0)
    else:
        await budgets.one_run(verdict, tmp_path, None, None, 1, 60.0)
    assert not verdict.failed


def test_a_running_gateway_imports_nothing_heavy(tmp_path: Path, provider: Provider) -> None:
    found = modules.imported(tmp_path, provider, admin=False)
    assert "router" in found
    assert not found & {*modules.HEAVY, "fastapi"}
