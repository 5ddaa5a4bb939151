"""Parses a request once: what it needs, how long it is, and where its values stand in the raw body."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from datetime import datetime
from hashlib import blake2b
from typing import Any

from router.core.errors import InvalidRequest, ModelNotFound
from router.core.json_object import parse_object
from router.core.policy import EffectivePolicy
from router.core.ports import Snapshot
from router.core.tokens import MESSAGE_OVERHEAD, estimate_tokens
from router.core.types import AUTO, Caller, ChatRequest, PriceRecord

MAX_CHOICES = 128
MAX_MODEL_NAME = 200
MAX_PROMPT_CHARACTERS = 20_000
READ_AT_ONCE = 64 * 1024
"""Bytes of a body that is read on the event loop."""

# Upper bounds for one image in tokens: the largest a well-known model family bills (gpt-4o-mini, high detail).
IMAGE_BOUND = 50_000
IMAGE_BOUND_LOW_DETAIL = 3_000
IMAGE_ESTIMATE = 800
MESSAGE_BOUND = 64

# What every model takes, or the gateway itself writes anew. `n` counts where more than one choice is asked for.
_STRUCTURAL = frozenset({"model", "messages", "stream", "stream_options"})
_STANDARD_TIERS = (None, "auto", "default")


async def read_chat(raw: bytes, caller: Caller) -> tuple[ChatRequest, str | None]:
    """The request and its conversation, off the event loop where that takes milliseconds. See `normalise_chat`."""
    if len(raw) > READ_AT_ONCE:
        return await asyncio.to_thread(_read_chat, raw, caller)
    return _read_chat(raw, caller)


def _read_chat(raw: bytes, caller: Caller) -> tuple[ChatRequest, str | None]:
    request = normalise_chat(raw)
    return request, conversation_of(caller, request)


def normalise_chat(raw: bytes) -> ChatRequest:
    """Raises InvalidRequest naming the field and the remedy."""
    parsed = parse_object(raw)
    body = parsed.values
    model = body.get("model")
    if not isinstance(model, str) or not model.strip():
        raise InvalidRequest("'model' must be a model name, or \"auto\".", param="model")
    if len(model) > MAX_MODEL_NAME:
        raise InvalidRequest(f"'model' is longer than {MAX_MODEL_NAME} characters.", param="model")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("'messages' must be a list with at least one message.", param="messages")
    stream = _boolean(body, "stream")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise InvalidRequest("'stream_options' must be an object.", param="stream_options")
    if options is not None and not stream:
        raise InvalidRequest(
            "'stream_options' is only allowed when 'stream' is true.", param="stream_options"
        )
    if body.get("service_tier") not in _STANDARD_TIERS:
        raise InvalidRequest(
            "'service_tier' has no price here other than the standard one. Leave it out or send \"default\".",
            param="service_tier",
        )
    if body.get("max_tokens") is not None and body.get("max_completion_tokens") is not None:
        raise InvalidRequest(
            "Send either 'max_tokens' or 'max_completion_tokens', not both.", param="max_tokens"
        )

    reader = _MessageReader()
    for index, message in enumerate(messages):
        reader.read(index, message)
    needs = reader.needs | _needs_of(body)
    tools = estimate_tokens(_source(parsed.text, parsed.spans, "tools"))
    max_output = _positive(body, "max_completion_tokens") or _positive(body, "max_tokens")
    return ChatRequest(
        text=parsed.text,
        body=body,
        spans=parsed.spans,
        model=model,
        stream=stream,
        include_usage=bool(options and options.get("include_usage")),
        choices=_choices(body),
        max_output=max_output,
        needs=frozenset(needs),
        parameters=frozenset(
            name
            for name, value in body.items()
            if name not in _STRUCTURAL and value is not None and (name, value) != ("n", 1)
        ),
        input_tokens=reader.tokens + tools,
        input_bound=len(raw) - reader.media_bytes + reader.media_bound + MESSAGE_BOUND * len(messages),
        prompt=reader.last_user_text[:MAX_PROMPT_CHARACTERS],
    )


class _MessageReader:
    """Walks the messages once and collects what deciding and bounding need."""

    def __init__(self) -> None:
        self.needs: set[str] = set()
        self.tokens = 0
        self.media_bytes = 0
        self.media_bound = 0
        self.last_user_text = ""

    def read(self, index: int, message: Any) -> None:
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise InvalidRequest(f"'{where}' must be an object with a role.", param=where)
        role = message.get("role")
        if not isinstance(role, str):
            raise InvalidRequest(f"'{where}.role' must be a string.", param=f"{where}.role")
        self.tokens += MESSAGE_OVERHEAD
        content = message.get("content")
        texts: list[str] = []
        if isinstance(content, str):
            texts.append(content)
        elif isinstance(content, list):
            for at, part in enumerate(content):
                self._part(f"{where}.content[{at}]", part, texts)
        elif content is not None:
            raise InvalidRequest(
                f"'{where}.content' must be text or a list of parts.", param=f"{where}.content"
            )
        for text in texts:
            self.tokens += estimate_tokens(text)
        if message.get("tool_calls"):
            self.needs.add("tools")
            self.tokens += estimate_tokens(str(message["tool_calls"]))
        if role == "tool":
            self.needs.add("tools")
        if role == "user":
            self.last_user_text = "\n".join(texts)

    def _part(self, where: str, part: Any, texts: list[str]) -> None:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise InvalidRequest(f"'{where}' must be an object with a type.", param=where)
        kind = part["type"]
        if kind == "text":
            text = part.get("text")
            if not isinstance(text, str):
                raise InvalidRequest(f"'{where}.text' must be a string.", param=f"{where}.text")
            texts.append(text)
        elif kind == "refusal":
            texts.append(str(part.get("refusal", "")))
        elif kind == "image_url":
            self.needs.add("vision")
            image = part.get("image_url")
            url = image.get("url") if isinstance(image, dict) else None
            if not isinstance(url, str):
                raise InvalidRequest(f"'{where}.image_url.url' must be a string.", param=f"{where}.image_url")
            low = image.get("detail") == "low" if isinstance(image, dict) else False
            self.tokens += 85 if low else IMAGE_ESTIMATE
            self.media_bytes += len(url.encode("utf-8", "replace"))
            self.media_bound += IMAGE_BOUND_LOW_DETAIL if low else IMAGE_BOUND
        else:
            self.needs.add({"input_audio": "audio", "file": "file"}.get(kind, kind[:64]))


def _needs_of(body: Mapping[str, Any]) -> set[str]:
    needs: set[str] = set()
    if body.get("tools") or body.get("functions"):
        needs.add("tools")
    response_format = body.get("response_format")
    if response_format is not None:
        if not isinstance(response_format, dict):
            raise InvalidRequest("'response_format' must be an object.", param="response_format")
        if response_format.get("type") in ("json_schema", "json_object"):
            needs.add("json_schema")
    modalities = body.get("modalities")
    if isinstance(modalities, list) and "audio" in modalities:
        needs.add("audio")
    return needs


def _source(text: str, spans: Mapping[str, tuple[int, int]], name: str) -> str:
    span = spans.get(name)
    return text[span[0] : span[1]] if span else ""


def _boolean(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise InvalidRequest(f"'{name}' must be true or false.", param=name)
    return value


def _positive(body: Mapping[str, Any], name: str) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequest(f"'{name}' must be a whole number of at least 1.", param=name)
    return value


def _choices(body: Mapping[str, Any]) -> int:
    choices = _positive(body, "n") or 1
    if choices > MAX_CHOICES:
        raise InvalidRequest(f"'n' must be at most {MAX_CHOICES}.", param="n")
    return choices


def named_model(
    snapshot: Snapshot, policy: EffectivePolicy, request: ChatRequest, at: datetime
) -> tuple[str | None, str | None, PriceRecord | None]:
    """(reference, name savings are counted against, its price). The reference is None where the gateway chooses."""
    name = request.model
    if name in snapshot.models:
        return name, name, snapshot.price(name, at)
    target = snapshot.aliases.get(name)
    known = snapshot.catalogue_price(name, at) if name != AUTO else None
    if target is None and name != AUTO and snapshot.unknown_model == "refuse":
        shown = "".join(c for c in name[:64] if c.isprintable() and c not in "\"'\\")
        raise ModelNotFound(
            f"No model is called '{shown}' here. Add a line under 'aliases' in policy.yaml, such as "
            f"'{shown}: MODEL', or set 'unknown_model: auto'.",
            param="model",
        )
    if known is not None:
        return target, name, known
    baseline = target if target is not None else policy.baseline
    return target, baseline, snapshot.price(baseline, at) if baseline is not None else None


def conversation_of(caller: Caller, request: ChatRequest) -> str | None:
    """Names a conversation by its first two messages: a provider's prompt cache is warm from the second turn on."""
    messages = request.body["messages"]
    if len(messages) < 2:
        return None
    start = json.dumps([caller.team, caller.app, messages[:2]], sort_keys=True)
    return blake2b(start.encode("ascii"), digest_size=16).hexdigest()
