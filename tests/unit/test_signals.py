"""Automatic signals: what an answer tells of itself."""

from __future__ import annotations

import json
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.openai_wire import json_to_sse
from router.core.types import ChatRequest
from router.stages.normalise import normalise_chat
from router.stages.signals import satisfies, says_no, signals, signals_of


def asked(content: str = "Tell me how tides work", **fields: Any) -> ChatRequest:
    body = {"model": "auto", "messages": [{"role": "user", "content": content}], **fields}
    return normalise_chat(json.dumps(body).encode())


def answer(content: str | None = "The moon pulls.", finish: str = "stop", **message: Any) -> bytes:
    said = {"role": "assistant", "content": content, **message}
    choice = {"index": 0, "message": said, "finish_reason": finish}
    return json.dumps({"id": "c", "object": "chat.completion", "choices": [choice]}).encode()


def called(name: str, arguments: Any) -> bytes:
    call = {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}
    return answer(None, "tool_calls", tool_calls=[call])


def sources(request: ChatRequest, body: bytes) -> list[str]:
    """As JSON and as a stream: both say the same."""
    whole = [signal.source for signal in signals(request, body, False)]
    assert [signal.source for signal in signals(request, json_to_sse(body, True), True)] == whole
    assert list(signals_of(request, json.loads(body))) == whole
    return whole


REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I’m sorry, I cannot assist with this request.",
    "Sorry, that's beyond what I can do.",
    "As an AI language model, I don't have opinions.",
    "I am not able to provide medical advice.",
    "We are unable to comply.",
    "Dabei kann ich leider nicht helfen.",
    "Es tut mir leid, aber das ist nicht möglich.",
    "Het spijt me, daar kan ik je niet mee helpen.",
    "Je suis désolé, mais je ne peux pas répondre à cette question.",
    "Lo siento, pero no puedo ayudar con eso.",
    "Desculpe, não posso ajudar com isso.",
    "Mi dispiace, ma non posso aiutarti.",
    "Przykro mi, ale nie mogę pomóc.",
    "Извините, но я не могу помочь с этим.",
    "Üzgünüm, bu konuda yardımcı olamam.",
    "抱歉，我无法提供这方面的帮助。",
    "申し訳ありませんが、そのご要望にはお答えできません。",
    "죄송하지만 도와드릴 수 없습니다.",
    "عذراً، لا أستطيع المساعدة في ذلك.",
    "क्षमा करें, मैं इसमें मदद नहीं कर सकता।",
]
ANSWERS = [
    "The moon pulls on the water, which makes two bulges.",
    "I can help with that: first open the settings.",
    "You cannot divide by zero, because no number times zero gives one.",
    "It can't be done in linear time; sorting needs comparisons.",
    "Sorry for the confusion! The right figure is 42.",
    "Das geht so: zuerst den Deckel öffnen, dann nicht mehr drehen.",
    "Das kann nicht funktionieren, weil der Index fehlt.",
    "Non posso non ammettere che il libro è bello.",
    "Le train ne peut pas circuler la nuit.",
    "El gato no puede volar.",
    "月亮的引力造成潮汐。",
    "Извините за ошибку: правильный ответ 42.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refusal_is_seen_in_many_languages(text: str) -> None:
    assert sources(asked(), answer(text)) == ["refusal"]


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_is_no_refusal(text: str) -> None:
    assert sources(asked(), answer(text)) == []


def test_a_long_answer_or_one_about_refusals_is_none() -> None:
    refusal = REFUSALS[0]
    assert sources(asked(), answer(refusal + " But here is how it works in general: " + "water " * 80)) == []
    assert sources(asked(f"Translate into German: {refusal}"), answer(refusal)) == []
    assert says_no(refusal)


def test_the_provider_says_it_itself() -> None:
    assert sources(asked(), answer(None, refusal="I'd rather not.")) == ["refusal"]
    assert sources(asked(), answer("", "content_filter")) == ["refusal"]


def test_an_answer_that_was_cut_off() -> None:
    [signal] = signals(asked(), answer(finish="length"), False)
    [own] = signals(asked(max_tokens=5), answer(finish="length"), False)
    assert (signal.source, own.source) == ("truncated", "truncated")
    assert own.weight < signal.weight
    assert sources(asked(), answer(finish="length")) == ["truncated"]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": ["integer", "null"]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "$defs": {"tag": {"enum": ["a", "b"]}},
}


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('{"name": "x", "age": 3}', True),
        ('  {"name": "x", "age": null, "tags": ["a", "b"]}\n', True),
        ('{"name": "x"}', False),
        ('{"name": 7, "age": 3}', False),
        ('{"name": "x", "age": true}', False),
        ('{"name": "x", "age": 3, "tags": ["c"]}', False),
        ('{"name": "x", "age": 3, "more": 1}', False),
        ('{"name": "x", "age": 3', False),
        ('```json\n{"name": "x", "age": 3}\n```', False),
        ("[" * 5000, False),
    ],
)
def test_json_against_the_schema_it_was_asked_for(text: str, good: bool) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    assert sources(asked(response_format=wanted), answer(text)) == ([] if good else ["invalid_json"])


def test_any_object_where_only_an_object_was_asked_for() -> None:
    request = asked(response_format={"type": "json_object"})
    assert sources(request, answer('{"any": ["thing", "\\u00e9 \\ud83d\\ude00"]}')) == []
    assert sources(request, answer('["no object"]')) == ["invalid_json"]
    assert sources(request, answer("Here it is: {}")) == ["invalid_json"]
    assert sources(asked(), answer("Here it is: {}")) == []


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


@pytest.mark.parametrize(
    ("body", "good"),
    [
        (called("weather", '{"city": "Oslo"}'), True),
        (called("now", "{}"), True),
        (called("now", ""), True),
        (called("weather", "{}"), False),
        (called("weather", '{"city": 7}'), False),
        (called("weather", '{"city": "Oslo"'), False),
        (called("weather", '"Oslo"'), False),
        (called("whether", '{"city": "Oslo"}'), False),
    ],
)
def test_tool_calls_against_the_tools_that_were_sent(body: bytes, good: bool) -> None:
    assert sources(asked(tools=TOOLS), body) == ([] if good else ["tool_error"])


def test_the_better_of_several_choices_does_not_hide_the_worse() -> None:
    two = json.loads(answer())
    two["choices"].append({**json.loads(answer(REFUSALS[0]))["choices"][0], "index": 1})
    assert sources(asked(n=2), json.dumps(two).encode()) == ["refusal"]


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"null", b'{"choices": 7}', b'{"choices": [{"message": []}]}', b"\xff"]
)
@pytest.mark.parametrize("streamed", [False, True])
def test_what_nobody_can_read_is_not_judged(body: bytes, streamed: bool) -> None:
    assert signals(asked(response_format={"type": "json_object"}), body, streamed) == ()


def test_an_endless_schema_ends() -> None:
    schema: dict[str, Any] = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    assert satisfies({}, schema)
    bomb: dict[str, Any] = {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}}
    assert satisfies({}, {**bomb, "$ref": "#/$defs/a"})


def test_looking_at_an_answer_is_quick() -> None:
    hostile = ("i am not able to " * 22 + "sorry " * 4)[:399]
    frames = json_to_sse(answer(hostile), False)
    words = "".join(f"word{n} " for n in range(4000))
    many = [
        (asked(), frames, True),
        (asked(), answer(words), False),
        (asked(), answer("sorry, " * 57), False),
    ]
    for request, body, streamed in many:
        started = time.thread_time()
        for _ in range(20):
            signals(request, body, streamed)
        assert (time.thread_time() - started) / 20 < 0.005


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["a", "b", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
    max_leaves=8,
)
_schemas = st.recursive(
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["object", "array", "string", "integer", "number", "boolean", "null"]),
            "enum": st.lists(st.sampled_from([0, 1, True, "a", None]), min_size=1, max_size=3),
            "required": st.lists(st.sampled_from("xyz"), max_size=2, unique=True),
            "minItems": st.integers(0, 2),
        },
    ),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "properties": st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
            "items": inner,
            "anyOf": st.lists(inner, min_size=1, max_size=2),
            "allOf": st.lists(inner, min_size=1, max_size=2),
            "additionalProperties": st.booleans() | inner,
        },
    ),
    max_leaves=6,
)


@given(_values, _schemas)
def test_the_small_validator_agrees_with_the_large_one(value: Any, schema: dict[str, Any]) -> None:
    assert satisfies(value, schema) == jsonschema.Draft202012Validator(schema).is_valid(value)
