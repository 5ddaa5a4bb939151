"""Valkey is frozen, killed and comes back empty while 50 requests a second run, some of which the caches answer.

Bar: no request fails, what is added at p99 once the breaker has opened is at most 50 ms, and the caches answer again
within 5 s. The same load on a healthy store, in the same run, is what "added" is measured against. `--rate N`,
`--seconds N` of each phase.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np

from benchmarks.acceptance.common import Answer, Verdict, ask, folder, run, session
from tests.contracts.valkey_server import ValkeyServer
from tests.e2e.gateway import Gateway
from tests.e2e.provider import Provider
from tests.e2e.setting import policy, providers

OPEN_WITHIN = 1.0
"""Seconds after a fault by which the breaker has opened; requests sent until then may each wait for it."""
ADDED = 0.050
RECOVERY = 5.0
TEAMS = "  asked: { cache: { semantic: enforce, max_error: 5% } }"
KNOWN = ("How do I reset my password?", "What is the capital of Peru?", "How long do I boil an egg?")
BEFORE = ("", "", "Hi, ", "Hello, ", "Please tell me: ", "Quick question: ", "I wonder: ")
AFTER = ("", "", " Thanks!", " Thank you.", " Please.", " Cheers")


@dataclass(frozen=True, slots=True)
class Timed:
    sent: float
    answer: Answer


def reworded(text: str, random_: random.Random) -> str:
    """The same question with other courtesies and gaps, so that hardly one is sent twice."""
    words = [word + " " * random_.choice((1, 1, 2)) for word in text.split(" ")]
    return random_.choice(BEFORE) + "".join(words).rstrip() + random_.choice(AFTER)


async def load(
    http: aiohttp.ClientSession,
    gateway: Gateway,
    key: str,
    rate: float,
    seconds: float,
    random_: random.Random,
) -> list[Timed]:
    """An open load: a slow answer does not slow down what is sent."""
    found: list[Timed] = []
    tasks: set[asyncio.Task[None]] = set()

    async def one() -> None:
        draw = random_.random()
        if draw < 0.3:
            text = random_.choice(KNOWN)
        elif draw < 0.5:
            text = reworded(random_.choice(KNOWN), random_)
        else:
            text = f"Say a word about number {random_.randrange(10**9)}"
        body = {
            "model": "middle",
            "messages": [{"role": "user", "content": text}],
            "stream": random_.random() < 0.3,
        }
        sent = time.monotonic()
        found.append(Timed(sent, await ask(http, gateway.url, key, body)))

    began = time.monotonic()
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
        task = asyncio.create_task(one())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return found


async def delays(into: list[float]) -> None:
    """How late this process itself is woken: what the machine adds to every figure here."""
    while True:
        asked = time.monotonic()
        await asyncio.sleep(0.01)
        into.append(time.monotonic() - asked - 0.01)


async def phase(
    verdict: Verdict,
    name: str,
    strike: Callable[[], None],
    cure: Callable[[], None],
    answers: Callable[[float], asyncio.Task[list[Timed]]],
    seconds: float,
    healthy: float,
) -> None:
    late: list[float] = []
    ticking = asyncio.create_task(delays(late))
    running = answers(2 * seconds + RECOVERY)
    await asyncio.sleep(1)
    struck = time.monotonic()
    await asyncio.to_thread(strike)
    await asyncio.sleep(seconds)
    cured = time.monotonic()
    await asyncio.to_thread(cure)
    found = await running
    ticking.cancel()
    statuses = Counter(timed.answer.status for timed in found)
    unfinished = sum(
        timed.answer.headers.get("content-type", "").startswith("text/event-stream")
        and not timed.answer.body.rstrip().endswith(b"[DONE]")
        for timed in found
    )
    verdict.check(
        set(statuses) == {200} and not unfinished, f"{name}: {len(found)} requests, {dict(statuses)}"
    )
    missed = [
        timed.answer.seconds
        for timed in found
        if struck + OPEN_WITHIN < timed.sent < cured
        and timed.answer.headers.get("x-farthing-cache") == "miss"
    ]
    p99 = float(np.percentile(missed, 99))
    verdict.check(
        p99 - healthy <= ADDED,
        f"{name}: p99 of {len(missed)} misses {1000 * p99:.0f} ms, healthy {1000 * healthy:.0f} ms",
    )
    slowest = max(timed.answer.seconds for timed in found)
    during = Counter(
        timed.answer.headers.get("x-farthing-cache") for timed in found if struck < timed.sent < cured
    )
    verdict.say(
        f"{name}: slowest of all {1000 * slowest:.0f} ms; while it lasted {dict(during)}; the machine woke this "
        f"process late by {1000 * float(np.percentile(late, 99)):.0f} ms (p99), {1000 * max(late):.0f} ms at worst"
    )
    after = Counter(
        timed.answer.headers.get("x-farthing-cache") for timed in found if timed.sent > cured + RECOVERY
    )
    hits = sorted(
        timed.sent - cured
        for timed in found
        if timed.sent > cured and timed.answer.headers.get("x-farthing-cache") == "exact"
    )
    verdict.check(
        bool(after["exact"] and after["semantic"]),
        f"{name}: first exact hit {hits[0]:.1f} s after the cure, from {RECOVERY:g} s on {dict(after)}"
        if hits
        else f"{name}: no hit after the cure",
    )


async def one_run(verdict: Verdict, where: Path, rate: float, seconds: float, workers: int) -> None:
    server = ValkeyServer()
    names = ("small", "middle:first_token=20ms,jitter=0.1,tps=2000,typical=20", "frontier", "slow")
    with (
        contextlib.closing(server),
        contextlib.closing(Provider(*names)) as provider,
        Gateway(
            where, providers(provider.url), policy(teams=TEAMS), redis_url=server.url, workers=workers
        ) as gateway,
    ):
        key = gateway.key("asked")
        random_ = random.Random(30)  # noqa: S311 - a fixed load
        async with session(400) as http:

            def answers(lasting: float) -> asyncio.Task[list[Timed]]:
                return asyncio.create_task(load(http, gateway, key, rate, lasting, random_))

            await answers(4)  # keys are known, caches are warm
            calm = [t.answer for t in await answers(seconds)]
            outcomes = Counter(answer.headers.get("x-farthing-cache") for answer in calm)
            healthy = float(
                np.percentile(
                    [answer.seconds for answer in calm if answer.headers.get("x-farthing-cache") == "miss"],
                    99,
                )
            )
            verdict.say(
                f"healthy: {len(calm)} requests, {dict(outcomes)}, p99 of misses {1000 * healthy:.0f} ms"
            )

            def restart() -> None:
                server.start()

            def read_only() -> None:
                # A replica of nothing answers reads and refuses writes.
                server.command("REPLICAOF", "127.0.0.1", "1")

            def empty() -> None:
                server.command("FLUSHALL")

            def writable() -> None:
                server.command("REPLICAOF", "NO", "ONE")

            await phase(verdict, "SIGSTOP", server.freeze, server.thaw, answers, seconds, healthy)
            await phase(verdict, "killed, back empty", server.kill, restart, answers, seconds, healthy)
            await phase(verdict, "read-only", read_only, writable, answers, seconds, healthy)
            await phase(
                verdict,
                "emptied",
                empty,
                lambda: None,
                answers,
                seconds,
                healthy,
            )
        checked = gateway.cli("ledger", "verify")
        verdict.check(checked.returncode == 0, f"ledger verify: {checked.stdout.strip()[-160:]}")


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=50)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    verdict = Verdict("cache faults")
    with folder() as where:
        await one_run(verdict, where, options.rate, options.seconds, options.workers)
    return verdict.finish()


if __name__ == "__main__":
    run(main)
