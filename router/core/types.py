"""The nouns of the gateway: money, usage, prices, callers, requests and ledger rows.

Everything here is a frozen value; what a request makes many of is a msgspec Struct, which is made and encoded several
times as fast as a dataclass. Money is an integer count of nano-USD (1 USD = 10**9) or, in a price
record, a Decimal in USD per million tokens. Durations are seconds as float unless a name ends in `_ms`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from functools import cached_property, lru_cache
from typing import Any, Literal, NewType

from msgspec import Struct

from router.core.cached import CacheCandidate, CacheLabel
from router.core.learning import Label

NanoUSD = NewType("NanoUSD", int)
NANO_PER_USD = 1_000_000_000


@lru_cache(maxsize=4096)
def nano(usd: Decimal) -> NanoUSD:
    """An amount in USD as nano-USD. Raises ValueError where it has more than nine decimals."""
    scaled = usd * NANO_PER_USD
    whole = int(scaled)
    if whole != scaled:
        raise ValueError(f"{usd} USD is not a whole number of nano-USD")
    return NanoUSD(whole)


PromptClass = Literal["simple", "medium", "complex"]
PROMPT_CLASSES: tuple[PromptClass, ...] = ("simple", "medium", "complex")

CacheOutcome = Literal["miss", "exact", "semantic"]
RequestStatus = Literal["complete", "failed", "cut", "cancelled"]
TAG = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
"""The key or value of a tag, as callers send and policies name it."""
CALLER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""The name of a team or app, as a key carries and a policy names it."""
AUTO = "auto"
"""The model's name by which a caller lets the gateway choose."""
AttemptOutcome = Literal["complete", "failed", "timeout", "cut", "cancelled"]


class Usage(Struct, frozen=True):
    """Disjoint token counts of one answer; they add up, so no token is billed twice.

    Providers report cached tokens as part of the prompt and reasoning tokens as part of the completion;
    an adapter takes them apart before it builds this value.
    """

    input: int = 0
    input_cached: int = 0
    cache_write: int = 0
    input_audio: int = 0
    input_image: int = 0
    output: int = 0
    output_reasoning: int = 0
    output_audio: int = 0

    def __post_init__(self) -> None:
        if min(self.quantities()) < 0:
            raise ValueError("usage holds a negative token count")

    def quantities(self) -> tuple[int, ...]:
        return (
            self.input,
            self.input_cached,
            self.cache_write,
            self.input_audio,
            self.input_image,
            self.output,
            self.output_reasoning,
            self.output_audio,
        )

    def buckets(self) -> Iterator[tuple[str, int]]:
        """Every bucket that holds at least one token, in declaration order."""
        for name, quantity in zip(BUCKETS, self.quantities(), strict=True):
            if quantity:
                yield name, quantity

    @property
    def input_total(self) -> int:
        return self.input + self.input_cached + self.cache_write + self.input_audio + self.input_image

    @property
    def output_total(self) -> int:
        return self.output + self.output_reasoning + self.output_audio

    def within(self, most_input: int, most_output: int) -> Usage:
        """As much of it as both leave room for; plain text gives way first."""
        kept: dict[str, int] = {}
        for buckets, left in ((INPUT_BUCKETS, most_input), (OUTPUT_BUCKETS, most_output)):
            for bucket in reversed(buckets):
                kept[bucket] = min(getattr(self, bucket), left)
                left -= kept[bucket]
        return Usage(**kept)


BUCKETS: tuple[str, ...] = Usage.__struct_fields__
INPUT_BUCKETS = BUCKETS[:5]
OUTPUT_BUCKETS = BUCKETS[5:]


class PriceRecord(Struct, frozen=True, dict=True):
    """What one model costs from `effective_from` on. Immutable: a change is a new record with a new id.

    `unit_prices` (billed) and `list_prices` (before a contract's discount) hold USD per million tokens for
    every bucket, at most nine decimals. `marginal_prices` is what one more request really costs on a
    machine that is already paid for; it steers routing and never appears in a cost line.
    """

    id: str
    provider: str
    model: str
    effective_from: datetime
    unit_prices: Mapping[str, Decimal]
    list_prices: Mapping[str, Decimal]
    marginal_prices: Mapping[str, Decimal]
    source: str
    contract: str | None = None

    # The same prices in nano-USD per million tokens, worked out once: a request asks for some thirty of them.

    @cached_property
    def unit_nano(self) -> Mapping[str, NanoUSD]:
        return {bucket: nano(price) for bucket, price in self.unit_prices.items()}

    @cached_property
    def list_nano(self) -> Mapping[str, NanoUSD]:
        return {bucket: nano(price) for bucket, price in self.list_prices.items()}

    @cached_property
    def marginal_nano(self) -> Mapping[str, NanoUSD]:
        return {bucket: nano(price) for bucket, price in self.marginal_prices.items()}

    @cached_property
    def dearest_input(self) -> NanoUSD:
        return max(self.unit_nano[bucket] for bucket in INPUT_BUCKETS)

    @cached_property
    def dearest_output(self) -> NanoUSD:
        return max(self.unit_nano[bucket] for bucket in OUTPUT_BUCKETS)


class CostLine(Struct, frozen=True):
    """One bucket of one attempt, priced. `unit_price` and `list_price` are nano-USD per million tokens."""

    bucket: str
    quantity: int
    unit_price: int
    list_price: int
    amount: NanoUSD
    list_amount: NanoUSD
    price_id: str


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request. `tags` maps a tag's key to its values; a caller can add to them, never remove."""

    key_id: str
    team: str
    app: str | None = None
    tags: Mapping[str, frozenset[str]] = field(default_factory=dict)


class ChatRequest(Struct, frozen=True):
    """A chat completion request, parsed once. `text` is the body as received; `spans` locates its top-level
    values as (start, end) offsets into `text`, so that an edit leaves every other byte alone.
    """

    text: str
    body: Mapping[str, Any]
    spans: Mapping[str, tuple[int, int]]
    model: str
    stream: bool
    include_usage: bool
    choices: int
    max_output: int | None
    needs: frozenset[str]
    parameters: frozenset[str]
    input_tokens: int
    input_bound: int
    prompt: str


class Attempt(Struct, frozen=True):
    """One call to a provider. `cost` is None where the model has no known price; never 0 for unknown."""

    index: int
    provider: str
    model: str
    upstream_model: str
    started_at: datetime
    outcome: AttemptOutcome
    status_code: int | None = None
    error: str | None = None
    first_token_ms: float | None = None
    duration_ms: float = 0.0
    usage: Usage = Usage()
    estimated: bool = False
    lines: tuple[CostLine, ...] = ()
    cost: NanoUSD | None = None
    price: PriceRecord | None = None


class BudgetWindow(Struct, frozen=True):
    """One budget in one month: `key` is `organisation`, `team:NAME` or `app:TEAM/NAME`; `period` is `2026-11`
    in the organisation's timezone, taken at admission.
    """

    key: str
    period: str


class OpenRecord(Struct, frozen=True):
    """Written before dispatch: enough to book a request whose process dies. `price` is that of the first
    model of the plan, `input_tokens` and `output_tokens` the forecast an estimate is made from.
    """

    id: str
    opened_at: datetime
    key_id: str
    team: str
    app: str | None
    cost_center: str | None
    endpoint: str
    requested_model: str
    prompt_class: str | None
    streamed: bool
    policy_hash: str
    budgets: tuple[BudgetWindow, ...]
    worst_case: NanoUSD
    input_tokens: int
    output_tokens: int
    caller_request_id: str | None = None


class AttemptRecord(Struct, frozen=True):
    """Written when a call to a provider is about to be made."""

    request_id: str
    index: int
    provider: str
    model: str
    upstream_model: str
    started_at: datetime
    price: PriceRecord | None


class RequestRecord(Struct, frozen=True):
    """The one ledger entry of one admitted request, with all its attempts.

    `baseline` is the cost of the same usage on the reference model. The savings identity holds in integers:
    baseline - cost = routing_savings + cache_savings - overhead, where overhead is the cost of attempts that
    did not serve the answer. All of them are None when the cost or the baseline has no known price.

    What follows `attempts` is there only where the policy learns: `features` packed for the encoder named beside
    them (`classifiers.prompt_features`), `prompt` only with `keep_prompts`, `labels` from automatic signals.
    `candidate` is what the semantic cache found, `cache_labels` what is known of the answers it found.
    """

    id: str
    opened_at: datetime
    settled_at: datetime
    key_id: str
    team: str
    app: str | None
    cost_center: str | None
    tags: Mapping[str, tuple[str, ...]]
    endpoint: str
    caller_request_id: str | None
    requested_model: str
    baseline_model: str | None
    served_model: str | None
    served_provider: str | None
    streamed: bool
    prompt_class: str | None
    difficulty: float | None
    confidence: float | None
    encoder: str | None
    decision: str
    dropped: Mapping[str, str]
    propensity: float
    policy_hash: str
    exceptions: tuple[str, ...]
    budgets: tuple[BudgetWindow, ...]
    cache: CacheOutcome
    cache_entry: str | None
    status: RequestStatus
    http_status: int
    error: str | None
    estimated: bool
    unpriced: bool
    usage: Usage
    worst_case: NanoUSD
    cost: NanoUSD | None
    baseline: NanoUSD | None
    routing_savings: NanoUSD | None
    cache_savings: NanoUSD | None
    overhead: NanoUSD | None
    potential_savings: NanoUSD | None
    first_token_ms: float | None
    duration_ms: float
    attempts: tuple[Attempt, ...]
    features: bytes | None = None
    features_encoder: str | None = None
    prompt: str | None = None
    labels: tuple[Label, ...] = ()
    candidate: CacheCandidate | None = None
    cache_labels: tuple[CacheLabel, ...] = ()


class LiveStatus(Struct, frozen=True):
    """What is known right now of one model: its circuit breaker and its recent latency.

    `first_token_p95` in seconds and `tokens_per_second` are None while there are too few observations.
    """

    available: bool = True
    reason: str = ""
    first_token_p95: float | None = None
    tokens_per_second: float | None = None
    warm: bool = False
