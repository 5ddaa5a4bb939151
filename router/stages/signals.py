"""What an answer tells of itself: it refuses, was cut off, is not the JSON asked for, or calls tools wrongly.

Pure functions over bytes that have been passed on already. Each signal is a hint and not a verdict, which its
weight says; none of them proves a good answer, so there is no signal for one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router.core.openai_wire import sse_to_json
from router.core.types import ChatRequest

MAX_ANSWER = 256 * 1024
"""Bytes of an answer that are looked at; a longer one tells only how it ended."""
MAX_SHORT_STREAM = 32 * 1024
"""Bytes a streamed answer has at most that could be a refusal: 100 pieces of text with what is around them."""
MAX_REFUSAL = 400
"""Characters; who refuses is brief, and a long answer that begins so goes on to help."""
_MAX_CHECKS = 20_000
_MAX_DEPTH = 32


@dataclass(frozen=True, slots=True)
class Signal:
    """`weight` (0..1): how far a label that says 0 is to be believed."""

    source: str
    weight: float


REFUSAL = Signal("refusal", 0.5)
TRUNCATED = Signal("truncated", 0.3)
TRUNCATED_BY_CALLER = Signal("truncated", 0.1)
"""The caller's own limit ended it: often what it wanted."""
INVALID_JSON = Signal("invalid_json", 0.8)
TOOL_ERROR = Signal("tool_error", 0.8)
REPEATED = Signal("repeated", 0.1)
BY_SOURCE: Mapping[str, Signal] = {s.source: s for s in (REFUSAL, TRUNCATED, INVALID_JSON, TOOL_ERROR)}

_SAYS_NO = re.compile(
    # English
    r"\b(?:i|we)\s?(?:'?m|'?re|\sam|\sare)?\s(?:really\s|very\s|afraid\si\s|sorry,?\s(?:but\s)?i\s)?"
    r"(?:can(?:'t|not|\snot)|won't|will\snot|unable\sto|not\sable\sto|not\scomfortable)\s(?:be\sable\sto\s)?"
    r"(?:help|assist|provid|comply|fulfil|answer|do\s(?:that|this)|creat|generat|discuss|engage|support|shar|give|"
    r"writ|continu|access|browse|process\sth|respond|offer|produc|translat|complet)"
    r"|\bsorry,?\s(?:but\s)?(?:that\sis|that's|i|we)\s?(?:\sam|'m)?\s?(?:can(?:'t|not)|unable|not\sable|beyond)"
    r"|\bas\san?\s(?:ai|artificial|language\smodel)\b.{0,60}\b(?:can(?:'t|not)|unable|not\sable|do\snot|don't)\b"
    # German, Dutch
    r"|\b(?:dabei|damit|das|hierbei|diese[rn]?\s\w{1,20}|ihnen|dir)?\s?kann\sich\s(?:\w{1,20}\s){0,4}nicht\b"
    r"|\bich\skann\s(?:\w{1,20}\s){0,6}nicht\s(?:\w{1,20}\s)?(?:helfen|beantworten|unterst|weiterhelfen|erf|geben|"
    r"nachkommen)"
    r"|\b(?:tut\smir\sleid|entschuldigung|bedaure),?\s.{0,60}\b(?:nicht|kein)"
    r"|\bik\skan\s(?:\w{1,20}\s){0,5}niet\b|\bhet\sspijt\sme\b.{0,60}\bniet\b"
    # French, Spanish, Portuguese, Italian
    r"|\bje\s(?:suis\sd[ée]sol[ée]e?|regrette)\b.{0,60}\b(?:ne\s(?:peux|puis)|pas\sen\smesure)"
    r"|\bje\sne\s(?:peux|puis)\spas\s(?:vous\s|t')?(?:aider|r[ée]pondre|fournir|g[ée]n[ée]rer|faire)"
    r"|\b(?:lo\ssiento|me\stemo)\b.{0,60}\bno\s(?:puedo|me\ses\sposible)|\bno\spuedo\s(?:ayudar|responder|proporcionar|"
    r"cumplir|generar)"
    r"|\b(?:desculpe|lamento|sinto\smuito)\b.{0,60}\bn[ãa]o\s(?:posso|consigo)|\bn[ãa]o\sposso\s(?:ajudar|responder|"
    r"fornecer|atender)"
    r"|\b(?:mi\sdispiace|spiacente)\b.{0,60}\bnon\sposso|\bnon\sposso\s(?:aiutar|rispondere|fornire|soddisfare)"
    # Polish, Russian, Turkish
    r"|\b(?:przykro\smi|przepraszam)\b.{0,60}\bnie\smog[ęe]|\bnie\smog[ęe]\s(?:pom[óo]c|odpowiedzie)"
    r"|(?:извините|простите|к\sсожалению).{0,60}не\s(?:могу|в\sсостоянии)|\bя\sне\sмогу\s(?:помочь|ответить|выполнить|"
    r"предоставить)"
    r"|\b(?:[üu]zg[üu]n[üu]m|maalesef)\b.{0,60}\b\w{1,20}(?:amam|emem|am[ıi]yorum|emiyorum)\b"
    # Chinese, Japanese, Korean, Arabic, Hindi
    r"|(?:抱歉|对不起|對不起|很遗憾).{0,20}(?:无法|無法|不能)|我(?:无法|不能)(?:提供|回答|协助|帮助|满足)"
    r"|(?:申し訳|すみません|残念ながら).{0,40}(?:できません|できかねます|お答えできません|いたしかねます)"
    r"|(?:죄송|유감).{0,40}(?:없습니다|어렵습니다)"
    r"|(?:آسف|عذر[اً]|أعتذر).{0,40}لا\s(?:أستطيع|يمكنني)"
    r"|(?:क्षमा|माफ़|खेद).{0,60}(?:नहीं\sकर\sसकत|असमर्थ)",
    re.IGNORECASE | re.DOTALL,
)
# One piece of a choice's text in a stream; `"content"` with its quotes is no part of another name.
_CONTENT = re.compile(rb'"content"\s*:\s*"((?:[^"\\]|\\.)*)"')
_ENDED = re.compile(rb'"finish_reason"\s*:\s*"(\w{1,32})"')


def signals(request: ChatRequest, body: bytes, streamed: bool) -> tuple[Signal, ...]:
    """Of one complete answer, in the form it came in. Never raises; a few hundred microseconds at most."""
    try:
        return tuple(_signals(request, _choices(request, body, streamed)))
    except _UNREADABLE:
        return ()


def signals_of(request: ChatRequest, answer: Mapping[str, Any]) -> tuple[str, ...]:
    """Of one complete answer that is parsed already: the sources alone. Never raises."""
    try:
        return tuple(signal.source for signal in _signals(request, _listed(answer)))
    except _UNREADABLE:
        return ()


# An answer nobody can read was passed on all the same; it is not judged.
_UNREADABLE = (ValueError, TypeError, AttributeError, KeyError, RecursionError)


def _signals(request: ChatRequest, choices: Sequence[Mapping[str, Any]]) -> Iterator[Signal]:
    if any(choice.get("finish_reason") == "length" for choice in choices):
        yield TRUNCATED_BY_CALLER if request.max_output is not None else TRUNCATED
    messages = [message for choice in choices if isinstance(message := choice.get("message"), dict)]
    if any(choice.get("finish_reason") == "content_filter" for choice in choices) or any(
        _refuses(message, request.prompt) for message in messages
    ):
        yield REFUSAL
    elif any(_breaks_format(message, request.body.get("response_format")) for message in messages):
        yield INVALID_JSON
    if any(_calls_wrongly(message, request.body.get("tools")) for message in messages):
        yield TOOL_ERROR


def _choices(request: ChatRequest, body: bytes, streamed: bool) -> list[dict[str, Any]]:
    if not streamed:
        if len(body) > MAX_ANSWER:
            return [{"finish_reason": reason} for reason in _reasons(body)]
        return _listed(json.loads(body))
    if request.choices > 1 or b'"tool_calls"' in body or b'"refusal"' in body:
        if len(body) > MAX_ANSWER:
            return [{"finish_reason": reason} for reason in _reasons(body)]
        return _listed(json.loads(sse_to_json(body)))
    # One choice of text, by far the most: its pieces are joined as they are escaped, and read once.
    ended = _reasons(body)
    if not ended:
        raise ValueError("the stream is not complete")
    choice: dict[str, Any] = {"finish_reason": ended[0]}
    wanted = MAX_ANSWER if request.body.get("response_format") is not None else MAX_SHORT_STREAM
    if len(body) <= wanted:
        text = b"".join(match.group(1) for match in _CONTENT.finditer(body))
        choice["message"] = {"content": json.loads(b'"' + text + b'"')}
    return [choice]


def _listed(answer: Any) -> list[dict[str, Any]]:
    return [choice for choice in answer["choices"] if isinstance(choice, dict)]


def _reasons(body: bytes) -> list[str]:
    return [match.group(1).decode() for match in _ENDED.finditer(body, max(0, len(body) - 8192))]


# ---- refusals ----


def _refuses(message: Mapping[str, Any], prompt: str) -> bool:
    if message.get("refusal"):
        return True
    content = message.get("content")
    if not isinstance(content, str) or message.get("tool_calls"):
        return False
    text = content.strip().replace("’", "'")
    # Who is asked to translate or to judge a refusal repeats its words.
    return 0 < len(text) <= MAX_REFUSAL and says_no(text) and not says_no(prompt[:2000].replace("’", "'"))


def says_no(text: str) -> bool:
    """Whether a text holds the words of a refusal, in one of sixteen languages."""
    return _SAYS_NO.search(text) is not None


# ---- JSON that was asked for ----


def _breaks_format(message: Mapping[str, Any], wanted: Any) -> bool:
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    content = message.get("content")
    if (
        kind not in ("json_object", "json_schema")
        or message.get("tool_calls")
        or not isinstance(content, str)
    ):
        return False
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return True
    if kind == "json_object":
        return not isinstance(value, dict)
    described = wanted.get("json_schema")
    schema = described.get("schema") if isinstance(described, Mapping) else None
    return isinstance(schema, Mapping) and not satisfies(value, schema)


def satisfies(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a JSON value has the types, names and values a JSON Schema asks for (2020-12; the keywords that
    structured outputs know). Other keywords, and what lies beyond a bound on work, count as satisfied.
    """
    return _Check(schema).holds(value, schema, 0)


_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "number": (int, float),
    "integer": (int, float),
}


class _Check:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._left = _MAX_CHECKS

    def holds(self, value: Any, schema: Any, depth: int) -> bool:
        self._left -= 1
        if self._left < 0 or depth > _MAX_DEPTH or not isinstance(schema, Mapping):
            return schema is not False
        if isinstance(reference := schema.get("$ref"), str):
            return self.holds(value, self._resolved(reference), depth + 1)
        if "const" in schema and not _same(value, schema["const"]):
            return False
        if isinstance(listed := schema.get("enum"), list) and not any(_same(value, item) for item in listed):
            return False
        kinds = schema.get("type")
        names = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []
        if names and not any(_is(value, name) for name in names):
            return False
        for word, enough in (("anyOf", any), ("oneOf", any), ("allOf", all)):
            ways = schema.get(word)
            if isinstance(ways, list) and not enough(self.holds(value, way, depth + 1) for way in ways):
                return False
        if isinstance(value, dict):
            return self._object(value, schema, depth)
        if isinstance(value, list):
            return self._array(value, schema, depth)
        return True

    def _object(self, value: dict[str, Any], schema: Mapping[str, Any], depth: int) -> bool:
        required = schema.get("required")
        if isinstance(required, list) and any(
            isinstance(name, str) and name not in value for name in required
        ):
            return False
        properties = schema.get("properties")
        known: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
        more = schema.get("additionalProperties", True)
        for name, item in value.items():
            if name in known:
                if not self.holds(item, known[name], depth + 1):
                    return False
            elif "patternProperties" not in schema and not self.holds(item, more, depth + 1):
                return False
        return True

    def _array(self, value: list[Any], schema: Mapping[str, Any], depth: int) -> bool:
        shortest, longest = schema.get("minItems"), schema.get("maxItems")
        if isinstance(shortest, int) and len(value) < shortest:
            return False
        if isinstance(longest, int) and len(value) > longest:
            return False
        items = schema.get("items")
        return items is None or all(self.holds(item, items, depth + 1) for item in value)

    def _resolved(self, reference: str) -> Any:
        found: Any = self._root
        if not reference.startswith("#"):
            return None
        for step in reference[1:].split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            found = found.get(step) if isinstance(found, Mapping) else None
        return found


def _is(value: Any, name: Any) -> bool:
    if name not in _TYPES:
        return True
    if name in ("number", "integer") and isinstance(value, bool):
        return False
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[name])


def _same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


# ---- tools ----


def _calls_wrongly(message: Mapping[str, Any], tools: Any) -> bool:
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not isinstance(tools, list):
        return False
    return any(_wrong(call, _declared(tools)) for call in calls)


def _declared(tools: Sequence[Any]) -> dict[str, Any]:
    """Functions by name, with the schema of their parameters."""
    functions = [tool["function"] for tool in tools if isinstance(tool, Mapping) and "function" in tool]
    return {str(function.get("name")): function.get("parameters") for function in functions}


def _wrong(call: Any, declared: Mapping[str, Any]) -> bool:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return False  # a tool of another kind, such as a provider's own
    if function.get("name") not in declared:
        return True
    sent = function.get("arguments")
    try:
        arguments = json.loads(sent) if sent else {}
    except (ValueError, TypeError, RecursionError):
        return True
    schema = declared[str(function["name"])]
    return not isinstance(arguments, dict) or (
        isinstance(schema, Mapping) and not satisfies(arguments, schema)
    )
