"""Streams with exactly known answers: does the certified bound hold, and what does it cost in hits?

A split draws a scope: its candidates' verifier scores and how wrong the verifier is there (its log-odds are
stretched by 0.7 to 1.3 and shifted by a normal of mean -0.3, deviation 0.7). Hence P(right | score) and the true
wrong / served of every threshold are known. Of the scope's candidates some are checked (half of those scoring at
least 0.9, a fifth of the others), in order, with a look after every label. Ten other scopes, 300 labels each, are
the pool.

The oracle knows the true error of every threshold and serves at the loosest that keeps the bound. "Safe hits" are
right answers served; both are counted on the scope's later traffic. A split holds when no threshold certified at
any look has a true error above the bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.pairs import bound

BOUNDS = (0.01, 0.02, 0.05)
CANDIDATES = (1500, 5000, 15000)
HOLDS, OF = 182, 200
# (share of the oracle's hits, after so many candidates): 1 % takes about 5,000 labels, 5 % about 1,700.
SERVED = {0.01: (0.30, 15000), 0.05: (0.60, 5000)}
LOG_ODDS = np.linspace(-14.0, 18.0, 6401)


@dataclass(frozen=True, slots=True)
class Scope:
    """Density of the verifier's log-odds on `LOG_ODDS` (sums to 1) and P(right) there."""

    density: NDArray[np.float64]
    right: NDArray[np.float64]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Scope:
        good = rng.uniform(0.35, 0.65)
        density = good * _normal(rng.normal(4.5, 0.5), 2.0) + (1 - good) * _normal(rng.normal(-1.5, 0.5), 2.0)
        stretched = rng.uniform(0.7, 1.3) * LOG_ODDS + rng.normal(-0.3, 0.7)
        return cls(density / density.sum(), 1 / (1 + np.exp(-stretched)))

    def labels(self, rng: np.random.Generator, candidates: int) -> list[bound.Labelled]:
        places = rng.choice(len(LOG_ODDS), size=candidates, p=self.density)
        scores = 1 / (1 + np.exp(-LOG_ODDS[places]))
        propensities = np.where(scores >= 0.9, 0.5, 0.2)
        checked = rng.random(candidates) < propensities
        right = rng.random(candidates) < self.right[places]
        return [
            bound.Labelled(float(s), bool(r), float(p))
            for s, r, p in zip(scores[checked], right[checked], propensities[checked], strict=True)
        ]

    def at(self, threshold: float) -> tuple[float, float]:
        """Return (wrong / served, right answers served per candidate) at a threshold on the score."""
        above = np.log(threshold / (1 - threshold)) - 1e-9 <= LOG_ODDS
        served = float(self.density[above].sum())
        right = float((self.density * self.right)[above].sum())
        return (1 - right / served if served else 0.0), right

    def oracle(self, max_error: float) -> float:
        """Return the right answers served per candidate at the loosest threshold that keeps the bound."""
        served = np.cumsum(self.density[::-1])[::-1]
        right = np.cumsum((self.density * self.right)[::-1])[::-1]
        fit = (served > 1e-6) & (1 - right / np.maximum(served, 1e-12) <= max_error)
        return float(right[fit].max(initial=0.0))


def _normal(mean: float, deviation: float) -> NDArray[np.float64]:
    result: NDArray[np.float64] = np.exp(-0.5 * ((LOG_ODDS - mean) / deviation) ** 2)
    return result


def least_propensity(threshold: float) -> float:
    return 0.5 if threshold >= 0.9 else 0.2


def unbounded(labels: list[bound.Labelled], max_error: float) -> float | None:
    """Return the loosest threshold whose observed (weighted) error keeps the bound: what a tuned threshold does."""
    best = None
    for threshold in bound.THRESHOLDS:
        above = [x for x in labels if x.score >= threshold]
        weight = sum(1 / x.propensity for x in above)
        if weight and sum(1 / x.propensity for x in above if not x.right) / weight <= max_error:
            best = threshold
    return best


def simulate(splits: int, max_error: float, candidates: int) -> dict[str, Any]:
    """Run `splits` scopes; per way of choosing the threshold, how often the bound held and the hits it served."""
    ways = ("pooled", "alone", "tuned")
    held, none, served = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0), dict.fromkeys(ways, 0.0)
    oracle = 0.0
    labels_used = []
    for split in range(splits):
        rng = np.random.default_rng([split, int(max_error * 1000), candidates])
        pool = [x for _ in range(10) for x in Scope.draw(rng).labels(rng, 900)[:300]]
        scope = Scope.draw(rng)
        own = scope.labels(rng, candidates)
        labels_used.append(len(own))
        oracle += scope.oracle(max_error)
        prior = bound.Prior.of(pool)
        thresholds = {
            "pooled": bound.certify(
                own, max_error=max_error, prior=prior, min_propensity=least_propensity
            ).threshold,
            "alone": bound.certify(own, max_error=max_error, min_propensity=least_propensity).threshold,
            "tuned": unbounded(own, max_error),
        }
        for way, threshold in thresholds.items():
            if threshold is None:
                none[way] += 1
                held[way] += 1
            else:
                error, right = scope.at(threshold)
                held[way] += error <= max_error
                served[way] += right
    return {
        "splits": splits,
        "labels": float(np.median(labels_used)),
        "held": held,
        "none": none,
        "of_oracle": {way: value / max(oracle, 1e-12) for way, value in served.items()},
    }


def report(splits: int) -> tuple[dict[str, Any], list[str]]:
    """Print the table; return it and the targets missed."""
    result: dict[str, Any] = {}
    missed = []
    print(
        f"\nthe certified bound on {splits} streams with known answers (confidence {bound.CONFIDENCE:.0%});"
    )
    print('"hits": share of the right answers that an oracle would serve within the bound')
    print("                             with the pool         without            tuned threshold")
    print("  bound  candidates  labels  held none   hits      held   hits         held   hits")
    for max_error in BOUNDS:
        for candidates in CANDIDATES:
            row = simulate(splits, max_error, candidates)
            held, hits = row["held"], row["of_oracle"]
            result[f"{max_error} {candidates}"] = row
            pooled = f"{held['pooled']:5d} {row['none']['pooled']:4d} {hits['pooled']:6.1%}"
            others = f"{held['alone']:9d} {hits['alone']:6.1%} {held['tuned']:12d} {hits['tuned']:6.1%}"
            print(f"  {max_error:5.0%} {candidates:11d} {row['labels']:7.0f} {pooled} {others}")
            if min(held["pooled"], held["alone"]) < HOLDS * splits / OF:
                missed.append(
                    f"bound {max_error:.0%} held in {held['pooled']} and {held['alone']} of {splits}"
                )
            wanted, after = SERVED.get(max_error, (0.0, 0))
            if candidates == after and hits["pooled"] < wanted:
                missed.append(f"hits at {max_error:.0%}")
    return result, missed
