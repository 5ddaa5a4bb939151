"""Identical requests at several workers share one call. Each worker is a gateway of its own on one Valkey and one
database, so that a test knows which of them a request reaches.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from benchmarks.acceptance.common import Answer, ask, session
from tests.contracts.valkey_server import ValkeyServer
from tests.e2e.gateway import Gateway, until
from tests.e2e.patient import PATIENT
from tests.e2e.provider import Provider
from tests.e2e.setting import policy, providers
from tests.steady import Stopwatch

Unique = Callable[[str], str]
WORKERS = 3

JOIN = 1.0
"""Seconds in which all that were sent find the call they share. Before its answer begins, where that matters."""


@pytest.fixture(scope="module")
def started(
    running_provider: Provider, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[list[Gateway], ValkeyServer]]:
    folder = tmp_path_factory.mktemp("sharing")
    server = ValkeyServer()
    gateways: list[Gateway] = []
    try:
        for number in range(WORKERS):
            gateway = Gateway(
                folder / str(number),
                providers(running_provider.url),
                policy(),
                database_url=f"sqlite:///{folder / 'farthing.db'}",
                redis_url=server.url,
                python=PATIENT,
            )
            gateways.append(gateway)
            gateway.start()
        yield gateways, server
    finally:
        for gateway in gateways:
            gateway.close()
        server.close()


@pytest.fixture
def workers(started: tuple[list[Gateway], ValkeyServer], provider: Provider) -> list[Gateway]:
    gateways, server = started
    server.command("FLUSHALL")
    until(lambda: server.command("KEYS", "farthing:inbox:*") == b"*%d" % WORKERS, "each has its inbox again")
    return gateways


def body(content: str, **fields: Any) -> dict[str, Any]:
    return {"model": "slow", "max_tokens": 20, "messages": [{"role": "user", "content": content}], **fields}


async def ask_all(
    workers: Sequence[Gateway], key: str, bodies: Sequence[dict[str, Any]], over: float = 0.0, **options: Any
) -> list[Answer]:
    """One request a body, in turn at each worker, their beginnings spread over so many seconds."""

    async def one(http: aiohttp.ClientSession, number: int) -> Answer:
        await asyncio.sleep(random.uniform(0, over))
        return await ask(http, workers[number % len(workers)].url, key, bodies[number], **options)

    async with session() as http:
        return list(await asyncio.gather(*(one(http, number) for number in range(len(bodies)))))


@contextlib.asynccontextmanager
async def changed(provider: Provider, **settings: Any) -> AsyncIterator[None]:
    with provider.changed("slow", **settings):
        yield


def text_of(answer: Answer) -> str:
    return answer.body.decode()


@pytest.mark.parametrize("over", [0.0, 1.3], ids=["at-once", "ragged"])
@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
async def test_identical_requests_at_all_workers_make_one_call(
    workers: list[Gateway], provider: Provider, unique: Unique, stream: bool, over: float
) -> None:
    key, content = workers[0].key("search"), unique("Hi")
    answers = await ask_all(workers, key, [body(content, stream=stream)] * 60, over)
    assert [answer.status for answer in answers] == [200] * 60
    assert len({answer.body for answer in answers}) == 1
    assert text_of(answers[0]).endswith("data: [DONE]\n\n") is stream
    (call,) = provider.log()
    kinds = sorted(answer.headers["x-farthing-cache"] for answer in answers)
    assert kinds == ["exact"] * 59 + ["miss"]
    ids = {answer.id for answer in answers}
    until(lambda: ids <= {row["id"] for row in workers[0].rows()}, "all are booked")
    rows = {row["id"]: row for row in workers[0].rows() if row["id"] in ids}
    leader = rows.pop(call["request_id"])
    assert leader["cost"] > 0
    for row in rows.values():
        assert (row["cost"], row["cache"], row["cache_entry"]) == (0, "exact", leader["id"])
        assert (row["status"], row["served_model"]) == ("complete", "slow")
        assert row["cache_savings"] == leader["cost"]


async def test_each_gets_the_form_it_asked_for(
    workers: list[Gateway], provider: Provider, unique: Unique
) -> None:
    key, content = workers[0].key("search"), unique("Hi")
    plain = body(content, stream=True)
    metered = body(content, stream=True, stream_options={"include_usage": True})
    whole = body(content)
    answers = await ask_all(workers, key, [plain, metered, whole] * 3 + [whole, plain, metered] * 3)
    assert len(provider.log()) == 1
    assert all(answer.status == 200 for answer in answers)
    for answer, asked in zip(answers, [plain, metered, whole] * 3 + [whole, plain, metered] * 3, strict=True):
        text = text_of(answer)
        assert text.startswith("data: ") is bool(asked.get("stream"))
        assert ('"usage":{' in text.replace(" ", "")) is (asked is not plain)


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
async def test_the_client_that_began_it_leaves_and_the_others_are_served(
    workers: list[Gateway], provider: Provider, unique: Unique, stream: bool
) -> None:
    key, content = workers[0].key("search"), unique("Hi")
    async with session() as http, changed(provider, first_token=3.0):
        first = asyncio.create_task(ask(http, workers[0].url, key, body(content, stream=stream)))
        await asyncio.to_thread(until, provider.log, "the call is made")
        others = asyncio.create_task(ask_all(workers[1:], key, [body(content, stream=stream)] * 10))
        await asyncio.sleep(JOIN)
        first.cancel()
        answers = await others
    assert [answer.status for answer in answers] == [200] * 10
    assert len({answer.body for answer in answers}) == 1
    (call,) = provider.log()
    leader = workers[0].row(call["request_id"])
    assert (leader["status"], leader["cache"]) == ("complete", "miss")
    assert leader["cost"] > 0


async def test_the_call_is_cancelled_when_the_last_one_anywhere_has_left(
    workers: list[Gateway], provider: Provider, unique: Unique
) -> None:
    key, content = workers[0].key("search"), unique("Hi")
    asked = body(content, stream=True, max_tokens=2000)
    async with session() as http, changed(provider, typical=2000):
        readers = []
        for gateway in workers:
            readers.append(asyncio.create_task(ask(http, gateway.url, key, asked)))
            await asyncio.sleep(JOIN)
        await asyncio.to_thread(until, provider.log, "the call is made")
        (call,) = provider.log()
        for reader in readers:
            reader.cancel()
            await asyncio.sleep(0.3)
    with Stopwatch() as watch:
        row = workers[0].row(call["request_id"])
    assert (row["status"], row["estimated"]) == ("cancelled", True)
    assert watch.seconds < 2.5
    assert len(provider.log()) == 1


async def test_a_call_that_fails_is_tried_once_more_by_one(
    workers: list[Gateway], provider: Provider, unique: Unique
) -> None:
    key, content = workers[0].key("solo"), unique("Hi")
    asked = body(content, model="bad-stall", stream=True)
    answers = await ask_all(workers, key, [asked] * 12)
    assert {answer.status for answer in answers} <= {502, 504}
    calls = [call["request_id"] for call in provider.log()]
    assert len(set(calls)) == 2, "the call they shared, and one more that the others shared"


async def test_a_stream_that_breaks_off_ends_honestly_for_all(
    workers: list[Gateway], provider: Provider, unique: Unique
) -> None:
    key, content = workers[0].key("search"), unique("Hi")
    answers = await ask_all(workers, key, [body(content, model="bad-silence", stream=True)] * 9)
    assert {answer.status for answer in answers} == {200}
    for answer in answers:
        assert '"code":"upstream_cut"' in text_of(answer).replace(" ", "")
        assert "[DONE]" not in text_of(answer)
    until(lambda: {a.id for a in answers} <= {r["id"] for r in workers[0].rows()}, "all are booked")
    assert {workers[0].row(answer.id)["status"] for answer in answers} == {"cut"}


async def test_nobody_shares_who_must_not(workers: list[Gateway], provider: Provider, unique: Unique) -> None:
    content = unique("Hi")
    async with session() as http:
        answers = await asyncio.gather(
            *(
                ask(http, gateway.url, workers[0].key(team), body(content), headers=headers)
                for gateway in workers
                for team, headers in (
                    ("search", {}),
                    ("solo", {}),
                    ("search", {"cache-control": "no-cache"}),
                    ("search", {"cache-control": "no-store"}),
                    ("search", {"x-farthing-cache": "off"}),
                )
            )
        )
    assert {answer.status for answer in answers} == {200}
    assert len(provider.log()) == 2 + 3 * WORKERS, "one a team, and one for each that wanted its own"


async def test_a_worker_that_is_killed_fails_only_its_own(
    workers: list[Gateway], provider: Provider, unique: Unique
) -> None:
    key, content = workers[0].key("search"), unique("Hi")
    asked = body(content, stream=True)
    with provider.changed("slow", first_token=4.0):
        async with session() as http:
            doomed = asyncio.create_task(ask(http, workers[0].url, key, asked))
            await asyncio.to_thread(until, provider.log, "the call is made")
            others = asyncio.create_task(ask_all(workers[1:], key, [asked] * 10))
            await asyncio.sleep(JOIN)
            assert len(provider.log()) == 1
            await asyncio.to_thread(workers[0].kill)
            provider.set("slow", first_token=2.0)
            began = asyncio.get_running_loop().time()
            answers = await others
            seconds = asyncio.get_running_loop().time() - began
            await doomed
    await asyncio.to_thread(workers[0].start)
    assert [answer.status for answer in answers] == [200] * 10
    assert len({answer.body for answer in answers}) == 1
    assert len(provider.log()) == 2, "one of them made the call anew"
    assert seconds < 2.5 + 2 + 3


async def test_a_frozen_store_holds_nobody_up(
    start_gateway: Callable[..., Gateway], provider: Provider, unique: Unique, tmp_path: Path
) -> None:
    server = ValkeyServer()
    try:
        database = f"sqlite:///{tmp_path / 'farthing.db'}"
        workers = [
            start_gateway(redis_url=server.url, database_url=database, python=()) for _ in range(WORKERS)
        ]
        key = workers[0].key("search")
        for gateway in workers:
            until(lambda g=gateway: g.chat(key, unique("Hi"), model="small").is_success, "the key is known")  # type: ignore[misc]
        provider.clear()
        asked = body(unique("Hi"), model="small")
        server.freeze()
        began = asyncio.get_running_loop().time()
        answers = await ask_all(workers, key, [asked] * 9)
        seconds = asyncio.get_running_loop().time() - began
    finally:
        server.close()
    assert [answer.status for answer in answers] == [200] * 9
    assert seconds < 2
    assert len(provider.log()) <= WORKERS
