"""Both files compiled to one frozen snapshot, and the precedence by which it answers.

`allow` is intersected down defaults -> team -> app -> every matching rule and `deny` is the union; a scalar is taken
from the first matching rule, then app, team, defaults; only an exception in force widens, and `hard_cap` always wins.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Literal
from zoneinfo import ZoneInfo

from router.core.catalogue import (
    BUCKET_OF_PRICE,
    SINCE_ALWAYS,
    Catalogue,
    CatalogueModel,
    DatedPrice,
    price_record,
)
from router.core.document import Document
from router.core.errors import InvalidRequest
from router.core.learning import BUDGET
from router.core.policy import (
    AtLimit,
    BudgetLimit,
    CachePolicy,
    CacheUse,
    ClassRequirement,
    EffectivePolicy,
    LearnPolicy,
    ModelSpec,
    ProviderSpec,
    Timeouts,
)
from router.core.pricing import every_bucket, rounded_price
from router.core.schema import (
    DAYS,
    BudgetEntry,
    ContractEntry,
    ExceptionEntry,
    FixedPrice,
    GpuPrice,
    ModelEntry,
    PolicyFile,
    ProviderEntry,
    ProvidersFile,
    QualityEntry,
    RuleEntry,
    ScopedSettings,
    Settings,
    TimeWindow,
)
from router.core.types import NANO_PER_USD, PROMPT_CLASSES, NanoUSD, PriceRecord, nano

SHOWN_REQUIREMENTS: Mapping[str, ClassRequirement] = MappingProxyType(
    {
        "simple": ClassRequirement(Decimal("0.90"), first_token_p95=1.5),
        "medium": ClassRequirement(Decimal("0.90"), first_token_p95=4.0),
        "complex": ClassRequirement(Decimal("0.90"), first_token_p95=15.0, total_p95=120.0),
    }
)
"""What a class must get where `classes` does not say."""

_MEMO_SIZE = 4096
_LONGEST_NAME = 200
_Timeline = tuple[tuple[float, ...], tuple[PriceRecord, ...]]


@dataclass(frozen=True, slots=True)
class PricedModel:
    """A model's prices before contracts. `long_context_above` as in the catalogue."""

    dated: tuple[DatedPrice, ...]
    marginal_share: Decimal
    source: str
    long_context_above: int | None = None


class CompiledSnapshot:
    """`ports.Snapshot`. Nothing in it changes once built but the memo of `resolve`, which holds one minute: time
    windows, days, months, contracts and exceptions all begin and end on a whole minute.
    """

    def __init__(
        self, providers: ProvidersFile, policy: PolicyFile, content_hash: str, catalogue: Catalogue
    ) -> None:
        self.hash = content_hash
        self.policy = policy
        self.catalogue = catalogue
        self.timezone = ZoneInfo(policy.organisation.timezone)
        self.providers: Mapping[str, ProviderSpec] = MappingProxyType(
            {name: _provider(name, entry) for name, entry in providers.providers.items()}
        )
        self.models: Mapping[str, ModelSpec] = MappingProxyType(
            {
                name: _model(name, entry, self.providers[entry.provider], catalogue)
                for name, entry in providers.models.items()
            }
        )
        self.aliases: Mapping[str, str] = MappingProxyType(dict(policy.aliases))
        self.unknown_model: str = policy.unknown_model
        self.baseline: str | None = policy.baseline
        self.learn: LearnPolicy | None = _learn(policy)
        self.cache_use = _cache_use(policy)
        self.known_tags: frozenset[str] = frozenset(_tag_keys(policy))
        self.required_key_variables: tuple[str, ...] = tuple(
            dict.fromkeys(
                variable
                for model in self.models.values()
                if (variable := self.providers[model.provider].api_key_env) is not None
            )
        )
        self.priced: Mapping[str, PricedModel] = MappingProxyType(
            {
                name: priced
                for name, entry in providers.models.items()
                if (priced := _priced(name, entry, self.providers[entry.provider], catalogue)) is not None
            }
        )
        self._timelines = {
            name: _timeline(self.models[name], priced, policy.contracts, self.timezone)
            for name, priced in self.priced.items()
        }
        self._named: dict[str, _Timeline | None] = {}
        self._minute = -1
        self._memo: dict[object, EffectivePolicy] = {}

    # -- prices -------------------------------------------------------------------------------------------------

    def price(self, model: str, at: datetime) -> PriceRecord | None:
        """The price in force, contracts applied; None where unknown. `model` is a policy name."""
        return _in_force(self._timelines.get(model), at)

    def catalogue_price(self, name: str, at: datetime) -> PriceRecord | None:
        """The list price of a model by its maker's name (for savings); None: unknown."""
        if len(name) > _LONGEST_NAME:
            return None
        if name not in self._named:
            if len(self._named) >= _MEMO_SIZE:
                self._named.clear()
            found = self.catalogue.named(name)
            self._named[name] = None if found is None else _listed(found, self.catalogue.source)
        return _in_force(self._named[name], at)

    # -- policy -------------------------------------------------------------------------------------------------

    def resolve(
        self, team: str, app: str | None, tags: Mapping[str, frozenset[str]], at: datetime
    ) -> EffectivePolicy:
        """What holds for this caller at this moment (`at` in UTC).

        Raises InvalidRequest (code `unknown_tag`) for a tag key the policy does not know.
        """
        minute = int(at.timestamp()) // 60
        if minute != self._minute:
            self._minute, self._memo = minute, {}
        key = (team, app, tuple(sorted(tags.items())) if tags else ())
        found = self._memo.get(key)
        if found is None:
            found = self._resolve(team, app, tags, at.astimezone(self.timezone))
            if len(self._memo) >= _MEMO_SIZE:
                self._memo.clear()
            self._memo[key] = found
        return found

    def _resolve(
        self, team: str, app: str | None, sent: Mapping[str, frozenset[str]], local: datetime
    ) -> EffectivePolicy:
        policy = self.policy
        if not self.known_tags.issuperset(sent):
            known = ", ".join(sorted(self.known_tags)) or "none"
            raise InvalidRequest(
                f"a tag key is not known to the policy; known keys: {known}. "
                "Correct x-farthing-tags, or name the tag in policy.yaml.",
                param="x-farthing-tags",
                code="unknown_tag",
            )
        team_entry = policy.teams.get(team)
        app_entry = team_entry.apps.get(app) if team_entry is not None and app is not None else None
        scope = team_entry if team_entry is not None else policy.unlisted_teams
        tags = _merged_tags(app_entry.tags if app_entry is not None else {}, sent)
        exceptions = [entry for entry in policy.exceptions if _in_exception(entry, team, app, local.date())]
        skipped = {name for entry in exceptions for name in entry.skip_rules}
        rules = [
            rule
            for rule in policy.rules
            if rule.name not in skipped and _matches(rule, team, app, tags, local)
        ]

        layers: list[tuple[str, Settings]] = [("defaults", policy.defaults)]
        layers.append((f"team {team}" if team_entry is not None else "unlisted_teams", scope))
        if app_entry is not None:
            layers.append((f"app {team}/{app}", app_entry))
        excluded: dict[str, str] = {}
        for label, layer in layers:
            _narrow(self.models, excluded, label, layer)
        for entry in exceptions:
            for model in entry.allow or ():
                excluded.pop(model, None)
        narrowing: list[tuple[str, Settings]] = [(f"rule '{rule.name}'", rule.then) for rule in rules]
        narrowing += [(f"exception '{e.name}'", Settings(deny=e.deny)) for e in exceptions if e.deny]
        for label, layer in narrowing:
            _narrow(self.models, excluded, label, layer)
        allow = tuple(model for model in self.models if model not in excluded)

        scoped: list[ScopedSettings] = [*exceptions, *(rule.then for rule in rules)]
        if app_entry is not None:
            scoped.append(app_entry)
        scoped.append(scope)
        chain: list[Settings] = [*scoped, policy.defaults]
        classes: dict[str, ClassRequirement] = {
            cls: _requirement(cls, [entry.classes for entry in scoped], policy) for cls in PROMPT_CLASSES
        }
        cost = _first(chain, "max_cost_per_request")
        substitute = bool(_first(chain, "substitute"))
        when_nothing_meets: Literal["best", "refuse"] = _first(chain, "when_nothing_meets") or "best"
        on_unpriced_model: Literal["block", "allow"] = _first(chain, "on_unpriced_model") or "block"
        cache = _cache(chain)
        named_rules = tuple(rule.name for rule in rules)
        named_exceptions = tuple(entry.name for entry in exceptions)
        return EffectivePolicy(
            policy_hash=self.hash,
            allow=allow,
            excluded=MappingProxyType(excluded),
            fallback=tuple(m for m in dict.fromkeys(_first(chain, "fallback") or ()) if m not in excluded),
            substitute=substitute,
            classes=MappingProxyType(classes),
            max_cost_per_request=None if cost is None else nano(cost),
            assume_max_output=_first(chain, "assume_max_output") or 4096,
            when_nothing_meets=when_nothing_meets,
            on_unpriced_model=on_unpriced_model,
            cache=cache,
            advise=_first(chain, "advise") or Decimal(0),
            learns=all(layer.learn is None for layer in chain),
            budgets=self._budgets(team, app, exceptions),
            baseline=policy.baseline,
            cost_center=scope.cost_center,
            tags=MappingProxyType(tags),
            rules=named_rules,
            exceptions=named_exceptions,
            fingerprint=_digest(
                [(m, self.models[m].provider, self.models[m].upstream_name) for m in allow],
                sorted((key, sorted(values)) for key, values in tags.items()),
                named_rules,
                named_exceptions,
                [
                    (cls, str(r.min_quality), r.first_token_p95, r.total_p95, str(r.confidence), r.cascade)
                    for cls, r in classes.items()
                ],
                (substitute, str(cost), when_nothing_meets, on_unpriced_model, self.baseline),
                sorted(self.aliases.items()),
            ),
            period=local.strftime("%Y-%m"),
        )

    def team_budget(self, team: str, at: datetime) -> BudgetLimit | None:
        """The budget of a team, named in the policy or not."""
        key = f"team:{team}"
        return next((limit for limit in self.resolve(team, None, {}, at).budgets if limit.key == key), None)

    def budgets(self, at: datetime) -> tuple[tuple[BudgetLimit, ...], str]:
        """Every budget the policy names, with the exceptions in force at `at`, and the month that falls in."""
        found: dict[str, BudgetLimit] = {}
        period = at.astimezone(self.timezone).strftime("%Y-%m")
        for team, entry in self.policy.teams.items():
            for app in (None, *entry.apps):
                for limit in self.resolve(team, app, {}, at).budgets:
                    found.setdefault(limit.key, limit)
        organisation = _limit("organisation", self.policy.organisation.budget, ())
        if organisation is not None:
            found.setdefault(organisation.key, organisation)
        if self.learn is not None and self.learn.budget is not None:
            found[BUDGET] = BudgetLimit(BUDGET, self.learn.budget, self.learn.budget, "refuse")
        return tuple(found.values()), period

    def _budgets(
        self, team: str, app: str | None, exceptions: Sequence[ExceptionEntry]
    ) -> tuple[BudgetLimit, ...]:
        policy = self.policy
        team_entry = policy.teams.get(team)
        limits = [_limit("organisation", policy.organisation.budget, ())]
        limits.append(
            _limit(
                f"team:{team}",
                team_entry.budget if team_entry is not None else policy.unlisted_teams.budget,
                [entry.budget for entry in exceptions if entry.app is None],
            )
        )
        if team_entry is not None and app is not None and app in team_entry.apps:
            limits.append(
                _limit(
                    f"app:{team}/{app}",
                    team_entry.apps[app].budget,
                    [entry.budget for entry in exceptions if entry.app is not None],
                )
            )
        return tuple(limit for limit in limits if limit is not None)


def compile_files(
    providers: ProvidersFile, policy: PolicyFile, documents: Sequence[Document], catalogue: Catalogue
) -> CompiledSnapshot:
    """The snapshot of two files whose references are known to hold (`lint.load` sees to that).

    Its hash covers the content of both files as written, not their comments and layout.
    """
    content = [document.root.plain() if document.root is not None else None for document in documents]
    return CompiledSnapshot(providers, policy, _digest(content), catalogue)


def _digest(*content: object) -> str:
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# -- providers.yaml ---------------------------------------------------------------------------------------------


def _provider(name: str, entry: ProviderEntry) -> ProviderSpec:
    return ProviderSpec(
        name=name,
        wire=entry.wire,
        base_url=entry.base_url,
        api_key_env=entry.api_key_env,
        timeouts=Timeouts(
            connect=entry.timeouts.connect,
            first_token=entry.timeouts.first_token,
            idle=entry.timeouts.idle,
            total=entry.timeouts.total,
        ),
        stream_usage=entry.stream_usage,
        deny_fields=frozenset(entry.deny_fields),
        drain=entry.drain,
        options=MappingProxyType(dict(entry.options)) if entry.options else None,
    )


def _model(name: str, entry: ModelEntry, provider: ProviderSpec, catalogue: Catalogue) -> ModelSpec:
    upstream = entry.name or name
    quality: Mapping[str, Decimal] | None = None
    if isinstance(entry.quality, QualityEntry):
        quality = {cls: getattr(entry.quality, cls) for cls in PROMPT_CLASSES}
    elif entry.quality is not None:
        quality = catalogue.quality(upstream)
    rate = entry.expect.tokens_per_second
    return ModelSpec(
        name=name,
        provider=entry.provider,
        upstream_name=upstream,
        context=entry.context,
        max_output=min(entry.max_output or entry.context, entry.context),
        supports=frozenset(entry.supports),
        # A provider's denied fields (another way to name models or routes) are refused like a model's own.
        rejects=frozenset(entry.rejects) | provider.deny_fields,
        rename=MappingProxyType(dict(entry.rename)),
        expect_first_token=entry.expect.first_token,
        expect_tokens_per_second=None if rate is None else float(rate),
        quality=None if quality is None else MappingProxyType(dict(quality)),
    )


def catalogue_model(
    name: str, entry: ModelEntry, provider: ProviderSpec, catalogue: Catalogue
) -> CatalogueModel | None:
    """Where the catalogue knows a configured model."""
    upstream = entry.name or name
    known = catalogue.provider(
        provider.name, provider.base_url, upstream if provider.wire == "litellm" else ""
    )
    return None if known is None else catalogue.find(known, upstream)


def _priced(name: str, entry: ModelEntry, provider: ProviderSpec, catalogue: Catalogue) -> PricedModel | None:
    price = entry.price
    if price is None:
        return None
    if isinstance(price, FixedPrice):
        named = {
            bucket: amount
            for key, bucket in BUCKET_OF_PRICE.items()
            if (amount := getattr(price, key)) is not None
        }
        return PricedModel((DatedPrice(SINCE_ALWAYS, every_bucket(named)),), Decimal(1), "providers.yaml")
    if isinstance(price, GpuPrice):
        dated = DatedPrice(SINCE_ALWAYS, gpu_prices(price))
        return PricedModel((dated,), price.marginal_share, "providers.yaml, GPU hours")
    found = catalogue_model(name, entry, provider, catalogue)
    if found is None:
        return None
    return PricedModel(found.prices, Decimal(1), catalogue.source, found.long_context_above)


def gpu_prices(price: GpuPrice) -> dict[str, Decimal]:
    """USD per million tokens of a local model: GPU-seconds of work x USD per GPU-second, rates at saturation.

    A prompt token found in the server's cache is no work and costs nothing.
    """
    per_second = price.gpu_hour * price.gpus / 3600
    named = {
        "input": rounded_price(per_second / price.prefill_tps * 1_000_000),
        "output": rounded_price(per_second / price.decode_tps * 1_000_000),
    }
    return {**every_bucket(named), "input_cached": Decimal(0)}


# -- prices over time -------------------------------------------------------------------------------------------


def _in_force(timeline: _Timeline | None, at: datetime) -> PriceRecord | None:
    if timeline is None:
        return None
    index = bisect_right(timeline[0], at.timestamp()) - 1
    return timeline[1][index] if index >= 0 else None


def midnight(day: date, zone: ZoneInfo) -> datetime:
    return datetime.combine(day, time(), tzinfo=zone)


def _listed(model: CatalogueModel, source: str) -> _Timeline:
    records = [
        price_record(model.provider, model.name, dated.effective_from, dated.prices, source)
        for dated in sorted(model.prices, key=lambda dated: dated.effective_from)
    ]
    return tuple(record.effective_from.timestamp() for record in records), tuple(records)


def _timeline(
    model: ModelSpec, priced: PricedModel, contracts: Sequence[ContractEntry], zone: ZoneInfo
) -> _Timeline:
    mine = [
        contract
        for contract in contracts
        if contract.provider == model.provider and (contract.models is None or model.name in contract.models)
    ]
    dated = sorted(priced.dated, key=lambda dated: dated.effective_from)
    edges = {entry.effective_from for entry in dated}
    for contract in mine:
        edges.add(max(midnight(contract.start, zone), SINCE_ALWAYS))
        if contract.until is not None:
            edges.add(midnight(contract.until, zone))
    starts: list[float] = []
    records: list[PriceRecord] = []
    for edge in sorted(edges):
        base = next((entry for entry in reversed(dated) if entry.effective_from <= edge), None)
        if base is None:
            continue
        contract_in_force = next(
            (
                contract
                for contract in mine
                if midnight(contract.start, zone) <= edge
                and (contract.until is None or edge < midnight(contract.until, zone))
            ),
            None,
        )
        starts.append(edge.timestamp())
        records.append(_record(model, priced, base, contract_in_force, zone))
    return tuple(starts), tuple(records)


def _record(
    model: ModelSpec, priced: PricedModel, base: DatedPrice, contract: ContractEntry | None, zone: ZoneInfo
) -> PriceRecord:
    since, prices = base.effective_from, base.prices
    if contract is not None:
        kept = 1 - contract.discount
        prices = {bucket: rounded_price(price * kept) for bucket, price in prices.items()}
        since = max(since, midnight(contract.start, zone).astimezone(since.tzinfo))
    marginal = {bucket: rounded_price(price * priced.marginal_share) for bucket, price in prices.items()}
    return price_record(
        model.provider,
        model.upstream_name,
        since,
        prices,
        priced.source,
        list_prices=base.prices,
        marginal_prices=marginal,
        contract=None if contract is None else contract.reference,
    )


# -- precedence -------------------------------------------------------------------------------------------------


def _tag_keys(policy: PolicyFile) -> Iterable[str]:
    for rule in policy.rules:
        yield from rule.when.tags
    for team in policy.teams.values():
        for app in team.apps.values():
            yield from app.tags


def _merged_tags(
    own: Mapping[str, Sequence[str]], sent: Mapping[str, frozenset[str]]
) -> dict[str, frozenset[str]]:
    keys = sorted({*own, *sent})
    return {key: frozenset(own.get(key, ())) | sent.get(key, frozenset()) for key in keys}


def _in_exception(entry: ExceptionEntry, team: str, app: str | None, today: date) -> bool:
    return (
        entry.team == team
        and (entry.app is None or entry.app == app)
        and (entry.start is None or entry.start <= today)
        and today < entry.until
    )


def _matches(
    rule: RuleEntry, team: str, app: str | None, tags: Mapping[str, frozenset[str]], local: datetime
) -> bool:
    when = rule.when
    return (
        (when.team is None or team in when.team)
        and (when.app is None or app in when.app)
        and all(not values.isdisjoint(tags.get(key, frozenset())) for key, values in when.tags.items())
        and (not when.windows or any(within(window, local) for window in when.windows))
    )


def within(window: TimeWindow, local: datetime) -> bool:
    """Whether a local time lies in the window; past midnight the day is that of the window's begin."""
    today = DAYS[local.weekday()]
    if window.start is None or window.end is None:
        return today in window.days
    clock = local.time()
    if window.start < window.end:
        return today in window.days and window.start <= clock < window.end
    if clock >= window.start:
        return today in window.days
    return clock < window.end and DAYS[(local - timedelta(days=1)).weekday()] in window.days


def _narrow(models: Mapping[str, ModelSpec], excluded: dict[str, str], label: str, layer: Settings) -> None:
    if layer.allow is not None:
        for model in models:
            if model not in layer.allow:
                excluded.setdefault(model, f"not allowed by {label}")
    for model in layer.deny:
        excluded.setdefault(model, f"denied by {label}")


def _first(chain: Sequence[Settings], name: str) -> Any:
    return next((value for layer in chain if (value := getattr(layer, name)) is not None), None)


def _requirement(cls: str, layers: Sequence[Any], policy: PolicyFile) -> ClassRequirement:
    entries = [getattr(layer, cls) for layer in (*layers, policy.classes)]
    shown = SHOWN_REQUIREMENTS[cls]

    def field(name: Literal["min_quality", "first_token_p95", "total_p95", "confidence"]) -> Any:
        # `none` is written as a value of its own: the field is set, and to None.
        return next((getattr(e, name) for e in entries if name in e.model_fields_set), getattr(shown, name))

    verify = next((e.cascade.verify for e in entries if e.cascade is not None), "none")
    return ClassRequirement(
        field("min_quality"),
        field("first_token_p95"),
        field("total_p95"),
        field("confidence"),
        None if verify == "none" else verify,
    )


def _learn(policy: PolicyFile) -> LearnPolicy | None:
    learn = policy.learn
    if learn is None:
        return None
    return LearnPolicy(
        shadow=learn.shadow,
        budget=None if learn.budget is None else nano(learn.budget.month),
        judge=learn.judge,
        keep_prompts=learn.keep_prompts,
        certifies=_certifies(policy),
    )


def _certifies(policy: PolicyFile) -> bool:
    """Whether any class asks for `confidence`, whoever it holds for."""
    scopes: list[Any] = [policy, policy.unlisted_teams, *policy.exceptions]
    scopes += [rule.then for rule in policy.rules]
    for team in policy.teams.values():
        scopes += [team, *team.apps.values()]
    return any(
        getattr(scope.classes, name).confidence is not None
        for scope in scopes
        if hasattr(scope, "classes")
        for name in PROMPT_CLASSES
    )


def _cache(chain: Sequence[Settings]) -> CachePolicy:
    plain = CachePolicy()

    def field(name: str) -> Any:
        values = (getattr(layer.cache, name) for layer in chain)
        return next((value for value in values if value is not None), getattr(plain, name))

    return CachePolicy(**{name: field(name) for name in CachePolicy.__dataclass_fields__})


def _cache_use(policy: PolicyFile) -> CacheUse:
    """Over every layer that may come to hold for somebody."""
    plain = CachePolicy()
    teams = policy.teams.values()
    layers = [
        policy.defaults,
        policy.unlisted_teams,
        *teams,
        *(app for team in teams for app in team.apps.values()),
        *(rule.then for rule in policy.rules),
        *policy.exceptions,
    ]
    told = [layer.cache for layer in layers]
    first = policy.defaults.cache
    exact = plain.exact if first.exact is None else first.exact
    semantic = first.semantic or plain.semantic
    return CacheUse(
        exact=exact or any(cache.exact for cache in told),
        semantic=any((cache.semantic or semantic) != "never" for cache in told),
        longest_ttl=max(plain.ttl if first.ttl is None else first.ttl, *(cache.ttl or 0.0 for cache in told)),
    )


def _limit(key: str, entry: BudgetEntry | None, widened: Sequence[BudgetEntry | None]) -> BudgetLimit | None:
    if entry is None:
        return None
    layers = [*(budget for budget in widened if budget is not None), entry]

    def field(name: str) -> Any:
        return next((value for layer in layers if (value := getattr(layer, name)) is not None), None)

    month, hard_cap = field("month"), field("hard_cap")
    at_limit: AtLimit = field("at_limit") or ("downgrade" if hard_cap is not None else "refuse")
    if hard_cap is None and at_limit == "refuse":
        hard_cap = month
    if month is not None and hard_cap is not None:
        month = min(month, hard_cap)
    warn_at = next((layer.warn_at for layer in layers if layer.warn_at), [])
    return BudgetLimit(
        key=key,
        limit=None if month is None else nano(month),
        hard_cap=None if hard_cap is None else nano(hard_cap),
        at_limit=at_limit,
        warn_at=tuple(sorted(warn_at)),
    )


# -- what people read -------------------------------------------------------------------------------------------


def describe(effective: EffectivePolicy) -> dict[str, Any]:
    """The resolved policy as plain data (amounts in USD as text), for `policy explain` and the admin plane."""

    def money(amount: NanoUSD | None) -> str | None:
        return None if amount is None else format((Decimal(amount) / NANO_PER_USD).normalize(), "f")

    return {
        "policy_hash": effective.policy_hash,
        "allow": list(effective.allow),
        "excluded": dict(effective.excluded),
        "fallback": list(effective.fallback),
        "substitute": effective.substitute,
        "classes": {
            cls: {
                "min_quality": str(requirement.min_quality),
                "first_token_p95": requirement.first_token_p95,
                "total_p95": requirement.total_p95,
                "confidence": None if requirement.confidence is None else str(requirement.confidence),
                "cascade": requirement.cascade,
            }
            for cls, requirement in effective.classes.items()
        },
        "max_cost_per_request": money(effective.max_cost_per_request),
        "assume_max_output": effective.assume_max_output,
        "when_nothing_meets": effective.when_nothing_meets,
        "on_unpriced_model": effective.on_unpriced_model,
        "cache": {
            "exact": effective.cache.exact,
            "semantic": effective.cache.semantic,
            "max_error": str(effective.cache.max_error),
            "ttl": effective.cache.ttl,
            "scope": effective.cache.scope,
            "quota": effective.cache.quota,
            "check": str(effective.cache.check),
        },
        "advise": str(effective.advise),
        "learns": effective.learns,
        "budgets": [
            {
                "key": budget.key,
                "month": money(budget.limit),
                "hard_cap": money(budget.hard_cap),
                "at_limit": budget.at_limit,
                "warn_at": [str(share) for share in budget.warn_at],
            }
            for budget in effective.budgets
        ],
        "baseline": effective.baseline,
        "cost_center": effective.cost_center,
        "tags": {key: sorted(values) for key, values in effective.tags.items()},
        "rules": list(effective.rules),
        "exceptions": list(effective.exceptions),
        "period": effective.period,
    }
