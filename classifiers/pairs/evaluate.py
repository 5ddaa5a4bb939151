"""How many good pairs are served at how many traps answered wrong: the near-miss protocol.

Pairs are split by pair into five folds, twenty times. For each test fold, verifiers are trained on Farthing's own
near-miss set and three of the other four folds; the fourth, left out in turn, gives the calibration scores from
which thresholds are taken. The test fold is scored by the mean of those verifiers. Results are pooled over all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
Flags = NDArray[np.bool_]

FOLDS, REPEATS = 5, 20
# What a pair of the evaluated kind counts against one of the own set while training.
WEIGHT = 4.0


@dataclass(frozen=True, slots=True)
class Rates:
    """Shares of good pairs served and of traps answered wrong, 0 to 1."""

    served: float
    wrong: float


def at_threshold(scores: Scores, same: Flags, threshold: float) -> Rates:
    """Serve what scores at least `threshold`."""
    passed = scores >= threshold
    return Rates(float(passed[same].mean()), float(passed[~same].mean()))


def curve(scores: Scores, same: Flags, wrongs: Sequence[float]) -> list[Rates]:
    """Return the largest share served at each allowed share of traps (thresholds looked up on the same pairs)."""
    traps = np.sort(scores[~same])[::-1]
    result = []
    for wrong in wrongs:
        allowed = math.floor(wrong * len(traps) + 1e-9)
        passed = scores > traps[allowed] if allowed < len(traps) else np.ones(len(scores), dtype=bool)
        result.append(Rates(float(passed[same].mean()), float(passed[~same].mean())))
    return result


def auc(scores: Scores, same: Flags) -> float:
    """Return the area under the ROC curve (ties count half)."""
    order = np.concatenate([scores[same], scores[~same]])
    ranks = np.empty(len(order))
    _, inverse, counts = np.unique(order, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = ((ends - counts + 1 + ends) / 2)[inverse]
    good, bad = int(same.sum()), int((~same).sum())
    return float((ranks[:good].sum() - good * (good + 1) / 2) / (good * bad))


def calibrated_threshold(traps: Scores, wrong: float) -> float:
    """Return the threshold above which a new trap falls with probability at most `wrong`.

    Split-conformal (Vovk et al. 2005): of n calibration traps at most floor(wrong (n + 1)) - 1 may lie at or above
    it; infinite where even none is too many.
    """
    allowed = math.floor(wrong * (len(traps) + 1) + 1e-9) - 1
    if allowed < 0:
        return math.inf
    return float(np.nextafter(np.sort(traps)[::-1][allowed], math.inf)) if allowed < len(traps) else -math.inf


Fit = Callable[[NDArray[np.intp]], Callable[[NDArray[np.intp]], Scores]]


@dataclass(frozen=True, slots=True)
class Pooled:
    """The protocol's outcome: `rates[wrong]` for each allowed share, pooled over all test folds, and the mean AUC."""

    rates: dict[float, Rates]
    served_deviation: dict[float, float]
    auc: float


def folds(same: Flags, seed: int, count: int = FOLDS) -> NDArray[np.intp]:
    """Return each pair's fold; both labels are spread evenly."""
    rng = np.random.default_rng(seed)
    result = np.empty(len(same), dtype=np.intp)
    for label in (True, False):
        rows = rng.permutation(np.flatnonzero(same == label))
        result[rows] = np.arange(len(rows)) % count
    return result


def protocol(same: Flags, fit: Fit, wrongs: Sequence[float], *, repeats: int = REPEATS) -> Pooled:
    """Run the protocol. `fit(rows)` trains with those of the evaluated pairs and returns a function scoring rows."""
    good = {wrong: np.zeros(repeats) for wrong in wrongs}
    bad = dict.fromkeys(wrongs, 0)
    areas = []
    for repeat in range(repeats):
        fold = folds(same, repeat)
        # A verifier that left out two folds serves both: each is the other's calibration.
        left_out: dict[tuple[int, int], Scores] = {}
        for pair in combinations(range(FOLDS), 2):
            score = fit(np.flatnonzero(~np.isin(fold, pair)))
            for test, calibration in (pair, pair[::-1]):
                left_out[test, calibration] = score(np.flatnonzero(fold == calibration))
        pooled = np.empty(len(same))
        for test in range(FOLDS):
            others = [other for other in range(FOLDS) if other != test]
            traps = np.concatenate([left_out[test, other][~same[fold == other]] for other in others])
            rows = np.flatnonzero(fold == test)
            scores = np.mean([left_out[other, test] for other in others], axis=0)
            pooled[rows] = scores
            for wrong in wrongs:
                passed = scores >= calibrated_threshold(traps, wrong)
                good[wrong][repeat] += int((passed & same[rows]).sum())
                bad[wrong] += int((passed & ~same[rows]).sum())
        areas.append(auc(pooled, same))
    goods, traps_count = int(same.sum()), int((~same).sum()) * repeats
    return Pooled(
        {w: Rates(float(good[w].sum()) / (goods * repeats), bad[w] / traps_count) for w in wrongs},
        {w: float((good[w] / goods).std()) for w in wrongs},
        float(np.mean(areas)),
    )
