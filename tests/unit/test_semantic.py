"""Who gets an answer by likeness, who never does, what is kept, measured and checked."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.cached import Invalidation
from router.core.errors import UnavailableError
from router.core.openai_wire import sse_to_json
from router.stages import reply, semantic
from router.stages.evidence import drifted
from router.stages.exact import StoredAnswer
from router.stages.judge import comparable, says_the_same
from router.stages.normalise import normalise_chat
from router.stages.semantic import Inquiry, inquire, plain_prompt
from tests.unit.pipeline_parts import SECRET, Script, chunk, events
from tests.unit.routed_parts import said, streamed
from tests.unit.semantic_parts import ALSO, OPEN, OTHER, SemanticRig, labelled, policy

# ---- which requests there are ----


def request(**fields: Any) -> Any:
    body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], **fields}
    return normalise_chat(json.dumps(body).encode())


USER = {"role": "user", "content": "and now?"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.2},
        {"n": 2},
        {"n": 2, "temperature": 0.1},
        {"messages": [{"role": "user", "content": "word " * 1600 + "x"}]},
        {"messages": [{"role": "user", "content": "слово " * 728}]},
        {"messages": [{"role": "user", "content": "日本語の文章です。" * 223}]},
        {"messages": [{"role": "user", "content": f"{'aB3/' * 19}\n" * 27}]},
        {"messages": [{"role": "user", "content": "  "}]},
        {"messages": [{"role": "user", "content": "a \ud800"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "system", "content": "a"}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}, USER]},
        {"messages": [{"role": "tool", "tool_call_id": "1", "content": "42"}, USER]},
        {"messages": [{"role": "function", "name": "f", "content": "42"}, USER]},
        {"messages": [{"role": "assistant", "content": None, "function_call": {"name": "f"}}, USER]},
        {"modalities": ["text", "audio"]},
    ],
)
def test_such_requests_never_enter(fields: dict[str, Any]) -> None:
    assert plain_prompt(request(**fields)) is None


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "hi"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "one part"}]}]}, "one part"),
        ({"n": 2, "temperature": 0}, "hi"),
        ({"temperature": 1}, "hi"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "hi"),
        ({"response_format": {"type": "json_object"}}, "hi"),
        (
            {"messages": [USER, {"role": "assistant", "content": "a"}, {"role": "user", "content": "more"}]},
            "more",
        ),
        ({"messages": [{"role": "user", "content": "word " * 1600}]}, "word " * 1600),
        ({"messages": [{"role": "user", "content": "слово " * 727}]}, "слово " * 727),
        ({"messages": [{"role": "user", "content": "日本語の文章です。" * 222}]}, "日本語の文章です。" * 222),
    ],
)
def test_such_requests_may(fields: dict[str, Any], text: str) -> None:
    assert plain_prompt(request(**fields)) == text


# ---- what must be the same ----

RIG = SemanticRig(
    policy(
        teams="  shared: { cache: { scope: shared } }\n  apps: { cache: { scope: app } }",
        more="rules: [ { name: pii, when: { tag.data: [pii] }, then: { deny: [strong] } } ]",
    )
)


def inquiry(
    team: str = "search", headers: dict[str, str] | None = None, model: str = "auto", **fields: Any
) -> Inquiry | None:
    async def admitted() -> Inquiry | None:
        inbound = RIG.inbound(team, headers, **{"model": model, **fields})
        return inquire(await RIG.pipeline._admit(inbound), SECRET, "plain")

    return asyncio.run(admitted())


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(str.strip)
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant", "system", "developer"]), texts), max_size=3)
changes: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.fixed_dictionaries({"temperature": st.floats(0, 0.9)}),
    st.fixed_dictionaries({"max_tokens": st.integers(1, 900)}),
    st.fixed_dictionaries({"top_p": st.floats(0.1, 0.9)}),
    st.fixed_dictionaries({"seed": st.integers()}),
    st.fixed_dictionaries({"stop": texts}),
    st.fixed_dictionaries({"logprobs": st.just(True)}),
    st.fixed_dictionaries({"anything_new": texts}),
    st.fixed_dictionaries({"response_format": st.fixed_dictionaries({"type": st.just("json_object")})}),
    st.fixed_dictionaries({"tools": st.just([{"type": "function", "function": {"name": "f"}}])}),
    st.fixed_dictionaries({"model": st.sampled_from(["cheap", "strong"])}),
    st.fixed_dictionaries({"team": st.sampled_from(["alone", "capped"])}),
    st.fixed_dictionaries({"headers": st.fixed_dictionaries({"x-farthing-quality": st.just("0.97")})}),
    st.fixed_dictionaries({"headers": st.fixed_dictionaries({"x-farthing-max-cost": st.just("0.5")})}),
    st.fixed_dictionaries({"headers": st.fixed_dictionaries({"x-farthing-tags": st.just("data=pii")})}),
)


def conversation(history: list[tuple[str, str]], text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": said} for role, said in history] + [{"role": "user", "content": text}]


@settings(max_examples=80, deadline=None)
@given(history=turns, text=texts, other=texts, change=changes)
def test_one_change_is_another_partition_and_another_text_is_not(
    history: list[tuple[str, str]], text: str, other: str, change: dict[str, Any]
) -> None:
    plain = inquiry(messages=conversation(history, text))
    again = inquiry(messages=conversation(history, other), stream=True, user="somebody", metadata={"a": "b"})
    changed = inquiry(messages=conversation(history, text), **change)
    assert plain is not None
    assert again is not None
    assert changed is not None
    assert plain.partition == again.partition
    assert plain.scope == again.scope
    assert plain.partition != changed.partition
    assert plain.scope != changed.scope


@settings(max_examples=60, deadline=None)
@given(history=turns.filter(bool), text=texts, data=st.data())
def test_another_history_is_another_partition(
    history: list[tuple[str, str]], text: str, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(history) - 1))
    role, said = history[at]
    other = [*history]
    other[at] = (role, data.draw(texts.filter(lambda new: new != said)))
    one, two = (inquiry(messages=conversation(turns, text)) for turns in (history, other))
    assert one is not None
    assert two is not None
    assert one.partition != two.partition
    instructs = role in ("system", "developer")
    assert (one.scope != two.scope) == instructs, "turns share their evidence, instructions do not"


def test_evidence_is_of_one_mode_and_one_bound() -> None:
    def scope(mode: str, bound: str) -> str:
        async def admitted() -> str:
            rig = SemanticRig(policy(mode, cache=f"max_error: {bound}"))
            found = inquire(await rig.pipeline._admit(rig.inbound("search")), SECRET, "plain")
            assert found is not None
            return found.scope

        return asyncio.run(admitted())

    scopes = {scope(mode, bound) for mode in ("shadow", "enforce", "certified") for bound in ("1%", "5%")}
    assert len(scopes) == 4
    assert scope("shadow", "1%") == scope("enforce", "1%")


def test_who_shares_follows_the_policy() -> None:
    def partition(team: str, app: str) -> str:
        async def admitted() -> str:
            exchange = await RIG.pipeline._admit(RIG.inbound("search"))
            policy = RIG.snapshot.resolve(team, app, {}, exchange.opened_at)
            exchange.policy = policy
            exchange.caller = type(exchange.caller)("k", team, app)
            found = inquire(exchange, SECRET, "plain")
            assert found is not None
            return found.partition

        return asyncio.run(admitted())

    assert partition("search", "a") == partition("search", "b"), "a team's apps share by default"
    assert partition("apps", "a") != partition("apps", "b")
    assert partition("search", "a") != partition("alone", "a")
    assert partition("shared", "a") != partition("search", "a")


# ---- serving ----


async def test_a_prompt_in_other_words_gets_the_stored_answer() -> None:
    rig = SemanticRig()
    rig.says("From the menu.")
    assert await rig.chat(OPEN) == "From the menu."
    first = rig.last
    rig.clock.advance(90)
    answer, body = await rig.answered(ALSO)
    assert json.loads(body)["choices"][0]["message"]["content"] == "From the menu."
    assert len(rig.wire.calls) == 1
    record, headers = rig.last, answer.headers
    assert headers["x-farthing-cache"] == "semantic"
    assert headers["age"] == "90"
    assert headers["x-farthing-cost-usd"] == "0"
    assert headers["x-farthing-model"] == "cheap"
    assert "similarity 0." in headers["x-farthing-decision"]
    assert "probability 0." in headers["x-farthing-decision"]
    assert "account" not in headers["x-farthing-decision"]
    assert (record.cache, record.cache_entry, record.cost) == ("semantic", first.id, 0)
    assert record.cache_savings == first.cost
    assert record.usage == first.usage
    assert record.status == "complete"
    assert not record.attempts
    found = record.candidate
    assert found is not None
    assert (found.entry, found.served, found.mode, found.saved) == (first.id, True, "enforce", first.cost)
    assert not rig.budgets._holds
    rig.clock.advance(1)
    await rig.chat(OTHER)
    assert len(rig.wire.calls) == 2


@pytest.mark.parametrize("stored_as_stream", [True, False])
@pytest.mark.parametrize("usage", [True, False])
async def test_it_comes_in_the_form_that_was_asked_for(stored_as_stream: bool, usage: bool) -> None:
    rig = SemanticRig()
    rig.wire.scripts["cheap"] = [
        Script(*streamed("Hel", "lo")) if stored_as_stream else Script(said("Hello"))
    ]
    await rig.answered(OPEN, stream=stored_as_stream)
    options = {"stream_options": {"include_usage": True}} if usage else {}
    answer, body = await rig.answered(ALSO, stream=True, **options)
    assert answer.content_type.startswith("text/event-stream")
    *frames, done = events(body)
    assert done == "[DONE]"
    parsed = [json.loads(frame) for frame in frames]
    text = "".join(c["delta"].get("content") or "" for frame in parsed for c in frame["choices"])
    assert text == "Hello"
    assert any(frame.get("usage") for frame in parsed) == usage
    _, body = await rig.answered(ALSO)
    whole = json.loads(body)
    assert whole["choices"][0]["message"]["content"] == "Hello"
    assert whole["usage"]["total_tokens"] == 12
    assert len(rig.wire.calls) == 1


@pytest.mark.parametrize("exact", [True, False])
async def test_a_long_answer_is_put_into_another_form_beside_the_loop(
    exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = SemanticRig(policy(cache="exact: true"))
    rig.wire.scripts["cheap"] = [Script(*streamed(*["word "] * 600))]
    threads: list[bool] = []

    def watched(body: bytes) -> bytes:
        threads.append(threading.current_thread() is threading.main_thread())
        return sse_to_json(body)

    await rig.answered(OPEN, stream=True)
    monkeypatch.setattr(reply, "sse_to_json", watched)
    _, body = await rig.answered(OPEN if exact else ALSO)
    assert rig.last.cache == ("exact" if exact else "semantic")
    assert json.loads(body)["choices"][0]["message"]["content"] == "word " * 600
    assert threads == [False]


async def test_a_trap_goes_to_the_model() -> None:
    rig = SemanticRig()
    await rig.chat("How do I open 3 accounts at once today?")
    await rig.chat("How do I open 4 accounts at once today?")
    assert len(rig.wire.calls) == 2
    assert rig.outcomes["refused"] == 1
    assert rig.last.candidate is None


async def test_concurrent_requests_share_one_look_up() -> None:
    rig = SemanticRig(policy(cache="exact: true"))
    await rig.chat(OPEN)
    answers = await asyncio.gather(*(rig.answered(ALSO, stream=bool(at % 2)) for at in range(10)))
    assert {answer.headers["x-farthing-cache"] for answer, _ in answers} == {"semantic"}
    assert rig.likeness.ranked == [ALSO]
    assert len(rig.wire.calls) == 1
    assert sum(record.cache == "semantic" for record in rig.journal.settled) == 10
    # It is no answer to this prompt that others could be compared with.
    _, _ = await rig.answered(ALSO)
    assert rig.last.cache == "semantic"
    assert (await rig.answers.size()).entries == 1
    assert await rig.answers.load(rig_partition(rig)) is not None


def rig_partition(rig: SemanticRig) -> str:
    (partition,) = rig.index._partitions
    return partition


async def test_a_team_at_its_hard_cap_still_gets_hits() -> None:
    rig = SemanticRig()
    await rig.chat(OPEN, team="capped", max_tokens=10)
    limits, period = rig.snapshot.budgets(rig.clock.now())
    from router.core.types import BudgetWindow, NanoUSD

    window = next(BudgetWindow(limit.key, period) for limit in limits if limit.key == "team:capped")
    rig.budgets.settle("something dear", [window], NanoUSD(10**9))
    assert await rig.chat(ALSO, team="capped", max_tokens=10) == "Hello there"
    assert rig.last.cache == "semantic"


# ---- who gets none ----


@pytest.mark.parametrize(
    ("headers", "team", "fields"),
    [
        ({"cache-control": "no-cache"}, "search", {}),
        ({"cache-control": "no-store"}, "search", {}),
        ({"x-farthing-cache": "off"}, "search", {}),
        ({"cache-control": "max-age=60"}, "search", {}),
        ({"x-farthing-quality": "0.5"}, "search", {}),
        ({}, "alone", {}),
        ({}, "search", {"temperature": 0.5}),
        ({}, "search", {"model": "strong"}),
        (
            {},
            "search",
            {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ALSO}]},
        ),
    ],
)
async def test_who_asks_for_something_else_gets_none(
    headers: dict[str, str], team: str, fields: dict[str, Any]
) -> None:
    rig = SemanticRig()
    await rig.chat(OPEN)
    rig.clock.advance(120)
    await rig.chat(ALSO, team, headers=headers, **fields)
    assert len(rig.wire.calls) == 2
    assert rig.last.cache == "miss"


async def test_a_fresh_answer_takes_the_place_of_the_older_one() -> None:
    rig = SemanticRig()
    rig.says("old", "new")
    await rig.chat(OPEN)
    await rig.chat(OPEN, headers={"cache-control": "no-cache"})
    assert (await rig.answers.size()).entries == 1
    assert await rig.chat(ALSO) == "new"


@pytest.mark.parametrize(
    ("script", "fields", "headers"),
    [
        (Script(chunk("Hel")), {"stream": True}, {}),
        (Script(said("Hel", "length")), {}, {}),
        (Script(said("I'm sorry, but I can't help with that.")), {}, {}),
        (Script(said("not json")), {"response_format": {"type": "json_object"}}, {}),
        (Script(said("fine")), {}, {"cache-control": "no-store"}),
        (Script(said("fine")), {}, {"x-farthing-cache": "off"}),
    ],
)
async def test_what_is_not_kept(script: Script, fields: dict[str, Any], headers: dict[str, str]) -> None:
    rig = SemanticRig()
    rig.wire.scripts["cheap"] = [script]
    await rig.answered(OPEN, headers=headers, **fields)
    assert (await rig.answers.size()).entries == 0


async def test_answers_that_wait_to_be_kept_are_few_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = SemanticRig()
    rig.says("word " * 100)  # above 500 bytes with what stands around it
    monkeypatch.setattr(semantic, "KEPT_BYTES", 2000)
    prompts = ("ducks in winter", "where is Riga", "why do cats purr", "tell me about tea")
    for prompt in prompts:
        await rig.chat(prompt)
    assert rig.semantic._kept_bytes == 0
    assert (await rig.answers.size()).entries == len(prompts), "one after the other all find room"
    entered, go_on = asyncio.Event(), asyncio.Event()
    keep = rig.semantic._keep

    async def slow(*kept: Any) -> None:
        entered.set()
        await go_on.wait()
        await keep(*kept)

    monkeypatch.setattr(rig.semantic, "_keep", slow)
    for prompt in ("one apple", "some pears", "many plums", "no cherries"):
        await rig.ask(model="cheap", messages=[{"role": "user", "content": prompt}])
    await entered.wait()
    assert 1000 < rig.semantic._kept_bytes <= 2000
    go_on.set()
    await rig.quiet()
    assert rig.semantic._kept_bytes == 0
    assert len(prompts) < (await rig.answers.size()).entries < len(prompts) + 4


async def test_an_answer_expires_with_the_time_to_live_of_the_reader() -> None:
    rig = SemanticRig(policy(cache="ttl: 1h"))
    await rig.chat(OPEN)
    rig.clock.advance(3601)
    await rig.chat(ALSO)
    assert len(rig.wire.calls) == 2


async def test_never_costs_nothing() -> None:
    rig = SemanticRig(policy("never"))
    await rig.chat(OPEN)
    await rig.chat(ALSO)
    assert rig.likeness.sketched == rig.likeness.made == rig.likeness.ranked == []
    assert not rig.outcomes


# ---- invalidation ----


@pytest.mark.parametrize(
    ("kind", "value", "gone"),
    [
        ("all", "", True),
        ("team", "search", True),
        ("team", "alone", False),
        ("model", "cheap", True),
        ("model", "strong", False),
        ("tag", "data=pii", False),
        ("entry", "ENTRY", True),
        ("scope", "SCOPE", True),
    ],
)
@pytest.mark.parametrize("exact", [True, False])
async def test_a_rule_takes_answers_out_of_both_caches(
    kind: Any, value: str, gone: bool, exact: bool
) -> None:
    rig = SemanticRig(policy(cache=f"exact: {str(exact).lower()}"))
    await rig.chat(OPEN)
    first = rig.last
    await rig.chat(ALSO)
    scope = rig.last.candidate.scope if rig.last.candidate else ""
    assert rig.last.cache == "semantic"
    rig.book.invalidate(kind, value.replace("ENTRY", first.id).replace("SCOPE", scope), rig.clock.now())
    await rig.chat(OPEN if exact else ALSO)
    assert (rig.last.cache == "miss") == gone
    if gone:
        await rig.chat(ALSO)
        assert rig.last.cache == "semantic", "what was answered after the rule is fine"


async def test_what_was_wrong_for_a_prompt_does_not_come_back_with_the_next_entry() -> None:
    rig = SemanticRig(policy(cache="exact: false"))
    await rig.chat(OPEN)
    first = rig.last
    await rig.chat(ALSO)
    hit = rig.last.candidate
    assert hit is not None
    assert rig.last.cache == "semantic"
    rig.book.invalidate("entry", first.id, rig.clock.now())
    rig.book.invalidate("pair", hit.pair, rig.clock.now())
    for again in (OPEN, ALSO):
        await rig.chat(again)
        assert rig.last.cache == "miss"
    for again in (OPEN, ALSO):
        await rig.chat(again)
        assert rig.last.cache == "semantic"
        assert rig.last.candidate is not None
        assert rig.last.candidate.similarity > 0.999, "each gets its own"
    await rig.chat("How can I open an account?")
    assert rig.last.cache == "semantic", "others may get both"


async def test_a_pair_has_one_name_whichever_was_stored() -> None:
    rig = SemanticRig(policy(cache="exact: false"))
    names = set()
    for stored, asked in ((OPEN, ALSO), (ALSO, OPEN)):
        await rig.chat(stored)
        await rig.chat(asked)
        assert rig.last.candidate is not None
        names.add(rig.last.candidate.pair)
        rig.book.invalidate("all", "", rig.clock.now())
    assert len(names) == 1
    assert len(names.pop()) == 64


async def test_an_answer_on_its_way_when_the_rule_came_is_not_served() -> None:
    rig = SemanticRig()
    rig.wire.scripts["cheap"] = [Script(0.1, said("old"))]
    asked = asyncio.create_task(rig.chat(OPEN))
    await asyncio.sleep(0.03)
    rig.book.invalidate("all", "", rig.clock.now())
    await asked
    await rig.chat(ALSO)
    assert len(rig.wire.calls) == 2


async def test_an_exact_answer_of_an_older_format_is_no_answer() -> None:
    rig = SemanticRig(policy("never", cache="exact: true"))
    await rig.chat(OPEN)
    (key,) = rig.caches._entries
    value, expires = rig.caches._entries[key]
    fields = msgspec.msgpack.decode(value)
    del fields["origin"]
    rig.caches._entries[key] = (msgspec.msgpack.encode({**fields, "entry": "e", "model": "cheap"}), expires)
    await rig.chat(OPEN)
    assert rig.last.cache == "miss"
    await rig.chat(OPEN)
    assert rig.last.cache == "exact"
    assert msgspec.msgpack.decode(rig.caches._entries[key][0], type=StoredAnswer).origin.team == "search"


# ---- measuring ----


async def test_shadow_measures_and_serves_nothing() -> None:
    rig = SemanticRig(policy("shadow"))
    rig.says("Paris.", "Paris", "Rome")
    await rig.chat(OPEN)
    assert await rig.chat(ALSO) == "Paris"
    found = rig.last.candidate
    assert found is not None
    assert (found.served, found.would_serve, found.mode) == (False, True, "shadow")
    assert rig.last.cache == "miss"
    (label,) = rig.labels
    assert (label.right, label.propensity, label.source) == (True, 1.0, "agreement")
    assert (label.request_id, label.entry) == (rig.last.id, found.entry)
    assert await rig.chat("so how do I open an account?") == "Rome"
    assert [one.right for one in rig.labels] == [True, False]
    assert len(rig.wire.calls) == 3
    assert rig.likeness.made == [], "no vector is made before somebody asks for one"


async def test_a_measured_look_up_holds_nobody_up() -> None:
    rig = SemanticRig(policy("shadow"))
    rig.says("Paris.")
    await rig.chat(OPEN)
    rig.wire.scripts["cheap"] = [Script(said("Paris."))]
    rig.likeness.go_on.clear()
    await rig.ask(model="cheap", messages=[{"role": "user", "content": ALSO}])
    rig.likeness.go_on.set()
    await rig.quiet()
    assert rig.last.candidate is None
    assert rig.outcomes["late"] == 1


async def test_without_a_judge_long_answers_say_nothing() -> None:
    rig = SemanticRig(policy("shadow"))
    rig.says("word " * 30)
    await rig.chat(OPEN)
    await rig.chat(ALSO)
    assert rig.last.candidate is not None
    assert rig.labels == []


JUDGING = "learn: { budget: { month: 100 }, judge: strong }"


async def test_a_judge_compares_a_share_in_shadow() -> None:
    rig = SemanticRig(policy("shadow", cache="check: 60%", more=JUDGING))
    rig.says("word " * 30)
    rig.says('{"better": "tie", "a_good": 0.9, "b_good": 0.9}', model="strong")
    await rig.chat(OPEN)
    rig.draws = lambda: 0.7
    await rig.chat(ALSO)
    assert rig.labels == []
    rig.draws = lambda: 0.5
    await rig.chat(ALSO, headers={"cache-control": "max-age=99999"})
    (label,) = rig.labels
    assert (label.source, label.right, label.propensity) == ("judge", True, 0.6)
    assert label.request_id == rig.last.id
    (row,) = [record for record in rig.journal.settled if record.endpoint == "learn.judge"]
    assert row.cache_labels == (label,)
    assert row.budgets[0].key == "learn"


# ---- checking what was served ----


@pytest.mark.parametrize(("fresh", "right"), [("from the menu", True), ("By phone.", False)])
async def test_a_served_answer_is_asked_for_again(fresh: str, right: bool) -> None:
    rig = SemanticRig(policy(cache="check: 100%", more="learn: { budget: { month: 100 } }"))
    rig.says("From the menu.", fresh)
    await rig.chat(OPEN)
    assert await rig.chat(ALSO) == "From the menu."
    (label,) = rig.labels
    assert (label.right, label.source, label.propensity) == (right, "agreement", 1.0)
    assert label.request_id == rig.last.id
    (row,) = [record for record in rig.journal.settled if record.endpoint == "learn.shadow"]
    assert row.cache_labels == (label,)
    assert row.cost
    assert row.team == "search"
    assert (await rig.answers.size()).entries == int(right), "what was found wrong is served to nobody else"


async def test_a_judge_says_whether_what_was_served_is_right() -> None:
    rig = SemanticRig(policy(cache="check: 100%", more=JUDGING))
    rig.says("word " * 30, "other " * 30)
    rig.says('{"better": "a", "a_good": 0.9, "b_good": 0.1}', model="strong")
    rig.draws = lambda: 0.3  # the fresh answer stands first
    await rig.chat(OPEN)
    await rig.chat(ALSO)
    (label,) = rig.labels
    assert (label.right, label.source) == (False, "judge")
    endpoints = [record.endpoint for record in rig.journal.settled]
    assert endpoints == ["chat.completions", "chat.completions", "learn.shadow", "learn.judge"]
    assert (await rig.answers.size()).entries == 0


async def test_nothing_is_asked_that_nobody_pays_for() -> None:
    rig = SemanticRig(policy(cache="check: 100%"))
    await rig.chat(OPEN)
    await rig.chat(ALSO)
    assert rig.last.cache == "semantic"
    assert len(rig.wire.calls) == 1
    assert rig.labels == []


async def test_a_check_out_of_budget_is_left_out() -> None:
    rig = SemanticRig(policy(cache="check: 100%", more="learn: { budget: { month: 0.000001 } }"))
    await rig.chat(OPEN)
    await rig.chat(ALSO)
    assert len(rig.wire.calls) == 1
    assert rig.labels == []


# ---- certified ----


async def certified(check: str = "check: 100%") -> tuple[SemanticRig, str]:
    rig = SemanticRig(
        policy("certified", cache=f"max_error: 5%, {check}", more="learn: { budget: { month: 100 } }")
    )
    rig.says("Paris.")
    await rig.chat(OPEN)
    await rig.chat(OPEN + " please")
    assert rig.last.candidate is not None
    return rig, rig.last.candidate.scope


async def evidence(rig: SemanticRig, *labels: Any) -> None:
    rig.book.book(*labels)
    rig.clock.advance(3)
    await rig.chat("how do I open an account today")  # looks; what it finds counts from the next request on
    rig.clock.advance(3)


async def test_certified_serves_once_its_own_labels_hold_the_bound() -> None:
    rig, scope = await certified()
    assert rig.last.cache == "miss"
    found = rig.last.candidate
    assert found is not None
    assert found.threshold > 1
    assert found.would_serve
    await evidence(rig, *labelled(scope, 40, rig.clock))
    await rig.chat(OPEN + " thanks")
    assert rig.last.cache == "miss", "40 labels certify nothing at 5 %"
    await evidence(rig, *labelled(scope, 400, rig.clock))
    await rig.chat(OPEN)
    assert rig.last.cache == "semantic"
    assert rig.last.candidate is not None
    assert rig.last.candidate.threshold <= 1
    await rig.chat(OPEN, team="alone")
    assert rig.last.cache == "miss", "another scope has evidence of its own"


async def test_certified_stops_when_its_latest_labels_are_wrong() -> None:
    rig, scope = await certified()
    await evidence(rig, *labelled(scope, 400, rig.clock))
    await rig.chat(OPEN)
    assert rig.last.cache == "semantic"
    await evidence(rig, *labelled(scope, 440, rig.clock, wrong=lambda number: number >= 425))
    await rig.chat(OPEN)
    assert rig.last.cache == "miss"


async def test_what_agreement_certified_is_served_only_where_agreement_can_tell() -> None:
    rig, scope = await certified()
    await evidence(rig, *labelled(scope, 400, rig.clock))
    rig.says("long " * 30)
    await rig.chat("What ducks like to eat in winter")
    await rig.chat("what ducks like to eat in winter?")
    assert rig.last.cache == "miss"
    assert rig.last.candidate is not None
    assert not rig.last.candidate.would_serve


def test_drift_is_told_from_bad_luck() -> None:
    rig = SemanticRig()

    def judged(count: int, *wrong: int) -> bool:
        return drifted(labelled("s", count, rig.clock, lambda at: at in wrong), 0.9, 0.05)

    assert not judged(500)
    assert not judged(500, 499, 480, 450)
    assert not judged(19, *range(19))
    assert judged(500, *range(485, 500))
    assert not drifted(labelled("s", 500, rig.clock, lambda _: True), 0.9999, 0.05), "below the threshold"


# ---- faults ----


async def test_a_full_queue_or_a_fault_is_a_miss(caplog: pytest.LogCaptureFixture) -> None:
    rig = SemanticRig()
    await rig.chat(OPEN)
    rig.semantic._waiting = 8
    await rig.chat(ALSO)
    assert rig.outcomes["busy"] == 1
    rig.semantic._waiting = 0
    rig.likeness.ready = False
    await rig.chat(ALSO + " now")
    assert rig.outcomes["loading"] == 1

    def broken(*_: Any) -> Any:
        raise RuntimeError("broken")

    rig.likeness.rank = broken  # type: ignore[method-assign]
    await rig.chat(ALSO + " then")
    assert rig.outcomes["error"] == 1
    assert "the semantic cache failed" in caplog.text
    assert "account" not in caplog.text
    assert [record.status for record in rig.journal.settled] == ["complete"] * 4
    assert len(rig.wire.calls) == 4


async def test_what_could_not_be_loaded_is_loaded_again_after_a_while() -> None:
    rig = SemanticRig()
    await rig.chat(OPEN)
    tries: list[float] = []

    def load() -> None:
        tries.append(rig.clock.monotonic())
        rig.likeness.ready = len(tries) == 2

    rig.likeness.ready = False
    rig.likeness.load = load  # type: ignore[method-assign]
    for seconds in (0, 30, 31):
        rig.clock.advance(seconds)
        await rig.chat(ALSO, headers={"cache-control": "max-age=99999"})
    assert rig.outcomes["loading"] == 3
    assert len(tries) == 2
    await rig.chat(ALSO)
    assert rig.last.cache == "semantic"


async def test_a_look_up_that_takes_too_long_is_a_miss() -> None:
    rig = SemanticRig()
    await rig.chat(OPEN)
    rig.likeness.go_on.clear()
    await rig.ask(model="cheap", messages=[{"role": "user", "content": ALSO}])
    rig.likeness.go_on.set()
    await rig.quiet()
    assert rig.outcomes["timeout"] == 1
    assert rig.last.cache == "miss"


async def test_a_store_that_is_away_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = SemanticRig()
    await rig.chat(OPEN)
    rig.index.forget()

    async def away(_: Any) -> None:
        return None

    with monkeypatch.context() as patch:
        patch.setattr(rig.answers, "load", away)
        await rig.chat(ALSO)
    assert rig.outcomes["away"] == 1
    with monkeypatch.context() as patch:
        patch.setattr(rig.answers, "body", away)
        await rig.chat(ALSO + " now")
    assert rig.last.cache == "miss"

    async def failing(*_: Any) -> None:
        raise UnavailableError("away")

    monkeypatch.setattr(rig.answers, "remove", failing)
    await rig.chat(OPEN, headers={"cache-control": "no-cache"})
    assert rig.last.status == "complete"


async def test_nothing_is_looked_at_where_nothing_can_be_found() -> None:
    rig = SemanticRig()
    await rig.chat(OPEN)
    await rig.chat(OTHER)
    assert rig.likeness.ranked == []
    assert rig.outcomes["none"] == 2


# ---- what says the same ----


def answer(text: str | None, **message: Any) -> dict[str, Any]:
    return json.loads(said(text or "", **message))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("stored", "fresh", "same"),
    [
        ("Paris.", "paris", True),
        ("42", "The answer is 42.", True),
        ("42", "The answer is 43.", False),
        ("It opens at 9", "It closes at 9", False),
        ("Yes.", "No.", False),
        ("refundable", "not refundable", False),
        ('{"a": 1}', '{ "a": 1 }', True),
        ('{"a": 1}', '{"a": 2}', False),
        ('{"a": 1}', "one", False),
        ("Yes", "yes " + "and more " * 20, False),
        ("The answer is **42**.", "42", True),
        ("No.", "no", True),
        ("The answer is **Paris**", "It's Paris.", True),
        ("`User`", "`user`", False),
        ("`User`", "User", False),
        (r"\Delta", r"\delta", False),
        ("/Users", "/users", False),
        ("Foo.bar", "foo.bar", False),
        ("import Foo", "import foo", False),
        ("**/x/**", "/x/", False),
        ("2**3**4", "234", False),
        ("don\u2019t", "don't", True),
        ("5 %", "5", False),
        ("The answer is 5 km", "5", False),
        ("$5", "5", False),
        ("5 USD", "5 EUR", False),
        ("10 mW", "10 MW", False),
        ("-5", "5", False),
        ("n!", "n", False),
        (".5", "5", False),
        ("1.10", "1.1", False),
        ("1,234", "1.234", False),
        ("x\u00b2", "x2", False),
        ("The answer is not 42", "42", False),
        ("It is not", "It is", False),
        (r"\d", r"\D", False),
        (r"\d+", "d+", False),
        ("n", "N", False),
        ("CO", "Co", False),
        ('5"', "5'", False),
        ('"5"', "5", False),
        ("a*b", "a b", False),
        ("a_b", "a b", False),
        ("__init__", "init", False),
        ('{"a": true}', '{"a": 1}', False),
        ('{"a": 1.0}', '{"a": 1}', False),
        ('{"a": "1"}', '{"a": 1}', False),
        ('{"a": 0}', '{"a": false}', False),
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', True),
    ],
)
def test_only_what_says_the_same_counts_as_right(stored: str, fresh: str, same: bool) -> None:
    assert comparable(answer(stored))
    assert says_the_same(answer(stored), answer(fresh)) == same


def test_free_text_and_silence_cannot_be_compared() -> None:
    assert not comparable(answer("word " * 13))
    assert not comparable(answer(" "))
    call = {"tool_calls": [CALL]}
    assert comparable(answer(None, **call))
    assert says_the_same(answer(None, **call), answer(None, **call))
    assert not says_the_same(answer(None, **call), answer("{}"))
    one, yes = (
        {"tool_calls": [{**CALL, "function": {"name": "f", "arguments": f'{{"a": {value}}}'}}]}
        for value in ("1", "true")
    )
    assert not says_the_same(answer(None, **one), answer(None, **yes))


def test_invalidations_know_their_newest_rule() -> None:
    rig = SemanticRig()
    assert isinstance(rig.book.invalidate("all", "", rig.clock.now()), Invalidation)
    assert rig.book.invalidations.generation == 1
