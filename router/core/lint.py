"""Loading both files as one: every error that refuses the load, and every warning that does not, with its place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from router.core.catalogue import Catalogue
from router.core.compile import CompiledSnapshot, compile_files, midnight
from router.core.document import Document, Path, Problem, read
from router.core.schema import (
    CAPABILITIES,
    BudgetEntry,
    ClassesEntry,
    PolicyFile,
    ProvidersFile,
    RequirementEntry,
    RuleEntry,
    ScopedSettings,
    Settings,
    did_you_mean,
    shown,
    typed,
)
from router.core.types import AUTO, PROMPT_CLASSES, PriceRecord

PROVIDERS_FILE = "providers.yaml"
POLICY_FILE = "policy.yaml"


@dataclass(frozen=True, slots=True)
class Loaded:
    """`snapshot` is None exactly where a problem is an error. Problems are in the order of the files."""

    snapshot: CompiledSnapshot | None
    problems: tuple[Problem, ...]

    @property
    def errors(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @property
    def warnings(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.severity == "warning")


def load(
    providers_text: str,
    policy_text: str,
    catalogue: Catalogue,
    now: datetime,
    *,
    providers_file: str = PROVIDERS_FILE,
    policy_file: str = POLICY_FILE,
) -> Loaded:
    """Both files, checked and compiled. `now` (UTC) decides what has already ended. Never raises."""
    providers_document, policy_document = read(providers_file, providers_text), read(policy_file, policy_text)
    providers, found = typed(providers_document, ProvidersFile)
    policy, more = typed(policy_document, PolicyFile)
    problems = [*found, *more]
    if providers is not None:
        problems += _provider_problems(providers_document, providers)
    if providers is not None and policy is not None:
        problems += _reference_problems(policy_document, providers, policy)
        if all(problem.severity == "warning" for problem in problems):
            snapshot = compile_files(providers, policy, (providers_document, policy_document), catalogue)
            advice = _Advice(providers_document, policy_document, providers, policy, snapshot, now)
            return _loaded(snapshot, [*problems, *advice.problems()], (providers_file, policy_file))
    return _loaded(None, problems, (providers_file, policy_file))


def _loaded(snapshot: CompiledSnapshot | None, problems: Sequence[Problem], files: Sequence[str]) -> Loaded:
    ordered = sorted(set(problems), key=lambda p: (files.index(p.file), p.line, p.column, p.message))
    if any(problem.severity == "error" for problem in ordered):
        snapshot = None
    return Loaded(snapshot, tuple(ordered))


# -- errors -----------------------------------------------------------------------------------------------------


def _in_the_open(url: str) -> bool:
    """Whether it is plain HTTP to a host that is not evidently of one's own network."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme != "http" or not {".", ":"} & {*host}:
        return False
    try:
        return ip_address(host).is_global
    except ValueError:
        return not host.endswith((".local", ".internal", ".localhost", ".svc", ".lan"))


def _provider_problems(document: Document, providers: ProvidersFile) -> Iterator[Problem]:
    if not providers.providers:
        yield document.problem(
            ("providers",), "no provider is configured", "add one, such as openai: { ... }"
        )
    if not providers.models:
        yield document.problem(("models",), "no model is configured", "add at least one model")
    for name, provider in providers.providers.items():
        if provider.api_key_env is not None and _in_the_open(provider.base_url or ""):
            yield document.problem(
                ("providers", name, "base_url"),
                "the provider's key would cross the network unencrypted",
                "write https://",
                "warning",
            )
    for name, model in providers.models.items():
        path: Path = ("models", name)
        if name == AUTO:
            yield document.problem(
                path, f"{AUTO} is what callers say to let the gateway choose", "name the model otherwise"
            )
        if model.provider not in providers.providers:
            yield document.problem(
                (*path, "provider"),
                f"unknown provider {shown(model.provider)}",
                did_you_mean(model.provider, list(providers.providers)),
            )
        if model.max_output is not None and model.max_output > model.context:
            yield document.problem(
                (*path, "max_output"),
                f"max_output {model.max_output} is above context {model.context}",
                f"write at most {model.context}",
            )
        for index, capability in enumerate(model.supports):
            if capability not in CAPABILITIES:
                yield document.problem(
                    (*path, "supports", index),
                    f"no request needs a capability called {shown(capability)}",
                    did_you_mean(capability, sorted(CAPABILITIES)),
                    "warning",
                )
        for sent, taken in model.rename.items():
            if sent in model.rejects:
                yield document.problem(
                    (*path, "rename", sent),
                    f"{sent} is both renamed to {taken} and rejected",
                    "remove it from rejects, or remove the rename",
                )


def _settings(policy: PolicyFile) -> Iterator[tuple[Path, Settings]]:
    """Every place that holds settings, in the order of precedence from the outside in."""
    yield ("defaults",), policy.defaults
    for team, entry in policy.teams.items():
        yield ("teams", team), entry
        for app, app_entry in entry.apps.items():
            yield ("teams", team, "apps", app), app_entry
    yield ("unlisted_teams",), policy.unlisted_teams
    for index, rule in enumerate(policy.rules):
        yield ("rules", index, "then"), rule.then
    for index, exception in enumerate(policy.exceptions):
        yield ("exceptions", index), exception


def _requirements(policy: PolicyFile) -> Iterator[tuple[Path, RequirementEntry]]:
    """Every place that says what a class must get."""
    places: list[tuple[Path, ClassesEntry]] = [(("classes",), policy.classes)]
    for path, settings in _settings(policy):
        if isinstance(settings, ScopedSettings):
            places.append(((*path, "classes"), settings.classes))
    for path, classes in places:
        for cls in PROMPT_CLASSES:
            yield (*path, cls), getattr(classes, cls)


def _reference_problems(
    document: Document, providers: ProvidersFile, policy: PolicyFile
) -> Iterator[Problem]:
    models = list(providers.models)

    def unknown(path: Path, name: str) -> Iterator[Problem]:
        if name not in providers.models:
            yield document.problem(path, f"unknown model {shown(name)}", did_you_mean(name, models))

    if policy.baseline is not None:
        yield from unknown(("baseline",), policy.baseline)
    if policy.learn is not None and policy.learn.judge is not None:
        yield from unknown(("learn", "judge"), policy.learn.judge)
    for place, requirement in _requirements(policy):
        if requirement.confidence is not None and policy.learn is None:
            yield document.problem(
                (*place, "confidence"),
                "without learn no traffic is labelled, so nothing can be shown and the dearest model answers",
                "add learn: {} to the file, or remove confidence",
            )
        verify = None if requirement.cascade is None else requirement.cascade.verify
        if verify is not None and verify not in ("signals", "none") and verify not in providers.models:
            yield document.problem(
                (*place, "cascade", "verify"),
                f"unknown model {shown(verify)}",
                did_you_mean(verify, ["signals", "none", *models]),
            )
    for alias, target in policy.aliases.items():
        path: Path = ("aliases", alias)
        if alias in providers.models or alias == "auto":
            line, column = document.key_place(path)
            what = "auto routes freely" if alias == "auto" else "a model has this name"
            yield Problem(
                document.file,
                line,
                column,
                f"aliases.{alias}",
                f"{what}, so the alias has no effect",
                "remove it",
            )
        if target in policy.aliases:
            yield document.problem(
                path, f"{shown(target)} is an alias itself", f"write {policy.aliases[target]} instead"
            )
        else:
            yield from unknown(path, target)
    for path, settings in _settings(policy):
        for field in ("allow", "deny", "fallback"):
            for index, name in enumerate(getattr(settings, field) or ()):
                yield from unknown((*path, field, index), name)
    for index, contract in enumerate(policy.contracts):
        here: Path = ("contracts", index)
        if contract.provider not in providers.providers:
            yield document.problem(
                (*here, "provider"),
                f"unknown provider {shown(contract.provider)}",
                did_you_mean(contract.provider, list(providers.providers)),
            )
        for position, name in enumerate(contract.models or ()):
            yield from unknown((*here, "models", position), name)
            model = providers.models.get(name)
            known = contract.provider in providers.providers
            if known and model is not None and model.provider != contract.provider:
                yield document.problem(
                    (*here, "models", position),
                    f"{name} belongs to provider {model.provider}, not {contract.provider}",
                    "remove it, or correct the contract's provider",
                )
        if contract.until is not None and contract.until <= contract.start:
            yield document.problem(
                (*here, "until"), "the contract ends before it begins", "correct from or until"
            )
    yield from _exception_errors(document, policy)
    yield from _name_errors(document, policy)


def _exception_errors(document: Document, policy: PolicyFile) -> Iterator[Problem]:
    rules = [rule.name for rule in policy.rules]
    for index, exception in enumerate(policy.exceptions):
        here: Path = ("exceptions", index)
        team = policy.teams.get(exception.team)
        if exception.start is not None and exception.until <= exception.start:
            yield document.problem(
                (*here, "until"), "the exception ends before it begins", "correct from or until"
            )
        if team is None:
            yield document.problem(
                (*here, "team"),
                f"the policy names no team {shown(exception.team)}",
                did_you_mean(exception.team, list(policy.teams)),
                "warning",
            )
        elif exception.app is not None and exception.app not in team.apps:
            yield document.problem(
                (*here, "app"),
                f"team {exception.team} has no app {shown(exception.app)}",
                did_you_mean(exception.app, list(team.apps)),
            )
        for position, name in enumerate(exception.skip_rules):
            if name not in rules:
                yield document.problem(
                    (*here, "skip_rules", position),
                    f"no rule is called {shown(name)}",
                    did_you_mean(name, rules),
                )


def _name_errors(document: Document, policy: PolicyFile) -> Iterator[Problem]:
    named: Sequence[tuple[str, Sequence[Any]]] = (("rules", policy.rules), ("exceptions", policy.exceptions))
    for section, entries in named:
        seen: dict[str, int] = {}
        for index, entry in enumerate(entries):
            if entry.name in seen:
                yield document.problem(
                    (section, index, "name"),
                    f"the name {shown(entry.name)} is used twice",
                    "give each its own name: reports and ledger rows tell them apart by it",
                )
            seen[entry.name] = index


# -- warnings ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Advice:
    """What loads but will not do what was probably meant."""

    providers_document: Document
    policy_document: Document
    providers: ProvidersFile
    policy: PolicyFile
    snapshot: CompiledSnapshot
    now: datetime

    def problems(self) -> Iterator[Problem]:
        yield from self._models()
        yield from self._aliases()
        yield from self._allow_lists()
        yield from self._qualities()
        yield from self._budgets()
        yield from self._rules()
        yield from self._ended()
        yield from self._contracts()
        yield from self._learning()

    def _policy(self, path: Path, message: str, remedy: str) -> Problem:
        return self.policy_document.problem(path, message, remedy, "warning")

    def _models(self) -> Iterator[Problem]:
        document = self.providers_document
        allowed = {name for _, settings in _settings(self.policy) for name in settings.allow or ()}
        for name, entry in self.providers.models.items():
            path: Path = ("models", name)
            spec = self.snapshot.models[name]
            blocked = (self.policy.defaults.on_unpriced_model or "block") == "block"
            outcome = "no request is sent to it" if blocked else "its requests are booked as unpriced"
            if name not in self.snapshot.priced:
                what = (
                    f"the catalogue has no price for {shown(spec.upstream_name)} at provider {spec.provider}"
                    if entry.price is not None
                    else "the model has no price"
                )
                yield document.problem(
                    (*path, "price") if entry.price is not None else path,
                    f"{what}, so {outcome}",
                    'write price: { input: "...", output: "..." } in USD per million tokens',
                    "warning",
                )
            if spec.quality is None:
                what = (
                    "the catalogue has no prior for this model"
                    if entry.quality
                    else "the model has no quality"
                )
                yield document.problem(
                    (*path, "quality") if entry.quality is not None else path,
                    f"{what}, so it is never chosen for auto",
                    'write quality: { simple: "...", medium: "...", complex: "..." }',
                    "warning",
                )
            priced = self.snapshot.priced.get(name)
            above = None if priced is None else priced.long_context_above
            if above is not None and entry.context > above:
                yield document.problem(
                    (*path, "context"),
                    f"the provider charges more above {above} input tokens, and the catalogue's price does not",
                    f"write context: {above}, or a price of your own",
                    "warning",
                )
            if name not in allowed:
                yield document.problem(
                    path,
                    "no allow list of the policy names this model",
                    "add it to defaults.allow, or remove it",
                    "warning",
                )
            yield from self._priors(path, spec.upstream_name, entry.quality)

    def _priors(self, path: Path, upstream: str, quality: object) -> Iterator[Problem]:
        measured = self.snapshot.catalogue.measured(upstream)
        if measured is None or quality is None or isinstance(quality, str):
            return
        for cls in PROMPT_CLASSES:
            low, high = measured[cls]
            prior: Decimal = getattr(quality, cls)
            if not low <= prior <= high:
                yield self.providers_document.problem(
                    (*path, "quality", cls),
                    f"the prior {prior} is outside the measured interval {low} to {high} for {shown(upstream)}",
                    "write a value inside it, or keep yours if you measured it on your own traffic",
                    "warning",
                )

    def _aliases(self) -> Iterator[Problem]:
        for alias, target in self.policy.aliases.items():
            named = self.snapshot.catalogue_price(alias, self.now)
            served = self.snapshot.price(target, self.now)
            if named is not None and served is not None and _blended(served) > _blended(named):
                yield self._policy(
                    ("aliases", alias),
                    f"{target} costs more than the {alias} it answers for: savings will be negative",
                    "point the alias to a cheaper model, or accept it",
                )

    def _allow_lists(self) -> Iterator[Problem]:
        policy = self.policy
        defaults = frozenset(policy.defaults.allow)
        for path, settings in _settings(policy):
            if settings.allow is None or path == ("defaults",) or path[0] == "exceptions":
                outer = defaults
            else:
                team = policy.teams.get(str(path[1])) if path[0] == "teams" and len(path) == 4 else None
                outer = (
                    defaults & frozenset(team.allow)
                    if team is not None and team.allow is not None
                    else defaults
                )
                for index, name in enumerate(settings.allow):
                    if name not in outer:
                        yield self._policy(
                            (*path, "allow", index),
                            f"{name} is not allowed further up, so naming it here has no effect",
                            "add it to the allow above; only an exception widens",
                        )
            inner = outer if settings.allow is None else outer & frozenset(settings.allow)
            inner -= frozenset(settings.deny) | frozenset(policy.defaults.deny)
            if not inner and path[0] != "exceptions":
                field = "allow" if settings.allow is not None else "deny"
                yield self._policy(
                    (*path, field),
                    "this leaves no model at all, so every request is refused",
                    "allow at least one model",
                )
            for index, name in enumerate(settings.fallback or ()):
                if name not in inner and path[0] != "exceptions":
                    yield self._policy(
                        (*path, "fallback", index),
                        f"{name} is not allowed here, so it never serves as fallback",
                        "add it to allow, or remove it from fallback",
                    )
        if policy.baseline is not None and self.snapshot.price(policy.baseline, self.now) is None:
            yield self._policy(
                ("baseline",), f"{policy.baseline} has no price, so no savings can be counted", "price it"
            )

    def _qualities(self) -> Iterator[Problem]:
        defaults = frozenset(self.policy.defaults.allow)
        places: list[tuple[Path, Any, frozenset[str]]] = [(("classes",), self.policy.classes, defaults)]
        for path, settings in _settings(self.policy):
            if isinstance(settings, ScopedSettings):
                allow = defaults if settings.allow is None else defaults & frozenset(settings.allow)
                places.append(((*path, "classes"), settings.classes, allow))
        for path, classes, allow in places:
            for cls in PROMPT_CLASSES:
                wanted = getattr(classes, cls).min_quality
                best = [q[cls] for name in allow if (q := self.snapshot.models[name].quality) is not None]
                if wanted is not None and best and max(best) < wanted:
                    yield self._policy(
                        (*path, cls, "min_quality"),
                        f"no allowed model reaches {wanted} (the best prior is {max(best)})",
                        f"write at most {max(best)}, or allow a better model",
                    )

    def _budgets(self) -> Iterator[Problem]:
        places: list[tuple[Path, BudgetEntry | None]] = [
            (("organisation", "budget"), self.policy.organisation.budget),
            (("unlisted_teams", "budget"), self.policy.unlisted_teams.budget),
        ]
        for team, entry in self.policy.teams.items():
            places.append((("teams", team, "budget"), entry.budget))
            places += [(("teams", team, "apps", app, "budget"), a.budget) for app, a in entry.apps.items()]
        for path, budget in places:
            if budget is not None and budget.at_limit == "downgrade" and budget.hard_cap is None:
                yield self._policy(
                    path,
                    "at_limit: downgrade without a hard_cap has no upper bound: cheap models can spend on",
                    "add hard_cap",
                )

    def _rules(self) -> Iterator[Problem]:
        teams = self.policy.teams
        apps = {app for team in teams.values() for app in team.apps}
        for index, rule in enumerate(self.policy.rules):
            known_names: Sequence[tuple[str, Sequence[str] | None, Sequence[str]]] = (
                ("team", rule.when.team, list(teams)),
                ("app", rule.when.app, sorted(apps)),
            )
            for field, named, known in known_names:
                for position, name in enumerate(named or ()):
                    if name not in known:
                        yield self._policy(
                            ("rules", index, "when", field, position),
                            f"the policy names no {field} {shown(name)}",
                            did_you_mean(name, known),
                        )
            earlier = next((r for r in self.policy.rules[:index] if _covers(r, rule)), None)
            if earlier is not None:
                yield self._policy(
                    ("rules", index),
                    f"unreachable: whenever this rule matches, '{earlier.name}' already decides all it sets",
                    "move it above that rule, or remove it",
                )

    def _ended(self) -> Iterator[Problem]:
        zone = self.snapshot.timezone
        for index, exception in enumerate(self.policy.exceptions):
            here: Path = ("exceptions", index)
            if midnight(exception.until, zone) <= self.now:
                yield self._policy(
                    (*here, "until"),
                    f"the exception ended on {exception.until}",
                    "remove it, or give a later end",
                )
                continue
            yield from self._widened(here, exception.team, exception.app, exception.budget)
            if exception.allow is not None:
                team = self.policy.teams.get(exception.team)
                for rule in self.policy.rules:
                    if rule.name in exception.skip_rules or rule.then.allow is None or team is None:
                        continue
                    for position, name in enumerate(exception.allow):
                        if name not in rule.then.allow:
                            yield self._policy(
                                (*here, "allow", position),
                                f"rule '{rule.name}' still excludes {name} wherever it matches",
                                f"accept it, or add skip_rules: [{rule.name}]",
                            )

    def _widened(
        self, here: Path, team: str, app: str | None, widened: BudgetEntry | None
    ) -> Iterator[Problem]:
        if widened is None:
            return
        entry = self.policy.teams.get(team)
        budget = entry.budget if entry is not None else self.policy.unlisted_teams.budget
        if app is not None:
            budget = entry.apps[app].budget if entry is not None else None
        whose = f"app {team}/{app}" if app is not None else f"team {team}"
        if budget is None:
            yield self._policy(
                (*here, "budget"), f"{whose} has no budget to widen", "remove it, or give it a budget"
            )
        elif (
            widened.month is not None
            and widened.hard_cap is None
            and budget.hard_cap is not None
            and widened.month > budget.hard_cap
        ):
            yield self._policy(
                (*here, "budget", "month"),
                f"hard_cap {budget.hard_cap} of {whose} still holds, so {widened.month} is never reached",
                f"add hard_cap: {widened.month} or more to the exception's budget",
            )

    def _contracts(self) -> Iterator[Problem]:
        zone = self.snapshot.timezone
        contracts = self.policy.contracts
        for index, contract in enumerate(contracts):
            here: Path = ("contracts", index)
            if contract.until is not None and midnight(contract.until, zone) <= self.now:
                yield self._policy(
                    (*here, "until"),
                    f"the contract ended on {contract.until}",
                    "keep it for old prices, or renew it",
                )
            for other in contracts[:index]:
                same_models = contract.models is None or other.models is None
                shared = same_models or set(contract.models or ()) & set(other.models or ())
                overlap = (other.until is None or contract.start < other.until) and (
                    contract.until is None or other.start < contract.until
                )
                if other.provider == contract.provider and shared and overlap:
                    yield self._policy(
                        here,
                        f"it overlaps with {other.reference}, which comes first and holds",
                        "end one where the other begins, or name different models",
                    )

    def _learning(self) -> Iterator[Problem]:
        learn = self.policy.learn
        checked = [path for path, entry in _settings(self.policy) if entry.cache.check]
        certifies = self.snapshot.learn is not None and self.snapshot.learn.certifies
        if learn is not None and certifies and learn.shadow == 0:
            yield self._policy(
                ("learn",),
                "no requests are compared, so a class that asks for confidence stays with its reference",
                "add shadow: 2%, a budget and a judge, or remove confidence",
            )
        if learn is not None and learn.judge is not None:
            if learn.shadow == 0 and not checked:
                yield self._policy(
                    ("learn", "judge"),
                    "there are no shadow answers to judge",
                    "add shadow: 2% and a budget, or remove judge",
                )
            if learn.judge in self.snapshot.models and self.snapshot.price(learn.judge, self.now) is None:
                yield self._policy(
                    ("learn", "judge"),
                    f"{learn.judge} has no price, so the budget cannot bound what judging costs",
                    "price it, or name another model",
                )
        if learn is not None and learn.budget is not None and learn.shadow == 0 and not checked:
            yield self._policy(
                ("learn", "budget"), "nothing is spent on learning", "add shadow: 2%, or remove budget"
            )
        for path in checked:
            if learn is None or learn.budget is None:
                yield self._policy(
                    (*path, "cache", "check"),
                    "no budget pays for asking a model again, so no served answer is checked",
                    "add learn: { budget: { month: 20 } }, or remove check",
                )
        for path, entry in _settings(self.policy):
            if entry.cache.semantic == "certified" and not checked:
                yield self._policy(
                    (*path, "cache", "semantic"),
                    "once it serves nothing is checked any more, so an error that grows goes unnoticed",
                    "add check: 2% beside it, and learn: { budget: { month: 20 } }",
                )
        for path, requirement in _requirements(self.policy):
            verify = "none" if requirement.cascade is None else requirement.cascade.verify
            if verify in self.snapshot.models and self.snapshot.price(verify, self.now) is None:
                yield self._policy(
                    (*path, "cascade", "verify"),
                    f"{verify} has no price, so what checking costs is unknown",
                    "price it, or write signals",
                )


def _blended(price: PriceRecord) -> Decimal:
    """One figure to compare two prices by: three input tokens to one output token."""
    return 3 * price.list_prices["input"] + price.list_prices["output"]


def _covers(earlier: RuleEntry, later: RuleEntry) -> bool:
    """Whether `earlier` matches whenever `later` does and sets every scalar that `later` sets."""
    if later.then.allow is not None or later.then.deny:
        return False
    a, b = earlier.when, later.when
    conditions = (
        _wider(a.team, b.team),
        _wider(a.app, b.app),
        all(key in b.tags and b.tags[key] <= values for key, values in a.tags.items()),
        not a.windows or list(a.windows) == list(b.windows),
    )
    return all(conditions) and _scalars(later.then) <= _scalars(earlier.then)


def _wider(a: Sequence[str] | None, b: Sequence[str] | None) -> bool:
    return a is None or (b is not None and set(b) <= set(a))


def _scalars(settings: ScopedSettings) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for field in settings.model_fields_set - {"allow", "deny"}:
        if field == "cache":
            found |= {(field, name) for name in settings.cache.model_fields_set}
        elif field == "classes":
            for cls in PROMPT_CLASSES:
                found |= {(field, cls, name) for name in getattr(settings.classes, cls).model_fields_set}
        else:
            found.add((field,))
    return found
