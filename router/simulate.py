"""A simulated OpenAI-wire provider: several models, each with its own latency, price and faults.

Plain ASGI, for the demo, tests and benchmarks. Answers are a function of model, seed and request, so that a
run can be repeated. Beside the data plane (`/v1/chat/completions`, `/v1/embeddings`, `/v1/models`):

- `GET /control` shows every model's settings and number of calls; `POST /control` with `{"model": "small",
  "first_token": "300ms", "fault": "429", "fault_rate": 0.1}` changes those it names (`"*"`: all models).
- `GET /log` is this provider's own call log as JSON lines, oldest first; `DELETE /log` empties it.

Tokens are counted the same way for everyone who wants to check a bill: a text costs one token per started
four bytes of UTF-8, a message 4 more, a request 3 more, an image 85, tools and a response format their JSON
as text. One word of an answer is one token.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import itertools
import json
import random
import re
import signal
import socket
import struct
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from hashlib import blake2b
from pathlib import Path
from typing import Any, TextIO

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

FAULTS: Mapping[str, str] = {
    "stall": "accepts the call and never answers",
    "stall_after_headers": "sends the headers of its answer and then nothing",
    "silence": "is silent for `silence` seconds in the middle of an answer",
    "cut": "ends in the middle of an answer, a stream with a clean end",
    "reset": "closes the connection in the middle of an answer",
    "disconnect": "closes the connection before any answer",
    "error_first": "answers 200 and sends an error as the first event",
    "error_midstream": "sends an error event in the middle of a stream",
    "no_usage": "reports no usage",
    "usage_with_choices": "reports usage in the last chunk with choices",
    "no_done": "ends a complete stream without [DONE]",
    "crlf": "ends lines with CRLF and sends `data:` without a blank",
    "bytewise": "sends a stream one byte at a time",
    "gzip": "compresses although nobody asked for it",
    "redirect": "answers 302 to another path",
    "not_json": "answers 200 with a web page",
}
"""What a model can be told to do wrong, beside any HTTP status from 400 to 599 as a number."""

LOG_LIMIT = 50_000
MAX_BODY = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class SimulatedModel:
    """One model's behaviour. Durations are seconds, prices USD per million tokens.

    `jitter` spreads the first token's latency by at most that share of it. `tps` is tokens per second, 0: as
    fast as can be. `typical` is the length of a usual answer in tokens. `fault` (a key of FAULTS or a status)
    strikes `fault_rate` of all calls, and only the next `fault_times` where that is not 0. `cached_from`: a
    conversation seen before is reported as cached input from that many tokens on; 0: never. `says` is the text of
    every answer instead of invented words.
    """

    name: str
    first_token: float = 0.0
    jitter: float = 0.0
    tps: float = 0.0
    context: int = 128_000
    max_output: int = 16_384
    typical: int = 40
    says: str | None = None
    reasoning: int = 0
    rejects: frozenset[str] = frozenset()
    fault: str | None = None
    fault_rate: float = 1.0
    fault_times: int = 0
    retry_after: float | None = 1.0
    silence: float = 30.0
    cached_from: int = 0
    input_price: Decimal = Decimal(0)
    cached_price: Decimal | None = None
    output_price: Decimal = Decimal(0)
    seed: int = 0

    def with_settings(self, settings: Mapping[str, object]) -> SimulatedModel:
        """A copy with these settings, as text or JSON values. Raises ValueError naming field and remedy."""
        changes: dict[str, Any] = {}
        for name, value in settings.items():
            reader = _READERS.get(name)
            if reader is None:
                raise ValueError(f"{name}: unknown setting; known are {', '.join(sorted(_READERS))}")
            try:
                changes[name] = reader(value)
            except (ValueError, TypeError, ArithmeticError) as error:
                raise ValueError(f"{name}={value}: {error}") from None
        return replace(self, **changes)


def parse_model(text: str) -> SimulatedModel:
    """`NAME` or `NAME:SETTING=VALUE,...`, for example `small:first_token=50ms,tps=200,context=8k`.

    Durations take `ms`, `s` or `m` (plain numbers are seconds), counts take `k`; several rejected parameters
    are joined with `+`. Raises ValueError naming the setting and the remedy.
    """
    name, _, rest = text.partition(":")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}", name):
        raise ValueError(f"{name!r} is no model name: write NAME or NAME:SETTING=VALUE,SETTING=VALUE")
    settings: dict[str, object] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"{name}: {item!r} has no value: write {item}=VALUE")
        settings[key.strip()] = value.strip()
    return SimulatedModel(name).with_settings(settings)


def _duration(value: object) -> float:
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m)?", value.strip())
        if match is None:
            raise ValueError("a duration is a number with ms, s or m, such as 300ms")
        return float(match[1]) * {"ms": 0.001, "s": 1.0, "m": 60.0, None: 1.0}[match[2]]
    return _number(value)


def _number(value: object) -> float:
    number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else -1.0
    if not 0 <= number < 1e9:
        raise ValueError("must be a number of at least 0")
    return number


def _share(value: object) -> float:
    number = _number(value)
    if number > 1:
        raise ValueError("must be between 0 and 1")
    return number


def _count(value: object) -> int:
    if isinstance(value, str) and value.endswith("k"):
        return int(_number(value[:-1]) * 1000)
    return int(_number(value))


def _price(value: object) -> Decimal:
    try:
        price = Decimal(str(value))
    except InvalidOperation:
        price = Decimal(-1)
    if not (price.is_finite() and price >= 0):
        raise ValueError("a price is USD per million tokens, such as 0.15")
    return price


def _fault(value: object) -> str | None:
    text = "" if value is None else str(value)
    if text in ("", "none"):
        return None
    if text in FAULTS or (text.isdigit() and 400 <= int(text) <= 599):
        return text
    raise ValueError(f"unknown fault; known are {', '.join(FAULTS)}, a status from 400 to 599, none")


def _names(value: object) -> frozenset[str]:
    if isinstance(value, str):
        return frozenset(filter(None, value.split("+")))
    if isinstance(value, list | tuple | set | frozenset):
        return frozenset(str(name) for name in value)
    raise ValueError("parameter names joined with +")


def _or_none(reader: Callable[[object], Any]) -> Callable[[object], Any]:
    return lambda value: None if value in (None, "", "none") else reader(value)


_READERS: Mapping[str, Callable[[object], Any]] = {
    "first_token": _duration,
    "jitter": _share,
    "tps": _number,
    "context": _count,
    "max_output": _count,
    "typical": _count,
    "says": _or_none(str),
    "reasoning": _count,
    "rejects": _names,
    "fault": _fault,
    "fault_rate": _share,
    "fault_times": _count,
    "retry_after": _or_none(_duration),
    "silence": _duration,
    "cached_from": _count,
    "input_price": _price,
    "cached_price": _or_none(_price),
    "output_price": _price,
    "seed": _count,
}


# ---- tokens and answers ----


def text_tokens(text: str) -> int:
    """One token per started four bytes of UTF-8."""
    return ((len(text) if text.isascii() else len(text.encode(errors="replace"))) + 3) // 4


def message_tokens(message: Mapping[str, Any]) -> int:
    content = message.get("content")
    total = 4
    if isinstance(content, str):
        total += text_tokens(content)
    elif isinstance(content, list):
        for part in content:
            if isinstance(part, dict):
                total += text_tokens(part["text"]) if isinstance(part.get("text"), str) else 85
    if calls := message.get("tool_calls"):
        total += text_tokens(json.dumps(calls))
    return total


def prompt_tokens(body: Mapping[str, Any]) -> int:
    """What a chat completion request is charged as input."""
    total = 3 + sum(message_tokens(message) for message in body.get("messages", ()))
    for key in ("tools", "functions", "response_format"):
        if body.get(key):
            total += text_tokens(json.dumps(body[key]))
    return total


_SYLLABLES = ("ka", "lo", "mi", "ren", "sto", "vi", "dal", "pe", "sun", "gra", "ni", "tor", "bel", "ho")
# 4096 invented words with their blank; an answer is a stretch of this ring.
_WORDS = tuple(
    " " + _SYLLABLES[a] + _SYLLABLES[b] + tail
    for tail in (
        "",
        "r",
        "n",
        "s",
        ".",
        "m",
        "l",
        "t",
        ",",
        "x",
        "d",
        "k",
        "p",
        "f",
        "g",
        "z",
        "w",
        "v",
        "j",
        "b",
        "q",
    )
    for a in range(14)
    for b in range(14)
)[:4096]
_RING = _WORDS + _WORDS[:2048]
_RING_TEXT = "".join(_RING)
_RING_AT = tuple(itertools.accumulate(map(len, _RING), initial=0))


def _words(number: int, length: int) -> list[str]:
    start = number % len(_WORDS)
    words: list[str] = []
    while len(words) < length:
        words += _RING[start : start + min(length - len(words), 2048)]
    return words


def _text(number: int, length: int) -> str:
    start = number % len(_WORDS)
    if length <= 2048:
        return _RING_TEXT[_RING_AT[start] : _RING_AT[start + length]]
    return "".join(_words(number, length))


def _example(schema: object, depth: int = 0) -> Any:
    """A small value that a JSON schema accepts in the usual cases."""
    if not isinstance(schema, dict) or depth > 8:
        return {}
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type")
    kind = next((k for k in kind if k != "null"), None) if isinstance(kind, list) else kind
    if kind == "object" or "properties" in schema:
        return {key: _example(value, depth + 1) for key, value in (schema.get("properties") or {}).items()}
    if kind == "array":
        return [_example(schema.get("items"), depth + 1)]
    return {"string": "example", "integer": 1, "number": 1.5, "boolean": True}.get(str(kind))


@dataclass(slots=True)
class _Answer:
    """One choice. `pieces` is its text as streamed, one token each; `call` a tool call instead of text."""

    pieces: list[str]
    finish: str
    call: dict[str, Any] | None = None


def _tool_call(body: Mapping[str, Any], number: int) -> dict[str, Any] | None:
    tools = [t["function"] for t in body.get("tools") or () if isinstance(t, dict) and t.get("function")]
    choice = body.get("tool_choice", "auto")
    if not tools or choice == "none":
        return None
    wanted = choice.get("function", {}).get("name") if isinstance(choice, dict) else None
    last = next((m for m in reversed(body["messages"]) if isinstance(m, dict)), {})
    said = json.dumps(last.get("content")).lower()
    for function in tools:
        name = str(function.get("name"))
        if name == wanted or (wanted is None and choice == "auto" and name.lower() in said):
            break
    else:
        asked = re.search(r"\b(tool|function|call)\b", said) is not None and last.get("role") == "user"
        if choice != "required" and not asked:
            return None
        function = tools[0]
    arguments = json.dumps(_example(function.get("parameters") or {"type": "object"}))
    return {
        "id": f"call_{number:024x}"[:29],
        "type": "function",
        "function": {"name": str(function.get("name")), "arguments": arguments},
    }


# ---- the call log ----


@dataclass(slots=True)
class Call:
    """One call as the provider saw it. `client_left`: the connection went before the answer's end."""

    id: str
    model: str
    path: str
    started: str
    request_id: str | None
    headers: tuple[str, ...]
    fields: tuple[str, ...]
    stream: bool = False
    fault: str | None = None
    status: int | None = None
    ended: str | None = None
    duration: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    complete: bool = False
    client_left: bool = False
    cost_usd: str = "0"


class _Refusal(Exception):
    def __init__(
        self, status: int, message: str, code: str | None, param: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        kind = "server_error" if status >= 500 else kind
        self.status = status
        self.headers = headers
        self.body = _dump({"error": {"message": message, "type": kind, "param": param, "code": code}})


class _ClientLeft(Exception):
    pass


def _dump(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class _Line:
    """Watches for the client's leaving while an answer takes its time."""

    __slots__ = ("_receive", "_watch", "send")

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._watch: asyncio.Task[None] | None = None
        self.send = send

    async def wait(self, seconds: float) -> None:
        """Sleeps. Raises _ClientLeft as soon as the client is gone."""
        if self._watch is None:
            self._watch = asyncio.ensure_future(self._gone())
        await asyncio.wait({self._watch}, timeout=seconds)
        self.check()

    def check(self) -> None:
        if self._watch is not None and self._watch.done():
            raise _ClientLeft

    def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


@dataclass(slots=True)
class Simulator:
    """The ASGI application; see the module's docstring. Build it with `application`."""

    models: dict[str, SimulatedModel]
    key: str | None = None
    log: deque[Call] = field(default_factory=lambda: deque(maxlen=LOG_LIMIT))
    log_file: TextIO | None = None
    calls: dict[str, int] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _random: dict[str, random.Random] = field(default_factory=dict)
    _seen: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        path = scope["path"]
        route = path.removeprefix("/v1")
        try:
            if path == "/control":
                await self._control(scope, receive, send)
            elif path == "/log":
                await self._show_log(scope, send)
            elif path == "/healthz":
                await _answer(send, 200, b"ok", b"text/plain")
            elif route == "/models" and scope["method"] == "GET":
                await _answer(send, 200, self._list_models())
            elif route in ("/chat/completions", "/embeddings") and scope["method"] == "POST":
                await self._call(route, scope, receive, send)
            else:
                stray = Call(f"stray-{next(self._numbers):016x}", "", path, _now(), None, (), ())
                stray.status, stray.ended = 404, stray.started
                self.log.append(stray)
                raise _Refusal(404, f"Invalid URL ({scope['method']} {path})", None)
        except _Refusal as refusal:
            await _answer(send, refusal.status, refusal.body, headers=refusal.headers)
        except _ClientLeft:
            return

    # -- the simulator's own pages --

    def _list_models(self) -> bytes:
        return _dump(
            {
                "object": "list",
                "data": [
                    {
                        "id": model.name,
                        "object": "model",
                        "created": 1_700_000_000,
                        "owned_by": "farthing-simulate",
                        "context_length": model.context,
                    }
                    for model in self.models.values()
                ],
            }
        )

    async def _control(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST":
            change = _object(await _body(receive))
            name = change.pop("model", None)
            names = list(self.models) if name == "*" else [name]
            if name != "*" and name not in self.models:
                raise _Refusal(
                    404, f"model: unknown; known are {', '.join(self.models)} and *", None, "model"
                )
            try:
                changed = {n: self.models[n].with_settings(change) for n in names}
            except ValueError as error:
                raise _Refusal(400, str(error), "invalid_setting") from None
            self.models.update(changed)
        shown = [
            {**asdict(model), "rejects": sorted(model.rejects), "calls": self.calls.get(model.name, 0)}
            for model in self.models.values()
        ]
        await _answer(send, 200, json.dumps({"models": shown}, default=str).encode())

    async def _show_log(self, scope: Scope, send: Send) -> None:
        if scope["method"] == "DELETE":
            self.log.clear()
        names = [f.name for f in fields(Call)]
        lines = b"".join(_dump({n: getattr(call, n) for n in names}) + b"\n" for call in self.log)
        await _answer(send, 200, lines, b"application/x-ndjson")

    # -- one call --

    async def _call(self, route: str, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        call = Call(
            id=f"{'chatcmpl' if route != '/embeddings' else 'embd'}-{next(self._numbers):016x}",
            model="",
            path=route,
            started=_now(),
            request_id=headers[b"x-request-id"].decode("latin-1") if b"x-request-id" in headers else None,
            headers=tuple(name.decode("latin-1") for name in headers),
            fields=(),
        )
        self.log.append(call)
        line = _Line(receive, send)
        try:
            raw = await _body(receive)
            if self.key is not None and headers.get(b"authorization") != b"Bearer " + self.key.encode():
                raise _Refusal(401, "Incorrect API key provided.", "invalid_api_key")
            body = _object(raw)
            call.fields = tuple(body)
            model = self._model(body)
            call.model = model.name
            self.calls[model.name] = self.calls.get(model.name, 0) + 1
            if route == "/embeddings":
                await self._embed(model, body, call, line)
            else:
                await self._complete(model, body, call, line)
        except _Refusal as refusal:
            call.status = refusal.status
            raise
        except _ClientLeft:
            call.client_left = True
        except _Aborted:
            _reset(scope)
        finally:
            line.close()
            call.ended = _now()
            call.duration = round(time.monotonic() - started, 6)
            if self.log_file is not None:
                self.log_file.write(json.dumps(asdict(call)) + "\n")
                self.log_file.flush()

    def _model(self, body: Mapping[str, Any]) -> SimulatedModel:
        name = body.get("model")
        model = self.models.get(name) if isinstance(name, str) else None
        if model is None:
            raise _Refusal(404, "The model does not exist.", "model_not_found", "model")
        for parameter in body:
            if parameter in model.rejects:
                raise _Refusal(
                    400,
                    f"Unsupported parameter: '{parameter}' is not supported with this model.",
                    "unsupported_parameter",
                    parameter,
                )
        return model

    def _strike(self, model: SimulatedModel) -> str | None:
        """The fault of this call, if one strikes."""
        if model.fault is None or self._dice(model).random() >= model.fault_rate:
            return None
        if model.fault_times:
            left = model.fault_times - 1
            self.models[model.name] = replace(model, fault_times=left, fault=model.fault if left else None)
        return model.fault

    def _dice(self, model: SimulatedModel) -> random.Random:
        dice = self._random.get(model.name)
        if dice is None:
            dice = self._random[model.name] = random.Random(f"{model.name}:{model.seed}")  # noqa: S311
        return dice

    async def _before_answer(self, model: SimulatedModel, call: Call, line: _Line) -> None:
        """Faults that show before the first token, and the wait for it. Raises _Refusal or _ClientLeft."""
        fault = call.fault = self._strike(model)
        if fault is not None:
            if fault.isdigit():
                status = int(fault)
                wait = (
                    {}
                    if status not in (429, 503) or model.retry_after is None
                    else {"retry-after": f"{model.retry_after:g}"}
                )
                code = "rate_limit_exceeded" if status == 429 else None
                raise _Refusal(status, f"Simulated status {status}.", code, **wait)
            if fault == "redirect":
                raise _Refusal(302, "Moved.", None, location="/elsewhere")
            if fault == "stall":
                await line.wait(86_400)
        delay = model.first_token
        if delay:
            if model.jitter:
                delay *= 1 + model.jitter * (2 * self._dice(model).random() - 1)
            if fault != "stall_after_headers":
                await line.wait(delay)

    async def _complete(self, model: SimulatedModel, body: dict[str, Any], call: Call, line: _Line) -> None:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise _Refusal(400, "'messages' must be a list of at least one message.", None, "messages")
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise _Refusal(
                400, "The limit of output tokens must be a number of at least 1.", None, "max_tokens"
            )
        count = body.get("n") or 1
        if not isinstance(count, int) or not 1 <= count <= 128:
            raise _Refusal(400, "'n' must be between 1 and 128.", None, "n")
        call.stream = body.get("stream") is True
        call.prompt_tokens = prompt_tokens(body)
        if call.prompt_tokens + (limit or 0) > model.context:
            raise _Refusal(
                400,
                f"This model's maximum context length is {model.context} tokens. However, your request has "
                f"{call.prompt_tokens} input tokens and asks for {limit or 0} output tokens.",
                "context_length_exceeded",
                "messages",
            )
        if model.cached_from:
            call.cached_tokens = self._cached(model, messages, call.prompt_tokens)
        answers = [self._answer(model, body, index, limit) for index in range(count)]
        await self._before_answer(model, call, line)
        if call.fault == "not_json":
            call.status = 200
            await _answer(line.send, 200, b"<html>Welcome</html>", b"text/html")
            return
        try:
            if call.stream:
                await self._stream(model, body, answers, call, line)
            else:
                await self._whole(model, body, answers, call, line)
        finally:
            call.cost_usd = _cost(model, call)

    def _answer(
        self, model: SimulatedModel, body: Mapping[str, Any], index: int, limit: int | None
    ) -> _Answer:
        seed = f"{model.name}\0{model.seed}\0{body.get('seed')}\0{index}\0".encode()
        said = json.dumps(body["messages"][-1].get("content")).encode()
        number = int.from_bytes(
            blake2b(said, digest_size=8, key=blake2b(seed, digest_size=32).digest()).digest()
        )
        bound = min(limit or model.max_output, model.max_output)
        if model.says is not None:
            pieces = re.findall(r"\s*\S+\s*$|\s*\S+", model.says) or [model.says]
            return _Answer(pieces[:bound], "stop" if len(pieces) <= bound else "length")
        if body.get("tools") and (tool_call := _tool_call(body, number)) is not None:
            arguments = re.findall(r".{1,8}", tool_call["function"]["arguments"], re.DOTALL)
            return _Answer(arguments or [""], "tool_calls", tool_call)
        form = body.get("response_format")
        if isinstance(form, dict) and form.get("type") in ("json_object", "json_schema"):
            schema = (form.get("json_schema") or {}).get("schema")
            value = _example(schema) if schema else {"answer": _text(number, 3).strip()}
            pieces = re.findall(r".{1,6}", json.dumps(value), re.DOTALL)
            return _Answer(pieces[:bound], "stop" if len(pieces) <= bound else "length")
        wanted = max(1, model.typical // 2 + (number >> 16) % (model.typical + 1))
        length = min(wanted, bound)
        pieces = _words(number, length)
        pieces[0] = f"{pieces[0][1:].capitalize()}-{number & 0xFFFFFF:06x}"
        finish = "stop" if wanted <= bound else "length"
        stops = body.get("stop") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            text = "".join(pieces)
            if stop and stop in text:
                pieces, finish = [text[: text.index(stop)]], "stop"
        return _Answer(pieces, finish)

    def _cached(self, model: SimulatedModel, messages: Sequence[Mapping[str, Any]], most: int) -> int:
        """Tokens of the longest beginning of this conversation that was sent before."""
        digest = blake2b(model.name.encode(), digest_size=16)
        total, cached = 0, 0
        for message in messages:
            digest.update(json.dumps(message).encode())
            total += message_tokens(message)
            mark = digest.digest()
            if mark in self._seen:
                cached = total
                self._seen.move_to_end(mark)
            self._seen[mark] = None
        while len(self._seen) > 8192:
            self._seen.popitem(last=False)
        return min(cached, most) if cached >= model.cached_from else 0

    def _usage(self, model: SimulatedModel, call: Call) -> dict[str, Any]:
        return {
            "prompt_tokens": call.prompt_tokens,
            "completion_tokens": call.completion_tokens,
            "total_tokens": call.prompt_tokens + call.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": call.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": model.reasoning,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }

    async def _whole(
        self,
        model: SimulatedModel,
        body: Mapping[str, Any],
        answers: Sequence[_Answer],
        call: Call,
        line: _Line,
    ) -> None:
        tokens = max(len(answer.pieces) for answer in answers)
        if model.tps:
            await line.wait(tokens / model.tps)
        call.status = 200
        call.completion_tokens = model.reasoning + sum(len(answer.pieces) for answer in answers)
        choices = []
        for index, answer in enumerate(answers):
            message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
            if answer.call is not None:
                message["tool_calls"] = [answer.call]
            else:
                message["content"] = "".join(answer.pieces)
            logprobs = {"content": [_logprob(p) for p in answer.pieces], "refusal": None}
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": logprobs if body.get("logprobs") else None,
                    "finish_reason": answer.finish,
                }
            )
        payload = {
            "id": call.id,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model.name,
            "choices": choices,
            "system_fingerprint": "fp_simulated",
        }
        if call.fault != "no_usage":
            payload["usage"] = self._usage(model, call)
        answer_bytes = _dump(payload)
        if call.fault in ("error_first", "error_midstream"):
            answer_bytes = _dump({"error": _SIMULATED_ERROR})
        headers = {"x-request-id": call.id}
        if call.fault == "gzip":
            answer_bytes, headers["content-encoding"] = gzip.compress(answer_bytes), "gzip"
        if call.fault in ("cut", "reset", "silence", "stall_after_headers", "disconnect"):
            if call.fault == "disconnect":
                call.status = None
                raise _Aborted
            await _start(
                line.send, 200, b"application/json", {**headers, "content-length": str(len(answer_bytes))}
            )
            half = len(answer_bytes) // 2
            if call.fault == "stall_after_headers":
                await line.wait(86_400)
            await _piece(line.send, answer_bytes[:half])
            if call.fault != "silence":
                raise _Aborted
            await line.wait(model.silence)
            await _piece(line.send, answer_bytes[half:], more=False)
        else:
            await _answer(line.send, 200, answer_bytes, headers=headers)
        call.complete = call.fault not in ("error_first", "error_midstream")

    async def _stream(
        self,
        model: SimulatedModel,
        body: Mapping[str, Any],
        answers: Sequence[_Answer],
        call: Call,
        line: _Line,
    ) -> None:
        options = body.get("stream_options")
        wants_usage = isinstance(options, dict) and options.get("include_usage") is True
        fault = call.fault
        if fault == "disconnect":
            raise _Aborted
        headers = {"x-request-id": call.id}
        if fault == "gzip":
            headers["content-encoding"] = "gzip"
        call.status = 200
        await _start(line.send, 200, b"text/event-stream; charset=utf-8", headers)
        if fault == "stall_after_headers":
            await _piece(line.send, b"")
            await line.wait(86_400)

        total = sum(len(answer.pieces) for answer in answers)
        half = max(1, total // 2)
        out = _writer(line, fault)
        if fault == "error_first":
            await out(b"data: " + _dump({"error": _SIMULATED_ERROR}) + b"\n\n")
            await _piece(line.send, b"", more=False)
            return
        head = (
            b'data: {"id":"%s","object":"chat.completion.chunk","created":%d,"model":%s,'
            b'"service_tier":"default","system_fingerprint":"fp_simulated","choices":['
            % (call.id.encode(), int(time.time()), _dump(model.name))
        )
        tail = b'],"usage":null}\n\n' if wants_usage and fault != "no_usage" else b"]}\n\n"
        call.completion_tokens = model.reasoning
        began = time.monotonic()
        sent = 0
        for kind, index, data in _pieces(answers, bool(body.get("logprobs"))):
            if kind == "token":
                if model.tps and (ahead := began + sent / model.tps - time.monotonic()) > 0.001:
                    await line.wait(ahead)
                if sent == half and fault in ("cut", "reset", "error_midstream", "silence"):
                    if fault == "silence":
                        await line.wait(model.silence)
                    elif fault == "cut":
                        await _piece(line.send, b"", more=False)
                        return
                    elif fault == "error_midstream":
                        # What is read at once with it broke before anything of it was passed on.
                        await line.wait(_BEFORE_RESET)
                        await out(b"data: " + _dump({"error": _SIMULATED_ERROR}) + b"\n\n")
                        await _piece(line.send, b"", more=False)
                        return
                    else:
                        # A reset takes back what the other side has not read yet: let it read the first half.
                        await line.wait(_BEFORE_RESET)
                        raise _Aborted
                sent += 1
                call.completion_tokens += 1
                if not sent % 16:
                    # An answer without latency would else keep the loop from hearing that the client left.
                    await line.wait(0)
            last = kind == "finish" and index == len(answers) - 1
            if last and fault == "usage_with_choices":
                tail = b'],"usage":%s}\n\n' % _dump(self._usage(model, call))
            await out(head + data + tail)
        if wants_usage and fault not in ("no_usage", "usage_with_choices"):
            await out(head + b'],"usage":%s}\n\n' % _dump(self._usage(model, call)))
        if fault != "no_done":
            await out(b"data: [DONE]\n\n")
        if fault == "gzip":
            await out(b"")
        await _piece(line.send, b"", more=False)
        line.check()
        call.complete = True

    async def _embed(self, model: SimulatedModel, body: Mapping[str, Any], call: Call, line: _Line) -> None:
        given = body.get("input")
        inputs = [given] if isinstance(given, str) else given
        if not isinstance(inputs, list) or not inputs or not all(isinstance(i, str | list) for i in inputs):
            raise _Refusal(400, "'input' must be a text or a list of texts.", None, "input")
        size = body.get("dimensions") or 64
        if not isinstance(size, int) or not 1 <= size <= 4096:
            raise _Refusal(400, "'dimensions' must be between 1 and 4096.", None, "dimensions")
        call.prompt_tokens = sum(text_tokens(i) if isinstance(i, str) else len(i) for i in inputs)
        await self._before_answer(model, call, line)
        data = []
        for index, text in enumerate(inputs):
            dice = random.Random(f"{model.name}:{text}")  # noqa: S311
            vector: Any = [dice.uniform(-1, 1) for _ in range(size)]
            if body.get("encoding_format") == "base64":
                vector = base64.b64encode(struct.pack(f"<{size}f", *vector)).decode()
            data.append({"object": "embedding", "index": index, "embedding": vector})
        call.status = 200
        call.cost_usd = _cost(model, call)
        payload: dict[str, Any] = {"object": "list", "data": data, "model": model.name}
        if call.fault != "no_usage":
            payload["usage"] = {"prompt_tokens": call.prompt_tokens, "total_tokens": call.prompt_tokens}
        await _answer(line.send, 200, _dump(payload))
        call.complete = True


_SIMULATED_ERROR = {
    "message": "Simulated error.",
    "type": "server_error",
    "param": None,
    "code": "simulated_error",
}


def _cost(model: SimulatedModel, call: Call) -> str:
    cached_price = model.input_price if model.cached_price is None else model.cached_price
    total = (
        (call.prompt_tokens - call.cached_tokens) * model.input_price
        + call.cached_tokens * cached_price
        + call.completion_tokens * model.output_price
    )
    return format(total / 1_000_000, "f")


def _logprob(piece: str) -> dict[str, Any]:
    return {"token": piece, "logprob": -0.125, "bytes": list(piece.encode()), "top_logprobs": []}


def _pieces(answers: Sequence[_Answer], logprobs: bool) -> Iterable[tuple[str, int, bytes]]:
    """The choices of a stream's chunks, as JSON: (`start`, `token` or `finish`, choice, bytes)."""
    none = b',"logprobs":null,"finish_reason":null}'
    for index, answer in enumerate(answers):
        start: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
        if answer.call is not None:
            function = {"name": answer.call["function"]["name"], "arguments": ""}
            start["content"] = None
            start["tool_calls"] = [{**answer.call, "index": 0, "function": function}]
        yield "start", index, b'{"index":%d,"delta":%s' % (index, _dump(start)) + none
    for step in range(max(len(answer.pieces) for answer in answers)):
        for index, answer in enumerate(answers):
            if step >= len(answer.pieces):
                continue
            piece = answer.pieces[step]
            if answer.call is not None:
                delta = _dump({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})
            else:
                delta = b'{"content":%s}' % _dump(piece)
            end = none
            if logprobs and answer.call is None:
                end = b',"logprobs":%s,"finish_reason":null}' % _dump(
                    {"content": [_logprob(piece)], "refusal": None}
                )
            yield "token", index, b'{"index":%d,"delta":%s' % (index, delta) + end
    for index, answer in enumerate(answers):
        yield (
            "finish",
            index,
            b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":"%s"}' % (index, answer.finish.encode()),
        )


# ---- ASGI ----

_TRANSPORT = "farthing.reset"
_BEFORE_RESET = 0.3
"""Seconds between the first half of an answer and the reset or the error that breaks it off."""


def _writer(line: _Line, fault: str | None) -> Callable[[bytes], Awaitable[None]]:
    """Sends a frame in the form that the fault asks for."""
    if fault == "crlf":

        async def crlf(frame: bytes) -> None:
            await _piece(line.send, frame.replace(b"data: ", b"data:", 1).replace(b"\n", b"\r\n"))

        return crlf
    if fault == "bytewise":

        async def bytewise(frame: bytes) -> None:
            for at in range(len(frame)):
                await _piece(line.send, frame[at : at + 1])
                await asyncio.sleep(0)

        return bytewise
    if fault == "gzip":
        held: list[bytes] = []

        async def compressed(frame: bytes) -> None:
            held.append(frame)
            if not frame:
                await _piece(line.send, gzip.compress(b"".join(held)))

        return compressed

    async def plain(frame: bytes) -> None:
        await line.send({"type": "http.response.body", "body": frame, "more_body": True})

    return plain


class _Aborted(Exception):
    """Ends a call without finishing its answer: the connection is reset."""


def _reset(scope: Scope) -> None:
    transport = scope.get("extensions", {}).get(_TRANSPORT, {}).get("transport")
    if transport is not None:
        # Closing with a linger of zero seconds sends RST instead of FIN.
        transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        transport.abort()


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _body(receive: Receive) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientLeft
        piece = message.get("body", b"")
        size += len(piece)
        if size > MAX_BODY:
            raise _Refusal(413, f"The body is larger than {MAX_BODY} bytes.", "request_too_large")
        pieces.append(piece)
        if not message.get("more_body"):
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _Refusal(400, "The body must be a JSON object.", "invalid_json")
    return value


async def _start(send: Send, status: int, content_type: bytes, headers: Mapping[str, str]) -> None:
    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", content_type), *named],
        }
    )


async def _piece(send: Send, data: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


async def _answer(
    send: Send,
    status: int,
    body: bytes,
    content_type: bytes = b"application/json",
    headers: Mapping[str, str] | None = None,
) -> None:
    await _start(send, status, content_type, {**(headers or {}), "content-length": str(len(body))})
    await _piece(send, body, more=False)


# ---- running it ----


def application(
    models: Iterable[SimulatedModel],
    *,
    key: str | None = None,
    log_file: Path | None = None,
) -> Simulator:
    """The provider as an ASGI application. With `key`, calls must carry it. `log_file` gets the log as well.

    Raises ValueError for no model or two of one name.
    """
    listed = list(models)
    named = {model.name: model for model in listed}
    if not named or len(named) != len(listed):
        raise ValueError("give at least one model, and each name once")
    return Simulator(named, key, log_file=log_file.open("a") if log_file is not None else None)


class _Server(uvicorn.Server):
    """Leaves the process's signals alone: who runs the simulator decides when it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


class _Protocol(HttpToolsProtocol):
    """Lets an application reset its connection, which ASGI has no message for."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {_TRANSPORT: {"transport": self.transport}}


class Running:
    """A simulator that serves. `url` is the base URL a provider is configured with, ending in `/v1`."""

    def __init__(self, app: Simulator, server: _Server, listener: socket.socket) -> None:
        self.app = app
        self.host, self.port = listener.getsockname()[:2]
        self.origin = f"http://{self.host}:{self.port}"
        self.url = f"{self.origin}/v1"
        self._server = server
        self._listener = listener
        self._task = asyncio.ensure_future(server.serve(sockets=[listener]))

    async def started(self) -> None:
        while not self._server.started:
            if self._task.done():
                self._task.result()
                raise RuntimeError("the simulator ended while it started")
            await asyncio.sleep(0.005)

    async def wait(self) -> None:
        """Until somebody ends the server."""
        await asyncio.shield(self._task)

    async def close(self) -> None:
        """Ends at once; calls in progress are broken off."""
        self._server.should_exit = True
        self._server.force_exit = True
        await self._task
        self._listener.close()
        if self.app.log_file is not None:
            self.app.log_file.close()


async def serve(app: Simulator, host: str = "127.0.0.1", port: int = 0) -> Running:
    """Starts serving in this event loop; port 0 picks a free one. Raises OSError where the port is taken."""
    listener = socket.create_server((host, port), backlog=2048)
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_level="critical",
        access_log=False,
        timeout_keep_alive=75,
    )
    running = Running(app, _Server(config), listener)
    await running.started()
    return running


DEFAULT_MODELS = (
    "small:first_token=150ms,jitter=0.3,tps=180,typical=80,input_price=0.10,output_price=0.40",
    "middle:first_token=350ms,jitter=0.3,tps=110,typical=140,input_price=1,output_price=4",
    "frontier:first_token=900ms,jitter=0.3,tps=70,typical=220,input_price=5,output_price=20",
)


def main(host: str, port: int, models: Sequence[str], log: str | None) -> int:
    """`farthing simulate`: serves `models` (as `parse_model` reads them) until SIGTERM or SIGINT; the exit status."""
    try:
        app = application(
            [parse_model(text) for text in models or DEFAULT_MODELS], log_file=Path(log) if log else None
        )
    except (ValueError, OSError) as error:
        print(f"farthing: simulate: {error}", file=sys.stderr)
        return 2
    try:
        asyncio.run(_until_ended(app, host, port))
    except OSError as error:
        print(
            f"farthing: --port: {host}:{port} cannot be listened on ({error.strerror}). "
            "Name another port, or free it.",
            file=sys.stderr,
        )
        return 2
    return 0


async def _until_ended(app: Simulator, host: str, port: int) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    running = await serve(app, host, port)
    print(f"Simulated models {', '.join(app.models)} at {running.url}", flush=True)
    await ended.wait()
    await running.close()
