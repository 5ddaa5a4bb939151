"""The demo's prompts and files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from router import demo_cache
from router.adapters.configuration import lint
from router.adapters.price_catalogue import shipped_catalogue, shipped_policies
from router.core.errors import ConfigurationError
from router.demo import _local, choose, read_prompts, valkey_server


@pytest.mark.parametrize("count", [1, 7, 40, 200, 500])
def test_prompts_are_varied_and_the_same_every_time(count: int) -> None:
    groups = read_prompts()
    chosen = choose(groups, count)
    assert len(chosen) == count
    assert chosen == choose(groups, count)
    distinct = len({prompt.text for prompt in chosen})
    assert distinct == min(max(1, round(count * 0.75)), sum(len(group["prompts"]) for group in groups))
    if count >= 40:
        assert {prompt.kind for prompt in chosen} == {group["kind"] for group in groups}
        assert {prompt.team for prompt in chosen} == {"search", "support", "engineering", "demo"}
        assert {prompt.model for prompt in chosen} == {"auto", "gpt-4o"}
        assert 0.4 < Counter(prompt.stream for prompt in chosen)[True] / count < 0.6


@pytest.mark.parametrize("providers", ["providers.yaml", "providers-local.yaml"])
def test_files_of_the_demo_are_without_problem(tmp_path: Path, providers: str) -> None:
    folder = shipped_policies() / "demo"
    (tmp_path / "providers.yaml").write_text((folder / providers).read_text())
    (tmp_path / "policy.yaml").write_text((folder / "policy.yaml").read_text())
    assert list(map(str, lint(tmp_path, shipped_catalogue()).problems)) == []


@pytest.mark.parametrize(
    ("url", "model"),
    [("http://127.0.0.1:1/v1", None), (None, "x"), ("file:///etc/passwd", "x"), ("http://u:p@h/v1", "x")],
)
def test_bad_local_endpoint_is_refused(url: str | None, model: str | None) -> None:
    with pytest.raises(ConfigurationError, match="--local-url"):
        _local(url, model)


class _Amount:
    def __init__(self, nano: int) -> None:
        self.nano = nano


def _row(cache: str, **changed: Any) -> dict[str, Any]:
    hit = cache == "semantic"
    decision = {
        "cache": cache,
        "cache_entry": "one" if hit else None,
        "likeness": {"served": True, "entry": "one"} if hit else None,
        "served_model": "small",
    }
    money = {"cost_usd": _Amount(0 if hit else 5), "cache_usd": _Amount(5 if hit else 0)}
    return {"decision": decision | changed, "money": money, "attempts": [] if hit else [{}]}


def _headers(request_id: str, cache: str, words: str) -> dict[str, str]:
    return {
        "x-request-id": request_id,
        "x-farthing-cache": cache,
        "x-farthing-decision": f"{words}; {request_id}",
    }


HIT = _headers("two", "semantic", "semantic cache hit: similarity 0.95")
REFUSED = _headers("two", "miss", f"small (cheapest); {demo_cache.REFUSED}another number; simple: short")
MISSED = _headers("two", "miss", "small (cheapest); simple: short")
STORED = _headers("one", "miss", "small (cheapest)")


@pytest.mark.parametrize(
    ("same", "asked", "row", "wrong"),
    [
        (True, HIT, _row("semantic"), None),
        (False, REFUSED, _row("miss"), None),
        (True, MISSED, _row("miss"), "is served by likeness"),
        (False, MISSED, _row("miss"), "is refused, with a reason"),
        (False, HIT, _row("semantic"), "is refused, with a reason"),
        (True, HIT, _row("miss"), "the ledger books miss"),
        (True, HIT, _row("semantic", cache_entry="another"), "not that of the stored question"),
        (True, HIT, _row("semantic", likeness=None), "no candidate"),
    ],
)
def test_what_happened_is_held_against_what_should(
    same: bool, asked: Mapping[str, str], row: Mapping[str, Any], wrong: str | None
) -> None:
    shown = demo_cache.Shown(demo_cache.Example("a", "b", same), STORED, asked)
    found = demo_cache.problems(shown, row)
    assert found == [] if wrong is None else wrong in "; ".join(found)


@pytest.mark.parametrize(("slow", "rounds"), [(0, 1), (2, 3), (99, demo_cache.ROUNDS)])
async def test_a_look_up_that_took_too_long_is_tried_again(
    slow: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_cache, "STORING", 0.0)
    calls: list[tuple[int, str, str]] = []

    async def ask(worker: int, instructions: str, question: str) -> Mapping[str, str]:
        calls.append((worker, instructions, question))
        if question == "stored":
            return STORED
        return HIT if len({one[1] for one in calls}) > slow else MISSED

    shown = await demo_cache.tried(ask, [demo_cache.Example("stored", "asked", True)], 2)
    assert [(worker, text) for worker, _, text in calls] == [(0, "stored"), (1, "asked")] * rounds
    assert len({instructions for _, instructions, _ in calls}) == rounds
    assert shown[0].as_meant == (slow < demo_cache.ROUNDS)


async def test_a_trap_that_was_served_is_not_tried_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_cache, "STORING", 0.0)

    async def ask(worker: int, instructions: str, question: str) -> Mapping[str, str]:
        return STORED if question == "stored" else HIT if instructions == demo_cache.INSTRUCTIONS else REFUSED

    shown = await demo_cache.tried(ask, [demo_cache.Example("stored", "asked", False)], 1)
    assert not shown[0].as_meant


def test_there_are_right_ones_and_traps() -> None:
    examples = demo_cache.read_examples()
    assert {example.same for example in examples} == {True, False}


def test_without_a_valkey_server_the_demo_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(valkey_server()).is_file()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigurationError, match="make demo STORE=valkey"):
        valkey_server()
