"""What is known of one request while it passes through the stages."""

from __future__ import annotations

from asyncio import Future
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from msgspec import Struct, field

from classifiers.classifier import Verdict
from classifiers.success_features import PromptFeatures
from router.core.cached import CacheCandidate, CacheLabel
from router.core.decide import Plan, Question
from router.core.learning import Estimate, Label
from router.core.policy import EffectivePolicy, LearnPolicy
from router.core.ports import Snapshot
from router.core.types import (
    Attempt,
    BudgetWindow,
    CacheOutcome,
    Caller,
    ChatRequest,
    NanoUSD,
    PriceRecord,
    RequestRecord,
    RequestStatus,
)
from router.stages.admit import Wishes

if TYPE_CHECKING:
    from router.stages.semantic import Inquiry

NOTHING = NanoUSD(0)


class Exchange(Struct, eq=False):
    """One request and what became of it. Each stage fills its own part; settle turns it into a ledger row."""

    # admit and normalise
    id: str
    endpoint: str
    opened_at: datetime
    started: float
    caller: Caller
    wishes: Wishes
    request: ChatRequest
    snapshot: Snapshot
    policy: EffectivePolicy
    reference: str | None
    baseline_name: str | None
    baseline_price: PriceRecord | None
    conversation: str | None = None
    generation: int = 0
    """The newest rule of what may no longer be served that was known when the request came in."""

    # semantic cache, where the policy has it
    inquiry: Inquiry | None = None
    candidate: CacheCandidate | None = None
    cache_labels: tuple[CacheLabel, ...] = ()

    # classify and decide
    verdict: Verdict | None = None
    question: Question | None = None
    plan: Plan | None = None
    prices: Mapping[str, PriceRecord | None] = field(default_factory=dict)

    advice: Future[Verdict] | None = None
    """A verdict made off the answer path, for what substituting could have saved."""
    potential_savings: NanoUSD | None = None

    # learn, where the policy has it
    features: PromptFeatures | None = None
    features_encoder: str | None = None
    kept_prompt: str | None = None
    estimates: dict[tuple[str, str, float | None], Mapping[str, Estimate]] = field(default_factory=dict)
    """What an artefact predicts for a class and difficulty, by the artefact's id and those."""
    labels: tuple[Label, ...] = ()

    # reserve
    windows: tuple[BudgetWindow, ...] = ()
    worst_case: NanoUSD = NOTHING
    reserved: bool = False

    # dispatch
    attempts: list[Attempt] = field(default_factory=list)
    first_token_ms: float | None = None

    # cascade
    escalated: str | None = None
    """What was wrong with the first answer, where a stronger model's took its place."""
    doubt: str | None = None
    """What is wrong with the answer that was served all the same."""

    # how it ended
    cache: CacheOutcome = "miss"
    cache_entry: str | None = None
    status: RequestStatus = "failed"
    http_status: int = 500
    error: str | None = None
    record: RequestRecord | None = None
    """The ledger entry, once it is written."""

    stored_class: str | None = None
    """The class of the answer this request got from the cache or shared."""

    @property
    def learn(self) -> LearnPolicy | None:
        """What may be learned of this request; None: nothing."""
        return self.snapshot.learn if self.policy.learns else None

    @property
    def prompt_class(self) -> str | None:
        return self.verdict.prompt_class if self.verdict is not None else self.stored_class

    @property
    def comparable(self) -> bool:
        """Whether a second answer may be made to compare the first one with: not where the caller asks for nothing
        to be kept, nor for several answers.
        """
        return self.wishes.write_cache and self.request.choices == 1


UNSENT = "not sent"
ASIDE = frozenset({"escalated", "verifier", UNSENT})
"""Errors of attempts that ended well and whose answer did not go to the caller."""


def serving(attempts: Sequence[Attempt]) -> Attempt | None:
    """The attempt whose answer reached the caller: the last one that did not fail and was not set aside."""
    for attempt in reversed(attempts):
        if attempt.outcome not in ("failed", "timeout") and attempt.error not in ASIDE:
            return attempt
    return None
