"""Runs the plan: one provider after the other until one answers, bytes passing through as they come.

The gateway is the only layer that retries, and it never retries after the first byte went to the caller. A
200 counts only from the provider's first data event on; an answer that breaks later ends with an error event
and never with an invented end.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from router.core.decide import DEFAULT_OUTPUT_TOKENS
from router.core.errors import (
    ContextExceeded,
    InvalidRequest,
    RateLimited,
    RequestError,
    UpstreamError,
    UpstreamFailed,
    UpstreamRejected,
    UpstreamTimedOut,
)
from router.core.health import Health
from router.core.json_object import edit, parse_object, written
from router.core.openai_wire import StreamTap, complete_answer, error_frame, only_usage, retry_after
from router.core.policy import ModelSpec, ProviderSpec
from router.core.ports import Clock, Journal, Upstream, UpstreamCall, UpstreamReply
from router.core.pricing import price_usage, total
from router.core.types import Attempt, AttemptOutcome, AttemptRecord, ChatRequest, NanoUSD, Usage
from router.stages.exchange import Exchange
from router.stages.flight import AnswerSink, Head, UsageFrame
from router.stages.reserve import Reserve, output_held, worst_case_of

MAX_ATTEMPTS = 3
MAX_BODY = 64 * 1024 * 1024
MAX_ERROR_BODY = 64 * 1024
LONGEST_WAIT = 2.0
"""Seconds a Retry-After is waited for; a longer one makes the next model answer at once."""
FIRST_WAIT = 0.1
TOKENS_PER_SECOND = 100.0
"""What a model is taken to write where no rate of it is known: more than most do, as budgets rest on it."""
IDLE_SLACK = 0.25
"""Seconds a stream may be silent beyond its idle timeout, at most a tenth of it."""

_DONE = b"[DONE]"
# A provider says no to the request itself; another provider may still take it when the app left us the choice.
_REQUEST_FAULTS = frozenset({400, 413, 415, 422})
_PASSED_HEADERS = ("openai-processing-ms", "openai-version", "x-ratelimit-remaining-requests")


class RetryBudget:
    """Further calls to a provider that was tried may add at most a fifth to the load, so that a failing one is not
    flooded (a token bucket).
    """

    def __init__(self, share: float = 0.2, burst: float = 20.0) -> None:
        self._share = share
        self._burst = burst
        self._tokens = burst

    def request(self) -> None:
        self._tokens = min(self._burst, self._tokens + self._share)

    def take(self) -> bool:
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


@dataclass(slots=True)
class _Trial:
    """One attempt while it runs."""

    index: int
    model: ModelSpec
    provider: ProviderSpec
    record: AttemptRecord
    started: float
    total: float
    """Seconds it may take at most."""
    end: float = 0.0
    """When a stream must have ended, by the event loop's clock."""
    waited: float = 0.0
    """Seconds of a stream in which its reader had more than enough."""
    tap: StreamTap | None = None
    status: int | None = None
    first_token: float | None = None
    reported: tuple[Usage, bool] | None = None
    """Usage of an answer that could not be passed on, and whether it is in doubt."""


class Dispatch:
    """`wires` by name of wire; `draw` gives the jitter of a pause before a retry, in [0, 1)."""

    def __init__(
        self,
        wires: Mapping[str, Upstream],
        reserve: Reserve,
        journal: Journal,
        health: Health,
        clock: Clock,
        draw: Callable[[], float],
    ) -> None:
        self._wires = wires
        self._reserve = reserve
        self._journal = journal
        self._health = health
        self._clock = clock
        self._draw = draw
        self._retries = RetryBudget()

    async def run(self, exchange: Exchange, sink: AnswerSink) -> None:
        """Fills the sink with the answer and the exchange with its attempts. Raises RequestError when every
        model failed before the first byte.
        """
        assert exchange.plan is not None
        self._retries.request()
        models = exchange.plan.models
        failure: Exception | None = None
        for index in range(MAX_ATTEMPTS):
            name = models[index] if index < len(models) else models[0]
            if index and not await self._may_try_again(exchange, name, index, len(models), failure):
                if index + 1 < len(models):
                    continue  # the next of the plan may be cheaper, or at another provider
                break
            try:
                await self.attempt(exchange, sink, name, index)
                return
            except RequestError as rejected:
                failure = rejected
                if exchange.question is not None and exchange.question.reference is not None:
                    break
                if index + 1 >= len(models):
                    break
            except UpstreamError as error:
                failure = error
        raise _told(failure)

    async def _may_try_again(
        self, exchange: Exchange, name: str, index: int, planned: int, failure: Exception | None
    ) -> bool:
        wait = 0.0
        if index >= planned:
            # The plan is used up: the first model once more, after a pause, where its fault may pass.
            if not isinstance(failure, UpstreamError) or not _may_pass(failure):
                return False
            wait = failure.retry_after if failure.retry_after is not None else FIRST_WAIT * 2**index
            if wait > LONGEST_WAIT:
                return False
        again = exchange.snapshot.models[name].provider in {attempt.provider for attempt in exchange.attempts}
        # Another provider is not flooded by what the first one could not answer.
        if again and not self._retries.take():
            return False
        amount = worst_case_of(exchange, name)
        if amount is None and any(limit.hard_cap is not None for limit in exchange.policy.budgets):
            return False  # a cost nobody knows cannot be held
        if not await self._reserve.top_up(exchange, amount or NanoUSD(0)):
            return False
        if wait:
            await asyncio.sleep(wait * (1 + 0.2 * self._draw()))
        return True

    async def attempt(
        self, exchange: Exchange, sink: AnswerSink, name: str, index: int, within: float | None = None
    ) -> None:
        """One call, booked on the exchange. `within`: seconds it may take at most, beside its own timeouts.

        Raises UpstreamError or RequestError where it failed before the first byte was sent.
        """
        snapshot = exchange.snapshot
        model = snapshot.models[name]
        provider = snapshot.providers[model.provider]
        record = AttemptRecord(
            exchange.id,
            index,
            provider.name,
            name,
            model.upstream_name,
            self._clock.now(),
            exchange.prices.get(name),
        )
        total_seconds = provider.timeouts.total if within is None else min(within, provider.timeouts.total)
        trial = _Trial(index, model, provider, record, self._clock.monotonic(), total_seconds)
        call = UpstreamCall(
            provider,
            model,
            "/chat/completions",
            body_for(exchange, model, provider),
            exchange.request.stream,
            exchange.id,
        )
        sink.drain = provider.drain
        self._journal.attempt(record)
        self._health.trying(provider.name, name, trial.started)
        reply: UpstreamReply | None = None
        try:
            # A JSON answer often sends its headers only with its end, so only its whole time is bounded.
            patience = provider.timeouts.first_token if exchange.request.stream else total_seconds
            async with asyncio.timeout(min(patience, total_seconds)) as deadline:
                reply = await self._wires[provider.wire].send(call)
                trial.status = reply.status
                if reply.status != 200:
                    await self._refused(trial, reply)
                elif exchange.request.stream:
                    await self._stream(exchange, sink, trial, reply, deadline)
                else:
                    await self._whole(exchange, sink, trial, reply)
        except TimeoutError:
            late = asyncio.get_running_loop().time() > trial.end - IDLE_SLACK
            if late and (sink.ahead or trial.waited > trial.total / 2):
                error = UpstreamError("reader", "the answer was not read in time")
            else:
                error = UpstreamError("timeout", f"{provider.name} did not answer in time")
            self._failed(exchange, sink, trial, error)
        except (UpstreamError, RequestError) as raised:
            self._failed(exchange, sink, trial, _as_rejection(raised))
        except BaseException:
            self._health.abandoned(provider.name, name)
            self._book(exchange, trial, "cancelled", "client left")
            raise
        finally:
            if reply is not None:
                reply.close()

    async def _stream(
        self,
        exchange: Exchange,
        sink: AnswerSink,
        trial: _Trial,
        reply: UpstreamReply,
        deadline: asyncio.Timeout,
    ) -> None:
        loop = asyncio.get_running_loop()
        timeouts = trial.provider.timeouts
        end = trial.end = loop.time() + trial.total
        due = 0.0
        tap = trial.tap = StreamTap(client_wants_usage=True)
        held: list[bytes] = []
        bound = self._output_held(exchange, trial)
        async for chunk in reply.chunks():
            usage_before = tap.usage_raw
            try:
                frames = tap.feed(chunk)
            except ValueError:
                raise UpstreamError("protocol", "an event passed the size limit") from None
            broken = _broken(tap)
            if tap.done and broken is not None:
                frames = [frame for frame in frames if _DONE not in frame]
            if sink.head is None and broken is not None:
                raise broken
            if sink.head is None:
                if not tap.first_data_seen:
                    held.extend(frames)
                    continue
                trial.first_token = self._clock.monotonic() - trial.started
                self._health.first_token(trial.model.name, trial.first_token, self._clock.monotonic())
                self._begin(exchange, sink, trial, reply)
                frames = [*held, *frames]
            if tap.usage_raw is not usage_before:
                frames = [UsageFrame(frame) if only_usage(frame) else frame for frame in frames]
            for frame in frames:
                sink.append(frame)
            if broken is not None:
                raise broken
            if self._written(exchange, tap) > bound:
                bound = await self._extend(exchange, trial, bound)
            if sink.ahead:
                # A reader that takes its time is no silence of the provider's.
                deadline.reschedule(end)
                due = 0.0
                began = loop.time()
                try:
                    await sink.room()
                finally:
                    trial.waited += loop.time() - began
            idle_end = min(loop.time() + timeouts.idle, end)
            if idle_end > due:
                # Moving the timer costs more than passing a chunk on: it is set a little late, and seldom.
                due = min(idle_end + min(IDLE_SLACK, timeouts.idle / 10), end)
                deadline.reschedule(due)
        for frame in tap.finish():
            sink.append(frame)
        if not tap.complete:
            raise UpstreamError("cut", "the stream ended before its finish_reason")
        if sink.head is None:
            raise UpstreamError("protocol", "the stream held no event")
        seconds = self._clock.monotonic() - trial.started - (trial.first_token or 0.0) - trial.waited
        usage, estimated = self._usage(exchange, trial, None)
        self._health.rate(trial.model.name, usage.output_total // exchange.request.choices, seconds)
        self._succeeded(exchange, trial, usage, estimated)

    async def _whole(self, exchange: Exchange, sink: AnswerSink, trial: _Trial, reply: UpstreamReply) -> None:
        parts: list[bytes] = []
        size = 0
        async for chunk in reply.chunks():
            size += len(chunk)
            if size > MAX_BODY:
                raise UpstreamError("protocol", "the answer passed the size limit")
            parts.append(chunk)
        body = b"".join(parts)
        facts = complete_answer(body)
        if facts is None:
            raise UpstreamError("protocol", "the answer is not a JSON object")
        if not facts.finish_reasons:
            if facts.usage is not None:  # of no use to the caller, and billed all the same
                trial.reported = _credible(exchange, trial, facts.usage, facts.usage_contradicts)
            raise UpstreamError("protocol", "the answer holds no choice")
        usage, estimated = (
            _credible(
                exchange,
                trial,
                facts.usage,
                facts.usage_contradicts,
                facts.output_characters,
                facts.output_tokens,
            )
            if facts.usage is not None
            else (self._estimate(exchange, facts.output_tokens), True)
        )
        seconds = self._clock.monotonic() - trial.started
        rate = self._health.tokens_per_second(trial.model.name) or trial.model.expect_tokens_per_second
        # What of the whole time was the wait for the first token, at the rate this model writes with.
        # Without a known rate the two cannot be told apart, and nothing is recorded.
        if rate:
            waited = max(seconds - usage.output_total / exchange.request.choices / rate, 0.0)
            self._health.first_token(trial.model.name, waited, self._clock.monotonic())
        self._begin(exchange, sink, trial, reply)
        sink.append(body)
        self._succeeded(exchange, trial, usage, estimated, complete=facts.complete)

    def _begin(self, exchange: Exchange, sink: AnswerSink, trial: _Trial, reply: UpstreamReply) -> None:
        exchange.first_token_ms = 1000 * (self._clock.monotonic() - exchange.started)
        sink.begin(
            Head(
                trial.model.name,
                trial.provider.name,
                {name: reply.headers[name] for name in _PASSED_HEADERS if name in reply.headers},
            )
        )

    async def _refused(self, trial: _Trial, reply: UpstreamReply) -> None:
        """Raises for an answer other than 200. Only a fault of the request itself keeps the provider's body."""
        parts: list[bytes] = []
        size = 0
        async for chunk in reply.chunks():
            parts.append(chunk)
            size += len(chunk)
            if size > MAX_ERROR_BODY:
                break
        body = b"".join(parts)
        if reply.status in _REQUEST_FAULTS:
            if b"context_length_exceeded" in body:
                raise ContextExceeded(
                    "The prompt is longer than the context of the model that was chosen.", param="messages"
                )
            raise UpstreamRejected(reply.status, body, reply.headers.get("content-type", "application/json"))
        wait = retry_after(reply.headers.get("retry-after"), self._clock.now())
        if reply.status == 429 and b"insufficient_quota" in body:
            raise UpstreamError("quota", "the provider's quota is used up", status=429)
        raise UpstreamError(
            "status", f"the provider answered {reply.status}", status=reply.status, retry_after=wait
        )

    def _failed(
        self, exchange: Exchange, sink: AnswerSink, trial: _Trial, error: UpstreamError | RequestError
    ) -> None:
        """Books the failed attempt, then raises it; after the first byte it ends the stream instead."""
        now = self._clock.monotonic()
        provider, name = trial.provider.name, trial.model.name
        if isinstance(error, UpstreamError) and error.kind in ("budget", "reader"):
            self._health.success(provider, name, now)  # it is not the provider that ended it
            kind = error.kind
        elif isinstance(error, UpstreamError):
            hold = error.retry_after if error.status == 429 else None
            self._health.failure(provider, name, now, unreachable=error.kind == "connect", hold=hold)
            if error.kind == "timeout" and trial.first_token is None:
                self._health.first_token(name, now - trial.started, now)
            kind = error.kind
        else:
            self._health.success(provider, name, now)  # it is up: it read the request and said no
            kind = "rejected"
        if kind == "budget":
            sink.send()  # another model would not be afforded either
        begun = sink.sent
        outcome: AttemptOutcome = "cut" if begun else "timeout" if kind == "timeout" else "failed"
        self._book(exchange, trial, outcome, kind)
        if not begun:
            sink.retract()
            raise error
        exchange.status, exchange.error = "cut", kind
        if kind == "budget":
            sink.append(
                error_frame(
                    "The budget has no room for more of this answer.", "insufficient_quota", "budget_exceeded"
                )
            )
        elif kind == "reader":
            sink.append(error_frame("The answer was not read in time.", "server_error", "read_timeout"))
        else:
            sink.append(
                error_frame("The provider's answer broke off before its end.", "server_error", "upstream_cut")
            )

    def _succeeded(
        self, exchange: Exchange, trial: _Trial, usage: Usage, estimated: bool, complete: bool = True
    ) -> None:
        now = self._clock.monotonic()
        self._health.success(trial.provider.name, trial.model.name, now)
        if exchange.conversation is not None:
            self._health.warmed(exchange.conversation, trial.model.name, now)
        self._book(exchange, trial, "complete", None, usage, estimated)
        exchange.status = "complete"
        exchange.error = None if complete else "no_finish_reason"

    def _book(
        self,
        exchange: Exchange,
        trial: _Trial,
        outcome: AttemptOutcome,
        error: str | None,
        usage: Usage | None = None,
        estimated: bool = False,
    ) -> None:
        """Appends the attempt with its cost. A call that never reached a provider, or that it refused, costs
        nothing; one that was cut or left early is estimated from what was seen of it, and from its time.
        """
        if usage is None:
            usage, estimated = self._usage(exchange, trial, error)
        price = trial.record.price
        lines = price_usage(usage, price) if price is not None else ()
        free = not any(usage.quantities())
        exchange.attempts.append(
            Attempt(
                index=trial.index,
                provider=trial.provider.name,
                model=trial.model.name,
                upstream_model=trial.model.upstream_name,
                started_at=trial.record.started_at,
                outcome=outcome,
                status_code=trial.status,
                error=error,
                first_token_ms=None if trial.first_token is None else 1000 * trial.first_token,
                duration_ms=1000 * (self._clock.monotonic() - trial.started),
                usage=usage,
                estimated=estimated,
                lines=lines,
                cost=total(lines) if price is not None else NanoUSD(0) if free else None,
                price=price,
            )
        )

    def _usage(self, exchange: Exchange, trial: _Trial, error: str | None) -> tuple[Usage, bool]:
        """What this attempt used and whether that is an estimate."""
        tap = trial.tap
        if trial.reported is not None:
            return trial.reported
        if tap is not None and tap.usage is not None:
            usage, doubted = tap.usage, tap.usage_contradicts or not (tap.usage_at_end or tap.complete)
            if unmetered := tap.unmetered_tokens:
                usage, doubted = structs.replace(usage, output=usage.output + unmetered), True
            return _credible(exchange, trial, usage, doubted, tap.output_characters, tap.output_tokens)
        if error in ("connect", "status", "quota", "rejected") or (
            error == "protocol" and (tap is None or not tap.content_frames)
        ):
            return Usage(), False
        if not exchange.request.stream:
            written = self._written_unseen(exchange, trial)
            return Usage(input=exchange.request.input_tokens, output=written), True
        return self._estimate(exchange, tap.output_tokens if tap is not None else 0), True

    def _written_unseen(self, exchange: Exchange, trial: _Trial) -> int:
        """About how many tokens a provider has written of a JSON answer whose end was not waited for: what the model
        writes in that time after its first token, at least the forecast's share of it, at most what was held.
        """
        seconds = self._clock.monotonic() - trial.started
        model = trial.model
        first = model.expect_first_token or 0.0  # what was measured is a percentile, of late answers as well
        rate = (
            self._health.tokens_per_second(model.name) or model.expect_tokens_per_second or TOKENS_PER_SECOND
        )
        forecast = exchange.question.output_tokens if exchange.question is not None else DEFAULT_OUTPUT_TOKENS
        whole = first + max(forecast, 1) / rate
        written = math.ceil(max((seconds - first) * rate, forecast * min(seconds / whole, 1.0)))
        return min(exchange.request.choices * written, self._output_held(exchange, trial))

    @staticmethod
    def _estimate(exchange: Exchange, output_tokens: int) -> Usage:
        return Usage(input=exchange.request.input_tokens, output=output_tokens)

    def _output_held(self, exchange: Exchange, trial: _Trial) -> int:
        return exchange.request.choices * max(1, output_held(exchange.request, trial.model, exchange.policy))

    @staticmethod
    def _written(exchange: Exchange, tap: StreamTap) -> int:
        """About how many tokens came. Some providers put many into one frame; where the caller gave a limit, the
        provider keeps to it, and counting characters could only be wrong.
        """
        if exchange.request.max_output is not None:
            return tap.content_frames
        return max(tap.content_frames, tap.output_tokens)

    async def _extend(self, exchange: Exchange, trial: _Trial, bound: int) -> int:
        """A stream outgrows its hold: holds as much again, or ends it."""
        amount = worst_case_of(exchange, trial.model.name)
        if amount is None or await self._reserve.top_up(exchange, amount):
            return bound + self._output_held(exchange, trial)
        raise UpstreamError("budget", "the budget has no room for more of this answer")


def _credible(
    exchange: Exchange,
    trial: _Trial,
    usage: Usage,
    contradicts: bool,
    output_characters: int = 0,
    output_tokens: int = 0,
) -> tuple[Usage, bool]:
    """A provider's figures within what request and model leave possible, or what came of the answer proves; and
    whether they are in doubt. `output_tokens`: what came of it, estimated: that was not written for nothing.
    """
    request, model = exchange.request, trial.model
    most_input = max(request.input_bound, model.context)  # a provider may add words of its own
    most_output = max(request.choices * model.max_output, output_characters)
    if usage.input_total > most_input or usage.output_total > most_output:
        usage, contradicts = usage.within(most_input, most_output), True
    if output_tokens and not usage.output_total:
        usage, contradicts = structs.replace(usage, output=output_tokens), True
    if usage.output_total and not usage.input_total:
        usage, contradicts = structs.replace(usage, input=request.input_tokens), True
    return usage, contradicts


def body_for(exchange: Exchange, model: ModelSpec, provider: ProviderSpec) -> bytes:
    """The caller's body with the model's own name, declared renames, and usage asked for on a stream.

    Raises InvalidRequest where two fields would be sent under one name.
    """
    request = exchange.request
    changes = {"model": written(model.upstream_name)}
    if request.stream and provider.stream_usage and not request.include_usage:
        changes["stream_options"] = _asking_for_usage(request)
    renames, dropped = _renames(request.body, model) if model.rename else ({}, ())
    return edit(request.text, request.spans, changes, renames, dropped)


def _asking_for_usage(request: ChatRequest) -> str:
    if not request.body.get("stream_options"):
        return '{"include_usage":true}'
    start, end = request.spans["stream_options"]
    options = parse_object(request.text[start:end].encode())
    return edit(options.text, options.spans, {"include_usage": "true"}, {}).decode()


def _renames(body: Mapping[str, Any], model: ModelSpec) -> tuple[Mapping[str, str], Collection[str]]:
    """The renames for this body, and the fields that go because another one says what they say under their name."""
    renames = {name: target for name, target in model.rename.items() if name in body}
    if not renames or (len(renames) == 1 and body.keys().isdisjoint(renames.values())):
        return renames, ()  # nearly always
    dropped: set[str] = set()
    taken: dict[str, str] = {}
    for name in (*renames, *(target for target in renames.values() if target not in renames)):
        target = renames.get(name, name)
        other = taken.setdefault(target, name)
        if other == name or name not in body:
            continue
        if body[name] is None or _same(body[name], body[other]):
            dropped.add(name)
        elif body[other] is None:
            dropped.add(other)
            taken[target] = name
        else:
            raise InvalidRequest(
                f"'{name}' and '{other}' are one field for the model {model.name}, and their values differ. "
                "Send one of them.",
                param=other,
            )
    return renames, dropped


def _same(one: object, other: object) -> bool:
    return type(one) is type(other) and one == other


def _as_rejection(error: UpstreamError | RequestError) -> UpstreamError | RequestError:
    """A wire that raises for a status says only the number of it: a fault of the request stays the request's."""
    if isinstance(error, UpstreamError) and error.kind == "status" and error.status in _REQUEST_FAULTS:
        return InvalidRequest(
            f"The provider refused this request with status {error.status}: {error.detail}",
            code="rejected_by_provider",
        )
    return error


def _broken(tap: StreamTap) -> UpstreamError | None:
    """What is wrong with the stream so far. `[DONE]` before every choice has ended is a cut, not an end."""
    if tap.error is not None:
        first = tap.error.first
        return UpstreamError(
            "status" if first else "cut",
            "the provider sent an error event",
            status=tap.error.status or (502 if first else None),
        )
    if tap.done and not tap.complete:
        return UpstreamError("cut", "the provider said [DONE] before its finish_reason")
    return None


def _may_pass(error: UpstreamError) -> bool:
    return error.kind in ("connect", "timeout", "protocol") or error.status in (
        408,
        409,
        425,
        429,
        500,
        502,
        503,
        504,
    )


def _told(failure: Exception | None) -> Exception:
    """What the caller hears of the last failure: never a provider's own 401, 402, 403 or quota."""
    if isinstance(failure, RequestError):
        return failure
    if isinstance(failure, UpstreamError):
        if failure.kind == "timeout":
            return UpstreamTimedOut(
                "No model of the plan answered in time. Try again, or raise its timeouts."
            )
        if failure.status == 429 and failure.kind == "status":
            return RateLimited(
                "Every model that may answer is rate limited at its provider. Try again.",
                retry_after=failure.retry_after or 1,
            )
    return UpstreamFailed("Every model that may answer failed. The attempts are in the ledger.")
