"""The nouns of the caches: what a stored answer is, what was found beside it, and what may no longer be served.

Two ports stand here beside their values: the store of semantic entries, shared by all workers, and the book of
invalidations and labels, which is SQL. Identities of tenants, partitions and scopes are keyed hashes (hex).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Literal, Protocol

from msgspec import Struct

if TYPE_CHECKING:
    from router.core.types import Caller

InvalidationKind = Literal["all", "team", "app", "model", "tag", "scope", "entry"]
"""What people name. `pair` beside them comes of a wrong answer alone."""
RuleKind = InvalidationKind | Literal["pair"]
INVALIDATION_KINDS: tuple[InvalidationKind, ...] = ("all", "team", "app", "model", "tag", "scope", "entry")


class Origin(Struct, array_like=True, frozen=True, gc=False):
    """Where a stored answer comes from, as far as invalidating it needs to know.

    `entry`: the request that made it. `generation`: the newest invalidation known when that request was admitted.
    `tags`: `key=value`. `scope`: what shares evidence with it (empty for an exact answer that has none).
    """

    entry: str
    generation: int
    team: str
    app: str | None
    model: str
    tags: tuple[str, ...] = ()
    scope: str = ""


class SemanticEntry(Struct, array_like=True, frozen=True, gc=False):
    """A stored answer as each worker's index knows it, and as it is stored; its body stays in the store.

    `tenant`: whose quota it counts against. `partition`: all that must be the same (tenant's scope, history, system
    prompt, tools, format, parameters, rules in force, encoder). `prompt`: the last message's text, whole. `vector`:
    float16, little-endian, of the cache's encoder (zeros: not made yet); `sketch`: the same of the static one.
    Times: seconds since the epoch. `cost`: what the answer cost, in nano-USD (None: unpriced). `usage`: token
    counts in the order of `Usage.quantities()`. `body_bytes`: size of the body.
    """

    origin: Origin
    tenant: str
    partition: str
    prompt: str
    vector: bytes
    sketch: bytes
    encoder_id: str
    stored_at: float
    expires_at: float
    provider: str
    upstream_model: str
    prompt_class: str | None
    usage: tuple[int, ...]
    cost: int | None
    policy_hash: str
    stream: bool
    body_bytes: int

    @property
    def id(self) -> str:
        return self.origin.entry


class SemanticListener(Protocol):
    """Hears what changes in the store, whichever worker changed it. Called on the event loop; must not block."""

    def loaded(self, partition: str) -> bool:
        """Whether it wants to hear what is added to this partition."""
        ...

    def added(self, entry: SemanticEntry) -> None: ...

    def removed(self, partition: str, entry_id: str) -> None: ...

    def reset(self) -> None:
        """What was heard so far may be wrong (an emptied store, a gap): forget all; partitions are loaded anew."""
        ...


class SemanticStore(Protocol):
    """Entries with their bodies, by partition: the truth that workers share. Away, it fails nothing."""

    @property
    def up(self) -> bool: ...

    def listen(self, listener: SemanticListener) -> None: ...

    async def start(self) -> None: ...

    async def load(self, partition: str) -> tuple[SemanticEntry, ...] | None:
        """Every live entry of a partition, to index it. None when the store is away."""
        ...

    def put(self, entry: SemanticEntry, body: bytes, quota: int) -> None:
        """Never blocks and never raises; stored in the background. `quota`: bytes of the entry's tenant; beyond it
        the entries worth the fewest dollars a byte go (GreedyDual-Size-Frequency, Cherkasova 1998).
        """
        ...

    async def body(self, entry: SemanticEntry) -> bytes | None:
        """The answer, as the provider sent it; None when it is gone (removed, evicted, expired). While the store is
        away: what this worker remembers of it, where it does.
        """
        ...

    def served(self, entry: SemanticEntry) -> None:
        """Raises the entry's worth. Never blocks and never raises."""
        ...

    async def remove(self, partition: str, entry_id: str) -> None:
        """Gone from every worker at once. Raises UnavailableError when the store is away; this worker's memory of it
        is gone all the same.
        """
        ...

    async def remove_entry(self, entry_id: str) -> None:
        """The same where only the id is known."""
        ...

    async def size(self) -> StoreSize: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class StoreSize:
    """`bytes` by tenant hash; `entries` and `partitions` in all."""

    entries: int
    partitions: int
    bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CacheCandidate:
    """What the semantic cache found for a request, served or not. It travels with the request's ledger record.

    `probability`: the verifier's. `threshold`: at or above which it would have been served (above 1: never).
    `mode`: what was in force. `served`: it was the answer. `would_serve`: it would have been, had the mode let it.
    `saved`: nano-USD that serving it saved or would have saved (None: unpriced). `pair`: keyed hash of both prompts.
    """

    scope: str
    entry: str
    similarity: float
    probability: float
    threshold: float
    mode: str
    served: bool
    would_serve: bool
    saved: int | None
    reasons: tuple[str, ...] = ()
    pair: str = ""


@dataclass(frozen=True, slots=True)
class CacheLabel:
    """Whether a candidate's stored answer was right. It travels with the ledger record of the request or the check
    that found out, or comes in as feedback.

    `request_id`: the request whose candidate it was. `score`: the verifier's probability. `source`: `agreement`,
    `judge` or `feedback`. `propensity`: with which the check came about; it never depends on the score.
    """

    request_id: str
    scope: str
    entry: str
    score: float
    right: bool
    propensity: float
    source: str
    at: datetime
    key_id: str
    team: str
    app: str | None
    comment: str | None = None


@dataclass(frozen=True, slots=True)
class Invalidation:
    """A rule: stored answers it names are not served. `id` rises by one with each rule, in the order of commits.

    `value`: TEAM, TEAM/APP, model name, `key=value` of a tag, scope hash, entry id, hash of a pair of prompts; empty
    for `all`.
    """

    id: int
    kind: RuleKind
    value: str
    at: datetime


class Invalidations:
    """The rules in force. `generation` is the newest rule's id, 0 without any; `newest` is the same where old rules
    are left out.
    """

    def __init__(self, rules: Iterable[Invalidation] = (), *, newest: int = 0) -> None:
        by_name: dict[tuple[str, str], int] = {}
        for rule in rules:
            key = (rule.kind, rule.value)
            by_name[key] = max(rule.id, by_name.get(key, 0))
        self._newest = by_name
        self.generation = max([newest, *by_name.values()])
        self.pairs = frozenset(value for kind, value in by_name if kind == "pair")
        """Of two prompts of which neither may get the other's answer, whenever that was made."""

    def stale(self, origin: Origin) -> bool:
        """Whether a rule made after the answer's request was admitted, or against the entry itself, names it."""
        newest = self._newest
        if not newest:
            return False
        if ("entry", origin.entry) in newest:
            return True
        names = [("all", ""), ("team", origin.team), ("model", origin.model), ("scope", origin.scope)]
        if origin.app is not None:
            names.append(("app", f"{origin.team}/{origin.app}"))
        names += [("tag", tag) for tag in origin.tags]
        return any(newest.get(name, 0) > origin.generation for name in names)


@dataclass(frozen=True, slots=True)
class JudgedHit:
    """A verdict that was kept on an answer out of a cache. `quarantined`: the entry is not served any more, be it by
    this verdict or an earlier one.
    """

    entry: str
    quarantined: bool


class HitFeedbackStore(Protocol):
    """What callers say of answers out of the caches."""

    async def judge(self, caller: Caller, request_id: str, correct: bool, comment: str | None) -> JudgedHit:
        """The latest verdict of a key counts; the same again changes nothing. A wrong answer's entry is named by a
        rule for good.

        Raises NotFound where the caller's team has no request of this id, InvalidRequest where no cache answered it,
        Overloaded where it is still on its way to the ledger or the ledger is away.
        """
        ...


class CacheBook(Protocol):
    """Invalidations and labels, kept in SQL and read in the background; what was read stays in force while SQL is
    away.
    """

    @property
    def invalidations(self) -> Invalidations: ...

    @property
    def revision(self) -> int:
        """Rises whenever labels came in."""
        ...

    def labels(self, scope: str) -> Sequence[CacheLabel]:
        """Those the bound may use (not feedback), in the order they were booked."""
        ...

    def pool(self, scope: str) -> Sequence[CacheLabel]:
        """Labels of all other scopes that were booked before this scope's first one (all, where it has none)."""
        ...
