"""Adversarial requests of many tenants against one semantic cache: nobody gets an answer made in another scope.

Twenty tenants (teams, and apps of teams) send the same prompts and rewordings of them, each under system prompts,
histories, tools, formats and parameters that differ, some only by a space. Every answer that came from a cache is
traced through the ledger to the request that made it, and all that must be the same is compared. Then the time that a
first request takes is compared between prompts that another tenant has stored and prompts nobody has.

`--requests N` (10,000), `--store memory|valkey` (valkey with two workers), `--pairs N` timed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.acceptance.common import Verdict, ask, folder, run, session
from tests.contracts.valkey_server import ValkeyServer
from tests.e2e.gateway import Gateway, until
from tests.e2e.provider import Provider
from tests.e2e.setting import policy, providers

TENANTS: tuple[tuple[str, str | None], ...] = tuple(
    [(f"team{n}", None) for n in range(10)] + [(f"team{n}", f"app{n % 3}") for n in range(10)]
)
"""The policy keeps the answers of each app apart, and those of a team's keys without an app."""

PROMPTS = (
    ("How do I reset my password?", "What are the steps to reset my password?"),
    ("What is the capital of Peru?", "Which city is the capital of Peru?"),
    ("How long do I boil an egg?", "how long should I boil an egg?"),
    ("Write a function in Python that reverses a linked list", "Implement reversing a linked list in Python"),
    ("How do I cancel my subscription?", "What do I have to do to cancel my subscription?"),
    ("Translate 'good morning' into French", "Please translate 'good morning' into French"),
    ("How do I turn on two-factor authentication?", "Where can I turn on two-factor authentication?"),
    ("What is the refund policy?", "Could you tell me what the refund policy is?"),
)
SYSTEMS = (
    None,
    "You are a helpful assistant.",
    "You are a helpful assistant. ",
    "You are a helpful assistant of team0.",
    "you are a helpful assistant.",
    "Answer for tenant team1 app0.",
)
HISTORIES: tuple[tuple[dict[str, str], ...], ...] = (
    (),
    ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}),
    ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi! "}),
)
_FUNCTION: dict[str, Any] = {"name": "look_up", "parameters": {"type": "object", "properties": {}}}
_TOOL = {"type": "function", "function": _FUNCTION}
PARAMETERS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0},
    {"temperature": 0.2},
    {"max_tokens": 64},
    {"max_completion_tokens": 64},
    {"seed": 1},
    {"stop": ["x"]},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "text"}},
    {"tools": [_TOOL]},
    {"tools": [{"type": "function", "function": {**_FUNCTION, "name": "look_up2"}}]},
    {"top_p": 0.5},
    {"user": "team0"},
    {"metadata": {"team": "team0"}},
)
FORGED: tuple[dict[str, str], ...] = (
    {},
    {"x-farthing-team": "team0"},
    {"openai-organization": "team0"},
    {"x-forwarded-for": "127.0.0.1"},
)
NOT_THE_ANSWER = ("user", "metadata")
"""Parameters that say who asks, not what: they may differ."""


@dataclass(frozen=True, slots=True)
class Sent:
    tenant: tuple[str, str | None]
    reference: str
    system: str | None
    history: int
    parameters: str
    prompt: str

    @property
    def scope(self) -> tuple[Any, ...]:
        """All that must be the same."""
        return (self.tenant, self.reference, self.system, self.history, self.parameters)


def drawn(random_: random.Random) -> tuple[Sent, dict[str, Any], dict[str, str]]:
    tenant = random_.choice(TENANTS)
    # Most keep to the plain form, so that there is something to be had by likeness at all.
    plain = random_.random() < 0.5
    system = None if plain else random_.choice(SYSTEMS)
    history = 0 if plain else random_.randrange(len(HISTORIES))
    extra = {} if plain else random_.choice(PARAMETERS)
    model = random_.choice(("auto", "auto", "auto", "middle", "gpt-4o", "frontier"))
    prompt = random_.choice(random_.choice(PROMPTS))
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [*HISTORIES[history], {"role": "user", "content": prompt}]
    body = {"model": model, "messages": messages, "stream": random_.random() < 0.3, **extra}
    telling = {name: value for name, value in extra.items() if name not in NOT_THE_ANSWER}
    sent = Sent(
        tenant,
        {"gpt-4o": "middle"}.get(model, model),
        system,
        history,
        json.dumps(telling, sort_keys=True),
        prompt,
    )
    return sent, body, random_.choice(FORGED)


def teams() -> str:
    lines = []
    for n in range(10):
        lines.append(
            f"  team{n}: {{ cache: {{ semantic: enforce, max_error: 5%, scope: app }}, "
            f"apps: {{ app{n % 3}: {{}} }} }}"
        )
    return "\n".join(lines)


async def one_run(
    verdict: Verdict, where: Path, count: int, pairs: int, redis: str | None, workers: int
) -> None:
    names = ("small:typical=12", "middle:typical=12", "frontier:typical=12", "slow:typical=12")
    with (
        contextlib.closing(Provider(*names)) as provider,
        Gateway(
            where, providers(provider.url), policy(teams=teams()), redis_url=redis, workers=workers
        ) as gateway,
    ):
        keys = {tenant: gateway.key(*tenant) for tenant in TENANTS}
        await asyncio.sleep(6 if workers > 1 else 1)  # keys that were made a moment ago
        random_ = random.Random(20)  # noqa: S311 - a fixed load
        sent: dict[str, Sent] = {}
        statuses: Counter[int] = Counter()
        gate = asyncio.Semaphore(24)

        async with session(24) as http:

            async def one() -> None:
                async with gate:
                    what, body, headers = drawn(random_)
                    answer = await ask(http, gateway.url, keys[what.tenant], body, headers=headers)
                    statuses[answer.status] += 1
                    if answer.status == 200:
                        sent[answer.id] = what

            await asyncio.gather(*(one() for _ in range(count)))
            verdict.check(set(statuses) == {200}, f"{count} requests, statuses {dict(statuses)}")
            until(lambda: len(gateway.rows()) >= statuses[200], "every row is written", 60)
            rows = {row["id"]: row for row in gateway.rows()}
            outcomes = Counter(rows[id]["cache"] for id in sent)
            foreign = []
            for id, what in sent.items():
                row = rows[id]
                if row["cache"] == "miss":
                    continue
                origin = sent.get(row["cache_entry"])
                same = origin is not None and origin.scope == what.scope
                if not same or (
                    row["cache"] == "exact" and origin is not None and origin.prompt != what.prompt
                ):
                    foreign.append((id, row["cache_entry"]))
            verdict.say(f"answered: {dict(outcomes)}")
            verdict.check(not foreign, f"{len(foreign)} answers from another scope {foreign[:3] or ''}")
            verdict.check(
                outcomes["semantic"] >= count / 200, f"{outcomes['semantic']} semantic hits to check"
            )
            verdict.check(
                all(rows[id]["team"] == what.tenant[0] for id, what in sent.items()), "each row is its team's"
            )
            await timing(verdict, http, gateway, keys, pairs)
        checked = gateway.cli("ledger", "verify")
        verdict.check(checked.returncode == 0, f"ledger verify: {checked.stdout.strip()[-160:]}")


async def timing(verdict: Verdict, http: Any, gateway: Gateway, keys: dict[Any, str], pairs: int) -> None:
    """What the second tenant measures for prompts the first one stored, against prompts nobody did."""
    first, second = keys["team0", None], keys["team1", None]
    stored: list[float] = []
    fresh: list[float] = []

    async def seconds(key: str, text: str, model: str) -> float:
        body = {"model": model, "messages": [{"role": "user", "content": text}]}
        return (await ask(http, gateway.url, key, body)).seconds

    order = random.Random(21)  # noqa: S311 - a fixed load
    for n in range(pairs):
        known, unknown = f"What happened in the year {n} in Riga?", f"What happened in the year {n} in Oslo?"
        if order.random() < 0.5:
            known, unknown = unknown, known
        model = ("middle", "auto")[n % 2]  # the second is classified as well
        await seconds(first, known, model)
        await asyncio.sleep(0.005)
        for text, into in order.sample([(known, stored), (unknown, fresh)], 2):
            into.append(await seconds(second, text, model))
    differences = np.asarray(stored) - np.asarray(fresh)
    signs = np.random.default_rng(22).choice([-1.0, 1.0], size=(4000, len(differences)))
    observed = abs(float(np.median(differences)))
    p = float(np.mean(np.abs(np.median(signs * differences, axis=1)) >= observed))
    verdict.say(
        f"{pairs} pairs: median {1000 * statistics.median(stored):.2f} ms where another tenant has the prompt, "
        f"{1000 * statistics.median(fresh):.2f} ms where nobody has"
    )
    verdict.check(
        p > 0.01, f"no difference in time: median {1e6 * observed:.0f} us, p = {p:.2f} (sign flips)"
    )


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", choices=("memory", "valkey"), action="append")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--pairs", type=int, default=400)
    options = parser.parse_args()
    verdict = Verdict("isolation")
    for store in options.store or ("memory", "valkey"):
        with contextlib.ExitStack() as stack:
            redis = None
            if store == "valkey":
                server = ValkeyServer()
                stack.callback(server.close)
                redis = server.url
                verdict.say("Valkey, two workers")
            else:
                verdict.say("in-process twin, one worker")
            where = stack.enter_context(folder())
            workers = 2 if redis else 1
            await one_run(verdict, where, options.requests, options.pairs, redis, workers)
    return verdict.finish()


if __name__ == "__main__":
    run(main)
