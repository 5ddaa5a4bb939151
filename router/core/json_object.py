"""Reads a JSON object once and remembers where each top-level value stands.

The gateway forwards a request as the caller wrote it: numbers keep their digits and unknown fields stay.
So an edit replaces the bytes of one value and nothing is serialised again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from json import decoder
from typing import Any, NoReturn

from msgspec import Struct

from router.core.errors import InvalidRequest

MAX_DEPTH = 64
MAX_FIELDS = 1_000
"""Names at the top level."""
MAX_VALUES = 250_000
"""Fields, list items and brackets in all: what they cost is time in which nobody else is served."""
MAX_DIGITS = 1_000
"""Characters of one number."""


class JsonObject(Struct, frozen=True):
    """`values` by name and `spans`: (start, end) offsets of each value in `text`."""

    text: str
    values: Mapping[str, Any]
    spans: Mapping[str, tuple[int, int]]


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# The C scanner json itself uses: (text, index after the quote, strict) -> (string, index after it).
scanstring: Callable[[str, int, bool], tuple[str, int]] = decoder.scanstring  # type: ignore[attr-defined]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises InvalidRequest where a name is given twice: which of the two counts is up to the reader."""
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _twice(name)
            seen.add(name)
    return values


def _twice(name: str) -> InvalidRequest:
    return InvalidRequest(
        f"The field {name[:64]!r} is given twice. Two readers of this body could see two different requests: "
        "send it once.",
        param=name[:64],
        code="duplicate_field",
    )


def _integer(digits: str) -> int:
    return int(_bounded(digits))


def _float(digits: str) -> float:
    """Infinite where it is beyond a float's range: the body itself goes on as it was written."""
    return float(_bounded(digits))


def _bounded(digits: str) -> str:
    if len(digits) > MAX_DIGITS:
        raise InvalidRequest(
            f"The body holds a number of {len(digits)} characters. Send at most {MAX_DIGITS}.",
            code="invalid_json",
        )
    return digits


_decoder = json.JSONDecoder(
    parse_constant=_reject_constant, parse_int=_integer, parse_float=_float, object_pairs_hook=_once
)
written: Callable[[object], str] = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
"""JSON for a value of our own. A caller's is never serialised again: not all that JSON says has a Python value."""

# What is skipped is skipped in C, however long it is; possessive, so that nothing is tried twice.
_BLANKS = re.compile(r"[ \t\n\r]*+")
_PLAIN_NAME = re.compile(r'"([^"\\\x00-\x1f]*+)"[ \t\n\r]*+:[ \t\n\r]*+')
_SEPARATOR = re.compile(r"[ \t\n\r]*+([,}])[ \t\n\r]*+")
_STRUCTURE = re.compile(r'["\[\]{},]')


def parse_object(raw: bytes) -> JsonObject:
    """The top-level object of `raw` (RFC 8259, UTF-8).

    Raises InvalidRequest: not UTF-8, not JSON, not an object, a key given twice, nested deeper than
    MAX_DEPTH, or more than MAX_FIELDS, MAX_VALUES or MAX_DIGITS. Takes about 100 ms for a body of 32 MiB.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"The body is not UTF-8 (byte {error.start}). Send JSON encoded as UTF-8.", code="invalid_json"
        ) from None
    brackets = raw.count(b"[") + raw.count(b"{")
    if brackets > MAX_DEPTH or (len(raw) > MAX_VALUES and brackets + raw.count(b",") > MAX_VALUES):
        _check_structure(text)
    try:
        return _scan(text)
    except (ValueError, RecursionError) as error:
        position = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise InvalidRequest(
            f"The body is not valid JSON{position}. Send one JSON object.", code="invalid_json"
        ) from None


def _scan(text: str) -> JsonObject:
    values: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    at = _skip(text, 0)
    if text[at : at + 1] != "{":
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    at = _skip(text, at + 1)
    if text[at : at + 1] == "}":
        at = _skip(text, at + 1)
    else:
        while True:
            plain = _PLAIN_NAME.match(text, at)
            if plain is not None:
                name, start = plain[1], plain.end()
            else:
                name, start = _name(text, at)
            value, at = _decoder.raw_decode(text, start)
            if name in values:
                raise _twice(name)
            values[name] = value
            spans[name] = (start, at)
            separator = _SEPARATOR.match(text, at)
            if separator is None:
                raise json.JSONDecodeError("expected ',' or '}'", text, _skip(text, at))
            at = separator.end()
            if separator[1] == "}":
                break
            if len(values) >= MAX_FIELDS:
                raise InvalidRequest(
                    f"The body has more than {MAX_FIELDS:,} fields at its top level. Send fewer.",
                    code="too_many_fields",
                )
    if at != len(text):
        raise json.JSONDecodeError("more after the object", text, at)
    return JsonObject(text, values, spans)


def _name(text: str, at: int) -> tuple[str, int]:
    """A name with escapes, or none: (name, index of its value)."""
    if text[at : at + 1] != '"':
        raise json.JSONDecodeError("expected a name", text, at)
    name, at = scanstring(text, at + 1, True)
    at = _skip(text, at)
    if text[at : at + 1] != ":":
        raise json.JSONDecodeError("expected ':'", text, at)
    return name, _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    blanks = _BLANKS.match(text, at)
    assert blanks is not None  # it matches nothing as well
    return blanks.end()


def _check_structure(text: str) -> None:
    """Counts before a value is made of it. What is no JSON is left to the parser, which says where."""
    depth = values = strings = at = 0
    while (found := _STRUCTURE.search(text, at)) is not None:
        mark, at = found[0], found.end()
        if mark == '"':
            strings += 1
            if strings > 2 * values + 2:
                return
            try:
                _, at = scanstring(text, at, True)
            except ValueError:
                return
        elif mark == "]" or mark == "}":
            depth -= 1
            if depth <= 0:
                return
        else:
            values += 1
            if values > MAX_VALUES:
                raise InvalidRequest(
                    f"The body holds more than {MAX_VALUES:,} values. Send less in one request.",
                    code="too_many_values",
                )
            if mark != ",":
                depth += 1
                if depth > MAX_DEPTH:
                    raise InvalidRequest(
                        f"The body is nested deeper than {MAX_DEPTH} levels. Flatten it.", code="too_deep"
                    )


def edit(
    text: str,
    spans: Mapping[str, tuple[int, int]],
    changes: Mapping[str, str],
    renames: Mapping[str, str],
    dropped: Collection[str] = (),
) -> bytes:
    """`text` with some top-level values replaced or added, some names changed and some fields left out; the rest
    byte for byte, but for blanks between fields where one is left out.

    `changes` maps a name to the JSON of its new value, `renames` an old name to a new one. A name that is not
    there is added by `changes` and ignored by the others.
    """
    if dropped and any(name in spans for name in dropped):
        text, spans = _without(text, spans, dropped)
    pieces: list[tuple[int, int, str]] = []
    added: list[str] = []
    for name, value in changes.items():
        if name in spans:
            start, end = spans[name]
            pieces.append((start, end, value))
        else:
            added.append(f"{written(name)}:{value}")
    for old, new in renames.items():
        if old in spans:
            start, end = _name_span(text, spans, old)
            pieces.append((start, end, written(new)))
    result = _splice(text, pieces)
    if added:
        close = result.rindex("}")
        separator = "," if spans else ""
        result = result[:close] + separator + ",".join(added) + result[close:]
    return result.encode("utf-8")


def _without(
    text: str, spans: Mapping[str, tuple[int, int]], dropped: Collection[str]
) -> tuple[str, Mapping[str, tuple[int, int]]]:
    """The same object without some of its fields."""
    kept: list[str] = []
    places: dict[str, tuple[int, int]] = {}
    at, before = 1, 0
    for name, (value_start, end) in spans.items():
        if name not in dropped:
            start = text.index('"', before)
            kept.append(text[start:end])
            places[name] = (at + value_start - start, at + end - start)
            at += end - start + 1
        before = end
    return "{" + ",".join(kept) + "}", places


def _name_span(text: str, spans: Mapping[str, tuple[int, int]], name: str) -> tuple[int, int]:
    """Where the name before a value stands: between the end of the value before it and its own value."""
    value_start = spans[name][0]
    before = max((end for _, end in spans.values() if end <= value_start), default=0)
    start = text.index('"', before)
    _, end = scanstring(text, start + 1, True)
    return start, end


def _splice(text: str, pieces: Sequence[tuple[int, int, str]]) -> str:
    parts: list[str] = []
    at = 0
    for start, end, replacement in sorted(pieces):
        parts.append(text[at:start])
        parts.append(replacement)
        at = end
    parts.append(text[at:])
    return "".join(parts)
