"""Running the plan: what is retried, what is not, what the caller hears, and what is booked."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import pytest

from router.core.errors import (
    BudgetExceeded,
    ContextExceeded,
    InvalidRequest,
    Overloaded,
    RateLimited,
    RequestError,
    UnavailableError,
    UpstreamFailed,
    UpstreamRejected,
    UpstreamTimedOut,
)
from router.core.tokens import estimate_tokens
from router.core.types import AttemptRecord, RequestRecord, Usage
from router.stages.dispatch import RetryBudget
from router.stages.flight import AHEAD
from tests.unit.pipeline_parts import (
    DONE,
    GOOD_ANSWER,
    GOOD_STREAM,
    POLICY,
    PROVIDERS,
    USAGE,
    Rig,
    Script,
    chunk,
    events,
    eventually,
    failure,
)
from tests.values import replace

HI = [{"role": "user", "content": "hi"}]
RENAMING = PROVIDERS.replace(
    "max_tokens: max_completion_tokens",
    "max_tokens: max_completion_tokens, old: new, older: new, here: there, there: elsewhere, elsewhere: here",
)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fault",
    [
        failure("connect"),
        failure("timeout"),
        failure("protocol"),
        Script(b"{}", status=500),
        Script(b"{}", status=401),
        Script(b"{}", status=402),
        Script(b"{}", status=403),
        Script(b"{}", status=404),
        Script(b"{}", status=429),
        Script(b'{"error":{"code":"insufficient_quota"}}', status=429),
        Script(b"", status=302),
        Script(b"<html>"),
        Script(b"data: " + b'{"error":{"message":"x","code":500}}' + b"\n\n"),
        Script(DONE),
    ],
    ids=lambda fault: getattr(fault, "kind", None) or f"{fault.status} {fault.parts[0][:12]!r}",
)
async def test_what_fails_before_the_first_byte_is_answered_by_the_next(stream: bool, fault: Any) -> None:
    rig = Rig()
    rig.wire.scripts["first"] = [fault]
    body = await rig.ask(stream=stream)
    assert b"Hello" in body
    assert [call.model.name for call in rig.wire.calls] == ["first", "second"]
    record = rig.record
    assert (record.status, record.served_model) == ("complete", "second")
    assert [a.outcome for a in record.attempts][-1] == "complete"
    assert record.cost == sum(a.cost or 0 for a in record.attempts)
    assert record.overhead == sum(a.cost or 0 for a in record.attempts[:-1])
    assert all(reply.closed for reply in rig.wire.replies)


@pytest.mark.parametrize(
    ("fault", "told", "retry"),
    [
        (Script(b"{}", status=500), UpstreamFailed, False),
        (Script(b"Incorrect API key", status=401), UpstreamFailed, False),
        (Script(b"{}", status=402), UpstreamFailed, False),
        (Script(b"{}", status=403), UpstreamFailed, False),
        (Script(b'{"error":{"code":"insufficient_quota"}}', status=429), UpstreamFailed, False),
        (Script(b"{}", status=429, retry_after="7"), RateLimited, True),
        (failure("timeout"), UpstreamTimedOut, False),
        (Script(b'{"error":{"message":"bad"}}', status=400), UpstreamRejected, False),
        (Script(b'{"error":{"message":"bad"}}', status=422), UpstreamRejected, False),
        (Script(b'{"error":{"code":"context_length_exceeded"}}', status=400), ContextExceeded, False),
    ],
)
async def test_what_the_caller_hears_when_nobody_is_left(
    fault: Any, told: type[RequestError], retry: bool
) -> None:
    rig = Rig()
    rig.wire.scripts["first"] = [fault]
    with pytest.raises(told) as caught:
        await rig.ask("alone")
    assert type(caught.value) is told
    assert caught.value.retry is retry
    assert "API key" not in caught.value.message
    assert rig.record.status == "failed"
    assert rig.record.http_status == caught.value.status
    assert await rig.held() == 0
    assert len(rig.wire.calls) <= 3


async def test_a_retry_after_is_told_and_not_waited_for_when_long() -> None:
    rig = Rig()
    rig.wire.scripts["first"] = [Script(b"{}", status=429, retry_after="7")]
    with pytest.raises(RateLimited) as caught:
        await rig.ask("alone")
    assert caught.value.retry_after == 7
    assert len(rig.wire.calls) == 1


async def test_a_retry_after_may_be_a_date() -> None:
    rig = Rig()  # its clock stands at 2026-11-01 00:00
    rig.wire.scripts["first"] = [
        Script(b"{}", status=429, retry_after="Sun, 01 Nov 2026 00:00:00 GMT"),
        Script(b"{}", status=429, retry_after="Sun, 01 Nov 2026 00:00:09 GMT"),
    ]
    with pytest.raises(RateLimited) as caught:
        await rig.ask("alone")
    assert caught.value.retry_after == 9
    assert len(rig.wire.calls) == 2, "a moment that has passed is not waited for"


async def test_a_passing_fault_of_the_only_model_is_tried_again() -> None:
    rig = Rig()
    rig.wire.scripts["first"] = [Script(b"{}", status=503, retry_after="0"), Script(*GOOD_STREAM)]
    assert b"there" in await rig.ask("alone", stream=True)
    assert [a.outcome for a in rig.record.attempts] == ["failed", "complete"]


async def test_a_rejected_request_is_not_tried_elsewhere_when_named() -> None:
    rig = Rig()
    rig.wire.scripts["first"] = [Script(b'{"error":{"message":"bad"}}', status=400)]
    with pytest.raises(UpstreamRejected) as caught:
        await rig.ask()
    assert caught.value.body == b'{"error":{"message":"bad"}}'
    assert len(rig.wire.calls) == 1
    assert rig.record.cost == 0


# -- streams that break --


@pytest.mark.parametrize(
    "end",
    [
        (),
        (failure("cut"),),
        (b'data: {"error":{"message":"secret text","code":500}}\n\n',),
        (b"data: {half",),
        (DONE,),
        (1.0,),
    ],
    ids=["ends", "is cut", "error event", "half an event", "[DONE] without a finish_reason", "falls silent"],
)
async def test_a_stream_that_breaks_says_so_and_is_an_estimate(end: tuple[Any, ...]) -> None:
    rig = Rig()
    rig.wire.scripts["first"] = [Script(chunk("Hello"), chunk(" there"), *end)]
    told = events(await rig.ask(stream=True))
    assert json.loads(told[0])["choices"][0]["delta"]["content"] == "Hello"
    assert set(json.loads(told[-1])["error"]) == {"message", "type", "param", "code"}
    assert "[DONE]" not in told
    assert "secret text" not in str(told)
    record = rig.record
    assert (record.status, record.estimated, record.http_status) == ("cut", True, 200)
    assert record.cost is not None
    assert record.cost > 0
    assert len(rig.wire.calls) == 1


async def test_what_came_with_the_error_in_one_piece_is_passed_on() -> None:
    rig = Rig()
    last = chunk(" there") + b'data: {"error":{"message":"x"}}\n\n'
    rig.wire.scripts["first"] = [Script(chunk("Hello"), last)]
    told = events(await rig.ask(stream=True))
    assert [json.loads(event)["choices"][0]["delta"]["content"] for event in told[:-1]] == ["Hello", " there"]


async def test_usage_of_a_cut_stream_is_taken_where_it_was_reported() -> None:
    rig = Rig()
    usage = {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11}
    rig.wire.scripts["first"] = [Script(chunk("Hello"), chunk(usage=usage))]
    await rig.ask(stream=True)
    assert (rig.record.status, rig.record.usage.output) == ("cut", 1)


def _metered(text: str, completion: int) -> bytes:
    said = json.loads(chunk(text)[6:])
    said["usage"] = {"prompt_tokens": 10, "completion_tokens": completion}
    return b"data: " + json.dumps(said).encode() + b"\n\n"


@pytest.mark.parametrize(
    ("parts", "output", "estimated"),
    [
        ((_metered("Hello", 1), _metered(" there", 7)), 7, True),
        ((_metered("Hello", 1), chunk(" and much more"), failure("cut")), 1 + 4, True),
        ((_metered("Hello", 1), chunk(" and much more"), chunk(finish="stop"), DONE), 1 + 4, True),
        ((_metered("Hello", 1), _metered(" there", 7), chunk(finish="stop"), DONE), 7, False),
        ((chunk("Hello"), chunk(finish="stop"), chunk(usage=USAGE), failure("cut")), 2, False),
    ],
)
async def test_usage_so_far_is_an_estimate(parts: tuple[Any, ...], output: int, estimated: bool) -> None:
    rig = Rig()
    rig.wire.scripts["first"] = [Script(*parts)]
    await rig.ask(stream=True)
    assert (rig.record.usage.output, rig.record.estimated) == (output, estimated)


async def test_usage_so_far_of_a_stream_that_is_left_is_an_estimate() -> None:
    rig = Rig()
    rig.wire.scripts["first"] = [Script(_metered("Hello", 1), _metered(" there", 7), 2.0, *GOOD_STREAM)]
    async with rig.pipeline.answer(rig.inbound(stream=True)) as answer:
        await anext(answer.frames)
        await anext(answer.frames)
    await eventually(lambda: rig.journal.settled)
    assert (rig.record.status, rig.record.usage.output, rig.record.estimated) == ("cancelled", 7, True)


async def test_a_stalled_provider_is_left_in_time() -> None:
    rig = Rig()
    rig.wire.scripts["first"] = [Script(2.0, *GOOD_STREAM)]
    began = asyncio.get_running_loop().time()
    assert b"there" in await rig.ask(stream=True)
    assert asyncio.get_running_loop().time() - began < 1.0
    assert [a.outcome for a in rig.record.attempts] == ["timeout", "complete"]


async def test_a_slow_reader_is_not_a_slow_provider() -> None:
    rig = Rig()
    big = chunk("x" * (AHEAD // 2))
    rig.wire.scripts["first"] = [Script(big, big, big, big, *GOOD_STREAM)]
    async with rig.pipeline.answer(rig.inbound(stream=True)) as answer:
        frames = answer.frames
        first = await anext(frames)
        await asyncio.sleep(0.6)  # twice what the provider may be silent for
        rest = b"".join([frame async for frame in frames])
    assert (first + rest).endswith(DONE)
    assert rig.record.status == "complete"


async def test_a_reader_that_stops_is_no_fault_of_the_provider() -> None:
    rig = Rig(PROVIDERS.replace("total: 5s", "total: 300ms"))
    big = chunk("x" * AHEAD)
    rig.wire.scripts["first"] = [Script(big, big, big, *GOOD_STREAM)]
    for _ in range(8):
        async with rig.pipeline.answer(rig.inbound(stream=True)) as answer:
            first = await anext(answer.frames)
            await asyncio.sleep(0.4)
            rest = [frame async for frame in answer.frames]
        assert first == big
        assert json.loads(events(rest[-1])[0])["error"]["code"] == "read_timeout"
    assert {(r.status, r.error) for r in rig.journal.settled} == {("cut", "reader")}
    assert rig.health.status("one", "first", rig.clock.monotonic()).available
    rig.wire.scripts["first"] = [Script(big, big, 2.0, *GOOD_STREAM)]
    async with rig.pipeline.answer(rig.inbound(stream=True)) as answer:
        assert len([frame async for frame in answer.frames]) == 3
    assert rig.journal.settled[-1].error == "timeout", "it was read, and the provider was silent"


async def test_a_reader_that_stops_stops_the_provider() -> None:
    rig = Rig()
    big = chunk("x" * 50_000)
    rig.wire.scripts["first"] = [Script(*([big] * 60), *GOOD_STREAM)]
    async with rig.pipeline.answer(rig.inbound(stream=True)) as answer:
        await anext(answer.frames)
        await asyncio.sleep(0.05)
        (flight,) = rig.flights._flights.values()
        assert flight._produced < AHEAD + 3 * len(big)
    await eventually(lambda: rig.journal.settled)


# -- what is sent --


async def test_the_body_carries_the_upstreams_names() -> None:
    rig = Rig()
    await rig.ask(stream=True, max_tokens=7, temperature=0.2)
    sent = json.loads(rig.wire.calls[0].body)
    assert sent == {
        "model": "first-1",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "max_completion_tokens": 7,
        "temperature": 0.2,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        ('"max_tokens":null,"max_completion_tokens":50', {"max_completion_tokens": 50}),
        ('"max_completion_tokens":50,"max_tokens":null', {"max_completion_tokens": 50}),
        ('"max_tokens":50,"max_completion_tokens":null', {"max_completion_tokens": 50}),
        ('"max_completion_tokens":null,"max_tokens":50', {"max_completion_tokens": 50}),
        ('"max_tokens":null,"max_completion_tokens":null', {"max_completion_tokens": None}),
        ('"old":[1],"new":[1]', {"new": [1]}),
        ('"old":1,"older":1', {"new": 1}),
        ('"old":null,"older":1,"new":null', {"new": 1}),
        ('"here":1,"there":2,"elsewhere":3', {"there": 1, "elsewhere": 2, "here": 3}),
    ],
)
async def test_a_field_that_is_renamed_is_sent_once(body: str, sent: dict[str, Any]) -> None:
    rig = Rig(RENAMING)
    inbound = replace(rig.inbound(), body=f'{{"model":"first","messages":{json.dumps(HI)},{body}}}'.encode())
    async with rig.pipeline.answer(inbound):
        pass
    pairs = json.loads(rig.wire.calls[0].body, object_pairs_hook=list)
    assert sorted(pairs[2:]) == sorted((k, v) for k, v in sent.items())


async def test_two_values_for_one_field_are_refused() -> None:
    rig = Rig(RENAMING)
    with pytest.raises(InvalidRequest, match="'older' and 'old'") as caught:
        await rig.ask(old=1, older=True)
    assert caught.value.status == 400
    assert rig.wire.calls == []
    assert await rig.held() == 0


async def test_a_body_goes_on_as_it_was_written() -> None:
    rig = Rig(RENAMING)
    options = '{ "x" : [1e999, 1.50], "y":"\\ud800", "include_usage" : null }'
    body = (
        f'{{"model":"first","messages":{json.dumps(HI)},"stream":true,"stream_options":{options},"z":-1e400}}'
    )
    inbound = replace(rig.inbound(), body=body.encode())
    async with rig.pipeline.answer(inbound) as answer:
        assert len([frame async for frame in answer.frames]) == 4
    expected = body.replace('"first"', '"first-1"').replace(
        '"include_usage" : null', '"include_usage" : true'
    )
    assert rig.wire.calls[0].body == expected.encode()


@pytest.mark.parametrize("options", [None, {}])
async def test_usage_is_asked_for_where_there_are_no_options(options: dict[str, Any] | None) -> None:
    rig = Rig()
    await rig.ask(stream=True, stream_options=options)
    assert json.loads(rig.wire.calls[0].body)["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("asked", [False, True])
async def test_usage_frames_go_to_those_who_asked(asked: bool) -> None:
    rig = Rig()
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if asked else {}
    told = events(await rig.ask(stream=True, **options))
    assert any(event != "[DONE]" and json.loads(event)["usage"] for event in told) is asked
    assert rig.record.usage.output == 2
    assert not rig.record.estimated


@pytest.mark.parametrize("choices", ['"choices": [ ],', '"choices":null,', ""])
@pytest.mark.parametrize("asked", [False, True])
async def test_usage_without_choices_goes_to_those_who_asked(asked: bool, choices: str) -> None:
    rig = Rig()
    last = f'data: {{"id":"c",{choices}"usage":{json.dumps(USAGE)}}}\n\n'.encode()
    text = chunk('{"usage":{"a":1},"choices":[]}')
    rig.wire.scripts["first"] = [Script(chunk("Hello"), text, chunk(finish="stop") + last, DONE)]
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if asked else {}
    told = await rig.ask(stream=True, **options)
    assert told.count(last) == asked
    assert told.count(text) == 1
    assert rig.record.usage.output == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chinese_answer_without_usage_is_estimated_as_a_chinese_prompt(stream: bool) -> None:
    rig = Rig()
    text = "今天天气很好。" * 40
    answer = json.loads(GOOD_ANSWER)
    answer["choices"][0]["message"]["content"] = text
    del answer["usage"]
    parts = [chunk(text), chunk(finish="stop"), DONE] if stream else [json.dumps(answer).encode()]
    rig.wire.scripts["first"] = [Script(*parts)]
    await rig.ask(stream=stream)
    assert (rig.record.usage.output, rig.record.estimated) == (estimate_tokens(text), True)


@pytest.mark.parametrize(
    ("usage", "booked"),
    [
        ({"total_tokens": 150}, Usage(input=5, output=3)),
        ({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, Usage(input=5, output=3)),
        ({"prompt_tokens": 10, "completion_tokens": 0}, Usage(input=10, output=3)),
        ({"prompt_tokens": 0, "completion_tokens": 4}, Usage(input=5, output=4)),
        ({"prompt_tokens": "10", "completion_tokens": None}, Usage(input=5, output=3)),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_usage_leaves_out_of_an_answer_is_estimated(
    stream: bool, usage: dict[str, Any], booked: Usage
) -> None:
    rig = Rig()
    answer = json.dumps({**json.loads(GOOD_ANSWER), "usage": usage}).encode()
    parts = [*GOOD_STREAM[:3], chunk(usage=usage), DONE] if stream else [answer]
    rig.wire.scripts["first"] = [Script(*parts)]
    await rig.ask(stream=stream)
    assert (rig.record.usage, rig.record.estimated) == (booked, True)


# -- money --


async def test_a_stream_that_outgrows_its_hold_extends_it_or_ends() -> None:
    rig = Rig()
    # 0.01 USD is 2,500 output tokens of `first`; the hold covers one answer of 1,000.
    rig.wire.scripts["first"] = [Script(*(chunk("x") for _ in range(4_000)), *GOOD_STREAM)]
    told = events(await rig.ask("capped", stream=True, max_tokens=1_000))
    assert json.loads(told[-1])["error"]["code"] == "budget_exceeded"
    assert (rig.record.status, rig.record.error) == ("cut", "budget")
    assert rig.record.worst_case <= 10_000_000
    assert await rig.held() == 0
    assert not rig.health._breakers, "the provider did nothing wrong"


async def test_a_stream_of_few_large_frames_outgrows_its_hold_too() -> None:
    rig = Rig()
    # The hold covers 1,000 tokens; 30 frames of 400 characters are about 3,000.
    rig.wire.scripts["first"] = [Script(*(chunk("word " * 80) for _ in range(30)), *GOOD_STREAM)]
    told = events(await rig.ask("capped", stream=True))
    assert json.loads(told[-1])["error"]["code"] == "budget_exceeded"
    assert await rig.held() == 0


async def test_another_attempt_needs_its_own_money() -> None:
    rig = Rig(policy=POLICY.replace("hard_cap: 0.01 }, fallback: []", "hard_cap: 0.01 }, fallback: [second]"))
    rig.wire.scripts["first"] = [Script(b"{}", status=500)]
    with pytest.raises(UpstreamFailed):
        await rig.ask("capped", max_tokens=1_000)  # 0.0042 held; the second model's 0.0084 do not fit
    assert [call.model.name for call in rig.wire.calls] == ["first"]
    assert await rig.held() == 0


async def test_a_fallback_that_cannot_be_afforded_is_passed_over() -> None:
    third = (
        "  third: { provider: two, name: third-1, context: 10000, max_output: 1000, "
        'price: { input: "0.1", output: "0.4" } }\n'
    )
    text = POLICY.replace("[first, second]", "[first, second, third]")
    text = text.replace("hard_cap: 0.01 }, fallback: []", "hard_cap: 0.01 }, fallback: [second, third]")
    rig = Rig(providers=PROVIDERS + third, policy=text)
    rig.wire.scripts["first"] = [Script(b"{}", status=500)]
    await rig.ask("capped", max_tokens=1_000)
    assert [call.model.name for call in rig.wire.calls] == ["first", "third"]
    assert rig.record.served_model == "third"
    assert await rig.held() == 0


async def test_a_request_that_cannot_be_afforded_calls_nobody() -> None:
    rig = Rig(policy=POLICY.replace("0.01", "0.001"))
    with pytest.raises(BudgetExceeded):
        await rig.ask("capped", max_tokens=1_000)
    assert rig.wire.calls == []
    assert rig.journal.opened == []
    assert rig.journal.settled == []


async def test_no_provider_is_called_where_the_journal_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()

    def full(record: AttemptRecord) -> None:
        raise UnavailableError("the disk is full")

    monkeypatch.setattr(rig.journal, "attempt", full)
    with pytest.raises(Overloaded):
        await rig.ask("capped", max_tokens=100)
    assert rig.wire.calls == []
    assert rig.journal.settled == [], "it was not admitted: it is no row, and nothing waits for the disk"
    assert await rig.held() == 0


async def test_what_a_provider_was_paid_for_is_booked_where_the_journal_fills_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig()
    rig.wire.scripts["first"] = [Script(b"{}", status=500)]
    attempt = rig.journal.attempt

    def full(record: AttemptRecord) -> None:
        if record.index:
            raise UnavailableError("the disk is full")
        attempt(record)

    monkeypatch.setattr(rig.journal, "attempt", full)
    with pytest.raises(Overloaded):
        await rig.ask("capped", max_tokens=100)
    assert [call.model.name for call in rig.wire.calls] == ["first"]
    assert (rig.record.http_status, len(rig.record.attempts)) == (503, 1)
    assert await rig.held() == 0


async def test_a_request_of_which_nothing_can_be_learned_is_booked(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()

    def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(rig.pipeline.learn, "note_answer", broken)
    await rig.ask("capped", max_tokens=100)
    assert rig.record.status == "complete"
    assert await rig.held() == 0


async def test_the_journal_knows_a_request_before_the_provider_does() -> None:
    rig = Rig()
    seen: list[tuple[int, int]] = []
    send = rig.wire.send

    async def watched(call: Any) -> Any:
        seen.append((len(rig.journal.opened), len(rig.journal.attempts)))
        return await send(call)

    rig.wire.send = watched  # type: ignore[method-assign]
    await rig.ask()
    assert seen == [(1, 1)]
    assert len(rig.journal.settled) == 1


async def test_a_healthy_fallback_answers_however_often_the_first_provider_fails() -> None:
    rig = Rig()
    bad, good = Script(b"{}", status=500), Script(GOOD_ANSWER)
    rig.wire.scripts["first"] = [bad, good, bad, good, good] * 30
    for number in range(150):
        assert await rig.ask(messages=[{"role": "user", "content": f"question {number}"}]) == GOOD_ANSWER
    assert [call.model.name for call in rig.wire.calls].count("second") == 60


def test_retries_stay_within_their_share() -> None:
    budget = RetryBudget(share=0.2, burst=5)
    assert sum(budget.take() for _ in range(20)) == 5
    taken = 0
    for _ in range(1_000):
        budget.request()
        taken += budget.take()
    assert 195 <= taken <= 205


# -- what is known of answers nobody saw --

_LIVE = PROVIDERS.replace(
    "second-1, context: 10000,",
    "second-1, expect: { first_token: 2s, tokens_per_second: 50 }, context: 10000,",
)


async def _left(rig: Rig, seconds: float, team: str = "search", **fields: Any) -> RequestRecord:
    """The row of a JSON call whose client leaves after so long."""
    rig.wire.scripts = {"first": [Script(4.0, GOOD_ANSWER)], "second": [Script(4.0, GOOD_ANSWER)]}
    asking = asyncio.create_task(rig.ask(team, **fields))
    await eventually(lambda: rig.wire.replies)
    rig.clock.advance(seconds)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    record = await eventually(lambda: rig.journal.settled and rig.journal.settled[0])
    assert (record.status, record.estimated) == ("cancelled", True)
    assert record.attempts[0].outcome == "cancelled"
    return cast(RequestRecord, record)


@pytest.mark.parametrize(
    ("model", "fields", "seconds", "measured", "output"),
    [
        ("first", {}, 0.0, None, 0),
        ("first", {}, 1.5, None, 150),  # nothing is known: 100 a second from the start
        ("first", {"n": 4}, 1.5, None, 600),
        ("first", {}, 1.5, 40, 60),
        ("second", {}, 10.0, None, 400),  # expect: 2 s, then 50 a second
        ("second", {}, 6.0, 80, 320),
        ("second", {}, 1.0, None, 36),  # before its end: the forecast's share, 256 tokens in 7.12 s
        ("first", {"n": 2, "max_tokens": 70}, 3.0, None, 140),  # what was held
        ("first", {}, 900.0, None, 1000),
    ],
)
async def test_a_json_answer_nobody_waited_for_is_booked_by_its_time(
    model: str, fields: dict[str, Any], seconds: float, measured: int | None, output: int
) -> None:
    rig = Rig(providers=_LIVE)
    if measured is not None:
        rig.health.rate(model, measured, 1.0)
    record = await _left(rig, seconds, model=model, **fields)
    assert record.usage.output == output
    assert rig.journal.opened[0].output_tokens == 256 * fields.get("n", 1)  # were this process to die
    assert record.cost is not None
    assert record.cost <= record.worst_case
    assert await rig.held() == 0


async def test_short_timeouts_of_a_client_spend_a_hard_cap() -> None:
    rig = Rig()
    record = await _left(rig, 5.0, "capped", max_tokens=1_000)  # 500 tokens of 4 USD a million
    assert record.usage.output == 500
    spent = await rig.budgets.readings(record.budgets)
    assert [reading.spent for reading in spent if reading.window.key == "team:capped"] == [record.cost]
    assert (record.cost or 0) >= 2_000_000


async def test_a_json_answer_that_is_late_is_booked_too() -> None:
    rig = Rig(providers=PROVIDERS.replace("total: 5s", "total: 200ms"))
    rig.wire.scripts["first"] = [Script(4.0, GOOD_ANSWER)]
    asking = asyncio.create_task(rig.ask())
    await eventually(lambda: rig.wire.replies)
    rig.clock.advance(3.0)
    await asking
    late, _ = rig.record.attempts
    assert (late.outcome, late.estimated, late.usage.output) == ("timeout", True, 300)
    assert rig.record.overhead == late.cost


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion", "details", "expected"),
    [
        (10, 10**9, {}, Usage(input=10, output=2_000)),
        (10**9, 2, {"prompt_tokens_details": {"cached_tokens": 7}}, Usage(9_993, 7, output=2)),
        (
            10,
            9_000,
            {"completion_tokens_details": {"reasoning_tokens": 8_990}},
            Usage(10, output_reasoning=2_000),
        ),
        (12_000, 2, {}, Usage(input=10_000, output=2)),
        (10_000, 2_000, {}, None),
    ],
)
async def test_usage_beyond_what_is_possible_is_bounded_and_flagged(
    stream: bool, prompt: int, completion: int, details: dict[str, Any], expected: Usage | None
) -> None:
    rig = Rig()
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, **details}
    answer = {**json.loads(GOOD_ANSWER), "usage": usage}
    frames = (*GOOD_STREAM[:3], chunk(usage=usage), DONE)
    rig.wire.scripts["first"] = [Script(*frames) if stream else Script(json.dumps(answer).encode())]
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream else {}
    body = await rig.ask(stream=stream, n=2, **options)
    assert str(completion).encode() in body, "the caller gets what the provider said"
    assert rig.record.usage == (expected or Usage(input=prompt, output=completion))
    assert rig.record.estimated is (expected is not None)
    assert rig.record.status == "complete"


async def test_bounded_usage_of_an_answer_of_no_use_is_flagged_too() -> None:
    rig = Rig()
    usage = {"prompt_tokens": 10, "completion_tokens": 10**9}
    rig.wire.scripts["first"] = [Script(json.dumps({"choices": [], "usage": usage}).encode())]
    await rig.ask()
    useless, _ = rig.record.attempts
    assert (useless.usage, useless.estimated) == (Usage(input=10, output=1_000), True)


async def test_more_than_a_model_is_said_to_write_is_booked_where_it_came() -> None:
    rig = Rig()
    usage = {"prompt_tokens": 10, "completion_tokens": 1_500}
    rig.wire.scripts["first"] = [
        Script(chunk("word " * 1_500), chunk(finish="stop"), chunk(usage=usage), DONE)
    ]
    await rig.ask(stream=True)
    assert (rig.record.usage.output, rig.record.estimated) == (1_500, False)


# -- latency --


async def test_a_long_json_answer_is_no_slow_start() -> None:
    rig = Rig()
    for number in range(6):
        await rig.ask(messages=[{"role": "user", "content": f"{number}"}])
    assert rig.health.status("one", "first", 1.0).first_token_p95 is None, "no rate is known"
    rig.health.rate("first", 100, 1.0)
    for number in range(6, 12):
        await rig.ask(messages=[{"role": "user", "content": f"{number}"}])
    assert rig.health.status("one", "first", 1.0).first_token_p95 is not None


async def test_choices_written_side_by_side_are_no_faster_model() -> None:
    rig = Rig()
    usage = {"prompt_tokens": 10, "completion_tokens": 400}
    rig.wire.scripts["first"] = [Script(chunk("Hello"), 0.2, chunk(finish="stop"), chunk(usage=usage), DONE)]
    asking = asyncio.create_task(rig.ask(stream=True, n=4))
    await eventually(lambda: rig.wire.replies)
    await asyncio.sleep(0.05)
    rig.clock.advance(2.0)
    await asking
    assert rig.health.tokens_per_second("first") == 50


async def test_a_stream_tells_its_first_token() -> None:
    rig = Rig()
    for number in range(6):
        await rig.ask(stream=True, messages=[{"role": "user", "content": f"{number}"}])
    assert rig.health.status("one", "first", 1.0).first_token_p95 == 0.0
