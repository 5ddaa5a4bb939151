"""The part of `farthing demo` on the semantic cache: what is asked again in other words, and what only looks so.

Each example is a stored question and one asked later, of one team whose policy says `semantic: enforce`. What is
printed is what happened: the answers' headers, and the ledger's rows of these very requests.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from router.adapters.price_catalogue import shipped_policies
from router.core.errors import UnavailableError

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

TEAM, APP = "helpdesk", "faq"
INSTRUCTIONS = "You answer customers of a web shop."
REFUSED = "nearest stored answer refused: "
ROUNDS = 4
STORING, BOOKING = 0.7, 60.0
"""Seconds until what was answered can be found by all workers, at least; and until it is booked, at most."""

Ask = Callable[[int, str, str], Awaitable[Mapping[str, str]]]
"""(worker, instructions, question) -> the answer's headers. Raises OpenAIError."""


@dataclass(frozen=True, slots=True)
class Example:
    """`same`: the stored answer is right for what is asked."""

    stored: str
    asked: str
    same: bool


@dataclass(slots=True)
class Shown:
    """What came of an example, by the headers of both answers."""

    example: Example
    stored: Mapping[str, str]
    asked: Mapping[str, str]
    wrong: list[str] = field(default_factory=list)

    @property
    def refusal(self) -> str | None:
        """Why the gateway says it did not give the stored answer."""
        parts = self.asked.get("x-farthing-decision", "").split("; ")
        return next((part for part in parts if part.startswith(REFUSED)), None)

    @property
    def as_meant(self) -> bool:
        outcome = self.asked.get("x-farthing-cache")
        return outcome == "semantic" if self.example.same else outcome == "miss" and self.refusal is not None


def read_examples() -> tuple[Example, ...]:
    text = (shipped_policies() / "demo" / "reworded.json").read_text(encoding="utf-8")
    return tuple(Example(**one) for one in json.loads(text))


async def tried(ask: Ask, examples: Sequence[Example], workers: int) -> list[Shown]:
    """Stores with the first worker and asks the last one.

    A look-up that takes too long on a busy machine is a miss: then everything is asked once more, under other
    instructions, where nothing is stored yet. An answer out of the cache that should not be stays what it is.
    """
    shown: list[Shown] = []
    for round_ in range(ROUNDS):
        instructions = INSTRUCTIONS if not round_ else f"{INSTRUCTIONS} This is shift {round_ + 1}."
        stored = [await ask(0, instructions, example.stored) for example in examples]
        await asyncio.sleep(STORING * (round_ + 1))
        asked = [await ask(workers - 1, instructions, example.asked) for example in examples]
        shown = [Shown(*one) for one in zip(examples, stored, asked, strict=True)]
        if all(one.as_meant or one.asked.get("x-farthing-cache") == "semantic" for one in shown):
            break
    return shown


def show(
    say: Callable[[str], None], engine: Engine, journals: Path, shown: Sequence[Shown], workers: int
) -> bool:
    """Prints each example with what the ledger holds of it. False where something is not as it should be."""
    first, last = ("", "") if workers == 1 else (" [dim](worker 1)[/]", f" [dim](worker {workers})[/]")
    good = True
    for one in shown:
        row = _booked(engine, journals, _id(one.asked))
        say(f"  [cyan]stored[/]   {escape(one.example.stored)}{first}")
        say(f"  [cyan]asked[/]    {escape(one.example.asked)}{last}")
        money, decision = row["money"], row["decision"]
        if decision["cache"] == "semantic":
            words = one.asked["x-farthing-decision"].rpartition("; ")[0]
            say(f"  [green]served[/]   {escape(words)}")
            say(
                f"           {_usd(money['cost_usd'])} USD billed, {_usd(money['cache_usd'])} USD avoided; "
                f"the answer was made for request {decision['cache_entry']}"
            )
        else:
            say(f"  [yellow]refused[/]  {escape((one.refusal or 'no reason given').removeprefix(REFUSED))}")
            say(f"           {decision['served_model']} answered for {_usd(money['cost_usd'])} USD")
        for problem in problems(one, row):
            good = False
            say(f"  [bold red]wrong[/]    {escape(problem)}")
        say("")
    return good


def problems(one: Shown, row: Mapping[str, Any]) -> list[str]:
    """What is not as it should be, by the headers and by the ledger's row of what was asked."""
    decision, money = row["decision"], row["money"]
    found = []
    if not one.as_meant:
        meant = "is served by likeness" if one.example.same else "is refused, with a reason"
        found.append(f"this question {meant}, or the demo fails: {one.asked.get('x-farthing-decision')}")
    if decision["cache"] != one.asked.get("x-farthing-cache"):
        found.append(f"the ledger books {decision['cache']}")
    if decision["cache"] == "semantic":
        candidate = decision["likeness"]
        if decision["cache_entry"] != _id(one.stored):
            found.append(f"the answer is not that of the stored question, {_id(one.stored)}")
        if candidate is None or not candidate["served"] or candidate["entry"] != decision["cache_entry"]:
            found.append("the ledger holds no candidate that was served")
        if money["cost_usd"].nano or money["cache_usd"].nano <= 0:
            found.append("an answer out of a cache costs nothing and saves something")
    elif not money["cost_usd"].nano or not row["attempts"]:
        found.append("no model was paid for this answer")
    return found


def _usd(amount: object) -> str:
    """Exact, without zeros at the end."""
    return str(amount).rstrip("0").rstrip(".")


def _id(headers: Mapping[str, str]) -> str:
    return headers["x-request-id"]


def _booked(engine: Engine, journals: Path, request_id: str) -> dict[str, Any]:
    """Raises UnavailableError where it is not booked in time."""
    from router.adapters.sql.lookup import find_request

    end = time.monotonic() + BOOKING
    while True:
        try:
            return find_request(engine, journals, request_id)
        except UnavailableError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
