"""The exact cache: the same request, of the same scope, under the same rules."""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

import msgspec
from msgspec import Struct

from router.core.cached import Invalidations, Origin
from router.core.ports import CacheStore
from router.core.types import Attempt, NanoUSD, RequestRecord, Usage
from router.stages.exchange import Exchange, serving

# How an answer travels and who asks do not change what it says.
_OUTSIDE_KEY = ("stream", "stream_options", "user", "metadata", "model", "safety_identifier")
_JITTER = 0.1
_canonical_text = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode


class StoredAnswer(Struct, frozen=True):
    """A complete answer as the provider sent it. `stored_at` is seconds since the epoch."""

    origin: Origin
    stored_at: float
    stream: bool
    body: bytes
    provider: str
    upstream_model: str
    prompt_class: str | None
    usage: Usage
    cost: NanoUSD | None

    @property
    def entry(self) -> str:
        return self.origin.entry

    @property
    def model(self) -> str:
        return self.origin.model


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
    return _canonical_text(parts)


def keyed(secret: bytes, text: str) -> str:
    """HMAC-SHA256, hex. The scope is inside the hash, so another tenant's entry cannot even be named."""
    return hmac.new(secret, text.encode("ascii"), sha256).hexdigest()


def fresh(exchange: Exchange, stored_at: float) -> bool:
    """Whether an answer of that time (seconds since the epoch) is young enough for this request."""
    # The entry's own time to live is that of the policy which stored it: another app's, or yesterday's.
    oldest = exchange.policy.cache.ttl
    if exchange.wishes.max_age is not None:
        oldest = min(oldest, exchange.wishes.max_age)
    return exchange.opened_at.timestamp() - stored_at <= oldest


def worth_keeping(exchange: Exchange, record: RequestRecord) -> Attempt | None:
    """The attempt whose answer may be given to others: complete, undoubted, and the caller lets it be kept."""
    if record.status != "complete" or record.error is not None or not exchange.wishes.write_cache:
        return None
    return serving(record.attempts) if exchange.doubt is None else None


def origin_of(exchange: Exchange, model: str) -> Origin:
    """Where the answer of this request comes from."""
    tags = (f"{key}={value}" for key, values in exchange.policy.tags.items() for value in sorted(values))
    return Origin(
        entry=exchange.id,
        generation=exchange.generation,
        team=exchange.caller.team,
        app=exchange.caller.app,
        model=model,
        tags=tuple(tags),
        scope=exchange.inquiry.scope if exchange.inquiry is not None else "",
    )


class ExactCache:
    """`invalidations`: the rules in force of what may no longer be served."""

    def __init__(
        self, store: CacheStore, secret: bytes, invalidations: Callable[[], Invalidations] = Invalidations
    ) -> None:
        self._store = store
        self._secret = secret
        self._invalidations = invalidations

    def key(self, exchange: Exchange) -> str | None:
        """The key of this request's answer. None where the policy or the caller wants no cache."""
        wishes = exchange.wishes
        if not exchange.policy.cache.exact or not (wishes.read_cache or wishes.write_cache):
            return None
        return keyed(self._secret, scope_of(exchange, canonical(exchange.request.body)))

    async def find(self, key: str, exchange: Exchange) -> StoredAnswer | None:
        """None where nothing is stored, or the caller wants a fresh answer."""
        if not exchange.wishes.read_cache:
            return None
        raw = await self._store.get(key)
        if raw is None:
            return None
        try:
            stored = _decoder.decode(raw)
        except msgspec.MsgspecError:
            return None  # written by another version; it is replaced by the next answer
        if not fresh(exchange, stored.stored_at) or self._invalidations().stale(stored.origin):
            return None
        return stored

    def store(self, key: str, exchange: Exchange, record: RequestRecord, body: bytes, draw: float) -> bool:
        """Keeps a complete answer nobody doubts, and True; anything else is left out. `draw` in [0, 1) spreads their
        ends.
        """
        served = worth_keeping(exchange, record)
        if served is None:
            return False
        answer = StoredAnswer(
            origin=origin_of(exchange, served.model),
            stored_at=exchange.opened_at.timestamp(),
            stream=record.streamed,
            body=body,
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
