"""Many requests of every kind at once, with every fault and clients that leave: what must hold afterwards."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest

from benchmarks.acceptance.common import Answer, ask, session
from tests.contracts.valkey_server import ValkeyServer
from tests.e2e.gateway import Gateway
from tests.e2e.provider import Provider
from tests.e2e.setting import FAULTS, policy

FAILING = [f"bad-{fault.replace('_', '-')}" for fault in FAULTS if not fault.startswith("stall")]
TEAMS = """\
  tight: { budget: { month: 0.05, at_limit: downgrade, hard_cap: 0.06 } }
  shut: { budget: { month: 0.000001, at_limit: refuse } }"""


@pytest.mark.parametrize("store", ["memory", "valkey"])
@pytest.mark.parametrize("seed", [1])
async def test_what_must_hold_holds(
    start_gateway: Callable[..., Gateway],
    provider: Provider,
    store: str,
    seed: int,
    request: pytest.FixtureRequest,
) -> None:
    options: dict[str, Any] = {}
    if store == "valkey":
        server: ValkeyServer = request.getfixturevalue("valkey_server")
        options["redis_url"] = server.url
        options["database_url"] = request.getfixturevalue("postgresql_url")
    gateway = start_gateway(policy=policy(teams=TEAMS), **options)
    keys = {team: gateway.key(team) for team in ("search", "solo", "swap", "tight", "shut")}
    dice = random.Random(seed)
    gate = asyncio.Semaphore(40)

    async def one(http: Any, number: int) -> tuple[str, Answer]:
        team = dice.choice(list(keys))
        same = dice.random() < 0.2
        content = f"the same {number % 7}" if same else f"{seed} {number} " + "word " * dice.randint(0, 40)
        body: dict[str, Any] = {
            "model": dice.choice(("auto", "auto", "small", "frontier", "slow", dice.choice(FAILING))),
            "messages": [{"role": "user", "content": content}],
            "stream": dice.random() < 0.5,
        }
        if body["model"] == "slow" or dice.random() < 0.5:
            body["max_tokens"] = dice.randint(1, 30)
        if dice.random() < 0.1:
            body["n"] = dice.randint(1, 3)
        leave = dice.choice((1, 400, 1500)) if dice.random() < 0.25 else None
        headers = {"cache-control": "no-cache"} if dice.random() < 0.1 else None
        async with gate:
            if dice.random() < 0.1:
                try:
                    async with asyncio.timeout(dice.uniform(0.001, 0.2)):
                        return team, await ask(http, gateway.url, keys[team], body)
                except TimeoutError:
                    return team, Answer(0, {}, b"", 0.0, left=True)
            return team, await ask(http, gateway.url, keys[team], body, leave_after=leave, headers=headers)

    async with session() as http:
        answers = await asyncio.gather(*(one(http, number) for number in range(300)))

    statuses = Counter(answer.status for _, answer in answers)
    assert set(statuses) <= {0, 200, 400, 402, 429, 502, 503, 504}, statuses
    assert statuses[200] > 100
    assert sum(answer.status == 0 for _, answer in answers if not answer.left) == 0
    assert all(answer.status in (402, 429) for team, answer in answers if team == "shut" and answer.status)

    await asyncio.to_thread(gateway.booked)
    rows = {row["id"]: row for row in gateway.rows()}
    assert {a.id for _, a in answers if a.status == 200} <= set(rows)
    tried = Counter(attempt["request_id"] for attempt in gateway.attempts())
    called = Counter(call["request_id"] for call in provider.log())
    assert set(called) <= set(rows)
    for request_id, row in rows.items():
        made, seen = tried[request_id], called[request_id]
        # A client that leaves at once can end a call before it reached the provider.
        assert made == seen or (row["status"] == "cancelled" and made == seen + 1), row
        if row["cost"] is not None and row["baseline"] is not None:
            assert (
                row["baseline"] - row["cost"]
                == row["routing_savings"] + row["cache_savings"] - row["overhead"]
            )
    finished = {a.id for _, a in answers if a.status == 200 and not a.left and b"error" not in a.body[-300:]}
    assert all(rows[i]["status"] == "complete" for i in finished)
    verified = gateway.cli("ledger", "verify")
    assert verified.returncode == 0, verified.stdout
    spent = sum(row["cost"] or 0 for row in rows.values() if row["team"] == "tight")
    assert spent <= 60_000_000
    report = json.loads(gateway.cli("report", "budgets", "--format", "json").stdout)
    shown = next(row for row in report["rows"] if "tight" in json.dumps(row))
    assert Decimal(str(shown["spent_usd"])) == Decimal(spent) / 10**9
    log = gateway.log_path.read_text()
    assert "Traceback" not in log, log[-3000:]
