"""From a policy and an artefact's held-out rows to the floor of a class."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from threading import Event

import numpy as np
import pytest

from classifiers.floor import Calibration
from router.adapters.price_catalogue import shipped_catalogue
from router.core.compile import CompiledSnapshot
from router.core.floor import QualityFloor, reference_of
from router.core.lint import load

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
PROVIDERS = """\
apiVersion: farthing/v1
providers: { p: { base_url: "http://h/v1" } }
models:
  tiny:   { provider: p, context: 8000, price: { input: "0.1", output: "0.1" }, quality: { simple: 0.8, medium: 0.6, complex: 0.3 } }
  small:  { provider: p, context: 8000, price: { input: "1", output: "2" }, quality: { simple: 0.9, medium: 0.8, complex: 0.6 } }
  large:  { provider: p, context: 8000, price: { input: "10", output: "20" }, quality: { simple: 0.97, medium: 0.95, complex: 0.9 } }
  dear:   { provider: p, context: 8000, price: { input: "20", output: "40" }, quality: { simple: 0.96, medium: 0.94, complex: 0.8 } }
  free:   { provider: p, context: 8000, quality: { simple: 0.5, medium: 0.5, complex: 0.5 } }
"""  # noqa: E501
POLICY = """\
apiVersion: farthing/v1
learn: {}
classes: { simple: { confidence: 95% }, medium: { min_quality: 0.8, confidence: 95% } }
defaults: { allow: [tiny, small, large, dear], on_unpriced_model: allow }
"""
MODELS = ("tiny", "small", "large")


def snapshot(policy: str = POLICY) -> CompiledSnapshot:
    found = load(PROVIDERS, policy, shipped_catalogue(), NOW)
    assert found.snapshot is not None, [str(error) for error in found.errors]
    return found.snapshot


def rows(tiny: float, small: float, n: int = 2000) -> Calibration:
    """Labelled medium prompts; each model's success is what is predicted for it, spread by 0.2 about its mean."""
    draws = np.random.default_rng(4)
    predicted = np.clip(np.array([tiny, small, 0.95]) + draws.uniform(-0.2, 0.2, (n, 3)), 0, 1)
    return Calibration(
        MODELS,
        np.full(n, 1, np.int8),
        predicted.astype(np.float32),
        (draws.random((n, 3)) < predicted).astype(np.float32),
        np.ones(n, np.float32),
        np.ones(n, np.bool_),
    )


def floor_of(floors: QualityFloor, given: CompiledSnapshot, prompt_class: str = "medium", **changes: Decimal):  # type: ignore[no-untyped-def]
    policy = given.resolve("any", None, {}, NOW)
    quality = changes.get("min_quality", policy.classes[prompt_class].min_quality)
    return floors.of(given, policy, prompt_class, quality, NOW)


def test_without_confidence_there_is_no_floor() -> None:
    assert floor_of(QualityFloor(rows(0.8, 0.9)), snapshot(), "complex") is None


def test_before_anything_is_learned_every_cheaper_model_lacks_labels() -> None:
    found = floor_of(QualityFloor(None), snapshot())
    assert (found.reference, found.model, found.bound) == ("large", None, 0.0)
    assert set(found.missing) == {"tiny", "small"}, "dearer models are not held back for labels"
    assert found.compared == ("small", "tiny")
    assert found.missing["tiny"] == 20  # ln(0.05 / 2 / 2) / ln(0.8), rounded up


def test_the_cheaper_model_that_saves_most_gets_the_class() -> None:
    found = floor_of(QualityFloor(rows(tiny=0.85, small=0.9)), snapshot())
    assert found.model == "tiny"
    assert 0.0 < found.bound <= 0.2
    assert found.missing == {}
    assert found.compared == ("small", "tiny"), "labels go on coming in after a certificate"
    found = floor_of(QualityFloor(rows(tiny=0.3, small=0.9)), snapshot())
    assert found.model == "small"


def test_classes_have_rows_of_their_own() -> None:
    floors = QualityFloor(rows(0.85, 0.9))
    assert floor_of(floors, snapshot(), "simple").model is None
    assert floor_of(floors, snapshot(), "simple").missing["tiny"] == 42
    assert sorted(floors.missing()) == [("simple", "small", 42), ("simple", "tiny", 42)]
    floor_of(floors, snapshot(), "medium")
    assert ("medium", "tiny", 0) in list(floors.missing())


def test_a_stricter_wish_routes_no_further() -> None:
    floors = QualityFloor(rows(0.75, 0.9))
    plain = floor_of(floors, snapshot())
    strict = floor_of(floors, snapshot(), min_quality=Decimal("0.9501"))
    assert strict is floor_of(floors, snapshot(), min_quality=Decimal("0.96")), "counted in whole percent"
    assert strict.model is None or strict.threshold > plain.threshold or strict.model != plain.model
    assert strict.bound <= 0.04


def test_the_policys_own_quality_is_not_rounded() -> None:
    fine = snapshot(POLICY.replace("min_quality: 0.8", "min_quality: 0.995"))
    found = floor_of(QualityFloor(None), fine)
    assert (
        found.missing["tiny"] == 875
    )  # ln(0.05 / 2 / 2) / ln(0.995), rounded up; at 1.00 it is never enough


def test_without_room_for_failures_only_a_model_shown_to_be_no_worse_may_answer() -> None:
    found = floor_of(QualityFloor(rows(0.7, 0.7)), snapshot(), min_quality=Decimal(1))
    assert found.model is None
    found = floor_of(QualityFloor(rows(0.7, 1.2)), snapshot(), min_quality=Decimal(1))
    assert found.model == "small"
    assert found.bound <= 0.0


def test_the_reference_is_the_baseline_where_it_is_allowed_else_the_best_prior() -> None:
    def reference(text: str) -> str | None:
        given = snapshot(text)
        return reference_of(given, given.resolve("any", None, {}, NOW), "medium")

    assert reference(POLICY) == "large"
    assert reference(POLICY + "baseline: dear\n") == "dear"
    assert reference(POLICY + "baseline: free\n") == "large"
    unknown = POLICY.replace("allow: [tiny, small, large, dear]", "allow: [free, tiny]")
    assert reference(unknown) == "tiny"


def test_an_unpriced_model_is_no_candidate() -> None:
    text = POLICY.replace("allow: [tiny,", "allow: [free, tiny,")
    found = floor_of(QualityFloor(None), snapshot(text))
    assert "free" not in found.missing
    assert "nothing but large" in (found.excludes("free", None) or "")


def test_floors_are_computed_once_and_anew_when_the_policy_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    floors, given = QualityFloor(rows(0.8, 0.9)), snapshot()
    first = floor_of(floors, given)
    calls = []
    monkeypatch.setattr(floors, "_compute", lambda *arguments: calls.append(arguments))
    assert floor_of(floors, given) is first
    assert calls == []
    floor_of(floors, snapshot(POLICY.replace("0.8", "0.7")))
    assert len(calls) == 1


def test_until_a_floor_is_known_the_reference_answers_and_nobody_waits() -> None:
    with ThreadPoolExecutor(1) as executor:
        running = Event()
        executor.submit(running.wait)
        floors, given = QualityFloor(rows(0.85, 0.9), executor), snapshot()
        found = floor_of(floors, given)
        assert (found.reference, found.model, found.compared) == ("large", None, ("small", "tiny"))
        assert found.excludes("tiny", None) == (
            "quality floor: nothing but large is shown to do with 95 % confidence"
        )
        floor_of(floors, given)
        running.set()
    assert floor_of(floors, given).model == "tiny"
    assert floors._pending == set()
