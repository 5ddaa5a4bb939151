"""1,000 requests, one in ten cut by the client: the ledger against the provider's own log, to the nano-USD.

The expected cost is computed here from the log's token counts and the prices written below, in this file's own
arithmetic. `--requests N`, `--database sqlite|postgresql` (default: both).
"""

# ruff: noqa: S311

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import io
import json
import random
import re
from collections import Counter, defaultdict
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import Any

from benchmarks.acceptance.common import Answer, Verdict, ask, folder, postgresql, run, session
from tests.e2e.gateway import Gateway, providers_yaml, until
from tests.e2e.provider import Provider

# USD per million tokens: input, cached input, output. Nine decimals where a rounding can go wrong.
PRICES = {
    "small": ("0.100000001", "0.025", "0.400000003"),
    "middle": ("1.10", "0.55", "4.40"),
    "frontier": ("5", "0.5", "19.999999999"),
    "long": ("1.10", "0.55", "4.40"),  # answers that last long enough to be cut
}
QUALITY = {
    "small": ("0.95", "0.80", "0.45"),
    "middle": ("0.97", "0.93", "0.75"),
    "frontier": ("0.99", "0.97", "0.94"),
    "long": ("0.1", "0.1", "0.1"),
}
TEAMS = ("search", "support", "research")
PROMPTS = (
    "What is the capital of France?",
    "Translate 'good morning' to Spanish.",
    "Summarise this paragraph about the history of tea in three sentences, keeping the dates.",
    "Write a Python function that merges two sorted lists and explain its complexity.",
    "Prove that the square root of two is irrational, then generalise to any prime, step by step.",
    "Design a sharded, multi-region database with failure analysis of every component and its trade-offs.",
)


def configuration(url: str) -> tuple[str, str]:
    models = {}
    for name, (bought, cached, sold) in PRICES.items():
        quality = ", ".join(
            f'{kind}: "{share}"'
            for kind, share in zip(("simple", "medium", "complex"), QUALITY[name], strict=True)
        )
        models[name] = (
            f"{{ provider: sim, name: {name}, context: 128000, max_output: 16384, supports: [tools], "
            f'price: {{ input: "{bought}", cached_input: "{cached}", output: "{sold}" }}, quality: {{ {quality} }} }}'
        )
    policy = """\
apiVersion: farthing/v1
baseline: frontier
classes: { simple: { min_quality: 0.9 }, medium: { min_quality: 0.9 }, complex: { min_quality: 0.9 } }
defaults: { allow: [small, middle, frontier, long], fallback: [middle, frontier] }
teams: { search: { budget: { month: 1000, hard_cap: 1000 } } }
"""
    return providers_yaml(models, {"sim": f'{{ wire: openai, base_url: "{url}" }}'}), policy


def expected_nano(call: dict[str, Any]) -> int:
    """One call's cost; each bucket is rounded half to even to a whole nano-USD."""
    bought, cached, sold = (Decimal(price) for price in PRICES[call["model"]])
    parts = (
        ((call["prompt_tokens"] - call["cached_tokens"]), bought),
        (call["cached_tokens"], cached),
        (call["completion_tokens"], sold),
    )
    return sum(int((count * price * 1000).quantize(Decimal(1), ROUND_HALF_EVEN)) for count, price in parts)


async def one_run(verdict: Verdict, database: str | None, count: int, where: Path) -> None:
    provider = Provider(
        "small:first_token=5ms,tps=800,typical=40,cached_from=20",
        "middle:first_token=5ms,tps=800,typical=40,cached_from=20",
        "frontier:first_token=10ms,tps=800,typical=60,cached_from=20",
        "long:first_token=10ms,tps=250,typical=1000",
    )
    dice = random.Random(7)
    with contextlib.closing(provider):
        # A provider that fails one call in twenty makes attempts that are not requests.
        provider.set("small", fault="500", fault_rate=0.05)
        with Gateway(where, *configuration(provider.url), database_url=database) as gateway:
            keys = [gateway.key(team) for team in TEAMS]
            gate = asyncio.Semaphore(40)
            history: list[dict[str, str]] = []

            async def send(http: Any, number: int) -> tuple[Answer, bool]:
                cut = number % 10 == 3
                text = (
                    f"{dice.choice(PROMPTS)} [{number}]" if number % 25 else "Tell me the same thing again."
                )
                body: dict[str, Any] = {
                    "model": dice.choice(("auto", "auto", "small", "middle", "frontier")),
                    "messages": [{"role": "user", "content": text}],
                    "stream": cut or dice.random() < 0.5,
                }
                if history and dice.random() < 0.2:
                    body["messages"] = [*history, *body["messages"]]
                if cut:
                    body["model"] = "long"
                async with gate:
                    answer = await ask(
                        http,
                        gateway.url,
                        keys[number % 3],
                        body,
                        leave_after=dice.randint(1, 20_000) if cut else None,
                    )
                return answer, cut

            history += [
                {"role": "system", "content": "You answer briefly, in the tone of a railway timetable. " * 4},
                {"role": "user", "content": "Hello"},
            ]
            async with session() as http:
                answers = await asyncio.gather(*(send(http, number) for number in range(count)))
            verdict.say(f"statuses {dict(Counter(a.status for a, _ in answers))}")
            admitted = [a for a, _ in answers if a.status == 200]
            cut_ids = {a.id for a, _ in answers if a.left}
            until(lambda: len(gateway.rows()) >= len(admitted), "every row is written")
            until(lambda: all(call["ended"] for call in provider.log()), "every call has ended")
            gateway.booked()
            rows = {row["id"]: row for row in gateway.rows()}
            calls = provider.log()
            refused = [a for a, _ in answers if a.status not in (0, 200)]

            verdict.check(len(answers) == count, f"{count} requests sent, {len(admitted)} answered with 200")
            answered = {a.id for a, _ in answers if a.status}
            verdict.check(
                {a.id for a in admitted}
                <= set(rows)
                <= answered | {i for i, r in rows.items() if r["status"] == "cancelled"},
                f"ledger requests {len(rows)} = requests admitted ({len(admitted)} answered, "
                f"{len(rows) - len(admitted)} admitted and failed; {len(refused)} errors told)",
            )
            tried = gateway.attempts()
            verdict.check(
                len(tried) == len(calls)
                and Counter(a["request_id"] for a in tried) == Counter(c["request_id"] for c in calls),
                f"attempts {len(tried)} = calls in the provider's log {len(calls)}, request by request",
            )
            by_request: dict[str, list[dict[str, Any]]] = defaultdict(list)
            for call in calls:
                by_request[call["request_id"]].append(call)
            wrong = [
                (i, row["cost"], sum(expected_nano(c) for c in by_request[i] if c["complete"]))
                for i, row in rows.items()
                if row["status"] == "complete"
                and not row["estimated"]
                and row["cost"] != sum(expected_nano(c) for c in by_request[i] if c["complete"])
            ]
            complete = [row for row in rows.values() if row["status"] == "complete"]
            verdict.check(not wrong, f"cost of {len(complete)} complete requests to the nano-USD {wrong[:3]}")
            verdict.check(not any(row["estimated"] for row in complete), "no complete request is an estimate")
            left = [rows[i] for i in cut_ids if i in rows]
            verdict.check(
                len(left) == len(cut_ids)
                and all(r["estimated"] or r["status"] == "complete" or r["cache"] == "exact" for r in left)
                and sum(r["status"] == "cancelled" and r["estimated"] for r in left) >= 0.9 * len(left),
                f"{len(cut_ids)} cut by the client: {sum(r['estimated'] for r in left)} flagged estimated, "
                f"statuses {dict(Counter(r['status'] for r in left))}",
            )
            hits = sum(row["cache"] == "exact" for row in rows.values())
            verdict.say(
                f"{hits} answered by the cache or a shared call, "
                f"{sum(c['cached_tokens'] > 0 for c in calls)} calls with cached input"
            )
            reports(verdict, gateway, rows, by_request)
            checked = gateway.cli("ledger", "verify")
            verdict.check(checked.returncode == 0, f"ledger verify: {checked.stdout.strip()[-200:]}")


def reports(
    verdict: Verdict, gateway: Gateway, rows: dict[str, Any], by_request: dict[str, list[dict[str, Any]]]
) -> None:
    """Table, JSON and CSV against sums made here: complete rows from the provider's log, the others as booked."""
    expected: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for i, row in rows.items():
        exact = row["status"] == "complete" and not row["estimated"]
        nano = sum(expected_nano(c) for c in by_request[i] if c["complete"]) if exact else row["cost"]
        group = expected[row["team"], row["served_model"] or ""]
        group[0] += 1
        group[1] += nano or 0
    want = {key: (count, f"{Decimal(nano) / 10**9:.9f}") for key, (count, nano) in expected.items()}

    shown = json.loads(gateway.cli("report", "spend", "--by", "team,model", "--format", "json").stdout)
    as_json = {
        (r["team"], r["model"] or ""): (r["requests"], f"{Decimal(str(r['cost_usd'])):.9f}")
        for r in shown["rows"]
    }
    verdict.check(
        as_json == want, f"report as JSON: {len(as_json)} rows agree; data_health {shown['data_health']}"
    )
    text = gateway.cli("report", "spend", "--by", "team,model", "--format", "csv").stdout
    as_csv = {
        (r["team"], r["model"]): (int(r["requests"]), f"{Decimal(r['cost_usd']):.9f}")
        for r in csv.DictReader(io.StringIO(text))
        if r["team"] in TEAMS
    }
    verdict.check(as_csv == want, f"report as CSV: {len(as_csv)} rows agree")
    table = gateway.cli("report", "spend", "--by", "team,model", "--format", "table").stdout
    as_table = {}
    for line in table.splitlines():
        words = line.split()
        if words and words[0] in TEAMS and len(words) > 3:
            at = 2 if words[1] in PRICES else 1
            money = next(w for w in words[at + 1 :] if re.fullmatch(r"\d+\.\d{9}", w))
            as_table[words[0], words[1] if at == 2 else ""] = (int(words[at].replace(",", "")), money)
    named = {key: value for key, value in want.items() if key[1]}
    verdict.check(
        {key: value for key, value in as_table.items() if key[1]} == named,
        f"report as table: {len(named)} rows agree",
    )
    total = sum(Decimal(money) for _, money in want.values())
    verdict.say(f"in all {sum(c for c, _ in want.values())} requests, {total} USD\n{table}")


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=1_000)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), action="append")
    options = parser.parse_args()
    verdict = Verdict("accounting")
    for database in options.database or ("sqlite", "postgresql"):
        verdict.say(f"--- {database}, {options.requests} requests")
        with folder() as where, contextlib.ExitStack() as stack:
            url = stack.enter_context(postgresql()) if database == "postgresql" else None
            await one_run(verdict, url, options.requests, where)
    return verdict.finish()


if __name__ == "__main__":
    run(main)
