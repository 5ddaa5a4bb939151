"""The exact cache: the same request, of the same scope, under the same rules."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import msgspec

from router.core.policy import EffectivePolicy
from router.core.ports import CacheStore
from router.core.types import Caller, ChatRequest, NanoUSD, Usage
from router.stages.admit import Wishes

# How an answer travels and who asks do not change what it says.
_OUTSIDE_KEY = ("stream", "stream_options", "user", "metadata", "model", "safety_identifier")
_JITTER = 0.1


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """A complete answer as the provider sent it. `stored_at` is seconds since the epoch."""

    entry: str
    stored_at: float
    stream: bool
    body: bytes
    content_type: str
    model: str
    provider: str
    upstream_model: str
    prompt_class: str | None
    usage: Usage
    cost: NanoUSD | None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(StoredAnswer)


class ExactCache:
    def __init__(self, store: CacheStore, secret: bytes) -> None:
        self._store = store
        self._secret = secret

    def key(
        self, caller: Caller, request: ChatRequest, reference: str | None, policy: EffectivePolicy, wishes: Wishes
    ) -> str:
        """A keyed hash: the scope is part of it, so another tenant's entry cannot even be named."""
        scope: list[str]
        if policy.cache.scope == "shared":
            scope = ["shared"]
        elif policy.cache.scope == "team":
            scope = ["team", caller.team]
        else:
            scope = ["app", caller.team, caller.app or ""]
        parts = {
            "scope": scope,
            "reference": reference or "auto",
            "rules": policy.fingerprint,
            "quality": str(wishes.min_quality),
            "cost": wishes.max_cost,
            "request": _canonical(request.body),
        }
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hmac.new(self._secret, text.encode("ascii"), sha256).hexdigest()

    async def find(self, key: str, wishes: Wishes, now: float) -> StoredAnswer | None:
        """`now` is seconds since the epoch. None where the caller wants a fresh answer."""
        if not wishes.read_cache:
            return None
        raw = await self._store.get(key)
        if raw is None:
            return None
        try:
            stored = _decoder.decode(raw)
        except msgspec.MsgspecError:
            return None  # written by another version; it is replaced by the next answer
        if wishes.max_age is not None and now - stored.stored_at > wishes.max_age:
            return None
        return stored

    def store(self, key: str, answer: StoredAnswer, ttl: float, draw: float) -> None:
        """`draw` in [0, 1) spreads the ends of entries stored together."""
        self._store.put(key, _encoder.encode(answer), ttl * (1 - _JITTER * draw))


def _canonical(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in _OUTSIDE_KEY}
