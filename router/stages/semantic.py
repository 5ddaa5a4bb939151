"""The semantic cache: the stored answer to a prompt that asks the same in other words.

A request is compared only with prompts of its own partition: tenant's scope, history, system prompt, tools, format,
parameters, rules in force and encoders are the same there, by a keyed hash. The nearest go past the guard and the
verifier (`classifiers/pairs`), and the most probable is served where that keeps the policy's `max_error`.

Where the mode serves, the look-up is on the way of the request and bounded in time; where it only measures, it runs
beside the call to the model. Whatever fails here is a miss.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from classifiers.pairs import guard
from router.core.cached import CacheBook, CacheCandidate, SemanticEntry, SemanticStore
from router.core.errors import UnavailableError
from router.core.ports import Clock
from router.core.types import Attempt, ChatRequest, NanoUSD, RequestRecord, Usage
from router.stages.cascade import parsed
from router.stages.evidence import Evidence
from router.stages.exact import StoredAnswer, canonical, fresh, keyed, origin_of, scope_of, worth_keeping
from router.stages.exchange import Exchange
from router.stages.judge import comparable, readable
from router.stages.likeness import Likeness, Ranking, Stored, Vector
from router.stages.normalise import READ_AT_ONCE
from router.stages.signals import signals_of
from router.stages.telemetry import Telemetry
from router.stages.vector_index import VectorIndex

log = logging.getLogger("farthing")

MAX_TEXT = 8_000
"""Bytes of UTF-8: all of a text is read, or it is not compared at all."""
UNBROKEN, LONG_WORD = 2_000, 40
"""Characters of a text in words longer than LONG_WORD, at most: encoded data, or a script without spaces. A sketch is
made on the event loop: of 8,000 bytes in 0.4 ms where they are English, in 7 ms where they are base64.
"""
FLOOR = 0.48
"""Cosine of two sketches below which the transformer is not asked. Of good pairs that the verifier would serve at
5 % 99 % lie above (docs/semantic-cache.md).
"""
NEAREST = 6
"""Stored prompts that are read, the nearest by sketch."""
LEAST = 0.5
"""Probability below which nothing is a candidate in mode `certified`: the loosest threshold there is."""
LOOK_UP = 0.25
"""Seconds a request waits for its look-up at most."""
LOADING = 0.05
"""Seconds of that for entries that this worker does not know yet."""
LOAD_AGAIN = 60.0
"""Seconds until the verifier is loaded again where that failed."""
QUEUE = 8
"""Look-ups that wait for the transformer at most; beyond that there is no semantic answer."""
ASIDE = 64
"""Look-ups beside calls at most."""
MEASURING, SAVED_UP = 0.03, 1.0
"""Share of a core that look-ups beside calls may take, and the seconds of it that a quiet time saves up."""
KEPT, KEPT_BYTES = 256, 16 * 1024 * 1024
"""Answers that wait to be stored at most, and their bytes."""
MAX_BODY = 1024 * 1024
"""Bytes of an answer that is kept at most."""
MAX_COMPARED = 32 * 1024
"""Bytes of a stored answer that is compared without a judge at most."""
ALIKE = 0.995
_JITTER = 0.1

Outcome = Literal[
    "hit", "would_serve", "below", "refused", "none", "busy", "loading", "away", "timeout", "error", "late"
]


@dataclass(frozen=True, slots=True)
class Found:
    """A stored answer that is a candidate for a request."""

    stored: StoredAnswer
    entry: SemanticEntry
    candidate: CacheCandidate
    comparable: Mapping[str, Any] | None
    """The answer as JSON, where another one can be told to say the same without a judge."""


@dataclass(slots=True)
class Inquiry:
    """What the cache asks for a request. `partition`: all that must be the same; `scope`: what shares evidence.

    `judge` compares answers in this scope, None: agreement does. `serving`: the scope's state before the request;
    `threshold` certified for it, `propensity` with which its candidate is checked, `checked` whether it is drawn.
    `doubts`: in words, why the nearest stored answer was not given where one might have been.
    """

    text: str
    partition: str
    scope: str
    tenant: str
    judge: str | None
    serving: bool = False
    threshold: float | None = None
    propensity: float = 0.0
    checked: bool = False
    found: Found | None = None
    doubts: tuple[str, ...] = ()
    sketch: Vector | None = None
    look_up: asyncio.Task[None] | None = field(default=None, repr=False)


class Effort:
    """What look-ups that only measure may still spend, in seconds (a token bucket). What they skip when it is used
    up does not depend on what they would have found.
    """

    def __init__(self, now: float) -> None:
        self._left = SAVED_UP
        self._at = now

    def left(self, now: float) -> bool:
        self._left = min(SAVED_UP, self._left + MEASURING * (now - self._at))
        self._at = now
        return self._left > 0

    def spend(self, seconds: float) -> None:
        self._left -= seconds


class SemanticCache(Protocol):
    async def find(self, exchange: Exchange) -> Found | None:
        """A stored answer that may be served for this request, or None. Never raises."""
        ...

    def landed(self, exchange: Exchange) -> None:
        """The request's own answer has ended: what was found beside it by now is noted. Never raises."""
        ...

    def keep(self, exchange: Exchange, record: RequestRecord, body: bytes, draw: float) -> None:
        """Keeps a complete answer for others to find. Never blocks and never raises."""
        ...


class LikenessCache:
    """`executor` runs the transformer and the verifier; `draw` gives numbers in [0, 1)."""

    def __init__(
        self,
        store: SemanticStore,
        index: VectorIndex,
        book: CacheBook,
        likeness: Likeness,
        evidence: Evidence,
        executor: Executor,
        secret: bytes,
        telemetry: Telemetry,
        clock: Clock,
        draw: Callable[[], float],
    ) -> None:
        self._store = store
        self._index = index
        self._book = book
        self._likeness = likeness
        self._evidence = evidence
        self._executor = executor
        self._secret = secret
        self._telemetry = telemetry
        self._clock = clock
        self._draw = draw
        self._waiting = 0
        self._load_again = float("-inf")
        self._effort = Effort(clock.monotonic())
        self._no_vector = bytes(2 * likeness.dimensions)
        self._loading: OrderedDict[str, asyncio.Task[bool]] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._kept: deque[tuple[Exchange, RequestRecord, Attempt, bytes, float]] = deque()
        self._kept_bytes = 0
        self._keeper: asyncio.Task[None] | None = None
        store.listen(index)

    # ---- the way of a request ----

    async def find(self, exchange: Exchange) -> Found | None:
        began = self._clock.monotonic()
        try:
            long = len(exchange.request.text) > READ_AT_ONCE
            asked = exchange, self._secret, self._likeness.id
            inquiry = await asyncio.to_thread(inquire, *asked) if long else inquire(*asked)
            exchange.inquiry = inquiry
            if inquiry is None or not exchange.wishes.read_cache:
                return None
            self._state(exchange, inquiry)
            if not inquiry.serving:
                if len(self._tasks) < ASIDE and self._effort.left(began):
                    inquiry.look_up = asyncio.get_running_loop().create_task(self._measure(exchange, inquiry))
                    self._tasks.add(inquiry.look_up)
                    inquiry.look_up.add_done_callback(self._tasks.discard)
                else:
                    self._telemetry.semantic("busy", 0.0)
                return None
            async with asyncio.timeout(LOOK_UP):
                outcome = await self._look(exchange, inquiry, LOADING)
        except TimeoutError:
            outcome = "timeout"
        except Exception:
            log.exception("the semantic cache failed for request %s", exchange.id)
            outcome = "error"
        self._telemetry.semantic(outcome, self._clock.monotonic() - began)
        inquiry = exchange.inquiry
        if inquiry is None or inquiry.found is None:
            return None
        exchange.candidate = inquiry.found.candidate
        if outcome != "hit":
            return None
        self._store.served(inquiry.found.entry)
        return inquiry.found

    def landed(self, exchange: Exchange) -> None:
        inquiry = exchange.inquiry
        if inquiry is None or inquiry.look_up is None:
            return
        if not inquiry.look_up.done():
            inquiry.look_up.cancel()
            self._telemetry.semantic("late", 0.0)
        elif inquiry.found is not None:
            exchange.candidate = inquiry.found.candidate

    def keep(self, exchange: Exchange, record: RequestRecord, body: bytes, draw: float) -> None:
        served = worth_keeping(exchange, record)
        if exchange.inquiry is None or served is None:
            return
        if len(self._kept) >= KEPT or len(body) > min(MAX_BODY, KEPT_BYTES - self._kept_bytes):
            return
        self._kept_bytes += len(body)
        self._kept.append((exchange, record, served, body, draw))
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.get_running_loop().create_task(self._keep_all())

    async def end(self) -> None:
        """Breaks off what is under way."""
        tasks = [*self._tasks, *self._loading.values(), *([self._keeper] if self._keeper is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def settled(self) -> None:
        """Waits for what is under way."""
        while self._tasks or (self._keeper is not None and not self._keeper.done()):
            await asyncio.gather(
                *self._tasks, *([self._keeper] if self._keeper else []), return_exceptions=True
            )
        await self._evidence.settled()

    # ---- looking up ----

    def _state(self, exchange: Exchange, inquiry: Inquiry) -> None:
        """What holds for the scope before this request is looked at, so that no score can influence it."""
        cache = exchange.policy.cache
        max_error = float(cache.max_error)
        if cache.semantic == "certified":
            standing = self._evidence.standing(inquiry.scope, max_error)
            inquiry.threshold = None if standing.broken else standing.threshold
            inquiry.serving = inquiry.threshold is not None
        elif cache.semantic == "enforce":
            shipped = self._likeness.threshold
            standing = self._evidence.standing(inquiry.scope, max_error, lambda: shipped(max_error))
            inquiry.serving = not standing.broken
        if not inquiry.serving and inquiry.judge is None:
            inquiry.propensity = 1.0  # the request's own answer tells, and costs nothing
        elif _pays(exchange):
            inquiry.propensity = float(cache.check)
        inquiry.checked = self._draw() < inquiry.propensity

    async def _measure(self, exchange: Exchange, inquiry: Inquiry) -> None:
        """A look-up beside the call to the model."""
        began = self._clock.monotonic()
        try:
            outcome = await self._look(exchange, inquiry, None, self._effort)
        except Exception:
            log.exception("the semantic cache failed for request %s", exchange.id)
            outcome = "error"
        self._telemetry.semantic(outcome, self._clock.monotonic() - began)

    async def _look(
        self, exchange: Exchange, inquiry: Inquiry, patience: float | None, effort: Effort | None = None
    ) -> Outcome:
        """Sets what was found on the inquiry, served or not."""
        cache = exchange.policy.cache
        if not await self._loaded(inquiry.partition, patience):
            return "away"
        began = self._clock.monotonic()
        near = self._near(exchange, inquiry)
        if effort is not None:
            effort.spend(self._clock.monotonic() - began)
        if not near:
            return "none"
        if self._waiting >= QUEUE:
            return "busy"
        if not self._likeness.ready:
            now = self._clock.monotonic()
            if now >= self._load_again:
                self._load_again = now + LOAD_AGAIN
                self._executor.submit(self._likeness.load)
            return "loading"
        certified = cache.semantic == "certified"
        max_error = float(cache.max_error)
        stored = [Stored(entry.prompt, cosine, entry.vector) for entry, cosine in near]
        self._waiting += 1
        try:
            ranking: Ranking = await asyncio.get_running_loop().run_in_executor(
                self._executor,
                lambda: self._rank(inquiry, stored, max_error, LEAST if certified else None, effort),
            )
        finally:
            self._waiting -= 1
        for one in ranking.judged:
            entry = near[one.index][0]
            body = await self._store.body(entry)
            if body is None:
                continue  # gone from the truth that all workers share
            threshold = ranking.threshold
            if certified:
                threshold = 1.01 if inquiry.threshold is None else inquiry.threshold
            would_serve = one.probability >= (ranking.threshold if threshold > 1 else threshold)
            answer = _stored_answer(entry, body)
            comparable = await _comparable(answer, exchange.request)
            # What agreement certified holds for answers that agreement can compare, and for no others.
            would_serve &= not (certified and inquiry.judge is None and comparable is None)
            serves = inquiry.serving and would_serve
            inquiry.found = Found(
                answer,
                entry,
                CacheCandidate(
                    scope=inquiry.scope,
                    entry=entry.id,
                    similarity=one.similarity,
                    probability=one.probability,
                    threshold=threshold,
                    mode=cache.semantic,
                    served=serves,
                    would_serve=would_serve,
                    saved=entry.cost,
                    reasons=one.reasons,
                    pair=self._pair(inquiry, entry),
                ),
                comparable,
            )
            return "hit" if serves else "would_serve" if would_serve else "below"
        if inquiry.serving:
            inquiry.doubts = ranking.doubts
        return "refused" if ranking.refused else "none"

    def _rank(
        self,
        inquiry: Inquiry,
        stored: list[Stored],
        max_error: float,
        least: float | None,
        effort: Effort | None,
    ) -> Ranking:
        began = self._clock.monotonic()
        try:
            return self._likeness.rank(inquiry.text, stored, max_error, least, inquiry.partition)
        finally:
            if effort is not None:
                effort.spend(self._clock.monotonic() - began)

    async def _loaded(self, partition: str, patience: float | None) -> bool:
        """Whether this worker knows the partition's entries, after `patience` seconds at most (None: the store's)."""
        if self._index.ready(partition):
            return True
        task = self._loading.get(partition)
        if task is None:
            task = self._loading[partition] = asyncio.get_running_loop().create_task(self._load(partition))
        await asyncio.wait({task}, timeout=patience)
        return task.done() and not task.cancelled() and task.result()

    async def _load(self, partition: str) -> bool:
        try:
            entries = await self._store.load(partition)
            if entries is None:
                return False
            # No await in between: what is added meanwhile would be missed.
            return await self._index.fill(partition, entries)
        finally:
            self._loading.pop(partition, None)

    def _near(self, exchange: Exchange, inquiry: Inquiry) -> list[tuple[SemanticEntry, float]]:
        """Entries near by sketch that may be served to this request, the nearest first."""
        inquiry.sketch = self._likeness.sketch(inquiry.text)
        rules = self._book.invalidations
        wrong = rules.pairs
        return [
            (near.entry, near.similarity)
            for near in self._index.near(inquiry.partition, inquiry.sketch, NEAREST, FLOOR)
            if near.entry.encoder_id == self._likeness.id
            and near.entry.origin.model in exchange.policy.allow
            and fresh(exchange, near.entry.stored_at)
            and not rules.stale(near.entry.origin)
            and not (wrong and self._pair(inquiry, near.entry) in wrong)
        ]

    def _pair(self, inquiry: Inquiry, entry: SemanticEntry) -> str:
        """Names the two prompts, whichever was stored. Its name outlives the entry, the texts do not."""
        said = inquiry.text, entry.prompt
        bare = sorted(map(_bare, said))
        # Where courtesies are all that differs, the two are told apart by them: a prompt may get its own answer.
        texts = bare if bare[0] != bare[1] else sorted(said)
        return keyed(self._secret, json.dumps(["pair", inquiry.partition, *texts]))

    # ---- keeping ----

    async def _keep_all(self) -> None:
        while self._kept:
            exchange, record, served, body, draw = self._kept.popleft()
            try:
                await self._keep(exchange, record, served, body, draw)
            except Exception:
                log.exception("the answer to request %s is not kept in the semantic cache", exchange.id)
            finally:
                self._kept_bytes -= len(body)

    async def _keep(
        self, exchange: Exchange, record: RequestRecord, served: Attempt, body: bytes, draw: float
    ) -> None:
        inquiry, cache = exchange.inquiry, exchange.policy.cache
        assert inquiry is not None
        answer = await parsed(body, record.streamed)
        if answer is None or signals_of(exchange.request, answer):
            return  # a refusal, or what was cut off, is no answer for others
        sketch = inquiry.sketch if inquiry.sketch is not None else self._likeness.sketch(inquiry.text)
        vector = self._no_vector
        if cache.semantic in ("enforce", "certified") and self._likeness.ready:
            made = await asyncio.get_running_loop().run_in_executor(
                self._executor, self._likeness.vector, inquiry.text, inquiry.partition
            )
            vector = made.astype("<f2").tobytes()
        stored_at = exchange.opened_at.timestamp()
        entry = SemanticEntry(
            origin=origin_of(exchange, served.model),
            tenant=inquiry.tenant,
            partition=inquiry.partition,
            prompt=inquiry.text,
            vector=vector,
            sketch=sketch.astype("<f2").tobytes(),
            encoder_id=self._likeness.id,
            stored_at=stored_at,
            expires_at=stored_at + cache.ttl * (1 - _JITTER * draw),
            provider=served.provider,
            upstream_model=served.upstream_model,
            prompt_class=record.prompt_class,
            usage=served.usage.quantities(),
            cost=served.cost,
            policy_hash=record.policy_hash,
            stream=record.streamed,
            body_bytes=len(body),
        )
        older = self._same_prompt(exchange, inquiry, entry, sketch)
        self._store.put(entry, body, cache.quota)
        for entry_id in older:
            with suppress(UnavailableError):
                await self._store.remove(entry.partition, entry_id)

    def _same_prompt(
        self, exchange: Exchange, inquiry: Inquiry, entry: SemanticEntry, sketch: Vector
    ) -> list[str]:
        """Earlier answers to the very same prompt, which this one replaces."""
        if exchange.wishes.read_cache:
            known = inquiry.found.entry if inquiry.found is not None else None
            return [known.id] if known is not None and known.prompt == entry.prompt else []
        near = [one.entry for one in self._index.near(entry.partition, sketch, floor=ALIKE)]
        return [one.id for one in near if one.prompt == entry.prompt and one.id != entry.id]


# ---- what a request may be compared with ----


def inquire(exchange: Exchange, secret: bytes, likeness_id: str) -> Inquiry | None:
    """None where the policy, the caller or the kind of request leaves no room for an answer by likeness."""
    policy, wishes, request, caller = exchange.policy, exchange.wishes, exchange.request, exchange.caller
    if policy.cache.semantic == "never" or not (wishes.read_cache or wishes.write_cache) or not caller.team:
        return None
    text = plain_prompt(request)
    if text is None:
        return None
    body = canonical(request.body)
    messages = body.pop("messages")
    history = [*messages[:-1], {**messages[-1], "content": ""}]
    partition = {"likeness": likeness_id, "messages": history, "body": body}
    judge = _judge(exchange)
    instructions = [message for message in messages if message.get("role") in ("system", "developer")]
    scope = {
        "evidence": likeness_id,
        "judge": judge or "",
        # What is a candidate differs: a certified scope looks at less probable ones as well, and in every mode the
        # search ends where one reaches the threshold shipped for `max_error`.
        "candidates": [policy.cache.semantic == "certified", str(policy.cache.max_error)],
        "turns": len(messages) - len(instructions) > 1,
        "instructions": instructions,
        "body": body,
    }
    return Inquiry(
        text=text,
        partition=keyed(secret, scope_of(exchange, partition)),
        scope=keyed(secret, scope_of(exchange, scope)),
        tenant=keyed(secret, json.dumps(["tenant", caller.team])),
        judge=judge,
    )


def plain_prompt(request: ChatRequest) -> str | None:
    """The text of the last message, whole, where all that is asked stands in it and in an identical history."""
    if not request.needs <= {"tools", "json_schema"}:
        return None
    temperature = request.body.get("temperature")
    if temperature is None:
        temperature = 1
    if (
        not isinstance(temperature, int | float)
        or temperature > 1
        or (request.choices > 1 and temperature > 0)
    ):
        return None
    messages = request.body["messages"]
    for message in messages:
        if (
            message.get("role") in ("tool", "function")
            or message.get("tool_calls")
            or message.get("function_call")
        ):
            return None
    last = messages[-1]
    if last.get("role") != "user":
        return None
    text = last.get("content")
    if isinstance(text, list):
        if len(text) != 1 or set(text[0]) != {"type", "text"}:
            return None
        text = text[0]["text"]
    if not isinstance(text, str) or not text.strip() or len(text) > MAX_TEXT:
        return None
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return None  # a lone surrogate: no store takes it
    unbroken = sum(length for length in map(len, text.split()) if length > LONG_WORD)
    return text if size <= MAX_TEXT and unbroken <= UNBROKEN else None


def _judge(exchange: Exchange) -> str | None:
    """The model that compares answers, where the policy pays for it and it may read the prompt."""
    learn = exchange.learn
    if learn is None or learn.judge is None or not _pays(exchange) or not exchange.policy.cache.check:
        return None
    return learn.judge if learn.judge in exchange.policy.allow and readable(exchange.request) else None


def _pays(exchange: Exchange) -> bool:
    """Whether the policy pays for asking a model again."""
    return exchange.learn is not None and exchange.learn.budget is not None


def _bare(text: str) -> str:
    """A text without courtesies, case and punctuation around words."""
    words = (word.strip(".,;:!?") for word in text.casefold().split())
    return " ".join(word for word in words if word and word not in guard.COURTESY)


async def _comparable(stored: StoredAnswer, request: ChatRequest) -> Mapping[str, Any] | None:
    if request.choices != 1 or len(stored.body) > MAX_COMPARED:
        return None
    answer = await parsed(stored.body, stored.stream)
    return answer if answer is not None and comparable(answer) else None


def _stored_answer(entry: SemanticEntry, body: bytes) -> StoredAnswer:
    return StoredAnswer(
        origin=entry.origin,
        stored_at=entry.stored_at,
        stream=entry.stream,
        body=body,
        provider=entry.provider,
        upstream_model=entry.upstream_model,
        prompt_class=entry.prompt_class,
        usage=Usage(*entry.usage),
        cost=NanoUSD(entry.cost) if entry.cost is not None else None,
    )
