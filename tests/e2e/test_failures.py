"""What a caller sees and what is booked when providers fail, streams break and clients leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.e2e.gateway import Gateway, until
from tests.e2e.provider import Provider
from tests.steady import Stopwatch

Unique = Callable[[str], str]

BEFORE_THE_FIRST_BYTE = (
    "401",
    "402",
    "403",
    "429",
    "500",
    "disconnect",
    "error-first",
    "not-json",
    "redirect",
    "stall",
    "stall-after-headers",
)


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
@pytest.mark.parametrize("fault", BEFORE_THE_FIRST_BYTE)
def test_another_model_answers(gateway: Gateway, unique: Unique, fault: str, stream: bool) -> None:
    if fault.startswith("stall") and not stream:
        pytest.skip("a JSON answer may take its whole time")
    answer = gateway.chat(gateway.key("search"), unique("Hi"), model=f"bad-{fault}", stream=stream)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-farthing-model"] == "middle"
    if stream:
        assert answer.text.rstrip().endswith("data: [DONE]")
    tried = gateway.attempts(answer.headers["x-request-id"])
    assert [(a["model"], a["outcome"]) for a in tried][-1] == ("middle", "complete")
    assert tried[0]["outcome"] in ("failed", "timeout") or tried[0]["model"] == "middle"
    row = gateway.row(answer.headers["x-request-id"])
    assert row["served_model"] == "middle"
    assert row["cost"] == sum(a["cost"] for a in tried)


@pytest.mark.parametrize("fault", ["401", "402", "403", "500", "disconnect", "not-json", "redirect"])
def test_a_providers_own_refusal_never_surfaces(gateway: Gateway, unique: Unique, fault: str) -> None:
    answer = gateway.chat(gateway.key("solo"), unique("Hi"), model=f"bad-{fault}")
    assert answer.status_code in (502, 503), answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Simulated" not in answer.text
    # The gateway has retried already; only an open breaker is worth coming back for.
    assert answer.headers["x-should-retry"] == ("false" if answer.status_code == 502 else "true")


def test_a_providers_rate_limit_is_told_as_ours(gateway: Gateway, unique: Unique) -> None:
    answer = gateway.chat(gateway.key("solo"), unique("Hi"), model="bad-429")
    assert answer.status_code in (429, 503)
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] in ("rate_limit_exceeded", "no_model_meets_policy")
    assert "Simulated" not in answer.text


def test_a_providers_400_passes_through(gateway: Gateway, unique: Unique) -> None:
    answer = gateway.chat(gateway.key("search"), unique("Hi"), model="bad-400")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "Simulated status 400."
    assert answer.headers["x-should-retry"] == "false"
    row = gateway.row(answer.headers["x-request-id"])
    assert (row["status"], row["http_status"], row["cost"]) == ("failed", 400, 0)


def test_a_passing_fault_is_retried(
    start_gateway: Callable[..., Gateway], provider: Provider, unique: Unique
) -> None:
    gateway = start_gateway()
    with provider.changed("small", fault="503", fault_times=1, retry_after="none"):
        answer = gateway.chat(gateway.key("solo"), unique("Hi"), model="small")
    assert answer.status_code == 200, answer.text
    assert [a["outcome"] for a in gateway.attempts(answer.headers["x-request-id"])] == ["failed", "complete"]


@pytest.mark.parametrize("fault", ["cut", "reset", "error-midstream", "silence"])
def test_a_stream_that_breaks_ends_with_an_error(gateway: Gateway, unique: Unique, fault: str) -> None:
    # A reset takes back what has not been read yet: on a busy machine that may be nearly all. And an error that is
    # read at once with what came before it broke an answer of which nothing was passed on. Once will do.
    tries = 3 if fault in ("reset", "error-midstream") else 1
    for left in reversed(range(tries)):
        answer = gateway.chat(gateway.key("search"), unique("Hi"), model=f"bad-{fault}", stream=True)
        if answer.headers["x-farthing-model"] == "middle":
            assert left, "the fault did not strike"
            continue
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line[:6] == "data: "]
        assert "[DONE]" not in events
        if len(events) > 2:
            break
    assert set(json.loads(events[-1])["error"]) == {"message", "type", "param", "code"}
    finishes = [c["finish_reason"] for e in events[:-1] for c in json.loads(e)["choices"]]
    assert not any(finishes)
    assert len(events) > 2, "what came before the break reached the client"
    row = gateway.row(answer.headers["x-request-id"])
    assert (row["status"], row["estimated"]) == ("cut", True)
    assert row["cost"] > 0
    assert len(gateway.attempts(answer.headers["x-request-id"])) == 1, (
        "nothing is retried after the first byte"
    )


def test_the_openai_client_raises_on_a_cut_stream(gateway: Gateway, unique: Unique) -> None:
    stream = gateway.openai(gateway.key("search")).chat.completions.create(
        model="bad-cut", messages=[{"role": "user", "content": unique("Hi")}], stream=True
    )
    with pytest.raises(openai.APIError):
        list(stream)


def test_a_broken_answer_is_not_cached(gateway: Gateway, unique: Unique) -> None:
    key, content = gateway.key("solo"), unique("Hi")
    first = gateway.chat(key, content, model="bad-error-midstream", stream=True)
    gateway.row(first.headers["x-request-id"])
    second = gateway.chat(key, content, model="bad-error-midstream", stream=True)
    assert second.headers.get("x-farthing-cache", "miss") == "miss"


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
@pytest.mark.parametrize("oddity", ["crlf", "bytewise", "gzip", "no-done", "usage-with-choices"])
def test_an_odd_answer_that_is_whole_reaches_the_client(
    gateway: Gateway, provider: Provider, unique: Unique, oddity: str, stream: bool
) -> None:
    client = gateway.openai(gateway.key("search"))
    messages: Any = [{"role": "user", "content": unique("H\u00e9, \u4f60\u597d")}]
    if stream:
        with client.chat.completions.with_streaming_response.create(
            model=f"bad-{oddity}", messages=messages, stream=True
        ) as response:
            chunks = list(response.parse())
        headers = response.headers
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        finish = [c.choices[0].finish_reason for c in chunks if c.choices][-1]
    else:
        raw = client.chat.completions.with_raw_response.create(model=f"bad-{oddity}", messages=messages)
        headers, choice = raw.headers, raw.parse().choices[0]
        text, finish = choice.message.content or "", choice.finish_reason
    assert text
    assert finish == "stop"
    row = gateway.row(headers["x-request-id"])
    assert (row["status"], row["estimated"]) == ("complete", False)
    served = next(c for c in provider.calls(headers["x-request-id"]) if c["complete"])
    assert row["tokens_output"] == served["completion_tokens"]
    if oddity != "gzip":
        assert row["served_model"] == f"bad-{oddity}"


def test_no_usage_is_an_estimate(gateway: Gateway, unique: Unique) -> None:
    for stream in (False, True):
        answer = gateway.chat(gateway.key("search"), unique("Hi"), model="bad-no-usage", stream=stream)
        row = gateway.row(answer.headers["x-request-id"])
        assert (row["status"], row["estimated"]) == ("complete", True)
        assert row["cost"] > 0


# -- clients that leave --


def test_a_client_that_leaves_cancels_the_call(gateway: Gateway, provider: Provider, unique: Unique) -> None:
    client = gateway.openai(gateway.key("search"))
    with client.chat.completions.with_streaming_response.create(
        model="slow", messages=[{"role": "user", "content": unique("Hi")}], stream=True
    ) as response:
        lines = response.iter_lines()
        for _ in range(8):
            next(lines)
        request_id = response.headers["x-request-id"]
    with Stopwatch() as watch:
        until(lambda: provider.calls(request_id)[0]["client_left"], "the provider sees it")
    assert watch.seconds < 1.0
    row = gateway.row(request_id)
    assert (row["status"], row["http_status"], row["estimated"]) == ("cancelled", 499, True)
    assert row["cost"] > 0
    (attempt,) = gateway.attempts(request_id)
    assert attempt["outcome"] == "cancelled"


async def test_a_client_that_leaves_before_the_answer_cancels_it(
    gateway: Gateway, provider: Provider, unique: Unique
) -> None:
    content = unique("Hi")
    async with gateway.async_openai(gateway.key("search")) as client:
        asked = asyncio.create_task(_ask(client, content, stream=False, tokens=2000))
        await _under_way(provider)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
    await asyncio.to_thread(
        until, lambda: [c for c in provider.log() if c["client_left"]], "the provider sees it"
    )
    (call,) = provider.log()
    row = gateway.row(call["request_id"])
    assert (row["status"], row["estimated"]) == ("cancelled", True)


# -- single flight --


async def _ask(client: openai.AsyncOpenAI, content: str, stream: bool, tokens: int = 20) -> tuple[str, str]:
    """The answer's text and the request's id."""
    messages: Any = [{"role": "user", "content": content}]
    if not stream:
        raw = await client.chat.completions.with_raw_response.create(
            model="slow", messages=messages, max_tokens=tokens
        )
        return raw.parse().choices[0].message.content or "", raw.headers["x-request-id"]
    async with client.chat.completions.with_streaming_response.create(
        model="slow", messages=messages, max_tokens=tokens, stream=True
    ) as response:
        parts = [c.choices[0].delta.content or "" async for c in await response.parse()]
    return "".join(parts), response.headers["x-request-id"]


async def _under_way(provider: Provider) -> None:
    await asyncio.to_thread(until, provider.log, "the provider is called")


@pytest.mark.parametrize("mixed", [False, True], ids=["json", "json and streams"])
async def test_fifty_identical_requests_are_one_call(
    gateway: Gateway, provider: Provider, unique: Unique, mixed: bool
) -> None:
    content = unique("the same")
    async with gateway.async_openai(gateway.key("search")) as client:
        answers = await asyncio.gather(
            *(_ask(client, content, stream=mixed and number % 2 == 1) for number in range(50))
        )
    assert len({text for text, _ in answers}) == 1
    assert len(provider.log()) == 1
    rows = [gateway.row(request_id) for _, request_id in answers]
    paid = [row for row in rows if row["cost"] > 0]
    assert len(paid) == 1
    assert all(row["status"] == "complete" for row in rows)
    assert {row["cache"] for row in rows} == {"miss", "exact"}


async def test_a_leader_that_leaves_takes_nobody_along(
    gateway: Gateway, provider: Provider, unique: Unique
) -> None:
    content = unique("the same")
    async with gateway.async_openai(gateway.key("search")) as client:
        leader = asyncio.create_task(_ask(client, content, stream=True, tokens=60))
        await _under_way(provider)
        followers = [asyncio.create_task(_ask(client, content, stream=True, tokens=60)) for _ in range(3)]
        await asyncio.sleep(0.6)  # until they share its call
        leader.cancel()
        answers = await asyncio.gather(*followers)
    assert len({text for text, _ in answers}) == 1
    (call,) = provider.log()
    assert call["complete"]
    assert not call["client_left"]
    paid = gateway.row(call["request_id"])
    assert (paid["status"], paid["estimated"]) == ("complete", False)
    assert all(gateway.row(request_id)["cost"] == 0 for _, request_id in answers)


async def test_the_last_reader_ends_a_shared_call(
    gateway: Gateway, provider: Provider, unique: Unique
) -> None:
    content = unique("the same")
    async with gateway.async_openai(gateway.key("search")) as client:
        readers = [asyncio.create_task(_ask(client, content, stream=True, tokens=2000)) for _ in range(3)]
        await _under_way(provider)
        await asyncio.sleep(0.6)  # until they share one call
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
    await asyncio.to_thread(until, lambda: provider.log()[0]["client_left"], "the provider sees it")
    assert len(provider.log()) == 1
