"""What the checked answers of a scope allow: the threshold at which its own evidence holds the user's bound.

`classifiers/pairs/bound.py` says how; here it is asked off the event loop whenever labels came in, and remembered.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from classifiers.pairs.bound import Certificate, Labelled, Prior, binomial_tail, certify
from router.core.cached import CacheBook, CacheLabel

log = logging.getLogger("farthing")

SCOPES = 10_000
"""Scopes remembered."""
PAUSE = 2.0
"""Seconds between two looks at one scope."""
RETRY = 60.0
"""Seconds until labels that could not be weighed are looked at again."""
WINDOWS = (60, 120, 250, 500)
SURPRISE = 0.002
"""A scope stops serving when so many of its latest labels are wrong as the bound would allow this rarely."""
JUDGE = "judge"


@dataclass(frozen=True, slots=True)
class Standing:
    """What a scope's evidence says at one moment.

    `threshold`: at or above it answers are served; None: nothing is certified.
    `broken`: nothing may be served, for the latest labels at or above the threshold in force are wrong more often
    than the bound allows, or what they say is not known.
    """

    threshold: float | None = None
    broken: bool = False


NOTHING_KNOWN = Standing()
NOT_WEIGHED = Standing(broken=True)
"""There are labels, and nobody has weighed them yet: until then nothing is served."""


@dataclass(slots=True)
class _Known:
    standing: Standing
    revision: int
    looked_at: float
    labels: tuple[int, CacheLabel] | None = None
    """How many there were, and the newest."""
    prior: tuple[int, Prior] | None = None
    looking: bool = False


class Evidence:
    """`monotonic` gives seconds. Belongs to one event loop."""

    def __init__(self, book: CacheBook, monotonic: Callable[[], float]) -> None:
        self._book = book
        self._monotonic = monotonic
        self._known: OrderedDict[tuple[str, float, bool], _Known] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    def standing(self, scope: str, max_error: float, shipped: Callable[[], float] | None = None) -> Standing:
        """What is known by now; newer labels are looked at beside the request and count for the next one.

        `shipped` (mode `enforce`): gives the threshold in force; asked in another thread. None: it is certified.
        """
        key = (scope, max_error, shipped is None)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = _Known(
                NOT_WEIGHED if self._book.labels(scope) else NOTHING_KNOWN, -1, float("-inf")
            )
            if len(self._known) > SCOPES:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        now, revision = self._monotonic(), self._book.revision
        if known.revision != revision and not known.looking and now - known.looked_at >= PAUSE:
            known.looking, known.revision, known.looked_at = True, revision, now
            task = asyncio.get_running_loop().create_task(self._look(known, scope, max_error, shipped))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return known.standing

    async def settled(self) -> None:
        """Waits for the looks under way."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _look(
        self, known: _Known, scope: str, max_error: float, shipped: Callable[[], float] | None
    ) -> None:
        try:
            labels = self._book.labels(scope)
            seen = (len(labels), labels[-1]) if labels else None
            if seen == known.labels:
                return  # what came in was of other scopes
            known.labels = seen
            if not labels:
                known.standing = NOTHING_KNOWN
            elif shipped is not None:
                known.standing = await asyncio.to_thread(_enforced, labels, max_error, shipped)
            else:
                pool = self._book.pool(scope)
                known.standing, known.prior = await asyncio.to_thread(
                    _certified, labels, pool, max_error, known.prior
                )
        except Exception:
            log.exception("the evidence of a scope of the semantic cache could not be weighed")
            known.standing, known.labels, known.revision = NOT_WEIGHED, None, -1
            known.looked_at += RETRY - PAUSE
        finally:
            known.looking = False


def _certified(
    labels: Sequence[CacheLabel],
    pool: Sequence[CacheLabel],
    max_error: float,
    prior: tuple[int, Prior] | None,
) -> tuple[Standing, tuple[int, Prior] | None]:
    if pool and (prior is None or prior[0] != len(pool)):
        prior = (len(pool), Prior.of(labelled(pool)))
    standing, _ = certified(labels, prior[1] if prior and pool else None, max_error)
    return standing, prior


def certified(
    labels: Sequence[CacheLabel], prior: Prior | None, max_error: float
) -> tuple[Standing, Certificate]:
    """What a scope's labels, in the order they were booked, allow in mode `certified`."""
    # What is checked depends on the scope's state before the request and never on the score, so within a scope every
    # label is as good a draw of its candidates as any other: all count the same.
    counts = counted(labels)
    certificate = certify(labelled(counts), max_error=max_error, prior=prior)
    threshold = certificate.threshold
    broken = threshold is not None and _drifted(labels, counts, threshold, max_error)
    return Standing(threshold, broken), certificate


def _enforced(labels: Sequence[CacheLabel], max_error: float, shipped: Callable[[], float]) -> Standing:
    # Two right answers are seldom said in the same words: only a judge can break what ships with Farthing.
    judged = [label for label in labels if label.source == JUDGE]
    threshold = shipped()
    return Standing(threshold, _drifted(judged, counted(judged), threshold, max_error))


def counted(labels: Sequence[CacheLabel]) -> Sequence[CacheLabel]:
    """Of each key at most as many as of all the others together, in the order in which they come to count: what is
    beyond waits until others have said more. One key alone counts in full, as it speaks for nobody else.

    Which labels count, and when, depends on their keys and never on what they say, so they are as good a draw as all.
    """
    if len({label.key_id for label in labels}) < 2:
        return labels
    found: list[CacheLabel] = []
    said: Counter[str] = Counter()
    count: Counter[str] = Counter()
    waiting: dict[str, deque[CacheLabel]] = {}
    for number, label in enumerate(labels, 1):
        said[label.key_id] += 1
        waiting.setdefault(label.key_id, deque()).append(label)
        # Only one key can be ahead of all the others, so there are never more than two of them here.
        for key in tuple(waiting):
            queue = waiting[key]
            while queue and count[key] < number - said[key]:
                found.append(queue.popleft())
                count[key] += 1
            if not queue:
                del waiting[key]
    return found


def _drifted(
    labels: Sequence[CacheLabel], counts: Sequence[CacheLabel], threshold: float, max_error: float
) -> bool:
    # Of all labels, so that a change is seen soon; of those that count, so that no key can drown what others find.
    return drifted(labels, threshold, max_error) or (
        counts is not labels and drifted(counts, threshold, max_error)
    )


def drifted(labels: Sequence[CacheLabel], threshold: float, max_error: float) -> bool:
    """Whether the latest labels at or above the threshold show that the error has passed the bound.

    An exact binomial test over the latest 60, 120, 250 and 500 (or as many as there are, from 20 on).
    """
    wrong = [not label.right for label in labels if label.score >= threshold]
    for window in WINDOWS:
        latest = wrong[-window:]
        bad = sum(latest)
        if len(latest) >= 20 and bad and 1 - binomial_tail(bad - 1, len(latest), max_error) < SURPRISE:
            return True
    return False


def labelled(labels: Sequence[CacheLabel]) -> list[Labelled]:
    return [Labelled(label.score, label.right) for label in labels]
