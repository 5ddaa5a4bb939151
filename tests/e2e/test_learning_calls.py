"""Calls that the gateway makes of its own where the policy says so: a second opinion, shadow answers, a judge."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from router.adapters.sql.schema import labels
from tests.e2e.gateway import Gateway, until
from tests.e2e.provider import Provider
from tests.e2e.setting import PRICES, policy
from tests.e2e.test_chat import cost_of
from tests.steady import Stopwatch

Start = Callable[..., Gateway]
QUESTION = "What is 2 + 2?"
REFUSAL = "I'm sorry, but I can't help with that."
VERDICT = '{"better": "b", "a_good": 0.4, "b_good": 0.9}'


def cascading(verify: str = "signals", more: str = "", teams: str = "") -> str:
    text = policy(more=more, teams=teams)
    return text.replace("min_quality: 0.90", f"min_quality: 0.90, cascade: {{ verify: {verify} }}")


def shadowing(month: str = "100", judge: str = "", share: str = "100%") -> str:
    judged = f", judge: {judge}" if judge else ""
    return policy(more=f"learn: {{ shadow: {share}, budget: {{ month: {month} }}{judged} }}")


def rows(gateway: Gateway, endpoint: str) -> list[dict[str, Any]]:
    return [row for row in gateway.rows() if row["endpoint"] == endpoint]


def kept_labels(gateway: Gateway) -> list[dict[str, Any]]:
    with gateway.engine.connect() as connection:
        return [dict(row) for row in connection.execute(sa.select(labels)).mappings()]


def verified(gateway: Gateway) -> None:
    gateway.settled()
    checked = gateway.cli("ledger", "verify")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_refusal_is_replaced_before_the_first_byte(start_gateway: Start, provider: Provider) -> None:
    gateway = start_gateway(policy=cascading())
    for stream in (False, True):
        with provider.changed("small", says=REFUSAL):
            answer = gateway.chat(gateway.key("search"), f"What is 2 + {2 + stream}?", stream=stream)
        assert answer.status_code == 200, answer.text
        assert "sorry" not in answer.text
        assert answer.headers["x-farthing-model"] == "middle"
        assert "escalated after refusal" in answer.headers["x-farthing-decision"]
        request_id = answer.headers["x-request-id"]
        row, tried = gateway.row(request_id), gateway.attempts(request_id)
        assert [(a["model"], a["outcome"], a["error"]) for a in tried] == [
            ("small", "complete", "escalated"),
            ("middle", "complete", None),
        ]
        assert (row["served_model"], row["overhead"]) == ("middle", tried[0]["cost"])
        assert row["cost"] == tried[0]["cost"] + tried[1]["cost"]
        assert [call["model"] for call in provider.calls(request_id)] == ["small", "middle"]
    told = gateway.cli("policy", "explain", "--request-id", request_id).stdout
    assert "attempt 2, as the answer of a cheaper model was found wanting" in told
    assert "complete 200, escalated" in told
    verified(gateway)


def test_the_openai_client_reads_a_verified_stream(start_gateway: Start, provider: Provider) -> None:
    gateway = start_gateway(policy=cascading("frontier"))
    with provider.changed("frontier", says='{"good": 0.95}'):
        stream = gateway.openai(gateway.key("search")).chat.completions.create(
            model="auto",
            messages=[{"role": "user", "content": QUESTION}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    usage = chunks[-1].usage
    assert usage is not None
    (row,) = until(lambda: rows(gateway, "chat.completions"), "the row is written")
    tried = gateway.attempts(row["id"])
    assert [(a["model"], a["error"]) for a in tried] == [("small", None), ("frontier", "verifier")]
    assert row["overhead"] == tried[1]["cost"] > 0
    assert row["served_model"] == "small"
    assert tried[0]["tokens_output"] == usage.completion_tokens
    verified(gateway)


def test_a_verifier_sends_it_to_the_stronger_model(start_gateway: Start, provider: Provider) -> None:
    gateway = start_gateway(policy=cascading("frontier"))
    with provider.changed("frontier", says='{"good": 0.05}'):
        answer = gateway.chat(gateway.key("search"), QUESTION)
    assert "escalated after verification" in answer.headers["x-farthing-decision"]
    assert answer.headers["x-farthing-model"] == "middle"
    tried = gateway.attempts(answer.headers["x-request-id"])
    assert [a["error"] for a in tried] == ["escalated", "verifier", None]
    verified(gateway)


def test_a_team_out_of_budget_gets_the_cheap_answer(start_gateway: Start, provider: Provider) -> None:
    poor = "  poor: { budget: { month: 0.004, at_limit: refuse, hard_cap: 0.004 } }"
    gateway = start_gateway(policy=cascading(teams=poor))
    with provider.changed("small", says=REFUSAL):
        answer = gateway.chat(gateway.key("poor"), QUESTION)
    assert answer.json()["choices"][0]["message"]["content"] == REFUSAL
    assert answer.headers["x-farthing-model"] == "small"
    verified(gateway)


def test_without_learn_every_call_was_asked_for(start_gateway: Start, provider: Provider) -> None:
    gateway = start_gateway()
    for number in range(20):
        gateway.chat(gateway.key("search"), f"What is {number} + 2?")
    time.sleep(0.3)
    assert [call["model"] for call in provider.log()] == ["small"] * 20


def test_a_judge_labels_a_shadow_answer(start_gateway: Start, provider: Provider) -> None:
    gateway = start_gateway(policy=shadowing(judge="middle"))
    asked: list[str] = []
    with provider.changed("middle", says=VERDICT):
        for stream in (False, True):
            answer = gateway.chat(gateway.key("search"), f"What is 2 + {2 + stream}?", stream=stream)
            asked.append(answer.headers["x-request-id"])
        found = until(lambda: len(kept := kept_labels(gateway)) == 4 and kept, "both pairs are labelled")
    for request_id in asked:
        pair = [label for label in found if label["request_id"] == request_id]
        assert sorted((label["model"], label["source"]) for label in pair) == [
            ("frontier", "judge"),
            ("small", "judge"),
        ]
        assert {label["score"] for label in pair} == {0.4, 0.9}
    for endpoint, model in (("learn.shadow", "frontier"), ("learn.judge", "middle")):
        for row in rows(gateway, endpoint):
            assert (row["served_model"], row["team"], row["baseline"]) == (model, "search", None)
            ((window, _),) = json.loads(row["budgets"])
            assert window == "learn"
            told = gateway.cli("policy", "explain", "--request-id", row["id"]).stdout
            assert "a request that has ended" in told
    verified(gateway)
    report = json.loads(gateway.cli("report", "spend", "--by", "team", "--format", "json").stdout)
    (line,) = report["rows"]
    calls = provider.log()
    assert sorted(call["model"] for call in calls) == ["frontier"] * 2 + ["middle"] * 2 + ["small"] * 2
    assert line["requests"] == len(asked)  # what the gateway asks of its own is cost, and no request
    assert Decimal(str(line["cost_usd"])) == sum(cost_of(call, PRICES[call["model"]]) for call in calls)


def test_an_exhausted_budget_stops_shadows_and_no_request(start_gateway: Start, provider: Provider) -> None:
    # frontier's worst case: 4,096 tokens at 20 USD per million, 0.08 USD and the input
    gateway = start_gateway(policy=shadowing(month="0.0845"))
    for number in range(12):
        answer = gateway.chat(gateway.key("search"), f"What is {number} + 2?")
        assert answer.status_code == 200
        time.sleep(0.05)
    gateway.settled()
    assert 0 < len(rows(gateway, "learn.shadow")) < 12
    assert len(rows(gateway, "chat.completions")) == 12
    verified(gateway)
    told = json.loads(gateway.cli("report", "budgets", "--format", "json").stdout)
    (learn,) = [row for row in told["rows"] if row["budget"] == "learn"]
    assert (learn["limit_usd"], learn["hard_cap_usd"]) == (0.0845, 0.0845)
    assert 0 < learn["spent_usd"] <= 0.0845


def test_kill_9_in_a_shadow_leaves_consistent_rows(start_gateway: Start, provider: Provider) -> None:
    gateway = start_gateway(policy=shadowing())
    with provider.changed("frontier", first_token=20):
        answer = gateway.chat(gateway.key("search"), QUESTION)
        until(lambda: any(call["model"] == "frontier" for call in provider.log()), "the shadow is under way")
        gateway.kill()
    gateway.start()
    (shadow,) = until(lambda: rows(gateway, "learn.shadow"), "the shadow is booked")
    assert (shadow["status"], shadow["estimated"]) == ("cancelled", True)
    assert shadow["cost"] > 0
    assert gateway.row(answer.headers["x-request-id"])["status"] == "complete"
    assert kept_labels(gateway) == []
    verified(gateway)


def test_sigterm_does_not_wait_for_a_shadow(start_gateway: Start, provider: Provider) -> None:
    gateway = start_gateway(policy=shadowing())
    with provider.changed("frontier", first_token=20):
        gateway.chat(gateway.key("search"), QUESTION)
        until(lambda: any(call["model"] == "frontier" for call in provider.log()), "the shadow is under way")
        with Stopwatch() as watch:
            assert gateway.stop() == 0
        assert watch.seconds < 8
        until(lambda: all(call["ended"] for call in provider.log()), "the provider sees it end")
    (shadow,) = rows(gateway, "learn.shadow")
    assert (shadow["status"], shadow["error"]) == ("cancelled", "client_left")
    verified(gateway)
