"""A body is parsed once and edited in place: nothing but the edit changes."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.errors import InvalidRequest
from router.core.json_object import MAX_DEPTH, MAX_DIGITS, MAX_FIELDS, MAX_VALUES, edit, parse_object, written

_scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_blank = st.text(" \t\n\r", max_size=3)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """An object as text, written as oddly as JSON allows, and what it says."""
    fields = draw(st.dictionaries(st.text(max_size=8), _values, max_size=5))
    pieces = []
    for name, value in fields.items():
        shown_name = json.dumps(name, ensure_ascii=draw(st.booleans()))
        shown = json.dumps(
            value, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from((None, 0, 2)))
        )
        pieces.append(f"{draw(_blank)}{shown_name}{draw(_blank)}:{draw(_blank)}{shown}{draw(_blank)}")
    return f"{draw(_blank)}{{{','.join(pieces) or draw(_blank)}}}{draw(_blank)}", fields


def encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@settings(max_examples=300, deadline=None)
@given(bodies())
def test_values_and_spans_agree_with_the_text(body: tuple[str, dict[str, Any]]) -> None:
    text, fields = body
    parsed = parse_object(text.encode())
    assert parsed.values == json.loads(text) == fields
    for name, (start, end) in parsed.spans.items():
        assert json.loads(text[start:end]) == fields[name]
        assert not text[start].isspace()
        assert not text[end - 1].isspace()


@settings(max_examples=400, deadline=None)
@given(bodies(), st.dictionaries(st.text(max_size=8), _values, max_size=3), st.data())
def test_an_edit_says_what_it_should_and_leaves_the_rest_alone(
    body: tuple[str, dict[str, Any]], changes: dict[str, Any], data: st.DataObject
) -> None:
    text, fields = body
    replaces, renames_one = data.draw(st.tuples(st.booleans(), st.booleans()))
    if fields and replaces:
        changes = {**changes, data.draw(st.sampled_from(sorted(fields))): "replaced"}
    renames: dict[str, str] = {}
    free = [name for name in fields if name not in changes]
    if free and renames_one:
        renames[data.draw(st.sampled_from(free))] = "renamed_field_of_this_test"
    parsed = parse_object(text.encode())
    free = [name for name in free if name not in renames]
    dropped = data.draw(st.sets(st.sampled_from(free))) if free else set()
    edited = edit(
        text, parsed.spans, {name: written(value) for name, value in changes.items()}, renames, dropped
    )
    assert json.loads(edited) == {
        **{renames.get(name, name): value for name, value in fields.items() if name not in dropped},
        **changes,
    }
    again = parse_object(edited)
    for name in fields:
        if name not in changes and name not in dropped:
            start, end = again.spans[renames.get(name, name)]
            old_start, old_end = parsed.spans[name]
            assert again.text[start:end] == text[old_start:old_end]


@given(bodies())
def test_no_edit_is_byte_for_byte_the_same(body: tuple[str, dict[str, Any]]) -> None:
    text, _ = body
    assert edit(text, parse_object(text.encode()).spans, {}, {"not there": "x"}) == text.encode()


def test_every_other_byte_stays() -> None:
    text = '{ "a" : 1.50e0 ,\t"model":"x", "b":[ 1 , {"model" : "y"} ],"max_tokens" : 007e }'.replace(
        "007e", "7"
    )
    spans = parse_object(text.encode()).spans
    assert (
        edit(text, spans, {"model": '"gpt-ü"'}, {"max_tokens": "max_completion_tokens"})
        == '{ "a" : 1.50e0 ,\t"model":"gpt-ü", "b":[ 1 , {"model" : "y"} ],"max_completion_tokens" : 7 }'.encode()
    )
    assert edit("{}", {}, {"model": '"x"'}, {}) == b'{"model":"x"}'
    assert edit('{"a":1 }\n', {"a": (5, 6)}, {"b": "2"}, {}) == b'{"a":1 ,"b":2}\n'


@pytest.mark.parametrize(
    ("dropped", "left"),
    [
        ({"a"}, b'{"b": "}, {" ,"c":[1e999]}'),
        ({"b"}, b'{"a" : 1,"c":[1e999]}'),
        ({"c"}, b'{"a" : 1,"b": "}, {"}'),
        ({"a", "c"}, b'{"b": "}, {"}'),
        ({"a", "b", "c", "d"}, b"{}"),
        ({"d"}, b'{ "a" : 1, "b": "}, {" ,"c":[1e999] }\n'),
    ],
)
def test_a_field_is_left_out(dropped: set[str], left: bytes) -> None:
    text = '{ "a" : 1, "b": "}, {" ,"c":[1e999] }\n'
    spans = parse_object(text.encode()).spans
    assert edit(text, spans, {}, {}, dropped).replace(b' ,"c"', b',"c"') == left.replace(b' ,"c"', b',"c"')


def test_a_name_like_a_value_is_told_apart() -> None:
    text = r'{"x":"\"max_tokens\":1","max_tokens":2}'
    edited = edit(text, parse_object(text.encode()).spans, {}, {"max_tokens": "limit"})
    assert json.loads(edited) == {"x": '"max_tokens":1', "limit": 2}


@settings(max_examples=300)
@given(
    st.binary(max_size=60) | st.text(alphabet='{}[]",:0123eE+-.\\u truefalsnNI', max_size=40).map(str.encode)
)
def test_anything_is_parsed_or_refused(raw: bytes) -> None:
    refused: InvalidRequest | None = None
    try:
        parsed = parse_object(raw)
    except InvalidRequest as error:
        refused = error
    if refused is None:
        assert parsed.values == json.loads(raw)
    else:
        assert refused.code in ("invalid_json", "duplicate_field", "too_deep")


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "invalid_json"),
        (b"   ", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'"x"', "invalid_json"),
        (b"null", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"a":1', "invalid_json"),
        (b'{"a":1,}', "invalid_json"),
        (b'{"a" 1}', "invalid_json"),
        (b"{'a':1}", "invalid_json"),
        (b'{"a":1} {"b":2}', "invalid_json"),
        (b'{"a":NaN}', "invalid_json"),
        (b'{"a":[Infinity]}', "invalid_json"),
        (b'{"a":-Infinity}', "invalid_json"),
        (b'{"a":01}', "invalid_json"),
        (b'{"a":"\n"}', "invalid_json"),
        (b'\xef\xbb\xbf{"a":1}', "invalid_json"),
        (b'{"a":"\xff"}', "invalid_json"),
        (b'{"a":1,"b":2,"a":3}', "duplicate_field"),
        (b'{"model":"a","mod\\u0065l":"b"}', "duplicate_field"),
        (b'{"messages":[{"role":"user","content":"A","content":"B"}]}', "duplicate_field"),
        (b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "too_deep"),
        (b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), "too_deep"),
        (b'{"a":' + b"[" * 200_000, "too_deep"),
        (b'{"a":[' + b"1," * MAX_VALUES + b"1]}", "too_many_values"),
        (b'{"a":[' + b"{}," * MAX_VALUES + b"{}]}", "too_many_values"),
        (b'{"a":' + b'"" ' * 2 * MAX_VALUES + b"}", "invalid_json"),
        (b'{"a":' + b"]" * MAX_VALUES + b"}", "invalid_json"),
        (b'{"a":1.' + b"0" * MAX_DIGITS + b"}", "invalid_json"),
    ],
)
def test_bad_bodies(raw: bytes, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_object(raw)
    assert caught.value.code == code
    assert caught.value.message.rstrip(".").split(".")[-1].strip(), "the message has a remedy"


def test_a_duplicate_is_named() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_object(b'{"model":"a","model":"b"}')
    assert caught.value.param == "model"


def test_as_deep_as_allowed_is_allowed() -> None:
    depth = MAX_DEPTH - 1
    assert parse_object(b'{"a":' + b"[" * depth + b"]" * depth + b"}").values["a"] is not None


def test_brackets_in_strings_are_not_depth() -> None:
    assert parse_object(json.dumps({"a": "[{" * 500, "b": '\\"[' * 100}).encode()).values["a"] == "[{" * 500


def fields(number: int) -> bytes:
    return json.dumps({f"k{i}": i for i in range(number)}).encode()


def test_fields_at_the_top_level_are_limited() -> None:
    assert len(parse_object(fields(MAX_FIELDS)).values) == MAX_FIELDS
    with pytest.raises(InvalidRequest) as caught:
        parse_object(fields(MAX_FIELDS + 1))
    assert caught.value.code == "too_many_fields"


def test_commas_in_strings_are_not_values() -> None:
    assert parse_object(json.dumps({"a": "1,2]" * MAX_VALUES}).encode()).values["a"].count(",") == MAX_VALUES


def test_as_many_values_as_allowed_are_allowed() -> None:
    items = MAX_VALUES - 2
    assert len(parse_object(b'{"a":[' + b"1," * (items - 1) + b"1]}").values["a"]) == items


_LONG = 4_000_000


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":1' + b" " * _LONG + b"}",
        b" " * _LONG + b'{"a":1}',
        b'{"a":[' + b"[]," * _LONG + b"1]}",
        b'{"a":["' + b'[["' * (_LONG // 5) + b'"]}',
        b"{" + b",".join(b'"%d":1' % i for i in range(_LONG // 10)) + b"}",
        b'{"a":{' + b",".join(b'"%d":1' % i for i in range(100_000)) + b',"99999":1}}',
        b'{"a":1.' + b"1" * _LONG + b"}",
        b'{"a":[' + b"9" * 990 + (b"," + b"9" * 990) * (_LONG // 1000) + b"]}",
    ],
    ids=["blanks", "blanks first", "lists", "escaped quotes", "fields", "a duplicate", "a number", "numbers"],
)
def test_no_body_costs_more_than_its_length(raw: bytes) -> None:
    before = time.thread_time()
    with suppress(InvalidRequest):
        parse_object(raw)
    assert time.thread_time() - before < 0.5, "4 MB: a step of Python for each character takes longer"


@pytest.mark.parametrize("digits", [5_000, 100_000])
def test_a_huge_number_is_refused_not_a_crash(digits: int) -> None:
    with pytest.raises(InvalidRequest):
        parse_object(b'{"seed":' + b"1" * digits + b"}")
