"""How long one decision takes on the static path, part by part, with 20 candidate models.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.decision [--models 20] [--requests 2000] [--json]

*priors*: a policy without `learn`. *learned*: success heads fitted on made-up labels of all models. *floor*: the
class asks for confidence as well (computed once a policy, before the clock runs). Every prompt is new, so nothing is
remembered; the whole is what a request waits for: its features, its verdict and the plan made from it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from benchmarks.prompts import STATIC, prompt
from classifiers import prompt_features
from classifiers.classifier import Classifier
from classifiers.floor import Calibration
from classifiers.head import CLASSES
from classifiers.success import Labels, SuccessHeads
from router.adapters.price_catalogue import shipped_catalogue
from router.adapters.sql.artefacts import LearnedHeads
from router.adapters.system import SystemClock
from router.core.compile import CompiledSnapshot
from router.core.decide import Plan
from router.core.health import Health
from router.core.learning import Learned
from router.core.lint import load
from router.core.types import Caller
from router.stages.admit import read_wishes
from router.stages.decide import Decide
from router.stages.exchange import Exchange
from router.stages.learn import Learn
from router.stages.normalise import normalise_chat

BUDGET_MS = 0.5
LABELLED = 600
NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


@dataclass(frozen=True)
class Parts:
    """Milliseconds of one decision."""

    features: float
    verdict: float
    plan: float

    @property
    def whole(self) -> float:
        return self.features + self.verdict + self.plan


def snapshot(models: int, *, learn: bool, confidence: bool) -> CompiledSnapshot:
    names = [f"model-{number:02d}" for number in range(models)]
    providers = [
        "apiVersion: farthing/v1",
        'providers: { p: { base_url: "http://127.0.0.1:1/v1" } }',
        "models:",
    ]
    for number, name in enumerate(names):
        good = 0.5 + 0.45 * (number + 1) / models
        providers.append(
            f'  {name}: {{ provider: p, context: 100000, price: {{ input: "{0.1 * (number + 1):.2f}", '
            f'output: "{0.4 * (number + 1):.2f}" }}, expect: {{ first_token: 300ms, tokens_per_second: 60 }}, '
            f"quality: {{ simple: {good:.3f}, medium: {good - 0.05:.3f}, complex: {good - 0.2:.3f} }} }}"
        )
    asked = "{ min_quality: 0.8, confidence: 95% }" if confidence else "{ min_quality: 0.8 }"
    policy = [
        "apiVersion: farthing/v1",
        *(["learn: {}"] if learn else []),
        f"classes: {{ simple: {asked}, medium: {asked}, complex: {asked} }}",
        f"defaults: {{ allow: [{', '.join(names)}] }}",
    ]
    found = load("\n".join(providers), "\n".join(policy), shipped_catalogue(), NOW)
    assert found.snapshot is not None, found.errors
    return found.snapshot


def learned(classifier: Classifier, given: CompiledSnapshot) -> Learned:
    """Heads on made-up labels: what they say is nothing, how long they take is what it would be."""
    draws = np.random.default_rng(0)
    texts = [prompt(STATIC[number % len(STATIC)], 10**6 + number) for number in range(LABELLED)]
    read = [prompt_features.read(text, classifier.static) for text in texts]
    names = tuple(given.models)
    priors = {
        name: {cls: float((given.models[name].quality or {})[cls]) for cls in CLASSES} for name in names
    }
    truth = np.array([[priors[name]["medium"] for name in names]] * LABELLED)
    scores = (draws.random(truth.shape) < truth).astype(float)
    heads = SuccessHeads.fit(
        read,
        [CLASSES[number % 3] for number in range(LABELLED)],
        Labels.dense(scores),
        priors,
        encoder_id=classifier.static.id,
        seed=0,
    )
    rows = Calibration(
        names,
        (np.arange(LABELLED) % 3).astype(np.int8),
        np.clip(truth + draws.normal(0, 0.1, truth.shape), 0, 1).astype(np.float32),
        scores.astype(np.float32),
        np.ones(truth.shape, np.float32),
    )
    return Learned(LearnedHeads("made-up", heads), rows)


def measure(
    classifier: Classifier, given: CompiledSnapshot, artefact: Learned | None, requests: int, first: int
) -> list[Parts]:
    clock, health = SystemClock(), Health()
    decide, learn = Decide(health, clock, lambda: artefact), Learn(classifier.static, clock)
    caller, wishes = Caller("key", "team"), read_wishes({})
    policy = given.resolve("team", None, {}, NOW)
    for name in CLASSES:
        decide.floor.of(given, policy, name, policy.classes[name].min_quality, NOW)
    found = []
    for number in range(requests):
        body = {
            "model": "auto",
            "messages": [{"role": "user", "content": prompt(STATIC[number % 2], first + number)}],
        }
        exchange = Exchange(
            id="bench", endpoint="chat.completions", opened_at=NOW, started=0.0, caller=caller, wishes=wishes,
            request=normalise_chat(json.dumps(body).encode()), snapshot=given, policy=policy, reference=None,
            baseline_name=None, baseline_price=None,
        )  # fmt: skip
        exchange.prices = {name: given.price(name, NOW) for name in policy.allow}
        a = time.perf_counter()
        learn.note_prompt(exchange)
        b = time.perf_counter()
        verdict = classifier.classify(exchange.request.prompt)
        c = time.perf_counter()
        plan = decide.plan(exchange, policy, verdict)
        d = time.perf_counter()
        assert isinstance(plan, Plan)
        found.append(Parts(1000 * (b - a), 1000 * (c - b), 1000 * (d - c)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    classifier = Classifier.load()
    plain = snapshot(options.models, learn=False, confidence=False)
    learning = snapshot(options.models, learn=True, confidence=False)
    asking = snapshot(options.models, learn=True, confidence=True)
    artefact = learned(classifier, learning)
    worlds = {"priors": (plain, None), "learned": (learning, artefact), "floor": (asking, artefact)}
    result: dict[str, dict[str, float]] = {}
    for index, (name, (given, active)) in enumerate(worlds.items()):
        measure(classifier, given, active, 100, 0)
        found = measure(classifier, given, active, options.requests, 1000 + index * options.requests)
        whole = sorted(parts.whole for parts in found)
        result[name] = {
            "features_ms": statistics.median(parts.features for parts in found),
            "verdict_ms": statistics.median(parts.verdict for parts in found),
            "plan_ms": statistics.median(parts.plan for parts in found),
            "whole_p50_ms": statistics.median(whole),
            "whole_p99_ms": whole[int(0.99 * len(whole))],
        }
    if options.json:
        print(json.dumps({"models": options.models, "budget_ms": BUDGET_MS, **result}, indent=1))
        return
    print(f"{options.models} models, {options.requests} prompts each; milliseconds, budget {BUDGET_MS} p50")
    print(f"{'':8} {'features':>8} {'verdict':>8} {'plan':>8} {'whole p50':>9} {'p99':>6}")
    for name, row in result.items():
        print(
            f"{name:8} "
            + " ".join(
                f"{value:{width}.3f}" for value, width in zip(row.values(), (8, 8, 8, 9, 6), strict=True)
            )
        )


if __name__ == "__main__":
    main()
