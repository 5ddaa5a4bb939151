"""How long one decision takes, part by part, with 20 candidate models.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.decision [--models 20] [--requests 2000] [--repeat 1] [--json]

*priors*: a policy without `learn`. *learned*: success heads fitted on made-up labels of all models. *floor*: the
class asks for confidence as well (computed once a policy, before the clock runs). Every prompt is new, so nothing is
remembered; the whole is what a request waits for: its features, its verdict and the plan made from it. *minilm*:
learned heads, and prompts of 21 word pieces that the static encoder is unsure of: the verdict holds the question
whether another class would change the plan, and the transformer's answer. `--repeat`: the best median of so many
rounds, for a machine with other work; the load average is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice

import numpy as np

from benchmarks.prompts import STATIC, close_prompts, prompt
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

BUDGET_MS, MINILM_BUDGET_MS = 0.5, 7.0
MINILM_REQUESTS = 100
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
        np.ones(LABELLED, np.float32),
        np.ones(LABELLED, np.bool_),
    )
    return Learned(LearnedHeads("made-up", heads), rows)


def measure(
    classifier: Classifier,
    given: CompiledSnapshot,
    artefact: Learned | None,
    prompts: Sequence[str],
    *,
    transformer: bool = False,
) -> list[Parts]:
    clock, health = SystemClock(), Health()
    decide, learn = Decide(health, clock, lambda: artefact), Learn(classifier.static, clock)
    caller, wishes = Caller("key", "team"), read_wishes({})
    policy = given.resolve("team", None, {}, NOW)
    for name in CLASSES:
        decide.floor.of(given, policy, name, policy.classes[name].min_quality, NOW)
    found = []
    for text in prompts:
        body = {"model": "auto", "messages": [{"role": "user", "content": text}]}
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
        if transformer:
            decide.could_change(exchange, verdict)
            verdict = classifier.refine(exchange.request.prompt, verdict)
        c = time.perf_counter()
        plan = decide.plan(exchange, policy, verdict)
        d = time.perf_counter()
        assert isinstance(plan, Plan)
        found.append(Parts(1000 * (b - a), 1000 * (c - b), 1000 * (d - c)))
    return found


def summary(found: Sequence[Parts]) -> dict[str, float]:
    whole = sorted(parts.whole for parts in found)
    return {
        "features_ms": statistics.median(parts.features for parts in found),
        "verdict_ms": statistics.median(parts.verdict for parts in found),
        "plan_ms": statistics.median(parts.plan for parts in found),
        "whole_p50_ms": statistics.median(whole),
        "whole_p99_ms": whole[int(0.99 * len(whole))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    classifier = Classifier.load()
    plain = snapshot(options.models, learn=False, confidence=False)
    learning = snapshot(options.models, learn=True, confidence=False)
    asking = snapshot(options.models, learn=True, confidence=True)
    artefact = learned(classifier, learning)
    worlds = {"priors": (plain, None), "learned": (learning, artefact), "floor": (asking, artefact)}
    worlds["minilm"] = (learning, artefact)
    close = close_prompts(MINILM_REQUESTS * (options.repeat + 1))
    numbers = iter(range(1000, 10**6))
    result: dict[str, dict[str, float]] = {}
    for name, (given, active) in worlds.items():
        for _ in range(options.repeat + 1):  # the first round warms up
            if hard := name == "minilm":
                prompts = [close.pop() for _ in range(MINILM_REQUESTS)]
            else:
                prompts = [prompt(STATIC[at % 2], at) for at in islice(numbers, options.requests)]
            row = summary(measure(classifier, given, active, prompts, transformer=hard))
            if name not in result or row["whole_p50_ms"] < result[name]["whole_p50_ms"]:
                result[name] = row
    load = os.getloadavg()[0]
    budgets = {"static": BUDGET_MS, "minilm": MINILM_BUDGET_MS}
    if options.json:
        facts = {"models": options.models, "load_average": load, "budget_ms": budgets}
        print(json.dumps({**facts, **result}, indent=1))
        return
    print(
        f"{options.models} models, {options.requests} prompts a round; milliseconds, budget p50 {BUDGET_MS}, with "
        f"MiniLM {MINILM_BUDGET_MS}; load average {load:.1f} on {os.cpu_count()} cores"
    )
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
