"""Which model would answer a prompt, and which one did answer a request, and why: for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from classifiers.classifier import Classifier, Verdict
from classifiers.encoder import ArtefactError
from router.adapters.configuration import load
from router.adapters.price_catalogue import shipped_catalogue
from router.adapters.sql.lookup import REASONS, as_json, find_request
from router.adapters.sql.reports import Usd
from router.adapters.system import SystemClock
from router.core.compile import CompiledSnapshot
from router.core.decide import NoPlan, Plan, Question, four_decimals, success_of
from router.core.errors import ConfigurationError, InvalidRequest, RequestError
from router.core.health import Health
from router.core.learning import Estimate, Learned
from router.core.policy import EffectivePolicy
from router.core.pricing import estimate_cost
from router.core.types import PROMPT_CLASSES, Caller, PriceRecord
from router.settings import Settings
from router.stages.admit import read_wishes
from router.stages.decide import Decide
from router.stages.exchange import ASIDE, Exchange
from router.stages.learn import Learn
from router.stages.normalise import named_model, normalise_chat
from router.stages.reserve import worst_case_of

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

NO_LIVE_DATA = "without live data: every model is taken to be up and as fast as providers.yaml expects"

_SCALARS = (
    "fallback",
    "substitute",
    "max_cost_per_request",
    "assume_max_output",
    "when_nothing_meets",
    "on_unpriced_model",
    "advise",
)
_CACHE = ("exact", "semantic", "max_error", "ttl", "scope", "quota", "check")
_REQUIREMENT = ("min_quality", "first_token_p95", "total_p95", "confidence", "cascade")
BUILT_IN = "the default"


# -- a prompt --


def explain_prompt(
    settings: Settings,
    text: str,
    *,
    team: str,
    app: str | None,
    model: str,
    tags: Mapping[str, tuple[str, ...]],
    at: datetime,
    json_form: bool,
) -> str:
    """What the gateway would do with `text` as the one user message, `at` that moment, as text or JSON.

    Raises ConfigurationError where the files cannot be read, RequestError where the request could not be parsed.
    """
    snapshot = load(settings.config, shipped_catalogue())
    try:
        classifier = Classifier.load()
    except ArtefactError as error:
        raise ConfigurationError(str(error)) from None
    learned, unread = _learned(settings, snapshot, classifier)
    found = explained(
        snapshot, classifier, text, team=team, app=app, model=model, tags=tags, at=at, learned=learned
    )
    found["notes"] = [NO_LIVE_DATA, *unread, *_missing_keys(snapshot, settings.environment)]
    return as_json(found, indent=2).decode() if json_form else "\n".join(_prompt_lines(found))


def explained(
    snapshot: CompiledSnapshot,
    classifier: Classifier,
    text: str,
    *,
    team: str,
    app: str | None,
    model: str,
    tags: Mapping[str, tuple[str, ...]],
    at: datetime,
    learned: Learned | None = None,
) -> dict[str, Any]:
    """The same as nested mappings; money is `Usd`. It goes the way of a request, through the same stages.
    `learned`: the artefact in force.
    """
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    request = normalise_chat(json.dumps(body).encode())
    caller = Caller("explain", team, app, {key: frozenset(values) for key, values in tags.items()})
    try:
        policy = snapshot.resolve(team, app, caller.tags, at)
    except InvalidRequest as error:
        raise ConfigurationError(f"--tag: {error.message}") from None
    reference, baseline_name, baseline_price = named_model(snapshot, policy, request, at)
    exchange = Exchange(
        id="explain",
        endpoint="chat.completions",
        opened_at=at,
        started=0.0,
        caller=caller,
        wishes=read_wishes({}),
        request=request,
        snapshot=snapshot,
        policy=policy,
        reference=reference,
        baseline_name=baseline_name,
        baseline_price=baseline_price,
    )
    exchange.prices = {name: snapshot.price(name, at) for name in policy.allow}
    decide = Decide(Health(), SystemClock(), lambda: learned)
    Learn(classifier.static, SystemClock()).note_prompt(exchange)
    verdict = classifier.classify(request.prompt)
    unused = _unused(policy, reference)
    if unused is None:
        if classifier.needs_transformer(verdict) and decide.could_change(exchange, verdict):
            verdict = classifier.refine(request.prompt, verdict)
        exchange.verdict = verdict
    plan = decide.plan(exchange, policy, exchange.verdict)
    assert exchange.question is not None
    layers = _layers(snapshot, policy, team, app)
    return {
        "at": at,
        "team": team,
        "app": app,
        "tags": {key: sorted(values) for key, values in policy.tags.items()},
        "policy_hash": policy.policy_hash,
        "request": {
            "model": model,
            "characters": len(text),
            "input_tokens": exchange.question.input_tokens,
            "output_tokens": exchange.question.output_tokens,
        },
        "classification": _classification(verdict, unused),
        "decision": _decision(decide, exchange, plan),
        "models": _models(exchange, plan, verdict, decide.estimates(exchange)),
        "learned": None if learned is None or snapshot.learn is None else learned.predictor.id,
        "floors": _floors(decide, exchange, policy),
        "reference": reference,
        "baseline": {"model": baseline_name, "price": _price(baseline_price)},
        "policy": _policy(layers, snapshot, policy),
        "budgets": [
            {
                "budget": limit.key,
                "period": policy.period,
                "limit_usd": None if limit.limit is None else Usd(limit.limit),
                "hard_cap_usd": None if limit.hard_cap is None else Usd(limit.hard_cap),
                "at_limit": limit.at_limit,
            }
            for limit in policy.budgets
        ],
    }


def _unused(policy: EffectivePolicy, reference: str | None) -> str | None:
    """Why the gateway would not classify at all, as `Pipeline` sees it."""
    if reference is not None and not policy.substitute:
        return "the app names a model and the policy does not substitute"
    if len(policy.allow) < 2:
        return "the policy leaves no choice of models"
    return None


def _classification(verdict: Verdict, unused: str | None) -> dict[str, Any]:
    return {
        "class": verdict.prompt_class,
        "difficulty": round(verdict.difficulty, 4),
        "confidence": round(verdict.confidence, 4),
        "output_tokens": verdict.output_tokens,
        "reason": verdict.reason,
        "encoder": verdict.encoder,
        "head": verdict.artefact,
        "decides": unused is None,
        "unused_because": unused,
    }


def _decision(decide: Decide, exchange: Exchange, plan: Plan | NoPlan) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model": None,
        "order": [],
        "reason": None,
        "why": None,
        "notes": [],
        "held_usd": None,
        "at_budget_limit": None,
        "refusal": None,
    }
    if isinstance(plan, NoPlan):
        try:
            decide.choose(exchange, 1.0)
        except RequestError as error:
            found["refusal"] = {"status": error.status, "code": error.code, "message": error.message}
        return found
    held = worst_case_of(exchange, plan.models[0])
    found |= {
        "model": plan.models[0],
        "order": list(plan.models),
        "reason": plan.reason,
        "why": REASONS[plan.reason],
        "notes": list(plan.notes),
        "held_usd": None if held is None else Usd(held),
    }
    if any(limit.at_limit == "downgrade" for limit in exchange.policy.budgets):
        cheaper = decide.downgraded(exchange)
        found["at_budget_limit"] = cheaper.models[0] if isinstance(cheaper, Plan) else None
    return found


def _learned(
    settings: Settings, snapshot: CompiledSnapshot, classifier: Classifier
) -> tuple[Learned | None, list[str]]:
    """The artefact in force, and what kept it from being read."""
    if snapshot.learn is None:
        return None, []
    from router.adapters.sql.artefacts import ArtefactWatch
    from router.adapters.sql.database import open_engine

    engine = open_engine(settings.database_url)
    try:
        watch = ArtefactWatch(engine, classifier.static.id)
        watch.look()
    finally:
        engine.dispose()
    return watch.current, [] if watch.refused is None else [f"nothing learned is in use: {watch.refused}"]


def _floors(decide: Decide, exchange: Exchange, policy: EffectivePolicy) -> dict[str, dict[str, Any]]:
    """The quality floor of each class that asks for confidence."""
    found: dict[str, dict[str, Any]] = {}
    for cls in PROMPT_CLASSES:
        minimum = max(policy.classes[cls].min_quality, exchange.wishes.min_quality or Decimal(0))
        floor = decide.floor.of(exchange.snapshot, policy, cls, minimum, exchange.opened_at)
        if floor is not None:
            found[cls] = {
                "reference": floor.reference,
                "confidence": floor.confidence,
                "model": floor.model,
                "threshold": None if floor.model is None else floor.threshold,
                "excess_failures_at_most": round(max(floor.bound, 0.0), 4),
                "labels_missing": dict(floor.missing),
            }
    return found


def _models(
    exchange: Exchange, plan: Plan | NoPlan, verdict: Verdict, estimates: Mapping[str, Estimate]
) -> list[dict[str, Any]]:
    order = plan.models if isinstance(plan, Plan) else ()
    compared = {candidate.model: candidate for candidate in plan.candidates} if isinstance(plan, Plan) else {}
    question, snapshot = exchange.question, exchange.snapshot
    assert question is not None
    rows = []
    for name, model in snapshot.models.items():
        price = snapshot.price(name, exchange.opened_at)
        candidate = compared.get(name)
        estimate = estimates.get(name)
        success = success_of(model.quality, verdict.prompt_class, verdict.difficulty)
        if estimate is not None:
            success = four_decimals(round(estimate.success * 10_000))
        routed = (
            candidate.expected_cost
            if candidate is not None
            else _cost(question, model.max_output, price, True)
        )
        billed = _cost(question, model.max_output, price, False)
        role = "chosen" if name in order[:1] else "fallback" if name in order else "dropped"
        rows.append(
            {
                "model": name,
                "provider": model.provider,
                "upstream_model": model.upstream_name,
                "verdict": role,
                "reason": REASONS[plan.reason]
                if isinstance(plan, Plan) and role == "chosen"
                else plan.dropped.get(name, "named as fallback"),
                "success": None if success is None else success.quantize(Decimal("0.0001")),
                "learned": _estimate(estimate),
                "expected_cost_usd": None if price is None or routed is None else Usd(routed),
                "billed_cost_usd": None if billed is None else Usd(billed),
                "price": _price(price),
            }
        )
    place = {name: at for at, name in enumerate(order)}
    return sorted(rows, key=lambda row: place.get(row["model"], len(place)))


def _estimate(estimate: Estimate | None) -> dict[str, Any] | None:
    """None where nothing was learned. `source`: learned, prior (no labels yet) or unfamiliar (the prior again)."""
    if estimate is None:
        return None
    source = "unfamiliar" if estimate.unfamiliar else "prior" if estimate.fallback else "learned"
    return {
        "source": source,
        "lower": round(estimate.lower, 4),
        "upper": round(estimate.upper, 4),
        "labels": round(estimate.evidence, 1),
    }


def _success_text(row: Mapping[str, Any]) -> str:
    known = row["learned"]
    if known is None:
        return _or_dash(row["success"])
    if known["source"] != "learned":
        return f"{row['success']:.2f} prior"
    return f"{row['success']:.2f} ({known['lower']:.2f}-{known['upper']:.2f}, {known['labels']:.0f} labels)"


def _floor_lines(floors: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    for cls, floor in floors.items():
        sure = f"{(floor['confidence'] * 100).normalize():f} % confidence"
        if floor["model"] is None:
            yield f"Floor      {cls}: {floor['reference']} answers; nothing cheaper is shown with {sure}"
        else:
            yield (
                f"Floor      {cls}: {floor['model']} from a learned success of {floor['threshold']:.2f} on, else "
                f"{floor['reference']}"
            )
            yield (
                f"           with {sure} at most {floor['excess_failures_at_most']:.1%} of requests fail that "
                f"{floor['reference']} would have answered well"
            )
        lacking = ", ".join(f"{name} {count}" for name, count in floor["labels_missing"].items())
        if lacking:
            yield f"           labels missing: {lacking}"


def _cost(question: Question, max_output: int, price: PriceRecord | None, marginal: bool) -> int | None:
    if price is None:
        return None
    output = max(1, min(question.output_tokens, max_output))
    return estimate_cost(price, question.input_tokens, output * question.choices, marginal=marginal)


def _price(price: PriceRecord | None) -> dict[str, Any] | None:
    if price is None:
        return None
    return {
        "id": price.id,
        "source": price.source,
        "contract": price.contract,
        "effective_from": price.effective_from,
        "input_usd_per_million": price.unit_prices["input"],
        "output_usd_per_million": price.unit_prices["output"],
    }


# -- where each setting comes from --

Layers = Sequence[tuple[str, Any]]


def _layers(snapshot: CompiledSnapshot, policy: EffectivePolicy, team: str, app: str | None) -> Layers:
    """What is asked for a setting, in this order: the first that says something holds (`core/compile.py`)."""
    file = snapshot.policy
    layers: list[tuple[str, Any]] = []
    layers += [
        (f"exception '{entry.name}'", entry) for entry in file.exceptions if entry.name in policy.exceptions
    ]
    layers += [(f"rule '{rule.name}'", rule.then) for rule in file.rules if rule.name in policy.rules]
    entry = file.teams.get(team)
    if entry is not None and app in entry.apps:
        layers.append((f"app {team}/{app}", entry.apps[app]))
    layers.append((f"team {team}", entry) if entry is not None else ("unlisted_teams", file.unlisted_teams))
    layers.append(("defaults", file.defaults))
    return layers


def _policy(layers: Layers, snapshot: CompiledSnapshot, policy: EffectivePolicy) -> dict[str, Any]:
    narrowing = [label for label, layer in reversed(layers) if layer.allow is not None or layer.deny]
    found: dict[str, Any] = {
        "allow": {"value": list(policy.allow), "from": ", ".join(narrowing) or BUILT_IN},
    }
    for name in _SCALARS:
        value = getattr(policy, name)
        if name == "max_cost_per_request" and value is not None:
            value = Usd(value)
        found[name] = {"value": value, "from": _said_by(layers, name)}
    found["cache"] = {
        name: {
            "value": getattr(policy.cache, name),
            "from": _said_by([(label, layer.cache) for label, layer in layers], name),
        }
        for name in _CACHE
    }
    scoped = [(label, layer) for label, layer in layers if label != "defaults"]
    found["classes"] = {
        cls: {
            name: {
                "value": getattr(policy.classes[cls], name),
                "from": _set_by(
                    [
                        *((label, getattr(layer.classes, cls)) for label, layer in scoped),
                        ("classes", getattr(snapshot.policy.classes, cls)),
                    ],
                    name,
                ),
            }
            for name in _REQUIREMENT
        }
        for cls in PROMPT_CLASSES
    }
    found["rules"] = list(policy.rules)
    found["exceptions"] = list(policy.exceptions)
    found["cost_center"] = policy.cost_center
    return found


def _said_by(layers: Layers, name: str) -> str:
    return next((label for label, layer in layers if getattr(layer, name) is not None), BUILT_IN)


def _set_by(layers: Layers, name: str) -> str:
    # `none` is a value of its own there: the field is set, and to None.
    return next((label for label, layer in layers if name in layer.model_fields_set), BUILT_IN)


def _missing_keys(snapshot: CompiledSnapshot, environment: Mapping[str, str]) -> list[str]:
    return [
        f"{variable} is not set here: a gateway started with this environment leaves its models out"
        for variable in snapshot.required_key_variables
        if not environment.get(variable)
    ]


# -- a request --


def explain_request(engine: Engine, journals: Path, request_id: str, *, json_form: bool) -> str:
    """What the ledger says of a request, as text or JSON. Raises ConfigurationError, UnavailableError."""
    found = find_request(engine, journals, request_id)
    return as_json(found, indent=2).decode() if json_form else "\n".join(_request_lines(found))


# -- for people --


def _prompt_lines(found: Mapping[str, Any]) -> Iterable[str]:
    asked, said, decision = found["request"], found["classification"], found["decision"]
    yield (
        f"For team {found['team']}, app {found['app'] or '-'}, model {_text(asked['model'])}, tags "
        f"{_tags(found['tags'])}, at {found['at'].isoformat(timespec='seconds')}, policy {found['policy_hash']}"
    )
    yield (
        f"Class      {said['class']} (difficulty {said['difficulty']:.2f}, confidence {said['confidence']:.2f}): "
        f"{said['reason']} [{said['encoder']}, {said['head']}]"
    )
    if said["unused_because"]:
        yield f"           not asked for: {said['unused_because']}"
    yield f"Tokens     about {asked['input_tokens']} in, {asked['output_tokens']} out"
    if decision["refusal"]:
        refusal = decision["refusal"]
        yield f"Refused    {refusal['status']} {refusal['code']}: {refusal['message']}"
    else:
        yield f"Answers    {decision['model']}: {decision['why']}"
        for note in decision["notes"]:
            yield f"           {note}"
        if len(decision["order"]) > 1:
            yield f"           if it fails: {', '.join(decision['order'][1:])}"
    yield ""
    yield from _table(
        ("model", "verdict", "success", "expected USD", "billed USD", "price", "why"),
        [
            (
                row["model"],
                row["verdict"],
                _success_text(row),
                _or_dash(row["expected_cost_usd"]),
                _or_dash(row["billed_cost_usd"]),
                _price_text(row["price"]),
                row["reason"],
            )
            for row in found["models"]
        ],
    )
    yield ""
    if found["learned"]:
        yield f"Learned    {found['learned']}"
    yield from _floor_lines(found["floors"])
    baseline = found["baseline"]
    yield f"Reference  {found['reference'] or 'none: the gateway chooses'}"
    counted = baseline["model"]
    yield (
        f"Baseline   {_text(counted)} {_price_text(baseline['price'])}"
        if counted
        else "Baseline   none: set 'baseline' in policy.yaml to see savings"
    )
    for budget in found["budgets"]:
        yield (
            f"Budget     {budget['budget']} {budget['period']}: limit {_or_dash(budget['limit_usd'])}, hard cap "
            f"{_or_dash(budget['hard_cap_usd'])} USD, at its limit: {budget['at_limit']}"
        )
    if not found["budgets"]:
        yield "Budget     none"
    if decision["at_budget_limit"]:
        yield f"           with a budget at its limit {decision['at_budget_limit']} would answer"
    if decision["held_usd"] is not None:
        yield f"Held       {decision['held_usd']} USD in each budget while it runs (its worst case)"
    yield ""
    yield from _policy_lines(found["policy"], said["class"] if said["decides"] else None)
    for note in found["notes"]:
        yield f"Note: {note}."


def _policy_lines(policy: Mapping[str, Any], prompt_class: str | None) -> Iterable[str]:
    rows = [("allow", ", ".join(policy["allow"]["value"]) or "nothing", policy["allow"]["from"])]
    for cls in (prompt_class,) if prompt_class else PROMPT_CLASSES:
        for name, setting in policy["classes"][cls].items():
            unit = " s" if name.endswith("_p95") and setting["value"] is not None else ""
            rows.append((f"{cls}.{name}", f"{_or_dash(setting['value'])}{unit}", setting["from"]))
    for name in _SCALARS:
        value = policy[name]["value"]
        shown = ", ".join(value) or "-" if isinstance(value, tuple) else _or_dash(value)
        rows.append((name, shown, policy[name]["from"]))
    for name, setting in policy["cache"].items():
        unit = " s" if name == "ttl" else ""
        rows.append((f"cache.{name}", f"{_or_dash(setting['value'])}{unit}", setting["from"]))
    yield from _table(("what holds", "value", "said by"), rows)
    if policy["rules"]:
        yield f"Rules in force: {', '.join(policy['rules'])}"
    if policy["exceptions"]:
        yield f"Exceptions in force: {', '.join(policy['exceptions'])}"


def _request_lines(found: Mapping[str, Any]) -> Iterable[str]:
    caller, decision, money = found["caller"], found["decision"], found["money"]
    yield (
        f"Request    {found['id']}, {found['opened_at'].isoformat(timespec='seconds')}, {found['endpoint']}"
        f"{', streamed' if found['streamed'] else ''}"
    )
    if found["caller_request_id"]:
        yield f"           the caller's own id: {_text(found['caller_request_id'])}"
    yield (
        f"Caller     team {caller['team']}, app {caller['app'] or '-'}, key {caller['key_id']}, tags "
        f"{_tags(caller['tags'])}"
    )
    ended = f" ({found['error']})" if found["error"] else ""
    yield f"Ended      {found['status']}, HTTP {found['http_status']}{ended}, {found['duration_ms']:.0f} ms"
    yield (
        f"Asked for  {_text(decision['requested_model'])}; answered by {decision['served_model'] or 'nobody'}: "
        f"{decision['why']}"
    )
    if decision["class"]:
        judged = [
            f"{name} {decision[name]:.2f}"
            for name in ("difficulty", "confidence")
            if decision[name] is not None
        ]
        yield f"Class      {decision['class']} ({', '.join([*judged, decision['encoder'] or 'not recorded'])})"
    else:
        yield "Class      none: nothing was classified"
    entry = f", entry {decision['cache_entry']}" if decision["cache_entry"] else ""
    yield f"Cache      {decision['cache']}{entry}"
    if decision["likeness"]:
        yield f"Likeness   {_likeness(decision['likeness'])}"
    yield f"Policy     {decision['policy_hash']}{_under(decision['exceptions'])}"
    budgets = [f"{entry['budget']} {entry['period']}" for entry in found["budgets"]]
    yield f"Budgets    {', '.join(budgets) or 'none'}"
    if decision["dropped"]:
        yield ""
        yield from _table(("not chosen", "why"), sorted(decision["dropped"].items()))
    yield ""
    rows: list[tuple[str, ...]] = []
    for attempt in found["attempts"]:
        outcome = " ".join(
            str(part) for part in (attempt["outcome"], attempt["status_code"]) if part is not None
        )
        if attempt["error"] in ASIDE:
            outcome += f", {attempt['error']}"
        if attempt["estimated"]:
            outcome += ", estimated"
        label = (str(attempt["attempt"] + 1), f"{attempt['model']} at {attempt['provider']}", outcome)
        for line in attempt["cost_lines"]:
            rows.append(
                (
                    *label,
                    line["bucket"],
                    str(line["quantity"]),
                    str(line["usd_per_million"]),
                    str(line["amount_usd"]),
                    line["price_id"],
                )
            )
            label = ("", "", "")
        if not attempt["cost_lines"]:
            nothing = "unpriced" if attempt["cost_usd"] is None else "nothing used"
            rows.append((*label, nothing, "", "", _or_dash(attempt["cost_usd"]), ""))
    if rows:
        yield from _table(("#", "call", "outcome", "bucket", "tokens", "USD/million", "USD", "price"), rows)
    else:
        yield "No provider was called."
    yield ""
    yield from _money_lines(money)
    for label in found["labels"]:
        said = f": {_text(label['comment'])}" if label["comment"] else ""
        corrected = "" if label["counts"] else ", corrected since"
        yield (
            f"Label      {label['model']} {label['score']:g} by {label['source']} (weight {label['weight']:g}"
            f"{corrected}){said}"
        )


def _money_lines(money: Mapping[str, Any]) -> Iterable[str]:
    cost = "unpriced" if money["cost_usd"] is None else f"{money['cost_usd']} USD"
    yield f"Cost       {cost}{' (estimated)' if money['estimated'] else ''}, held {money['held_usd']} USD"
    for entry in money["adjustments"]:
        yield f"Adjusted   {entry['amount_usd']} USD by {_text(entry['author'])}: {_text(entry['reason'])}"
    if money["saved_usd"] is None:
        yield "Savings    unknown: the cost or the baseline has no known price"
        return
    yield (
        f"Savings    {money['baseline_usd']} ({_text(money['baseline_model'])}) - {money['cost_usd']} = "
        f"{money['saved_usd']} USD"
    )
    yield (
        f"           {money['saved_usd']} = {money['routing_usd']} routing + {money['cache_usd']} cache - "
        f"{money['overhead_usd']} overhead"
    )
    if money["potential_usd"] is not None:
        yield f"Potential  {money['potential_usd']} USD, had the policy let a cheaper model answer"


def _table(head: tuple[str, ...], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    lines = [head, *(tuple(_text(cell) for cell in row) for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _price_text(price: Mapping[str, Any] | None) -> str:
    if price is None:
        return "unpriced"
    discounted = f", contract {price['contract']}" if price["contract"] else ""
    return (
        f"{price['input_usd_per_million']:f}/{price['output_usd_per_million']:f} ({price['id']}{discounted})"
    )


def _or_dash(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _tags(tags: Mapping[str, Iterable[str]]) -> str:
    return ", ".join(f"{key}={'+'.join(values)}" for key, values in sorted(tags.items())) or "none"


def _likeness(found: Mapping[str, Any]) -> str:
    """What the semantic cache found, and why it was served or not."""
    threshold = found["threshold"]
    needed = "nothing is certified yet" if threshold is None else f"served from {threshold:.3f}"
    said = "served" if found["served"] else f"not served, mode {found['mode']}"
    reasons = f"; {_text(', '.join(found['reasons']))}" if found["reasons"] else ""
    return f"entry {found['entry']} is right with probability {found['probability']:.3f} ({needed}): {said}{reasons}"


def _under(exceptions: Sequence[str]) -> str:
    return f", under the exception {', '.join(exceptions)}" if exceptions else ""


def _text(value: object) -> str:
    """A caller's or a file's text without anything that could drive a terminal."""
    return "".join(char if char.isprintable() else "?" for char in str(value))
