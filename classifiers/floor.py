"""The quality floor: how far down predicted success may go before failures are shown to stay within a bound.

For one class of prompts, a cheaper model and the reference it stands in for, a *certificate* gives the lowest
threshold on the model's predicted success such that, with confidence 1 - delta over the draw of the labels, "the
model where its prediction reaches the threshold, else the reference" fails at most `max_excess` more often than
always using the reference. With *harm* (routed, the model fails, the reference would not have) and *gain* (the other
way round):

    excess failure rate = P(harm) - P(gain) <= max_excess

Method: P(harm) is bounded from above and P(gain) from below, each by the exact binomial (Clopper-Pearson) at level
delta / 2. Thresholds on a fixed grid are tested from the highest down, each at level delta, and testing stops at the
first that fails: fixed-sequence testing, which needs no correction for the number of thresholds. Sources: Clopper and
Pearson, Biometrika 26 (1934); Angelopoulos, Bates, Candes, Jordan and Lei, "Learn then Test" (2021).

What it rests on: the labels are held out from fitting, independent of each other, and drawn as the traffic is that
will be routed. Weights correct for labels that were drawn unevenly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.encoder import ArtefactError
from classifiers.head import CLASSES

GRID: NDArray[np.float64] = np.round(np.linspace(1.0, 0.0, 201), 3)
"""The thresholds tested, in this order; fixed before any label is seen."""

MOST_LABELS = 1_000_000

Floats = NDArray[np.floating[Any]]


def _log_cumulative(failures: int, rows: int, rate: float) -> float:
    """log P(X <= failures) for X binomial with `rows` and `rate` (0 < rate < 1)."""
    if failures >= rows:
        return 0.0
    terms = _log_terms(rows, rate, failures)
    top = terms.max()
    return float(top + math.log(np.exp(terms - top).sum()))


def _log_terms(rows: int, rate: float, last: int) -> Floats:
    """log P(X = k) for k = 0 ... last."""
    k = np.arange(1, last + 1)
    steps = np.log((rows - k + 1) / k) + math.log(rate / (1.0 - rate))
    return np.concatenate(([0.0], np.cumsum(steps))) + rows * math.log1p(-rate)


def upper_bound(successes: int, rows: int, delta: float) -> float:
    """The one-sided Clopper-Pearson upper bound: the rate at which so few of `rows` have probability `delta`."""
    return 1.0 if successes >= rows else _rate(successes, rows, delta)


def lower_bound(successes: int, rows: int, delta: float) -> float:
    """The one-sided Clopper-Pearson lower bound: the rate at which so many of `rows` have probability `delta`."""
    return 0.0 if successes <= 0 else _rate(successes - 1, rows, 1.0 - delta)


def _rate(successes: int, rows: int, probability: float) -> float:
    """The rate at which P(X <= successes) is `probability`: by Illinois, a secant that keeps its bracket."""
    wanted = math.log(probability)
    low, high = 0.0, 1.0
    above, below = -wanted, min(-wanted, 0.0) - 50.0
    side = 0
    for _ in range(200):
        share = min(max(above / (above - below), 0.01), 0.99)
        middle = low + (high - low) * share
        value = _log_cumulative(successes, rows, middle) - wanted
        if abs(value) < 1e-9 or high - low < 1e-12:
            return middle
        if value > 0.0:
            low, above = middle, value
            below = below / 2 if side > 0 else below
            side = 1
        else:
            high, below = middle, value
            above = above / 2 if side < 0 else above
            side = -1
    return middle


def labels_needed(failures: int, max_excess: float, delta: float) -> int:
    """The least number of labels, `failures` of them harm and none gain, that pass; at most `MOST_LABELS`."""
    if not 0.0 < max_excess < 1.0:
        return MOST_LABELS if max_excess <= 0.0 else 0

    def passes(rows: int) -> bool:
        return _log_cumulative(failures, rows, max_excess) <= math.log(delta / 2)

    low, high = failures, max(64, 2 * failures)
    while high < MOST_LABELS and not passes(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return min(high, MOST_LABELS)


@dataclass(frozen=True, slots=True)
class Certificate:
    """How far down `model` may answer prompts of a class in place of `reference`.

    `threshold`: the lowest predicted success; None: nothing is shown, and the reference answers. `missing`: the clean
    labels (the model answered well) wanted for a first threshold; 0 with one. `labels`: the held-out labels used;
    `harm` and `gain` among them at or above the threshold; `bound`: on the excess failure rate (1.0 without a
    threshold); `share`: part of the labelled requests that are routed.
    """

    model: str
    reference: str
    prompt_class: str
    max_excess: float
    delta: float
    threshold: float | None
    missing: int
    labels: int
    harm: int
    gain: int
    bound: float
    share: float


@dataclass(frozen=True, slots=True)
class Rows:
    """Held-out rows of one class and model, each of shape (n,). `predicted`: success predicted for the model, NaN
    where the prior alone spoke (never routed). `label`: how good its answer was, 0..1. `reference`: the same of the
    reference's answer, NaN where unknown (then taken as good). `weight`: how many requests a row stands for, > 0.
    """

    predicted: Floats
    label: Floats
    reference: Floats
    weight: Floats


def certify(
    rows: Rows,
    max_excess: float,
    delta: float,
    *,
    model: str = "",
    reference: str = "",
    prompt_class: str = "",
    seed: int = 0,
) -> Certificate:
    """The certificate for `max_excess` (1 - min_quality) at level `delta` (1 - confidence), both in (0, 1).

    Two draws, repeatable by `seed`, bring the rows into the exact binomial's form without moving what it bounds: a
    row is kept with probability weight / largest weight (rejection sampling), and a difference of 0.3 between two
    answers counts as a whole one with probability 0.3.
    """
    draws = np.random.default_rng(seed)
    weight = np.asarray(rows.weight, dtype=np.float64)
    kept = draws.random(len(weight)) * weight.max(initial=0.0) < weight
    excess = np.nan_to_num(rows.reference, nan=1.0) - rows.label
    counted = draws.random(len(weight)) < np.abs(excess)
    predicted = np.nan_to_num(rows.predicted, nan=-1.0)[kept]
    harmed, gained = (counted & (excess > 0))[kept], (counted & (excess < 0))[kept]

    labels = len(predicted)
    order = np.argsort(-predicted, kind="stable")
    routed = np.searchsorted(-predicted[order], -GRID, side="right")
    harm = np.concatenate(([0], np.cumsum(harmed[order])))[routed].tolist()
    gain = np.concatenate(([0], np.cumsum(gained[order])))[routed].tolist()
    passed = _passed(harm, gain, labels, max_excess, delta)
    threshold = None
    at = passed - 1
    bound, missing = 1.0, 0
    if passed and routed[at]:
        threshold = float(GRID[at])
        bound = upper_bound(harm[at], labels, delta / 2) - lower_bound(gain[at], labels, delta / 2)
    else:
        at = int(np.argmax(routed > 0))  # the first threshold at which anything is routed
        missing = max(labels_needed(harm[at], max_excess, delta) - labels, 1)
    return Certificate(
        model=model,
        reference=reference,
        prompt_class=prompt_class,
        max_excess=max_excess,
        delta=delta,
        threshold=threshold,
        missing=missing,
        labels=labels,
        harm=harm[at],
        gain=gain[at],
        bound=bound,
        share=float(routed[at] / labels) if threshold is not None else 0.0,
    )


def _passed(harm: Sequence[int], gain: Sequence[int], rows: int, max_excess: float, delta: float) -> int:
    """How many thresholds of the grid, from the highest, pass one after the other."""
    sure_gain, at_gain = 0.0, 0
    allowed = _most_allowed(rows, max_excess, delta / 2)
    for at, (harmed, gained) in enumerate(zip(harm, gain, strict=True)):
        if harmed <= allowed:
            continue
        # What is sure only grows with the gain seen: the bound of an earlier threshold serves as long as it suffices.
        if gained > at_gain:
            sure_gain, at_gain = lower_bound(gained, rows, delta / 2), gained
            allowed = _most_allowed(rows, max_excess + sure_gain, delta / 2)
        if harmed > allowed:
            return at
    return len(harm)


def _most_allowed(rows: int, rate: float, delta: float) -> int:
    """The most of `rows` whose upper bound is at most `rate`; -1 where not even none are."""
    if rate >= 1.0:
        return rows
    if rate <= 0.0:
        return -1
    terms = _log_terms(rows, rate, math.ceil(rows * rate))
    return int(np.searchsorted(np.logaddexp.accumulate(terms), math.log(delta), side="right")) - 1


@dataclass(frozen=True, slots=True)
class Calibration:
    """The held-out rows an artefact carries, so that certificates can be computed anew when the policy changes.

    `classes` (n,) int8: index into `CLASSES`. By row and model, (n, m) float32: `predicted` success, NaN where the
    prior alone spoke; `labels` 0..1, NaN where the model was not labelled; `weights` of each label.
    """

    models: tuple[str, ...]
    classes: NDArray[np.int8]
    predicted: NDArray[np.float32]
    labels: NDArray[np.float32]
    weights: NDArray[np.float32]

    @classmethod
    def of(cls, models: Sequence[str], arrays: Mapping[str, NDArray[Any]]) -> Calibration:
        """From the arrays of an artefact, named `calibration_...`. Raises ArtefactError where they do not fit."""
        try:
            found = cls(
                tuple(models),
                arrays["calibration_classes"].astype(np.int8),
                arrays["calibration_predicted"].astype(np.float32),
                arrays["calibration_labels"].astype(np.float32),
                arrays["calibration_weights"].astype(np.float32),
            )
        except KeyError as error:
            raise ArtefactError(f"the artefact carries no {error.args[0]}: learn again") from None
        shape = (len(found.classes), len(found.models))
        if not all(array.shape == shape for array in (found.predicted, found.labels, found.weights)):
            raise ArtefactError("the artefact's calibration rows do not fit its models: learn again")
        labelled = found.labels[~np.isnan(found.labels)]
        weights = found.weights[~np.isnan(found.labels)]
        if (
            not np.isin(found.classes, range(len(CLASSES))).all()
            or not ((labelled >= 0) & (labelled <= 1)).all()
            or not (np.isfinite(weights) & (weights > 0)).all()
        ):
            raise ArtefactError("the artefact's calibration rows hold impossible values: learn again")
        return found

    def arrays(self) -> dict[str, NDArray[Any]]:
        """As `artefact.save` takes them."""
        return {
            "calibration_classes": self.classes,
            "calibration_predicted": self.predicted,
            "calibration_labels": self.labels,
            "calibration_weights": self.weights,
        }

    def rows(self, prompt_class: str, model: str, reference: str) -> Rows:
        """The labelled rows of one class and model; none where the artefact does not know the model."""
        if model not in self.models:
            nothing = np.empty(0)
            return Rows(nothing, nothing, nothing, nothing)
        column = self.models.index(model)
        mine = (self.classes == CLASSES.index(prompt_class)) & ~np.isnan(self.labels[:, column])
        other = (
            self.labels[mine, self.models.index(reference)]
            if reference in self.models
            else np.full(int(mine.sum()), np.nan)
        )
        return Rows(
            self.predicted[mine, column], self.labels[mine, column], other, self.weights[mine, column]
        )

    def certificates(
        self, prompt_class: str, candidates: Sequence[str], reference: str, max_excess: float, delta: float
    ) -> dict[str, Certificate]:
        """One certificate a candidate; all hold together with confidence 1 - delta, which is divided among them."""
        return {
            model: certify(
                self.rows(prompt_class, model, reference),
                max_excess,
                delta / len(candidates),
                model=model,
                reference=reference,
                prompt_class=prompt_class,
            )
            for model in candidates
        }
