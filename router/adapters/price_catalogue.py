"""The price catalogue on disk: reading what ships with the project, and making it anew from genai-prices.

`python -m router.adapters.price_catalogue` writes `policies/prices.json` from the installed genai-prices (MIT), a
development dependency that nothing imports at run time.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any

from router.core.catalogue import BUCKET_OF_PRICE, Catalogue
from router.core.errors import ConfigurationError

_PRICE_OF_FIELD = {
    "input_mtok": "input",
    "cache_read_mtok": "cached_input",
    "cache_write_mtok": "cache_write",
    "input_audio_mtok": "audio_input",
    "input_image_mtok": "image_input",
    "output_mtok": "output",
    "output_reasoning_mtok": "reasoning",
    "output_audio_mtok": "audio_output",
}
# Not part of what a chat answer's tokens cost: tools of the provider's own, and cheaper or longer-lived cache kinds.
_APART = {
    "web_searches_kcount",
    "storage_searches_kcount",
    "cache_write_1h_mtok",
    "cache_audio_read_mtok",
    "cache_image_read_mtok",
}


def shipped_policies() -> Path:
    """The folder of the files that ship with the project: in a checkout, or inside an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_data" / "policies"
    return inside if inside.is_dir() else package.parent / "policies"


def shipped_catalogue(folder: Path | None = None) -> Catalogue:
    """Raises ConfigurationError where the installation lacks its catalogue or it cannot be read."""
    folder = folder or shipped_policies()
    try:
        return Catalogue.from_text(
            (folder / "prices.json").read_text(encoding="utf-8"),
            (folder / "quality.json").read_text(encoding="utf-8"),
        )
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"the price catalogue in {folder} cannot be read ({type(error).__name__}); reinstall farthing"
        ) from error


def catalogue_from_genai_prices() -> dict[str, Any]:
    """The catalogue as data, from the installed genai-prices release.

    Left out, so that they stay unpriced instead of wrong: models without a price for both input and output tokens,
    models with a price for something a usage bucket cannot hold (seconds, pages, requests, video), and models
    whose price depends on the time of day. A price that grows with the prompt keeps its base, and
    `long_context_above` says from where on it is too low.
    """
    from genai_prices.data_snapshot import get_snapshot

    providers: dict[str, Any] = {}
    left_out = 0
    for provider in get_snapshot().providers:
        models: dict[str, Any] = {}
        for model in provider.models:
            entry = _model(model)
            if entry is None:
                left_out += 1
            else:
                models[model.id] = entry
        if not models:
            continue
        found: dict[str, Any] = {"api_pattern": provider.api_pattern}
        if provider.provider_match is not None:
            found["name_pattern"] = _pattern(provider.provider_match)
        if provider.fallback_model_providers:
            found["resells"] = list(provider.fallback_model_providers)
        providers[provider.id] = {**found, "models": models}
    return {
        "source": "genai-prices",
        "version": version("genai-prices"),
        "licence": "MIT, https://github.com/pydantic/genai-prices",
        "unit": "USD per million tokens",
        "left_out": left_out,
        "providers": providers,
    }


def _model(model: Any) -> dict[str, Any] | None:
    dated = model.prices if isinstance(model.prices, list) else None
    prices: list[dict[str, str]] = []
    above: int | None = None
    for constraint, price in [(c.constraint, c.prices) for c in dated] if dated else [(None, model.prices)]:
        if constraint is not None and not hasattr(constraint, "start_date"):
            return None
        row: dict[str, str] = {}
        since: date | None = getattr(constraint, "start_date", None)
        if since is not None:
            row["from"] = since.isoformat()
        for field, value in vars(price).items():
            if value is None or field in _APART:
                continue
            if field not in _PRICE_OF_FIELD:
                return None
            if not isinstance(value, Decimal):
                above = min(value.tiers[0].start, above or value.tiers[0].start)
                value = value.base
            row[_PRICE_OF_FIELD[field]] = format(value.normalize(), "f")
        if "input" not in row or "output" not in row:
            return None
        prices.append(row)
    # The order of BUCKET_OF_PRICE, so that a new release gives a readable difference.
    order = ["from", *BUCKET_OF_PRICE]
    entry: dict[str, Any] = {"prices": [{key: row[key] for key in order if key in row} for row in prices]}
    names = _equals(model.match)
    if names is None:
        entry["pattern"] = _pattern(model.match)
    elif (others := sorted({name.lower() for name in names} - {model.id.lower()})) != []:
        entry["names"] = others
    if model.context_window:
        entry["context"] = model.context_window
    if above is not None:
        entry["long_context_above"] = above
    return entry


def _equals(clause: Any) -> list[str] | None:
    """The names of a clause that compares with whole names only, else None."""
    if hasattr(clause, "equals"):
        return [clause.equals]
    if hasattr(clause, "or_"):
        parts = [_equals(part) for part in clause.or_]
        return (
            None if any(part is None for part in parts) else [name for part in parts for name in part or ()]
        )
    return None


def _pattern(clause: Any) -> str:
    """A regular expression, matched at the start, that holds where the clause does."""
    kinds = {
        "equals": "(?={}$)",
        "starts_with": "(?={})",
        "ends_with": "(?=.*{}$)",
        "contains": "(?=.*{})",
    }
    for kind, template in kinds.items():
        if hasattr(clause, kind):
            return template.format(re.escape(getattr(clause, kind).lower()))
    if hasattr(clause, "regex"):
        return f"(?=.*?(?:{clause.regex}))"
    if hasattr(clause, "or_"):
        return "(?:" + "|".join(_pattern(part) for part in clause.or_) + ")"
    return "".join(_pattern(part) for part in clause.and_)


def catalogue_text(catalogue: dict[str, Any]) -> str:
    """JSON with one line per model, so that two releases can be compared line by line."""
    head = {key: value for key, value in catalogue.items() if key != "providers"}
    lines = ["{"]
    lines += [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    lines.append('  "providers": {')
    for p, (name, provider) in enumerate(catalogue["providers"].items()):
        lines.append(f"    {json.dumps(name)}: {{")
        lines += [f"      {json.dumps(k)}: {json.dumps(v)}," for k, v in provider.items() if k != "models"]
        lines.append('      "models": {')
        rows = [f"        {json.dumps(k)}: {json.dumps(v)}" for k, v in provider["models"].items()]
        lines.append(",\n".join(rows))
        lines.append("      }")
        lines.append("    }," if p < len(catalogue["providers"]) - 1 else "    }")
    lines += ["  }", "}"]
    return "\n".join(lines) + "\n"


def listed(catalogue: Catalogue, match: str = "") -> Iterator[str]:
    """One line per model whose `provider/name` holds `match`: its prices of today in USD per million tokens."""
    wanted = match.lower()
    for model in catalogue.models():
        name = f"{model.provider}/{model.name}"
        if wanted not in name.lower():
            continue
        prices = model.prices[-1].prices
        shown = ", ".join(
            f"{key} {prices[BUCKET_OF_PRICE[key]]}" for key in ("input", "cached_input", "output")
        )
        above = f", more above {model.long_context_above} input tokens" if model.long_context_above else ""
        yield f"{name}: {shown}{above}"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else shipped_policies() / "prices.json"
    made = catalogue_from_genai_prices()
    target.write_text(catalogue_text(made), encoding="utf-8")
    count = sum(len(provider["models"]) for provider in made["providers"].values())
    print(f"{target}: {count} models of {len(made['providers'])} providers, {made['left_out']} left out")
