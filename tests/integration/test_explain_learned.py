"""`policy explain` and the decide stage with an artefact in force: estimates, floors, unfamiliar prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from classifiers.classifier import Classifier
from classifiers.floor import Calibration
from classifiers.head import CLASSES
from classifiers.success_features import PromptFeatures
from router.adapters.price_catalogue import shipped_catalogue
from router.adapters.system import SystemClock
from router.core.compile import CompiledSnapshot
from router.core.health import Health
from router.core.learning import Estimate, Learned
from router.core.lint import load
from router.core.types import Caller
from router.explain import _prompt_lines, explained
from router.stages.admit import read_wishes
from router.stages.decide import Decide
from router.stages.exchange import Exchange
from router.stages.learn import Learn
from router.stages.normalise import normalise_chat

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
CLASSIFIER = Classifier.load()
TEXT = "What is the capital of Peru?"
PROVIDERS = """
apiVersion: farthing/v1
providers: { sim: { base_url: "http://127.0.0.1:9/v1" } }
models:
  small: { provider: sim, context: 32768, price: { input: "0.10", output: "0.40" },
           quality: { simple: "0.95", medium: "0.80", complex: "0.45" } }
  frontier: { provider: sim, context: 128000, price: { input: "5", output: "20" },
              quality: { simple: "0.99", medium: "0.97", complex: "0.94" } }
"""
POLICY = """
apiVersion: farthing/v1
baseline: frontier
learn: {}
classes: { simple: { min_quality: 0.90 } }
defaults: { allow: [small, frontier] }
"""
ASKING = POLICY.replace("min_quality: 0.90", "min_quality: 0.90, confidence: 95%")


@dataclass
class Predictor:
    """Says what it is told, and keeps what it was asked."""

    estimates: Mapping[str, Estimate]
    id: str = "success-1-abc"
    encoder_id: str = CLASSIFIER.static.id
    asked: list[tuple[int, str, Mapping[str, float]]] = field(default_factory=list)

    def predict(
        self, features: PromptFeatures, prompt_class: str, priors: Mapping[str, float]
    ) -> Mapping[str, Estimate]:
        self.asked.append((len(features.vector), prompt_class, priors))
        return self.estimates


def estimates(small: float, **changes: Any) -> dict[str, Estimate]:
    values = {"evidence": 310.0, "fallback": False, **changes}
    return {
        name: Estimate(success, success - 0.04, success + 0.01, **values)
        for name, success in (("small", small), ("frontier", 0.98))
    }


def rows(n: int) -> Calibration:
    return Calibration(
        ("small", "frontier"),
        np.full(n, CLASSES.index("simple"), np.int8),
        np.tile(np.linspace(0.5, 1.0, n, dtype=np.float32)[:, None], 2),
        np.ones((n, 2), np.float32),
        np.ones(n, np.float32),
        np.ones(n, np.bool_),
    )


def snapshot(policy: str) -> CompiledSnapshot:
    found = load(PROVIDERS, policy, shipped_catalogue(), NOW)
    assert found.snapshot is not None, [str(error) for error in found.errors]
    return found.snapshot


def explain(policy: str, learned: Learned | None, text: str = TEXT) -> dict[str, Any]:
    return explained(
        snapshot(policy),
        CLASSIFIER,
        text,
        team="any",
        app=None,
        model="auto",
        tags={},
        at=NOW,
        learned=learned,
    )


def lines(found: dict[str, Any]) -> str:
    return "\n".join(_prompt_lines({**found, "notes": []}))


def row(found: dict[str, Any], model: str) -> dict[str, Any]:
    return next(entry for entry in found["models"] if entry["model"] == model)


def test_learned_success_decides_and_is_shown() -> None:
    predictor = Predictor(estimates(0.82))
    found = explain(POLICY, Learned(predictor))
    assert found["decision"]["model"] == "frontier"
    assert found["learned"] == "success-1-abc"
    assert row(found, "small")["learned"] == {
        "source": "learned", "lower": 0.78, "upper": 0.83, "labels": 310.0,
    }  # fmt: skip
    assert (
        row(found, "small")["reason"] == "learned success 0.82 (0.78-0.83, 310 labels) below min_quality 0.90"
    )
    said = lines(found)
    assert "0.82 (0.78-0.83, 310 labels)" in said
    assert "Learned    success-1-abc" in said


def test_all_allowed_models_are_asked_about_in_one_call() -> None:
    predictor = Predictor(estimates(0.95))
    found = explain(POLICY, Learned(predictor))
    assert found["decision"]["model"] == "small"
    about = [entry for entry in predictor.asked if entry[1] == found["classification"]["class"]]
    assert len(about) == 1
    assert about[0][0] == CLASSIFIER.static.dimensions
    assert set(about[0][2]) == {"small", "frontier"}
    assert 0.9 <= about[0][2]["small"] <= 0.95


def test_a_class_is_predicted_once_unless_a_prior_speaks() -> None:
    def classes_asked(said: Mapping[str, Estimate]) -> list[str]:
        given, predictor = snapshot(POLICY), Predictor(said)
        body = {"model": "auto", "messages": [{"role": "user", "content": TEXT}]}
        exchange = Exchange(
            id="one", endpoint="chat.completions", opened_at=NOW, started=0.0, caller=Caller("key", "team"),
            wishes=read_wishes({}), request=normalise_chat(json.dumps(body).encode()), snapshot=given,
            policy=given.resolve("team", None, {}, NOW), reference=None, baseline_name=None, baseline_price=None,
        )  # fmt: skip
        exchange.prices = {name: given.price(name, NOW) for name in exchange.policy.allow}
        Learn(CLASSIFIER.static, SystemClock()).note_prompt(exchange)
        decide = Decide(Health(), SystemClock(), lambda: Learned(predictor))
        verdict = replace(CLASSIFIER.classify(TEXT), prompt_class="medium", difficulty=0.5)
        decide.could_change(exchange, verdict)
        for refined in (0.45, 0.55):
            decide.plan(exchange, exchange.policy, replace(verdict, difficulty=refined))
        return sorted(asked for _, asked, _ in predictor.asked)

    assert classes_asked(estimates(0.95)) == ["complex", "medium", "simple"]
    unlike = classes_asked(estimates(0.95, fallback=True, unfamiliar=True))
    assert unlike == ["complex", "medium", "medium", "medium", "simple"]


def test_without_learning_or_with_another_encoders_heads_the_prior_decides() -> None:
    predictor = Predictor(estimates(0.1))
    silent = explain(POLICY.replace("learn: {}\n", ""), Learned(predictor))
    other = explain(POLICY, Learned(Predictor(estimates(0.1), encoder_id="another")))
    nothing = explain(POLICY, None)
    for found in (silent, other, nothing):
        assert found["decision"]["model"] == "small"
        assert row(found, "small")["learned"] is None
        assert "labels)" not in lines(found)
    assert predictor.asked == []
    assert silent["learned"] is None


def test_an_unfamiliar_prompt_falls_back_to_the_prior_and_says_so() -> None:
    strange = estimates(0.85, evidence=0.0, fallback=True, unfamiliar=True)
    found = explain(POLICY, Learned(Predictor(strange)), "ᐃᓄᒃᑎᑐᑦ ᐅᖃᐅᓯᖅ")
    assert "unlike the labelled traffic: priors decide" in found["decision"]["notes"][0]
    assert row(found, "small")["learned"]["source"] == "unfamiliar"
    said = lines(found)
    assert "the prompt is unlike the labelled traffic: priors decide" in said
    assert "0.85 prior" in said


def test_a_class_that_asks_for_confidence_stays_with_the_reference_until_there_are_labels() -> None:
    before = explain(ASKING, None)
    assert before["decision"]["model"] == "frontier"
    assert before["floors"]["simple"]["labels_missing"] == {"small": 36}
    assert row(before, "small")["reason"] == "quality floor: 36 labels missing for 95 % confidence"
    few = explain(ASKING, Learned(Predictor(estimates(0.95)), rows(30)))
    assert few["decision"]["model"] == "frontier"
    assert row(few, "small")["reason"] == "quality floor: 6 labels missing for 95 % confidence"
    said = lines(few)
    assert "Floor      simple: frontier answers; nothing cheaper is shown with 95 % confidence" in said
    assert "labels missing: small 6" in said
    assert json.dumps(few["floors"], default=str)


def test_with_labels_the_floor_lets_the_cheaper_model_answer() -> None:
    found = explain(ASKING, Learned(Predictor(estimates(0.6)), rows(200)))
    assert found["decision"]["model"] == "small", "the certificate reaches further down than min_quality"
    floor = found["floors"]["simple"]
    assert (floor["model"], floor["threshold"], floor["labels_missing"]) == ("small", 0.0, {})
    assert 0 < floor["excess_failures_at_most"] <= 0.1
    assert "small from a learned success of 0.00 on, else frontier" in lines(found)
    strange = estimates(0.99, fallback=True, unfamiliar=True)
    away = explain(ASKING, Learned(Predictor(strange), rows(200)))
    assert away["decision"]["model"] == "frontier"
    assert "unlike the labelled traffic" in row(away, "small")["reason"]
