"""The composition root: builds one worker from its settings, starts it and ends it. Only here are adapters named."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import random
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from classifiers.classifier import Classifier
from router.adapters.administration import SqlAdministration
from router.adapters.configuration import ConfigurationWatch
from router.adapters.journal import JournalFile
from router.adapters.memory import MemoryBudgetStore, MemoryCacheStore, MemoryFlightBoard
from router.adapters.memory_semantic import MemorySemanticStore
from router.adapters.metrics import PrometheusTelemetry
from router.adapters.openai_wire import OpenAIWire
from router.adapters.price_catalogue import shipped_catalogue
from router.adapters.redis_store.budgets import RedisBudgetStore
from router.adapters.redis_store.caches import RedisCacheStore
from router.adapters.redis_store.connection import RedisConnection, connect
from router.adapters.redis_store.flights import RedisFlightBoard
from router.adapters.redis_store.secret_check import shares_secret
from router.adapters.redis_store.semantic import RedisSemanticStore
from router.adapters.sql.artefacts import ArtefactWatch
from router.adapters.sql.cache_book import SqlCacheBook
from router.adapters.sql.database import open_engine, prepare_schema
from router.adapters.sql.keys import SqlKeyDirectory
from router.adapters.sql.labels import SqlFeedback
from router.adapters.sql.policies import PolicyVersion, record_policy
from router.adapters.sql.spend import SqlSpendSource
from router.adapters.sql.writer import LedgerWriter
from router.adapters.system import RequestIdentifiers, SystemClock
from router.api.admin_plane import LazyAdminPlane
from router.api.data_plane import DataPlane
from router.core.cached import SemanticStore
from router.core.errors import ConfigurationError, UnavailableError
from router.core.health import Health
from router.core.ports import (
    BudgetStore,
    CacheStore,
    FlightBoard,
    Snapshot,
    Upstream,
    UpstreamCall,
    UpstreamReply,
)
from router.core.types import BudgetWindow, RequestRecord
from router.pipeline import Pipeline
from router.settings import Settings, without_password
from router.stages.admit import Admission
from router.stages.cascade import Cascade
from router.stages.check import CacheChecks
from router.stages.classify import Classify
from router.stages.decide import Decide
from router.stages.dispatch import Dispatch
from router.stages.evidence import Evidence
from router.stages.exact import ExactCache
from router.stages.feedback import CacheFeedback, Feedback
from router.stages.flight import Flights
from router.stages.learn import Learn
from router.stages.likeness import ShippedLikeness
from router.stages.reserve import Reserve
from router.stages.semantic import LikenessCache
from router.stages.settle import Settle
from router.stages.shadow import Shadows
from router.stages.sharing import Sharing
from router.stages.vector_index import VectorIndex

log = logging.getLogger("farthing")

BUDGET_WATCH_SECONDS = 10.0
RECORD_AGAIN_SECONDS = 5.0


def _only_one(data: Path) -> int:
    """Locks the data folder, for as long as the descriptor is open: without Redis each gateway would count budgets
    of its own. Raises ConfigurationError where another one holds it.
    """
    try:
        descriptor = os.open(data / "gateway.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigurationError(
            f"FARTHING_DATA_DIR: the folder {data} cannot be written ({error.strerror})."
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise ConfigurationError(
            f"Another gateway serves from the data folder {data}, and budgets are counted in its memory. End it, "
            "name another folder in FARTHING_DATA_DIR, or set FARTHING_REDIS_URL, which both then share."
        ) from None
    return descriptor


class Gateway:
    """One worker. It raises ConfigurationError where it could not serve truthfully.

    `data_plane` and `admin_plane` are ASGI applications; `/readyz` says when `start` has ended.
    """

    def __init__(self, settings: Settings, worker: str = "worker") -> None:
        self.settings = settings
        self._worker = worker
        self._clock = SystemClock()
        self._missing = ["configuration", "schema", "journal replay", "encoder"]
        self._tasks: list[asyncio.Task[None]] = []
        self._unrecorded: asyncio.Queue[PolicyVersion] = asyncio.Queue()
        self._spent_ratios: dict[str, float] = {}
        self._warned: set[tuple[BudgetWindow, str]] = set()
        self._redis: RedisConnection | None = None
        self._provider_keys: dict[str, str] = {}

        self.watch = ConfigurationWatch(settings.config, shipped_catalogue())
        self.watch.subscribe(self._configured)
        self._health = Health()
        self._configured(self.watch.current)
        if len(self._health.unusable) == len(self.watch.current.providers):
            raise ConfigurationError(
                "No provider can be called: " + "; ".join(sorted(set(self._health.unusable.values()))) + "."
            )
        for warning in self.watch.warnings:
            log.warning("%s", warning)
        self._missing.remove("configuration")

        self._alone = _only_one(settings.data) if settings.redis_url is None else None
        self._engine = open_engine(settings.database_url)
        # Reports may take long: they have connections of their own, and none before the first.
        self._admin_engine = open_engine(settings.database_url)
        self._prepare_schema()
        self._missing.remove("schema")

        self._telemetry = PrometheusTelemetry(settings.metrics if settings.workers > 1 else None)
        self._telemetry.gauges = self._gauges
        self._keys = SqlKeyDirectory(self._engine)
        self._journal = JournalFile(settings.journals, worker)
        self._writer = LedgerWriter(self._engine, self._journal, settings.journals, self._clock)
        self._feedback = SqlFeedback(self._engine, settings.journals, self._clock)
        self._classifier = Classifier.load()
        self._artefacts = ArtefactWatch(
            self._engine,
            self._classifier.static.id,
            wanted=lambda: self.watch.current.learn is not None,
        )
        self._book = SqlCacheBook(self._engine, use=lambda: self.watch.current.cache_use)
        self._missing.remove("encoder")
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="transformer")
        self._wires: dict[str, Upstream] = {
            "openai": OpenAIWire(self._provider_keys),
            "litellm": _LazyLitellm(self._provider_keys),
        }
        self._budgets, self._caches = self._stores()
        self._board: FlightBoard = (
            RedisFlightBoard(self._redis, settings.secret) if self._redis is not None else MemoryFlightBoard()
        )
        self._admission = Admission(self._keys, settings.secret, open_team=settings.open_team)
        identifiers = RequestIdentifiers()
        draw = random.Random().random  # noqa: S311 - spreads load and samples; guards nothing
        reserve = Reserve(self._budgets)
        dispatch = Dispatch(self._wires, reserve, self._journal, self._health, self._clock, draw)
        settle = Settle(self._journal, self._budgets, self._telemetry, self._clock)
        self._shadows = Shadows(
            dispatch, reserve, settle, self._classifier.static, self._clock, identifiers, draw
        )
        self._decide = Decide(self._health, self._clock, lambda: self._artefacts.current, self._executor)
        exact = ExactCache(self._caches, settings.secret, lambda: self._book.invalidations)
        self._answers = self._semantic_store()
        self._likeness = ShippedLikeness(self._classifier)
        self._semantic = LikenessCache(
            self._answers,
            VectorIndex(self._clock),
            self._book,
            self._likeness,
            Evidence(self._book, self._clock.monotonic),
            self._executor,
            settings.secret,
            self._telemetry,
            self._clock,
            draw,
        )
        pipeline = Pipeline(
            configuration=lambda: self.watch.current,
            admission=self._admission,
            exact=exact,
            flights=Flights(),
            sharing=Sharing(self._board, exact, self._clock),
            classify=Classify(self._classifier, self._executor),
            learn=Learn(self._classifier.static, self._clock),
            semantic=self._semantic,
            decide=self._decide,
            reserve=reserve,
            cascade=Cascade(dispatch, reserve, self._clock),
            settle=settle,
            shadows=self._shadows,
            checks=CacheChecks(self._shadows, self._answers, self._clock),
            book=self._book,
            clock=self._clock,
            draw=draw,
        )
        self.data_plane = DataPlane(
            pipeline=pipeline,
            admission=self._admission,
            feedback=Feedback(self._feedback, self._clock),
            cache_feedback=CacheFeedback(self._feedback, self._quarantine, self._clock),
            configuration=lambda: self.watch.current,
            telemetry=self._telemetry,
            metrics=self._telemetry.render,
            readiness=self,
            identifiers=identifiers,
            clock=self._clock,
        )
        self.admin_plane = LazyAdminPlane(
            admin_key=settings.admin_key,
            administration=SqlAdministration(
                self._admin_engine,
                settings.secret,
                settings.journals,
                self.watch,
                self._clock,
                self._admin_status,
                self._book,
                self._answers,
            ),
        )

    async def start(self) -> None:
        """Replays the journal, then lets requests in."""
        if self._redis is not None:
            self._writer.on_cancelled = self._release_in(asyncio.get_running_loop())
        try:
            await self._writer.replay()
            await asyncio.to_thread(self._book.start)
        except UnavailableError as error:
            raise ConfigurationError(
                f"The database at {without_password(self.settings.database_url)} does not answer ({error}). "
                "Start it, or correct FARTHING_DATABASE_URL."
            ) from None
        self._writer.start()
        self.watch.subscribe(lambda _: self._book.wake())
        await asyncio.to_thread(self._keys.refresh)
        self._record_later(self.watch.current)
        self.watch.subscribe(self._record_later)
        await asyncio.to_thread(self._artefacts.start)
        self._keys.start()
        if self._redis is not None:
            await self._join_redis(self._redis)
        await self._board.start()
        await self._answers.start()
        self.watch.subscribe(self._load_likeness_later)
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self.watch.run()),
            loop.create_task(self._record_policies()),
            loop.create_task(self._watch_budgets()),
            loop.create_task(asyncio.to_thread(self._load_transformer)),
        ]
        self._missing.remove("journal replay")

    def _load_likeness_later(self, _: Snapshot) -> None:
        if self.watch.current.cache_use.semantic:
            self._executor.submit(self._likeness.load)

    async def _quarantine(self, entry: str) -> None:
        """The rule against it is in SQL; this worker need not wait for its next look."""
        with suppress(UnavailableError):
            await asyncio.to_thread(self._book.refresh_now)
        with suppress(UnavailableError):
            await self._answers.remove_entry(entry)

    def _release_in(self, loop: asyncio.AbstractEventLoop) -> Callable[[RequestRecord], None]:
        """Gives back what a dead worker held in shared budgets, and counts what it is booked at."""

        def release(record: RequestRecord) -> None:
            cost = record.cost if record.cost is not None else record.worst_case
            loop.call_soon_threadsafe(self._budgets.settle, record.id, record.budgets, cost)

        return release

    async def _join_redis(self, redis: RedisConnection) -> None:
        """Raises ConfigurationError where the workers behind this Redis hash with another secret."""
        try:
            shared = await shares_secret(redis, self.settings.secret)
        except UnavailableError:
            log.warning(
                "Redis at %s does not answer: caches are off, and callers under a hard cap are refused until it does",
                without_password(self.settings.redis_url or ""),
            )
            return
        if not shared:
            raise ConfigurationError(
                "FARTHING_SECRET is not the one that other workers behind this Redis use. Set the same on each; "
                "after changing it on all, delete the Redis key farthing:secret-check."
            )

    def _load_transformer(self) -> None:
        self._classifier.minilm  # noqa: B018 - reading it loads it
        if self.watch.current.cache_use.semantic:
            self._likeness.load()

    def drain(self) -> None:
        """Refuses new requests; those in flight go on, shadow answers do not."""
        self._admission.draining = True
        self._shadows.end()

    async def stop(self) -> None:
        """After the servers have ended: settles what is left, writes it, closes everything."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(asyncio.CancelledError, Exception):
                await task
        await self._shadows.ended()
        await self._semantic.end()
        for wire in self._wires.values():
            await wire.close()
        await self._board.close()
        await self._budgets.close()
        await self._caches.close()
        await self._answers.close()
        if self._redis is not None:
            await self._redis.close()
        self._keys.stop()
        self._feedback.close()
        await asyncio.to_thread(self._artefacts.stop)
        await asyncio.to_thread(self._book.stop)
        await asyncio.to_thread(self._writer.stop)
        self._journal.close()
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._engine.dispose()
        self._admin_engine.dispose()
        if self._alone is not None:
            os.close(self._alone)

    def missing(self) -> list[str]:
        """What `/readyz` waits for; providers and Redis are not among it."""
        return list(self._missing)

    def _prepare_schema(self) -> None:
        shown = without_password(self.settings.database_url)
        try:
            problem = prepare_schema(
                self._engine, self.settings.database_url, embedded=self.settings.embedded
            )
        except UnavailableError as error:
            raise ConfigurationError(
                f"The database at {shown} does not answer ({error}). Start it, or correct FARTHING_DATABASE_URL."
            ) from None
        if problem is not None:
            raise ConfigurationError(f"The database at {shown}: {problem}.")

    def _stores(self) -> tuple[BudgetStore, CacheStore]:
        source = SqlSpendSource(self._engine, self.settings.journals)
        if self.settings.redis_url is None:
            return MemoryBudgetStore(source, self._clock), MemoryCacheStore(self._clock)
        self._redis = connect(self.settings.redis_url)
        budgets = RedisBudgetStore(self._redis, source, self._clock, workers=self.settings.workers)
        return budgets, RedisCacheStore(self._redis)

    def _semantic_store(self) -> SemanticStore:
        if self._redis is None:
            return MemorySemanticStore(self._clock)
        return RedisSemanticStore(self._redis, self._clock)

    def _configured(self, snapshot: Snapshot) -> None:
        """Provider keys for a new configuration. A provider without its key is left out of every plan."""
        keys: dict[str, str] = {}
        unusable: dict[str, str] = {}
        for provider in snapshot.providers.values():
            if provider.api_key_env is None:
                continue
            key = self.settings.environment.get(provider.api_key_env)
            if key and not (key.isascii() and key.isprintable() and " " not in key):
                unusable[provider.name] = f"{provider.api_key_env} holds more than the bare key"
            elif key:
                keys[provider.name] = key
            else:
                unusable[provider.name] = (
                    f"{provider.api_key_env} is not set, which provider {provider.name} needs"
                )
        for reason in unusable.values():
            log.warning("%s: its models are left out", reason)
        self._provider_keys.clear()
        self._provider_keys.update(keys)
        self._health.unusable = unusable

    def _record_later(self, _: Snapshot) -> None:
        providers, policy = self.watch.texts
        version = PolicyVersion(self.watch.current.hash, self._clock.now(), providers, policy)
        self._unrecorded.put_nowait(version)

    async def _record_policies(self) -> None:
        """Keeps each pair that came into force, so that a ledger row's policy hash can be read years later."""
        while True:
            version = await self._unrecorded.get()
            while True:
                try:
                    await asyncio.to_thread(record_policy, self._engine, version)
                    break
                except UnavailableError as error:
                    log.warning("policy %s is not in the history yet: %s", version.hash, error)
                await asyncio.sleep(RECORD_AGAIN_SECONDS)

    async def _watch_budgets(self) -> None:
        """Keeps the spent share of each budget for metrics, and warns once when a `warn_at` is passed."""
        while True:
            snapshot = self.watch.current
            limits, period = snapshot.budgets(self._clock.now())
            windows = [BudgetWindow(limit.key, period) for limit in limits]
            with suppress(UnavailableError):
                readings = await self._budgets.readings(windows)
                for limit, reading in zip(limits, readings, strict=True):
                    bound = limit.limit or limit.hard_cap
                    if not bound:
                        continue
                    share = reading.spent / bound
                    self._spent_ratios[limit.key] = share
                    for mark in limit.warn_at:
                        seen = (reading.window, str(mark))
                        if share >= mark and seen not in self._warned:
                            self._warned.add(seen)
                            log.warning("budget %s has passed %s of its limit", limit.key, f"{mark:.0%}")
            await asyncio.sleep(BUDGET_WATCH_SECONDS)

    def _admin_status(self) -> Mapping[str, Any]:
        return {
            "ready": not self._missing,
            "missing": self.missing(),
            "sql_up": self._writer.sql_up and self._keys.sql_up,
            "redis_up": self._redis.up if self._redis is not None else None,
            "journal_unsettled": self._writer.unsettled,
            "open_breakers": [
                {"provider": provider, "model": model or None}
                for provider, model in self._health.open_breakers(self._clock.monotonic())
            ],
            "unusable_providers": dict(self._health.unusable),
            "learned_artefact": learned.predictor.id if (learned := self._artefacts.current) else None,
            "refused_artefact": self._artefacts.refused,
        }

    def _gauges(self) -> Iterable[tuple[str, dict[str, str], float]]:
        yield "farthing_journal_unsettled", {}, float(self._writer.unsettled)
        yield "farthing_sql_up", {}, float(self._writer.sql_up)
        if self._redis is not None:
            yield "farthing_redis_up", {}, float(self._redis.up)
        for budget, share in self._spent_ratios.items():
            yield "farthing_budget_spent_ratio", {"budget": budget}, share
        for provider, model in self._health.open_breakers(self._clock.monotonic()):
            yield "farthing_breaker_open", {"provider": provider, "model": model}, 1.0
        for prompt_class, model, missing in self._decide.floor.missing():
            labels = {"prompt_class": prompt_class, "model": model}
            yield "farthing_floor_labels_missing", labels, float(missing)


class _LazyLitellm:
    """Imports litellm (seconds, and 160 MB) only when a provider needs it."""

    def __init__(self, keys: dict[str, str]) -> None:
        self._keys = keys
        self._wire: Upstream | None = None

    async def send(self, call: UpstreamCall) -> UpstreamReply:
        if self._wire is None:
            from router.adapters.litellm_wire import LitellmWire

            self._wire = LitellmWire(self._keys)
        return await self._wire.send(call)

    async def close(self) -> None:
        if self._wire is not None:
            await self._wire.close()
