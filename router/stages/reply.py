"""What goes back to the caller: headers that say what was decided, and the answer in the form it asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

from msgspec import Struct

from router.core.openai_wire import StreamTap, json_to_sse, sse_to_json
from router.core.ports import CallBegun
from router.core.types import NANO_PER_USD, ChatRequest, NanoUSD
from router.stages.exact import StoredAnswer
from router.stages.exchange import Exchange

MAX_DECISION = 200
CONVERTED_AT_ONCE = 32 * 1024
"""Bytes of an answer that is put into another form on the event loop."""


class Answer(Struct, frozen=True):
    """`headers` are known before the first byte; `frames` is the body, to be read once."""

    status: int
    content_type: str
    headers: Mapping[str, str]
    frames: AsyncIterator[bytes]


async def stored_answer(exchange: Exchange, stored: StoredAnswer) -> Answer:
    """A cache hit."""
    alike, words = exchange.candidate, "exact cache hit"
    if alike is not None:
        words = (
            f"semantic cache hit: similarity {alike.similarity:.2f}, probability {_share(alike.probability)}"
        )
        words += f" (at least {_share(alike.threshold)})"
    headers = _headers(exchange, stored.model, stored.prompt_class, words)
    headers["x-farthing-cost-usd"] = "0"
    headers["age"] = str(max(0, int(exchange.opened_at.timestamp() - stored.stored_at)))
    return _answer(exchange, headers, _once(await _converted(stored.body, stored.stream, exchange.request)))


async def whole_answer(exchange: Exchange, call: CallBegun, body: bytes, cost: NanoUSD | None) -> Answer:
    """An answer that has ended; `body` is in the form of the request that made the call."""
    headers = _live_headers(exchange, call)
    if cost is not None:
        headers["x-farthing-cost-usd"] = _usd(cost)
    return _answer(exchange, headers, _once(await _converted(body, call.stream, exchange.request)))


def streamed_answer(exchange: Exchange, call: CallBegun, frames: AsyncIterator[bytes]) -> Answer:
    """An answer that is still coming."""
    return _answer(exchange, _live_headers(exchange, call), frames)


def _answer(exchange: Exchange, headers: Mapping[str, str], frames: AsyncIterator[bytes]) -> Answer:
    return Answer(200, _content_type(exchange.request), headers, frames)


def _live_headers(exchange: Exchange, call: CallBegun) -> dict[str, str]:
    words = _why(exchange, call.model) if call.request_id == exchange.id else "shares a call in flight"
    return {**call.headers, **_headers(exchange, call.model, call.prompt_class, words)}


def _headers(exchange: Exchange, model: str, prompt_class: str | None, words: str) -> dict[str, str]:
    room = MAX_DECISION - len(exchange.id) - 2
    return {
        "x-farthing-model": model,
        "x-farthing-class": prompt_class or "none",
        "x-farthing-cache": exchange.cache,
        "x-farthing-policy": exchange.policy.policy_hash[:16],
        "x-farthing-decision": f"{_shortened(words, room)}; {exchange.id}",
    }


def _shortened(words: str, room: int) -> str:
    """At most `room` characters, cut between words."""
    return words if len(words) <= room else words[: room - 3].rpartition(" ")[0].rstrip(";:,") + "..."


def _why(exchange: Exchange, model: str) -> str:
    """The decision in words; the rest is told by `farthing policy explain --request-id`."""
    plan, verdict = exchange.plan, exchange.verdict
    if plan is None:
        return model
    if exchange.escalated is not None:
        words = [f"{model} (escalated after {exchange.escalated.replace('_', ' ')})"]
    else:
        words = [f"{model} ({plan.reason.replace('_', ' ')})"]
    if exchange.escalated is None and model != plan.models[0]:
        words.append(f"after {plan.models[0]} failed")
    if exchange.inquiry is not None and exchange.inquiry.doubts:
        words.append(f"nearest stored answer refused: {', '.join(exchange.inquiry.doubts)}")
    if verdict is not None:
        words.append(f"{verdict.prompt_class}: {verdict.reason}")
    words.extend(plan.notes)
    words.extend(f"not {name}: {reason}" for name, reason in plan.dropped.items())
    return "; ".join(words).encode("ascii", "replace").decode("ascii")


def _content_type(request: ChatRequest) -> str:
    return "text/event-stream; charset=utf-8" if request.stream else "application/json"


async def _converted(body: bytes, stream: bool, request: ChatRequest) -> bytes:
    """`_in_form`, off the event loop where it takes milliseconds."""
    if len(body) > CONVERTED_AT_ONCE and (stream or request.stream):
        return await asyncio.to_thread(_in_form, body, stream, request)
    return _in_form(body, stream, request)


def _in_form(body: bytes, stream: bool, request: ChatRequest) -> bytes:
    """A complete answer as JSON or as a stream, as this request wants it, usage as it asked for."""
    if stream and not request.stream:
        return sse_to_json(body)
    if not stream and request.stream:
        return json_to_sse(body, request.include_usage)
    if stream and not request.include_usage:
        tap = StreamTap(client_wants_usage=False)
        return b"".join([*tap.feed(body), *tap.finish()])
    return body


def _share(probability: float) -> str:
    """Never rounded up to 1."""
    return f"{min(probability, 0.999):.3f}"


def _usd(amount: NanoUSD) -> str:
    """Exact, without an exponent and without zeros at the end. What an answer costs is never negative."""
    whole, rest = divmod(amount, NANO_PER_USD)
    return f"{whole}.{rest:09d}".rstrip("0") if rest else str(whole)


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body
