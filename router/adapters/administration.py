"""What the admin plane does, over SQL, the journals and the configuration watch. Methods that ask SQL block."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.engine import Engine

from router.adapters.configuration import ConfigurationWatch
from router.adapters.sql import reports
from router.adapters.sql.cache_book import BookedRule, SqlCacheBook, invalidate, list_rules
from router.adapters.sql.cache_report import cache_report, policy_bound
from router.adapters.sql.keys import KeyEntry, adopt_key, create_key, list_keys, revoke_key
from router.adapters.sql.lookup import as_json, find_request
from router.adapters.sql.verify import verify
from router.core.cached import InvalidationKind, SemanticStore
from router.core.errors import ConfigurationError, InvalidRequest, NotFound, Overloaded, UnavailableError
from router.core.ports import Clock

Answer = TypeVar("Answer")

log = logging.getLogger("farthing")


class SqlAdministration:
    """`router.api.admin.Administration`. `engine` is one of its own: a report over years must not keep connections
    from the writer. `status` says how the worker does; it is called on the event loop and never blocks.
    """

    def __init__(
        self,
        engine: Engine,
        secret: bytes,
        journals: Path,
        watch: ConfigurationWatch,
        clock: Clock,
        status: Callable[[], Mapping[str, Any]],
        book: SqlCacheBook,
        answers: SemanticStore,
    ) -> None:
        self._engine = engine
        self._secret = secret
        self._journals = journals
        self._watch = watch
        self._clock = clock
        self._status = status
        self._book = book
        self._answers = answers
        self._verifying = threading.Lock()

    # -- keys --

    def keys(self) -> list[dict[str, Any]]:
        return [_shown(entry) for entry in _asked(lambda: list_keys(self._engine))]

    def create_key(
        self, team: str, app: str | None, tags: Mapping[str, tuple[str, ...]]
    ) -> tuple[str, dict[str, Any]]:
        key, entry = _asked(lambda: create_key(self._engine, self._secret, team, app, tags))
        log.info("admin plane: key %s of team %s is made", entry.id, entry.team)
        return key, _shown(entry)

    def adopt_key(
        self, key: str, team: str, app: str | None, tags: Mapping[str, tuple[str, ...]]
    ) -> dict[str, Any]:
        entry = _asked(lambda: adopt_key(self._engine, self._secret, key, team, app, tags))
        log.info("admin plane: key %s of team %s is adopted", entry.id, entry.team)
        return _shown(entry)

    def revoke_key(self, key_id: str) -> dict[str, Any]:
        try:
            entry = revoke_key(self._engine, key_id)
        except ConfigurationError:
            raise NotFound(
                "No key has this id. GET /admin/keys lists them.", param="id", code="key_not_found"
            ) from None
        except UnavailableError as error:
            raise _away(error) from None
        log.info("admin plane: key %s of team %s is revoked", entry.id, entry.team)
        return _shown(entry)

    # -- policy --

    def policy(self) -> dict[str, Any]:
        watch = self._watch
        return {
            "hash": watch.current.hash,
            "loaded_at": watch.loaded_at,
            "warnings": [str(problem) for problem in watch.warnings],
            "last_error": watch.last_error,
        }

    def reload_policy(self) -> bool:
        changed = self._watch.reload()
        if self._watch.last_error is not None:
            raise InvalidRequest(
                f"The files were not loaded, the last good configuration stays active:\n{self._watch.last_error}",
                code="invalid_configuration",
            )
        return changed

    # -- reports, ledger --

    def report(self, kind: str, by: Sequence[str], since: str | None, until: str | None, form: str) -> str:
        """`kind` is spend, savings, budgets or cache; budgets take neither `by` nor a span."""
        return _asked(lambda: self._report(kind, by, since, until, form))

    def _report(self, kind: str, by: Sequence[str], since: str | None, until: str | None, form: str) -> str:
        now = self._clock.now()
        if kind == "budgets":
            snapshot = self._watch.current
            limits, period = snapshot.budgets(now)
            report = reports.budgets_report(
                self._engine, self._journals, limits, period, lambda team: snapshot.team_budget(team, now)
            )
            return reports.render(report, form)
        if kind == "cache":
            since_at, until_at = _moment(since, now), _moment(until, now)
            bound = policy_bound(self._watch.current, now)
            report = cache_report(self._engine, self._journals, by, since_at, until_at, max_error=bound)
            return reports.render(report, form)
        read = reports.spend_report if kind == "spend" else reports.savings_report
        report = read(self._engine, self._journals, by, _moment(since, now), _moment(until, now))
        return reports.render(report, form)

    def verify(self) -> dict[str, Any]:
        if not self._verifying.acquire(blocking=False):
            raise Overloaded(
                "The ledger is being verified already. Ask again when that is done.", retry_after=5
            )
        try:
            found = _asked(lambda: verify(self._engine, self._journals))
        finally:
            self._verifying.release()
        return {
            "agrees": not found.differences,
            "requests": found.requests,
            "unsettled": found.unsettled,
            "differences": [
                {
                    "where": difference.where,
                    "what": difference.what,
                    "stored": str(difference.stored),
                    "expected": str(difference.expected),
                }
                for difference in found.differences
            ],
        }

    def request(self, request_id: str) -> bytes:
        try:
            return as_json(find_request(self._engine, self._journals, request_id), indent=2) + b"\n"
        except ConfigurationError as error:
            raise NotFound(str(error), param="id", code="request_not_found") from None
        except UnavailableError as error:
            raise _away(error) from None

    # -- caches --

    async def cache(self) -> dict[str, Any]:
        rules = await asyncio.to_thread(_asked, lambda: list_rules(self._engine))
        try:
            size = await self._answers.size() if self._answers.up else None
        except UnavailableError:
            size = None
        return {
            "generation": self._book.invalidations.generation,
            "sql_up": self._book.sql_up,
            "store": {
                "up": size is not None,
                "entries": size.entries if size else None,
                "partitions": size.partitions if size else None,
                "bytes": sum(size.bytes.values()) if size else None,
            },
            "invalidations": [_taken_back(rule) for rule in rules],
        }

    def invalidate(self, kind: InvalidationKind, value: str, reason: str | None) -> dict[str, Any]:
        rule = _asked(
            lambda: invalidate(
                self._engine, kind, value, at=self._clock.now(), by="admin", reason=reason or None
            )
        )
        log.info("admin plane: rule %d takes stored answers back (%s)", rule.id, kind)
        with suppress(UnavailableError):  # it is booked, and read in a moment
            self._book.refresh_now()
        return _taken_back(BookedRule(rule, "admin", reason or None))

    # -- health --

    def health(self) -> Mapping[str, Any]:
        return self._status()


def _taken_back(booked: BookedRule) -> dict[str, Any]:
    rule = booked.rule
    return {
        "id": rule.id,
        "at": rule.at,
        "kind": rule.kind,
        "value": rule.value,
        "by": booked.by,
        "reason": booked.reason,
    }


def _asked(ask: Callable[[], Answer]) -> Answer:
    try:
        return ask()
    except ConfigurationError as error:
        field, separator, _ = str(error).partition(":")
        raise InvalidRequest(
            str(error), param=field if separator and field.isidentifier() else None
        ) from None
    except UnavailableError as error:
        raise _away(error) from None


def _away(error: UnavailableError) -> Overloaded:
    return Overloaded(str(error), retry_after=2)


def _moment(text: str | None, now: datetime) -> datetime | None:
    return reports.moment(text, now) if text else None


def _shown(entry: KeyEntry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "team": entry.team,
        "app": entry.app,
        "tags": entry.tags,
        "adopted": entry.adopted,
        "created_at": entry.created_at,
        "revoked_at": entry.revoked_at,
    }
