"""`farthing cache`: what the caches did, and what they may no longer serve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from router.adapters.sql import reports
from router.adapters.sql.cache_book import BookedRule, list_rules, names_something
from router.adapters.sql.cache_book import invalidate as book_rule
from router.adapters.sql.cache_report import MaxError, cache_report, policy_bound
from router.core.cached import InvalidationKind
from router.core.errors import ConfigurationError
from router.settings import Settings

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

BY = ("team", "app")
_MEANT: dict[InvalidationKind, str] = {
    "all": "no answer stored until now is served any more, whoever asks: a new epoch begins",
    "team": "no answer stored until now for team {} is served any more",
    "app": "no answer stored until now for app {} is served any more",
    "model": "no answer stored until now from model {} is served any more",
    "tag": "no answer stored until now for a request with tag {} is served any more",
    "scope": "no answer stored until now in scope {} is served any more",
    "entry": "the answer of request {} is never served again",
}


def stats(
    settings: Settings,
    engine: Engine,
    *,
    by: Sequence[str] = BY,
    since: str | None,
    until: str | None,
    form: reports.Format,
) -> str:
    """The report on the caches; as a table also the newest rules. Without a readable policy no bound is known, and
    nothing can be said of what its scopes lack.
    """
    now = datetime.now(UTC)
    bound, unread = _bound(settings, now)
    report = cache_report(
        engine,
        settings.journals,
        by,
        reports.moment(since, now) if since else None,
        reports.moment(until, now) if until else None,
        max_error=bound,
    )
    text = reports.render(report, form)
    if form != "table":
        return text
    rules = list_rules(engine, 5, without_entries=True)
    lines = [text]
    if unread is not None:
        lines.append(f"How many labels scopes lack is not known: the policy could not be read ({unread}).")
    if rules:
        lines += ["Newest rules against stored answers ('farthing cache list-invalidations' has all):"]
        lines += [f"  {_line(rule)}" for rule in rules]
    return "\n".join(lines).rstrip() + "\n"


def _bound(settings: Settings, now: datetime) -> tuple[MaxError, str | None]:
    from router.adapters.configuration import load
    from router.adapters.price_catalogue import shipped_catalogue

    try:
        return policy_bound(load(settings.config, shipped_catalogue()), now), None
    except ConfigurationError as error:
        return (lambda team, app, tags: None), str(error).splitlines()[0]


def invalidate(
    engine: Engine, kind: InvalidationKind, value: str, reason: str | None, *, json_form: bool
) -> str:
    """Books a rule and says what it does and when."""
    rule = book_rule(engine, kind, value, at=datetime.now(UTC), by="cli", reason=reason)
    found = names_something(engine, rule)
    if json_form:
        return json.dumps({**_shown(BookedRule(rule, "cli", reason)), "names_booked_requests": found})
    lines = [
        f"Rule {rule.id}: {_MEANT[kind].format(rule.value)}. Running gateways hold to it within 5 seconds, also "
        "where Redis is emptied or restored."
    ]
    if not found:
        lines.append(f"No booked request has this {kind}: is it written as in 'farthing cache stats'?")
    return "\n".join(lines)


def listing(engine: Engine, limit: int, *, json_form: bool) -> str:
    rules = list_rules(engine, limit)
    if json_form:
        return json.dumps([_shown(rule) for rule in rules])
    return "\n".join(_line(rule) for rule in rules) or "No stored answer was ever taken back."


def _line(booked: BookedRule) -> str:
    rule = booked.rule
    named = f"{rule.kind} {rule.value}".rstrip()
    reason = f"  {booked.reason}" if booked.reason else ""
    return f"{rule.id}  {rule.at.isoformat(timespec='seconds')}  {named}  by {booked.by}{reason}"


def _shown(booked: BookedRule) -> dict[str, object]:
    rule = booked.rule
    return {
        "id": rule.id,
        "at": rule.at.isoformat(),
        "kind": rule.kind,
        "value": rule.value,
        "by": booked.by,
        "reason": booked.reason,
    }
