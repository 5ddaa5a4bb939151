"""What SQL and the journals know of money spent: where budget counters are seeded from."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from router.adapters.journal import SETTLE, JournalReader, journal_folders
from router.adapters.sql.database import one_snapshot, unavailable
from router.adapters.sql.ledger import existing_ids
from router.adapters.sql.schema import budget_spend
from router.core.types import BudgetWindow, NanoUSD


class _Charge(msgspec.Struct):
    """The part of a settled record that budgets are counted from; the rest is not decoded."""

    budgets: tuple[BudgetWindow, ...]
    cost: int | None
    worst_case: int


_charge_decoder = msgspec.msgpack.Decoder(_Charge)


def journalled_ids(folder: Path) -> set[str]:
    """Every request that some journal still holds, in SQL already or not."""
    found: set[str] = set()
    for journal in journal_folders(folder):
        reader = JournalReader(journal)
        try:
            found.update(frame.request_id for frame in reader.frames())
        finally:
            reader.close()
    return found


def journalled_charges(folder: Path) -> dict[str, _Charge]:
    """Every settled request that some journal still holds, in SQL already or not."""
    found: dict[str, _Charge] = {}
    for journal in journal_folders(folder):
        reader = JournalReader(journal)
        try:
            for frame in reader.frames():
                if frame.kind == SETTLE:
                    found[frame.request_id] = _charge_decoder.decode(frame.payload)
        finally:
            reader.close()
    return found


class SqlSpendSource:
    """`ports.SpendSource`: what is booked, and what is settled and not booked yet."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        """`folder` holds all journals of this data folder."""
        self._engine = engine
        self._folder = folder

    async def spent(self, windows: Sequence[BudgetWindow]) -> Mapping[BudgetWindow, NanoUSD]:
        """Raises UnavailableError when SQL does not answer: what was spent is not known then."""
        return await asyncio.to_thread(self.spent_now, windows)

    def spent_now(self, windows: Sequence[BudgetWindow]) -> dict[BudgetWindow, NanoUSD]:
        """The same for a caller with a thread of its own."""
        # Journals first: what leaves them while we look is in SQL by then, and counted once by its id.
        charges = journalled_charges(self._folder)
        amounts = dict.fromkeys(windows, 0)
        query = sa.select(budget_spend).where(budget_spend.c.key.in_({window.key for window in windows}))
        try:
            with one_snapshot(self._engine) as connection:
                for row in connection.execute(query):
                    window = BudgetWindow(row.key, row.period)
                    if window in amounts:
                        amounts[window] += row.spent
                booked = existing_ids(connection, list(charges))
        except SQLAlchemyError as error:
            raise unavailable(error) from None
        for request_id, charge in charges.items():
            if request_id in booked:
                continue
            for window in charge.budgets:
                if window in amounts:
                    amounts[window] += charge.worst_case if charge.cost is None else charge.cost
        return {window: NanoUSD(amount) for window, amount in amounts.items()}
