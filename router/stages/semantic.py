"""The semantic cache: the nearest stored prompt of the same scope.

It only measures so far. Nothing stored is ever served by likeness, whatever mode the policy names; what is
counted is how often a near neighbour was there, which is what a served hit would have come from.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

import numpy as np
import numpy.typing as npt

from classifiers.encoder import Encoder
from router.stages.exact import StoredAnswer, canonical, keyed, scope_of
from router.stages.exchange import Exchange
from router.stages.telemetry import Telemetry

NEAR = 0.95
"""Cosine from which a neighbour is counted. Alone it is no reason to serve: near misses lie above it as well."""
SCOPES = 256
PROMPTS = 256


class SemanticCache(Protocol):
    async def find(self, exchange: Exchange) -> StoredAnswer | None:
        """A stored answer that may be served for this request, or None."""
        ...


class ShadowSemanticCache:
    """Keeps the latest prompts of each scope as vectors, never as text, in this worker's memory."""

    def __init__(self, encoder: Encoder, secret: bytes, telemetry: Telemetry) -> None:
        self._encoder = encoder
        self._secret = secret
        self._telemetry = telemetry
        self._scopes: OrderedDict[str, list[npt.NDArray[np.float32]]] = OrderedDict()

    async def find(self, exchange: Exchange) -> StoredAnswer | None:
        if exchange.policy.cache.semantic == "never" or not exchange.wishes.read_cache:
            return None
        messages = exchange.request.body["messages"]
        if exchange.request.needs or messages[-1].get("role") != "user":
            return None
        # All but the last message's text must be the same: history, system prompt, parameters.
        body = {**canonical(exchange.request.body), "messages": messages[:-1]}
        scope = keyed(self._secret, scope_of(exchange, body))
        vector = self._encoder.encode([exchange.request.prompt])[0]
        known = self._scopes.setdefault(scope, [])
        self._scopes.move_to_end(scope)
        if known:
            nearest = float(np.max(np.stack(known) @ vector))
            self._telemetry.semantic_shadow(near=nearest >= NEAR)
        known.append(vector)
        if len(known) > PROMPTS:
            known.pop(0)
        if len(self._scopes) > SCOPES:
            self._scopes.popitem(last=False)
        return None
