"""Figures of merit of a router: APGR and CPT (RouteLLM, Ong et al. 2024), AIQ (RouterBench, Hu et al. 2024), ECE."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


def call_curve(score: Doubles, strong: Doubles, weak: Doubles) -> tuple[Doubles, Doubles]:
    """Return share of strong calls and mean score at 11 thresholds, ascending in share.

    Thresholds are the decile edges of `score`; strong if score >= threshold, > for the last one.
    """
    edges = np.quantile(score, np.linspace(0.0, 1.0, 11))
    chosen = [score >= edge for edge in edges[:-1]] + [score > edges[-1]]
    share = np.array([mask.mean() for mask in chosen][::-1])
    value = np.array([np.where(mask, strong, weak).mean() for mask in chosen][::-1])
    return share, value


def apgr(score: Doubles, strong: Doubles, weak: Doubles) -> float:
    """Return (AUC - AUC_weak) / (AUC_strong - AUC_weak) of the call curve, trapezoids over shares 0..1."""
    share, value = call_curve(score, strong, weak)
    area = float(np.trapezoid(value, share))
    return (area - float(weak.mean())) / (float(strong.mean()) - float(weak.mean()))


def cpt(score: Doubles, strong: Doubles, weak: Doubles, recovered: float) -> float:
    """Return the share of strong calls at which the curve first reaches weak + recovered (strong - weak)."""
    share, value = call_curve(score, strong, weak)
    goal = weak.mean() + recovered * (strong.mean() - weak.mean())
    reached = int(np.argmax(value >= goal)) if bool((value >= goal).any()) else len(value) - 1
    if reached == 0 or value[reached] <= value[reached - 1]:
        return float(share[reached])
    part = (goal - value[reached - 1]) / (value[reached] - value[reached - 1])
    return float(share[reached - 1] + min(part, 1.0) * (share[reached] - share[reached - 1]))


def auroc(score: Doubles, positive: NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve by ranks, ties halved; NaN without both kinds."""
    kinds, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    del kinds
    rank = (np.cumsum(counts) - (counts - 1) / 2.0)[inverse]
    n1 = int(positive.sum())
    n0 = len(positive) - n1
    if n0 == 0 or n1 == 0:
        return float("nan")
    return float((rank[positive].sum() - n1 * (n1 + 1) / 2.0) / (n1 * n0))


def ece(probability: Doubles, outcome: Doubles, bins: int = 10) -> float:
    """Return the expected calibration error over equal-width bins (Naeini et al. 2015)."""
    index = np.minimum((probability * bins).astype(np.int64), bins - 1)
    total = 0.0
    for number in range(bins):
        here = index == number
        if here.any():
            total += abs(float(probability[here].mean() - outcome[here].mean())) * float(here.mean())
    return total


def hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the non-decreasing upper hull of (cost, score) points, from the cheapest on."""
    kept: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if kept and value <= kept[-1][1]:
            continue
        while len(kept) >= 2 and (kept[-1][1] - kept[-2][1]) * (cost - kept[-2][0]) <= (
            value - kept[-2][1]
        ) * (kept[-1][0] - kept[-2][0]):
            kept.pop()
        kept.append((cost, value))
    return kept


def sweep(predicted: Doubles, score: Doubles, cost: Doubles) -> list[tuple[float, float]]:
    """Return (mean cost, mean score) while the willingness to pay per unit of score is swept; (rows, models) each."""
    rows, points = np.arange(len(score)), []
    for willing in (*np.concatenate(([0.0], np.geomspace(1e-7, 1e-1, 121))).tolist(), float("inf")):
        utility = predicted - 1e-12 * cost if willing == float("inf") else predicted * willing - cost
        chosen = utility.argmax(axis=1)
        points.append((float(cost[rows, chosen].mean()), float(score[rows, chosen].mean())))
    return points


def aiq(points: list[tuple[float, float]], dearest: float) -> float:
    """Return the area under the hull from its cheapest point to `dearest` (flat beyond its end), over `dearest`."""
    kept = [point for point in hull(points) if point[0] <= dearest]
    if not kept:
        return 0.0
    xs = [point[0] for point in kept] + [dearest]
    ys = [point[1] for point in kept] + [kept[-1][1]]
    return float(np.trapezoid(ys, xs)) / dearest
