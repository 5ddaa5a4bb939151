"""The wires behind litellm: their requests as providers get them, their answers in OpenAI's form.

respx stands in for the providers. It sees httpx only, so litellm's aiohttp transport is off here; the contract
suite (tests/contracts/test_upstreams.py) runs with it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import respx

from router.adapters.litellm_wire import IMPORT_GUARDS, LitellmWire
from router.core.errors import UpstreamError
from router.core.openai_wire import StreamTap, complete_answer
from router.core.policy import ModelSpec, ProviderSpec, Timeouts
from router.core.ports import UpstreamCall
from router.core.types import Usage

KEY = "sk-provider-secret"
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def call(model: str, stream: bool = False, address: str | None = None, **fields: object) -> UpstreamCall:
    options = {
        "aws_region_name": "eu-central-1",
        "aws_access_key_id": "AKIATEST",
        "aws_secret_access_key": "secret",
    }
    provider = ProviderSpec(
        "p", "litellm", address, "P_KEY", Timeouts(), options=options if "bedrock" in model else None
    )
    spec = ModelSpec("m", "p", model, 8192, 1024, frozenset(), frozenset(), {}, None, None, None)
    body = {
        "model": model,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}],
        "max_tokens": 50,
        "stream": stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
        **fields,
    }
    return UpstreamCall(provider, spec, "/chat/completions", json.dumps(body).encode(), stream, "req-1")


@pytest.fixture
async def wire(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LitellmWire]:
    for name, value in IMPORT_GUARDS.items():
        monkeypatch.setenv(name, value)
    import litellm

    monkeypatch.setattr(litellm, "disable_aiohttp_transport", True)
    litellm.in_memory_llm_clients_cache.flush_cache()
    wire = LitellmWire({"p": KEY})
    yield wire
    await wire.close()
    litellm.in_memory_llm_clients_cache.flush_cache()


@pytest.fixture
def providers() -> Iterator[respx.MockRouter]:
    with respx.mock(assert_all_called=False) as router:
        yield router


async def whole(wire: LitellmWire, sent: UpstreamCall) -> dict[str, Any]:
    reply = await wire.send(sent)
    body = b"".join([chunk async for chunk in reply.chunks()])
    facts = complete_answer(body)
    assert facts is not None
    assert facts.complete
    answer: dict[str, Any] = json.loads(body)
    return answer


async def streamed(wire: LitellmWire, sent: UpstreamCall) -> tuple[StreamTap, str, UpstreamError | None]:
    tap, text = StreamTap(client_wants_usage=True), ""
    reply = await wire.send(sent)
    try:
        async for chunk in reply.chunks():
            for frame in tap.feed(chunk):
                if b"[DONE]" not in frame:
                    for choice in json.loads(frame[6:])["choices"]:
                        text += choice["delta"].get("content") or ""
    except UpstreamError as error:
        return tap, text, error
    finally:
        reply.close()
    return tap, text, None


def sse(*events: tuple[str, dict[str, Any]]) -> bytes:
    return b"".join(f"event: {name}\ndata: {json.dumps(data)}\n\n".encode() for name, data in events)


# ---- Anthropic ----

ANTHROPIC = "https://api.anthropic.com/v1/messages"
ANTHROPIC_ANSWER = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-sonnet-4-5",
    "content": [{"type": "text", "text": "Hi."}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {
        "input_tokens": 20,
        "output_tokens": 4,
        "cache_read_input_tokens": 100,
        "cache_creation_input_tokens": 30,
    },
}
ANTHROPIC_STREAM = [
    (
        "message_start",
        {
            "type": "message_start",
            "message": {
                **ANTHROPIC_ANSWER,
                "content": [],
                "stop_reason": None,
                "usage": {"input_tokens": 20, "output_tokens": 1},
            },
        },
    ),
    (
        "content_block_start",
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    ),
    (
        "content_block_delta",
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}},
    ),
    (
        "content_block_delta",
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "."}},
    ),
    ("content_block_stop", {"type": "content_block_stop", "index": 0}),
    (
        "message_delta",
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"output_tokens": 4},
        },
    ),
    ("message_stop", {"type": "message_stop"}),
]


async def test_anthropic(wire: LitellmWire, providers: respx.MockRouter) -> None:
    route = providers.post(ANTHROPIC).respond(json=ANTHROPIC_ANSWER)
    answer = await whole(wire, call("anthropic/claude-sonnet-4-5", tools=[TOOL], temperature=0.2))
    assert answer["choices"][0]["message"]["content"] == "Hi."
    assert answer["choices"][0]["finish_reason"] == "stop"
    facts = complete_answer(json.dumps(answer).encode())
    assert facts is not None
    assert facts.usage == Usage(input=20, input_cached=100, cache_write=30, output=4)
    sent = route.calls[0].request
    assert sent.headers["x-api-key"] == KEY
    body = json.loads(sent.content)
    assert body["model"] == "claude-sonnet-4-5"
    assert (body["max_tokens"], body["temperature"]) == (50, 0.2)
    assert body["tools"][0]["name"] == "weather"


async def test_anthropic_streamed(wire: LitellmWire, providers: respx.MockRouter) -> None:
    providers.post(ANTHROPIC).respond(
        content=sse(*ANTHROPIC_STREAM), headers={"content-type": "text/event-stream"}
    )
    tap, text, error = await streamed(wire, call("anthropic/claude-sonnet-4-5", stream=True))
    assert (text, error, tap.complete, tap.done) == ("Hi.", None, True, True)
    assert tap.usage == Usage(input=20, output=4)


@pytest.mark.parametrize("left", [2, 3, 4, 5])
async def test_a_cut_stream_gets_no_invented_end(
    wire: LitellmWire, providers: respx.MockRouter, left: int
) -> None:
    providers.post(ANTHROPIC).respond(
        content=sse(*ANTHROPIC_STREAM[:left]), headers={"content-type": "text/event-stream"}
    )
    tap, text, error = await streamed(wire, call("anthropic/claude-sonnet-4-5", stream=True))
    assert text in ("", "Hi", "Hi.")
    assert error is not None
    assert error.kind == "cut"
    assert (tap.complete, tap.done) == (False, False)
    assert None in tap.finish_reasons or tap.finish_reasons == ()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500, 529])
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_keep_status_and_wait_and_lose_the_text(
    wire: LitellmWire, providers: respx.MockRouter, status: int, stream: bool
) -> None:
    route = providers.post(ANTHROPIC).respond(
        status,
        json={"type": "error", "error": {"type": "some_error", "message": "Provider's own words"}},
        headers={"retry-after": "12"},
    )
    with pytest.raises(UpstreamError) as caught:
        await wire.send(call("anthropic/claude-sonnet-4-5", stream=stream))
    assert caught.value.kind == "status"
    assert caught.value.status == status
    assert caught.value.retry_after == 12
    assert "own words" not in str(caught.value)
    assert KEY not in str(caught.value)
    assert route.call_count == 1


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (httpx.ConnectError("refused"), "connect"),
        (httpx.ConnectTimeout("slow"), "connect"),
        (httpx.RemoteProtocolError("gone"), "cut"),
        (httpx.ReadTimeout("slow"), "timeout"),
    ],
)
async def test_a_broken_connection_is_one_call(
    wire: LitellmWire, providers: respx.MockRouter, raised: httpx.TransportError, kind: str
) -> None:
    route = providers.post(ANTHROPIC).mock(side_effect=raised)
    with pytest.raises(UpstreamError) as caught:
        await wire.send(call("anthropic/claude-sonnet-4-5"))
    assert caught.value.kind == kind
    assert route.call_count == 1


async def test_a_redirect_is_not_followed(wire: LitellmWire, providers: respx.MockRouter) -> None:
    providers.post(ANTHROPIC).respond(307, headers={"location": "https://elsewhere.example/"})
    elsewhere = providers.post("https://elsewhere.example/").respond(json=ANTHROPIC_ANSWER)
    with pytest.raises(UpstreamError):
        await wire.send(call("anthropic/claude-sonnet-4-5"))
    assert not elsewhere.called


# ---- Gemini ----

GEMINI = "https://generativelanguage.googleapis.com/v1beta/models/gemini-2.5-flash"


def gemini(text: str, finish: str | None) -> dict[str, Any]:
    candidate: dict[str, Any] = {"index": 0, "content": {"role": "model", "parts": [{"text": text}]}}
    if finish is not None:
        candidate["finishReason"] = finish
    usage = {"promptTokenCount": 9, "candidatesTokenCount": 3, "totalTokenCount": 12}
    return {
        "candidates": [candidate],
        "modelVersion": "gemini-2.5-flash",
        "responseId": "r",
        "usageMetadata": usage,
    }


async def test_gemini(wire: LitellmWire, providers: respx.MockRouter) -> None:
    route = providers.post(url__startswith=f"{GEMINI}:generateContent").respond(json=gemini("Hi.", "STOP"))
    answer = await whole(wire, call("gemini/gemini-2.5-flash"))
    assert answer["choices"][0]["message"]["content"] == "Hi."
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (9, 3)
    assert json.loads(route.calls[0].request.content)["contents"][0]["parts"][0]["text"] == "Hello?"


@pytest.mark.parametrize("cut", [False, True])
async def test_gemini_streamed(wire: LitellmWire, providers: respx.MockRouter, cut: bool) -> None:
    events = [gemini("Hi", None), gemini(".", None if cut else "STOP")]
    providers.post(url__startswith=f"{GEMINI}:streamGenerateContent").respond(
        content=b"".join(b"data: " + json.dumps(event).encode() + b"\r\n\r\n" for event in events),
        headers={"content-type": "text/event-stream"},
    )
    tap, text, error = await streamed(wire, call("gemini/gemini-2.5-flash", stream=True))
    assert text == "Hi."
    assert (tap.complete, tap.done) == (not cut, not cut)
    if cut:
        assert error is not None
        assert error.kind == "cut"
    else:
        assert tap.usage == Usage(input=9, output=3)


# ---- Ollama ----

OLLAMA = "http://ollama.example:11434"


def ollama(text: str, done: bool) -> dict[str, Any]:
    event = {"model": "llama3", "created_at": "2026-01-01T00:00:00Z", "done": done}
    event["message"] = {"role": "assistant", "content": text}
    return {**event, "done_reason": "stop", "prompt_eval_count": 8, "eval_count": 2} if done else event


async def test_ollama(wire: LitellmWire, providers: respx.MockRouter) -> None:
    route = providers.post(f"{OLLAMA}/api/chat").respond(json=ollama("Hi.", True))
    answer = await whole(wire, call("ollama_chat/llama3", address=OLLAMA))
    assert answer["choices"][0]["message"]["content"] == "Hi."
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (8, 2)
    assert json.loads(route.calls[0].request.content)["options"]["num_predict"] == 50


@pytest.mark.parametrize("cut", [False, True])
async def test_ollama_streamed(wire: LitellmWire, providers: respx.MockRouter, cut: bool) -> None:
    events = [ollama("Hi", False), ollama(".", False), *([] if cut else [ollama("", True)])]
    providers.post(f"{OLLAMA}/api/chat").respond(
        content=b"".join(json.dumps(event).encode() + b"\n" for event in events)
    )
    tap, text, error = await streamed(wire, call("ollama_chat/llama3", stream=True, address=OLLAMA))
    assert text == "Hi."
    assert (tap.complete, tap.done) == (not cut, not cut)
    assert (error is not None and error.kind == "cut") is cut


# ---- Bedrock ----

BEDROCK = "https://bedrock-runtime.eu-central-1.amazonaws.com/model/anthropic.claude-3-haiku-20240307-v1%3A0"
BEDROCK_MODEL = "bedrock/anthropic.claude-3-haiku-20240307-v1:0"


def aws_event(name: str, payload: dict[str, Any]) -> bytes:
    """One message of application/vnd.amazon.eventstream."""
    headers = b""
    for key, value in (
        (":event-type", name),
        (":content-type", "application/json"),
        (":message-type", "event"),
    ):
        headers += bytes([len(key)]) + key.encode() + b"\x07" + len(value).to_bytes(2, "big") + value.encode()
    body = json.dumps(payload).encode()
    start = (16 + len(headers) + len(body)).to_bytes(4, "big") + len(headers).to_bytes(4, "big")
    message = start + zlib.crc32(start).to_bytes(4, "big") + headers + body
    return message + zlib.crc32(message).to_bytes(4, "big")


async def test_bedrock(wire: LitellmWire, providers: respx.MockRouter) -> None:
    route = providers.post(url__regex=r"https://bedrock-runtime\.eu-central-1\..*/converse").respond(
        json={
            "output": {"message": {"role": "assistant", "content": [{"text": "Hi."}]}},
            "stopReason": "end_turn",
            "usage": {"inputTokens": 7, "outputTokens": 3, "totalTokens": 10},
            "metrics": {"latencyMs": 1},
        }
    )
    answer = await whole(wire, call(BEDROCK_MODEL))
    assert answer["choices"][0]["message"]["content"] == "Hi."
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (7, 3)
    assert json.loads(route.calls[0].request.content)["inferenceConfig"]["maxTokens"] == 50


@pytest.mark.parametrize("cut", [False, True])
async def test_bedrock_streamed(wire: LitellmWire, providers: respx.MockRouter, cut: bool) -> None:
    usage = {"inputTokens": 7, "outputTokens": 3, "totalTokens": 10}
    events = [
        aws_event("messageStart", {"role": "assistant"}),
        aws_event("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": "Hi."}}),
        aws_event("contentBlockStop", {"contentBlockIndex": 0}),
        aws_event("messageStop", {"stopReason": "end_turn"}),
        aws_event("metadata", {"usage": usage, "metrics": {"latencyMs": 1}}),
    ]
    providers.post(url__regex=r"https://bedrock-runtime\.eu-central-1\..*/converse-stream").respond(
        content=b"".join(events[:2] if cut else events),
        headers={"content-type": "application/vnd.amazon.eventstream"},
    )
    tap, text, error = await streamed(wire, call(BEDROCK_MODEL, stream=True))
    assert text == "Hi."
    assert (tap.complete, tap.done) == (not cut, not cut)
    if cut:
        assert error is not None
        assert error.kind == "cut"
    else:
        assert tap.usage == Usage(input=7, output=3)


# ---- what the adapter itself refuses ----


@pytest.mark.parametrize(
    "field",
    ["api_base", "base_url", "api_key", "custom_llm_provider", "mock_response", "fallbacks", "extra_headers"],
)
async def test_fields_that_would_steer_litellm_are_refused(
    wire: LitellmWire, providers: respx.MockRouter, field: str
) -> None:
    route = providers.post(ANTHROPIC).respond(json=ANTHROPIC_ANSWER)
    with pytest.raises(UpstreamError, match=field) as caught:
        await wire.send(call("anthropic/claude-sonnet-4-5", **{field: "http://127.0.0.1:1/"}))
    assert (caught.value.kind, caught.value.status) == ("status", 400)
    assert not route.called


@pytest.mark.parametrize("value", [float("inf"), {"a": [-float("inf")]}, "half \ud83d", [{"\udc00": 1}]])
async def test_what_cannot_be_written_again_is_refused(
    wire: LitellmWire, providers: respx.MockRouter, value: object
) -> None:
    route = providers.post(ANTHROPIC).respond(json=ANTHROPIC_ANSWER)
    with pytest.raises(UpstreamError, match="'tool_choice'") as caught:
        await wire.send(call("anthropic/claude-sonnet-4-5", tool_choice=value))
    assert (caught.value.kind, caught.value.status) == ("status", 400)
    assert not route.called


async def test_metadata_stays_here(wire: LitellmWire, providers: respx.MockRouter) -> None:
    route = providers.post(ANTHROPIC).respond(json=ANTHROPIC_ANSWER)
    await whole(wire, call("anthropic/claude-sonnet-4-5", metadata={"a": "b"}, store=True))
    assert b'"a"' not in route.calls[0].request.content


async def test_a_parameter_that_the_model_does_not_take_is_a_400(
    wire: LitellmWire, providers: respx.MockRouter
) -> None:
    route = providers.post(ANTHROPIC).respond(json=ANTHROPIC_ANSWER)
    with pytest.raises(UpstreamError) as caught:
        await wire.send(call("anthropic/claude-sonnet-4-5", logit_bias={"1": 1}))
    assert (caught.value.kind, caught.value.status) == ("status", 400)
    assert not route.called


async def test_many_first_calls_import_once(wire: LitellmWire, providers: respx.MockRouter) -> None:
    providers.post(ANTHROPIC).respond(json=ANTHROPIC_ANSWER)
    answers = await asyncio.gather(*(whole(wire, call("anthropic/claude-sonnet-4-5")) for _ in range(5)))
    assert [a["choices"][0]["message"]["content"] for a in answers] == ["Hi."] * 5


def test_the_adapter_alone_does_not_import_litellm() -> None:
    code = (
        "import sys, router.adapters.litellm_wire as w; w.LitellmWire({}); "
        "print([m for m in ('litellm', 'httpx', 'openai', 'torch') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
