"""Each example edit hot-reloads under load without a failed request and changes the next decision as written; then
every broken variant is refused with line, column and remedy while the last good configuration goes on serving.
"""

# ruff: noqa: S106, S311

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx
import sqlalchemy as sa

from benchmarks.acceptance.common import Answer, Verdict, ask, folder, run, session
from router.adapters.sql.schema import request_features
from tests.e2e.gateway import REPOSITORY, Gateway, until
from tests.e2e.provider import Provider
from tests.unit.broken_variants import VARIANTS

EXAMPLES = REPOSITORY / "policies" / "examples"
RATE = 25.0
Probe = Callable[[], Any]


def providers_for(url: str, text: str) -> str:
    """The examples' providers, each at the simulator."""
    return re.sub(r'base_url: "[^"]+"', f'base_url: "{url}"', text)


def at_night(text: str) -> str:
    """The same policy in a timezone where it is between 22 and 23 o'clock now."""
    offset = (22 - datetime.now(UTC).hour) % 24
    offset = offset if offset <= 14 else offset - 24
    zone = f"Etc/GMT{'-' if offset >= 0 else '+'}{abs(offset)}"  # POSIX signs: Etc/GMT-9 is nine hours ahead
    return re.sub(r"timezone: [A-Za-z/]+", f"timezone: {zone}", text)


class Asker:
    """Asks one thing at a time, never from the cache."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self._number = 0

    def __call__(
        self, team: str, app: str | None = None, prompt: str = "What is the capital of France?", **fields: Any
    ) -> httpx.Response:
        self._number += 1
        headers = {"x-farthing-cache": "off", **fields.pop("headers", {})}
        return self.gateway.chat(
            self.gateway.key(team, app),
            f"{prompt} ({self._number})",
            headers=headers,
            max_tokens=60,
            **fields,
        )

    def row(self, answer: httpx.Response) -> dict[str, Any]:
        return self.gateway.row(answer.headers["x-request-id"])


def probes(ask_it: Asker, provider: Provider) -> dict[str, tuple[Probe, Any, Any]]:
    """For each example: what is asked, the answer before, the answer after."""

    def model(*arguments: Any, **fields: Any) -> str:
        answer = ask_it(*arguments, **fields)
        return str(answer.headers.get("x-farthing-model", answer.status_code))

    def under(team: str, app: str | None, budget: str) -> bool:
        return budget in ask_it.row(ask_it(team, app))["budgets"]

    def failing_small() -> str:
        """The model that answers for one whose provider fails."""
        while True:
            with provider.changed("qwen3-8b", fault="500", fault_times=1):
                answer = ask_it("search", model="small-local")
            tried = ask_it.gateway.attempts(answer.headers["x-request-id"])
            if len(tried) > 1:
                return answer.headers["x-farthing-model"]

    def discounted() -> bool:
        answer = ask_it("search", model="frontier")
        ask_it.row(answer)
        lines = [
            line
            for line in ask_it.gateway.cost_lines()
            if line["request_id"] == answer.headers["x-request-id"]
        ]
        return all(line["unit_price"] * 100 == line["list_price"] * 88 for line in lines)

    medium = (
        "Write a product description of a waterproof hiking boot for a web shop, friendly, in about 80 words."
    )

    def pii() -> str:
        answer = ask_it("search", headers={"x-farthing-tags": "data=pii"}, prompt=medium)
        return str(answer.headers.get("x-farthing-model") or answer.json()["error"]["code"])

    def kept_to_learn_from() -> bool:
        answer = ask_it("search")
        ask_it.row(answer)
        wanted = request_features.c.request_id == answer.headers["x-request-id"]
        with ask_it.gateway.engine.connect() as connection:
            return connection.execute(sa.select(request_features).where(wanted)).first() is not None

    shown = json.loads((REPOSITORY / "policies" / "demo" / "reworded.json").read_text())
    rewordings = iter([example for example in shown if example["same"]])

    def by_likeness() -> str:
        """How a question is answered that was answered in other words before; another one each time."""
        example = next(rewordings)
        key = ask_it.gateway.key("search", "faq-bot")
        ask_it.row(ask_it.gateway.chat(key, example["stored"], max_tokens=60))
        time.sleep(2)  # until what was answered can be found
        return ask_it.gateway.chat(key, example["asked"], max_tokens=60).headers["x-farthing-cache"]

    return {
        "01": (lambda: under("support", None, "team:support"), False, True),
        "02": (lambda: model("search", model="gpt-4o"), "gpt-4o", "403"),
        "03": (lambda: model("search", "legal", medium), "mini", "frontier"),
        "04": (lambda: model("search"), "mini", "small-local"),
        "05": (pii, "unknown_tag", "small-local"),
        "06": (discounted, False, True),
        "07": (lambda: "launch" in ask_it.row(ask_it("search"))["exceptions"], False, True),
        "08": (lambda: under("search", "faq-bot", "app:search/faq-bot"), False, True),
        "09": (failing_small, "mini", "gpt-4o"),
        "10": (lambda: model("support", model="frontier") != "frontier", False, True),
        "11": (kept_to_learn_from, False, True),
        "12": (by_likeness, "miss", "semantic"),
    }


async def main() -> int:
    verdict = Verdict("reload")
    models = ("qwen3-8b", "gpt-5-mini", "gpt-4o", "gpt-5.5")
    with (
        folder() as where,
        contextlib.closing(
            Provider(*(f"{m}:first_token=20ms,tps=500,typical=16" for m in models))
        ) as provider,
    ):
        good = providers_for(provider.url, (EXAMPLES / "providers.yaml").read_text())
        first = sorted(EXAMPLES.glob("01*"))[0]
        with Gateway(
            where, good, (first / "before.policy.yaml").read_text(), environment={"OPENAI_API_KEY": "sk-test"}
        ) as gateway:
            await edits(verdict, gateway, provider)
            await asyncio.to_thread(broken, verdict, gateway, provider)
    return verdict.finish()


async def edits(verdict: Verdict, gateway: Gateway, provider: Provider) -> None:
    asked = probes(Asker(gateway), provider)
    dice = random.Random(3)
    answers: list[Answer] = []
    stop = asyncio.Event()
    pending: set[asyncio.Task[None]] = set()

    async def load() -> None:
        async with session() as http:

            async def one(number: int) -> None:
                body = {
                    "model": dice.choice(("auto", "auto", "mini", "frontier")),
                    "messages": [{"role": "user", "content": f"Tell me something about the number {number}"}],
                    "stream": number % 2 == 0,
                    "max_tokens": 40,
                }
                key = gateway.key(dice.choice(("search", "support", "elsewhere")))
                answers.append(await ask(http, gateway.url, key, body))

            start, number = time.monotonic(), 0
            while not stop.is_set():
                pending.add(task := asyncio.create_task(one(number)))
                task.add_done_callback(pending.discard)
                number += 1
                await asyncio.sleep(max(0.0, start + number / RATE - time.monotonic()))
            await asyncio.gather(*pending)

    def hash_now() -> str:
        return gateway.chat(gateway.key("elsewhere"), f"hash {time.monotonic()}").headers["x-farthing-policy"]

    def one_edit(example: Any) -> None:
        probe, before, after = asked[example.name[:2]]
        texts = [(example / f"{side}.policy.yaml").read_text() for side in ("before", "after")]
        if example.name.startswith("04"):
            texts = [at_night(text) for text in texts]
            provider.set("qwen3-8b", first_token="2500ms")
            for number in range(6):
                gateway.chat(gateway.key("search"), f"slow {number}", model="small-local", stream=True)
        gateway.write(policy=texts[0])
        gateway.reload()
        time.sleep(0.3)
        old = hash_now()
        found = probe()
        verdict.check(found == before, f"{example.name}: before: {found!r} as written ({before!r})")
        gateway.write(policy=texts[1])
        began = time.monotonic()
        until(lambda: hash_now() != old, "the edit is active", 6)
        seen = time.monotonic() - began
        found = probe()
        verdict.check(found == after, f"{example.name}: after {seen:.1f} s: {found!r} as written ({after!r})")
        if example.name.startswith("04"):
            provider.set("qwen3-8b", first_token="20ms")

    running = asyncio.create_task(load())
    for example in sorted(path for path in EXAMPLES.iterdir() if path.is_dir()):
        await asyncio.to_thread(one_edit, example)
    stop.set()
    await running
    statuses = Counter(answer.status for answer in answers)
    failed = [answer for answer in answers if answer.status != 200 or b'"error"' in answer.body]
    verdict.check(
        not failed, f"{len(answers)} requests under load, statuses {dict(statuses)}, {len(failed)} failed"
    )


def broken(verdict: Verdict, gateway: Gateway, provider: Provider) -> None:
    shipped = REPOSITORY / "policies"
    original = {name: (shipped / name).read_text() for name in ("providers.yaml", "policy.yaml")}
    good = {**original, "providers.yaml": providers_for(provider.url, original["providers.yaml"])}
    gateway.write(good["providers.yaml"], good["policy.yaml"])
    gateway.reload()
    time.sleep(0.5)

    def served() -> tuple[int, str]:
        answer = gateway.chat(gateway.key("search"), f"still there? {time.monotonic()}", model="frontier")
        return answer.status_code, answer.headers.get("x-farthing-policy", "")

    _, active = served()
    refused = 0
    for variant in VARIANTS:
        at = gateway.log_path.stat().st_size
        text = original[variant.file].replace(variant.old, variant.new, 1)
        gateway.write(**{variant.file.split(".")[0]: text})
        gateway.reload()

        def said(at: int = at) -> str:
            with gateway.log_path.open() as log:
                log.seek(at)
                found = log.read()
            return found if "not reloaded" in found else ""

        try:
            log = until(said, "the log says why", 4)
        except AssertionError:
            log = ""
        line = next((x for x in log.splitlines() if variant.message in x and variant.remedy in x), "")
        good_answer = served() == (200, active)
        fine = bool(re.search(rf"{re.escape(variant.file)}:\d+:\d+ error", line)) and good_answer
        refused += fine
        if fine:
            verdict.say(f"refused: {line}")
        else:
            verdict.check(
                False, f"{variant.name}: {log.strip()[-200:]!r}, last good one serves: {good_answer}"
            )
        gateway.write(good["providers.yaml"], good["policy.yaml"])
        gateway.reload()
    verdict.check(
        refused >= 20, f"{refused} of {len(VARIANTS)} broken variants refused with line, column and remedy"
    )


if __name__ == "__main__":
    run(main)
