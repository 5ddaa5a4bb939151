"""The compiled configuration: what both files say, as frozen values with every reference resolved.

`Snapshot.resolve` answers the one question the way of a request asks: what holds for this caller, with
these tags, at this moment?
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from router.core.types import NanoUSD

AtLimit = Literal["downgrade", "refuse"]
SemanticMode = Literal["never", "shadow", "enforce", "certified"]
CacheScope = Literal["app", "team", "shared"]


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. `first_token` counts from the moment the request is sent, `idle` between two chunks."""

    connect: float = 2.0
    first_token: float = 60.0
    idle: float = 60.0
    total: float = 600.0


@dataclass(frozen=True, slots=True)
class ProviderSpec:
    """An endpoint. `wire` is `openai` (bytes pass through) or `litellm`. `options` go to litellm as they are."""

    name: str
    wire: str
    base_url: str | None
    api_key_env: str | None
    timeouts: Timeouts
    stream_usage: bool = True
    deny_fields: frozenset[str] = frozenset()
    drain: bool = False
    options: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """An LLM behind a provider. `name` is the policy's, `upstream_name` the provider's.

    `quality` is the prior probability of a good answer per class; None: never chosen for `auto`.
    `expect_*` stand in for live figures while there are too few observations.
    """

    name: str
    provider: str
    upstream_name: str
    context: int
    max_output: int
    supports: frozenset[str]
    rejects: frozenset[str]
    rename: Mapping[str, str]
    expect_first_token: float | None
    expect_tokens_per_second: float | None
    quality: Mapping[str, Decimal] | None


@dataclass(frozen=True, slots=True)
class ClassRequirement:
    """What a prompt of a class must get. Latencies are seconds; None: no limit.

    `confidence`: with which an upper bound on the failures beyond the reference's must hold before a cheaper model
    answers (None: the predicted success decides alone). `cascade`: who checks a cheaper model's answer before it is
    sent: `signals` or a model's name; None: nobody.
    """

    min_quality: Decimal
    first_token_p95: float | None = None
    total_p95: float | None = None
    confidence: Decimal | None = None
    cascade: str | None = None


@dataclass(frozen=True, slots=True)
class LearnPolicy:
    """What may be kept and spent to learn from the installation's own traffic; without one nothing is.

    `shadow`: share of requests that is also answered by another model, off the answer path. `budget`: nano-USD a
    month for those and the judge (None: nothing). `judge`: the model that compares such a pair of answers (None: by
    agreement). `keep_prompts`: the prompts themselves are kept, not only their features. `certifies`: a class asks
    for `confidence`, so that held-out labels must stay unknown to the heads.
    """

    shadow: Decimal = Decimal(0)
    budget: NanoUSD | None = None
    judge: str | None = None
    keep_prompts: bool = False
    certifies: bool = False


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """`max_error`: wrong answers / answers served by likeness. `ttl` in seconds. `quota`: bytes a team's answers may
    take in the semantic cache. `check`: share of its answers that is compared with a fresh one, paid from the budget
    of learning.
    """

    exact: bool = True
    semantic: SemanticMode = "never"
    max_error: Decimal = Decimal("0.01")
    ttl: float = 86_400.0
    scope: CacheScope = "team"
    quota: int = 64_000_000
    check: Decimal = Decimal(0)


@dataclass(frozen=True, slots=True)
class CacheUse:
    """What any caller may get of the caches under a policy. `longest_ttl` in seconds."""

    exact: bool = True
    semantic: bool = False
    longest_ttl: float = 86_400.0

    @property
    def any(self) -> bool:
        return self.exact or self.semantic


@dataclass(frozen=True, slots=True)
class BudgetLimit:
    """A budget a request falls under. `limit` is where `at_limit` begins; `hard_cap` is never passed (None: no
    bound above the limit). With `at_limit: refuse` and no hard cap of its own, `hard_cap` equals `limit`.
    """

    key: str
    limit: NanoUSD | None
    hard_cap: NanoUSD | None
    at_limit: AtLimit
    warn_at: tuple[Decimal, ...] = ()


@dataclass(frozen=True, slots=True)
class EffectivePolicy:
    """What holds for one caller at one moment. `allow` keeps the order of providers.yaml; `excluded` says of
    each other known model what took it out. `fingerprint` changes whenever a cached answer could have been
    chosen under other rules; it is part of every cache key. `period` is the budget month, e.g. `2026-11`. `learns`:
    nothing on the way says `learn: none`.
    """

    policy_hash: str
    allow: tuple[str, ...]
    excluded: Mapping[str, str]
    fallback: tuple[str, ...]
    substitute: bool
    classes: Mapping[str, ClassRequirement]
    max_cost_per_request: NanoUSD | None
    assume_max_output: int
    when_nothing_meets: Literal["best", "refuse"]
    on_unpriced_model: Literal["block", "allow"]
    cache: CachePolicy
    advise: Decimal
    learns: bool
    budgets: tuple[BudgetLimit, ...]
    baseline: str | None
    cost_center: str | None
    tags: Mapping[str, frozenset[str]]
    rules: tuple[str, ...]
    exceptions: tuple[str, ...]
    fingerprint: str
    period: str
