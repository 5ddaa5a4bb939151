"""The two files' schema: text scalars in, exact typed values out, and the JSON Schema editors use.

Every scalar arrives as the text that was written (`document.read`), so a number is an exact Decimal, quoted or
not, and a form that YAML would have read as something else is refused with the corrected form.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from router.core.document import Document, Problem, dotted
from router.core.types import CALLER_NAME, TAG

CAPABILITIES = frozenset({"tools", "json_schema", "vision", "audio", "file"})
"""What a request can need of a model beyond text (`stages/normalise.py` finds them).
"""
LONGEST_CALL = 900.0
"""Seconds; budgets keep a hold as long."""
_WRITTEN = frozenset({"model", "messages", "stream", "stream_options", "n"})
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")

_NUMBER = re.compile(r"(0|[1-9][0-9]*)(\.[0-9]+)?")
_DURATION = re.compile(r"(0|[1-9][0-9]*)(\.[0-9]+)?(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+ -]{0,99}")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+/-]{0,199}")
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,99}")
_ENVIRONMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_SECRET_WORD = re.compile(r"(?i)(api_?key|secret|token|password|credential)")


def wrong(message: str, remedy: str) -> PydanticCustomError:
    return PydanticCustomError("farthing", "{message}", {"message": message, "remedy": remedy})


def shown(text: str) -> str:
    """A value as it may appear in a message: short, printable, quoted."""
    clean = "".join(c if c.isprintable() else "?" for c in text)
    return f"'{clean[:40]}...'" if len(clean) > 43 else f"'{clean}'"


def did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    listed = ", ".join(list(known)[:20])
    return f"use one of: {listed}" if listed else "remove it"


def _text(value: object, wanted: str, example: str) -> str:
    if not isinstance(value, str):
        raise wrong(f"expected {wanted}", f"write {example}")
    if value == "":
        raise wrong("the value is empty", f"write {example}, or remove the line")
    return value


def _corrected_number(text: str) -> str | None:
    """What a refused number was probably meant to be."""
    bare = text.strip().lstrip("$€£").rstrip("$€£").replace("_", "").replace(" ", "").removesuffix("USD")
    if re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", bare):
        bare = bare.replace(",", "")
    elif re.fullmatch(r"[0-9]+,[0-9]+", bare):
        bare = bare.replace(",", ".")
    if re.fullmatch(r"\+?[0-9]*\.?[0-9]*([eE][+-]?[0-9]{1,2})?", bare) and any(c.isdigit() for c in bare):
        try:
            plain = format(Decimal(bare), "f")
        except ArithmeticError:
            return None
        if "." in plain:
            plain = plain.rstrip("0").rstrip(".")
        return plain if _NUMBER.fullmatch(plain) else None
    return None


def _decimal(value: object, wanted: str, example: str) -> Decimal:
    text = _text(value, wanted, example)
    if _NUMBER.fullmatch(text) is None:
        if text.startswith("-"):
            raise wrong(f"{shown(text)} is negative", f"write {wanted} of at least 0")
        corrected = _corrected_number(text)
        remedy = f"write {corrected}" if corrected is not None else f"write {wanted}, such as {example}"
        raise wrong(f"{shown(text)} is not a plain number", remedy)
    if len(text) > 30:
        raise wrong(f"{shown(text)} has too many digits", f"write {wanted}, such as {example}")
    return Decimal(text)


def _money(value: object) -> Decimal:
    amount = _decimal(value, "an amount in USD", "3000")
    exponent = amount.as_tuple().exponent
    if isinstance(exponent, int) and exponent < -9:
        raise wrong("an amount has at most nine decimals", f"write {round(amount, 9)}")
    if amount > 1_000_000_000:
        raise wrong(f"{amount} USD is beyond what an amount may be", "write at most 1000000000")
    return amount


def _share(value: object) -> Decimal:
    text = _text(value, "a share", "50% or 0.5")
    if text.endswith("%"):
        share = _decimal(text[:-1].strip(), "a share", "50%") / 100
    else:
        share = _decimal(text, "a share", "50% or 0.5")
    if share > 1:
        number = text.rstrip("%").strip()
        hint = (
            f"{number}% or {Decimal(number) / 100}" if Decimal(number) <= 100 else "a share from 0% to 100%"
        )
        raise wrong(f"{shown(text)} is above 1", f"write {hint}")
    return share


def _part(value: object) -> Decimal:
    if value == 1 or str(value).strip() == "1":
        raise wrong("'1' can mean 1% or all of it", "write 1% or 100%")
    return _share(value)


def _whole(value: object) -> int:
    number = _decimal(value, "a whole number", "4096")
    if number != number.to_integral_value():
        raise wrong(f"{number} is not a whole number", f"write {number.to_integral_value()}")
    if not 1 <= number <= 1_000_000_000:
        raise wrong(f"{number} is out of range", "write a whole number from 1 to 1000000000")
    return int(number)


def _rate(value: object) -> Decimal:
    rate = _decimal(value, "a number", "60")
    if rate <= 0:
        raise wrong("the rate must be above 0", "write a number above 0, such as 60")
    return rate


def _duration(value: object) -> float:
    text = _text(value, "a duration", "300ms, 2s, 4m, 24h or 7d")
    match = _DURATION.fullmatch(text)
    if match is None:
        corrected = _corrected_number(text)
        if corrected is not None and corrected == text:
            raise wrong(
                f"{shown(text)} has no unit", f"write {text}s for seconds or {text}ms for milliseconds"
            )
        compact = (
            text.replace(" ", "").lower().replace("seconds", "s").replace("sec", "s").replace("min", "m")
        )
        remedy = f"write {compact}" if _DURATION.fullmatch(compact) else "write 300ms, 2s, 4m, 24h or 7d"
        raise wrong(f"{shown(text)} is not a duration", remedy)
    seconds = float(text[: -len(match[3])]) * _SECONDS[match[3]]
    if not 0 < seconds <= 366 * 86400:
        raise wrong(f"{shown(text)} is out of range", "write more than 0 and at most 366d")
    return seconds


def _latency(value: object) -> float | None:
    return None if value == "none" else _duration(value)


def _confidence(value: object) -> Decimal | None:
    if value == "none":
        return None
    share = _share(value)
    if not Decimal("0.5") <= share < 1:
        why = "is no more than a coin toss" if share < 1 else "would need endlessly many labels"
        raise wrong(
            f"a confidence of {shown(str(value))} {why}",
            "write at least 50% and less than 100%, such as 95%, or none",
        )
    return share


def _flag(value: object) -> bool:
    text = _text(value, "true or false", "true or false")
    if text in ("true", "false"):
        return text == "true"
    meant = {
        "yes": "true",
        "on": "true",
        "y": "true",
        "1": "true",
        "no": "false",
        "off": "false",
        "n": "false",
    }
    lower = text.lower()
    right = lower if lower in ("true", "false") else meant.get(lower, "true or false")
    raise wrong(f"{shown(text)} is not true or false", f"write {right}")


def _date(value: object) -> date:
    text = _text(value, "a date", '"2026-12-15"')
    if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        try:
            day = date.fromisoformat(text)
        except ValueError:
            raise wrong(
                f"{shown(text)} is not in the calendar", 'write a date such as "2026-12-15"'
            ) from None
        if not 2000 <= day.year < 2200:
            raise wrong(f"{shown(text)} is out of range", "write a year from 2000 to 2199")
        return day
    remedy = 'write year-month-day, such as "2026-12-15"'
    loose = re.fullmatch(r"([0-9]{4})[-/.]([0-9]{1,2})[-/.]([0-9]{1,2})([T ].*)?", text)
    european = re.fullmatch(r"([0-9]{1,2})\.([0-9]{1,2})\.([0-9]{4})", text)
    if loose:
        remedy = f'write "{loose[1]}-{int(loose[2]):02d}-{int(loose[3]):02d}"'
    elif european:
        remedy = f'write "{european[3]}-{int(european[2]):02d}-{int(european[1]):02d}"'
    raise wrong(f"{shown(text)} is not a date", remedy)


def _clock(value: object) -> time:
    text = _text(value, "a time of day", '"20:00"')
    if re.fullmatch(r"([01][0-9]|2[0-3]):[0-5][0-9]", text):
        return time(int(text[:2]), int(text[3:]))
    loose = re.fullmatch(r"([0-9]{1,2})(?::([0-9]{2}))?(?::[0-9]{2})? ?([ap]m)?", text.lower())
    remedy = 'write hours and minutes, such as "20:00"'
    if loose and int(loose[1]) <= 24:
        hour = (int(loose[1]) + (12 if loose[3] == "pm" and int(loose[1]) < 12 else 0)) % 24
        remedy = f'write "{hour:02d}:{loose[2] or "00"}"'
    raise wrong(f"{shown(text)} is not a time of day", remedy)


_SIZE = re.compile(r"([0-9]{1,6})(kB|MB|GB)")
_BYTES = {"kB": 1_000, "MB": 1_000_000, "GB": 1_000_000_000}


def _size(value: object) -> int:
    text = _text(value, "a size", "64MB")
    match = _SIZE.fullmatch(text)
    if match is None:
        loose = re.fullmatch(r"([0-9]{1,6}) ?([kmg])i?b?", text.lower())
        unit = {"k": "kB", "m": "MB", "g": "GB"}[loose[2]] if loose else ""
        raise wrong(
            f"{shown(text)} is not a size", f"write {loose[1]}{unit}" if loose else "write 64MB or 1GB"
        )
    return int(match[1]) * _BYTES[match[2]]


def _zone(value: object) -> str:
    text = _text(value, "a time zone", "UTC or Europe/Berlin")
    try:
        ZoneInfo(text)
    except (KeyError, ValueError, OSError):
        raise wrong(
            f"{shown(text)} is not a known time zone", "write a name such as UTC or Europe/Berlin"
        ) from None
    return text


def _matching(pattern: re.Pattern[str], wanted: str, example: str) -> Callable[[object], str]:
    def check(value: object) -> str:
        text = _text(value, wanted, example)
        if pattern.fullmatch(text) is None or text != text.strip():
            raise wrong(f"{shown(text)} is not {wanted}", f"write {wanted}, such as {example}")
        return text

    return check


def _sentence(value: object) -> str:
    text = _text(value, "text", "a few words")
    if text.lower() in ("null", "~"):
        raise wrong("the value is YAML's word for none", "write a few words, or remove the line")
    if len(text) > 200 or not text.isprintable():
        raise wrong(
            "the text is too long or holds control characters", "write one line of at most 200 characters"
        )
    return text


def _environment(value: object) -> str:
    text = _text(value, "the name of an environment variable", "OPENAI_API_KEY")
    if _ENVIRONMENT.fullmatch(text) is None:
        # The value may be the secret itself: it is never repeated.
        raise wrong(
            "this is not the name of an environment variable",
            "write the variable's name, such as OPENAI_API_KEY, and keep the key itself out of this file",
        )
    return text


def _url(value: object) -> str:
    text = _text(value, "a URL", '"https://api.openai.com/v1"')
    example = 'write one such as "https://api.openai.com/v1"'
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise wrong("this is not a URL", example) from None
    if parts.username is not None or parts.password is not None:
        raise wrong("the URL holds a user name or password", "remove it and name the key with api_key_env")
    if parts.scheme not in ("http", "https") or not host or not text.isprintable() or " " in text:
        raise wrong(f"{shown(text)} is not an http or https URL", example)
    for path in ("/chat/completions", "/completions"):
        if parts.path.rstrip("/").endswith(path):
            raise wrong(f"the gateway adds {path} itself", f"end the URL before {path}")
    if parts.query or parts.fragment:
        raise wrong("the URL holds a query or fragment", "end it with the path, such as /v1")
    return text.rstrip("/")


def _choice(*values: str) -> Callable[[object], str]:
    def check(value: object) -> str:
        text = _text(value, "one of: " + ", ".join(values), values[0])
        if text not in values:
            raise wrong(f"{shown(text)} is not one of: {', '.join(values)}", did_you_mean(text, values))
        return text

    return check


def _day(value: object) -> str:
    text = _text(value, "a day", "sat")
    if text not in DAYS:
        short = text.lower()[:3]
        remedy = f"write {short}" if short in DAYS else "write mon, tue, wed, thu, fri, sat or sun"
        raise wrong(f"{shown(text)} is not a day", remedy)
    return text


def _json(kind: str | list[str], **extra: Any) -> WithJsonSchema:
    return WithJsonSchema({"type": kind, **extra})


_NUMERIC: list[str] = ["number", "string"]
Money = Annotated[Decimal, BeforeValidator(_money), _json(_NUMERIC, description="USD, exact")]
Part = Annotated[Decimal, BeforeValidator(_part), _json(_NUMERIC, description="0.5 or 50%; not a bare 1")]
Share = Annotated[Decimal, BeforeValidator(_share), _json(_NUMERIC, description="0.5 or 50%")]
Whole = Annotated[int, BeforeValidator(_whole), _json(["integer", "string"])]
Rate = Annotated[Decimal, BeforeValidator(_rate), _json(_NUMERIC)]
_DURATION_SCHEMA = {"pattern": r"^[0-9]+(\.[0-9]+)?(ms|s|m|h|d)$", "description": "300ms, 2s, 4m, 24h, 7d"}
Duration = Annotated[float, BeforeValidator(_duration), _json("string", **_DURATION_SCHEMA)]
Latency = Annotated[
    float | None,
    BeforeValidator(_latency),
    _json("string", pattern=r"^([0-9]+(\.[0-9]+)?(ms|s|m|h|d)|none)$", description="300ms, 2s, 4m, or none"),
]
Confidence = Annotated[
    Decimal | None, BeforeValidator(_confidence), _json(_NUMERIC, description="95% or 0.95, or none")
]
Size = Annotated[
    int, BeforeValidator(_size), _json("string", pattern=_SIZE.pattern, description="500kB, 64MB or 1GB")
]
Flag = Annotated[bool, BeforeValidator(_flag), _json("boolean")]
Day = Annotated[date, BeforeValidator(_date), _json("string", pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$")]
Clock = Annotated[time, BeforeValidator(_clock), _json("string", pattern=r"^[0-2][0-9]:[0-5][0-9]$")]
Zone = Annotated[str, BeforeValidator(_zone), _json("string", description="IANA name, such as Europe/Berlin")]
Name = Annotated[
    str,
    BeforeValidator(_matching(_NAME, "a name (letters, digits, . _ : @ + - and spaces)", "search")),
    _json("string"),
]
CallerName = Annotated[
    str,
    BeforeValidator(_matching(CALLER_NAME, "a name that a key can carry (letters, digits, . _ -)", "search")),
    _json("string", pattern=f"^{CALLER_NAME.pattern}$"),
]
TagName = Annotated[
    str,
    BeforeValidator(_matching(TAG, "a tag (a-z, 0-9, _ . -)", "pii")),
    _json("string", pattern=f"^{TAG.pattern}$"),
]
ModelName = Annotated[
    str, BeforeValidator(_matching(_MODEL_NAME, "a model's name", "gpt-4o")), _json("string")
]
FieldName = Annotated[
    str, BeforeValidator(_matching(_FIELD, "a request field", "temperature")), _json("string")
]
Sentence = Annotated[str, BeforeValidator(_sentence), _json(["string", "number"])]
Environment = Annotated[
    str, BeforeValidator(_environment), _json("string", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
]
Url = Annotated[str, BeforeValidator(_url), _json("string", format="uri")]
WeekDay = Annotated[str, BeforeValidator(_day), _json("string", enum=list(DAYS))]


def _one_of(*values: str) -> tuple[BeforeValidator, WithJsonSchema]:
    return BeforeValidator(_choice(*values)), _json("string", enum=list(values))


ApiVersion = Annotated[Literal["farthing/v1"], *_one_of("farthing/v1")]
Currency = Annotated[Literal["USD"], *_one_of("USD")]
Wire = Annotated[Literal["openai", "litellm"], *_one_of("openai", "litellm")]
UnknownModel = Annotated[Literal["auto", "refuse"], *_one_of("auto", "refuse")]
AtLimitText = Annotated[Literal["downgrade", "refuse"], *_one_of("downgrade", "refuse")]
WhenNothingMeets = Annotated[Literal["best", "refuse"], *_one_of("best", "refuse")]
OnUnpricedModel = Annotated[Literal["block", "allow"], *_one_of("block", "allow")]
Semantic = Annotated[
    Literal["never", "shadow", "enforce", "certified"], *_one_of("never", "shadow", "enforce", "certified")
]
Scope = Annotated[Literal["app", "team", "shared"], *_one_of("app", "team", "shared")]
NoLearning = Annotated[Literal["none"], *_one_of("none")]
Catalog = Annotated[Literal["catalog"], *_one_of("catalog")]


class Entry(BaseModel):
    """A mapping of the files: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_alias=True, validate_by_name=False)


# -- providers.yaml ---------------------------------------------------------------------------------------------


class TimeoutsEntry(Entry):
    connect: Duration = 2.0
    first_token: Duration = 60.0
    idle: Duration = 60.0
    total: Duration = 600.0

    @model_validator(mode="after")
    def _held(self) -> TimeoutsEntry:
        if self.total > LONGEST_CALL:
            # What a request may cost is held that long in its budgets.
            raise wrong("a call may take 15 minutes at most", "write total: 15m or less")
        return self


class ProviderEntry(Entry):
    """An endpoint. The `openai` wire passes bytes through; `litellm` speaks every other wire."""

    wire: Wire = "openai"
    base_url: Url | None = None
    api_key_env: Environment | None = None
    timeouts: TimeoutsEntry = TimeoutsEntry()
    stream_usage: Flag = True
    deny_fields: list[FieldName] = []
    drain: Flag = False
    options: dict[FieldName, Sentence] = {}

    @model_validator(mode="after")
    def _complete(self) -> ProviderEntry:
        if self.wire == "openai" and self.base_url is None:
            raise wrong("a provider on the openai wire needs a base_url", 'add base_url: "https://.../v1"')
        if self.options and self.wire == "openai":
            raise wrong("options are for the litellm wire", "remove options, or set wire: litellm")
        for option in self.options:
            if _SECRET_WORD.search(option):
                raise wrong(
                    f"the option {shown(option)} looks like a secret",
                    "name an environment variable with api_key_env instead",
                )
        return self


class ExpectEntry(Entry):
    first_token: Duration | None = None
    tokens_per_second: Rate | None = None


class FixedPrice(Entry):
    """USD per million tokens. A missing bucket is charged at `input` or `output`."""

    input: Money
    output: Money
    cached_input: Money | None = None
    cache_write: Money | None = None
    reasoning: Money | None = None
    audio_input: Money | None = None
    audio_output: Money | None = None
    image_input: Money | None = None


class GpuPrice(Entry):
    """What a local GPU costs: USD per GPU and hour, and tokens per second measured at saturation.

    `marginal_share` is the part of that cost one more request really adds on a GPU that runs anyway.
    """

    gpu_hour: Money
    gpus: Rate = Decimal(1)
    prefill_tps: Rate
    decode_tps: Rate
    marginal_share: Share = Decimal("0.05")


def _price_kind(value: object) -> str:
    if isinstance(value, dict):
        return "gpu" if "gpu_hour" in value or "decode_tps" in value else "fixed"
    return "catalog" if isinstance(value, (str, list)) else "fixed"


Price = Annotated[
    Annotated[Catalog, Tag("catalog")]
    | Annotated[FixedPrice, Tag("fixed")]
    | Annotated[GpuPrice, Tag("gpu")],
    Discriminator(_price_kind),
]


class QualityEntry(Entry):
    """Prior probability of a good answer per class, from 0 to 1."""

    simple: Share
    medium: Share
    complex: Share


def _quality_kind(value: object) -> str:
    return "priors" if isinstance(value, (dict, QualityEntry)) else "catalog"


Quality = Annotated[
    Annotated[Catalog, Tag("catalog")] | Annotated[QualityEntry, Tag("priors")], Discriminator(_quality_kind)
]


class ModelEntry(Entry):
    """An LLM behind a provider. `name` is the provider's name for it; the key is the policy's."""

    provider: Name
    name: ModelName | None = None
    context: Whole
    max_output: Whole | None = None
    supports: list[FieldName] = []
    rejects: list[FieldName] = []
    rename: dict[FieldName, FieldName] = {}
    expect: ExpectEntry = ExpectEntry()
    price: Price | None = None
    quality: Quality | None = None

    @model_validator(mode="after")
    def _renames(self) -> ModelEntry:
        for field in sorted(_WRITTEN & {*self.rename, *self.rename.values()}):
            raise wrong(f"{field} is the gateway's own and cannot be renamed", "remove it from rename")
        return self


class ProvidersFile(Entry):
    """providers.yaml: endpoints, the names of key variables, capabilities, prices and quality priors."""

    api_version: ApiVersion = Field(alias="apiVersion")
    providers: dict[Name, ProviderEntry]
    models: dict[ModelName, ModelEntry]


# -- policy.yaml ------------------------------------------------------------------------------------------------


class BudgetEntry(Entry):
    """USD per calendar month in the organisation's time zone."""

    month: Money | None = None
    warn_at: list[Share] = []
    at_limit: AtLimitText | None = None
    hard_cap: Money | None = None

    @model_validator(mode="after")
    def _ordered(self) -> BudgetEntry:
        if self.month is None and self.hard_cap is None:
            raise wrong("a budget needs an amount", "add month: 3000 or hard_cap: 3300")
        if self.month is not None and self.hard_cap is not None and self.hard_cap < self.month:
            raise wrong(
                f"hard_cap {self.hard_cap} is below month {self.month}",
                "raise hard_cap to at least month, or lower month",
            )
        return self


class OrganisationEntry(Entry):
    timezone: Zone = "UTC"
    budget: BudgetEntry | None = None


class CascadeEntry(Entry):
    """Who checks a cheaper model's answer before it is sent: `signals`, the name of a model, or `none`."""

    verify: ModelName


class RequirementEntry(Entry):
    """What a prompt of one class must get; what is not named keeps its value from above. `none`: no limit.

    `confidence`: a cheaper model than the reference answers only where labelled traffic shows, with this confidence,
    that failures beyond the reference's stay below 1 - min_quality.
    """

    min_quality: Share | None = None
    first_token_p95: Latency = None
    total_p95: Latency = None
    confidence: Confidence = None
    cascade: CascadeEntry | None = None


class ClassesEntry(Entry):
    simple: RequirementEntry = RequirementEntry()
    medium: RequirementEntry = RequirementEntry()
    complex: RequirementEntry = RequirementEntry()


class CacheEntry(Entry):
    exact: Flag | None = None
    semantic: Semantic | None = None
    max_error: Part | None = None
    ttl: Duration | None = None
    scope: Scope | None = None
    quota: Size | None = None
    check: Part | None = None


class Settings(Entry):
    """What defaults, teams, apps, rules and exceptions can all say."""

    allow: list[ModelName] | None = None
    deny: list[ModelName] = []
    fallback: list[ModelName] | None = None
    substitute: Flag | None = None
    max_cost_per_request: Money | None = None
    assume_max_output: Whole | None = None
    when_nothing_meets: WhenNothingMeets | None = None
    on_unpriced_model: OnUnpricedModel | None = None
    cache: CacheEntry = CacheEntry()
    advise: Part | None = None
    learn: NoLearning | None = None

    @model_validator(mode="after")
    def _some(self) -> Settings:
        if self.allow is not None and not self.allow:
            raise wrong("allow lists no model", "name at least one model, or remove allow")
        return self


class DefaultsEntry(Settings):
    allow: list[ModelName]


class ScopedSettings(Settings):
    classes: ClassesEntry = ClassesEntry()


class AppEntry(ScopedSettings):
    budget: BudgetEntry | None = None
    tags: dict[TagName, list[TagName]] = {}


class TeamEntry(ScopedSettings):
    cost_center: Sentence | None = None
    budget: BudgetEntry | None = None
    apps: dict[CallerName, AppEntry] = {}


class UnlistedTeamsEntry(ScopedSettings):
    """Holds for every team the policy does not name, for each on its own."""

    cost_center: Sentence | None = None
    budget: BudgetEntry | None = None


class TimeWindow(Entry):
    """All that is named must hold. A window past midnight belongs to the day it begins on."""

    days: list[WeekDay] = list(DAYS)
    start: Clock | None = Field(default=None, alias="from")
    end: Clock | None = Field(default=None, alias="to")

    @model_validator(mode="after")
    def _possible(self) -> TimeWindow:
        if (self.start is None) != (self.end is None):
            raise wrong("a time window needs both from and to", 'write from: "20:00", to: "07:00"')
        if self.start is not None and self.start == self.end:
            raise wrong(
                "from and to are the same, so the window never holds", "remove both for the whole day"
            )
        if not self.days:
            raise wrong("days lists no day, so the window never holds", "name a day, or remove days")
        return self


def _window_kind(value: object) -> str:
    return "window" if isinstance(value, (dict, TimeWindow)) else "windows"


Windows = Annotated[
    Annotated[TimeWindow, Tag("window")] | Annotated[list[TimeWindow], Tag("windows")],
    Discriminator(_window_kind),
]


class When(Entry):
    """When a rule applies: every condition named must hold. `tag.KEY: [a, b]` holds where the caller has a or b.

    `time` is one window or a list of windows, of which one must hold.
    """

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "additionalProperties": False,
            "patternProperties": {
                rf"^tag\.{TAG.pattern}$": {
                    "type": "array",
                    "items": {"type": "string", "pattern": f"^{TAG.pattern}$"},
                }
            },
        },
    )
    __pydantic_extra__: dict[str, list[TagName]]

    team: list[CallerName] | None = None
    app: list[CallerName] | None = None
    time: Windows = []

    @model_validator(mode="after")
    def _known(self) -> When:
        for key, values in self.__pydantic_extra__.items():
            if key.startswith("tag.") and TAG.fullmatch(key[4:].lower()) and key != key.lower():
                raise wrong(
                    f"callers send tags in lower case, {shown(key)} is never met", f"write {key.lower()}"
                )
            if not key.startswith("tag.") or TAG.fullmatch(key[4:]) is None:
                remedy = did_you_mean(key, ("team", "app", "time", f"tag.{key}"))
                raise PydanticCustomError(
                    "farthing",
                    "{message}",
                    {"message": f"unknown key {shown(key)}", "remedy": remedy, "key": key},
                )
            if not values:
                raise wrong(
                    f"{key} lists no value, so the rule can never match", "name a value, such as [pii]"
                )
        for name, listed in (("team", self.team), ("app", self.app)):
            if listed is not None and not listed:
                raise wrong(
                    f"{name} is an empty list, so the rule can never match", f"name a {name}, or remove it"
                )
        if self.team is None and self.app is None and not self.time and not self.__pydantic_extra__:
            raise wrong(
                "the rule has no condition", "add one, such as tag.data: [pii], or move it under defaults"
            )
        return self

    @property
    def windows(self) -> Sequence[TimeWindow]:
        return [self.time] if isinstance(self.time, TimeWindow) else self.time

    @property
    def tags(self) -> Mapping[str, frozenset[str]]:
        return {key[4:]: frozenset(values) for key, values in self.__pydantic_extra__.items()}


class RuleEntry(Entry):
    name: Sentence
    when: When
    then: ScopedSettings

    @model_validator(mode="after")
    def _effect(self) -> RuleEntry:
        if not self.then.model_fields_set:
            raise wrong(
                "the rule changes nothing", "write under then what changes, such as allow: [small-local]"
            )
        return self


class ContractEntry(Entry):
    """A discount on list prices. `until` is the first day on which it no longer holds."""

    provider: Name
    models: list[ModelName] | None = None
    discount: Part
    start: Day = Field(default=date(1970, 1, 1), alias="from")
    until: Day | None = None
    reference: Sentence


class ExceptionEntry(ScopedSettings):
    """The only thing that widens. `until` is the first day on which it no longer holds."""

    name: Sentence
    team: CallerName
    app: CallerName | None = None
    start: Day | None = Field(default=None, alias="from")
    until: Day
    reason: Sentence
    approved_by: Sentence | None = None
    budget: BudgetEntry | None = None
    skip_rules: list[Sentence] = []


class LearnBudgetEntry(Entry):
    """USD per calendar month for shadow answers and their judge."""

    month: Money


class LearnEntry(Entry):
    """Learning from one's own traffic. `shadow`: share of requests also answered by another model, to compare;
    `judge`: the model that compares them (none named: by agreement); `keep_prompts`: prompts are stored as well.
    """

    shadow: Part = Decimal(0)
    budget: LearnBudgetEntry | None = None
    judge: ModelName | None = None
    keep_prompts: Flag = False

    @model_validator(mode="after")
    def _bounded(self) -> LearnEntry:
        if self.shadow > 0 and self.budget is None:
            raise wrong("shadow answers cost money, and no budget bounds them", "add budget: { month: 100 }")
        return self


class PolicyFile(Entry):
    """policy.yaml: who may use which models, at what quality, speed and cost. Holds no secret and no URL."""

    api_version: ApiVersion = Field(alias="apiVersion")
    currency: Currency = "USD"
    organisation: OrganisationEntry = OrganisationEntry()
    baseline: ModelName | None = None
    aliases: dict[ModelName, ModelName] = {}
    unknown_model: UnknownModel = "auto"
    learn: LearnEntry | None = None
    classes: ClassesEntry
    defaults: DefaultsEntry
    teams: dict[CallerName, TeamEntry] = {}
    unlisted_teams: UnlistedTeamsEntry = UnlistedTeamsEntry()
    rules: list[RuleEntry] = []
    contracts: list[ContractEntry] = []
    exceptions: list[ExceptionEntry] = []


File = TypeVar("File", bound=BaseModel)


def json_schema(file: Literal["policy", "providers"]) -> dict[str, Any]:
    """The JSON Schema (2020-12) of one of the two files, for editors."""
    kind = PolicyFile if file == "policy" else ProvidersFile
    schema = kind.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_as_written(schema)}


def json_schema_text(file: Literal["policy", "providers"]) -> str:
    """The schema as it stands in `policies/policy.schema.json` and `policies/providers.schema.json`."""
    return json.dumps(json_schema(file), indent=2) + "\n"


def _as_written(schema: Any) -> Any:
    """The schema of the text of a file: no null, as a key that is not wanted is left out, and no typed default."""
    if isinstance(schema, list):
        return [_as_written(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {
        key: _as_written(value)
        for key, value in schema.items()
        if key != "default" and not (key == "title" and isinstance(value, str))
    }
    variants = [part for part in parts.get("anyOf", ()) if part != {"type": "null"}]
    if len(variants) == 1:
        del parts["anyOf"]
        return {**variants[0], **parts}
    return {**parts, "anyOf": variants} if variants else parts


def typed(document: Document, kind: type[File]) -> tuple[File | None, tuple[Problem, ...]]:
    """The document as `kind`, or None and every problem that keeps it from being one."""
    if document.root is None:
        return None, document.problems
    try:
        value = kind.model_validate(document.root.plain())
    except ValidationError as error:
        schema = kind.model_json_schema(by_alias=True)
        details = error.errors(include_url=False)
        return None, (*document.problems, *(_problem(document, schema, detail) for detail in details))
    return (None if document.problems else value), document.problems


def _problem(document: Document, schema: Mapping[str, Any], detail: ErrorDetails) -> Problem:
    path = _real_path(document, detail["loc"])
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "farthing":
        if "key" in context:
            path = (*path, str(context["key"]))
            line, column = document.key_place(path)
        else:
            line, column = document.place(path)
        return Problem(
            document.file, line, column, dotted(path), str(context["message"]), str(context["remedy"])
        )
    if kind == "extra_forbidden":
        key = str(path[-1])
        line, column = document.key_place(path)
        remedy = did_you_mean(key, _keys_at(schema, path[:-1]))
        return Problem(document.file, line, column, dotted(path), f"unknown key {shown(key)}", remedy)
    if kind == "missing":
        line, column = document.place(path[:-1])
        return Problem(
            document.file,
            line,
            column,
            dotted(path),
            f"the key '{path[-1]}' is missing",
            f"add {path[-1]}: ...",
        )
    empty = detail.get("input") == ""
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        keys = _keys_at(schema, path)
        remedy = (
            f"write keys below it ({', '.join(keys[:12])})"
            if keys
            else "write `name: { ... }` entries below it"
        )
        message = "the value is empty" if empty else "expected a mapping of keys"
        return document.problem(path, message, remedy + (", or remove the line" if empty else ""))
    if kind == "list_type":
        value = detail.get("input")
        if isinstance(value, str) and value:
            return document.problem(
                path, f"expected a list, found {shown(value)}", f"write [{shown(value)[1:-1]}]"
            )
        return document.problem(path, "expected a list", "write values in brackets, such as [a, b]")
    return document.problem(path, detail["msg"], "see policies/policy.schema.json for what goes here")


_PUT_IN = ("[key]", "catalog", "fixed", "gpu", "priors", "window", "windows")


def _real_path(document: Document, loc: Sequence[str | int]) -> tuple[str | int, ...]:
    """`loc` without what pydantic puts in for unions and keys; the last step may not exist (a missing key)."""
    path: list[str | int] = []
    node = document.root
    for position, step in enumerate(loc):
        if node is not None and isinstance(node.value, dict) and step in node.value:
            node = node.value[str(step)]
        elif (
            node is not None
            and isinstance(node.value, list)
            and isinstance(step, int)
            and step < len(node.value)
        ):
            node = node.value[step]
        elif position < len(loc) - 1 or isinstance(step, int) or step in _PUT_IN:
            continue
        path.append(step)
    return tuple(path)


def _keys_at(schema: Mapping[str, Any], path: Sequence[str | int]) -> list[str]:
    """The keys the schema knows at `path`."""
    places: list[Mapping[str, Any]] = [schema]
    for step in path:
        below: list[Mapping[str, Any]] = []
        for place in _variants(schema, places):
            if isinstance(step, int):
                below.append(place.get("items", {}))
            elif step in place.get("properties", {}):
                below.append(place["properties"][step])
            elif isinstance(place.get("additionalProperties"), dict):
                below.append(place["additionalProperties"])
            else:
                below += place.get("patternProperties", {}).values()
        places = below
    return [key for place in _variants(schema, places) for key in place.get("properties", {})]


def _variants(schema: Mapping[str, Any], places: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    variants: list[Mapping[str, Any]] = []
    for place in places:
        if "$ref" in place:
            variants += _variants(schema, [schema["$defs"][place["$ref"].rsplit("/", 1)[1]]])
        elif "anyOf" in place or "oneOf" in place:
            variants += _variants(schema, place.get("anyOf") or place["oneOf"])
        else:
            variants.append(place)
    return variants
