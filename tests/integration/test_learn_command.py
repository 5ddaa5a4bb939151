"""`farthing learn` over a database of labelled traffic: what it reads, prints, refuses, stores and brings back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from classifiers import own_traffic, prompt_features
from classifiers.floor import Calibration
from router import learn
from router.adapters.memory import ManualClock
from router.adapters.price_catalogue import shipped_catalogue
from router.adapters.sql import artefacts, schema
from router.adapters.sql.database import open_engine, writing
from router.adapters.sql.labels import keep_feedback, labelled_traffic
from router.adapters.sql.ledger import Ledger
from router.cli import main
from router.core.errors import ConfigurationError
from router.core.lint import load
from router.core.ports import Snapshot
from router.core.types import Caller, RequestRecord, Usage
from tests.contracts.ledger_records import labelled, new_id, settled
from tests.contracts.own_traffic_parts import MODELS, SUCCESS, encoder, prompt_text, read
from tests.values import replace

pytest_plugins = ["tests.contracts.sql_databases"]

SIZE = "context: 9000, max_output: 900"
QUALITY = 'quality: { simple: "0.8", medium: "0.8", complex: "0.8" }'
PROVIDERS = f"""\
apiVersion: farthing/v1
providers:
  one: {{ wire: openai, base_url: "http://127.0.0.1:1/v1" }}
models:
  small: {{ provider: one, name: s, {SIZE}, price: {{ input: "0.1", output: "0.4" }}, {QUALITY} }}
  large: {{ provider: one, name: l, {SIZE}, price: {{ input: "2", output: "8" }}, {QUALITY} }}
"""
POLICY = """\
apiVersion: farthing/v1
baseline: large
classes: { simple: { min_quality: 0.75 }, medium: { min_quality: 0.75 }, complex: { min_quality: 0.75 } }
defaults: { allow: [small, large] }
learn: {}
"""
NOW = datetime(2026, 11, 25, tzinfo=UTC)
TREES = 20


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    found = load(PROVIDERS, POLICY, shipped_catalogue(), ManualClock().now()).snapshot
    assert found is not None
    return found


@pytest.fixture
def engine(sqlite_url: str) -> Iterator[Engine]:
    engine = open_engine(sqlite_url)
    yield engine
    engine.dispose()


def traffic(
    count: int, *, seed: int = 0, noise: bool = False, at: datetime = NOW, keys: int = 3
) -> list[RequestRecord]:
    """One request a prompt, answered by a model drawn at random, with feedback as good as that model is at it."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(count):
        kind = "sum" if number % 2 else "greet"
        model = MODELS[int(rng.integers(2))]
        good = rng.random() < (0.8 if noise else SUCCESS[model, kind])
        record = settled(
            new_id(),
            served_model=model,
            prompt_class="medium",
            key_id=f"key_{number % keys}",
            usage=Usage(input=100, output=50),
            features=prompt_features.pack(read(kind, 10_000 * seed + number)),
            features_encoder=encoder().id,
        )
        # At one moment their order, and with it what is held out, would be that of random ids.
        moment = at - timedelta(milliseconds=count - number)
        label = labelled(record, "feedback", score=float(good), weight=1.0, at=moment)
        records.append(replace(record, labels=(label,)))
    return records


def book(engine: Engine, records: list[RequestRecord]) -> None:
    Ledger(engine).write(records, fresh=True)


def run(engine: Engine, snapshot: Snapshot, **options: Any) -> tuple[int, dict[str, Any]]:
    status, text = learn.run(engine, snapshot, json_form=True, trees=TREES, **{"now": NOW, **options})
    return status, json.loads(text)


def test_from_nothing_to_a_version_in_force_and_back(engine: Engine, snapshot: Snapshot) -> None:
    status, card = run(engine, snapshot)
    assert (status, card["refused"]) == (1, "too few labels: 100 more judged answers are missing")
    book(engine, traffic(60))
    status, card = run(engine, snapshot)
    assert (status, card["refused"]) == (1, "too few labels: 40 more judged answers are missing")
    assert learn.listing(engine, False) == "Nothing has been learned yet: the priors decide."

    book(engine, traffic(300, seed=1))
    status, dry = run(engine, snapshot, dry_run=True)
    assert (status, dry["activated"], learn.listing(engine, True)) == (0, False, "[]")
    status, card = run(engine, snapshot)
    assert (status, card["activated"], card["artefact"]) == (0, True, dry["artefact"])
    assert (card["labels"], card["prompts"], card["keys"]) == (360, 360, 3)
    assert card["by_source"] == {"feedback": 360}
    assert card["auroc"] > card["auroc_prior"] + 0.2
    costs = card["routing"]["usd_per_1000_at_this_success"]
    assert set(costs) == {"learned", "prior_only", "random", "best_single", "zero_router", "version_before"}
    assert card["routing"]["best_single"]["model"] == "large"
    in_force = artefacts.active(engine)
    assert in_force is not None
    assert (in_force.id, in_force.card["labels"]) == (card["artefact"], 360)
    first = card["artefact"]

    # The same labels give the same heads; more give a new version, compared with the one before.
    assert run(engine, snapshot)[1]["artefact"] == first
    book(engine, traffic(200, seed=2, at=NOW + timedelta(days=1)))
    status, card = run(engine, snapshot, now=NOW + timedelta(days=2))
    assert status == 0
    assert card["newer_than_active"] > 20
    assert card["routing"]["usd_per_1000_at_this_success"]["version_before"] is not None
    second = card["artefact"]
    assert [row["id"] for row in json.loads(learn.listing(engine, True)) if row["active"]] == [second]

    assert "in force" in learn.choose(engine, first, rollback=True)
    assert [row.id for row in artefacts.listed(engine) if row.active] == [first]
    shown = learn.listing(engine, False)
    assert f"{first}  active" in shown
    assert f"{second}  was active" in shown
    learn.choose(engine, "priors", rollback=True)
    assert artefacts.active(engine) is None
    learn.choose(engine, second, rollback=False)
    with pytest.raises(ConfigurationError, match="no artefact has this id"):
        learn.choose(engine, "success-1-0", rollback=True)


def test_held_out_labels_stay_unknown_where_a_class_asks_for_confidence(
    engine: Engine, snapshot: Snapshot
) -> None:
    count = 480
    Ledger(engine).write(traffic(count), fresh=True)
    whole = learn.learn(engine, snapshot, NOW, trees=TREES)
    sure = POLICY.replace(
        "learn: {}",
        "learn: {}\nteams: { search: { apps: { legal: { classes: { simple: { confidence: 95% } } } } } }",
    )
    asking = load(PROVIDERS, sure, shipped_catalogue(), ManualClock().now()).snapshot
    assert asking is not None
    proof = learn.learn(engine, asking, NOW, trees=TREES)
    assert whole.heads is not None
    assert proof.heads is not None
    assert (whole.refusal, proof.refusal) == (None, None)
    assert (whole.card["fitted_on"], proof.card["fitted_on"]) == ("all labels", "labels not held out")
    assert whole.card["auroc"] == proof.card["auroc"]  # judged before, on what the heads had not seen
    labels, rows = "labels", "calibration_classes"
    assert int(whole.heads.arrays[labels].sum()) == count
    assert int(proof.heads.arrays[labels].sum()) == count - whole.card["held_out_labels"]
    assert len(whole.heads.arrays[rows]) == len(proof.heads.arrays[rows]) == 0, (
        "feedback is whatever people send"
    )


def drawn(count: int, *, seed: int = 20, at: datetime = NOW, judged: bool = True) -> list[RequestRecord]:
    """One request a prompt, served by the large model, that was drawn and compared with the small one."""
    rng = np.random.default_rng(seed)
    records = []
    for number, record in enumerate(traffic(count, seed=seed, at=at)):
        kind = "sum" if number % 2 else "greet"
        scores = {model: float(rng.random() < SUCCESS[model, kind]) for model in MODELS}
        common: dict[str, Any] = {"at": at, "propensity": 0.02}
        found = [
            labelled(record, "floor", model=model, score=score, weight=weight, **common)
            for model, score, weight in (("small", 1.0, 0.1), ("large", 1.0, 0.1))
        ]
        if judged:
            found += [
                labelled(record, "floor_judge", model=model, score=scores[model], weight=1.0, **common)
                for model in MODELS
            ]
        records.append(replace(record, served_model="large", labels=tuple(found)))
    return records


def test_a_certificate_rests_on_drawn_requests_each_counted_once(engine: Engine, snapshot: Snapshot) -> None:
    sure = POLICY.replace("medium: { min_quality: 0.75 }", "medium: { min_quality: 0.6, confidence: 95% }")
    asking = load(PROVIDERS, sure, shipped_catalogue(), ManualClock().now()).snapshot
    assert asking is not None
    records = drawn(600)
    book(engine, [*records, *drawn(100, seed=21, at=NOW - timedelta(days=100))])
    found = learn.learn(engine, asking, NOW, trees=TREES)
    assert found.heads is not None
    assert found.card["by_source"] == {"floor": 1400, "floor_judge": 1400}
    assert found.card["labels"] == 1400, "a verdict stands in place of agreement"
    held = found.card["compared"]["held_out"]
    assert found.card["compared"] == {"requests": 600, "unsure": 0, "held_out": held}, "older than 90 days"
    assert 100 < held < 200
    carried = Calibration.of(found.heads.models, found.heads.arrays)
    before = carried.certificates("medium", ["small"], "large", 0.4, 0.05)["small"]
    assert (before.labels, before.threshold is not None) == (held, True)

    # A hundred people who score one cached answer, and callers' floods, move no certificate.
    hit = replace(
        settled(new_id(), cache="exact", cache_entry=records[0].id, served_model="large"), attempts=()
    )
    flood = [labelled(hit, "feedback", score=0.0, weight=1.0, at=NOW, key_id=f"key_{n}") for n in range(100)]
    book(engine, [replace(hit, labels=tuple(flood))])
    after = learn.learn(engine, asking, NOW, trees=TREES)
    assert after.heads is not None
    again = Calibration.of(after.heads.models, after.heads.arrays)
    assert len(again.classes) == held
    assert (np.sort(again.labels, axis=0) == np.sort(carried.labels, axis=0)).all(), "the same ones"
    assert again.certificates("medium", ["small"], "large", 0.4, 0.05)["small"].labels == held


def test_without_a_judge_every_answer_that_differs_is_harm(engine: Engine, snapshot: Snapshot) -> None:
    records = [*traffic(200, seed=22), *drawn(300, judged=False)]
    nothing = drawn(1, seed=23, judged=False)[0]
    nothing = replace(nothing, labels=tuple(replace(label, weight=0.0) for label in nothing.labels))
    book(engine, [*records, nothing])
    examples, comparisons, _ = learn.examples_of(labelled_traffic(engine, encoder().id), snapshot, NOW)
    assert len(examples.score) == 800, (
        "what is not believed at all teaches nothing, and was drawn all the same"
    )
    assert (len(comparisons.sure), comparisons.sure.any()) == (301, False)
    heads = own_traffic.fit(examples, learn.priors_of(snapshot, examples.models), encoder().id, 0, TREES)
    carried = Calibration.of(heads.models, learn.calibration(heads, examples, comparisons))
    certificate = carried.certificates("medium", ["small"], "large", 0.1, 0.05)["small"]
    assert certificate.share < 0.1, "no more is routed than may fail"
    assert (carried.rows("medium", "small", "large").excess == 1.0).all()


def test_labels_of_noise_do_not_get_into_force(engine: Engine, snapshot: Snapshot) -> None:
    book(engine, traffic(300, seed=3, noise=True))
    # One draw of the held-out prompts in eight is kind to noise by more than a standard error.
    found = [learn.learn(engine, snapshot, NOW, seed=seed, trees=TREES).refusal for seed in range(7)]
    assert sum(refusal is not None and "no better than the priors" in refusal for refusal in found) >= 4
    seed = next(seed for seed, refusal in enumerate(found) if refusal is not None)
    status, text = learn.run(engine, snapshot, json_form=True, seed=seed, now=NOW, trees=TREES)
    assert (status, json.loads(text)["refused"]) == (1, found[seed])
    assert artefacts.listed(engine) == []


def test_a_flood_of_one_key_is_left_out_and_named(engine: Engine, snapshot: Snapshot) -> None:
    book(engine, traffic(240, seed=1))
    before = learn.learn(engine, snapshot, NOW, trees=TREES)
    flood = traffic(2500, seed=4, keys=1)
    flip = [
        replace(
            r,
            key_id="key_flood",
            labels=tuple(replace(x, key_id="key_flood", score=1 - x.score) for x in r.labels),
        )
        for r in flood
    ]
    book(engine, flip)
    after = learn.learn(engine, snapshot, NOW, trees=TREES)
    [doubt] = after.card["doubts"]
    assert (doubt["key"], doubt["labels"], doubt["left_out"]) == ("key_flood", 2500, True)
    assert before.heads is not None
    assert after.heads is not None
    for kind in ("sum", "greet"):
        prompt = read(kind, 99)
        ask = (prompt, "medium", dict.fromkeys(MODELS, 0.8))
        old, new = before.heads.predict(*ask), after.heads.predict(*ask)
        assert all(abs(old[model].probability - new[model].probability) < 0.15 for model in MODELS)
        assert abs(new["small"].probability - SUCCESS["small", kind]) < 0.25
    text = learn.card_text({**after.card, "refused": None, "artefact": "x", "activated": False})
    assert "2500 labels of key key_flood left out" in text
    assert "--trust key_flood" in text


def test_a_trusted_key_must_have_given_labels(engine: Engine, snapshot: Snapshot) -> None:
    book(engine, traffic(4, seed=1))
    with pytest.raises(ConfigurationError, match="no label is of key key_mistyped"):
        learn.learn(engine, snapshot, NOW, trees=TREES, trusted=frozenset({"key_mistyped"}))


def test_no_key_crowds_out_the_others(database_url: str) -> None:
    engine = open_engine(database_url)
    many = [
        replace(record, key_id="key_many", labels=tuple(replace(x, key_id="key_many") for x in record.labels))
        for record in traffic(30, seed=6, keys=1)
    ]
    book(engine, [*traffic(4, seed=5), *many])
    read = labelled_traffic(engine, encoder().id, limit=12)
    of_key = Counter(row.label.key_id for row in read.rows)
    assert len(read.rows) == 12
    assert of_key["key_many"] <= 12 - (len(of_key) - 1)
    engine.dispose()
    assert len(of_key) > 1
    assert [row.label.at for row in read.rows] == sorted(row.label.at for row in read.rows)


def test_what_is_read_of_labels(database_url: str) -> None:
    engine = open_engine(database_url)
    first, signal, bare, foreign = traffic(4, seed=5)
    signal = replace(signal, labels=(labelled(signal, "refusal"),))
    bare = replace(bare, features=None)
    foreign = replace(foreign, features_encoder="static-000000000000")
    hit = replace(
        settled(new_id(), cache="exact", cache_entry=first.id, served_model=first.served_model), attempts=()
    )
    book(engine, [first, signal, bare, foreign, hit])
    caller = Caller("key_0", "search")
    for score in (0.25, 0.5):
        assert keep_feedback(engine, caller, hit.id, score, None, NOW)
    found = labelled_traffic(engine, encoder().id)
    assert found.without_features == 2
    assert found.served == {
        model: sum(r.served_model == model for r in (first, signal))
        for model in {first.served_model, signal.served_model}
    }
    by_request = {row.label.request_id: row for row in found.rows}
    assert set(by_request) == {first.id, signal.id, hit.id}
    assert (by_request[hit.id].label.score, by_request[hit.id].prompt_id) == (0.5, first.id)
    assert by_request[hit.id].features == by_request[first.id].features == first.features
    assert (by_request[first.id].prompt_class, by_request[first.id].usage) == ("medium", first.usage)
    assert by_request[signal.id].label.source == "refusal"
    assert len(labelled_traffic(engine, encoder().id, limit=2).rows) <= 2
    engine.dispose()


def test_a_judgement_stands_in_place_of_signals(engine: Engine, snapshot: Snapshot) -> None:
    [record] = traffic(1, seed=6)
    both = replace(
        record, labels=(*record.labels, labelled(record, "truncated"), labelled(record, "judge", score=1.0))
    )
    [flagged] = traffic(1, seed=7)
    flagged = replace(
        flagged, labels=(labelled(flagged, "refusal"), labelled(flagged, "feedback", model="gone"))
    )
    book(engine, [both, flagged])
    examples, _, unknown = learn.examples_of(labelled_traffic(engine, encoder().id), snapshot, NOW)
    assert unknown == 1
    assert sorted(zip(examples.key.tolist(), examples.strong.tolist(), strict=True)) == [
        ("", True),
        ("key_0", False),
        ("key_0", True),
    ]
    assert examples.labelled_prompts == 1
    assert examples.costs.shape == (2, 2)
    small, large = examples.costs[0, MODELS.index("small")], examples.costs[0, MODELS.index("large")]
    assert (small, large) == (pytest.approx(30e-6), pytest.approx(600e-6))


def test_features_of_another_version_are_passed_over(engine: Engine, snapshot: Snapshot) -> None:
    good, old = traffic(2, seed=8)
    book(engine, [good, replace(old, features=b"\x00old")])
    examples, _, _ = learn.examples_of(labelled_traffic(engine, encoder().id), snapshot, NOW)
    assert len(examples.score) == 1


def test_the_command(
    tmp_path: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "providers.yaml").write_text(PROVIDERS)
    (tmp_path / "policy.yaml").write_text(POLICY)
    monkeypatch.setenv("FARTHING_CONFIG", str(tmp_path))
    monkeypatch.setenv("FARTHING_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("FARTHING_DATABASE_URL", sqlite_url)
    engine = open_engine(sqlite_url)
    assert main(["learn"]) == 1
    assert "too few labels: 100 more judged answers are missing" in capsys.readouterr().out
    book(engine, traffic(200, seed=1))
    assert main(["learn", "--dry-run"]) == 0
    said = capsys.readouterr().out
    for words in (
        "200 on 200 judged prompts",
        "AUROC",
        "ECE",
        "best single",
        "zero router",
        "would be activated",
        "small:",
    ):
        assert words in said
    assert prompt_text("sum", 1) not in said
    assert main(["learn", "--json"]) == 0
    id = json.loads(capsys.readouterr().out)["artefact"]
    assert main(["learn", "--list"]) == 0
    assert f"{id}  active" in capsys.readouterr().out
    with writing(engine) as connection:
        connection.execute(sa.update(schema.artefacts).values(sha256="0" * 64))
    assert main(["learn", "--activate", id]) == 2
    assert "does not match its hash" in capsys.readouterr().err
    assert main(["learn", "--rollback", "priors"]) == 0
    assert main(["learn", "--rollback", "nothing"]) == 2
    engine.dispose()
