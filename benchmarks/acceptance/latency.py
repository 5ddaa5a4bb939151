"""The small model's first token slowed to three times its class's limit at 20 requests a second.

Bar: within 30 s less than 5 % of the class goes there; restored: at least 80 % is back within 60 s. Shares are of
the 5 s before each of these moments. `--rate`, `--limit` (seconds to the first token).
"""

# ruff: noqa: S106

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time

from benchmarks.acceptance.common import Verdict, ask, folder, run, session
from tests.e2e.gateway import Gateway
from tests.e2e.provider import Provider
from tests.e2e.setting import policy, providers

WINDOW = 5.0


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--limit", type=float, default=1.5)
    options = parser.parse_args()
    verdict = Verdict("latency")
    models = ("small:first_token=60ms,tps=400,typical=12", "middle:first_token=80ms,tps=400,typical=12")
    sent: list[tuple[float, str, str]] = []  # when it was sent, the model, the class
    with (
        folder() as where,
        contextlib.closing(Provider(*models, "frontier", "slow")) as provider,
        Gateway(
            where,
            providers(provider.url),
            policy().replace(
                "simple:  { min_quality: 0.90, first_token_p95: none }",
                f"simple:  {{ min_quality: 0.90, first_token_p95: {options.limit * 1000:.0f}ms }}",
            ),
        ) as gateway,
    ):
        key = gateway.key("search")
        stop = asyncio.Event()

        async def load() -> None:
            pending: set[asyncio.Task[None]] = set()
            async with session() as http:

                async def one(number: int) -> None:
                    began = time.monotonic()
                    body = {
                        "model": "auto",
                        "messages": [
                            {"role": "user", "content": f"What is the capital of France? [{number}]"}
                        ],
                        "stream": True,
                    }
                    answer = await ask(http, gateway.url, key, body)
                    headers = answer.headers
                    sent.append(
                        (began, headers.get("x-farthing-model", "none"), headers.get("x-farthing-class", ""))
                    )

                start, number = time.monotonic(), 0
                while not stop.is_set():
                    pending.add(task := asyncio.create_task(one(number)))
                    task.add_done_callback(pending.discard)
                    number += 1
                    await asyncio.sleep(max(0.0, start + number / options.rate - time.monotonic()))
                await asyncio.gather(*pending)

        def share(until: float, window: float = WINDOW) -> float:
            models = [m for at, m, kind in sent if until - window <= at < until and kind == "simple"]
            return models.count("small") / len(models) if models else -1.0

        running = asyncio.create_task(load())
        await asyncio.sleep(12)
        now = time.monotonic()
        verdict.check(share(now) >= 0.9, f"before: {share(now):.1%} of class simple goes to small")

        slowed = time.monotonic()
        provider.set("small", first_token=3 * options.limit)
        await asyncio.sleep(45)
        restored = time.monotonic()
        provider.set("small", first_token="60ms")
        await asyncio.sleep(75)
        stop.set()
        await running

        for name, began, seconds in (("slowed", slowed, 45), ("restored", restored, 75)):
            timeline = ", ".join(f"{int(at)}s {share(began + at):.0%}" for at in range(5, seconds + 1, 5))
            verdict.say(f"share of small in the 5 s before, {name}: {timeline}")
        below = next((t for t in range(1, 46) if share(slowed + t, 1.0) < 0.05), None)
        back = next((t for t in range(1, 76) if share(restored + t, 1.0) >= 0.8), None)
        verdict.say(f"first second below 5 %: {below} s after; first second at 80 % again: {back} s after")
        verdict.check(
            share(slowed + 30) < 0.05, f"30 s after slowing: {share(slowed + 30):.1%} goes to small"
        )
        verdict.check(
            0 < share(restored, 30.0) < 0.05,
            f"the 30 s before restoring: {share(restored, 30.0):.1%} (probes, about six of them)",
        )
        verdict.check(
            share(restored + 60) >= 0.8, f"60 s after restoring: {share(restored + 60):.1%} goes to small"
        )
        verdict.say(f"{len(sent)} requests sent, classes {sorted({kind for _, _, kind in sent})}")
    return verdict.finish()


if __name__ == "__main__":
    run(main)
