"""Usage, ends and errors are read from the bytes that pass; the bytes stay as they are."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.openai_wire import (
    StreamTap,
    complete_answer,
    error_frame,
    json_to_sse,
    read_usage,
    retry_after,
    sse_to_json,
)
from router.core.tokens import estimate_tokens
from router.core.types import Usage

DONE = b"data: [DONE]\n\n"


def frame(payload: object, **dumps: Any) -> bytes:
    return b"data: " + json.dumps(payload, **dumps).encode() + b"\n\n"


def chunk(delta: object = None, finish: str | None = None, index: int = 0, **top: object) -> bytes:
    choice = {"index": index, "delta": delta or {}, "logprobs": None, "finish_reason": finish}
    payload = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return frame({**payload, **top}, separators=(",", ":"))


USAGE = {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}
USAGE_FRAME = frame({"id": "c1", "object": "chat.completion.chunk", "choices": [], "usage": USAGE})
STREAM = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"content": "Hä"}),
    chunk({"content": '"no"\n'}),
    chunk({}, "stop"),
    USAGE_FRAME,
    DONE,
]


# ---- usage ----


def test_usage_is_taken_apart_into_disjoint_buckets() -> None:
    raw = {
        "prompt_tokens": 1000,
        "completion_tokens": 300,
        "total_tokens": 1300,
        "prompt_tokens_details": {
            "cached_tokens": 600,
            "cache_write_tokens": 50,
            "audio_tokens": 40,
            "image_tokens": 10,
        },
        "completion_tokens_details": {"reasoning_tokens": 200, "audio_tokens": 30},
    }
    usage = Usage(300, 600, 50, 40, 10, 70, 200, 30)
    assert read_usage(raw) == (usage, False)
    assert (usage.input_total, usage.output_total) == (1000, 300)


def test_usage_of_the_responses_api_and_of_deepseek() -> None:
    responses = {
        "input_tokens": 5,
        "output_tokens": 7,
        "input_tokens_details": {"cached_tokens": 2},
        "output_tokens_details": {"reasoning_tokens": 3},
    }
    assert read_usage(responses) == (Usage(input=3, input_cached=2, output=4, output_reasoning=3), False)
    deepseek = {"prompt_tokens": 9, "prompt_cache_hit_tokens": 4}
    assert read_usage(deepseek) == (Usage(input=5, input_cached=4), False)


def test_reasoning_on_top_of_the_completion_is_added_where_the_total_proves_it() -> None:
    raw = {
        "prompt_tokens": 10,
        "completion_tokens": 9,
        "total_tokens": 319,
        "completion_tokens_details": {"reasoning_tokens": 300},
    }
    assert read_usage(raw) == (Usage(input=10, output=9, output_reasoning=300), False)


def counts_of(prompt: object, completion: object, total: object, reasoning: object = None) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": total,
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


@pytest.mark.parametrize(
    ("raw", "usage", "doubted"),
    [
        (counts_of(10, 9, 319), Usage(input=10, output=9, output_reasoning=300), False),
        (counts_of(10, 0, 310), Usage(input=10, output_reasoning=300), False),
        (counts_of(10, 9, 319, 100), Usage(input=10, output_reasoning=309), True),
        (counts_of(10, 200, 510, 100), Usage(input=10, output=100, output_reasoning=400), True),
        (counts_of(10, 9, 15), Usage(input=10, output=9), False),
        (counts_of(10, 9, 10**12), Usage(input=10, output=9), True),
        (counts_of(10, None, 60), Usage(input=10, output=50), True),
        (counts_of(None, 10, 60), Usage(input=50, output=10), True),
        (counts_of(5, None, 5), Usage(input=5), False),
    ],
)
def test_what_the_total_holds_beyond_the_two_is_booked(
    raw: dict[str, Any], usage: Usage, doubted: bool
) -> None:
    assert read_usage(raw) == (usage, doubted)


@pytest.mark.parametrize(
    ("raw", "usage"),
    [
        ({"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 9}}, Usage(input_cached=5)),
        ({"prompt_tokens": -5, "completion_tokens": 2}, Usage(output=2)),
        ({"prompt_tokens": 10**30}, Usage(input=10**9)),
        ({"prompt_tokens": 2.5}, Usage(input=2)),
        (
            {"completion_tokens": 3, "completion_tokens_details": {"reasoning_tokens": 8}},
            Usage(output_reasoning=3),
        ),
    ],
)
def test_contradictions_are_bounded_and_flagged(raw: dict[str, Any], usage: Usage) -> None:
    assert read_usage(raw) == (usage, True)


@pytest.mark.parametrize(
    "raw", [{"prompt_tokens": 0}, {"prompt_tokens": 0, "completion_tokens": 0, "prompt_tokens_details": []}]
)
def test_missing_fields_are_zero(raw: dict[str, Any]) -> None:
    assert read_usage(raw) == (Usage(), False)


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"prompt_tokens": None},
        {"total_tokens": 150},
        {"prompt_tokens": "5", "completion_tokens": True},
        {"prompt_tokens_details": {"cached_tokens": 5}},
    ],
)
def test_usage_without_counts_is_none(raw: dict[str, Any]) -> None:
    assert read_usage(raw)[0] is None
    tap, _ = run([chunk({"content": "a"}, usage=USAGE), chunk({}, "stop", usage=raw), DONE])
    assert tap.usage == Usage(input=10, output=4)


counts = st.one_of(st.integers(-5, 10**12), st.floats(), st.none(), st.booleans(), st.just("7"))


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "prompt_tokens": counts,
            "completion_tokens": counts,
            "total_tokens": counts,
            "prompt_tokens_details": st.fixed_dictionaries(
                {}, optional={"cached_tokens": counts, "audio_tokens": counts, "image_tokens": counts}
            ),
            "completion_tokens_details": st.fixed_dictionaries(
                {}, optional={"reasoning_tokens": counts, "audio_tokens": counts}
            ),
        },
    )
)
def test_no_usage_object_breaks_it_and_parts_never_pass_the_prompt(raw: dict[str, Any]) -> None:
    usage, _ = read_usage(raw)
    if usage is None:
        return
    assert min(usage.quantities()) >= 0
    prompt = raw.get("prompt_tokens")
    if isinstance(prompt, int) and not isinstance(prompt, bool) and 0 <= prompt <= 10**9:
        assert usage.input_total == prompt


# ---- the stream ----


def run(frames: list[bytes], wants_usage: bool = False) -> tuple[StreamTap, bytes]:
    tap = StreamTap(wants_usage)
    out = [piece for data in frames for piece in tap.feed(data)]
    return tap, b"".join(out + tap.finish())


@pytest.mark.parametrize("wants_usage", [True, False])
def test_a_whole_stream(wants_usage: bool) -> None:
    tap, out = run(STREAM, wants_usage)
    expected = STREAM if wants_usage else [f for f in STREAM if f is not USAGE_FRAME]
    assert out == b"".join(expected)
    assert tap.usage == Usage(input=10, output=4)
    assert tap.usage_raw == USAGE
    assert tap.finish_reasons == ("stop",)
    assert (tap.done, tap.complete, tap.error, tap.first_data_seen) == (True, True, None, True)
    assert (tap.content_frames, tap.output_characters) == (2, 2 + 5)


@given(st.data(), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_chunking_and_line_ends_make_no_difference(data: st.DataObject, end: bytes) -> None:
    stream = b"".join(STREAM).replace(b"\n", end)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    tap, out = run([stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)])
    assert out == stream.replace(USAGE_FRAME.replace(b"\n", end), b"")
    assert (tap.complete, tap.done, tap.usage) == (True, True, Usage(input=10, output=4))


def test_frames_with_spaces_after_colons_are_read_the_same() -> None:
    spaced = [f if f in (DONE, USAGE_FRAME) else frame(json.loads(f[6:])) for f in STREAM]
    tap, out = run(spaced, True)
    assert out == b"".join(spaced)
    assert (tap.content_frames, tap.output_characters, tap.finish_reasons) == (2, 7, ("stop",))


def test_usage_in_the_last_chunk_with_choices_is_read_and_passed() -> None:
    last = chunk({}, "length", usage=USAGE)
    tap, out = run([STREAM[0], last, DONE])
    assert out == STREAM[0] + last + DONE
    assert tap.usage == Usage(input=10, output=4)


def test_the_last_usage_wins_and_null_never_does() -> None:
    tap, _ = run(
        [
            chunk({"content": "a"}, usage={"prompt_tokens": 1, "completion_tokens": 1}),
            chunk({"content": "b"}, usage=USAGE),
            chunk({}, "stop", usage=None),
            DONE,
        ]
    )
    assert tap.usage == Usage(input=10, output=4)


def test_usage_of_a_stream_in_progress_is_told_apart() -> None:
    early = {"prompt_tokens": 10, "completion_tokens": 1}
    tap, _ = run([chunk({"content": "a"}, usage=early), chunk({"content": "b"}, usage=USAGE)])
    assert (tap.usage, tap.usage_at_end, tap.unmetered_tokens) == (Usage(input=10, output=4), False, 0)
    tap, _ = run([chunk({"content": "a"}, usage=early), chunk({"content": "four more 世"})])
    assert (tap.usage_at_end, tap.unmetered_tokens) == (False, estimate_tokens("four more 世"))
    for last in (chunk({"content": "b"}, "stop", usage=USAGE), chunk({}, "stop") + USAGE_FRAME):
        tap, _ = run([chunk({"content": "a"}, usage=early), last])
        assert (tap.usage, tap.usage_at_end, tap.unmetered_tokens) == (Usage(input=10, output=4), True, 0)
    tap, _ = run([chunk({}, "stop", usage=early), chunk({}, index=1, usage=USAGE)])
    assert not tap.usage_at_end


def test_an_answer_that_speaks_of_usage_and_errors_is_no_usage_and_no_error() -> None:
    text = 'say {"usage":{"prompt_tokens":9},"error":{"code":1},"finish_reason":"stop"}'
    tap, _ = run([chunk({"content": text}), chunk({"content": "error"})])
    assert (tap.usage, tap.error, tap.complete, tap.finish_reasons) == (None, None, False, (None,))
    assert tap.output_characters == len(text) + 5


@pytest.mark.parametrize("text", ["Hello, wörld. " * 20, "你好,世界。" * 30, "plain", "", "mixed 世界 x"])
@pytest.mark.parametrize("escaped", [False, True])
def test_output_is_estimated_as_input_is(text: str, escaped: bool) -> None:
    tap, _ = run([frame(json.loads(chunk({"content": text})[6:]), ensure_ascii=escaped)])
    assert tap.output_tokens == estimate_tokens(text)
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    facts = complete_answer(json.dumps({"choices": [choice]}, ensure_ascii=escaped).encode())
    assert facts is not None
    assert facts.output_tokens == estimate_tokens(text)


def test_every_choice_must_end() -> None:
    frames = [chunk({"content": "a"}), chunk({"content": "b"}, index=1), chunk({}, "stop")]
    tap, _ = run([*frames, DONE])
    assert (tap.complete, tap.finish_reasons) == (False, ("stop", None))
    tap, _ = run([*frames, chunk({}, "length", index=1)])
    assert (tap.complete, tap.done, tap.finish_reasons) == (True, False, ("stop", "length"))


def test_done_without_a_finish_reason_is_not_complete() -> None:
    tap, _ = run([STREAM[1], DONE])
    assert (tap.done, tap.complete) == (True, False)


def test_tool_calls_count_as_output() -> None:
    call = {"index": 1, "id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    tap, out = run([chunk({"tool_calls": [call]}), chunk({}, "tool_calls")])
    assert tap.output_characters == 7
    assert tap.complete
    assert out == chunk({"tool_calls": [call]}) + chunk({}, "tool_calls")


ERRORS = [
    (frame({"error": {"message": "secret", "type": "server_error", "code": 503}}), 503, "server_error", None),
    (frame({"error": {"message": "x", "code": "rate_limit_exceeded"}}), None, None, "rate_limit_exceeded"),
    (frame({"object": "error", "message": "x", "code": 400}), 400, None, None),
    (b"event: error\n" + frame({"message": "x", "type": "two words"}), None, None, None),
    (frame({"error": "overloaded"}), None, None, None),
    (b"data: {half\n\n", None, None, "malformed_event"),
]


@pytest.mark.parametrize(("event", "status", "kind", "code"), ERRORS)
def test_an_error_as_first_event(
    event: bytes, status: int | None, kind: str | None, code: str | None
) -> None:
    tap, out = run([b": wait\n\n", event, DONE])
    assert out == b": wait\n\n"
    assert tap.error is not None
    assert (tap.error.first, tap.error.status, tap.error.type, tap.error.code) == (True, status, kind, code)
    assert tap.error.frame == event
    assert (tap.first_data_seen, tap.complete, tap.done) == (False, False, False)


@pytest.mark.parametrize("event", [e[0] for e in ERRORS])
def test_an_error_in_the_middle_ends_the_stream(event: bytes) -> None:
    tap, out = run([STREAM[1], event, STREAM[3], DONE])
    assert out == STREAM[1]
    assert tap.error is not None
    assert not tap.error.first
    assert not tap.complete


def test_comments_pass_and_are_no_data() -> None:
    tap, out = run([b": OPENROUTER PROCESSING\n\n", b"data:\n\n", b"event: ping\n\n"])
    assert out == b": OPENROUTER PROCESSING\n\n"
    assert not tap.first_data_seen


@pytest.mark.parametrize("last", [DONE, STREAM[3]])
@pytest.mark.parametrize("missing", [1, 2])
def test_a_missing_blank_line_at_the_end_is_completed(last: bytes, missing: int) -> None:
    tap, out = run([STREAM[1], last[:-missing]])
    assert out == STREAM[1] + last
    assert not tap.truncated


def test_half_an_event_at_the_end_is_held_back() -> None:
    tap, out = run([STREAM[1], STREAM[3], STREAM[4][:-9]])
    assert out == STREAM[1] + STREAM[3]
    assert (tap.truncated, tap.complete) == (True, False)


@pytest.mark.parametrize("body", [b"<html>\n\n<p>Hi</p>\n\n</html>", b'{"choices":[]}', b'{"a":\n\n1}'])
def test_what_is_no_event_stream_gives_nothing(body: bytes) -> None:
    tap, out = run([body])
    assert out == b""
    assert (tap.first_data_seen, tap.truncated, tap.complete) == (False, True, False)


def test_usage_inside_a_choice_is_read() -> None:
    choice = {"index": 0, "delta": {}, "finish_reason": "stop", "usage": USAGE}
    tap, _ = run([frame({"choices": [choice]})])
    assert (tap.usage, tap.complete) == (Usage(input=10, output=4), True)


def test_legacy_completions() -> None:
    tap, _ = run([frame({"choices": [{"index": 0, "text": "abc", "finish_reason": None}]}), DONE])
    assert (tap.output_characters, tap.complete) == (3, False)


# ---- JSON answers ----


def answer(**top: object) -> dict[str, Any]:
    message = {"role": "assistant", "content": "Hi", "refusal": None}
    return {
        "id": "c1",
        "object": "chat.completion",
        "created": 5,
        "model": "m",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
        "system_fingerprint": "fp",
        **top,
    }


def test_facts_of_an_answer() -> None:
    facts = complete_answer(json.dumps(answer()).encode())
    assert facts is not None
    assert (facts.usage, facts.finish_reasons, facts.complete) == (Usage(input=10, output=4), ("stop",), True)
    assert facts.output_characters == 2
    embedding = complete_answer(b'{"object":"list","data":[],"usage":{"prompt_tokens":3}}')
    assert embedding is not None
    assert (embedding.complete, embedding.usage) == (True, Usage(input=3))


@pytest.mark.parametrize("body", [b"", b"[]", b"<html>", b'{"id":', b"[" * 100_000])
def test_no_facts_without_an_object(body: bytes) -> None:
    assert complete_answer(body) is None


@pytest.mark.parametrize(
    "broken",
    [
        {"error": {"message": "x"}},
        {"choices": []},
        {"choices": [{"message": {"content": "x"}}]},
        {"choices": None},
    ],
)
def test_an_answer_without_an_end_is_not_complete(broken: dict[str, Any]) -> None:
    facts = complete_answer(json.dumps(answer(**broken)).encode())
    assert facts is not None
    assert not facts.complete
    assert facts.error is ("error" in broken)


# ---- one form as the other ----

texts = st.text(st.sampled_from('aé😀 "\\\n\r{}:\ud800'), max_size=12)
tool_calls = st.lists(
    st.builds(
        lambda i, n, a: {"id": i, "type": "function", "function": {"name": n, "arguments": a}},
        texts,
        st.sampled_from(["f", "get_weather"]),
        texts,
    ),
    min_size=1,
    max_size=3,
)
token = st.builds(lambda t: {"token": t, "logprob": -0.5, "bytes": None, "top_logprobs": []}, texts)
messages = st.one_of(
    st.builds(lambda c: {"role": "assistant", "content": c, "refusal": None}, texts),
    st.builds(lambda r: {"role": "assistant", "content": None, "refusal": r}, texts),
    st.builds(lambda t: {"role": "assistant", "content": None, "refusal": None, "tool_calls": t}, tool_calls),
    st.builds(lambda c, r: {"role": "assistant", "content": c, "reasoning_content": r}, texts, texts),
)
choices = st.lists(
    st.builds(
        lambda m, t, f: {
            "message": m,
            "logprobs": {"content": t, "refusal": None} if t else None,
            "finish_reason": f,
        },
        messages,
        st.lists(token, max_size=2),
        st.sampled_from(["stop", "length", "tool_calls"]),
    ),
    min_size=1,
    max_size=3,
).map(lambda found: [{"index": n, **choice} for n, choice in enumerate(found)])


@given(choices, st.booleans())
def test_an_answer_survives_both_ways(found: list[dict[str, Any]], include_usage: bool) -> None:
    whole = answer(choices=found)
    stream = json_to_sse(json.dumps(whole).encode(), include_usage)
    tap, out = run([stream], True)
    assert out == stream
    assert tap.complete
    assert tap.done
    if include_usage:
        assert tap.usage == Usage(input=10, output=4)
        assert b'"choices":[],"usage":{' in stream
    else:
        assert b"usage" not in stream.replace(b"usage_", b"")
        del whole["usage"]
    assert json.loads(sse_to_json(stream)) == whole


def test_a_stream_in_many_pieces_becomes_one_answer() -> None:
    call = {"index": 0, "id": "x", "type": "function", "function": {"name": "f", "arguments": ""}}
    more = [{"index": 0, "function": {"arguments": piece}} for piece in ('{"a"', ": 1}")]
    second = {"index": 1, "id": "y", "type": "function", "function": {"name": "g", "arguments": "{}"}}
    stream = b"".join(
        [
            chunk({"role": "assistant", "content": None, "tool_calls": [call]}, obfuscation="zz"),
            *(chunk({"tool_calls": [piece]}) for piece in more),
            chunk({"tool_calls": [second]}),
            chunk({"role": "assistant", "content": "Hel"}, index=1),
            chunk({"content": "lo"}, index=1),
            chunk({}, "tool_calls"),
            chunk({}, "stop", index=1),
            USAGE_FRAME,
            DONE,
        ]
    )
    whole = json.loads(sse_to_json(stream))
    assert whole["object"] == "chat.completion"
    assert whole["usage"] == USAGE
    assert "obfuscation" not in whole
    first, other = whole["choices"]
    assert first["message"]["tool_calls"] == [
        {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"id": "y", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    assert (first["message"]["content"], first["finish_reason"]) == (None, "tool_calls")
    assert (other["message"]["content"], other["finish_reason"]) == ("Hello", "stop")


def test_a_text_completion_survives_both_ways() -> None:
    whole = {
        "id": "c",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "text": "abc", "logprobs": None, "finish_reason": "stop"}],
    }
    assert json.loads(sse_to_json(json_to_sse(json.dumps(whole).encode(), False))) == whole


@pytest.mark.parametrize(
    "stream", [b"", DONE, STREAM[1] + DONE, STREAM[1] + ERRORS[0][0], STREAM[3] + b"data: {half\n\n"]
)
def test_an_incomplete_stream_is_no_answer(stream: bytes) -> None:
    with pytest.raises(ValueError, match="stream"):
        sse_to_json(stream)


def test_what_is_no_answer_is_no_stream() -> None:
    for body in (b"", b"{}", b'{"choices":[]}', b'{"error":{}}'):
        with pytest.raises(ValueError, match="not a chat completion"):
            json_to_sse(body, False)


def test_error_frame_has_all_four_keys() -> None:
    event = error_frame('the provider "broke"', "server_error", "upstream_cut")
    assert event.endswith(b"\n\n")
    assert json.loads(event[6:]) == {
        "error": {
            "message": 'the provider "broke"',
            "type": "server_error",
            "param": None,
            "code": "upstream_cut",
        }
    }


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, None),
        ("7", 7),
        ("0.5", 0.5),
        ("Sun, 01 Nov 2026 00:01:00 GMT", 60),
        ("Sunday, 01-Nov-26 00:01:00 GMT", 60),
        ("Sun Nov  1 00:01:00 2026", 60),
        ("Sat, 31 Oct 2026 23:59:00 GMT", 0),
        ("Sun, 01 Nov 2037 00:00:00 GMT", None),
        ("-1", None),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("", None),
        ("Sun, 99 Nov 2026 00:01:00 GMT", None),
        ("Sun, 01 Nov 99999999999 00:01:00 GMT", None),
    ],
)
def test_a_retry_after_is_seconds_or_a_date(text: str | None, seconds: float | None) -> None:
    assert retry_after(text, datetime(2026, 11, 1, tzinfo=UTC)) == seconds
