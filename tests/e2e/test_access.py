"""Keys, budgets and reloads of a running gateway."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest

from tests.e2e.gateway import Gateway, until
from tests.e2e.patient import LOOKS_EVERY
from tests.e2e.provider import Provider
from tests.e2e.setting import policy
from tests.steady import Stopwatch

Unique = Callable[[str], str]
StartGateway = Callable[..., Gateway]


# -- keys --


def test_a_new_key_works_at_once_and_a_revoked_one_stops(gateway: Gateway, unique: Unique) -> None:
    made = gateway.cli("keys", "create", "--team", "search", "--app", "faq", "--json")
    assert made.returncode == 0, made.stderr
    shown = json.loads(made.stdout)
    assert set(shown) == {"key", "id", "team", "app"}
    answer = gateway.chat(shown["key"], unique("Hi"))
    assert answer.status_code == 200
    row = gateway.row(answer.headers["x-request-id"])
    assert (row["key_id"], row["team"], row["app"]) == (shown["id"], "search", "faq")
    assert gateway.cli("keys", "revoke", shown["id"]).returncode == 0
    with Stopwatch() as watch:
        refused = until(
            lambda: r if (r := gateway.chat(shown["key"], "Hi")).status_code != 200 else None,
            "the key is refused",
        )
    assert watch.seconds <= 5
    assert refused.status_code == 401
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert shown["key"] not in refused.text
    listed = json.loads(gateway.cli("keys", "list", "--json").stdout)
    assert shown["key"] not in json.dumps(listed)
    assert next(k for k in listed if k["id"] == shown["id"])["revoked_at"]


def test_an_adopted_key_works_and_is_stored_nowhere(
    gateway: Gateway, provider: Provider, unique: Unique
) -> None:
    key = f"sk-proj-{os.urandom(16).hex()}"
    assert gateway.chat(key, "Hi").status_code == 401
    adopted = gateway.cli("keys", "adopt", "--team", "search", stdin=f"{key}\n")
    assert adopted.returncode == 0, adopted.stderr
    # A key that was refused is looked up again a second later.
    answer = until(
        lambda: r if (r := gateway.chat(key, unique("Hi"))).status_code == 200 else None, "the key is known"
    )
    (call,) = provider.calls(answer.headers["x-request-id"])
    assert "authorization" not in call["headers"]
    for path in gateway.folder.rglob("*"):
        if path.is_file():
            assert key.encode() not in path.read_bytes(), path


def test_an_adopted_key_must_be_long_enough(gateway: Gateway) -> None:
    refused = gateway.cli("keys", "adopt", "--team", "search", stdin="short\n")
    assert refused.returncode == 2
    assert "16" in refused.stderr


# -- budgets --


def _budget(team: str, text: str) -> str:
    return f"  {team}: {{ budget: {text}, fallback: [] }}"


@pytest.fixture
def capped(start_gateway: StartGateway) -> Gateway:
    """Each team's cap stands beside it; a hundred output tokens of `frontier` are 0.002 USD."""
    teams = [
        _budget("poor", "{ month: 0.004, at_limit: refuse }"),
        _budget("tiny", "{ month: 0.0000001, at_limit: refuse }"),
        _budget("thrifty", "{ month: 0.003, at_limit: downgrade, hard_cap: 0.1 }"),
        _budget("rich", "{ month: 1000, hard_cap: 1000 }"),
    ]
    return start_gateway(policy=policy(teams="\n".join(teams)))


def test_a_spent_budget_is_402(capped: Gateway, unique: Unique) -> None:
    answer = capped.chat(capped.key("tiny"), unique("Hi"), model="frontier", max_tokens=50)
    assert answer.status_code == 402
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("budget_exceeded", "insufficient_quota")
    assert "team:tiny" in error["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert capped.chat(capped.key("rich"), unique("Hi"), model="frontier").status_code == 200


def test_money_held_by_others_is_429(capped: Gateway, provider: Provider, unique: Unique) -> None:
    key = capped.key("poor")
    with capped.openai(key).chat.completions.with_streaming_response.create(
        model="slow",
        messages=[{"role": "user", "content": unique("Hi")}],
        max_tokens=800,
        stream=True,
    ) as held:
        lines = held.iter_lines()
        next(lines)
        answer = capped.chat(key, unique("Hi"), model="slow", max_tokens=800)
        assert answer.status_code == 429, answer.text
        assert answer.json()["error"]["code"] == "budget_exceeded"
        assert answer.headers["x-should-retry"] == "true"
        assert int(answer.headers["retry-after"]) >= 1
    until(
        lambda: capped.chat(key, unique("Hi"), model="small", max_tokens=20).status_code == 200,
        "the hold of the client that left is released",
    )


def test_a_downgrade_answers_with_the_cheapest(capped: Gateway, unique: Unique) -> None:
    key = capped.key("thrifty")
    headers = {"x-farthing-quality": "0.98"}
    first = capped.chat(key, unique("Hi"), headers=headers, max_tokens=100)
    assert first.headers["x-farthing-model"] == "frontier"
    answer = until(
        lambda: (
            r
            if (r := capped.chat(key, unique("Hi"), headers=headers, max_tokens=100)).headers[
                "x-farthing-model"
            ]
            != "frontier"
            else None
        ),
        "the budget is at its limit",
    )
    assert answer.headers["x-farthing-model"] == "small"
    row = capped.row(answer.headers["x-request-id"])
    assert row["decision"] == "budget_downgrade"
    named = capped.chat(key, unique("Hi"), model="frontier", max_tokens=100)
    assert named.headers["x-farthing-model"] == "frontier", "a named model is not replaced without substitute"


def test_budgets_survive_a_restart(capped: Gateway, unique: Unique) -> None:
    key = capped.key("poor")

    def spend() -> int:
        return capped.chat(key, unique("Hi"), model="frontier", max_tokens=50).status_code

    until(lambda: spend() == 402, "the budget is spent")
    report = json.loads(capped.cli("report", "budgets", "--format", "json").stdout)
    spent = next(r for r in report["rows"] if "poor" in json.dumps(r))
    assert Decimal("0") < Decimal(str(spent["spent_usd"])) <= Decimal("0.004")
    capped.kill()
    capped.start()
    assert spend() == 402


# -- configuration --


def test_an_unknown_name_is_refused_with_the_line_to_add(start_gateway: StartGateway) -> None:
    gateway = start_gateway(policy=policy(more="unknown_model: refuse"))
    answer = gateway.chat(gateway.key("search"), "Hi", model="gpt-9")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "gpt-9: MODEL" in error["message"]
    assert gateway.chat(gateway.key("search"), "Hi", model="auto").status_code == 200
    assert gateway.chat(gateway.key("search"), "Hi", model="gpt-4o").status_code == 200


@pytest.mark.parametrize("signalled", [True, False], ids=["SIGHUP", "by itself"])
def test_a_reload_changes_the_next_decision(
    start_gateway: StartGateway, unique: Unique, signalled: bool
) -> None:
    # One that would look by itself in an hour has heard the signal.
    gateway = start_gateway(environment={LOOKS_EVERY: "3600"} if signalled else {})
    key = gateway.key("search")

    def model() -> str:
        return gateway.chat(key, unique("What is 2 + 2?")).headers["x-farthing-model"]

    assert model() == "small"
    before = gateway.chat(key, unique("Hi")).headers["x-farthing-policy"]
    gateway.write(policy=policy(defaults="  deny: [small]"))
    if signalled:
        gateway.reload()
    until(lambda: model() == "middle", "the change is seen")
    assert gateway.chat(key, unique("Hi")).headers["x-farthing-policy"] != before


def test_a_broken_edit_leaves_the_last_good_one_active(start_gateway: StartGateway, unique: Unique) -> None:
    gateway = start_gateway()
    key = gateway.key("search")
    before = gateway.chat(key, unique("Hi")).headers["x-farthing-policy"]
    gateway.write(policy=policy(defaults="  deny: [smal]"))
    gateway.reload()
    until(lambda: "did you mean 'small'?" in gateway.log_path.read_text(), "the log says what is wrong")
    answer = gateway.chat(key, unique("Hi"))
    assert (answer.status_code, answer.headers["x-farthing-policy"]) == (200, before)


def test_a_stopped_gateway_lets_requests_end(
    start_gateway: StartGateway, provider: Provider, unique: Unique
) -> None:
    gateway = start_gateway()
    key = gateway.key("search")
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(gateway.chat, key, unique("Hi"), model="slow", max_tokens=30, stream=True)
            for _ in range(4)
        ]
        until(lambda: len(provider.log()) == 4, "all are under way")
        assert gateway.stop() == 0
        answers = [future.result() for future in asked]
    assert all(answer.text.rstrip().endswith("data: [DONE]") for answer in answers)
    gateway.start()
    assert all(gateway.row(a.headers["x-request-id"])["status"] == "complete" for a in answers)


def test_a_settled_request_is_in_the_report_within_half_a_second(gateway: Gateway, unique: Unique) -> None:
    gateway.booked()

    def slowest() -> float:
        seconds = 0.0
        for _ in range(5):
            answer = gateway.chat(gateway.key("search"), unique("Hi"))
            with Stopwatch() as watch:
                gateway.row(answer.headers["x-request-id"])
            seconds = max(seconds, watch.seconds)
        return seconds

    # Once more where the gateway alone was not let run.
    assert any(slowest() < 0.5 for _ in range(4))
    report = json.loads(gateway.cli("report", "spend", "--by", "team", "--format", "json").stdout)
    assert report["data_health"]["unsettled"] == 0
    row = next(row for row in report["rows"] if row["team"] == "search")
    booked = [r for r in gateway.rows() if r["team"] == "search"]
    assert row["requests"] == len(booked)
    assert Decimal(str(row["cost_usd"])) == Decimal(sum(r["cost"] or 0 for r in booked)) / 10**9
