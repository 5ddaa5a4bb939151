"""Every field that is read is checked, and nothing else is looked at."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.errors import InvalidRequest
from router.core.types import Caller, ChatRequest
from router.stages import normalise
from router.stages.normalise import (
    IMAGE_BOUND,
    MESSAGE_BOUND,
    READ_AT_ONCE,
    conversation_of,
    normalise_chat,
    read_chat,
)

HELLO = [{"role": "user", "content": "hello"}]
AT = datetime(2026, 11, 24, tzinfo=UTC)


def raw(**fields: Any) -> bytes:
    return json.dumps({"model": "auto", "messages": HELLO, **fields}).encode()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"model": "  "}, "model"),
        ({"model": 4}, "model"),
        ({"model": ["auto"]}, "model"),
        ({"model": "m" * 201}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": {"role": "user"}}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [*HELLO, None]}, "messages[1]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": 1, "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": {"type": "text"}}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].image_url",
        ),
        ({"stream": "true"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream_options": [], "stream": True}, "stream_options"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": "2"}, "n"),
        ({"n": False}, "n"),
        ({"response_format": "json"}, "response_format"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        normalise_chat(raw(**fields))
    assert caught.value.param == param
    assert caught.value.status == 400
    assert param.split(".")[0] in caught.value.message or f"'{param}" in caught.value.message


@pytest.mark.parametrize("field", ["model", "messages"])
def test_a_missing_field_is_named(field: str) -> None:
    body = {"model": "auto", "messages": HELLO}
    del body[field]
    with pytest.raises(InvalidRequest) as caught:
        normalise_chat(json.dumps(body).encode())
    assert caught.value.param == field


def test_null_means_not_sent() -> None:
    request = normalise_chat(
        raw(stream=None, n=None, max_tokens=None, stream_options=None, response_format=None, stop=None)
    )
    assert (request.stream, request.choices, request.max_output) == (False, 1, None)
    assert request.parameters == frozenset()


def test_every_parameter_that_is_sent_counts() -> None:
    request = normalise_chat(
        raw(temperature=0, top_p=1, brand_new_field={"x": 1}, user="u", metadata={}, n=2)
    )
    # A model may say `rejects: [user]`, or `rejects: [n]` where it gives one answer whatever is asked.
    assert request.parameters == {"temperature", "top_p", "brand_new_field", "user", "metadata", "n"}
    assert request.choices == 2
    assert normalise_chat(raw(n=1)).parameters == frozenset()


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_either_limit_bounds_the_answer(name: str) -> None:
    assert normalise_chat(raw(**{name: 77})).max_output == 77


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({}, set()),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, {"tools"}),
        ({"tools": []}, set()),
        ({"functions": [{"name": "f"}]}, {"tools"}),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, {"json_schema"}),
        ({"response_format": {"type": "json_object"}}, {"json_schema"}),
        ({"response_format": {"type": "text"}}, set()),
        ({"modalities": ["text", "audio"]}, {"audio"}),
        ({"modalities": ["text"]}, set()),
        ({"messages": [*HELLO, {"role": "tool", "content": "1", "tool_call_id": "x"}]}, {"tools"}),
        (
            {"messages": [*HELLO, {"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}]},
            {"tools"},
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x"}}]}
                ]
            },
            {"vision"},
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            {"audio"},
        ),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]}, {"file"}),
        ({"messages": [{"role": "user", "content": [{"type": "hologram"}]}]}, {"hologram"}),
    ],
)
def test_what_a_request_needs(fields: dict[str, Any], needs: set[str]) -> None:
    assert normalise_chat(raw(**fields)).needs == needs


def test_the_prompt_is_the_last_thing_the_user_said() -> None:
    request = normalise_chat(
        raw(
            messages=[
                {"role": "system", "content": "s"},
                {"role": "user", "content": "first"},
                {"role": "assistant", "content": "a"},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "second"}, {"type": "text", "text": "part"}],
                },
                {"role": "assistant", "content": "b"},
            ]
        )
    )
    assert request.prompt == "second\npart"


@given(st.lists(st.text(max_size=200), min_size=1, max_size=4))
def test_the_input_bound_is_never_below_the_text(texts: list[str]) -> None:
    body = raw(messages=[{"role": "user", "content": text} for text in texts])
    request = normalise_chat(body)
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    assert request.input_bound >= size + MESSAGE_BOUND * len(texts)
    assert request.input_tokens >= len(texts)


def test_an_image_is_bounded_by_what_it_may_cost_not_by_its_bytes() -> None:
    url = "data:image/png;base64," + "A" * 300_000
    content = [{"type": "image_url", "image_url": {"url": url}}]
    request = normalise_chat(raw(messages=[{"role": "user", "content": content}]))
    assert IMAGE_BOUND < request.input_bound < IMAGE_BOUND + 1_000


def test_lone_surrogates_do_no_harm() -> None:
    request = normalise_chat(rb'{"model":"auto","messages":[{"role":"user","content":"\ud800 x"}]}')
    assert request.input_bound > 0
    assert conversation_of(Caller("k", "t"), request) is None


def test_a_conversation_keeps_its_name_as_it_grows() -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    names = {conversation_of(Caller("k", "t"), normalise_chat(raw(messages=turns[:n]))) for n in (2, 3, 4)}
    assert len(names) == 1
    (name,) = names
    assert name is not None
    other_team = conversation_of(Caller("k", "u"), normalise_chat(raw(messages=turns)))
    other_start = conversation_of(Caller("k", "t"), normalise_chat(raw(messages=turns[1:])))
    assert len({name, other_team, other_start}) == 3
    assert conversation_of(Caller("k", "t"), normalise_chat(raw())) is None


@pytest.mark.parametrize("long", [False, True])
async def test_a_long_body_is_read_beside_the_event_loop(long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def noted(body: bytes) -> ChatRequest:
        threads.append(threading.current_thread())
        return normalise_chat(body)

    monkeypatch.setattr(normalise, "normalise_chat", noted)
    turns = [*HELLO, {"role": "assistant", "content": "x" * (READ_AT_ONCE if long else 10)}]
    body = raw(messages=turns)
    request, conversation = await read_chat(body, Caller("k", "t"))
    assert request == normalise_chat(body)
    assert conversation == conversation_of(Caller("k", "t"), request) is not None
    assert (threads == [threading.current_thread()]) is not long
    with pytest.raises(InvalidRequest):
        await read_chat(body + b"}", Caller("k", "t"))
