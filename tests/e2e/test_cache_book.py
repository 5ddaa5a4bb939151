"""Taking stored answers back on a real gateway: by what callers report, by the command and by the admin plane."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from router.adapters.sql.cache_book import list_rules
from tests.contracts.valkey_server import ValkeyServer
from tests.e2e.gateway import Gateway, until
from tests.e2e.patient import PATIENT
from tests.e2e.provider import Provider
from tests.e2e.setting import policy, providers
from tests.steady import Stopwatch

Start = Callable[..., Gateway]
ADMIN = {"authorization": "Bearer admin-key-for-tests"}
CACHED = policy(defaults="  cache: { semantic: enforce, max_error: 5% }")


@pytest.fixture(scope="module")
def running(running_provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("book")
    with Gateway(folder, providers(running_provider.url), CACHED, admin=True, python=PATIENT) as gateway:
        yield gateway


@pytest.fixture
def book(running: Gateway, provider: Provider) -> Gateway:
    return running


def ask(gateway: Gateway, content: str, team: str = "search") -> httpx.Response:
    answer = gateway.chat(gateway.key(team), content, model="small")
    assert answer.status_code == 200, answer.text
    return answer


def outcome(answer: httpx.Response) -> str:
    return str(answer.headers["x-farthing-cache"])


def hit(gateway: Gateway, content: str, team: str = "search") -> str:
    """The id of a request that the exact cache answered, and is in the ledger."""
    assert outcome(ask(gateway, content, team)) == "miss"
    found: list[httpx.Response] = []

    def answered() -> bool:
        found.append(ask(gateway, content, team))
        return outcome(found[-1]) == "exact"

    until(answered, "the answer is stored")
    request_id = str(found[-1].headers["x-request-id"])
    gateway.row(request_id)
    return request_id


def alike(gateway: Gateway) -> tuple[str, httpx.Response]:
    """A word, and the answer to a question with it that is like one asked before."""
    found: list[tuple[str, httpx.Response]] = []

    def answered() -> bool:
        word = secrets.token_hex(3)
        ask(gateway, f"Where is the file {word} kept?")
        time.sleep(0.2)
        found.append((word, ask(gateway, f"where is the file {word} kept")))
        return outcome(found[-1][1]) == "semantic"

    until(answered, "the semantic cache answers")
    return found[-1]


def report(gateway: Gateway, body: dict[str, Any], team: str = "search", path: str = "/v1") -> httpx.Response:
    with gateway.http(gateway.key(team)) as http:
        return http.post(f"{path}/cache/feedback", json=body)


def admin(gateway: Gateway, method: str, path: str, body: Any = None) -> httpx.Response:
    url = f"http://127.0.0.1:{gateway.admin_port}{path}"
    return httpx.request(method, url, json=body, headers=ADMIN, timeout=60)


@pytest.mark.parametrize("path", ["/v1", ""])
def test_an_answer_reported_wrong_is_not_given_again(
    book: Gateway, unique: Callable[[str], str], path: str
) -> None:
    content = unique("Where is the office?")
    request_id = hit(book, content)
    said = report(book, {"request_id": request_id, "correct": False, "comment": "moved"}, path=path)
    assert said.status_code == 200
    assert said.json() == {"request_id": request_id, "correct": False, "stored": True, "quarantined": True}
    assert outcome(ask(book, content)) == "miss"
    until(lambda: outcome(ask(book, content)) == "exact", "the fresh answer is stored")
    rules = len(list_rules(book.engine))
    again = report(book, {"request_id": request_id, "correct": False, "comment": "moved"}, path=path)
    assert (again.status_code, len(list_rules(book.engine))) == (200, rules)
    late = report(book, {"request_id": request_id, "correct": True}, path=path).json()
    assert (late["quarantined"], "does not bring it back" in late["note"]) == (True, True)


def test_a_right_answer_stays(book: Gateway, unique: Callable[[str], str]) -> None:
    content = unique("Who wrote this?")
    request_id = hit(book, content)
    said = report(book, {"request_id": request_id, "correct": True})
    assert said.json() == {"request_id": request_id, "correct": True, "stored": True, "quarantined": False}
    assert outcome(ask(book, content)) == "exact"


def test_whose_feedback_it_may_be(book: Gateway, unique: Callable[[str], str]) -> None:
    content = unique("What does it cost?")
    first = ask(book, content)
    missed = str(first.headers["x-request-id"])
    book.row(missed)
    refused = report(book, {"request_id": missed, "correct": False})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "request_id")
    assert "/v1/feedback" in refused.json()["error"]["message"]
    mine = hit(book, unique("And who pays?"))
    theirs = report(book, {"request_id": mine, "correct": False}, team="solo")
    unknown = report(book, {"request_id": secrets.token_hex(8), "correct": False}, team="solo")
    assert theirs.status_code == unknown.status_code == 404
    assert theirs.json() == unknown.json()
    wrong = report(book, {"request_id": mine, "correct": "no"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "correct")
    assert httpx.post(f"{book.url}/v1/cache/feedback", json={}, timeout=60).status_code == 401
    assert httpx.get(f"{book.url}/v1/cache/feedback", timeout=60).status_code == 405


def test_an_answer_by_likeness_reported_wrong_is_gone_at_once(
    book: Gateway, unique: Callable[[str], str]
) -> None:
    hit(book, unique("Who is there?"))
    word, answer = alike(book)
    request_id = str(answer.headers["x-request-id"])
    book.row(request_id)
    assert report(book, {"request_id": request_id, "correct": False}).json()["quarantined"] is True
    # Neither its own question nor one like it finds it any more.
    assert outcome(ask(book, f"Where is the file {word} kept?")) == "miss"
    by_team = json.loads(book.cli("cache", "stats", "--by", "team", "--format", "json").stdout)
    [row] = [row for row in by_team["rows"] if row["team"] == "search"]
    assert row["semantic"] >= 1
    assert row["exact"] >= 1
    assert row["reported_wrong"] >= 1
    assert row["avoided_usd"] > 0
    verified = book.cli("ledger", "verify")
    assert verified.returncode == 0, verified.stdout


def test_the_command_takes_answers_back_within_five_seconds(
    book: Gateway, unique: Callable[[str], str]
) -> None:
    mine, theirs = unique("What is open today?"), unique("What is closed today?")
    hit(book, mine)
    hit(book, theirs, "solo")
    done = book.cli("cache", "invalidate", "--team", "search", "--reason", "new opening hours")
    assert (done.returncode, "within 5 seconds" in done.stdout) == (0, True)
    with Stopwatch() as watch:
        until(lambda: outcome(ask(book, mine)) == "miss", "the rule holds")
    assert watch.seconds < 5
    assert outcome(ask(book, theirs, "solo")) == "exact"
    until(lambda: outcome(ask(book, mine)) == "exact", "what is stored after the rule is served")
    listed = json.loads(book.cli("cache", "list-invalidations", "--json").stdout)
    assert (listed[0]["kind"], listed[0]["value"], listed[0]["by"]) == ("team", "search", "cli")


def test_the_admin_plane_takes_answers_back_at_once(book: Gateway, unique: Callable[[str], str]) -> None:
    content = unique("When does it start?")
    hit(book, content)
    book.row(alike(book)[1].headers["x-request-id"])
    made = admin(
        book, "POST", "/admin/cache/invalidations", {"kind": "model", "value": "small", "reason": "x"}
    )
    assert made.status_code == 201
    rule = made.json()
    assert (rule["kind"], rule["value"], rule["by"], rule["reason"]) == ("model", "small", "admin", "x")
    assert outcome(ask(book, content)) == "miss"
    shown = admin(book, "GET", "/admin/cache").json()
    assert shown["generation"] == rule["id"]
    assert shown["invalidations"][0] == rule
    assert shown["store"]["up"] is True
    assert shown["store"]["entries"] >= 1
    rows = admin(book, "GET", "/admin/reports/cache").json()["rows"]
    assert {"team", "app", "avoided_usd", "wrong_rate"} <= set(rows[0])
    scoped = admin(book, "GET", "/admin/reports/cache?by=scope&since=1d").json()["rows"]
    assert any(row["mode"] == "enforce" for row in scoped)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"kind": "colour"}, "kind"),
        ({"kind": "tag", "value": "pii"}, "value"),
        ({"kind": "all", "value": "x"}, "value"),
        ({"kind": "team"}, "value"),
        ({"kind": "all", "reason": "x" * 501}, "reason"),
        ({"kind": "all", "who": "me"}, "who"),
    ],
)
def test_a_wrong_rule_names_its_field(book: Gateway, body: dict[str, Any], field: str) -> None:
    refused = admin(book, "POST", "/admin/cache/invalidations", body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)


def test_nobody_without_the_admin_key(book: Gateway) -> None:
    for method, path in (("GET", "/admin/cache"), ("POST", "/admin/cache/invalidations")):
        url = f"http://127.0.0.1:{book.admin_port}{path}"
        assert httpx.request(method, url, json={"kind": "all"}, timeout=60).status_code == 401


def test_every_worker_holds_to_a_rule(start_gateway: Start, valkey_server: ValkeyServer) -> None:
    gateway = start_gateway(policy=CACHED, workers=2, redis_url=valkey_server.url)
    questions = [f"What is {secrets.token_hex(6)}?" for _ in range(8)]
    for question in questions:
        ask(gateway, question)

    def all_stored() -> bool:
        return all(outcome(ask(gateway, question)) == "exact" for question in questions)

    until(all_stored, "everything is stored")
    assert gateway.cli("cache", "invalidate", "--epoch").returncode == 0
    with Stopwatch() as watch:
        while watch.seconds < 5:
            time.sleep(0.1)
    assert {outcome(ask(gateway, question)) for question in questions} == {"miss"}
