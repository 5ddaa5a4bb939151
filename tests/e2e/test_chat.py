"""Chat completions through a running gateway, with the real openai client."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import httpx
import pytest

from tests.e2e.gateway import Gateway
from tests.e2e.provider import Provider

Unique = Callable[[str], str]
MESSAGE = {"role": "user", "content": "Say hello"}


def cost_of(call: dict[str, Any], prices: tuple[str, str]) -> Decimal:
    """What the provider's own log says a call costs, in USD."""
    bought, sold = (Decimal(price) for price in prices)
    return Decimal(call["prompt_tokens"] * bought + call["completion_tokens"] * sold) / 1_000_000


@pytest.mark.parametrize("model", ["small", "auto"])
def test_the_answer_is_the_providers_own(
    gateway: Gateway, provider: Provider, unique: Unique, model: str
) -> None:
    client = gateway.openai(gateway.key("search"))
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": unique("What is 2 + 2?")}]
    )
    answer = raw.parse()
    (call,) = provider.calls(raw.headers["x-request-id"])
    assert answer.id == call["id"]
    assert answer.model == call["model"]
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == call["prompt_tokens"]


def test_headers_say_what_was_decided(gateway: Gateway, provider: Provider, unique: Unique) -> None:
    answer = gateway.chat(gateway.key("search"), unique("What is 2 + 2?"))
    headers = answer.headers
    (call,) = provider.calls(headers["x-request-id"])
    assert headers["x-farthing-model"] == "small" == call["model"]
    assert headers["x-farthing-class"] in ("simple", "medium", "complex")
    assert headers["x-farthing-cache"] == "miss"
    assert Decimal(headers["x-farthing-cost-usd"]) == cost_of(call, ("0.10", "0.40"))
    assert len(headers["x-farthing-decision"]) <= 200
    assert headers["x-farthing-decision"].endswith(headers["x-request-id"])
    row = gateway.row(headers["x-request-id"])
    assert row["policy_hash"].startswith(headers["x-farthing-policy"])
    assert row["prompt_class"] == headers["x-farthing-class"]


def test_a_named_model_is_not_classified(gateway: Gateway, unique: Unique) -> None:
    answer = gateway.chat(gateway.key("search"), unique("Hello"), model="middle")
    assert answer.headers["x-farthing-class"] == "none"
    assert answer.headers["x-farthing-model"] == "middle"


def test_a_stream_reaches_the_client_whole(gateway: Gateway, provider: Provider, unique: Unique) -> None:
    client = gateway.openai(gateway.key("search"))
    with client.chat.completions.with_streaming_response.create(
        model="auto", messages=[{"role": "user", "content": unique("Hi")}], stream=True
    ) as response:
        chunks = list(response.parse())
    request_id = response.headers["x-request-id"]
    assert "x-farthing-cost-usd" not in response.headers
    assert response.headers["x-farthing-decision"].endswith(request_id)
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(c.choices for c in chunks), "usage was not asked for, so its chunk stays away"
    row = gateway.row(request_id)
    (call,) = provider.calls(request_id)
    assert (row["status"], row["estimated"], row["streamed"]) == ("complete", False, True)
    assert row["tokens_output"] == call["completion_tokens"]


def test_usage_reaches_a_client_that_asks(gateway: Gateway, provider: Provider, unique: Unique) -> None:
    client = gateway.openai(gateway.key("search"))
    chunks = list(
        client.chat.completions.create(
            model="small",
            messages=[{"role": "user", "content": unique("Hi")}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


def test_every_parameter_reaches_the_provider(gateway: Gateway, provider: Provider, unique: Unique) -> None:
    sent = {
        "model": "gpt-4o",
        "messages": [{"role": "user", "content": unique("Hi")}],
        "temperature": 0.20,
        "max_tokens": 17,
        "top_p": 0.5,
        "seed": 12345678901234567890,
        "logit_bias": {"50256": -100},
        "x_unknown_field": {"deep": [1, 2.50, None, "ü"]},
    }
    answer = gateway.post(gateway.key("search"), sent)
    body = json.loads(provider.body(answer.headers["x-request-id"]))
    assert body == {**sent, "model": "middle"}
    assert answer.json()["usage"]["completion_tokens"] <= 17


def test_the_body_is_forwarded_byte_for_byte(gateway: Gateway, provider: Provider, unique: Unique) -> None:
    content = unique("Hi")
    raw = (
        '{ "temperature" : 2e-1,\t"model":"middle", "n": 1 ,\n"messages":[{"role":"user","content":"'
        + content
        + '\\u00e9"}], "seed": 1.0}'
    )
    answer = gateway.post(gateway.key("search"), raw.encode())
    assert answer.status_code == 200
    assert provider.body(answer.headers["x-request-id"]) == raw


def test_credentials_and_cookies_stay_here(gateway: Gateway, provider: Provider, unique: Unique) -> None:
    answer = gateway.chat(
        gateway.key("search"),
        unique("Hi"),
        headers={"cookie": "session=1", "x-forwarded-for": "10.0.0.1", "openai-organization": "org"},
    )
    (call,) = provider.calls(answer.headers["x-request-id"])
    assert not {"authorization", "cookie", "x-forwarded-for", "openai-organization"} & set(call["headers"])
    assert "gzip" not in str(call["headers"])


# -- models --


def test_models_lists_what_the_key_may_use(gateway: Gateway) -> None:
    client = gateway.openai(gateway.key("search"))
    names = {model.id for model in client.models.list()}
    assert {"auto", "small", "middle", "frontier", "gpt-4o"} <= names
    assert client.models.retrieve("small").id == "small"
    with gateway.http(gateway.key("search")) as http:
        assert http.get("/models").json() == http.get("/v1/models").json()
        missing = http.get("/v1/models/none-such")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_public_pages_need_no_key(gateway: Gateway) -> None:
    with httpx.Client(base_url=gateway.url, timeout=60) as http:
        assert http.get("/healthz").json() == {"status": "ok"}
        assert http.get("/readyz").json() == {"status": "ready"}
        metrics = http.get("/metrics")
    assert metrics.status_code == 200
    assert "farthing_" in metrics.text


# -- exact cache --


@pytest.mark.parametrize("first_streams", [False, True])
@pytest.mark.parametrize("then_streams", [False, True])
def test_json_and_stream_serve_each_other(
    gateway: Gateway, provider: Provider, unique: Unique, first_streams: bool, then_streams: bool
) -> None:
    key, content = gateway.key("search"), unique("cached")
    client = gateway.openai(key)

    def ask(stream: bool) -> tuple[str, str | None, str]:
        messages: Any = [{"role": "user", "content": content}]
        if not stream:
            raw = client.chat.completions.with_raw_response.create(model="small", messages=messages)
            choice = raw.parse().choices[0]
            return choice.message.content or "", choice.finish_reason, raw.headers["x-request-id"]
        with client.chat.completions.with_streaming_response.create(
            model="small", messages=messages, stream=True
        ) as response:
            chunks = list(response.parse())
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        return text, chunks[-1].choices[0].finish_reason, response.headers["x-request-id"]

    text, finish, first = ask(first_streams)
    gateway.row(first)
    again, finish_again, second = ask(then_streams)
    assert (again, finish_again) == (text, finish)
    assert len(provider.log()) == 1
    row = gateway.row(second)
    assert (row["cache"], row["cost"], row["cache_entry"], row["served_model"]) == (
        "exact",
        0,
        first,
        "small",
    )
    assert row["cache_savings"] == gateway.row(first)["cost"] > 0
    assert gateway.attempts(second) == []


def test_a_hit_repeats_the_stored_class_and_costs_nothing(gateway: Gateway, unique: Unique) -> None:
    key, content = gateway.key("search"), unique("What is 2 + 2?")
    first, second = gateway.chat(key, content), gateway.chat(key, content)
    assert second.content == first.content
    assert second.headers["x-farthing-cache"] == "exact"
    assert second.headers["x-farthing-class"] == first.headers["x-farthing-class"] != "none"
    assert second.headers["x-farthing-cost-usd"] == "0"


@pytest.mark.parametrize(
    ("team", "fields"),
    [("solo", {}), ("search", {"temperature": 0.7}), ("search", {"model": "middle"}), ("search", {"n": 2})],
    ids=["another team", "another parameter", "another model", "another n"],
)
def test_what_is_not_the_same_is_not_shared(
    gateway: Gateway, provider: Provider, unique: Unique, team: str, fields: dict[str, Any]
) -> None:
    content = unique("shared?")
    gateway.chat(gateway.key("search"), content, model="small")
    other = gateway.chat(gateway.key(team), content, **{"model": "small", **fields})
    assert other.headers["x-farthing-cache"] == "miss"
    assert len(provider.log()) == 2


def test_who_asks_and_how_it_travels_is_outside_the_key(
    gateway: Gateway, provider: Provider, unique: Unique
) -> None:
    key, content = gateway.key("search"), unique("shared")
    gateway.chat(key, content, user="a", metadata={"x": "1"})
    again = gateway.chat(key, content, user="b")
    assert again.headers["x-farthing-cache"] == "exact"


@pytest.mark.parametrize("control", ["no-cache", "no-store"])
def test_cache_control_asks_for_a_fresh_answer(
    gateway: Gateway, provider: Provider, unique: Unique, control: str
) -> None:
    key, content = gateway.key("search"), unique("fresh")
    gateway.chat(key, content)
    fresh = gateway.chat(key, content, headers={"cache-control": control})
    assert fresh.headers["x-farthing-cache"] == "miss"
    assert len(provider.log()) == 2


@pytest.mark.parametrize("headers", [{"cache-control": "no-store"}, {"x-farthing-cache": "off"}])
def test_what_must_not_be_stored_is_not(
    gateway: Gateway, provider: Provider, unique: Unique, headers: dict[str, str]
) -> None:
    key, content = gateway.key("search"), unique("unstored")
    gateway.chat(key, content, headers=headers)
    assert gateway.chat(key, content).headers["x-farthing-cache"] == "miss"
    assert gateway.chat(key, content).headers["x-farthing-cache"] == "exact"


# -- names --


def test_an_alias_is_served_by_its_target(gateway: Gateway, unique: Unique) -> None:
    answer = gateway.chat(gateway.key("search"), unique("Hi"), model="gpt-4o")
    row = gateway.row(answer.headers["x-request-id"])
    assert (row["requested_model"], row["served_model"]) == ("gpt-4o", "middle")
    # gpt-4o has a catalogue price, and savings are counted at the price of the name that was sent.
    assert row["baseline_model"] == "gpt-4o"
    assert row["baseline"] - row["cost"] == row["routing_savings"] + row["cache_savings"] - row["overhead"]


def test_an_unknown_name_is_routed_under_auto(gateway: Gateway, unique: Unique) -> None:
    answer = gateway.chat(gateway.key("search"), unique("What is 2 + 2?"), model="whatever-9")
    assert answer.headers["x-farthing-model"] == "small"
    assert answer.headers["x-farthing-class"] != "none"


def test_substitute_replaces_a_named_model(gateway: Gateway, unique: Unique) -> None:
    answer = gateway.chat(gateway.key("swap"), unique("What is 2 + 2?"), model="frontier")
    assert answer.headers["x-farthing-model"] == "small"
    row = gateway.row(answer.headers["x-request-id"])
    assert row["routing_savings"] > 0


# -- headers that tighten --


def test_tags_tighten_the_allow_list(gateway: Gateway, unique: Unique) -> None:
    key = gateway.key("search")
    answer = gateway.chat(key, unique("What is 2 + 2?"), headers={"x-farthing-tags": "data=pii"})
    assert answer.headers["x-farthing-model"] == "frontier"
    refused = gateway.chat(
        key, unique("What is 2 + 2?"), model="small", headers={"x-farthing-tags": "data=pii"}
    )
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "model_not_allowed"
    assert "pii stays" in refused.json()["error"]["message"]


def test_a_keys_tags_cannot_be_removed(gateway: Gateway, unique: Unique) -> None:
    key = gateway.key("search", tags={"data": ("pii",)})
    answer = gateway.chat(key, unique("What is 2 + 2?"), headers={"x-farthing-tags": "data=public"})
    assert answer.headers["x-farthing-model"] == "frontier"
    row = gateway.row(answer.headers["x-request-id"])
    assert json.loads(row["tags"]) == {"data": ["pii", "public"]}


def test_quality_may_be_raised(gateway: Gateway, unique: Unique) -> None:
    key, content = gateway.key("search"), unique("What is 2 + 2?")
    assert gateway.chat(key, content).headers["x-farthing-model"] == "small"
    better = gateway.chat(key, content, headers={"x-farthing-quality": "0.98"})
    assert better.headers["x-farthing-model"] == "frontier"
    lower = gateway.chat(key, unique("What is 2 + 2?"), headers={"x-farthing-quality": "0.1"})
    assert lower.headers["x-farthing-model"] == "small"


def test_a_cost_limit_excludes_what_is_dearer(gateway: Gateway, unique: Unique) -> None:
    key = gateway.key("search")
    refused = gateway.chat(key, unique("Hi"), model="frontier", headers={"x-farthing-max-cost": "0.0000001"})
    assert refused.status_code == 400
    assert "max_cost_per_request" in refused.json()["error"]["message"]
    assert refused.headers["x-should-retry"] == "false"
