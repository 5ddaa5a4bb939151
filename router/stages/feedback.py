"""`POST /v1/feedback` and `/v1/cache/feedback`: how good an answer was, told by who got it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router.core.cached import HitFeedbackStore, JudgedHit
from router.core.errors import InvalidRequest, RateLimited
from router.core.json_object import parse_object
from router.core.ports import Clock, FeedbackStore
from router.core.types import Caller

MAX_BODY = 64 * 1024
MAX_ID = 64
MAX_COMMENT = 2_000
PER_SECOND = 50.0
BURST = 500.0
"""Scores of one key, per worker: an app that scores every answer stays far below."""
_KEYS = 10_000
_FIELDS = ("request_id", "score", "comment")


@dataclass(frozen=True, slots=True)
class Score:
    """`score` 0 (no use) to 1 (as good as can be)."""

    request_id: str
    score: float
    comment: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an answer out of a cache was right for the request it was given to."""

    request_id: str
    correct: bool
    comment: str | None = None


def read_score(body: bytes) -> Score:
    """Raises InvalidRequest naming the field and the remedy."""
    values = _fields(body, _FIELDS, "Feedback takes request_id, score and comment.")
    score = values.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise InvalidRequest("'score' must be a number from 0 (no use) to 1 (good).", param="score")
    return Score(_request_id(values), float(score), _comment(values))


def read_verdict(body: bytes) -> Verdict:
    """Raises InvalidRequest naming the field and the remedy."""
    values = _fields(
        body,
        ("request_id", "correct", "comment"),
        "Feedback on the cache takes request_id, correct and comment.",
    )
    correct = values.get("correct")
    if not isinstance(correct, bool):
        raise InvalidRequest("'correct' must be true or false.", param="correct")
    return Verdict(_request_id(values), correct, _comment(values))


def _fields(body: bytes, known: Sequence[str], taken: str) -> Mapping[str, Any]:
    values = parse_object(body).values
    for name in values:
        if name not in known:
            shown = "".join(c for c in name[:64] if c.isprintable() and c not in "\"'\\")
            raise InvalidRequest(f"'{shown}' is not known here. {taken}", param=shown)
    return values


def _request_id(values: Mapping[str, Any]) -> str:
    request_id = values.get("request_id")
    if not isinstance(request_id, str) or not request_id or len(request_id) > MAX_ID:
        raise InvalidRequest(
            "'request_id' must be the id of the request: the answer's header x-request-id.",
            param="request_id",
        )
    return request_id


def _comment(values: Mapping[str, Any]) -> str | None:
    comment = values.get("comment")
    if comment is not None and not isinstance(comment, str):
        raise InvalidRequest("'comment' must be text.", param="comment")
    if comment is not None and len(comment) > MAX_COMMENT:
        raise InvalidRequest(f"'comment' is longer than {MAX_COMMENT} characters.", param="comment")
    return comment or None


class Feedback:
    def __init__(self, store: FeedbackStore, clock: Clock) -> None:
        self._store = store
        self._allowance = _Allowance(clock)

    async def give(self, caller: Caller, body: bytes) -> Score:
        """Keeps the score. The same again changes nothing; another one of the same key corrects it.

        Raises InvalidRequest, RateLimited, NotFound where the caller's team has no such request, Overloaded where it
        is not in the ledger yet.
        """
        self._allowance.take(caller.key_id)
        score = read_score(body)
        await self._store.keep(caller, score.request_id, score.score, score.comment)
        return score


class CacheFeedback:
    """`quarantine` takes an entry out of the stores and of this worker's book at once. It raises nothing: the rule
    that names the entry is in SQL by then, and every worker reads it within seconds.
    """

    def __init__(
        self, store: HitFeedbackStore, quarantine: Callable[[str], Awaitable[None]], clock: Clock
    ) -> None:
        self._store = store
        self._quarantine = quarantine
        self._allowance = _Allowance(clock)

    async def give(self, caller: Caller, body: bytes) -> tuple[Verdict, JudgedHit]:
        """Keeps the verdict; a wrong answer is not served again. Raises as `Feedback.give` does."""
        self._allowance.take(caller.key_id)
        verdict = read_verdict(body)
        judged = await self._store.judge(caller, verdict.request_id, verdict.correct, verdict.comment)
        if not verdict.correct:
            await self._quarantine(judged.entry)
        return verdict, judged


class _Allowance:
    """A token bucket for each key."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._tokens: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key_id: str) -> None:
        """Raises RateLimited."""
        now = self._clock.monotonic()
        tokens, at = self._tokens.pop(key_id, (BURST, now))
        tokens = min(BURST, tokens + PER_SECOND * (now - at))
        refused = tokens < 1
        self._tokens[key_id] = (tokens if refused else tokens - 1, now)
        if len(self._tokens) > _KEYS:
            self._tokens.popitem(last=False)
        if refused:
            raise RateLimited(
                "This key gives more feedback than is taken. Send it later.",
                retry_after=math.ceil((1 - tokens) / PER_SECOND),
            )
