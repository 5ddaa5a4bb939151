"""Notes what learning needs of a request: features before the decision, signals of the answer after its last byte.

Does nothing where the policy has no `learn`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b

from classifiers import prompt_features
from classifiers.encoder import Encoder
from router.core.learning import Label
from router.core.ports import Clock
from router.stages.exchange import Exchange, serving
from router.stages.signals import BY_SOURCE, REPEATED, Signal, signals

REPEATED_WITHIN = 600.0
"""Seconds within which the same prompt of the same caller says that its answer did not do."""
MIN_REPEATED = 20
"""Characters; shorter ones ("yes", "go on") are sent again for other reasons."""
REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class _Answered:
    request_id: str
    model: str
    propensity: float
    at: float


class Learn:
    """`encoder` is the static one. What it remembers of a prompt is a hash, in this worker's memory."""

    def __init__(self, encoder: Encoder, clock: Clock) -> None:
        self._encoder = encoder
        self._clock = clock
        self._answered: OrderedDict[bytes, _Answered] = OrderedDict()

    def note_prompt(self, exchange: Exchange) -> None:
        """Before a request is classified."""
        learn = exchange.learn
        if learn is None:
            return
        prompt = exchange.request.prompt
        exchange.features = prompt_features.read(prompt, self._encoder)
        exchange.features_encoder = self._encoder.id
        if learn.keep_prompts and exchange.wishes.write_cache:  # who says no-store is taken at their word
            exchange.kept_prompt = prompt

    def note_answer(self, exchange: Exchange, body: bytes | None) -> None:
        """Once an answer has ended, before its request is settled. `body` is in the form the caller asked for."""
        if exchange.learn is None or exchange.status != "complete":
            return
        served = serving(exchange.attempts)
        if served is None:
            return
        propensity = exchange.plan.propensity if exchange.plan is not None else 1.0
        found = list(signals(exchange.request, body, exchange.request.stream)) if body is not None else []
        exchange.labels += tuple(
            self._label(exchange, signal, exchange.id, served.model, propensity) for signal in found
        )
        if exchange.escalated is not None:
            self._note_escalated(exchange, exchange.escalated, propensity)
        self._note_repeated(
            exchange, _Answered(exchange.id, served.model, propensity, self._clock.monotonic())
        )

    def _note_escalated(self, exchange: Exchange, doubt: str, propensity: float) -> None:
        """Labels the answer of the cheaper model that never reached the caller, by the signal it showed. What a
        verifier model doubts is no label: of answers it approves there is none to set against it.
        """
        signal = BY_SOURCE.get(doubt)
        if signal is None:
            return
        aside = [attempt.model for attempt in exchange.attempts if attempt.error == "escalated"]
        exchange.labels += tuple(
            self._label(exchange, signal, exchange.id, model, propensity) for model in aside[:1]
        )

    def _note_repeated(self, exchange: Exchange, answered: _Answered) -> None:
        """Labels the earlier answer to the same prompt. Hits of the cache do not count: many people ask an app the
        same, and it is built to answer them alike.
        """
        prompt = exchange.request.prompt.strip()
        if len(prompt) < MIN_REPEATED:
            return
        person = str(exchange.request.body.get("user", ""))
        text = "\0".join((exchange.caller.key_id, person, prompt))
        key = blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
        earlier = self._answered.pop(key, None)
        if earlier is not None and answered.at - earlier.at <= REPEATED_WITHIN:
            exchange.labels += (
                self._label(exchange, REPEATED, earlier.request_id, earlier.model, earlier.propensity),
            )
        self._answered[key] = answered
        if len(self._answered) > REMEMBERED:
            self._answered.popitem(last=False)

    def _label(
        self, exchange: Exchange, signal: Signal, request_id: str, model: str, propensity: float
    ) -> Label:
        return Label(
            request_id=request_id,
            model=model,
            score=0.0,
            weight=signal.weight,
            source=signal.source,
            propensity=propensity,
            at=self._clock.now(),
            key_id=exchange.caller.key_id,
            team=exchange.caller.team,
        )
