"""`core.cached.CacheBook` in memory: the twin of `sql.cache_book.SqlCacheBook`, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from router.core.cached import CacheLabel, Invalidation, Invalidations, RuleKind

FEEDBACK = "feedback"


class MemoryCacheBook:
    def __init__(self) -> None:
        self._rules: list[Invalidation] = []
        self._labels: list[CacheLabel] = []
        self._booked: set[tuple[str, str, str, str]] = set()
        self.invalidations = Invalidations()
        self.revision = 0

    def invalidate(self, kind: RuleKind, value: str, at: datetime) -> Invalidation:
        rule = Invalidation(len(self._rules) + 1, kind, value, at)
        self._rules.append(rule)
        self.invalidations = Invalidations(self._rules)
        return rule

    def book(self, *labels: CacheLabel) -> None:
        """What comes again for the same request, entry, source and key changes nothing."""
        for label in labels:
            key = (label.request_id, label.entry, label.source, label.key_id)
            if label.source == FEEDBACK or key in self._booked:
                continue
            self._booked.add(key)
            self._labels.append(label)
            self.revision += 1

    def labels(self, scope: str) -> Sequence[CacheLabel]:
        return tuple(label for label in self._labels if label.scope == scope)

    def pool(self, scope: str) -> Sequence[CacheLabel]:
        first = next((at for at, label in enumerate(self._labels) if label.scope == scope), None)
        return tuple(self._labels[:first])
