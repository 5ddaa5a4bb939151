"""What every wire promises, over a simulated provider on loopback: port `Upstream` of router/core/ports.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from router.adapters.litellm_wire import LitellmWire
from router.adapters.openai_wire import OpenAIWire
from router.core.errors import UpstreamError
from router.core.openai_wire import StreamTap, complete_answer
from router.core.policy import ModelSpec, ProviderSpec, Timeouts
from router.core.ports import Upstream, UpstreamCall, UpstreamReply
from router.simulate import Call, Running, SimulatedModel, application, serve
from tests.values import replace

KEY = "sk-provider-secret"
CALLER_TEXT = "How long is a rope?"


def provider(url: str | None, wire: str, connect: float = 20.0) -> ProviderSpec:
    return ProviderSpec("p", wire, url, "P_KEY", Timeouts(connect=connect))


def model(upstream_name: str) -> ModelSpec:
    return ModelSpec("m", "p", upstream_name, 8192, 1024, frozenset(), frozenset(), {}, None, None, None)


@dataclass
class Bench:
    """One wire, pointed at one simulated model called `m`."""

    wire: str
    upstream: Upstream
    running: Running

    def call(self, stream: bool = False, **fields: object) -> UpstreamCall:
        name = "openai/m" if self.wire == "litellm" else "m"
        body = {
            "model": name,
            "messages": [{"role": "user", "content": CALLER_TEXT}],
            "stream": stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
            **fields,
        }
        spec = provider(self.running.url, self.wire)
        return UpstreamCall(
            spec, model(name), "/chat/completions", json.dumps(body).encode(), stream, "req-1"
        )

    def behave(self, **settings: object) -> None:
        models = self.running.app.models
        models["m"] = models["m"].with_settings(settings)

    async def arrived(self) -> None:
        """Once the provider has read a call."""
        for _ in range(1500):
            if self.running.app.log and self.running.app.log[-1].model:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("no call arrived")

    async def last_call(self) -> Call:
        """The provider's record of the last call, once that has ended."""
        for _ in range(3000):
            call = self.running.app.log[-1]
            if call.ended is not None:
                return call
            await asyncio.sleep(0.01)
        raise AssertionError("the provider still works on the call")


@pytest.fixture(params=["openai", "litellm"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    running = await serve(application([SimulatedModel("m", typical=20)], key=KEY))
    upstream: Upstream = OpenAIWire({"p": KEY}) if request.param == "openai" else LitellmWire({"p": KEY})
    yield Bench(request.param, upstream, running)
    await upstream.close()
    await running.close()


async def read(reply: UpstreamReply) -> bytes:
    return b"".join([chunk async for chunk in reply.chunks()])


async def failure(reply: UpstreamReply) -> tuple[bytes, UpstreamError]:
    """What came before the break, and the break."""
    got = bytearray()
    try:
        async for chunk in reply.chunks():
            got += chunk
    except UpstreamError as error:
        return bytes(got), error
    raise AssertionError("the answer ended without an error")


async def refused_with(bench: Bench, call: UpstreamCall) -> tuple[int, float | None]:
    """Status and wished wait, which a byte wire hands on as an answer and litellm raises."""
    try:
        reply = await bench.upstream.send(call)
    except UpstreamError as error:
        if error.kind != "status" or error.status is None or "Simulated" in error.detail:
            raise
        return error.status, error.retry_after
    body = await read(reply)
    reply.close()
    assert "error" in json.loads(body)
    wait = reply.headers.get("retry-after")
    return reply.status, None if wait is None else float(wait)


async def test_a_whole_answer(bench: Bench) -> None:
    reply = await bench.upstream.send(bench.call())
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("application/json")
    body = await read(reply)
    reply.close()
    facts = complete_answer(body)
    call = await bench.last_call()
    assert facts is not None
    assert facts.complete
    assert facts.usage is not None
    assert (facts.usage.input_total, facts.usage.output_total) == (call.prompt_tokens, call.completion_tokens)
    assert call.complete


async def test_a_whole_stream(bench: Bench) -> None:
    reply = await bench.upstream.send(bench.call(stream=True))
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    tap = StreamTap(client_wants_usage=True)
    async for chunk in reply.chunks():
        tap.feed(chunk)
    reply.close()
    call = await bench.last_call()
    assert (tap.complete, tap.done, tap.error, tap.finish_reasons) == (True, True, None, ("stop",))
    assert tap.usage is not None
    assert (tap.usage.input_total, tap.usage.output_total) == (call.prompt_tokens, call.completion_tokens)
    assert call.stream


async def test_the_providers_key_is_sent_and_nothing_of_the_caller(bench: Bench) -> None:
    await read(await bench.upstream.send(bench.call()))
    call = await bench.last_call()
    assert call.status == 200  # the simulator asks for the key
    assert "authorization" in call.headers
    assert "cookie" not in call.headers


@pytest.mark.parametrize("fault", ["cut", "reset"])
async def test_an_answer_that_breaks_off_is_cut(bench: Bench, fault: str) -> None:
    bench.behave(fault=fault)
    if bench.wire == "litellm":  # it reads the whole answer before it returns
        with pytest.raises(UpstreamError) as caught:
            await bench.upstream.send(bench.call())
        assert caught.value.kind == "cut"
        return
    got, error = await failure(await bench.upstream.send(bench.call()))
    assert error.kind == "cut"
    assert complete_answer(got) is None


async def test_a_stream_that_is_reset_is_cut(bench: Bench) -> None:
    bench.behave(fault="reset")
    got, error = await failure(await bench.upstream.send(bench.call(stream=True)))
    assert error.kind == "cut"
    assert b"[DONE]" not in got
    assert b'"stop"' not in got


async def test_a_stream_that_ends_early_never_looks_complete(bench: Bench) -> None:
    bench.behave(fault="cut")
    reply = await bench.upstream.send(bench.call(stream=True))
    tap = StreamTap(client_wants_usage=True)
    kinds = []
    try:
        async for chunk in reply.chunks():
            tap.feed(chunk)
    except UpstreamError as error:
        kinds.append(error.kind)
    assert kinds == (["cut"] if bench.wire == "litellm" else [])
    assert tap.content_frames > 3
    assert (tap.complete, tap.done, tap.finish_reasons) == (False, False, (None,))


@pytest.mark.parametrize("stream", [False, True])
async def test_too_many_requests_with_the_providers_wish(bench: Bench, stream: bool) -> None:
    bench.behave(fault="429", retry_after=7)
    assert await refused_with(bench, bench.call(stream)) == (429, 7.0)
    assert len(bench.running.app.log) == 1  # the wire does not try again


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 500, 503])
async def test_other_statuses(bench: Bench, status: int) -> None:
    bench.behave(fault=str(status), retry_after="none")
    assert await refused_with(bench, bench.call()) == (status, None)
    assert len(bench.running.app.log) == 1


async def test_a_refused_connection(bench: Bench) -> None:
    call = bench.call()
    await bench.running.close()
    with pytest.raises(UpstreamError) as caught:
        await bench.upstream.send(call)
    assert caught.value.kind == "connect"
    assert KEY not in str(caught.value)


async def test_a_redirect_is_not_followed(bench: Bench) -> None:
    bench.behave(fault="redirect")
    with pytest.raises(UpstreamError) as caught:
        await bench.upstream.send(bench.call())
    assert caught.value.kind in ("protocol", "status")
    assert len(bench.running.app.log) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_connection_that_breaks_before_the_answer_is_not_tried_again(
    bench: Bench, stream: bool
) -> None:
    await read(await bench.upstream.send(bench.call()))  # so that the next call finds a kept connection
    bench.behave(fault="disconnect")
    with pytest.raises(UpstreamError) as caught:
        await bench.upstream.send(bench.call(stream))
    assert caught.value.kind in ("protocol", "cut")
    assert len(bench.running.app.log) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_cancelled_before_its_answer_ends_upstream(bench: Bench, stream: bool) -> None:
    bench.behave(fault="stall")
    task = asyncio.ensure_future(bench.upstream.send(bench.call(stream)))
    await bench.arrived()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    started = asyncio.get_running_loop().time()
    call = await bench.last_call()
    assert call.client_left
    assert asyncio.get_running_loop().time() - started < 1


async def test_closing_a_stream_early_ends_it_upstream(bench: Bench) -> None:
    bench.behave(tps=20, typical=400)
    reply = await bench.upstream.send(bench.call(stream=True))
    async for chunk in reply.chunks():
        assert chunk.startswith(b"data: ")
        break
    reply.close()
    reply.close()
    started = asyncio.get_running_loop().time()
    call = await bench.last_call()
    assert call.client_left
    assert not call.complete
    assert asyncio.get_running_loop().time() - started < 1


async def test_a_stall_after_the_headers_can_be_left(bench: Bench) -> None:
    bench.behave(fault="stall_after_headers")

    async def first_chunk() -> bytes:
        reply = await bench.upstream.send(bench.call(stream=True))
        try:
            async for chunk in reply.chunks():
                return chunk
        finally:
            reply.close()
        return b""

    task = asyncio.ensure_future(first_chunk())
    await bench.arrived()
    await asyncio.sleep(0.3)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await bench.last_call()).client_left


async def test_an_error_as_first_event_is_no_answer(bench: Bench) -> None:
    bench.behave(fault="error_first")
    tap = StreamTap(client_wants_usage=True)
    raised: list[UpstreamError] = []
    try:
        reply = await bench.upstream.send(bench.call(stream=True))
        async for chunk in reply.chunks():
            tap.feed(chunk)
    except UpstreamError as error:
        raised.append(error)
    assert not tap.complete
    if bench.wire == "litellm":
        assert "Simulated" not in raised[0].detail
    else:
        assert tap.error is not None
        assert tap.error.first


async def test_many_calls_at_once_are_kept_apart(bench: Bench) -> None:
    async def one(number: int) -> bool:
        call = replace(bench.call(n=number % 3 + 1), request_id=f"req-{number}")
        facts = complete_answer(await read(await bench.upstream.send(call)))
        return facts is not None and len(facts.finish_reasons) == number % 3 + 1

    assert all(await asyncio.gather(*(one(number) for number in range(20))))
