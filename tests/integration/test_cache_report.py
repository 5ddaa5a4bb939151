"""The report on the caches and `farthing cache` over a booked ledger, against an independent recomputation."""

from __future__ import annotations

import csv
import io
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import Engine

from classifiers.pairs.bound import Labelled, Prior, certify, interval
from router.adapters.sql.cache_book import invalidate, list_rules
from router.adapters.sql.cache_report import COLUMNS, cache_report
from router.adapters.sql.database import open_engine
from router.adapters.sql.labels import judge_hit
from router.adapters.sql.ledger import Ledger
from router.adapters.sql.reports import Report, render
from router.adapters.sql.verify import verify
from router.cli import main
from router.core.errors import ConfigurationError, UnavailableError
from router.core.types import Caller, RequestRecord
from tests.contracts.ledger_records import cache_labelled, candidate, hit, new_id, settled
from tests.values import replace

pytest_plugins = ["tests.contracts.sql_databases"]

START = datetime.now(UTC).replace(microsecond=0) - timedelta(days=3)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_engine(database_url)
    yield engine
    engine.dispose()


def traffic(count: int = 240, seed: int = 5) -> list[RequestRecord]:
    """Hits of both kinds, candidates held back, calls of learning, and labels with propensities of their scope."""
    rng = random.Random(seed)
    records: list[RequestRecord] = []
    for _ in range(count):
        team, app = rng.choice([("search", "faq-bot"), ("search", None), ("ads", "crawler")])
        scope = f"scope-{team}"
        at = START + timedelta(seconds=rng.randrange(2 * 86_400))
        common: dict[str, Any] = {"team": team, "app": app, "opened_at": at, "tags": {}}
        kind = rng.choice(["miss", "exact", "semantic", "kept back", "below", "learn"])
        if kind in ("exact", "semantic"):
            record = hit(kind, entry="e", saved=rng.randrange(1, 10**9), **common)  # type: ignore[arg-type]
            if rng.random() < 0.1:
                none: dict[str, Any] = dict.fromkeys(
                    ("baseline", "routing_savings", "cache_savings", "overhead")
                )
                record = replace(record, **none)
        else:
            record = settled(new_id(), **common)
        if kind == "learn":
            record = replace(record, endpoint="learn.shadow")
        if kind in ("kept back", "below"):
            saved = rng.choice([None, rng.randrange(10**9)])
            record = replace(record, candidate=candidate(would_serve=kind == "kept back", saved=saved))
        if record.candidate is not None:
            mode = "certified" if team == "search" else record.candidate.mode
            record = replace(record, candidate=replace(record.candidate, scope=scope, mode=mode))
            if rng.random() < 0.7:
                label = cache_labelled(
                    record, right=rng.random() < 0.9, propensity=0.2 if team == "search" else 1.0
                )
                record = replace(record, cache_labels=(label,))
        records.append(record)
    return records


@pytest.fixture
def booked(engine: Engine) -> list[RequestRecord]:
    records = traffic()
    Ledger(engine).write(records, fresh=True)
    return records


def recomputed(records: Sequence[RequestRecord]) -> dict[str, Any]:
    records = [record for record in records if not record.endpoint.startswith("learn.")]
    hits = [record for record in records if record.cache != "miss"]
    back = [record.candidate for record in records if record.candidate and not record.candidate.served]
    back = [found for found in back if found.would_serve]
    labels = [
        Labelled(label.score, label.right, label.propensity)
        for record in records
        for label in record.cache_labels
        if record.candidate is not None and (record.candidate.served or record.candidate.would_serve)
    ]
    rates: list[Decimal | None] = [None] * 3
    if labels:
        least = min(label.propensity for label in labels)
        rates = [Decimal(f"{rate:.4f}") for rate in interval(labels, min_propensity=least)]
    return {
        "requests": len(records),
        "exact": sum(record.cache == "exact" for record in records),
        "semantic": sum(record.cache == "semantic" for record in records),
        "hit_rate": Decimal(f"{len(hits) / len(records):.4f}"),
        "avoided_usd": Decimal(sum(record.cache_savings or 0 for record in hits)) / 10**9,
        "would_serve": len(back),
        "would_save_usd": Decimal(sum(found.saved or 0 for found in back)) / 10**9,
        "labels": len(labels),
        "wrong_rate": rates[0],
        "wrong_low": rates[1],
        "wrong_high": rates[2],
    }


def rows_of(report: Report) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(render(report, "json"), parse_float=Decimal)["rows"]
    return rows


@pytest.mark.parametrize("by", [(), ("team",), ("team", "app"), ("day", "app"), ("cache",)])
def test_the_figures_agree_with_the_records(
    engine: Engine, tmp_path: Path, booked: list[RequestRecord], by: tuple[str, ...]
) -> None:
    expected: dict[tuple[str | None, ...], list[RequestRecord]] = defaultdict(list)
    for record in booked:
        if not record.endpoint.startswith("learn."):
            names = {
                "team": record.team,
                "app": record.app,
                "day": record.opened_at.date().isoformat(),
                "cache": record.cache,
            }
            expected[tuple(names[name] for name in by)].append(record)
    rows = rows_of(cache_report(engine, tmp_path, by))
    assert {tuple(row[name] for name in by) for row in rows} == expected.keys()
    for row in rows:
        wanted = recomputed(expected[tuple(row[name] for name in by)])
        assert {name: row[name] for name in wanted} == wanted
    health = cache_report(engine, tmp_path, by).data_health
    missing = sum(record.cache != "miss" and record.cache_savings is None for record in booked)
    assert health == {"unsettled": 0, "rejected": 0, "hits_without_price": missing}
    assert verify(engine, tmp_path).differences == []


def test_a_span_and_the_scopes(engine: Engine, tmp_path: Path, booked: list[RequestRecord]) -> None:
    since, until = START + timedelta(hours=5), START + timedelta(hours=30)
    inside = [record for record in booked if since <= record.opened_at < until]
    [row] = rows_of(cache_report(engine, tmp_path, (), since, until))
    wanted = recomputed(inside)
    assert {name: row[name] for name in wanted} == wanted
    rows = {row["scope"]: row for row in rows_of(cache_report(engine, tmp_path, ("scope", "team")))}
    assert rows["scope-search"]["mode"] == "certified"
    assert rows["scope-ads"]["team"] == "ads"
    for scope in ("scope-search", "scope-ads"):
        mine = [record for record in booked if record.candidate and record.candidate.scope == scope]
        assert rows[scope]["requests"] == len(mine)
        assert rows[scope]["semantic"] == recomputed(mine)["semantic"]
    assert rows_of(cache_report(engine, tmp_path, ("team",), datetime(2031, 1, 1, tzinfo=UTC))) == []


def bound(team: str, app: str | None, tags: Mapping[str, frozenset[str]]) -> float | None:
    return 0.05 if (team, dict(tags)) == ("search", {}) else None


def test_a_certified_scope_says_how_many_labels_it_lacks(
    engine: Engine, tmp_path: Path, booked: list[RequestRecord]
) -> None:
    def labels(scope: str) -> list[Labelled]:
        found = (label for record in booked for label in record.cache_labels)
        return [Labelled(label.score, label.right) for label in found if label.scope == scope]

    order = [label.scope for record in booked for label in record.cache_labels]
    pool = labels("scope-ads")[: order[: order.index("scope-search")].count("scope-ads")]
    expected = certify(labels("scope-search"), max_error=0.05, prior=Prior.of(pool) if pool else None)
    rows = {row["team"]: row for row in rows_of(cache_report(engine, tmp_path, ("team",), max_error=bound))}
    holds = expected.threshold is not None
    assert (rows["search"]["certified"], rows["search"]["waiting"]) == (int(holds), int(not holds))
    assert rows["search"]["labels_missing"] == (None if holds else expected.missing)
    assert (rows["ads"]["certified"], rows["ads"]["waiting"]) == (0, 0)


def test_a_scope_with_the_evidence_serves(engine: Engine, tmp_path: Path) -> None:
    records = []
    for _ in range(400):
        record = settled(new_id(), tags={})
        found = candidate(scope="s", mode="certified", probability=0.999)
        records.append(
            replace(record, candidate=found, cache_labels=(cache_labelled(replace(record, candidate=found)),))
        )
    Ledger(engine).write(records[:20], fresh=True)
    [row] = rows_of(cache_report(engine, tmp_path, ("scope",), max_error=bound))
    assert (row["certified"], row["waiting"], row["labels"]) == (0, 1, 20)
    assert 20 < row["labels_missing"] < 200
    [blind] = rows_of(cache_report(engine, tmp_path, ("scope",)))
    assert (blind["waiting"], blind["labels_missing"]) == (1, None)
    Ledger(engine).write(records[20:], fresh=True)
    [row] = rows_of(cache_report(engine, tmp_path, ("scope",), max_error=bound))
    assert (row["certified"], row["waiting"], row["labels_missing"]) == (1, 0, None)
    assert row["wrong_rate"] == 0
    assert row["wrong_high"] < Decimal("0.05")


def test_a_scope_whose_latest_checks_went_wrong_is_stopped_and_not_certified(
    engine: Engine, tmp_path: Path
) -> None:
    records = []
    for at in range(460):
        record = settled(new_id(), tags={})
        found = candidate(scope="s", mode="certified", probability=0.999)
        label = replace(cache_labelled(replace(record, candidate=found)), right=at < 400 or at % 3 != 0)
        records.append(replace(record, candidate=found, cache_labels=(label,)))
    Ledger(engine).write(records, fresh=True)
    [row] = rows_of(cache_report(engine, tmp_path, ("scope",), max_error=bound))
    assert (row["certified"], row["stopped"], row["waiting"], row["labels_missing"]) == (0, 1, 0, None)


def test_what_callers_report_stands_apart_and_the_newest_counts(engine: Engine, tmp_path: Path) -> None:
    first, second = hit("semantic", entry="e1"), hit("exact", entry="e2")
    Ledger(engine).write([first, second], fresh=True)
    caller, at = Caller("key_1", "search", "faq-bot"), START
    for record, correct in ((first, True), (first, False), (second, True)):
        judge_hit(engine, caller, record.id, correct, None, at)
    [row] = rows_of(cache_report(engine, tmp_path, ("team",)))
    assert (row["reported_right"], row["reported_wrong"]) == (1, 1)
    assert (row["labels"], row["wrong_rate"]) == (0, None)


def test_every_format_has_the_same_digits(
    engine: Engine, tmp_path: Path, booked: list[RequestRecord]
) -> None:
    report = cache_report(engine, tmp_path)
    assert report.columns == ("team", "app", *COLUMNS)
    parsed = list(csv.DictReader(io.StringIO(render(report, "csv"))))
    assert [row["avoided_usd"] for row in parsed] == [str(row["avoided_usd"]) for row in report.rows]
    table, html = render(report, "table"), render(report, "html")
    for row in report.rows:
        assert str(row["avoided_usd"]) in table
        assert f"<td>{row['wrong_rate']}</td>" in html


def test_wrong_dimensions_and_no_database(engine: Engine, tmp_path: Path) -> None:
    for by in (("colour",), ("team", "team")):
        with pytest.raises(ConfigurationError, match=r"^by: "):
            cache_report(engine, tmp_path, by)
    away = open_engine("postgresql://farthing:hunter2@127.0.0.1:1/ledger")
    with pytest.raises(UnavailableError):
        cache_report(away, tmp_path)
    away.dispose()


# ---- verify ----


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"candidate": None}, "no candidate"),
        ({"cache_entry": "another"}, "entry of the candidate"),
        ({"cache": "miss", "cache_entry": None}, "candidate was served"),
    ],
)
def test_a_semantic_row_has_its_candidate(
    engine: Engine, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    Ledger(engine).write([hit("semantic", entry="e1"), hit("exact", entry="e1")], fresh=True)
    assert verify(engine, tmp_path).differences == []
    Ledger(engine).write([replace(hit("semantic", entry="e1"), **change)], fresh=True)
    assert any(says in f"{found.what} {found.stored}" for found in verify(engine, tmp_path).differences)


# ---- the command ----

SIZE = "context: 9000, max_output: 900"
PROVIDERS = f"""\
apiVersion: farthing/v1
providers:
  one: {{ wire: openai, base_url: "http://127.0.0.1:1/v1" }}
models:
  mini: {{ provider: one, name: m, {SIZE}, price: {{ input: "0.1", output: "0.4" }} }}
"""
POLICY = """\
apiVersion: farthing/v1
classes: { simple: { min_quality: 0.75 }, medium: { min_quality: 0.75 }, complex: { min_quality: 0.75 } }
defaults: { allow: [mini], cache: { semantic: certified, max_error: 5% } }
"""


@pytest.fixture
def embedded(tmp_path: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setenv("FARTHING_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("FARTHING_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("FARTHING_DATABASE_URL", sqlite_url)
    engine = open_engine(sqlite_url)
    # Without labels nothing is found wrong, and no rule is booked before the test's own.
    Ledger(engine).write([replace(record, cache_labels=()) for record in traffic()], fresh=True)
    yield engine
    engine.dispose()


def test_stats_need_the_environment_alone_and_the_policy_for_what_is_missing(
    embedded: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "stats"]) == 0
    said = capsys.readouterr().out
    assert said.split()[:4] == ["team", "app", "requests", "exact"]
    assert "policy could not be read" in said
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "providers.yaml").write_text(PROVIDERS)
    (tmp_path / "config" / "policy.yaml").write_text(POLICY)
    assert main(["cache", "stats", "--by", "team", "--format", "json"]) == 0
    rows = {row["team"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["search"]["certified"] + rows["search"]["waiting"] == 1
    assert main(["report", "cache", "--by", "team", "--format", "json", "--since", "7d"]) == 0
    again = {row["team"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert again == rows
    assert main(["cache", "stats", "--by", "colour"]) == 2
    assert "by: 'colour'" in capsys.readouterr().err
    assert main(["report", "spend", "--by", "scope"]) == 2


@pytest.mark.parametrize(
    ("options", "kind", "value"),
    [
        (["--all"], "all", ""),
        (["--epoch"], "all", ""),
        (["--team", "search"], "team", "search"),
        (["--team", "search", "--app", "faq-bot"], "app", "search/faq-bot"),
        (["--model", "mini"], "model", "mini"),
        (["--tag", "data=pii"], "tag", "data=pii"),
        (["--scope", "scope-ads"], "scope", "scope-ads"),
    ],
)
def test_invalidate_books_a_rule_and_says_how_soon(
    embedded: Engine, capsys: pytest.CaptureFixture[str], options: list[str], kind: str, value: str
) -> None:
    assert main(["cache", "invalidate", *options, "--reason", "new prices"]) == 0
    said = capsys.readouterr().out
    assert "Rule 1: " in said
    assert "within 5 seconds" in said
    assert "No booked request" not in said
    [rule] = list_rules(embedded)
    assert (rule.rule.kind, rule.rule.value, rule.by, rule.reason) == (kind, value, "cli", "new prices")
    assert main(["cache", "stats"]) == 0
    assert "by cli  new prices" in capsys.readouterr().out


def test_invalidate_notices_a_slip_and_refuses_nonsense(
    embedded: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", "invalidate", "--team", "serach"]) == 0
    assert "No booked request has this team" in capsys.readouterr().out
    assert main(["cache", "invalidate", "--entry", new_id(), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["id"], shown["kind"], shown["names_booked_requests"]) == (2, "entry", False)
    for options, says in (
        (["--tag", "pii"], "key=value"),
        (["--team", ""], "value: "),
        (["--all", "--app", "x"], "--app: "),
        (["--all", "--reason", "x" * 501], "reason: "),
    ):
        assert main(["cache", "invalidate", *options]) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["cache", "invalidate"])
    with pytest.raises(SystemExit):
        main(["cache", "invalidate", "--all", "--team", "search"])
    capsys.readouterr()
    assert main(["cache", "list-invalidations"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["2", "1"]
    assert main(["cache", "list-invalidations", "--json", "--limit", "1"]) == 0
    assert [rule["id"] for rule in json.loads(capsys.readouterr().out)] == [2]


def test_nothing_was_taken_back_yet(embedded: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "list-invalidations"]) == 0
    assert capsys.readouterr().out == "No stored answer was ever taken back.\n"
    invalidate(embedded, "entry", "e1", at=START, by="key_1")
    assert main(["cache", "stats"]) == 0
    assert "Newest rules" not in capsys.readouterr().out  # one by one they would fill the page
