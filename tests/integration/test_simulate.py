"""The simulated provider: what tests, demo and benchmarks rely on, seen through the real openai client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from router.simulate import (
    FAULTS,
    Call,
    Running,
    SimulatedModel,
    application,
    parse_model,
    prompt_tokens,
    serve,
    text_tokens,
)

ASK: Any = [{"role": "user", "content": "What is a farthing?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    models = [
        SimulatedModel("m", typical=20, input_price=Decimal("0.15"), output_price=Decimal("0.6")),
        parse_model("picky:rejects=temperature+stop,context=200,max_output=5,reasoning=7"),
        parse_model("warm:cached_from=10,input_price=1,cached_price=0.1"),
    ]
    running = await serve(application(models, key="sk-simulated"))
    yield running
    await running.close()


@pytest.fixture
async def client(running: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=running.url, api_key="sk-simulated", max_retries=0) as client:
        yield client


async def ended(running: Running) -> Call:
    for _ in range(3000):
        if running.app.log and running.app.log[-1].ended is not None:
            return running.app.log[-1]
        await asyncio.sleep(0.01)
    raise AssertionError("the call has not ended")


async def control(running: Running, **change: object) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(running.origin + "/control", json=change) as answer,
    ):
        return answer.status, await answer.json()


# ---- configuration ----


def test_parse_model() -> None:
    model = parse_model(
        "small:first_token=50ms,tps=200,context=8k,rejects=stop+top_p,fault=429,fault_rate=0.1"
    )
    assert model == SimulatedModel(
        "small",
        first_token=0.05,
        tps=200.0,
        context=8000,
        rejects=frozenset({"stop", "top_p"}),
        fault="429",
        fault_rate=0.1,
    )
    assert parse_model("a/b-1.2") == SimulatedModel("a/b-1.2")
    assert parse_model("m:input_price=0.15,retry_after=none").input_price == Decimal("0.15")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no model name"),
        ("a b", "no model name"),
        ("m:tps", "write tps=VALUE"),
        ("m:speed=3", "speed: unknown setting; known are .*first_token"),
        ("m:tps=fast", "tps=fast"),
        ("m:first_token=5 minutes", "first_token.*such as 300ms"),
        ("m:jitter=2", "between 0 and 1"),
        ("m:fault=explode", "fault=explode: unknown fault; known are stall"),
        ("m:fault=200", "unknown fault"),
        ("m:input_price=-1", "price is USD per million"),
        ("m:input_price=nan", "price is USD per million"),
    ],
)
def test_bad_settings_name_field_and_remedy(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_model(text)


def test_models_are_named_once() -> None:
    with pytest.raises(ValueError, match="at least one"):
        application([])
    with pytest.raises(ValueError, match="each name once"):
        application([SimulatedModel("m"), SimulatedModel("m")])


# ---- answers ----


async def test_an_answer_is_a_function_of_the_request(client: openai.AsyncOpenAI) -> None:
    async def text(**fields: Any) -> str | None:
        request = {"model": "m", "messages": ASK, **fields}
        return (await client.chat.completions.create(**request)).choices[0].message.content

    first = await text()
    assert first
    assert await text() == first
    assert await text(seed=1) != first
    assert await text(messages=[{"role": "user", "content": "Another question"}]) != first


async def test_stream_and_answer_say_the_same_and_count_the_same(
    client: openai.AsyncOpenAI, running: Running
) -> None:
    whole = await client.chat.completions.create(model="m", messages=ASK)
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == prompt_tokens({"messages": ASK}) == text_tokens(ASK[0]["content"]) + 7
    text, usage, finish = "", None, None
    async for chunk in await client.chat.completions.create(
        model="m", messages=ASK, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    assert text == whole.choices[0].message.content
    assert len(text.split()) == whole.usage.completion_tokens
    assert usage == whole.usage
    assert finish == whole.choices[0].finish_reason == "stop"
    call = await ended(running)
    expected = Decimal(usage.prompt_tokens) * Decimal("0.15") + usage.completion_tokens * Decimal("0.6")
    assert Decimal(call.cost_usd) == expected / 1_000_000
    assert (call.complete, call.stream, call.client_left, call.status) == (True, True, False, 200)
    assert call.fields == ("messages", "model", "stream", "stream_options")


async def test_limits_choices_and_stop(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="m", messages=ASK, max_tokens=3, n=2)
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    text = answer.choices[0].message.content or ""
    assert text != answer.choices[1].message.content
    stop = text.split()[1]
    stopped = await client.chat.completions.create(model="m", messages=ASK, stop=[stop])
    assert stop not in (stopped.choices[0].message.content or "")
    assert stopped.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_call_when_the_prompt_asks(client: openai.AsyncOpenAI, stream: bool) -> None:
    messages: Any = [{"role": "user", "content": "What's the weather in Bern?"}]
    if stream:
        name, arguments, finish = "", "", None
        async for chunk in await client.chat.completions.create(
            model="m", messages=messages, tools=[WEATHER], stream=True
        ):
            for piece in chunk.choices[0].delta.tool_calls or ():
                assert piece.function is not None
                name += piece.function.name or ""
                arguments += piece.function.arguments or ""
            finish = chunk.choices[0].finish_reason or finish
    else:
        answer = await client.chat.completions.create(model="m", messages=messages, tools=[WEATHER])
        call: Any = (answer.choices[0].message.tool_calls or [])[0]
        name, arguments, finish = call.function.name, call.function.arguments, answer.choices[0].finish_reason
    assert (name, json.loads(arguments)) == ("weather", {"city": "example", "days": 1})
    assert finish == "tool_calls"


async def test_tools_are_left_alone_otherwise(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="m", messages=ASK, tools=[WEATHER])
    assert answer.choices[0].message.tool_calls is None
    forced = await client.chat.completions.create(
        model="m", messages=ASK, tools=[WEATHER], tool_choice="required"
    )
    assert forced.choices[0].message.tool_calls


async def test_json_answers_and_logprobs(client: openai.AsyncOpenAI) -> None:
    schema: Any = {"name": "s", "schema": WEATHER["function"]["parameters"]}
    answer = await client.chat.completions.create(
        model="m", messages=ASK, response_format={"type": "json_schema", "json_schema": schema}
    )
    assert json.loads(answer.choices[0].message.content or "") == {"city": "example", "days": 1}
    answer = await client.chat.completions.create(model="m", messages=ASK, logprobs=True, max_tokens=4)
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.content or ()) == 4


async def test_embeddings_and_models(client: openai.AsyncOpenAI) -> None:
    one = await client.embeddings.create(model="m", input=["a", "b"], dimensions=8)
    two = await client.embeddings.create(model="m", input="a", dimensions=8, encoding_format="float")
    assert one.data[0].embedding == pytest.approx(two.data[0].embedding, abs=1e-6)
    assert one.data[0].embedding != one.data[1].embedding
    assert one.usage.prompt_tokens == 2
    assert [model.id async for model in client.models.list()] == ["m", "picky", "warm"]


async def test_reasoning_and_rejections_as_openai_words_them(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="picky", messages=ASK)
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 7
    assert answer.usage.completion_tokens == 12
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="picky", messages=ASK, temperature=0.2)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "temperature")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="picky", messages=ASK, max_tokens=250)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="nobody", messages=ASK)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="sk-wrong").chat.completions.create(model="m", messages=ASK)


async def test_a_conversation_seen_before_is_cached(client: openai.AsyncOpenAI, running: Running) -> None:
    async def cached(messages: Any) -> int:
        answer = await client.chat.completions.create(model="warm", messages=messages)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    start: Any = [{"role": "system", "content": "You answer questions about coins." * 3}]
    assert await cached(start + ASK) == 0
    assert (
        await cached([*start, {"role": "user", "content": "And a penny?"}])
        == text_tokens(start[0]["content"]) + 4
    )
    call = running.app.log[-1]
    assert (
        Decimal(call.cost_usd) * 1_000_000
        == (call.prompt_tokens - call.cached_tokens) + Decimal("0.1") * call.cached_tokens
    )


# ---- latency and faults ----


async def test_latency_follows_the_settings(client: openai.AsyncOpenAI, running: Running) -> None:
    await control(running, model="m", first_token="120ms", tps=100)
    loop = asyncio.get_running_loop()
    started, began = time.monotonic(), loop.time()
    first = None
    async for chunk in await client.chat.completions.create(
        model="m", messages=ASK, stream=True, max_tokens=10
    ):
        if first is None and chunk.choices and chunk.choices[0].delta.content:
            first = time.monotonic() - started, loop.time() - began
    assert first is not None
    assert first[0] > 0.11
    assert first[1] < 0.5
    assert time.monotonic() - started > 0.2
    assert loop.time() - began < 0.8


async def test_control_changes_at_once_and_refuses_nonsense(running: Running) -> None:
    status, shown = await control(running, model="m", fault="500", fault_times=2)
    assert status == 200
    assert shown["models"][0]["fault"] == "500"
    assert (await control(running, model="*", tps="50"))[0] == 200
    assert running.app.models["warm"].tps == 50
    assert (await control(running, model="x"))[0] == 404
    status, body = await control(running, model="m", fault="explode")
    assert status == 400
    assert "known are" in body["error"]["message"]
    assert running.app.models["m"].fault == "500"


async def test_a_fault_strikes_as_often_as_asked(client: openai.AsyncOpenAI, running: Running) -> None:
    async def statuses(count: int) -> list[int]:
        found = []
        for _ in range(count):
            try:
                await client.chat.completions.create(model="m", messages=ASK, max_tokens=1)
                found.append(200)
            except openai.APIStatusError as error:
                found.append(error.status_code)
        return found

    await control(running, model="m", fault="500", fault_times=2)
    assert await statuses(4) == [500, 500, 200, 200]
    await control(running, model="m", fault="429", fault_rate=0.3, retry_after="2s")
    found = await statuses(60)
    assert 8 <= found.count(429) <= 30
    await control(running, model="m", fault_rate=1)
    with pytest.raises(openai.RateLimitError) as caught:
        await client.chat.completions.create(model="m", messages=ASK, max_tokens=1)
    assert caught.value.response.headers["retry-after"] == "2"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", [*FAULTS, "503"])
async def test_every_fault_ends_and_is_logged(running: Running, fault: str, stream: bool) -> None:
    await control(running, model="m", fault=fault, silence="20ms")
    body = {"model": "m", "messages": ASK, "stream": stream}
    timeout = aiohttp.ClientTimeout(total=1 if fault.startswith("stall") else 60)
    headers = {"authorization": "Bearer sk-simulated"}
    outcome = "whole"
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
            session.post(running.url + "/chat/completions", json=body, allow_redirects=False) as answer,
        ):
            raw = await answer.read()
            if answer.status != 200:
                outcome = str(answer.status)
            elif fault == "cut" and stream:
                assert b"[DONE]" not in raw
    except TimeoutError:
        outcome = "timeout"
    except aiohttp.ClientError:
        outcome = "broken"
    expected = {"stall": "timeout", "stall_after_headers": "timeout", "redirect": "302", "503": "503"}
    broken = ("reset", "disconnect") if stream else ("reset", "disconnect", "cut")
    assert outcome == ("broken" if fault in broken else expected.get(fault, "whole"))
    call = await ended(running)
    assert call.fault == fault
    harmless = ("silence", "no_usage", "usage_with_choices", "no_done", "crlf", "bytewise", "gzip")
    assert call.complete is (fault in harmless)
    assert call.client_left is fault.startswith("stall")


async def test_a_client_that_leaves_is_noticed(client: openai.AsyncOpenAI, running: Running) -> None:
    await control(running, model="m", tps=20, typical=400)
    stream = await client.chat.completions.create(model="m", messages=ASK, stream=True)
    async for _ in stream:
        break
    await stream.close()
    started = asyncio.get_running_loop().time()
    call = await ended(running)
    assert call.client_left
    assert not call.complete
    assert asyncio.get_running_loop().time() - started < 1


async def test_the_log_over_http_and_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    running = await serve(application([SimulatedModel("m")], log_file=path))
    async with aiohttp.ClientSession() as session:
        for number in range(3):
            body = {"model": "m", "messages": ASK, "user": "u"}
            headers = {"x-request-id": f"r{number}"}
            async with session.post(running.url + "/chat/completions", json=body, headers=headers) as answer:
                assert answer.status == 200
        async with session.get(running.origin + "/log") as answer:
            shown = [json.loads(line) for line in (await answer.text()).splitlines()]
        async with session.delete(running.origin + "/log") as answer:
            assert answer.status == 200
        assert len(running.app.log) == 0
    await running.close()
    assert [line["request_id"] for line in shown] == ["r0", "r1", "r2"]
    assert [json.loads(line) for line in path.read_text().splitlines()] == shown
    assert "What is a farthing?" not in path.read_text()


async def test_two_simulators_side_by_side_and_a_taken_port(running: Running) -> None:
    other = await serve(application([replace(SimulatedModel("m"), typical=1)]))
    assert other.port != running.port
    with pytest.raises(OSError, match="in use"):
        await serve(application([SimulatedModel("m")]), port=other.port)
    await other.close()
