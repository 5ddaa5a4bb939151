"""How each model does right now: a circuit breaker and recent latency. Time is passed in, so it is testable.

Latency is judged by what was seen in the last WINDOW seconds. A model that gets little traffic (one left out
for latency gets only probes) is judged by the slowest of its latest RECENT observations: one good probe does
not bring it back, and a handful does.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from router.core.types import LiveStatus

WINDOW = 30.0
"""Seconds of observations a percentile is taken from."""
ENOUGH = 20
"""Observations in the window from which a percentile means something."""
RECENT = 5
FORGET = 900.0
"""Seconds after which even a sparse observation no longer counts."""

FAILURES_IN_A_ROW = 5
FAILURE_SHARE = 0.5
FAILURES_AT_LEAST = 10
OPEN_FIRST = 5.0
OPEN_LONGEST = 60.0

WARM_SECONDS = 300.0
WARM_CONVERSATIONS = 10_000


@dataclass(slots=True)
class _Breaker:
    """Closed, open until a moment, or half-open with one trial under way."""

    in_a_row: int = 0
    outcomes: deque[tuple[float, bool]] = field(default_factory=lambda: deque(maxlen=200))
    open_until: float = 0.0
    open_for: float = OPEN_FIRST
    trial_since: float | None = None
    opened: bool = False

    def available(self, now: float) -> bool:
        if not self.opened:
            return True
        if now < self.open_until:
            return False
        # Half-open: one trial at a time; one that never reported back stops counting.
        return self.trial_since is None or now - self.trial_since > OPEN_LONGEST

    def trying(self, now: float) -> None:
        if self.opened:
            self.trial_since = now

    def success(self, now: float) -> None:
        self.in_a_row = 0
        self.outcomes.append((now, True))
        if self.opened:
            self.opened = False
            self.open_for = OPEN_FIRST
            self.trial_since = None
            self.outcomes.clear()

    def failure(self, now: float, hold: float | None) -> None:
        self.in_a_row += 1
        self.outcomes.append((now, False))
        recent = [good for at, good in self.outcomes if now - at <= WINDOW]
        bad = recent.count(False)
        tripped = (
            self.opened
            or self.in_a_row >= FAILURES_IN_A_ROW
            or (bad >= FAILURES_AT_LEAST and bad / len(recent) >= FAILURE_SHARE)
        )
        if tripped or hold is not None:
            self.open_until = now + max(self.open_for if tripped else 0.0, min(hold or 0.0, OPEN_LONGEST))
            if tripped:
                self.open_for = min(self.open_for * 2, OPEN_LONGEST)
            self.opened = True
            self.trial_since = None

    def abandoned(self) -> None:
        self.trial_since = None


@dataclass(slots=True)
class _Observations:
    """First-token seconds with their moments; a percentile is computed at most once a tenth of a second."""

    values: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=1_000))
    rate: float | None = None
    computed_at: float = -1.0
    percentile: float | None = None
    changed: bool = False

    def add(self, now: float, seconds: float) -> None:
        self.values.append((now, seconds))
        self.changed = True

    def add_rate(self, tokens_per_second: float) -> None:
        self.rate = tokens_per_second if self.rate is None else 0.9 * self.rate + 0.1 * tokens_per_second

    def p95(self, now: float) -> float | None:
        if now - self.computed_at < 0.1:
            return self.percentile
        self.computed_at = now
        while self.values and now - self.values[0][0] > FORGET:
            self.values.popleft()
        recent = [seconds for at, seconds in self.values if now - at <= WINDOW]
        if len(recent) >= ENOUGH:
            recent.sort()
            self.percentile = recent[min(len(recent) - 1, int(0.95 * len(recent)))]
        elif len(self.values) >= RECENT:
            self.percentile = max(seconds for _, seconds in list(self.values)[-RECENT:])
        else:
            self.percentile = None
        return self.percentile


class Health:
    """Health of every model and provider this worker has called."""

    def __init__(self) -> None:
        self._breakers: dict[tuple[str, str], _Breaker] = {}
        self._latency: dict[str, _Observations] = {}
        self._warm: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self.unusable: dict[str, str] = {}
        """Providers that cannot be called at all, with the reason (a missing key)."""

    def status(self, provider: str, model: str, now: float, conversation: str | None = None) -> LiveStatus:
        reason = self.unusable.get(provider, "")
        if self._breakers:  # of those that ever failed
            breaker = self._breakers.get((provider, model))
            if breaker is not None and not breaker.available(now):
                reason = "its circuit breaker is open"
            breaker = self._breakers.get((provider, ""))
            if breaker is not None and not breaker.available(now):
                reason = f"provider {provider} cannot be reached"
        latency = self._latency.get(model)
        return LiveStatus(
            available=not reason,
            reason=reason,
            first_token_p95=latency.p95(now) if latency is not None else None,
            tokens_per_second=latency.rate if latency is not None else None,
            warm=conversation is not None and self._is_warm(conversation, model, now),
        )

    def trying(self, provider: str, model: str, now: float) -> None:
        for key in ((provider, model), (provider, "")):
            breaker = self._breakers.get(key)
            if breaker is not None:
                breaker.trying(now)

    def first_token(self, model: str, seconds: float, now: float) -> None:
        self._latency.setdefault(model, _Observations()).add(now, seconds)

    def rate(self, model: str, tokens: int, seconds: float) -> None:
        if tokens >= 8 and seconds > 0.005:
            self._latency.setdefault(model, _Observations()).add_rate(tokens / seconds)

    def tokens_per_second(self, model: str) -> float | None:
        latency = self._latency.get(model)
        return latency.rate if latency is not None else None

    def success(self, provider: str, model: str, now: float) -> None:
        for key in ((provider, model), (provider, "")):
            breaker = self._breakers.get(key)
            if breaker is not None:
                breaker.success(now)

    def failure(
        self, provider: str, model: str, now: float, *, unreachable: bool, hold: float | None = None
    ) -> None:
        """`unreachable` counts against the provider too; `hold` is a Retry-After in seconds."""
        self._breakers.setdefault((provider, model), _Breaker()).failure(now, hold)
        if unreachable:
            self._breakers.setdefault((provider, ""), _Breaker()).failure(now, None)

    def abandoned(self, provider: str, model: str) -> None:
        """An attempt ended without saying anything about the provider (the client left)."""
        for key in ((provider, model), (provider, "")):
            breaker = self._breakers.get(key)
            if breaker is not None:
                breaker.abandoned()

    def open_breakers(self, now: float) -> list[tuple[str, str]]:
        return [key for key, breaker in self._breakers.items() if breaker.opened and now < breaker.open_until]

    def warmed(self, conversation: str, model: str, now: float) -> None:
        """The provider has just read this conversation, so its prefix is likely in the prompt cache."""
        self._warm[conversation] = (model, now)
        self._warm.move_to_end(conversation)
        if len(self._warm) > WARM_CONVERSATIONS:
            self._warm.popitem(last=False)

    def _is_warm(self, conversation: str, model: str, now: float) -> bool:
        known = self._warm.get(conversation)
        return known is not None and known[0] == model and now - known[1] <= WARM_SECONDS
