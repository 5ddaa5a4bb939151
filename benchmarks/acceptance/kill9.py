"""kill -9 while 50 streams run, restart, 20 rounds: no admitted request without a row, none twice.

Admitted is what the caller saw a 200 of, and whatever reached the provider. Every fourth round some bytes of the
journal's last frame are cut off before the restart, as a crash of the machine may leave it. `--rounds N`.
"""

# ruff: noqa: S311

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.acceptance.common import Verdict, folder, run, session
from tests.e2e.gateway import Gateway, until
from tests.e2e.provider import Provider
from tests.e2e.setting import policy, providers

STREAMS = 50


def tear_last_frame(journals: Path, dice: random.Random) -> bool:
    """Cuts a few bytes off the newest segment that holds any."""
    segments = [p for p in journals.rglob("*.journal") if p.stat().st_size > 64]
    if not segments:
        return False
    newest = max(segments, key=lambda p: p.stat().st_mtime_ns)
    size = newest.stat().st_size
    with newest.open("r+b") as file:
        file.truncate(size - dice.randint(1, 30))
    return True


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    verdict = Verdict("kill9")
    dice = random.Random(11)
    seen: set[str] = set()
    torn_rounds = 0
    lost_to_tear: set[str] = set()
    with (
        folder() as where,
        contextlib.closing(Provider("small", "middle", "frontier", "slow:tps=25,typical=120")) as provider,
        Gateway(where, providers(provider.url), policy()) as gateway,
    ):
        key = gateway.key("search")
        for number in range(options.rounds):
            provider.clear()

            heads: list[str] = []
            async with session() as http:
                tasks = [
                    asyncio.create_task(_head(http, gateway.url, key, number, at, heads))
                    for at in range(STREAMS)
                ]
                await asyncio.sleep(dice.uniform(0.15, 1.2))
                await asyncio.to_thread(gateway.kill)
                await asyncio.gather(*tasks)
            called = {c["request_id"] for c in provider.log() if c["request_id"]}
            torn = number % 4 == 3 and tear_last_frame(gateway.data / "journal", dice)
            torn_rounds += torn
            await asyncio.to_thread(gateway.start)
            this_round = set(heads) | called
            seen |= this_round

            def missing(wanted: set[str] = this_round) -> set[str]:
                return wanted - {row["id"] for row in gateway.rows()}

            with contextlib.suppress(AssertionError):
                until(partial(few, missing, int(torn)), "the rows are there", 5)
            gone = missing()
            if torn:
                lost_to_tear |= gone
            verdict.check(
                len(gone) <= int(torn),
                f"round {number + 1}: {len(heads)} answers begun, {len(called)} calls made, "
                f"{len(gone)} without a row{' (torn tail: its own frame may be lost)' if torn else ''}, "
                f"ready again after {gateway.startup_seconds:.2f} s",
            )
        rows = gateway.rows()
        doubled = [i for i, n in Counter(r["id"] for r in rows).items() if n > 1]
        verdict.check(not doubled, f"{len(rows)} rows, {len(doubled)} twice")
        verdict.check(
            not seen - {r["id"] for r in rows} - lost_to_tear, f"{len(seen)} admitted requests all have a row"
        )
        dead = [r for r in rows if r["error"] == "gateway_restarted"]
        verdict.check(
            bool(dead) and all(r["status"] == "cancelled" and r["estimated"] for r in dead),
            f"{len(dead)} rows of requests that died are cancelled and flagged estimates",
        )
        verdict.check(
            torn_rounds >= options.rounds // 4,
            f"{torn_rounds} rounds with a torn tail: skipped, the start went on",
        )
        alive = gateway.chat(key, "still there?")
        verdict.check(alive.status_code == 200, "the gateway serves after the last round")
        checked = gateway.cli("ledger", "verify")
        verdict.check(checked.returncode == 0, f"ledger verify: {checked.stdout.strip()[-200:]}")
    return verdict.finish()


def few(missing: Callable[[], set[str]], allowed: int) -> bool:
    return len(missing()) <= allowed


async def _head(http: Any, url: str, key: str, number: int, at: int, heads: list[str]) -> None:
    """One stream, read until the gateway dies; its id counts from its first byte on. The last ten are five pairs of
    identical requests, which share a call.
    """
    what = f"round {number} stream {at // 2 if at >= 40 else at}"
    body = {
        "model": "slow" if at % 5 else "small",
        "messages": [{"role": "user", "content": what}],
        "stream": True,
    }
    if at >= 40:
        body["model"] = "slow"
    with contextlib.suppress(aiohttp.ClientError, ConnectionError, TimeoutError):
        async with http.post(
            f"{url}/v1/chat/completions", data=json.dumps(body), headers={"authorization": f"Bearer {key}"}
        ) as response:
            if response.status == 200:
                heads.append(response.headers["x-request-id"])
            async for _ in response.content.iter_any():
                pass


if __name__ == "__main__":
    run(main)
