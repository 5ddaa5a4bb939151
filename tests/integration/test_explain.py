"""`policy explain`: what a prompt would get and where that is said; what a booked request cost and saved."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import Engine

from router.adapters.journal import JournalFile
from router.adapters.sql.database import open_engine
from router.adapters.sql.labels import keep_feedback
from router.adapters.sql.ledger import Ledger, adjust
from router.cli import main
from router.core.errors import ConfigurationError, ModelNotFound, UnavailableError
from router.core.types import Caller, RequestRecord, Usage
from router.explain import explain_prompt, explain_request
from router.settings import Settings, read_settings
from tests.contracts.ledger_records import OPENED, candidate, labelled, new_id, opened, settled
from tests.values import replace

pytest_plugins = ["tests.contracts.sql_databases"]

PROVIDERS = """
apiVersion: farthing/v1
providers:
  sim: { wire: openai, base_url: "http://127.0.0.1:9/v1", api_key_env: SIM_KEY }
models:
  small: { provider: sim, name: small-1, context: 32768, max_output: 8192,
           price: { input: "0.10", output: "0.40" }, quality: { simple: "0.95", medium: "0.80", complex: "0.45" } }
  local: { provider: sim, name: local-1, context: 32768, max_output: 8192,
           price: { gpu_hour: "2.40", gpus: 1, prefill_tps: 9000, decode_tps: 1800 },
           quality: { simple: "0.80", medium: "0.60", complex: "0.30" } }
  frontier: { provider: sim, name: frontier-1, context: 128000, max_output: 16384,
              price: { input: "5", output: "20" }, quality: { simple: "0.99", medium: "0.97", complex: "0.94" } }
"""
POLICY = """
apiVersion: farthing/v1
organisation: { budget: { month: 20000, hard_cap: 25000 } }
baseline: frontier
aliases: { gpt-4o: frontier }
unknown_model: refuse
classes: { simple: { min_quality: 0.90 }, medium: { min_quality: 0.90 }, complex: { min_quality: 0.90 } }
defaults: { allow: [small, local, frontier], fallback: [frontier], cache: { ttl: 24h } }
teams:
  search:
    cost_center: "4711"
    budget: { month: 3000, hard_cap: 3300 }
    max_cost_per_request: 0.25
    apps:
      legal: { allow: [frontier], cache: { exact: false } }
rules:
  - name: pii stays local
    when: { tag.data: [pii] }
    then: { allow: [local], when_nothing_meets: refuse }
  - name: nights may be slower
    when: { time: { from: "20:00", to: "07:00" } }
    then: { classes: { simple: { first_token_p95: 10s } } }
exceptions:
  - { name: launch, team: search, budget: { month: 6000, hard_cap: 6600 }, until: "2026-12-15", reason: launch }
"""
NOON = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
SIMPLE = "What is the capital of France?"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "providers.yaml").write_text(PROVIDERS)
    (tmp_path / "policy.yaml").write_text(POLICY)
    return read_settings(
        config=str(tmp_path),
        environment={"FARTHING_DATA_DIR": str(tmp_path / "data"), "SIM_KEY": "sk-secret"},
    )


def explain(settings: Settings, text: str = SIMPLE, **more: Any) -> Any:
    asked: dict[str, Any] = {"team": "search", "app": None, "model": "auto", "tags": {}, "at": NOON, **more}
    return json.loads(explain_prompt(settings, text, **asked, json_form=True), parse_float=Decimal)


def row(found: Any, model: str) -> Any:
    return next(row for row in found["models"] if row["model"] == model)


def test_the_cheapest_that_is_good_enough(settings: Settings) -> None:
    found = explain(settings)
    assert found["classification"]["class"] == "simple"
    assert found["classification"]["decides"] is True
    assert found["decision"]["model"] == "small"
    assert found["decision"]["order"] == ["small", "frontier"]
    assert [(r["model"], r["verdict"]) for r in found["models"]] == [
        ("small", "chosen"),
        ("frontier", "fallback"),
        ("local", "dropped"),
    ]
    assert "below min_quality 0.90" in row(found, "local")["reason"]
    tokens_in, tokens_out = found["request"]["input_tokens"], found["request"]["output_tokens"]
    expected = (tokens_in * Decimal("0.10") + tokens_out * Decimal("0.40")) / 1_000_000
    assert abs(row(found, "small")["expected_cost_usd"] - expected) <= Decimal("1e-9")
    assert row(found, "small")["price"]["output_usd_per_million"] == Decimal("0.40")
    # A machine that runs anyway costs less at the margin than the books will say.
    assert row(found, "local")["expected_cost_usd"] <= row(found, "local")["billed_cost_usd"]
    assert found["baseline"]["model"] == "frontier"
    assert found["notes"][0].startswith("without live data")
    assert len(found["notes"]) == 1


def test_each_setting_says_where_it_comes_from(settings: Settings) -> None:
    plain = explain(settings)["policy"]
    assert plain["allow"] == {"value": ["small", "local", "frontier"], "from": "defaults"}
    assert plain["max_cost_per_request"] == {"value": Decimal("0.25"), "from": "team search"}
    assert plain["assume_max_output"]["from"] == "the default"
    assert plain["cache"]["ttl"] == {"value": 86_400, "from": "defaults"}
    assert plain["classes"]["simple"]["min_quality"] == {"value": Decimal("0.90"), "from": "classes"}
    assert (plain["rules"], plain["exceptions"], plain["cost_center"]) == ([], ["launch"], "4711")

    legal = explain(settings, app="legal")["policy"]
    assert legal["allow"] == {"value": ["frontier"], "from": "defaults, app search/legal"}
    assert legal["cache"]["exact"] == {"value": False, "from": "app search/legal"}

    night = explain(settings, at=NOON.replace(hour=23))["policy"]
    assert night["classes"]["simple"]["first_token_p95"] == {
        "value": 10,
        "from": "rule 'nights may be slower'",
    }
    assert explain(settings, team="other")["policy"]["cost_center"] is None


def test_budgets_and_the_exception_that_widens_one(settings: Settings) -> None:
    budgets = {entry["budget"]: entry for entry in explain(settings)["budgets"]}
    assert set(budgets) == {"organisation", "team:search"}
    assert budgets["team:search"]["limit_usd"] == 6000
    later = explain(settings, at=datetime(2026, 12, 16, tzinfo=UTC))["budgets"]
    assert next(entry for entry in later if entry["budget"] == "team:search")["limit_usd"] == 3000
    assert explain(settings)["decision"]["at_budget_limit"] in ("small", "local")


def test_a_named_model_is_not_classified(settings: Settings) -> None:
    found = explain(settings, model="gpt-4o")
    assert (found["decision"]["model"], found["decision"]["reason"]) == ("frontier", "named")
    assert found["reference"] == "frontier"
    assert found["classification"]["decides"] is False
    assert "names a model" in found["classification"]["unused_because"]


def test_a_refusal_says_what_excluded_each_model(settings: Settings) -> None:
    found = explain(settings, "Prove that the square root of two is irrational.", tags={"data": ("pii",)})
    assert found["decision"]["model"] is None
    assert found["decision"]["refusal"]["code"] == "no_model_meets_policy"
    assert "pii stays local" in row(found, "small")["reason"]
    text = explain_prompt(
        settings,
        SIMPLE,
        team="search",
        app=None,
        model="auto",
        tags={"data": ("pii",)},
        at=NOON,
        json_form=False,
    )
    assert "Refused    503" in text


def test_what_cannot_be_asked(settings: Settings) -> None:
    with pytest.raises(ConfigurationError, match=r"^--tag: .*known keys: data"):
        explain(settings, tags={"colour": ("blue",)})
    with pytest.raises(ModelNotFound, match="aliases"):
        explain(settings, model="gpt-9")
    (settings.config / "policy.yaml").write_text(POLICY.replace("[small, local", "[smal, local"))
    with pytest.raises(ConfigurationError, match=r"policy\.yaml:\d+:\d+"):
        explain(settings)


def test_a_missing_provider_key_is_a_note(settings: Settings) -> None:
    notes = explain(replace(settings, environment={}))["notes"]
    assert notes[1].startswith("SIM_KEY is not set here")


def test_text_for_people_holds_the_same(settings: Settings) -> None:
    text = explain_prompt(
        settings, SIMPLE, team="search", app="legal", model="auto", tags={}, at=NOON, json_form=False
    )
    for part in (
        "Answers    frontier",
        "not asked for: the policy leaves no choice of models",
        "not allowed by app search/legal",
        "team:search 2026-11: limit 6000.000000000",
        "Exceptions in force: launch",
        "5/20 (price-",
    ):
        assert part in text
    assert "sk-secret" not in text


# -- booked requests --


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_engine(database_url)
    yield engine
    engine.dispose()


def book(engine: Engine, record: RequestRecord) -> str:
    Ledger(engine).write([record], fresh=True)
    return record.id


def read(engine: Engine, journals: Path, request_id: str) -> Any:
    return json.loads(explain_request(engine, journals, request_id, json_form=True), parse_float=Decimal)


def test_a_booked_request(engine: Engine, tmp_path: Path) -> None:
    record = settled(
        new_id(), usage=Usage(input=1000, input_cached=30, output=500), failed_first=True, decision="cheapest"
    )
    book(engine, record)
    adjust(engine, record.id, -5, "refund", "finance", OPENED)
    found = read(engine, tmp_path, record.id)
    money = found["money"]
    assert record.cost is not None
    assert money["cost_usd"] == Decimal(record.cost) / 10**9
    assert money["baseline_usd"] - money["cost_usd"] == money["saved_usd"]
    assert money["saved_usd"] == money["routing_usd"] + money["cache_usd"] - money["overhead_usd"]
    assert money["adjustments"][0]["amount_usd"] == Decimal("-5e-9")
    lines = [line for attempt in found["attempts"] for line in attempt["cost_lines"]]
    assert sum(line["amount_usd"] for line in lines) == money["cost_usd"]
    assert [line["bucket"] for line in found["attempts"][1]["cost_lines"]] == [
        "input",
        "input_cached",
        "output",
    ]
    assert found["attempts"][0]["outcome"] == "cut"
    assert found["attempts"][1]["price"]["source"] == "test"
    assert found["decision"]["why"].endswith("attempt 2, as the ones before failed")
    assert found["decision"]["dropped"] == {"frontier": "dearer"}

    text = explain_request(engine, tmp_path, record.id, json_form=False)
    for amount in (money["cost_usd"], money["saved_usd"], money["overhead_usd"], lines[-1]["amount_usd"]):
        assert f"{amount:.9f}" in text
    assert re.search(r"frontier +dearer", text)
    assert "answered by mini" in text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "probability 0.900 (served from 0.850): not served, mode shadow"),
        ({"threshold": 1.01, "mode": "certified"}, "(nothing is certified yet): not served, mode certified"),
        (
            {"threshold": 0.95, "reasons": ("names differ",)},
            "(served from 0.950): not served, mode shadow; names differ",
        ),
    ],
)
def test_what_the_semantic_cache_found_is_told(
    engine: Engine, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    record = book(engine, replace(settled(new_id()), candidate=candidate(**changes)))
    assert says in explain_request(engine, tmp_path, record, json_form=False)
    found = read(engine, tmp_path, record)["decision"]["likeness"]
    assert (found["entry"], found["scope"], found["served"]) == ("entry-1", "scope-1", False)
    assert found["would_save_usd"] == Decimal("0.00004")
    assert (found["threshold"] is None) == (changes.get("threshold") == 1.01)
    plain = book(engine, settled(new_id()))
    assert read(engine, tmp_path, plain)["decision"]["likeness"] is None


def test_an_unpriced_request_has_no_made_up_figures(engine: Engine, tmp_path: Path) -> None:
    whole = settled(new_id())
    attempts = tuple(replace(item, cost=None, lines=(), price=None) for item in whole.attempts)
    none = dict.fromkeys(("cost", "routing_savings", "cache_savings", "overhead"))
    book(engine, replace(whole, attempts=attempts, unpriced=True, **none))  # type: ignore[arg-type]
    found = read(engine, tmp_path, whole.id)
    assert (found["money"]["cost_usd"], found["money"]["saved_usd"]) == (None, None)
    text = explain_request(engine, tmp_path, whole.id, json_form=False)
    assert "Cost       unpriced" in text
    assert "Savings    unknown" in text


def test_the_labels_of_a_request(engine: Engine, tmp_path: Path) -> None:
    plain = settled(new_id())
    record = book(engine, replace(plain, labels=(labelled(plain),)))
    assert plain.served_model is not None
    caller = Caller(plain.key_id, plain.team)
    for score, comment in ((1.0, None), (0.25, "cites \x1b[2J nothing")):
        assert keep_feedback(engine, caller, record, score, comment, OPENED + timedelta(seconds=score + 1))
    found = read(engine, tmp_path, record)["labels"]
    assert {(row["source"], row["score"], row["counts"]) for row in found} == {
        ("refusal", 0.0, True),
        ("feedback", 1.0, False),
        ("feedback", 0.25, True),
    }
    lines = explain_request(engine, tmp_path, record, json_form=False).splitlines()
    told = {line for line in lines if line.startswith("Label")}
    assert told == {
        f"Label      {plain.served_model} 0 by refusal (weight 0.5)",
        f"Label      {plain.served_model} 1 by feedback (weight 1, corrected since)",
        f"Label      {plain.served_model} 0.25 by feedback (weight 1): cites ?[2J nothing",
    }


def test_a_callers_text_cannot_drive_the_terminal(engine: Engine, tmp_path: Path) -> None:
    record = book(engine, settled(new_id(), requested_model="a\x1b[2J\nb", caller_request_id="\x07"))
    text = explain_request(engine, tmp_path, record, json_form=False)
    assert not set(text) & {"\x1b", "\x07"}
    assert "a?[2J?b" in text


def test_a_request_that_is_not_booked(engine: Engine, tmp_path: Path) -> None:
    unknown, running, ended = new_id(), new_id(), new_id()
    journal = JournalFile(tmp_path / "journal")
    try:
        journal.open(opened(running))
        journal.open(opened(ended))
        journal.settle(settled(ended))
        with pytest.raises(ConfigurationError, match="No admitted request has this id"):
            explain_request(engine, tmp_path / "journal", unknown, json_form=True)
        with pytest.raises(UnavailableError, match="still in the journal: it has not ended"):
            explain_request(engine, tmp_path / "journal", running, json_form=True)
        with pytest.raises(UnavailableError, match="still in the journal: it has ended"):
            explain_request(engine, tmp_path / "journal", ended, json_form=False)
        for bad in ("x" * 100, "a\nb", "é"):
            with pytest.raises(ConfigurationError, match="request-id"):
                explain_request(engine, tmp_path / "journal", bad, json_form=True)
    finally:
        journal.close()


def test_the_command(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FARTHING_DATA_DIR", str(settings.data))
    for name in ("FARTHING_DATABASE_URL", "FARTHING_REDIS_URL", "FARTHING_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    asked = ["policy", "explain", "--config", str(settings.config)]
    at = ["--at", "2026-11-24T12:00:00+00:00"]
    assert main([*asked, "--prompt", SIMPLE, "--team", "search", *at, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decision"]["model"] == "small"
    assert main([*asked, "--prompt", SIMPLE, "--tag", "data=pii", "--team", "search", *at]) == 0
    assert "rule 'pii stays local'" in capsys.readouterr().out
    assert main([*asked, "--request-id", new_id()]) == 2
    assert "No admitted request has this id" in capsys.readouterr().err
