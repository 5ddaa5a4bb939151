"""What OpenAI's wire says: usage, finish reasons and errors, read from bytes that are passed on unchanged.

Protocol: OpenAI API reference, chat completions, object and streaming; facts about other providers' habits
are noted where they matter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec
from msgspec import Struct

from router.core.sse import MAX_FRAME, FrameSplitter, data_of, event_of, is_comment
from router.core.tokens import outside_ascii, tokens_of
from router.core.types import Usage

MAX_TOKENS_REPORTED = 10**9
"""A count above this is a provider's mistake; it would overflow a ledger row."""

LONGEST_RETRY_AFTER = 86_400

_decoder = msgspec.json.Decoder()

DONE_FRAME = b"data: [DONE]\n\n"


# ---- usage ----


def read_usage(raw: Mapping[str, Any]) -> tuple[Usage | None, bool]:
    """OpenAI's usage object (chat or responses names) as disjoint buckets, and whether the provider's figures
    contradict each other and had to be bounded. No usage where it counts neither the prompt nor the completion.

    Cached, cache-write, audio and image tokens are part of the prompt, reasoning and audio tokens part of the
    completion. What `total_tokens` holds beyond the two is reasoning that came on top (xAI, Gemini), or the count
    that is missing. A missing detail is 0; a part is never larger than its whole, so no bucket is negative.
    """
    doubts: list[bool] = []

    def counted(holder: Mapping[str, Any], *names: str) -> int | None:
        for name in names:
            value = holder.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
                doubts.append(True)
                return None
            bounded = int(min(max(value, 0), MAX_TOKENS_REPORTED))
            if bounded != value:
                doubts.append(True)
            return bounded
        return None

    def count(holder: Mapping[str, Any], *names: str) -> int:
        return counted(holder, *names) or 0

    def details(*names: str) -> Mapping[str, Any]:
        for name in names:
            value = raw.get(name)
            if isinstance(value, Mapping):
                return value
        return {}

    def take(part: int, left: int) -> tuple[int, int]:
        if part > left:
            doubts.append(True)
            part = left
        return part, left - part

    prompt = counted(raw, "prompt_tokens", "input_tokens")
    completion = counted(raw, "completion_tokens", "output_tokens")
    if prompt is None and completion is None:
        return None, True
    total = count(raw, "total_tokens")
    beyond = max(total - (prompt or 0) - (completion or 0), 0) if total < MAX_TOKENS_REPORTED else 0
    if prompt is None or completion is None:
        prompt, completion = (
            beyond if prompt is None else prompt,
            beyond if completion is None else completion,
        )
        if beyond:
            doubts.append(True)
        beyond = 0
    of_prompt = details("prompt_tokens_details", "input_tokens_details")
    of_completion = details("completion_tokens_details", "output_tokens_details")

    cached, left = take(count(of_prompt, "cached_tokens") or count(raw, "prompt_cache_hit_tokens"), prompt)
    written, left = take(count(of_prompt, "cache_write_tokens", "cache_creation_tokens"), left)
    audio_in, left = take(count(of_prompt, "audio_tokens"), left)
    image_in, text_in = take(count(of_prompt, "image_tokens"), left)

    reasoning = count(of_completion, "reasoning_tokens")
    if beyond and reasoning not in (0, beyond):
        doubts.append(True)  # as it may be part of the completion, of what is beyond it, or of both
    inside, text_out = take(0 if reasoning == beyond else reasoning, completion)
    audio_out, text_out = take(count(of_completion, "audio_tokens"), text_out)

    usage = Usage(
        input=text_in,
        input_cached=cached,
        cache_write=written,
        input_audio=audio_in,
        input_image=image_in,
        output=text_out,
        output_reasoning=inside + beyond,
        output_audio=audio_out,
    )
    return usage, bool(doubts)


# ---- a refusal ----


def retry_after(text: str | None, now: datetime) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date (RFC 9110, 10.2.3); None: it holds neither, or
    more than a day.
    """
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            date = parsedate_to_datetime(text)
        except (ValueError, OverflowError):
            return None
        seconds = max((date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds(), 0.0)
    return seconds if 0 <= seconds <= LONGEST_RETRY_AFTER else None


# ---- a stream ----


@dataclass(frozen=True, slots=True)
class StreamFault:
    """An error event of a provider. `first`: nothing but comments came before it, so the attempt failed as a
    whole. `status` where the event names one. `frame` holds the provider's text: never log it.
    """

    first: bool
    status: int | None
    type: str | None
    code: str | None
    frame: bytes


# Keys whose string value is output that a provider bills for. Searched from `"delta"` or `"choices"` on.
_OUTPUT = re.compile(
    rb'"(?:content|reasoning_content|reasoning|refusal|arguments|text)"\s*:\s*"((?:[^"\\]|\\.)*)"'
)
_WORD = re.compile(r"[\w.-]{1,64}")


class StreamTap:
    """Reads a chat completion stream while it passes.

    `feed` gives back whole frames only, unchanged, so that an error event can follow at any point. It holds
    back one thing, a frame with usage and without choices that the client did not ask for; and from an error
    event (or one that is not JSON) on everything: the caller ends with `error_frame` and without `[DONE]`.

    JSON is parsed only where a frame can hold usage, an error or the end of a choice.
    """

    __slots__ = (
        "_client_wants_usage",
        "_finished",
        "_metered",
        "_seen",
        "_splitter",
        "content_frames",
        "done",
        "error",
        "first_data_seen",
        "output_characters",
        "output_other",
        "truncated",
        "usage",
        "usage_at_end",
        "usage_contradicts",
        "usage_raw",
    )

    def __init__(self, client_wants_usage: bool, *, frame_limit: int = MAX_FRAME) -> None:
        self._client_wants_usage = client_wants_usage
        self._splitter = FrameSplitter(frame_limit)
        self._seen: set[int] = set()
        self._finished: dict[int, str] = {}
        self.usage: Usage | None = None
        self.usage_raw: Mapping[str, Any] | None = None
        self.usage_at_end = False
        self.usage_contradicts = False
        self.error: StreamFault | None = None
        self.done = False
        self.first_data_seen = False
        self.truncated = False
        self.content_frames = 0
        self.output_characters = 0
        self.output_other = 0
        self._metered = 0, 0

    @property
    def output_tokens(self) -> int:
        """About how many tokens of output have passed."""
        return tokens_of(self.output_characters, self.output_other)

    @property
    def unmetered_tokens(self) -> int:
        """About how many of them came after the last usage."""
        characters, other = self._metered
        return tokens_of(self.output_characters - characters, self.output_other - other)

    @property
    def finish_reasons(self) -> tuple[str | None, ...]:
        """One per choice seen, by index; None: that choice has not ended."""
        return tuple(self._finished.get(index) for index in sorted(self._seen))

    @property
    def complete(self) -> bool:
        """Every choice seen has ended with a reason, and nothing went wrong. `[DONE]` alone proves nothing,
        and providers that never send it still finish their choices.
        """
        return (
            bool(self._seen)
            and len(self._finished) == len(self._seen)
            and self.error is None
            and not self.truncated
        )

    def feed(self, chunk: bytes) -> list[bytes]:
        """What to pass on for this chunk. Raises FrameTooLarge (a ValueError)."""
        frames = self._splitter.feed(chunk)
        return [frame for frame in frames if self._passes(frame)]

    def finish(self) -> list[bytes]:
        """Call when the upstream's body has ended cleanly. A last event whose blank line is missing is
        completed (clients would lose it); half an event is held back and sets `truncated`.
        """
        rest = self._splitter.rest()
        self._splitter = FrameSplitter()
        if not rest.strip():
            return []
        data = data_of(rest)
        if data is None or (data.strip() != b"[DONE]" and _object(data) is None):
            self.truncated = True
            return []
        frame = rest.rstrip(b"\r\n") + b"\n\n"
        return [frame] if self._passes(frame) else []

    def _passes(self, frame: bytes) -> bool:
        if self.error is not None:
            return False
        # Most frames are one piece of text of choice 0 with `null` for all that is not known yet.
        start = frame.find(b'"delta"')
        if start > 0 and not _worth_parsing(frame):
            self.first_data_seen = True
            self._seen.add(0)
            self._count_output(frame, start)
            return True
        data = data_of(frame)
        if data is None:
            # A comment keeps connections open. Anything else without data says nothing to a conforming client,
            # or is no event stream at all (a web page, a JSON answer).
            return is_comment(frame)
        if data.strip() == b"[DONE]":
            self.first_data_seen = True
            self.done = True
            return True
        if not data.strip():
            # A conforming client dispatches nothing for it; the others fail on it.
            return False
        payload = _object(data)
        if payload is None or _is_error(payload) or event_of(frame) == b"error":
            self._fail(frame, payload or {"code": "malformed_event"})
            return False
        self.first_data_seen = True
        choices = payload.get("choices")
        if choices:
            self._count_output(frame, max(frame.find(b'"choices"'), 0))
        self._read_choices(choices)
        usage = payload.get("usage")
        if isinstance(usage, dict) and usage:
            self._take_usage(usage)
            if not choices and not self._client_wants_usage:
                return False
        return True

    def _read_choices(self, choices: object) -> None:
        if not isinstance(choices, list):
            return
        for choice in choices:
            if not isinstance(choice, dict):
                continue
            index = choice.get("index", 0)
            if not isinstance(index, int):
                continue
            self._seen.add(index)
            reason = choice.get("finish_reason")
            if isinstance(reason, str) and reason:
                self._finished[index] = reason
            usage = choice.get("usage")  # Moonshot's place for it
            if isinstance(usage, dict) and usage:
                self._take_usage(usage)

    def _take_usage(self, usage: Mapping[str, Any]) -> None:
        self.usage_raw = usage
        read, contradicts = read_usage(usage)
        if read is not None:
            self.usage, self.usage_contradicts = read, contradicts
            # Some providers send what was used so far with every chunk (vLLM, xAI).
            self.usage_at_end = bool(self._seen) and len(self._finished) == len(self._seen)
            self._metered = self.output_characters, self.output_other

    def _count_output(self, frame: bytes, start: int) -> None:
        characters = 0
        for match in _OUTPUT.finditer(frame, start):
            piece = match.group(1)
            if b"\\" in piece:
                piece = _unescaped(piece)
            if piece.isascii():
                characters += len(piece)
            else:
                text = piece.decode(errors="replace")
                characters += len(text)
                self.output_other += outside_ascii(text)
        if characters:
            self.content_frames += 1
            self.output_characters += characters

    def _fail(self, frame: bytes, payload: Mapping[str, Any]) -> None:
        error = payload.get("error")
        said: Mapping[str, Any] = error if isinstance(error, dict) else payload
        status = next(
            (
                value
                for value in (said.get("status"), said.get("status_code"), said.get("code"))
                if isinstance(value, int) and 400 <= value <= 599
            ),
            None,
        )
        self.error = StreamFault(
            first=not self.first_data_seen,
            status=status,
            type=_word(said.get("type")),
            code=_word(said.get("code")),
            frame=frame,
        )


def _worth_parsing(frame: bytes) -> bool:
    """Whether a frame with a delta can hold more than text of choice 0. Substrings only: quotes inside JSON
    strings are escaped, so `"usage"` is a key or a whole value, never a piece of an answer.
    """
    return (
        _other_than(frame, b'"finish_reason"', b"null")
        or _other_than(frame, b'"usage"', b"null")
        or _other_than(frame, b'"index"', b"0")
        or b'"error"' in frame
        or b"event:" in frame
    )


def _other_than(frame: bytes, key: bytes, value: bytes) -> bool:
    keys = frame.count(key)
    return (
        keys != 0
        and keys != frame.count(b"%b:%b" % (key, value))
        and keys != frame.count(b"%b: %b" % (key, value))
    )


def _unescaped(piece: bytes) -> bytes:
    try:
        return str(json.loads(b'"' + piece + b'"')).encode(errors="replace")
    except ValueError:
        return piece


def _word(value: object) -> str | None:
    """An identifier such as `rate_limit_exceeded`; anything else could be text and is left out."""
    return value if isinstance(value, str) and _WORD.fullmatch(value) else None


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        value = _decoder.decode(data)
    except (ValueError, RecursionError):
        try:
            value = json.loads(data)  # takes more than JSON, and so do clients: NaN, half a surrogate pair
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def _is_error(payload: Mapping[str, Any]) -> bool:
    # Older vLLM: the error's fields at the top, `"object": "error"`.
    return bool(payload.get("error")) or payload.get("object") == "error"


def only_usage(frame: bytes) -> bool:
    """Whether all that a frame tells is usage: it goes to those who asked for that, and to nobody else."""
    if b'"usage"' not in frame:
        return False
    data = data_of(frame)
    payload = _object(data) if data is not None else None
    return payload is not None and bool(payload.get("usage")) and not payload.get("choices")


# ---- a JSON answer ----


class AnswerFacts(Struct, frozen=True):
    """What a JSON answer says. `complete`: no error, and every choice has ended with a reason. `error`: it is an
    error object, whatever its status was.
    """

    error: bool
    usage: Usage | None
    usage_raw: Mapping[str, Any] | None
    usage_contradicts: bool
    finish_reasons: tuple[str | None, ...]
    complete: bool
    output_characters: int
    output_tokens: int
    """About how many its text is."""


def complete_answer(body: bytes) -> AnswerFacts | None:
    """The facts of a JSON answer (chat, completion or embedding); None where the body is no JSON object."""
    payload = _object(body)
    if payload is None:
        return None
    usage_raw = payload.get("usage")
    usage, contradicts = None, False
    if isinstance(usage_raw, dict) and usage_raw:
        usage, contradicts = read_usage(usage_raw)
    else:
        usage_raw = None
    reasons: list[str | None] = []
    characters = other = 0
    choices = payload.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if not isinstance(choice, dict):
            reasons.append(None)
            continue
        reason = choice.get("finish_reason")
        reasons.append(reason if isinstance(reason, str) and reason else None)
        for text in _texts(choice):
            characters += len(text)
            other += outside_ascii(text)
    error = _is_error(payload)
    return AnswerFacts(
        error=error,
        usage=usage,
        usage_raw=usage_raw,
        usage_contradicts=contradicts,
        finish_reasons=tuple(reasons),
        complete=not error and (bool(reasons) and None not in reasons if "choices" in payload else True),
        output_characters=characters,
        output_tokens=tokens_of(characters, other),
    )


def _texts(choice: Mapping[str, Any]) -> list[str]:
    """What a provider bills as output."""
    message = choice.get("message")
    if not isinstance(message, dict):
        text = choice.get("text")
        return [text] if isinstance(text, str) else []
    texts = [message.get(key) for key in ("content", "reasoning_content", "reasoning", "refusal")]
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            texts.append(function.get("arguments"))
    return [text for text in texts if isinstance(text, str)]


# ---- one form served as the other ----

_CHUNK_OBJECT = {"chat.completion": "chat.completion.chunk"}
_ANSWER_OBJECT = {chunk: answer for answer, chunk in _CHUNK_OBJECT.items()}


def json_to_sse(body: bytes, include_usage: bool) -> bytes:
    """A complete JSON answer (chat or completion) as the stream that says the same.

    `include_usage` is the client's `stream_options.include_usage`: then every chunk has `usage: null` and one
    more without choices carries it. Raises ValueError when `body` is not such an answer.
    """
    answer = _object(body)
    choices = answer.get("choices") if answer is not None else None
    if answer is None or not isinstance(choices, list) or not choices:
        raise ValueError("not a chat completion")
    shared = {key: value for key, value in answer.items() if key not in ("choices", "usage")}
    shared["object"] = _CHUNK_OBJECT.get(str(answer.get("object")), answer.get("object"))
    usage = {"usage": None} if include_usage else {}
    frames: list[bytes] = []
    for position, choice in enumerate(choices):
        index = choice.get("index", position)
        others = {k: v for k, v in choice.items() if k not in ("index", "message", "finish_reason")}
        end: dict[str, Any] = {"index": index, "finish_reason": choice.get("finish_reason")}
        message = choice.get("message")
        if isinstance(message, dict):
            start = {"role": "assistant", **{k: v for k, v in message.items() if k == "role" or v is None}}
            delta = {k: v for k, v in message.items() if k != "role" and v is not None}
            calls = delta.get("tool_calls")
            if isinstance(calls, list):
                delta["tool_calls"] = [{"index": n, **call} for n, call in enumerate(calls)]
            if "content" in delta:
                start["content"] = ""
            frames.append(_chunk(shared, usage, {"index": index, "delta": start, "finish_reason": None}))
            if delta or others:
                frames.append(
                    _chunk(shared, usage, {"index": index, "delta": delta, **others, "finish_reason": None})
                )
            end["delta"] = {}
        else:
            frames.append(_chunk(shared, usage, {"index": index, **others, "finish_reason": None}))
            end["text"] = ""
        frames.append(_chunk(shared, usage, end))
    if include_usage and answer.get("usage") is not None:
        frames.append(_frame({**shared, "choices": [], "usage": answer["usage"]}))
    frames.append(DONE_FRAME)
    return b"".join(frames)


def sse_to_json(frames: bytes) -> bytes:
    """A complete stream as the JSON answer that says the same; usage where any chunk carried it.

    Raises ValueError when the stream is cut, holds an error, or is not a chat completion.
    """
    splitter = FrameSplitter(max(len(frames), 1))
    shared: dict[str, Any] = {}
    usage: object = None
    merged: dict[int, dict[str, Any]] = {}
    for frame in (*splitter.feed(frames), splitter.rest()):
        data = data_of(frame)
        if data is None or data.strip() == b"[DONE]":
            continue
        payload = _object(data)
        if payload is None or _is_error(payload) or event_of(frame) == b"error":
            raise ValueError("the stream holds an error or a broken event")
        for key, value in payload.items():
            if key not in ("choices", "usage", "obfuscation") and shared.get(key) is None:
                shared[key] = value
        usage = payload.get("usage") or usage
        for choice in payload.get("choices") or ():
            _merge_choice(merged.setdefault(choice.get("index", 0), {}), choice)
    if not merged or not all(choice.get("finish_reason") for choice in merged.values()):
        raise ValueError("the stream is not complete")
    shared["object"] = _ANSWER_OBJECT.get(str(shared.get("object")), shared.get("object"))
    answer = {
        **shared,
        "choices": [_whole_choice(index, merged[index]) for index in sorted(merged)],
    }
    if usage is not None:
        answer["usage"] = usage
    return _dump(answer)


def error_frame(message: str, type: str, code: str | None) -> bytes:
    """The honest end of a stream that cannot go on: OpenAI's error object as an event."""
    return _frame({"error": {"message": message, "type": type, "param": None, "code": code}})


def _merge_choice(whole: dict[str, Any], piece: Mapping[str, Any]) -> None:
    for key, value in piece.items():
        if key == "delta":
            if isinstance(value, dict):
                _merge_message(whole.setdefault("message", {}), value)
        elif key == "text" and isinstance(value, str):
            whole["text"] = whole.get("text", "") + value
        elif key == "logprobs" and isinstance(value, dict):
            held = whole.get("logprobs")
            if not isinstance(held, dict):
                held = whole["logprobs"] = {}
            for name, items in value.items():
                if isinstance(items, list) and isinstance(held.get(name), list):
                    held[name] = held[name] + items
                elif items is not None or name not in held:
                    held[name] = items
        elif value is not None or key not in whole:
            whole[key] = value


def _merge_message(message: dict[str, Any], delta: Mapping[str, Any]) -> None:
    for key, value in delta.items():
        if key == "tool_calls" and isinstance(value, list):
            calls = message.setdefault("tool_calls", {})
            for position, piece in enumerate(value):
                _merge_call(calls.setdefault(piece.get("index", position), {}), piece)
        elif key == "function_call" and isinstance(value, dict):
            _merge_call(message.setdefault("function_call", {}), value)
        elif key != "role" and isinstance(value, str) and isinstance(message.get(key), str):
            message[key] += value
        elif isinstance(value, list) and isinstance(message.get(key), list):
            message[key] = message[key] + value
        elif value is not None or key not in message:
            message[key] = value


def _merge_call(call: dict[str, Any], piece: Mapping[str, Any]) -> None:
    for key, value in piece.items():
        if key == "index" or (value is None and key in call):
            continue
        if isinstance(value, dict) and isinstance(call.get(key), dict):
            _merge_call(call[key], value)
        elif key == "arguments" and isinstance(value, str) and isinstance(call.get(key), str):
            call[key] += value
        elif key == "name" and not value and call.get(key):
            continue
        else:
            call[key] = dict(value) if isinstance(value, dict) else value


def _whole_choice(index: int, choice: dict[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {"index": index, **{k: v for k, v in choice.items() if k != "index"}}
    message = whole.get("message")
    if isinstance(message, dict):
        message = {"role": "assistant", "content": None, **message}
        calls = message.get("tool_calls")
        if isinstance(calls, dict):
            message["tool_calls"] = [calls[n] for n in sorted(calls)]
            if not message["content"]:
                message["content"] = None
        whole["message"] = message
    return whole


def _chunk(shared: Mapping[str, Any], usage: Mapping[str, None], choice: Mapping[str, Any]) -> bytes:
    return _frame({**shared, "choices": [choice], **usage})


def _frame(payload: object) -> bytes:
    return b"data: " + _dump(payload) + b"\n\n"


def _dump(payload: object) -> bytes:
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair has no UTF-8, only an escape
        return json.dumps(payload, separators=(",", ":")).encode()
