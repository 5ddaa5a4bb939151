"""One of several processes that spend one window: URL, key, period and cap as arguments.

Begins when its standard input ends, so that all begin at once. Prints what it spent and the highest
spent + held it ever saw.
"""

from __future__ import annotations

import asyncio
import random
import sys
import uuid

from router.adapters.memory import MemorySpendSource
from router.adapters.redis_store import RedisBudgetStore, connect
from router.adapters.system import SystemClock
from router.core.ports import BudgetCharge, Denied
from router.core.types import BudgetWindow, NanoUSD


async def main(url: str, key: str, period: str, cap: int) -> None:
    window = BudgetWindow(key, period)
    # A machine with fewer cores than processes stalls them; what is tested here is not the 50 ms limit.
    connection = connect(url, timeout=30.0)
    store = RedisBudgetStore(connection, MemorySpendSource(), SystemClock(), workers=4)
    chance = random.Random()
    spent = peak = 0

    async def client() -> None:
        nonlocal spent, peak
        while True:
            hold_id = str(uuid.uuid4())
            outcome = await store.reserve(hold_id, [BudgetCharge(window, NanoUSD(cap))], NanoUSD(40))
            reading = outcome.reading if isinstance(outcome, Denied) else outcome.readings[0]
            peak = max(peak, reading.spent + reading.held)
            if isinstance(outcome, Denied):
                if not outcome.only_held:
                    return
                await asyncio.sleep(0.005)
                continue
            await asyncio.sleep(chance.uniform(0.005, 0.015))
            cost = chance.randint(5, 40)
            spent += cost
            store.settle(hold_id, [window], NanoUSD(cost))

    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await asyncio.gather(*(client() for _ in range(20)))
    await store.close()
    await connection.close()
    print(spent, peak)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
