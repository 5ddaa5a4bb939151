"""One request as the ledger knows it: why that model answered, what it cost and what that saved.

Read by `farthing policy explain --request-id` and `GET /admin/requests/{id}`. Prompts are not in it: they are stored
nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, RowMapping
from sqlalchemy.exc import SQLAlchemyError

from router.adapters.journal import SETTLE, JournalReader, journal_folders
from router.adapters.sql.database import one_snapshot, unavailable
from router.adapters.sql.reports import Usd
from router.adapters.sql.schema import (
    adjustments,
    attempts,
    cache_candidates,
    cost_lines,
    labels,
    price_records,
    requests,
)
from router.core.errors import ConfigurationError, UnavailableError
from router.core.types import BUCKETS
from router.stages.exchange import ASIDE

MAX_ID = 64


def find_request(engine: Engine, journals: Path, request_id: str) -> dict[str, Any]:
    """Everything the ledger holds of one request, as nested mappings; money is `Usd` (see `as_json`).

    Raises ConfigurationError where no request has this id, UnavailableError where it is not booked yet or SQL does
    not answer.
    """
    if not request_id.isascii() or not request_id.isprintable() or len(request_id) > MAX_ID:
        raise ConfigurationError("request-id: an id looks like 0199aa11-2233-7456-89ab-cdef01234567.")
    found = _read(engine, request_id)
    if found is None:
        state = _journalled(journals, request_id)
        # Between the two looks its journal may have been booked and removed.
        found = _read(engine, request_id)
        if found is None and state is not None:
            raise UnavailableError(f"This request is still in the journal: {state}. Ask again in a moment.")
    if found is None:
        raise ConfigurationError(
            "No admitted request has this id. Take the one at the end of x-farthing-decision (refused requests are "
            "counted, not booked), and the same FARTHING_DATABASE_URL as the gateway."
        )
    return found


def as_json(value: object, *, indent: int | None = None) -> bytes:
    """JSON of nested mappings and lists whose money has the digits the reports print."""
    encoded = msgspec.json.encode(_plain(value))
    return encoded if indent is None else msgspec.json.format(encoded, indent=indent)


def _plain(value: object) -> object:
    if isinstance(value, Usd | Decimal):
        return msgspec.Raw(f"{value:f}".encode() if isinstance(value, Decimal) else str(value).encode())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _journalled(journals: Path, request_id: str) -> str | None:
    state: str | None = None
    for folder in journal_folders(journals):
        reader = JournalReader(folder)
        try:
            for frame in reader.frames():
                if frame.request_id == request_id:
                    if frame.kind == SETTLE:
                        return "it has ended and is about to be booked"
                    state = "it has not ended yet, or its gateway died"
        finally:
            reader.close()
    return state


def _read(engine: Engine, request_id: str) -> dict[str, Any] | None:
    try:
        with one_snapshot(engine) as connection:
            row = (
                connection.execute(sa.select(requests).where(requests.c.id == request_id)).mappings().first()
            )
            if row is None:
                return None
            corrections = connection.execute(
                sa.select(adjustments)
                .where(adjustments.c.request_id == request_id)
                .order_by(adjustments.c.created_at)
            )
            found = connection.execute(
                sa.select(cache_candidates).where(cache_candidates.c.request_id == request_id)
            )
            candidate = found.mappings().first()
            said = connection.execute(
                sa.select(labels).where(labels.c.request_id == request_id).order_by(labels.c.at, labels.c.id)
            )
            tried = _attempts(connection, request_id)
            known = _described(row, tried, corrections.mappings().all(), candidate)
            return {**known, "labels": _labels(said.mappings().all())}
    except SQLAlchemyError as error:
        raise unavailable(error) from None


def _attempts(connection: Connection, request_id: str) -> list[dict[str, Any]]:
    lines: dict[int, list[dict[str, Any]]] = {}
    query = sa.select(cost_lines).where(cost_lines.c.request_id == request_id)
    for line in connection.execute(query).mappings():
        lines.setdefault(line["attempt"], []).append(
            {
                "bucket": line["bucket"],
                "quantity": line["quantity"],
                "usd_per_million": Usd(line["unit_price"]),
                "list_usd_per_million": Usd(line["list_price"]),
                "amount_usd": Usd(line["amount"]),
                "list_amount_usd": Usd(line["list_amount"]),
                "price_id": line["price_id"],
            }
        )
    prices = price_records.c
    joined = (
        sa.select(
            attempts,
            prices.source.label("price_source"),
            prices.contract.label("price_contract"),
            prices.effective_from.label("price_from"),
        )
        .select_from(attempts.outerjoin(price_records, attempts.c.price_id == prices.id))
        .where(attempts.c.request_id == request_id)
        .order_by(attempts.c.attempt)
    )
    return [
        {
            "attempt": row["attempt"],
            "provider": row["provider"],
            "model": row["model"],
            "upstream_model": row["upstream_model"],
            "started_at": row["started_at"],
            "outcome": row["outcome"],
            "status_code": row["status_code"],
            "error": row["error"],
            "first_token_ms": row["first_token_ms"],
            "duration_ms": row["duration_ms"],
            "usage": _usage(row),
            "estimated": row["estimated"],
            "cost_usd": _usd(row["cost"]),
            "price": None
            if row["price_id"] is None
            else {
                "id": row["price_id"],
                "source": row["price_source"],
                "contract": row["price_contract"],
                "effective_from": row["price_from"],
            },
            "cost_lines": sorted(
                lines.get(row["attempt"], []), key=lambda line: BUCKETS.index(line["bucket"])
            ),
        }
        for row in connection.execute(joined).mappings()
    ]


def _described(
    row: RowMapping,
    tried: list[dict[str, Any]],
    corrections: Sequence[RowMapping],
    candidate: RowMapping | None,
) -> dict[str, Any]:
    cost, baseline = row["cost"], row["baseline"]
    saved = baseline - cost if cost is not None and baseline is not None else None
    return {
        "id": row["id"],
        "caller_request_id": row["caller_request_id"],
        "opened_at": row["opened_at"],
        "settled_at": row["settled_at"],
        "endpoint": row["endpoint"],
        "streamed": row["streamed"],
        "status": row["status"],
        "http_status": row["http_status"],
        "error": row["error"],
        "first_token_ms": row["first_token_ms"],
        "duration_ms": row["duration_ms"],
        "caller": {
            "key_id": row["key_id"],
            "team": row["team"],
            "app": row["app"],
            "cost_center": row["cost_center"],
            "tags": msgspec.json.decode(row["tags"]),
        },
        "decision": {
            "requested_model": row["requested_model"],
            "served_model": row["served_model"],
            "served_provider": row["served_provider"],
            "reason": row["decision"],
            "why": _why(row, tried),
            "class": row["prompt_class"],
            "difficulty": row["difficulty"],
            "confidence": row["confidence"],
            "encoder": row["encoder"],
            "propensity": row["propensity"],
            "dropped": msgspec.json.decode(row["dropped"]),
            "cache": row["cache"],
            "cache_entry": row["cache_entry"],
            "likeness": None if candidate is None else _likeness(candidate),
            "policy_hash": row["policy_hash"],
            "exceptions": msgspec.json.decode(row["exceptions"]),
        },
        "budgets": [{"budget": key, "period": period} for key, period in msgspec.json.decode(row["budgets"])],
        "usage": _usage(row),
        "attempts": tried,
        "money": {
            "cost_usd": _usd(cost),
            "estimated": row["estimated"],
            "unpriced": row["unpriced"],
            "held_usd": Usd(row["worst_case"]),
            "adjustments": [
                {
                    "id": entry["id"],
                    "created_at": entry["created_at"],
                    "amount_usd": Usd(entry["amount"]),
                    "reason": entry["reason"],
                    "author": entry["author"],
                }
                for entry in corrections
            ],
            "baseline_model": row["baseline_model"],
            "baseline_usd": _usd(baseline),
            "saved_usd": _usd(saved),
            "routing_usd": _usd(row["routing_savings"]),
            "cache_usd": _usd(row["cache_savings"]),
            "overhead_usd": _usd(row["overhead"]),
            "potential_usd": _usd(row["potential_savings"]),
        },
    }


def _labels(rows: Sequence[RowMapping]) -> list[dict[str, Any]]:
    """What is known of the answers' worth, the earliest first; `counts`: False where its key has corrected it."""
    newest: dict[tuple[str, str, str], int] = {}
    for row in rows:
        key = (row["model"], row["source"], row["key_id"])
        newest[key] = max(newest.get(key, row["revision"]), row["revision"])
    return [
        {
            "model": row["model"],
            "score": row["score"],
            "weight": row["weight"],
            "source": row["source"],
            "propensity": row["propensity"],
            "at": row["at"],
            "key_id": row["key_id"],
            "comment": row["comment"],
            "counts": row["revision"] == newest[row["model"], row["source"], row["key_id"]],
        }
        for row in rows
    ]


def _likeness(candidate: RowMapping) -> dict[str, Any]:
    """What the semantic cache found; its `threshold` is None where no probability would have been enough."""
    threshold = candidate["threshold"]
    return {
        "entry": candidate["entry"],
        "scope": candidate["scope"],
        "mode": candidate["mode"],
        "similarity": candidate["similarity"],
        "probability": candidate["probability"],
        "threshold": threshold if threshold <= 1 else None,
        "served": candidate["served"],
        "would_serve": candidate["would_serve"],
        "would_save_usd": _usd(candidate["saved"]),
        "reasons": msgspec.json.decode(candidate["reasons"]),
    }


REASONS: Mapping[str, str] = {
    "named": "the app asked for it by name",
    "cheapest": "the cheapest model that meets the class's quality and latency",
    "best": "nothing meets the class; the best of what is left",
    "probe": "left out for latency, and tried to see whether it has recovered",
    "budget_downgrade": "a budget is at its limit: the cheapest model that can answer",
    "exact": "the same request was answered before",
    "semantic": "a request that means the same was answered before",
}
"""Each reason of a decision, in words."""


OWN_CALLS: Mapping[str, str] = {
    "learn.shadow": "a second answer to a request that has ended, to learn from",
    "learn.judge": "it judges two answers to a request that has ended",
}
"""Calls nobody asked for but the policy (`learn`), by endpoint."""


def _why(row: RowMapping, tried: Sequence[Mapping[str, Any]]) -> str:
    if row["served_model"] is None:
        return "no model answered"
    if row["cache"] != "miss":
        return REASONS.get(row["cache"], "from a cache")
    if row["endpoint"] in OWN_CALLS:
        return OWN_CALLS[row["endpoint"]]
    reason: str = REASONS.get(row["decision"], row["decision"] or "not recorded: its gateway died")
    served = max((number for number, attempt in enumerate(tried, 1) if _serves(attempt)), default=1)
    before = tried[: served - 1]
    if any(attempt["error"] == "escalated" for attempt in before):
        return f"{reason}; attempt {served}, as the answer of a cheaper model was found wanting"
    return reason if not before else f"{reason}; attempt {served}, as the ones before failed"


def _serves(attempt: Mapping[str, Any]) -> bool:
    """As `router/stages/exchange.py` tells which attempt's answer reached the caller."""
    return attempt["outcome"] not in ("failed", "timeout") and attempt["error"] not in ASIDE


def _usage(row: RowMapping) -> dict[str, int]:
    return {bucket: row[f"tokens_{bucket}"] for bucket in BUCKETS if row[f"tokens_{bucket}"]}


def _usd(amount: int | None) -> Usd | None:
    return None if amount is None else Usd(amount)
