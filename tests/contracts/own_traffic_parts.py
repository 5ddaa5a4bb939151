"""Traffic to learn from: two kinds of prompts, a small model that is good at one of them, a large one at both."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np

from classifiers import own_traffic, prompt_features
from classifiers.encoder import DATA_DIRECTORY, StaticEncoder
from classifiers.floor import Comparisons
from classifiers.own_traffic import Examples
from classifiers.success import SuccessHeads
from classifiers.success_features import PromptFeatures

MODELS = ("large", "small")
PRIORS = {name: dict.fromkeys(("simple", "medium", "complex"), 0.8) for name in MODELS}
SUCCESS = {("large", "sum"): 0.92, ("large", "greet"): 0.92, ("small", "sum"): 0.15, ("small", "greet"): 0.9}
COSTS = (0.010, 0.001)
_GREETED = ("Anna", "Bo", "Carla", "Deniz", "Emil", "Fatou", "Gabor", "Hana")
_PLACES = ("the office", "a wedding", "the airport", "our shop", "school", "the clinic")


def prompt_text(kind: str, number: int) -> str:
    if kind == "sum":
        return f"Compute the integral of {number + 2} x^{number % 7} + {number % 11} over [0, {number % 13 + 1}]."
    name, place = _GREETED[number % 8], _PLACES[number // 8 % 6]
    return f"Write a friendly greeting for {name} who comes to {place} for the {number}th time."


@functools.cache
def encoder() -> StaticEncoder:
    return StaticEncoder.load(DATA_DIRECTORY)


@functools.cache
def read(kind: str, number: int) -> PromptFeatures:
    return prompt_features.read(prompt_text(kind, number), encoder())


def examples(
    count: int, *, seed: int = 1, keys: int = 5, both: bool = True, first: int = 0, flip: bool = False
) -> Examples:
    """`count` prompts, labelled for both models or one drawn at random, by keys that take turns."""
    rng = np.random.default_rng(seed)
    kinds = ["sum" if number % 2 else "greet" for number in range(count)]
    prompt, model, score = [], [], []
    for number, kind in enumerate(kinds):
        for index in (0, 1) if both else (int(rng.integers(2)),):
            good = rng.random() < SUCCESS[MODELS[index], kind]
            prompt.append(number)
            model.append(index)
            score.append(float(good != flip))
    rows = len(prompt)
    return Examples(
        models=MODELS,
        prompts=[read(kind, first + number) for number, kind in enumerate(kinds)],
        classes=["medium"] * count,
        costs=np.tile(np.array(COSTS), (count, 1)),
        prompt=np.array(prompt),
        model=np.array(model),
        score=np.array(score),
        weight=np.ones(rows),
        at=np.full(rows, 1.0),
        strong=np.ones(rows, dtype=bool),
        key=np.array([f"key_{row % keys}" for row in range(rows)]),
    )


def joined(left: Examples, right: Examples) -> Examples:
    columns: dict[str, Any] = {
        name: np.concatenate((getattr(left, name), getattr(right, name)))
        for name in ("model", "score", "weight", "at", "strong", "key", "costs")
    }
    return replace(
        left,
        **columns,
        prompts=[*left.prompts, *right.prompts],
        classes=[*left.classes, *right.classes],
        prompt=np.concatenate((left.prompt, right.prompt + len(left.prompts))),
    )


def compared(rows: Examples) -> Comparisons:
    """Every prompt with both models' labels, as a draw for the quality floor finds them."""
    table = np.full((len(rows.prompts), len(MODELS)), np.nan)
    table[rows.prompt, rows.model] = rows.score
    prompts = np.flatnonzero(~np.isnan(table).any(axis=1))
    n = len(prompts)
    both = np.tile(np.arange(len(MODELS)), (n, 1))
    return Comparisons(prompts, both, table[prompts], np.ones(n, dtype=bool), np.full(n, 0.02), np.zeros(n))


def fitted(rows: Examples, *, trees: int = 20, seed: int = 0) -> SuccessHeads:
    """Heads with the held-out rows an artefact carries."""
    inside, held = own_traffic.split(rows, seed)
    heads = own_traffic.fit(inside, PRIORS, encoder().id, seed, trees)
    found = own_traffic.calibration(heads, held.prompts, held.classes, compared(held))
    heads.arrays.update(found.arrays())
    return heads


@functools.cache
def good_heads() -> SuccessHeads:
    return fitted(examples(240))


@functools.cache
def other_heads() -> SuccessHeads:
    return fitted(examples(160, seed=7), seed=3)


def predicted(heads: SuccessHeads, kind: str, number: int = 5000) -> dict[str, float]:
    found = heads.predict(read(kind, number), "medium", dict.fromkeys(MODELS, 0.8))
    return {name: estimate.probability for name, estimate in found.items()}
