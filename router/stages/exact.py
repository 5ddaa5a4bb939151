"""The exact cache: the same request, of the same scope, under the same rules."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import msgspec

from router.core.ports import CacheStore
from router.core.types import NanoUSD, RequestRecord, Usage
from router.stages.exchange import Exchange, serving

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
    model: str
    provider: str
    upstream_model: str
    prompt_class: str | None
    usage: Usage
    cost: NanoUSD | None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(StoredAnswer)


def scope_of(exchange: Exchange, request: object) -> str:
    """What a stored answer may be shared within, as canonical text.

    The tenant's scope, the reference model, the rules in force, what the caller tightened, and `request`, the part of
    the body that must be the same.
    """
    caller, policy, wishes = exchange.caller, exchange.policy, exchange.wishes
    if policy.cache.scope == "shared":
        scope = ["shared"]
    elif policy.cache.scope == "team":
        scope = ["team", caller.team]
    else:
        scope = ["app", caller.team, caller.app or ""]
    parts = {
        "scope": scope,
        "reference": exchange.reference or "auto",
        "rules": policy.fingerprint,
        "quality": str(wishes.min_quality),
        "cost": wishes.max_cost,
        "request": request,
    }
    return json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def keyed(secret: bytes, text: str) -> str:
    """HMAC-SHA256, hex. The scope is inside the hash, so another tenant's entry cannot even be named."""
    return hmac.new(secret, text.encode("ascii"), sha256).hexdigest()


class ExactCache:
    def __init__(self, store: CacheStore, secret: bytes) -> None:
        self._store = store
        self._secret = secret

    def key(self, exchange: Exchange) -> str | None:
        """The key of this request's answer. None where the policy or the caller wants no cache."""
        wishes = exchange.wishes
        if not exchange.policy.cache.exact or not (wishes.read_cache or wishes.write_cache):
            return None
        return keyed(self._secret, scope_of(exchange, canonical(exchange.request.body)))

    async def find(self, key: str, exchange: Exchange) -> StoredAnswer | None:
        """None where nothing is stored, or the caller wants a fresh answer."""
        wishes = exchange.wishes
        if not wishes.read_cache:
            return None
        raw = await self._store.get(key)
        if raw is None:
            return None
        try:
            stored = _decoder.decode(raw)
        except msgspec.MsgspecError:
            return None  # written by another version; it is replaced by the next answer
        # The entry's own time to live is that of the policy which stored it: another app's, or yesterday's.
        oldest = exchange.policy.cache.ttl
        if wishes.max_age is not None:
            oldest = min(oldest, wishes.max_age)
        if exchange.opened_at.timestamp() - stored.stored_at > oldest:
            return None
        return stored

    def store(self, key: str, exchange: Exchange, record: RequestRecord, body: bytes, draw: float) -> bool:
        """Keeps a complete answer nobody doubts, and True; anything else is left out. `draw` in [0, 1) spreads their
        ends.
        """
        if record.status != "complete" or record.error is not None or not exchange.wishes.write_cache:
            return False
        served = serving(record.attempts)
        if served is None or exchange.doubt is not None:
            return False
        answer = StoredAnswer(
            entry=record.id,
            stored_at=exchange.opened_at.timestamp(),
            stream=record.streamed,
            body=body,
            model=served.model,
            provider=served.provider,
            upstream_model=served.upstream_model,
            prompt_class=record.prompt_class,
            usage=served.usage,
            cost=served.cost,
        )
        self._store.put(key, _encoder.encode(answer), exchange.policy.cache.ttl * (1 - _JITTER * draw))
        return True


def canonical(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body without what does not change the answer."""
    return {name: value for name, value in body.items() if name not in _OUTSIDE_KEY}
