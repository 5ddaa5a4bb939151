"""100 identical concurrent requests over 4 workers: one upstream call, and all 100 get its answer.

Streaming and not, all at once and ragged; the client of the request that makes the call leaves; the worker that makes
it is killed (kill -9). A gateway with `--workers 4` on PostgreSQL and Valkey shows it as it is run; four gateways of
one worker each, on the same two, show it where each request's worker is known. `--rounds N` of each kind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import secrets
import time
from pathlib import Path
from typing import Any

from benchmarks.acceptance.common import Answer, Verdict, ask, folder, postgresql, run, session
from benchmarks.valkey import Valkey
from tests.e2e.gateway import Gateway, until
from tests.e2e.provider import Provider
from tests.e2e.setting import policy, providers

REQUESTS = 100
WORKERS = 4


async def ask_all(urls: list[str], key: str, body: dict[str, Any], count: int, over: float) -> list[Answer]:
    """In turn at each address, the beginnings spread over so many seconds."""
    dice = random.Random()  # noqa: S311

    async def one(http: Any, number: int) -> Answer:
        await asyncio.sleep(dice.uniform(0, over))
        return await ask(http, urls[number % len(urls)], key, body)

    async with session() as http:
        return list(await asyncio.gather(*(one(http, number) for number in range(count))))


def fresh(stream: bool) -> dict[str, Any]:
    content = f"Tell me about {secrets.token_hex(6)}"
    return {
        "model": "slow",
        "max_tokens": 20,
        "messages": [{"role": "user", "content": content}],
        "stream": stream,
    }


async def together(
    verdict: Verdict, provider: Provider, gateway: Gateway, urls: list[str], rounds: int, where: str
) -> None:
    key = gateway.key("search")
    for stream in (False, True):
        for over in (0.0, 1.3):
            calls, complete, slowest = [], 0, 0.0
            ids: set[str] = set()
            for _ in range(rounds):
                provider.clear()
                answers = await ask_all(urls, key, fresh(stream), REQUESTS, over)
                calls.append(len(provider.log()))
                same = len({answer.body for answer in answers}) == 1
                complete += sum(answer.status == 200 and same for answer in answers)
                slowest = max(slowest, *(answer.seconds for answer in answers))
                ids |= {answer.id for answer in answers}
            verdict.check(
                calls == [1] * rounds and complete == REQUESTS * rounds,
                f"{where}, {'streaming' if stream else 'not streaming'}, "
                f"{'at once' if not over else f'within {over} s'}: upstream calls {calls}, "
                f"{complete} of {REQUESTS * rounds} got the same answer, slowest {slowest:.2f} s",
            )
            until(lambda ids=ids: ids <= {row["id"] for row in gateway.rows()}, "all are booked")  # type: ignore[misc]
            paid = [row for row in gateway.rows() if row["id"] in ids and row["cost"]]
            verdict.check(
                len(paid) == sum(calls),
                f"{len(ids)} rows, {len(paid)} of them with a cost: one for each call",
            )


async def leaves(verdict: Verdict, provider: Provider, gateways: list[Gateway]) -> None:
    key = gateways[0].key("search")
    for stream in (False, True):
        provider.clear()
        body = fresh(stream)
        async with session() as http:
            first = asyncio.create_task(ask(http, gateways[0].url, key, body))
            await asyncio.to_thread(until, provider.log, "the call is made")
            urls = [gateway.url for gateway in gateways]
            others = asyncio.create_task(ask_all(urls, key, body, REQUESTS - 1, 0.2))
            await asyncio.sleep(0.5)
            first.cancel()
            answers = await others
        good = sum(answer.status == 200 for answer in answers)
        verdict.check(
            good == REQUESTS - 1
            and len({answer.body for answer in answers}) == 1
            and len(provider.log()) == 1,
            f"the first client leaves, {'streaming' if stream else 'not streaming'}: {good} of {REQUESTS - 1} "
            f"others are served by {len(provider.log())} call",
        )


async def killed(verdict: Verdict, provider: Provider, gateways: list[Gateway]) -> None:
    key = gateways[0].key("search")
    for stream in (False, True):
        provider.clear()
        body = fresh(stream)
        with provider.changed("slow", first_token=3.0):
            async with session() as http:
                doomed = asyncio.create_task(ask(http, gateways[0].url, key, body))
                await asyncio.to_thread(until, provider.log, "the call is made")
                urls = [gateway.url for gateway in gateways[1:]]
                others = asyncio.create_task(ask_all(urls, key, body, 75, 0.0))
                await asyncio.sleep(0.6)
                await asyncio.to_thread(gateways[0].kill)
                began = time.monotonic()
                await asyncio.to_thread(until, lambda: len(provider.log()) > 1, "it is made anew")
                noticed = time.monotonic() - began
                answers = await others
                await doomed
        await asyncio.to_thread(gateways[0].start)
        good = sum(answer.status == 200 for answer in answers)
        calls = len(provider.log())
        verdict.check(
            good == 75 and calls == 2 and noticed < 3,
            f"its worker is killed, {'streaming' if stream else 'not streaming'}: {good} of 75 at the others are "
            f"served, {calls} calls in all, the second {noticed:.2f} s after the kill",
        )


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    verdict = Verdict("single_flight")
    with (
        folder() as where,
        postgresql() as database,
        contextlib.closing(Valkey(where)) as valkey,
        contextlib.closing(Provider("small", "middle", "frontier", "slow:tps=20,typical=200")) as provider,
        contextlib.ExitStack() as stack,
    ):

        def gateway(name: str, workers: int) -> Gateway:
            return stack.enter_context(
                Gateway(
                    Path(where) / name,
                    providers(provider.url),
                    policy(),
                    database_url=database,
                    redis_url=valkey.url,
                    workers=workers,
                )
            )

        together_url = gateway("together", WORKERS)
        await asyncio.sleep(3)  # until all four are up
        await together(verdict, provider, together_url, [together_url.url], options.rounds, "--workers 4")
        together_url.stop()
        apart = [gateway(f"apart-{number}", 1) for number in range(WORKERS)]
        urls = [one.url for one in apart]
        await together(verdict, provider, apart[0], urls, options.rounds, "25 at each of 4 workers")
        await leaves(verdict, provider, apart)
        await killed(verdict, provider, apart)
    return verdict.finish()


if __name__ == "__main__":
    run(main)
