"""Reports over a booked ledger: the figures of every format against an independent recomputation."""

from __future__ import annotations

import csv
import io
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from sqlalchemy.engine import Engine

from router.adapters.journal import JournalFile
from router.adapters.sql.database import open_engine
from router.adapters.sql.ledger import Ledger, adjust
from router.adapters.sql.reports import (
    Report,
    Usd,
    budgets_report,
    moment,
    render,
    savings_report,
    spend_report,
)
from router.adapters.sql.verify import verify
from router.cli import main
from router.core.errors import ConfigurationError, UnavailableError
from router.core.policy import BudgetLimit
from router.core.types import NanoUSD, RequestRecord, Usage
from tests.contracts.ledger_records import OPENED, new_id, opened, settled
from tests.values import replace

pytest_plugins = ["tests.contracts.sql_databases"]

START = datetime(2026, 11, 20, 6, 0, tzinfo=UTC)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def booked(engine: Engine) -> list[RequestRecord]:
    rng = random.Random(11)
    records = []
    for _ in range(300):
        record = settled(
            new_id(),
            team=rng.choice(["search", "ads"]),
            app=rng.choice([None, "faq-bot", "crawler"]),
            usage=Usage(
                input=rng.randrange(1, 5000), output=rng.randrange(1, 900), input_cached=rng.randrange(50)
            ),
            failed_first=rng.random() < 0.1,
            baseline=rng.choice([None, 50_000, 2_000_000]),
            opened_at=START + timedelta(seconds=rng.randrange(4 * 86_400)),
            prompt_class=rng.choice(["simple", "complex", None]),
            estimated=rng.random() < 0.1,
            potential_savings=rng.choice([None, 70]),
        )
        if rng.random() < 0.1:
            attempts = tuple(replace(item, cost=None, lines=(), price=None) for item in record.attempts)
            none = dict.fromkeys(("cost", "routing_savings", "cache_savings", "overhead"))
            record = replace(record, unpriced=True, attempts=attempts, **none)
        records.append(record)
    Ledger(engine).write(records, fresh=True)
    return records


def within(
    records: Sequence[RequestRecord], since: datetime | None, until: datetime | None
) -> list[RequestRecord]:
    return [
        record
        for record in records
        if (since is None or record.opened_at >= since) and (until is None or record.opened_at < until)
    ]


SPANS = [
    (None, None),
    (START + timedelta(hours=30), None),
    (None, START + timedelta(hours=30)),
    (START + timedelta(hours=5), START + timedelta(hours=8)),
    (START + timedelta(hours=5), START + timedelta(hours=60)),
    (datetime(2026, 11, 21, tzinfo=UTC), datetime(2026, 11, 23, tzinfo=UTC)),
    (datetime(2027, 1, 1, tzinfo=UTC), None),
]


@pytest.mark.parametrize(("since", "until"), SPANS)
def test_spend_agrees_in_every_format(
    engine: Engine,
    tmp_path: Path,
    booked: list[RequestRecord],
    since: datetime | None,
    until: datetime | None,
) -> None:
    by = ("team", "app", "model", "class", "day")
    expected: dict[tuple[str | None, ...], list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0])
    for record in within(booked, since, until):
        day = record.opened_at.date().isoformat()
        sums = expected[record.team, record.app, record.served_model, record.prompt_class, day]
        for at, value in enumerate(
            (1, record.cost or 0, record.usage.output, int(record.estimated), int(record.unpriced))
        ):
            sums[at] += value
    report = spend_report(engine, tmp_path, by, since, until)

    parsed = json.loads(render(report, "json"), parse_float=Decimal)
    found = {
        tuple(row[name] for name in by): [
            row["requests"],
            row["cost_usd"] * 10**9,
            row["tokens_output"],
            row["estimated"],
            row["unpriced"],
        ]
        for row in parsed["rows"]
    }
    assert found == expected
    assert len(parsed["rows"]) == len(expected)
    health = parsed["data_health"]
    assert health["estimated"] == sum(sums[3] for sums in expected.values())
    assert health["unpriced"] == sum(sums[4] for sums in expected.values())
    assert health["unsettled"] == 0

    from_csv = list(csv.DictReader(io.StringIO(render(report, "csv"))))
    costs = [row["cost_usd"] for row in from_csv]
    assert costs == [str(row["cost_usd"]) for row in report.rows]
    table = render(report, "table").splitlines()
    column = table[0].split().index("cost_usd")
    assert [line.split()[column] for line in table[2 : 2 + len(costs)] if costs] == costs


def test_savings_hold_the_identity_and_keep_the_negative(
    engine: Engine, tmp_path: Path, booked: list[RequestRecord]
) -> None:
    report = savings_report(engine, tmp_path, ("team",))
    for row in report.rows:
        compared = [r for r in booked if r.team == row["team"] and None not in (r.cost, r.baseline)]
        assert row["compared"] == len(compared)
        assert row["saved_usd"] == Usd(sum((r.baseline or 0) - (r.cost or 0) for r in compared))
        nano = {name: value.nano for name, value in row.items() if isinstance(value, Usd)}
        assert nano["baseline_usd"] - nano["cost_usd"] == nano["saved_usd"]
        assert nano["saved_usd"] == nano["routing_usd"] + nano["cache_usd"] - nano["overhead_usd"]
        assert nano["potential_usd"] == 70 * int(str(row["advised"]))
    dear = settled(new_id(), team="dear", baseline=1, opened_at=START)
    Ledger(engine).write([dear], fresh=True)
    report = savings_report(engine, tmp_path, ("team",))
    assert report.rows[-1]["team"] == "dear"
    assert str(report.rows[-1]["saved_usd"]) == "-0.000037499"


def test_an_adjustment_corrects_the_report(engine: Engine, tmp_path: Path) -> None:
    record = settled(new_id())
    Ledger(engine).write([record], fresh=True)
    adjust(engine, record.id, -37_000, "refund", "finops", OPENED)
    assert [str(row["cost_usd"]) for row in spend_report(engine, tmp_path, ("team", "day")).rows] == [
        "0.000000500"
    ]
    assert [str(row["spent_usd"]) for row in budgets_report(engine, tmp_path, [], "2026-11").rows] == [
        "0.000000500"
    ] * 3


def test_what_is_still_in_a_journal_is_counted_unsettled(engine: Engine, tmp_path: Path) -> None:
    journal = JournalFile(tmp_path)
    record = settled(new_id())
    Ledger(engine).write([record], fresh=True)
    journal.settle(record)
    journal.settle(settled(new_id()))
    journal.open(opened(new_id()))
    for report in (
        spend_report(engine, tmp_path),
        savings_report(engine, tmp_path),
        budgets_report(engine, tmp_path, [], "2026-11"),
    ):
        assert report.data_health["unsettled"] == 2
    assert verify(engine, tmp_path).unsettled == 2
    journal.close()


def test_budgets_show_where_each_stands(engine: Engine, tmp_path: Path) -> None:
    Ledger(engine).write([settled(new_id())], fresh=True)
    warn = (Decimal("0.5"), Decimal("0.8"))
    limits = [
        BudgetLimit("organisation", NanoUSD(37_500_000), NanoUSD(40_000_000), "refuse", warn),
        BudgetLimit("team:search", NanoUSD(75_000), None, "downgrade", warn),
        BudgetLimit("app:search/faq-bot", NanoUSD(37_500), NanoUSD(50_000), "downgrade", warn),
        BudgetLimit("team:idle", NanoUSD(100), NanoUSD(100), "refuse"),
    ]
    report = budgets_report(engine, tmp_path, limits, "2026-11")
    found = {row["budget"]: (row["state"], str(row["share"]), str(row["spent_usd"])) for row in report.rows}
    assert found == {
        "organisation": ("ok", "0.0010", "0.000037500"),
        "team:search": ("warn", "0.5000", "0.000037500"),
        "app:search/faq-bot": ("at_limit", "1.0000", "0.000037500"),
        "team:idle": ("ok", "0.0000", "0.000000000"),
    }
    full = budgets_report(
        engine, tmp_path, [BudgetLimit("team:search", NanoUSD(9), NanoUSD(9), "refuse")], "2026-11"
    )
    assert {row["budget"]: row["state"] for row in full.rows}["team:search"] == "at_hard_cap"
    assert "0.5000" in render(report, "json")


def test_an_empty_ledger_reports_nothing(engine: Engine, tmp_path: Path) -> None:
    report = spend_report(engine, tmp_path / "none", ("team",))
    assert json.loads(render(report, "json")) == {
        "rows": [],
        "data_health": {"unsettled": 0, "rejected": 0, "unpriced": 0, "estimated": 0, "failed": 0},
    }
    assert "(nothing booked)" in render(report, "table")
    assert render(report, "csv").count("\r\n") == 1
    assert spend_report(engine, tmp_path, ()).rows[0]["requests"] == 0


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx"])
def test_no_cell_is_a_formula_or_drives_the_terminal(text: str) -> None:
    report = Report(("team", "cost_usd"), ({"team": text, "cost_usd": Usd(-1)},), {})
    [row] = csv.DictReader(io.StringIO(render(report, "csv"), newline=""))
    assert row["team"] == "'" + text
    assert row["cost_usd"] == "-0.000000001"
    assert "\t" not in render(report, "table")
    escape = Report(("team",), ({"team": "<b>\x1b[2J"},), {})
    assert "\x1b" not in render(escape, "table")
    assert "&lt;b&gt;" in render(escape, "html")


def test_json_prints_money_exactly() -> None:
    amount = 9_007_199_254_740_993 * 1_000 + 1  # no float holds it
    text = render(Report(("cost_usd",), ({"cost_usd": Usd(amount)},), {}), "json")
    assert json.loads(text, parse_float=Decimal)["rows"] == [{"cost_usd": Decimal(amount) / 10**9}]
    assert "9007199254.740993001" in text


def test_wrong_questions_get_clear_errors(tmp_path: Path, sqlite_url: str) -> None:
    engine = open_engine(sqlite_url)
    with pytest.raises(ConfigurationError, match=r"by: 'colour' is not one of team, app"):
        spend_report(engine, tmp_path, ("colour",))
    with pytest.raises(ConfigurationError, match="named twice"):
        spend_report(engine, tmp_path, ("team", "team"))
    with pytest.raises(ConfigurationError, match="format: must be one of table"):
        render(spend_report(engine, tmp_path), "xml")
    away = open_engine(f"sqlite:///{tmp_path / 'nowhere' / 'ledger.db'}")
    with pytest.raises(UnavailableError):
        spend_report(away, tmp_path)


def test_moments() -> None:
    now = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
    assert moment("7d", now) == datetime(2026, 11, 17, 12, 0, tzinfo=UTC)
    assert moment("36h", now) == datetime(2026, 11, 23, 0, 0, tzinfo=UTC)
    assert moment("2w", now) == datetime(2026, 11, 10, 12, 0, tzinfo=UTC)
    assert moment("2026-11-01", now) == datetime(2026, 11, 1, tzinfo=UTC)
    assert moment("2026-11-01T01:00:00+02:00", now) == datetime(2026, 10, 31, 23, 0, tzinfo=UTC)
    for text in ("yesterday", "", "7", "-7d", "999999w"):
        with pytest.raises(ConfigurationError, match="write a span"):
            moment(text, now)


@pytest.mark.parametrize("option", [("--by", "team"), ("--since", "7d"), ("--until", "2026-12-01")])
def test_budgets_take_no_dimensions_and_no_time(
    option: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "budgets", *option]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"farthing: {option[0]} has no meaning for budgets")
    assert "Leave it out" in error
