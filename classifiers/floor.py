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

What it rests on: the rows are requests held out from fitting, drawn at random, each with a probability that is known
and that does not depend on which model answered it (`draw_comparison`), and both models' answers to it were compared.
Nothing else is a row. How far a comparison is to be believed is no matter of how often it was drawn: a verdict counts
as it is, and where there is none, as the worst that may be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.encoder import ArtefactError
from classifiers.head import CLASSES

GRID: NDArray[np.float64] = np.round(np.linspace(1.0, 0.0, 201), 3)
"""The thresholds tested, in this order; fixed before any label is seen."""

MOST_LABELS = 1_000_000

Floats = NDArray[np.floating[Any]]


# ---- which requests are compared ----


def draw_comparison(models: Sequence[str], share: float, draw: float) -> tuple[str, float] | None:
    """The model that a request is compared on, and how likely that one was: `share` of the requests are drawn, each
    of `models` as often. `draw` is uniform in [0, 1). Who answered has no part in it: requests that a certificate
    lets a model answer say nothing about those that the next one may add. None: not drawn.
    """
    if draw >= share or not models:
        return None
    return models[min(int(draw / share * len(models)), len(models) - 1)], share / len(models)


# ---- the exact binomial ----


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


# ---- certificates ----


@dataclass(frozen=True, slots=True)
class Certificate:
    """How far down `model` may answer prompts of a class in place of `reference`.

    `threshold`: the lowest predicted success; None: nothing is shown, and the reference answers. `missing`: the clean
    comparisons (the model answered no worse) wanted for a first threshold; 0 with one. `labels`: the held-out
    comparisons used; `harm` and `gain` among them at or above the threshold; `bound`: on the excess failure rate (1.0
    without a threshold); `share`: part of the compared requests that are routed.
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
    """Held-out requests of one class on which a model was compared with the reference, the oldest first; each array
    of shape (n,). `predicted`: success predicted for the model, NaN where the prior alone spoke (never routed).
    `excess`: how much worse the model's answer was, -1..1. `propensity`: how likely the request was to be compared,
    > 0.
    """

    predicted: Floats
    excess: Floats
    propensity: Floats


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
    row is kept with probability least propensity / its propensity (rejection sampling), so that every request of
    the time counts alike, and a difference of 0.3 between two answers counts as a whole one with probability 0.3.
    """
    draws = np.random.default_rng(seed)
    propensity = np.asarray(rows.propensity, dtype=np.float64)
    first, last, least = _most_rows(propensity)
    kept = draws.random(len(propensity)) * propensity < least
    kept[:first] = kept[last:] = False
    counted = draws.random(len(propensity)) < np.abs(rows.excess)
    predicted = np.nan_to_num(rows.predicted, nan=-1.0)[kept]
    harmed, gained = (counted & (rows.excess > 0))[kept], (counted & (rows.excess < 0))[kept]

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


def _most_rows(propensity: Floats) -> tuple[int, int, float]:
    """(first, last + 1, least propensity) of the stretch of time that keeps most rows when each is kept in proportion
    to 1 / propensity. Where the share of requests that are compared was changed, all of the time would be worth no
    more than its thinnest part. Outcomes have no part in the choice.
    """
    best, found = 0.0, (0, 0, 1.0)
    for least in np.unique(propensity).tolist():
        enough = np.concatenate(([False], propensity >= least, [False]))
        edges = np.flatnonzero(enough[1:] != enough[:-1])
        total = np.concatenate(([0.0], np.cumsum(least / propensity)))
        for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            if total[last] - total[first] >= best:
                best, found = float(total[last] - total[first]), (first, last, least)
    return found


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


# ---- the rows an artefact carries ----


@dataclass(frozen=True, slots=True)
class Comparisons:
    """Requests drawn by `draw_comparison`, the oldest first, each once. `prompt` (n,) indexes the prompts at hand,
    `models` (n, 2) the models compared; `scores` (n, 2): how good their answers were, 0..1; `sure` (n,): whether
    that is known (a verdict, or the same answer twice); `propensity` (n,); `lot` (n,): uniform in [0, 1), by which
    some are held out, the same whenever it is learned.
    """

    prompt: NDArray[np.int64]
    models: NDArray[np.int64]
    scores: NDArray[np.float64]
    sure: NDArray[np.bool_]
    propensity: NDArray[np.float64]
    lot: NDArray[np.float64]

    def rows(self, kept: NDArray[np.bool_]) -> Comparisons:
        return Comparisons(**{field.name: getattr(self, field.name)[kept] for field in fields(self)})


@dataclass(frozen=True, slots=True)
class Calibration:
    """The held-out rows an artefact carries, the oldest first, so that certificates can be computed anew when the
    policy changes.

    `classes` (n,) int8: index into `CLASSES`. By row and model, (n, m) float32: `predicted` success, NaN where the
    prior alone spoke; `labels` 0..1, NaN where the model was not compared. By row, (n,): `propensities` float32, with
    which the request was compared on these models; `sure` bool: whether the labels are known. Where they are not,
    the model asked about is taken to have failed, and the other one not.
    """

    models: tuple[str, ...]
    classes: NDArray[np.int8]
    predicted: NDArray[np.float32]
    labels: NDArray[np.float32]
    propensities: NDArray[np.float32]
    sure: NDArray[np.bool_]

    @classmethod
    def of(cls, models: Sequence[str], arrays: Mapping[str, NDArray[Any]]) -> Calibration:
        """From the arrays of an artefact, named `calibration_...`. Raises ArtefactError where they do not fit."""
        try:
            found = cls(
                tuple(models),
                arrays["calibration_classes"].astype(np.int8),
                arrays["calibration_predicted"].astype(np.float32),
                arrays["calibration_labels"].astype(np.float32),
                arrays["calibration_propensities"].astype(np.float32),
                arrays["calibration_sure"].astype(np.bool_),
            )
        except KeyError as error:
            raise ArtefactError(f"the artefact carries no {error.args[0]}: learn again") from None
        rows, shape = found.classes.shape, (len(found.classes), len(found.models))
        if not all(array.shape == shape for array in (found.predicted, found.labels)) or not all(
            array.shape == rows for array in (found.propensities, found.sure)
        ):
            raise ArtefactError("the artefact's calibration rows do not fit its models: learn again")
        labelled = found.labels[~np.isnan(found.labels)]
        if (
            not np.isin(found.classes, range(len(CLASSES))).all()
            or not ((labelled >= 0) & (labelled <= 1)).all()
            or not ((found.propensities > 0) & (found.propensities <= 1)).all()
        ):
            raise ArtefactError("the artefact's calibration rows hold impossible values: learn again")
        return found

    def arrays(self) -> dict[str, NDArray[Any]]:
        """As `artefact.save` takes them."""
        return {
            "calibration_classes": self.classes,
            "calibration_predicted": self.predicted,
            "calibration_labels": self.labels,
            "calibration_propensities": self.propensities,
            "calibration_sure": self.sure,
        }

    def rows(self, prompt_class: str, model: str, reference: str) -> Rows:
        """The requests of one class on which these two were compared."""
        if model not in self.models or reference not in self.models:
            nothing = np.empty(0)
            return Rows(nothing, nothing, nothing)
        mine, other = self.models.index(model), self.models.index(reference)
        excess = self.labels[:, other] - self.labels[:, mine]
        kept = (self.classes == CLASSES.index(prompt_class)) & ~np.isnan(excess)
        return Rows(
            self.predicted[kept, mine],
            np.where(self.sure[kept], excess[kept], 1.0),
            self.propensities[kept],
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
