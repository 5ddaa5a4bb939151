"""Each example edit loads without a warning and changes what it says, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from router.adapters.price_catalogue import shipped_catalogue, shipped_policies
from router.core.compile import CompiledSnapshot, describe
from router.core.lint import load
from router.core.policy import LearnPolicy
from router.core.types import NanoUSD

EXAMPLES = shipped_policies() / "examples"
FOLDERS = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir())
CATALOGUE = shipped_catalogue()
DAY = datetime(2026, 11, 24, 12, tzinfo=UTC)
NIGHT = datetime(2026, 11, 24, 23, tzinfo=UTC)
CALLERS: tuple[tuple[str, str | None], ...] = (
    ("search", None),
    ("search", "faq-bot"),
    ("search", "legal"),
    ("support", None),
    ("elsewhere", None),
)


def snapshot(folder: str, side: str) -> CompiledSnapshot:
    found = load(
        (EXAMPLES / "providers.yaml").read_text(encoding="utf-8"),
        (EXAMPLES / folder / f"{side}.policy.yaml").read_text(encoding="utf-8"),
        CATALOGUE,
        DAY,
    )
    assert found.problems == (), [str(problem) for problem in found.problems]
    assert found.snapshot is not None
    return found.snapshot


def changes(folder: str, at: datetime = DAY, **tags: str) -> dict[tuple[str, str | None], dict[str, Any]]:
    """Per caller, what differs after the edit."""
    before, after = snapshot(folder, "before"), snapshot(folder, "after")
    sent = {key: frozenset({value}) for key, value in tags.items()}
    found = {}
    for caller in CALLERS:
        old = describe(before.resolve(*caller, {}, at))
        new = describe(after.resolve(*caller, sent, at))
        changed = {key: new[key] for key in new if new[key] != old[key] and key != "policy_hash"}
        if changed:
            found[caller] = changed
    return found


def test_there_are_the_twelve_edits() -> None:
    assert [name[:2] for name in FOLDERS] == [f"{number:02d}" for number in range(1, 13)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_edit_is_small(folder: str) -> None:
    lines = [
        (EXAMPLES / folder / f"{side}.policy.yaml").read_text("utf-8").splitlines()
        for side in ("before", "after")
    ]
    before, after = (set(side) for side in lines)
    assert 1 <= len(after - before) <= 7
    assert len(before - after) <= 1


def test_the_examples_share_one_beginning() -> None:
    assert (
        len({(EXAMPLES / folder / "before.policy.yaml").read_text(encoding="utf-8") for folder in FOLDERS})
        == 1
    )


def test_cap_a_team_for_a_month() -> None:
    (caller, changed), *others = changes("01-cap-a-team-for-a-month").items()
    assert caller == ("support", None)
    assert others == []
    assert list(changed) == ["budgets"]
    assert changed["budgets"][1] == {
        "key": "team:support",
        "month": "1500",
        "hard_cap": "1500",
        "at_limit": "refuse",
        "warn_at": ["0.5", "0.8"],
    }


def test_forbid_a_model() -> None:
    found = changes("02-forbid-a-model")
    assert set(found) == set(CALLERS)
    for changed in found.values():
        assert changed["allow"] == ["small-local", "mini", "frontier"]
        assert changed["excluded"] == {"gpt-4o": "denied by defaults"}


def test_other_quality_for_one_app() -> None:
    found = changes("03-other-quality-for-one-app")
    assert set(found) == {("search", "legal")}
    assert list(found["search", "legal"]) == ["classes"]
    assert found["search", "legal"]["classes"]["medium"]["min_quality"] == "0.95"
    assert found["search", "legal"]["classes"]["complex"]["min_quality"] == "0.90"


def test_slower_at_night() -> None:
    assert changes("04-slower-at-night", DAY) == {}
    found = changes("04-slower-at-night", NIGHT)
    assert set(found) == set(CALLERS)
    for changed in found.values():
        assert changed["rules"] == ["nights may be slower"]
        assert changed["classes"]["simple"]["first_token_p95"] == 10
        assert changed["classes"]["medium"]["first_token_p95"] == 4


def test_allow_list_per_data_tag() -> None:
    assert changes("05-allow-list-per-data-tag") == {}
    found = changes("05-allow-list-per-data-tag", data="pii")
    assert set(found) == set(CALLERS)
    for changed in found.values():
        assert changed["allow"] == ["small-local"]
        assert changed["excluded"]["frontier"] == "not allowed by rule 'pii stays local'"
        assert changed["cache"]["semantic"] == "never" if "cache" in changed else True
    other = changes("05-allow-list-per-data-tag", data="public")
    assert all(set(changed) == {"tags"} for changed in other.values())


def test_contract_discount() -> None:
    assert changes("06-contract-discount") == {}
    before, after = (
        snapshot("06-contract-discount", side).price("frontier", DAY) for side in ("before", "after")
    )
    assert before is not None
    assert after is not None
    assert after.contract == "PO-1881"
    assert after.id != before.id
    assert after.list_prices == before.unit_prices
    assert after.unit_prices["output"] == before.unit_prices["output"] * Decimal("0.88")
    mini = [snapshot("06-contract-discount", side).price("mini", DAY) for side in ("before", "after")]
    assert mini[0] == mini[1]
    ended = snapshot("06-contract-discount", "after").price("frontier", datetime(2027, 7, 1, tzinfo=UTC))
    assert ended is not None
    assert ended.id == before.id


def test_temporary_exception_with_an_end() -> None:
    found = changes("07-temporary-exception-with-an-end")
    assert {caller[0] for caller in found} == {"search"}
    for changed in found.values():
        assert changed["exceptions"] == ["launch"]
        assert (changed["budgets"][1]["month"], changed["budgets"][1]["hard_cap"]) == ("6000", "6600")
    # The end is a day in Berlin: 23:00 UTC of the day before.
    assert changes("07-temporary-exception-with-an-end", datetime(2026, 12, 14, 22, 59, tzinfo=UTC)) != {}
    assert changes("07-temporary-exception-with-an-end", datetime(2026, 12, 14, 23, 0, tzinfo=UTC)) == {}


def test_cap_an_app() -> None:
    found = changes("08-cap-an-app")
    assert set(found) == {("search", "faq-bot")}
    budgets = found["search", "faq-bot"]["budgets"]
    assert [budget["key"] for budget in budgets] == ["organisation", "team:search", "app:search/faq-bot"]
    assert (budgets[2]["month"], budgets[2]["hard_cap"], budgets[2]["at_limit"]) == ("400", "400", "refuse")


def test_fallback_order() -> None:
    found = changes("09-fallback-order")
    assert set(found) == set(CALLERS)
    assert all(changed == {"fallback": ["gpt-4o", "mini"]} for changed in found.values())


def test_substitute_for_one_team() -> None:
    assert changes("10-substitute-for-one-team") == {("support", None): {"substitute": True}}


def test_learn_from_own_traffic() -> None:
    assert changes("11-learn-from-own-traffic") == {}, "what may serve whom stays as it is"
    before, after = (snapshot("11-learn-from-own-traffic", side).learn for side in ("before", "after"))
    assert before is None
    assert after == LearnPolicy(Decimal("0.02"), NanoUSD(100_000_000_000), "frontier", keep_prompts=False)


def test_answer_by_likeness() -> None:
    found = changes("12-answer-by-likeness")
    assert set(found) == {("search", "faq-bot")}
    before, after = (
        snapshot("12-answer-by-likeness", side).resolve("search", "faq-bot", {}, DAY).cache
        for side in ("before", "after")
    )
    assert (before.semantic, after.semantic) == ("shadow", "enforce")
    assert (after.max_error, after.quota) == (Decimal("0.02"), 200_000_000)
    assert (before.scope, before.ttl) == (after.scope, after.ttl)


@pytest.mark.parametrize("name", ["providers.yaml", "policy.yaml"])
def test_the_files_name_their_schema(name: str) -> None:
    assert_schema_line(shipped_policies() / name)


def assert_schema_line(path: Path, exists: Callable[[Path], bool] = Path.exists) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert exists(path.parent / first.split("=", 1)[1])


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_examples_name_their_schema(folder: str) -> None:
    for side in ("before", "after"):
        assert_schema_line(EXAMPLES / folder / f"{side}.policy.yaml")
