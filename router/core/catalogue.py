"""The price catalogue and the quality priors that ship with the project, as data.

Prices come from a named release of a public price list (`policies/prices.json`), priors from
`policies/quality.json`. A name that is not there has no price: nothing is guessed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from router.core.pricing import every_bucket
from router.core.types import PROMPT_CLASSES, PriceRecord

SINCE_ALWAYS = datetime(1970, 1, 1, tzinfo=UTC)
"""`effective_from` of a price whose beginning nobody states."""

# The names of the files, and the usage bucket each one prices.
BUCKET_OF_PRICE: Mapping[str, str] = {
    "input": "input",
    "cached_input": "input_cached",
    "cache_write": "cache_write",
    "audio_input": "input_audio",
    "image_input": "input_image",
    "output": "output",
    "reasoning": "output_reasoning",
    "audio_output": "output_audio",
}

# Who makes a model an app may name without anybody having configured it, in the order asked.
_MAKERS = (
    "openai",
    "anthropic",
    "google",
    "mistral",
    "deepseek",
    "x-ai",
    "cohere",
    "meta",
    "moonshotai",
    "zai",
)


@dataclass(frozen=True, slots=True)
class DatedPrice:
    effective_from: datetime
    prices: Mapping[str, Decimal]


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """A model of the catalogue. `long_context_above`: from more input tokens on the provider charges more than
    `prices` say; None where one price holds for every length.
    """

    provider: str
    name: str
    prices: tuple[DatedPrice, ...]
    context: int | None
    long_context_above: int | None


def price_record(
    provider: str,
    model: str,
    effective_from: datetime,
    unit_prices: Mapping[str, Decimal],
    source: str,
    *,
    list_prices: Mapping[str, Decimal] | None = None,
    marginal_prices: Mapping[str, Decimal] | None = None,
    contract: str | None = None,
) -> PriceRecord:
    """A record whose id is made from its content, so that a changed price is another record."""
    listed = unit_prices if list_prices is None else list_prices
    marginal = unit_prices if marginal_prices is None else marginal_prices
    content = [
        provider,
        model,
        effective_from.isoformat(),
        [[bucket, format(price.normalize(), "f")] for bucket, price in sorted(unit_prices.items())],
        [[bucket, format(price.normalize(), "f")] for bucket, price in sorted(listed.items())],
        [[bucket, format(price.normalize(), "f")] for bucket, price in sorted(marginal.items())],
        source,
        contract,
    ]
    digest = hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()[:16]
    return PriceRecord(
        id=f"price-{digest}",
        provider=provider,
        model=model,
        effective_from=effective_from,
        unit_prices=unit_prices,
        list_prices=listed,
        marginal_prices=marginal,
        source=source,
        contract=contract,
    )


class Catalogue:
    """Looks prices and priors up by name. Immutable once built."""

    def __init__(self, prices: Mapping[str, Any], quality: Mapping[str, Any]) -> None:
        self.source = f"{prices.get('source', 'none')} {prices.get('version', '')}".strip()
        self._providers: Mapping[str, Mapping[str, Any]] = prices.get("providers", {})
        self._quality: Mapping[str, Mapping[str, Any]] = quality.get("models", {})
        self._exact: dict[tuple[str, str], str] = {}
        for provider, entry in self._providers.items():
            for name, model in entry["models"].items():
                for written in (name.lower(), *model.get("names", ())):
                    self._exact.setdefault((provider, written), name)

    @classmethod
    def from_text(cls, prices: str, quality: str) -> Catalogue:
        """Raises ValueError where a text is not JSON."""
        return cls(json.loads(prices), json.loads(quality))

    def provider(self, name: str, base_url: str | None, upstream_name: str = "") -> str | None:
        """The catalogue's id of a configured provider: by the host it calls, by the prefix of a model's name
        (`bedrock/...`), by the provider's own name.
        """
        if base_url is not None:
            for provider, entry in self._providers.items():
                if re.match(entry["api_pattern"], base_url):
                    return provider
        prefix = upstream_name.split("/", 1)[0] if "/" in upstream_name else ""
        for candidate in (prefix.lower(), name.lower()):
            if not candidate:
                continue
            if candidate in self._providers:
                return candidate
            for provider, entry in self._providers.items():
                if "name_pattern" in entry and re.match(entry["name_pattern"], candidate):
                    return provider
        return None

    def find(self, provider: str, name: str) -> CatalogueModel | None:
        """The model a provider knows as `name`, or the same model at the maker whose models it resells."""
        entry = self._providers.get(provider)
        if entry is None:
            return None
        for written in self._spellings(name):
            known = self._exact.get((provider, written))
            if known is None:
                known = next(
                    (
                        key
                        for key, model in entry["models"].items()
                        if "pattern" in model and re.match(model["pattern"], written)
                    ),
                    None,
                )
            if known is not None:
                return self._model(provider, known, entry["models"][known])
        for maker in entry.get("resells", ()):
            if (found := self.find(maker, name)) is not None:
                return found
        return None

    def models(self) -> Iterator[CatalogueModel]:
        """Every model, in the order of the file."""
        for provider, entry in self._providers.items():
            for name, model in entry["models"].items():
                yield self._model(provider, name, model)

    def named(self, name: str) -> CatalogueModel | None:
        """A model by its maker's name alone."""
        for maker in _MAKERS:
            if (found := self.find(maker, name)) is not None:
                return found
        return None

    def quality(self, name: str) -> Mapping[str, Decimal] | None:
        """The prior of a model: by its name, or by the listed name it is a dated version of (`gpt-4o-2024-11-20`)."""
        entry = self._prior(name)
        return None if entry is None else {cls: Decimal(entry[cls]) for cls in PROMPT_CLASSES}

    def measured(self, name: str) -> Mapping[str, tuple[Decimal, Decimal]] | None:
        """The interval a prior was measured to lie in, per class; None where nobody measured it."""
        entry = self._prior(name)
        if entry is None or "measured" not in entry:
            return None
        return {
            cls: (Decimal(entry["measured"][cls][0]), Decimal(entry["measured"][cls][1]))
            for cls in PROMPT_CLASSES
        }

    def _prior(self, name: str) -> Mapping[str, Any] | None:
        for written in self._spellings(name):
            if (found := self._quality.get(written)) is not None:
                return found
            dated = [
                key for key in self._quality if re.match(re.escape(key) + r"-(20[0-9]{2}|latest)", written)
            ]
            if dated:
                return self._quality[max(dated, key=len)]
        return None

    @staticmethod
    def _spellings(name: str) -> Sequence[str]:
        lower = name.lower()
        return (lower, lower.split("/", 1)[1]) if "/" in lower else (lower,)

    @staticmethod
    def _model(provider: str, name: str, entry: Mapping[str, Any]) -> CatalogueModel:
        prices = []
        for price in entry["prices"]:
            since = price.get("from")
            named = {bucket: Decimal(price[key]) for key, bucket in BUCKET_OF_PRICE.items() if key in price}
            start = datetime.fromisoformat(since).replace(tzinfo=UTC) if since else SINCE_ALWAYS
            prices.append(DatedPrice(start, every_bucket(named)))
        return CatalogueModel(
            provider, name, tuple(prices), entry.get("context"), entry.get("long_context_above")
        )
