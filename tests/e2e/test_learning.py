"""Learning on a live gateway: feedback over HTTP, signals in the ledger, a new artefact without a restart."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from classifiers import prompt_features
from router.adapters.sql.ledger import Ledger
from router.adapters.sql.schema import artefacts, labels, request_features
from tests.contracts.ledger_records import labelled, new_id, settled
from tests.contracts.own_traffic_parts import encoder, prompt_text, read
from tests.e2e.conftest import StartGateway
from tests.e2e.gateway import Gateway, until
from tests.e2e.setting import policy
from tests.steady import Stopwatch
from tests.values import replace

LEARN = policy(more="learn: {}")


def give(gateway: Gateway, team: str, **body: Any) -> httpx.Response:
    with gateway.http(gateway.key(team)) as http:
        return http.post("/v1/feedback", json=body)


def rows(gateway: Gateway, table: sa.Table) -> list[dict[str, Any]]:
    with gateway.engine.connect() as connection:
        return [dict(row) for row in connection.execute(sa.select(table)).mappings()]


@pytest.fixture
def learning(start_gateway: StartGateway) -> Gateway:
    return start_gateway(policy=LEARN)


def test_feedback_right_after_the_answer(learning: Gateway, unique: Callable[[str], str]) -> None:
    answer = learning.chat(learning.key("search"), unique("What is the capital of France?"))
    request = answer.headers["x-request-id"]

    def given(score: float) -> httpx.Response | None:
        said = give(learning, "search", request_id=request, score=score, comment="x")
        return None if said.status_code == 503 else said  # not in the ledger in time: to be sent again

    for score in (1, 1, 0.25):
        said = until(lambda score=score: given(score), "it is taken")  # type: ignore[misc]
        assert (said.status_code, said.json()) == (
            200,
            {"request_id": request, "score": score, "stored": True},
        )
    kept = [(row["request_id"], row["model"], row["score"]) for row in rows(learning, labels)]
    model = answer.headers["x-farthing-model"]
    assert sorted(kept) == [(request, model, 0.25), (request, model, 1.0)]
    [found] = [row for row in rows(learning, request_features) if row["request_id"] == request]
    assert len(found["features"]) > 500
    assert found["prompt"] is None

    other = give(learning, "solo", request_id=request, score=1)
    unknown = give(learning, "solo", request_id="0199aa11-2233-7456-89ab-cdef01234567", score=1)
    assert other.status_code == unknown.status_code == 404
    assert other.json() == unknown.json()
    wrong = give(learning, "search", request_id=request, score=2)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "score")
    with learning.http("no-such-key") as http:
        assert http.post("/v1/feedback", json={"request_id": request, "score": 1}).status_code == 401
    with learning.http(learning.key("search")) as http:
        assert http.post("/feedback", content=b"x" * 70_000).status_code == 413
        assert http.get("/v1/feedback").status_code == 405


def test_a_cut_off_answer_labels_itself(learning: Gateway, unique: Callable[[str], str]) -> None:
    key = learning.key("search")
    for stream in (False, True):
        answer = learning.chat(key, unique("Tell me about tides"), model="small", max_tokens=3, stream=stream)
        assert answer.status_code == 200
    until(lambda: len(rows(learning, labels)) == 2, "both labels are in SQL")
    assert {(row["source"], row["model"], row["score"]) for row in rows(learning, labels)} == {
        ("truncated", "small", 0.0)
    }


def test_what_is_learned_is_used_within_five_seconds(learning: Gateway, unique: Callable[[str], str]) -> None:
    key = learning.key("search")

    def served(number: int) -> str:
        return learning.chat(key, prompt_text("greet", number)).headers["x-farthing-model"]

    # Every 48th greets the same one at the same place: their difficulty is nearly the same, and far from a border.
    first = learning.chat(key, prompt_text("greet", 5014)).headers
    usual, prompt_class = first["x-farthing-model"], first["x-farthing-class"]
    assert usual in ("small", "middle")  # by its prior
    records = []
    for number in range(240):
        model = (usual, "frontier")[number // 2 % 2]
        record = settled(
            new_id(),
            served_model=model,
            prompt_class=prompt_class,
            features=prompt_features.pack(read("greet", number)),
            features_encoder=encoder().id,
        )
        good = 0.0 if model == usual and number % 9 else 1.0
        records.append(replace(record, labels=(labelled(record, "feedback", score=good, weight=1.0),)))
    Ledger(learning.engine).write(records, fresh=True)
    assert served(5062) == usual
    done = learning.cli("learn")
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = iter(range(5110, 500_000, 48))
    with Stopwatch() as watch:
        until(lambda: served(next(numbers)) != usual, "the learned heads are in use")
    assert watch.seconds < 5
    decision = learning.chat(key, prompt_text("greet", next(numbers))).headers["x-farthing-decision"]
    assert "learned success" in decision

    # A damaged one is refused, and the one in use stays.
    with learning.engine.begin() as connection:
        connection.execute(sa.update(artefacts).values(sha256="0" * 64))
    until(lambda: re.search("artefact is refused.*hash", learning.log_path.read_text()), "it is refused")
    assert served(next(numbers)) != usual
    assert learning.cli("learn", "--rollback", "priors").returncode == 0
    until(lambda: served(next(numbers)) == usual, "the priors decide again")
