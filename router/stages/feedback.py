"""`POST /v1/feedback`: how good an answer was, told by who got it."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

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


def read_score(body: bytes) -> Score:
    """Raises InvalidRequest naming the field and the remedy."""
    values = parse_object(body).values
    for name in values:
        if name not in _FIELDS:
            shown = "".join(c for c in name[:64] if c.isprintable() and c not in "\"'\\")
            raise InvalidRequest(
                f"'{shown}' is not known here. Feedback takes request_id, score and comment.", param=shown
            )
    request_id = values.get("request_id")
    if not isinstance(request_id, str) or not request_id or len(request_id) > MAX_ID:
        raise InvalidRequest(
            "'request_id' must be the id of the request: the answer's header x-request-id.",
            param="request_id",
        )
    score = values.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise InvalidRequest("'score' must be a number from 0 (no use) to 1 (good).", param="score")
    comment = values.get("comment")
    if comment is not None and not isinstance(comment, str):
        raise InvalidRequest("'comment' must be text.", param="comment")
    if comment is not None and len(comment) > MAX_COMMENT:
        raise InvalidRequest(f"'comment' is longer than {MAX_COMMENT} characters.", param="comment")
    return Score(request_id, float(score), comment or None)


class Feedback:
    def __init__(self, store: FeedbackStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._tokens: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def give(self, caller: Caller, body: bytes) -> Score:
        """Keeps the score. The same again changes nothing; another one of the same key corrects it.

        Raises InvalidRequest, RateLimited, NotFound where the caller's team has no such request, Overloaded where it
        is not in the ledger yet.
        """
        self._take(caller.key_id)
        score = read_score(body)
        await self._store.keep(caller, score.request_id, score.score, score.comment)
        return score

    def _take(self, key_id: str) -> None:
        """A token bucket for each key."""
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
