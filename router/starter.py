"""`farthing init`: a starter pair of files from what this machine has, and what to do next.

It looks for provider keys in the environment (whether they are set, never what they are) and asks the usual ports
of this machine for engines that serve models. Nothing leaves the machine.
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from router.adapters.price_catalogue import shipped_catalogue
from router.core.catalogue import Catalogue
from router.core.compile import CompiledSnapshot
from router.core.errors import ConfigurationError
from router.core.lint import POLICY_FILE, PROVIDERS_FILE, load
from router.core.schema import json_schema_text
from router.settings import found_keys

LOOK_SECONDS = 1.0
MAX_ANSWER = 1024 * 1024
MAX_LOCAL_MODELS = 6
LOCAL_CONTEXT = 8192
OLLAMA_CONTEXT = 4096

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+/-]{0,199}")
_MIN_QUALITY = Decimal("0.90")
_TIMES: Mapping[str, str] = {
    "simple": "first_token_p95: 1500ms",
    "medium": "first_token_p95: 4s",
    "complex": "first_token_p95: 15s, total_p95: 120s",
}
_NO_CHAT = re.compile(r"(?i)embed|rerank|whisper|bge-|e5-|minilm|guard|tts")


@dataclass(frozen=True, slots=True)
class Model:
    """A model to be written down. `more` is the rest of its entry as YAML flow lines."""

    key: str
    name: str
    more: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Provider:
    """A provider to be written down. `found` says how it was found, for people."""

    key: str
    entry: str
    models: tuple[Model, ...]
    found: str
    local: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Choices:
    """What the policy says that follows from the models found. `minima`: min_quality per class."""

    baseline: str = ""
    fallback: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    minima: Mapping[str, Decimal] = field(default_factory=lambda: dict.fromkeys(_TIMES, _MIN_QUALITY))


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that may serve models on this machine. `path` lists its models."""

    key: str
    title: str
    port: int
    path: str
    start: str


ENGINES = (
    Engine("ollama", "Ollama", 11434, "/api/tags", "ollama serve, and ollama pull llama3.2:3b"),
    Engine("vllm", "vLLM", 8000, "/v1/models", "vllm serve Qwen/Qwen3-8B"),
    Engine("llama-cpp", "llama.cpp", 8080, "/v1/models", "llama-server -m model.gguf"),
)

# ---- hosted providers: models whose price the catalogue knows ----

_SAMPLING = "rejects: [temperature, top_p, stop]"
_RENAMED = "rename: { max_tokens: max_completion_tokens }"
_ALL = "supports: [tools, json_schema, vision]"
_TEXT = "supports: [tools, json_schema]"
_CATALOG = "quality: catalog"


def _hosted(
    name: str,
    context: int,
    output: int,
    supports: str,
    first_token: str,
    rate: int,
    *more: str,
    key: str = "",
) -> Model:
    lines = (
        f"context: {context}",
        f"max_output: {output}",
        supports,
        *(line for line in more if not line.startswith("quality")),
        f"expect: {{ first_token: {first_token}, tokens_per_second: {rate} }}",
        "price: catalog",
        next((line for line in more if line.startswith("quality")), _CATALOG),
    )
    return Model(key or name, name, lines)


def _judged(simple: str, medium: str, hard: str) -> str:
    return f'quality: {{ simple: "{simple}", medium: "{medium}", complex: "{hard}" }}'


_HOSTED: Mapping[str, tuple[str, str, tuple[Model, ...]]] = {
    "OPENAI_API_KEY": (
        "openai",
        'wire: openai, base_url: "https://api.openai.com/v1"',
        (
            _hosted("gpt-5-nano", 400000, 128000, _ALL, "800ms", 150, _SAMPLING, _RENAMED),
            _hosted("gpt-5-mini", 400000, 128000, _ALL, "1s", 90, _SAMPLING, _RENAMED),
            _hosted("gpt-4o-mini", 128000, 16384, _ALL, "600ms", 90),
            _hosted("gpt-4o", 128000, 16384, _ALL, "700ms", 80),
            _hosted("gpt-5.5", 272000, 128000, _ALL, "2s", 60, _SAMPLING, _RENAMED),
        ),
    ),
    "ANTHROPIC_API_KEY": (
        "anthropic",
        "wire: litellm",
        (
            _hosted("anthropic/claude-haiku-4-5", 200000, 64000, _ALL, "800ms", 120, key="claude-haiku-4-5"),
            _hosted("anthropic/claude-sonnet-5", 1000000, 64000, _ALL, "1500ms", 70, key="claude-sonnet-5"),
            _hosted("anthropic/claude-opus-5", 1000000, 64000, _ALL, "2s", 50, key="claude-opus-5"),
        ),
    ),
    "GEMINI_API_KEY": (
        "gemini",
        'wire: openai, base_url: "https://generativelanguage.googleapis.com/v1beta/openai"',
        (
            _hosted("gemini-2.5-flash-lite", 1000000, 65536, _ALL, "500ms", 200),
            _hosted("gemini-2.5-flash", 1000000, 65536, _ALL, "700ms", 150),
            _hosted("gemini-2.5-pro", 200000, 65536, _ALL, "3s", 90),
        ),
    ),
    "MISTRAL_API_KEY": (
        "mistral",
        'wire: openai, base_url: "https://api.mistral.ai/v1", stream_usage: false',
        (
            _hosted(
                "mistral-small-latest", 128000, 16384, _ALL, "500ms", 120, _judged("0.95", "0.82", "0.52")
            ),
            _hosted("mistral-large-2512", 256000, 16384, _ALL, "900ms", 60, _judged("0.97", "0.91", "0.78")),
        ),
    ),
    "GROQ_API_KEY": (
        "groq",
        'wire: openai, base_url: "https://api.groq.com/openai/v1"',
        (
            _hosted(
                "llama-3.1-8b-instant", 131072, 16384, _TEXT, "300ms", 500, _judged("0.92", "0.70", "0.35")
            ),
            _hosted(
                "llama-3.3-70b-versatile", 131072, 16384, _TEXT, "400ms", 250, _judged("0.95", "0.84", "0.60")
            ),
        ),
    ),
    "OPENROUTER_API_KEY": (
        "openrouter",
        'wire: openai, base_url: "https://openrouter.ai/api/v1", '
        "deny_fields: [models, provider, route, plugins, transforms]",
        (
            _hosted("google/gemini-2.5-flash-lite", 1000000, 65536, _ALL, "700ms", 150),
            _hosted("google/gemini-2.5-flash", 1000000, 65536, _ALL, "900ms", 120),
            _hosted("openai/gpt-4o", 128000, 16384, _ALL, "900ms", 80),
            _hosted("anthropic/claude-sonnet-5", 1000000, 64000, _ALL, "2s", 60),
        ),
    ),
}

# Names that apps send most. One that no provider here has is served by a model of about the same quality.
_USUAL_NAMES = (
    "gpt-4o",
    "gpt-4o-mini",
    "gpt-4.1",
    "gpt-4.1-mini",
    "gpt-5",
    "gpt-5-mini",
    "claude-haiku-4-5",
    "claude-sonnet-4-5",
    "claude-sonnet-5",
    "gemini-2.5-flash",
    "gemini-2.5-pro",
)


def write_starter(
    directory: Path,
    force: bool,
    *,
    engines: Sequence[Engine] = ENGINES,
    keys: Sequence[str] | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Writes providers.yaml, policy.yaml and both schemas into `directory`. 0: written; 1: nothing to write with.

    `keys`: the key variables that are set; None: looks. Raises ConfigurationError where a file exists and `force`
    is not given, or the folder cannot be written.
    """
    existing = [name for name in (PROVIDERS_FILE, POLICY_FILE) if (directory / name).exists()]
    if existing and not force:
        raise ConfigurationError(
            f"{directory / existing[0]} exists and is kept. Add --force to overwrite it, or name another folder "
            "with --config."
        )
    present = found_keys(_HOSTED) if keys is None else tuple(keys)
    local = _look(engines)
    providers = [
        *local.values(),
        *(_hosted_provider(variable) for variable in _HOSTED if variable in present),
    ]
    say("Looked for:")
    for engine in engines:
        found = local.get(engine.key)
        say(f"  {engine.title + ',':11} port {engine.port:<6} {found.found if found else 'not running'}")
        for note in found.notes if found else ():
            say(f"  {'':24}{note}")
    for variable in _HOSTED:
        say(f"  {variable:<24}{'set' if variable in present else 'not set'}")
    say("")
    if not providers:
        say("Nothing to write: Farthing needs one provider. Either set a key, for example")
        say("  export OPENAI_API_KEY=...          (or one of: " + ", ".join([*_HOSTED][1:]) + ")")
        say("or start an engine on this machine, for example")
        for engine in engines:
            say(f"  {engine.start}")
        say("and run 'farthing init' again.")
        return 1
    providers = _with_unique_keys(providers)
    texts = _texts(providers, shipped_catalogue(), datetime.now(UTC))
    _write(directory, texts)
    _next_steps(directory, providers, texts, say)
    return 0


def _hosted_provider(variable: str) -> Provider:
    key, entry, models = _HOSTED[variable]
    return Provider(key, f"{entry}, api_key_env: {variable}", models, f"{variable} is set")


# -- engines on this machine --


def _look(engines: Sequence[Engine]) -> dict[str, Provider]:
    with ThreadPoolExecutor(max(1, len(engines))) as pool:
        found = pool.map(_engine_provider, engines)
    return {engine.key: one for engine, one in zip(engines, found, strict=True) if one is not None}


def _engine_provider(engine: Engine) -> Provider | None:
    answer = _get(f"http://127.0.0.1:{engine.port}{engine.path}")
    if not isinstance(answer, dict):
        return None
    listed = answer.get("models" if engine.key == "ollama" else "data")
    if not isinstance(listed, list):
        return None
    entries = [entry for entry in listed if isinstance(entry, dict)]
    models: list[Model] = []
    left_out: list[str] = []
    for entry in entries:
        model = _local_model(engine, entry)
        if isinstance(model, Model) and len(models) < MAX_LOCAL_MODELS:
            models.append(model)
        else:
            left_out.append(_said(entry))
    if not models:
        return None
    notes = (f"left out: {', '.join(left_out[:10])}",) if left_out else ()
    return Provider(
        engine.key,
        f'wire: openai, base_url: "http://127.0.0.1:{engine.port}/v1", '
        "timeouts: { connect: 2s, first_token: 120s, idle: 60s, total: 600s }",
        tuple(models),
        f"running with {', '.join(model.name for model in models)}",
        local=True,
        notes=notes,
    )


def _get(url: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=LOOK_SECONDS) as answer:
            return json.loads(answer.read(MAX_ANSWER))
    except (OSError, ValueError):
        return None


def _said(entry: Mapping[str, Any]) -> str:
    name = str(entry.get("name") or entry.get("id") or "a model without a name")
    return "".join(c for c in name if c.isprintable())[:60]


def _local_model(engine: Engine, entry: Mapping[str, Any]) -> Model | None:
    """None for what is no chat model, or has a name no file could hold."""
    name = entry.get("name") if engine.key == "ollama" else entry.get("id")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or _NO_CHAT.search(name):
        return None
    context = OLLAMA_CONTEXT if engine.key == "ollama" else _context(entry)
    # vLLM answers many requests at once; the others are run for one or a few.
    busy = ("1.00", 9000, 1500) if engine.key == "vllm" else ("0.50", 400, 40)
    more = (
        f"context: {context}",
        f"max_output: {min(context, 4096)}",
        _TEXT,
        f'price: {{ gpu_hour: "{busy[0]}", gpus: 1, prefill_tps: {busy[1]}, decode_tps: {busy[2]} }}',
        _local_quality(name, entry),
    )
    return Model(name.removesuffix(":latest"), name, more)


def _context(entry: Mapping[str, Any]) -> int:
    meta = entry.get("meta")
    places = (entry.get("max_model_len"), entry.get("context_length"), *(
        (meta.get("n_ctx"), meta.get("n_ctx_train")) if isinstance(meta, dict) else ()
    ))  # fmt: skip
    return next((n for n in places if isinstance(n, int) and 512 <= n <= 10_000_000), LOCAL_CONTEXT)


def _local_quality(name: str, entry: Mapping[str, Any]) -> str:
    """The catalogue's prior where it knows the model, else a guess by its number of parameters."""
    if shipped_catalogue().quality(name) is not None:
        return _CATALOG
    details = entry.get("details")
    said = str(details.get("parameter_size", "")) if isinstance(details, dict) else ""
    sized = re.search(r"(?i)(\d+(?:\.\d+)?)\s*([bm])\b", said) or re.search(
        r"(?i)(?<![\d.])(\d+(?:\.\d+)?)([bm])(?![a-z])", name
    )
    billions = 0.0
    if sized is not None:
        billions = float(sized[1]) / (1000 if sized[2].lower() == "m" else 1)
    for least, judged in (
        (60.0, ("0.96", "0.86", "0.65")),
        (25.0, ("0.95", "0.83", "0.55")),
        (12.0, ("0.94", "0.80", "0.48")),
        (6.0, ("0.92", "0.70", "0.35")),
        (2.5, ("0.86", "0.58", "0.25")),
    ):
        if billions >= least:
            return _judged(*judged)
    return _judged("0.60", "0.30", "0.10")


# -- the files --


def _texts(providers: Sequence[Provider], catalogue: Catalogue, now: datetime) -> dict[str, str]:
    """Every file by name. Checked as the gateway would check them."""
    providers_text = _providers_text(providers)
    snapshot = _checked(providers_text, _policy_text(providers, Choices()), catalogue, now)
    best = sorted(snapshot.models, key=lambda name: _strength(snapshot, name, now), reverse=True)
    choices = Choices(
        baseline=best[0],
        fallback=tuple(best[:2]),
        aliases=_aliases(snapshot, catalogue, now),
        minima={cls: min(_MIN_QUALITY, _best_quality(snapshot, cls)) for cls in _TIMES},
    )
    policy_text = _policy_text(providers, choices)
    _checked(providers_text, policy_text, catalogue, now)
    return {
        PROVIDERS_FILE: providers_text,
        POLICY_FILE: policy_text,
        "providers.schema.json": json_schema_text("providers"),
        "policy.schema.json": json_schema_text("policy"),
    }


def _checked(providers: str, policy: str, catalogue: Catalogue, now: datetime) -> CompiledSnapshot:
    loaded = load(providers, policy, catalogue, now)
    if loaded.snapshot is None:
        raise ConfigurationError("\n".join(str(problem) for problem in loaded.errors))
    return loaded.snapshot


def _best_quality(snapshot: CompiledSnapshot, cls: str) -> Decimal:
    return max(
        (model.quality[cls] for model in snapshot.models.values() if model.quality), default=_MIN_QUALITY
    )


def _strength(snapshot: CompiledSnapshot, name: str, now: datetime) -> tuple[Decimal, Decimal]:
    """Best last; of two equally good ones the cheaper."""
    quality = snapshot.models[name].quality
    return (quality["complex"] if quality else Decimal(0), -_blended(snapshot, name, now))


def _blended(snapshot: CompiledSnapshot, name: str, now: datetime) -> Decimal:
    price = snapshot.price(name, now)
    if price is None:
        return Decimal("Infinity")
    return price.unit_prices["input"] * 3 + price.unit_prices["output"]


def _aliases(snapshot: CompiledSnapshot, catalogue: Catalogue, now: datetime) -> dict[str, str]:
    """Usual names that no model here has, each with the cheapest model that is about as good and not dearer."""
    found: dict[str, str] = {}
    for name in _USUAL_NAMES:
        listed, prior = snapshot.catalogue_price(name, now), catalogue.quality(name)
        if name in snapshot.models or listed is None or prior is None:
            continue
        limit = listed.unit_prices["input"] * 3 + listed.unit_prices["output"]
        same = [key for key in snapshot.models if key.rsplit("/", 1)[-1] == name]
        good = same or [
            key
            for key, model in snapshot.models.items()
            if model.quality is not None
            and all(model.quality[cls] >= prior[cls] - Decimal("0.02") for cls in prior)
            and not model.rejects
        ]
        affordable = [key for key in good if _blended(snapshot, key, now) <= limit]
        if affordable:
            found[name] = min(affordable, key=lambda key: _blended(snapshot, key, now))
    return found


def _quoted(text: str) -> str:
    return json.dumps(text)


def _providers_text(providers: Sequence[Provider]) -> str:
    lines = [
        "# yaml-language-server: $schema=./providers.schema.json",
        "# Written by 'farthing init'. The platform team's file: endpoints, models, capabilities, prices, quality.",
        "# No secret belongs here: api_key_env names the environment variable that holds the key.",
        "apiVersion: farthing/v1",
        "providers:",
    ]
    lines += [f"  {provider.key}: {{ {provider.entry} }}" for provider in providers]
    lines += [
        "models:                          # the name on the left is what the policy and the apps use",
        "  # price: catalog     list prices that ship with Farthing ('farthing prices list'), in USD",
        '  # price: { input: "0.25", output: "2" }     your own, USD per million tokens',
        "  # quality            share of good answers per class, judged: replace it by what you measure",
    ]
    for provider in providers:
        if provider.local:
            lines += [
                "  # A model on this machine costs what the machine costs: put in your own gpu_hour (USD per GPU and",
                "  # hour) and the tokens per second that it reaches under full load. These are placeholders.",
            ]
        for model in provider.models:
            lines += [
                f"  {_quoted(model.key)}:",
                f"    provider: {provider.key}",
                f"    name: {_quoted(model.name)}",
            ]
            lines += [f"    {line}" for line in model.more]
    return "\n".join(lines) + "\n"


def _with_unique_keys(providers: Sequence[Provider]) -> list[Provider]:
    """The second model of one name is called after its provider."""
    seen: set[str] = set()
    renamed = []
    for provider in providers:
        models = [
            replace(model, key=f"{provider.key}/{model.key}") if model.key in seen else model
            for model in provider.models
        ]
        seen.update(model.key for model in models)
        renamed.append(replace(provider, models=tuple(models)))
    return renamed


def _policy_text(providers: Sequence[Provider], choices: Choices) -> str:
    aliases = choices.aliases
    everything = ", ".join(_quoted(model.key) for provider in providers for model in provider.models)
    lines = [
        "# yaml-language-server: $schema=./policy.schema.json",
        "# Written by 'farthing init'. The FinOps file: who may use which models, at what quality, speed and cost.",
        "# A running gateway takes a change within two seconds; a change it cannot read leaves the last one active.",
        "# 'farthing policy lint' checks it, 'farthing policy explain --prompt TEXT' shows what it would decide.",
        "apiVersion: farthing/v1",
        "currency: USD",
        "# All teams together, per calendar month: from 100 on the cheapest model answers, at 120 nothing does.",
        "organisation:",
        "  timezone: UTC",
        "  budget: { month: 100, warn_at: [50%, 80%], at_limit: downgrade, hard_cap: 120 }",
    ]
    if choices.baseline:
        lines += [
            "# What savings are counted against when an app leaves the choice to the gateway (model: auto).",
            f"baseline: {_quoted(choices.baseline)}",
        ]
    lines += [
        "# A name an app sends -> the model that answers it. Savings are counted at the price of the name sent.",
        "aliases:" if aliases else "aliases: {}",
        *(f"  {_quoted(name)}: {_quoted(target)}" for name, target in aliases.items()),
        "# Any other name: auto picks a model as if the app had sent auto; refuse answers 404.",
        "unknown_model: auto",
        "# What a prompt of each class must get. min_quality: 0.90 asks for nine good answers in ten;",
        "# first_token_p95: 95 of 100 answers begin within this time. Lower quality, or more time, lets cheaper",
        "# models answer.",
        "classes:",
        *(_class_line(cls, choices.minima[cls]) for cls in _TIMES),
        "defaults:",
        f"  allow: [{everything}]",
    ]
    if choices.fallback:
        names = ", ".join(_quoted(name) for name in choices.fallback)
        lines.append(f"  fallback: [{names}]   # tried in this order when the chosen model fails")
    lines += [
        "  substitute: false              # true: a model asked for by name may be replaced by a cheaper one",
        "                                 # that is good enough; set it per team once you trust it",
        '  advise: "0.05"                 # share of named requests classified on the side, so that',
        "                                 # 'farthing report savings' shows what substitute would save",
        "  max_cost_per_request: 0.50     # expected cost, USD; a dearer model is left out",
        "  assume_max_output: 4096        # what is held in the budget where an app sets no max_tokens",
        "  when_nothing_meets: best       # best: the best of what is left answers | refuse",
        "  cache: { exact: true, semantic: never, ttl: 24h, scope: team }   # same request, same answer, no cost",
        "# Teams by name; keys are made with 'farthing keys create --team search'. For example:",
        "# teams:",
        "#   search:",
        '#     cost_center: "4711"',
        "#     budget: { month: 30, warn_at: [50%, 80%], at_limit: downgrade, hard_cap: 40 }",
        "#     substitute: true",
        "# Each team that is not named above:",
        "unlisted_teams: { budget: { month: 50, at_limit: downgrade, hard_cap: 60 } }",
    ]
    return "\n".join(lines) + "\n"


def _class_line(cls: str, minimum: Decimal) -> str:
    why = "" if minimum == _MIN_QUALITY else "   # the best that is expected of a model here"
    return f"  {cls + ':':<8} {{ min_quality: {minimum}, {_TIMES[cls]} }}{why}"


def _write(directory: Path, texts: Mapping[str, str]) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"{directory} cannot be written ({error.strerror}). Name another folder with --config."
        ) from None


def _next_steps(
    directory: Path, providers: Sequence[Provider], texts: Mapping[str, str], say: Callable[[str], None]
) -> None:
    loaded = load(texts[PROVIDERS_FILE], texts[POLICY_FILE], shipped_catalogue(), datetime.now(UTC))
    count = sum(len(provider.models) for provider in providers)
    say(f"Wrote {directory / PROVIDERS_FILE} and {directory / POLICY_FILE}: {count} models of")
    for provider in providers:
        say(f"  {provider.key:<11} {', '.join(model.key for model in provider.models)}")
    for warning in loaded.warnings:
        say(f"  {warning}")
    at = "" if directory.resolve() == Path.cwd() else f" --config {directory}"
    say("")
    commands = (
        (f"farthing serve{at}", "the gateway, at http://127.0.0.1:8400/v1"),
        ("farthing keys create --team search", "a key for an app, which sends it to that base URL"),
        (f"farthing policy lint{at}", "after every change of the two files"),
    )
    width = max(len(command) for command, _ in commands)
    say("Next:")
    for command, purpose in commands:
        say(f"  {command:<{width}}   # {purpose}")
    if any(provider.local for provider in providers):
        say(
            f"Put what your machine costs (gpu_hour) and reaches (decode_tps) into {directory / PROVIDERS_FILE}."
        )
