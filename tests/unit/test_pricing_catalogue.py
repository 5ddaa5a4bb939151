"""The catalogue that ships, how models are found in it, and that it is what genai-prices says."""

from __future__ import annotations

import importlib.metadata
import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from router.adapters.price_catalogue import (
    catalogue_from_genai_prices,
    catalogue_text,
    listed,
    shipped_catalogue,
    shipped_policies,
)
from router.core.catalogue import Catalogue
from router.core.errors import ConfigurationError

CATALOGUE = shipped_catalogue()


def test_the_shipped_prices_are_what_the_importer_makes_of_the_release_they_name() -> None:
    shipped = json.loads((shipped_policies() / "prices.json").read_text(encoding="utf-8"))
    if shipped["version"] != importlib.metadata.version("genai-prices"):
        pytest.skip("another genai-prices release is installed than the one the file names")
    made = catalogue_from_genai_prices()
    assert catalogue_text(made) == (shipped_policies() / "prices.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["gpt-4o", "gpt-4o-mini", "gpt-5-mini", "claude-sonnet-4-5", "gemini-2.5-flash"]
)
def test_prices_agree_with_the_calculation_of_genai_prices(name: str) -> None:
    genai = pytest.importorskip("genai_prices")
    found = CATALOGUE.named(name)
    assert found is not None
    usage = genai.Usage(input_tokens=1000, cache_read_tokens=400, output_tokens=500)
    theirs = genai.calc_price(usage, model_ref=name, provider_id=found.provider).total_price
    prices = found.prices[-1].prices
    ours = (600 * prices["input"] + 400 * prices["input_cached"] + 500 * prices["output"]) / 1_000_000
    assert ours == theirs


@pytest.mark.parametrize(
    ("name", "base_url", "upstream", "provider"),
    [
        ("main", "https://api.openai.com/v1", "", "openai"),
        ("openai", "http://127.0.0.1:9000/v1", "", "openai"),
        ("vllm-a", "http://vllm-a:8000/v1", "", None),
        ("bedrock", None, "", "aws"),
        ("cloud", None, "bedrock/anthropic.claude-sonnet-4-5", "aws"),
        ("mine", "https://acme.openai.azure.com/openai/v1", "", "azure"),
        ("x", "https://evil.example/?api.openai.com", "", None),
    ],
)
def test_a_provider_is_known_by_its_host_then_its_prefix_then_its_name(
    name: str, base_url: str | None, upstream: str, provider: str | None
) -> None:
    assert CATALOGUE.provider(name, base_url, upstream) == provider


def test_a_dated_version_has_the_price_of_its_model() -> None:
    dated, plain = CATALOGUE.find("openai", "gpt-4o-2024-08-06"), CATALOGUE.find("openai", "gpt-4o")
    assert dated == plain
    assert plain is not None


def test_an_unknown_name_has_no_price_and_no_prior() -> None:
    assert CATALOGUE.named("no-such-model") is None
    assert CATALOGUE.find("openai", "no-such-model") is None
    assert CATALOGUE.quality("no-such-model") is None


def test_a_price_change_is_two_dated_prices() -> None:
    found = CATALOGUE.find("openai", "gpt-5.6-sol")
    assert found is not None
    assert [(p.effective_from.year, p.prices["input"]) for p in found.prices] == [
        (1970, Decimal(5)),
        (2026, Decimal(4)),
    ]
    assert found.prices[1].effective_from == datetime(2026, 8, 21, tzinfo=UTC)
    assert found.long_context_above == 272_000


def test_priors_are_found_for_spellings_of_the_same_model() -> None:
    assert CATALOGUE.quality("gpt-4o-2024-11-20") == CATALOGUE.quality("gpt-4o")
    assert CATALOGUE.quality("meta-llama/Llama-3.1-8B-Instruct") is not None
    assert CATALOGUE.quality("gpt-4o-mini") != CATALOGUE.quality("gpt-4o")


def test_every_shipped_prior_is_a_probability_that_falls_with_difficulty() -> None:
    shipped = json.loads((shipped_policies() / "quality.json").read_text(encoding="utf-8"))
    assert "not measured" in shipped["source"]
    for name in shipped["models"]:
        prior = CATALOGUE.quality(name)
        assert prior is not None
        assert 1 >= prior["simple"] >= prior["medium"] >= prior["complex"] >= 0, name


def test_a_broken_catalogue_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "prices.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="reinstall"):
        shipped_catalogue(tmp_path)


def test_a_resold_model_has_its_makers_price() -> None:
    prices = {
        "source": "s",
        "version": "1",
        "providers": {
            "maker": {
                "api_pattern": "https://maker",
                "models": {"m": {"prices": [{"input": "1", "output": "2"}]}},
            },
            "shop": {"api_pattern": "https://shop", "resells": ["maker"], "models": {}},
        },
    }
    found = Catalogue(prices, {}).find("shop", "m")
    assert found is not None
    assert (found.provider, found.prices[0].prices["output"]) == ("maker", Decimal(2))


def test_prices_can_be_listed_by_name() -> None:
    assert "openai/gpt-4o-mini: input 0.15, cached_input 0.075, output 0.6" in listed(
        CATALOGUE, "gpt-4o-mini"
    )
    tiered = [line for line in listed(CATALOGUE, "openai/GPT-5.6-sol") if line.startswith("openai/")]
    assert tiered == [
        "openai/gpt-5.6-sol: input 4, cached_input 0.4, output 20, more above 272000 input tokens"
    ]
    assert list(listed(CATALOGUE, "no-such-model")) == []
