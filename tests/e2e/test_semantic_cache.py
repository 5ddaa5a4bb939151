"""The semantic cache on a real gateway: encoders, guard and verifier as they ship."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from router.adapters.sql.cache_book import invalidate
from router.adapters.sql.schema import cache_candidates, cache_labels
from tests.contracts.valkey_server import ValkeyServer
from tests.e2e.gateway import Gateway, until
from tests.e2e.patient import PATIENT
from tests.e2e.provider import Provider
from tests.e2e.setting import policy, providers
from tests.steady import Stopwatch

Start = Callable[..., Gateway]
HOW = "How do I reset my password?"
ALSO = "how can I reset my password?"
AGAIN = "Hello! How do I reset my password please?"
TRAP = "How do I reset my username?"
ANSWER = "Open Settings and choose Reset password."
TEAMS = """\
  warm: {}
  fresh: { cache: { exact: false } }
  measured: { cache: { semantic: shadow } }
  proven: { cache: { semantic: certified } }
  apart: { cache: { scope: app } }
  "off": { cache: { semantic: never } }
"""
TOOL = {
    "type": "function",
    "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}},
}


def cached(teams: str = TEAMS, more: str = "", defaults: str = "") -> str:
    return policy(
        defaults=f"  cache: {{ semantic: enforce, max_error: 5%, quota: 10MB{defaults} }}",
        teams=teams,
        more=more,
    )


def outcome(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.headers["x-farthing-cache"])


def text(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["message"]["content"])


def warm(gateway: Gateway) -> None:
    """Until the verifier is loaded: it comes after `/readyz`, and nobody waits for it."""
    key = gateway.key("warm")

    def hit() -> bool:
        # Each wording once, lest the exact cache answers.
        word = secrets.token_hex(3)
        gateway.chat(key, f"Where is the file {word} kept?", model="small")
        time.sleep(0.2)
        return outcome(gateway.chat(key, f"where is the file {word} kept", model="small")) == "semantic"

    until(hit, "the semantic cache answers")


@pytest.fixture(scope="module")
def running(running_provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("semantic")
    with Gateway(folder, providers(running_provider.url), cached(), admin=True, python=PATIENT) as gateway:
        warm(gateway)
        yield gateway


@pytest.fixture
def semantic(running: Gateway, provider: Provider) -> Iterator[Gateway]:
    """What was said before this test stands under other instructions."""
    global instructions
    instructions = f"Help with the shop {secrets.token_hex(6)}."
    with provider.changed("small", says=ANSWER):
        yield running


instructions = "Help with the shop."


def told(content: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": instructions}, {"role": "user", "content": content}]


def ask(gateway: Gateway, team: str, content: str, app: str | None = None, **fields: Any) -> httpx.Response:
    fields = {"model": "small", "messages": told(content), **fields}
    return gateway.chat(gateway.key(team, app), content, **fields)


def kept(gateway: Gateway) -> int:
    """Entries of the semantic cache."""
    url = f"http://127.0.0.1:{gateway.admin_port}/admin/cache"
    shown = httpx.get(url, headers={"authorization": "Bearer admin-key-for-tests"}, timeout=60).json()
    return int(shown["store"]["entries"])


def stored(gateway: Gateway, team: str = "search", content: str = HOW, **fields: Any) -> httpx.Response:
    before = kept(gateway)
    answer = ask(gateway, team, content, **fields)
    assert outcome(answer) == "miss"
    until(lambda: kept(gateway) > before, "it is stored")
    time.sleep(0.3)
    return answer


def found(gateway: Gateway, answer: httpx.Response) -> dict[str, Any] | None:
    request_id = answer.headers["x-request-id"]
    gateway.row(request_id)
    with gateway.engine.connect() as connection:
        query = sa.select(cache_candidates).where(cache_candidates.c.request_id == request_id)
        row = connection.execute(query).mappings().first()
        return dict(row) if row is not None else None


def test_other_words_get_the_stored_answer_and_a_trap_does_not(semantic: Gateway, provider: Provider) -> None:
    first = stored(semantic)
    paid = semantic.row(first.headers["x-request-id"])
    answer = ask(semantic, "search", ALSO)
    assert outcome(answer) == "semantic"
    assert text(answer) == ANSWER
    headers = answer.headers
    assert headers["x-farthing-cost-usd"] == "0"
    assert int(headers["age"]) >= 0
    assert headers["x-farthing-model"] == "small"
    assert "probability" in headers["x-farthing-decision"]
    assert len(headers["x-farthing-decision"]) <= 200
    assert "password" not in headers["x-farthing-decision"]
    assert headers["x-farthing-decision"].endswith(headers["x-request-id"])
    row = semantic.row(headers["x-request-id"])
    assert (row["cache"], row["cache_entry"], row["cost"]) == ("semantic", paid["id"], 0)
    assert row["cache_savings"] == paid["cost"] > 0
    assert row["baseline"] - row["cost"] == row["routing_savings"] + row["cache_savings"] - row["overhead"]
    candidate = found(semantic, answer)
    assert candidate is not None
    assert (candidate["entry"], bool(candidate["served"]), candidate["mode"]) == (paid["id"], True, "enforce")
    assert candidate["probability"] >= candidate["threshold"]
    assert candidate["saved"] == paid["cost"]

    trap = ask(semantic, "search", TRAP)
    assert outcome(trap) == "miss"
    assert "; nearest stored answer refused: not sure enough; " in trap.headers["x-farthing-decision"]
    assert {call["request_id"] for call in provider.log()} == {
        paid["id"],
        trap.headers["x-request-id"],
    }
    explained = semantic.cli("policy", "explain", "--request-id", headers["x-request-id"])
    assert explained.returncode == 0, explained.stderr
    semantic.settled()
    checked = semantic.cli("ledger", "verify")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    report = json.loads(semantic.cli("report", "savings", "--by", "team", "--format", "json").stdout)
    line = next(row for row in report["rows"] if row["team"] == "search")
    assert Decimal(str(line["cache_usd"])) * 10**9 >= paid["cost"]


def test_the_openai_client_reads_hits_in_both_forms(semantic: Gateway, provider: Provider) -> None:
    stored(semantic, stream=True)
    client = semantic.openai(semantic.key("search"))
    whole = client.chat.completions.create(model="small", messages=told(ALSO))
    assert whole.choices[0].message.content == ANSWER
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    for usage in (True, False):
        stream = client.chat.completions.with_raw_response.create(
            model="small",
            messages=told(ALSO),
            stream=True,
            stream_options={"include_usage": usage},
        )
        assert stream.headers["x-farthing-cache"] == "semantic"
        chunks = list(stream.parse())
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
        used = [c.usage for c in chunks if c.usage is not None]
        assert [one.total_tokens for one in used] == ([whole.usage.total_tokens] if usage else [])
    assert len(provider.log()) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "system", "content": "You are a bank."}, {"role": "user", "content": ALSO}]},
        {
            "messages": [
                {"role": "user", "content": "I use the web shop."},
                {"role": "assistant", "content": "Fine."},
                {"role": "user", "content": ALSO},
            ]
        },
        {"tools": [TOOL]},
        {"response_format": {"type": "json_object"}},
        {"temperature": 0.3},
        {"max_tokens": 50},
        {"model": "middle"},
        {"team": "fresh"},
        {"headers": {"cache-control": "no-cache"}},
        {"headers": {"cache-control": "no-store"}},
        {"headers": {"x-farthing-cache": "off"}},
        {"headers": {"cache-control": "max-age=0"}},
        {"headers": {"x-farthing-tags": "data=pii"}, "model": "auto"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_is_not_the_same_gets_no_hit(
    running: Gateway, provider: Provider, fields: dict[str, Any]
) -> None:
    if outcome(ask(running, "search", HOW)) == "miss":
        time.sleep(1.1)
    fields = dict(fields)
    answer = ask(running, fields.pop("team", "search"), ALSO, **fields)
    assert outcome(answer) == "miss"
    assert found(running, answer) is None


def test_apps_share_where_the_policy_lets_them(semantic: Gateway) -> None:
    stored(semantic, "apart", app="one")
    assert outcome(ask(semantic, "apart", ALSO, app="two")) == "miss"
    assert outcome(ask(semantic, "apart", AGAIN, app="one")) == "semantic"
    stored(semantic, "search", app="one")
    assert outcome(ask(semantic, "search", ALSO, app="two")) == "semantic"
    assert outcome(ask(semantic, "off", HOW)) == "miss"
    assert outcome(ask(semantic, "off", ALSO)) == "miss"


def test_an_identical_history_is_compared_by_its_last_message(semantic: Gateway) -> None:
    history = [
        {"role": "system", "content": "You help with the shop."},
        {"role": "user", "content": "I forgot how to get in."},
        {"role": "assistant", "content": "What do you want to do?"},
    ]
    stored(semantic, messages=[*history, {"role": "user", "content": HOW}])
    hit = ask(semantic, "search", "", messages=[*history, {"role": "user", "content": ALSO}])
    assert outcome(hit) == "semantic"


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("bad-cut", {"stream": True}),
        ("bad-error-midstream", {"stream": True}),
        ("small", {"headers": {"cache-control": "no-store"}}),
        ("small", {"max_tokens": 1}),
    ],
)
def test_what_is_not_whole_or_not_to_be_kept_is_not_kept(
    semantic: Gateway, model: str, fields: dict[str, Any]
) -> None:
    headers = fields.pop("headers", None)
    ask(semantic, "solo", HOW, model=model, headers=headers, **fields)
    time.sleep(0.3)
    fields.pop("stream", None)
    other = ask(semantic, "solo", ALSO, model=model, **fields)
    assert other.headers.get("x-farthing-cache", "miss") == "miss"


def test_a_rule_and_a_callers_verdict_take_answers_out(semantic: Gateway, provider: Provider) -> None:
    first = stored(semantic, "fresh")
    hit = ask(semantic, "fresh", ALSO)
    assert outcome(hit) == "semantic"
    with semantic.http(semantic.key("fresh")) as http:

        def taken() -> bool:
            verdict = {"request_id": hit.headers["x-request-id"], "correct": False}
            return http.post("/v1/cache/feedback", json=verdict).status_code == 200

        until(taken, "the verdict is taken")
    again = stored(semantic, "fresh", AGAIN)  # a miss: quarantined at once
    assert first.headers["x-request-id"] != again.headers["x-request-id"]
    stored(
        semantic, "fresh", ALSO
    )  # a miss: the first prompt's answer, made anew, may be as wrong for this one
    assert outcome(ask(semantic, "fresh", ALSO)) == "semantic", "it has an answer of its own"
    invalidate(semantic.engine, "model", "small", at=datetime.now(UTC), by="cli")
    with Stopwatch() as watch:
        while watch.seconds < 5:
            time.sleep(0.1)
    assert outcome(ask(semantic, "fresh", ALSO)) == "miss"


def test_shadow_measures_and_serves_nothing(semantic: Gateway, provider: Provider) -> None:
    # The look-up has to be over before the answer comes.
    with provider.changed("small", says="Under Settings.", first_token="1500ms"):
        first = stored(semantic, "measured")
        answer = ask(semantic, "measured", ALSO)
        assert outcome(answer) == "miss"
        candidate = found(semantic, answer)
        assert candidate is not None
        assert (bool(candidate["served"]), bool(candidate["would_serve"])) == (False, True)
        assert candidate["entry"] == first.headers["x-request-id"]
        with semantic.engine.connect() as connection:
            query = sa.select(cache_labels).where(cache_labels.c.request_id == answer.headers["x-request-id"])
            (label,) = connection.execute(query).mappings()
        assert (bool(label["correct"]), label["source"], label["propensity"]) == (True, "agreement", 1.0)
        assert label["scope"] == candidate["scope"]
    assert len(provider.log()) == 2, "no call was made that nobody asked for"


def test_certified_measures_until_its_labels_hold_the_bound(semantic: Gateway, provider: Provider) -> None:
    with provider.changed("small", says="Under Settings.", first_token="1500ms"):
        stored(semantic, "proven")
        answer = ask(semantic, "proven", ALSO)
        assert outcome(answer) == "miss"
        candidate = found(semantic, answer)
        assert candidate is not None
        assert candidate["threshold"] > 1
        with semantic.engine.begin() as connection:
            connection.execute(
                sa.insert(cache_labels),
                [
                    {
                        "request_id": f"known-{number}",
                        "scope": candidate["scope"],
                        "entry": "e",
                        "score": 0.99,
                        "correct": True,
                        "propensity": 1.0,
                        "source": "agreement",
                        "at": datetime.now(UTC),
                        "key_id": f"key-{number % 2}",  # no key's labels count for more than all others'
                        "team": "proven",
                        "revision": 1,
                    }
                    for number in range(400)
                ],
            )

        def served() -> httpx.Response | None:
            # Other words each time, none of which changes what is asked.
            time.sleep(0.7)
            word = secrets.choice(("Hi", "Hello", "Good morning", "Hey", "Sorry", "Quick question"))
            hit = ask(
                semantic, "proven", f"{word}, {HOW} thanks {secrets.choice(('', 'a lot', '!', 'in advance'))}"
            )
            return hit if outcome(hit) == "semantic" else None

        hit = until(served, "the evidence certifies")
        row = found(semantic, hit)
        assert row is not None
        assert row["mode"] == "certified"
        assert row["threshold"] <= row["probability"] <= 1


def test_what_is_served_is_checked_where_the_policy_pays_for_it(
    start_gateway: Start, provider: Provider
) -> None:
    gateway = start_gateway(
        policy=cached(more="learn: { budget: { month: 100 } }", defaults=", check: 100%"), admin=True
    )
    warm(gateway)
    provider.clear()
    with provider.changed("small", says="Under Settings."):
        stored(gateway)
        with provider.changed("small", says="Call us."):
            hit = ask(gateway, "search", ALSO)
            assert outcome(hit) == "semantic"

            def label() -> Any:
                with gateway.engine.connect() as connection:
                    query = sa.select(cache_labels).where(
                        cache_labels.c.request_id == hit.headers["x-request-id"]
                    )
                    return connection.execute(query).mappings().first()

            assert not until(label, "the check is booked")["correct"]
            checks = [row for row in gateway.rows() if row["endpoint"] == "learn.shadow"]
            assert checks[-1]["cost"] > 0
            assert json.loads(checks[-1]["budgets"])[0][0] == "learn"
            until(lambda: outcome(ask(gateway, "search", AGAIN)) != "semantic", "it is served to nobody else")
    gateway.settled()
    verified = gateway.cli("ledger", "verify")
    assert verified.returncode == 0, verified.stdout


def test_a_second_worker_hits_what_the_first_stored(
    start_gateway: Start, provider: Provider, tmp_path_factory: pytest.TempPathFactory
) -> None:
    server = ValkeyServer()
    database = f"sqlite:///{tmp_path_factory.mktemp('database')}/farthing.db"
    try:
        one, two = (
            start_gateway(policy=cached(), redis_url=server.url, database_url=database, admin=True)
            for _ in range(2)
        )
        warm(one)
        warm(two)
        provider.clear()
        with provider.changed("small", says=ANSWER):
            first = stored(one)
            hit = ask(two, "search", ALSO)
            assert outcome(hit) == "semantic"
            assert text(hit) == ANSWER
            assert two.row(hit.headers["x-request-id"])["cache_entry"] == first.headers["x-request-id"]
            # Known there by now, the next comes by the stream of changes.
            stored(one, content="What is your phone number?")
            until(
                lambda: outcome(ask(two, "search", "what's your phone number?")) == "semantic",
                "the other worker heard of it",
            )
        assert len(provider.log()) == 2
    finally:
        server.close()
