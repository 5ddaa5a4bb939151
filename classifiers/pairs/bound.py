"""How sure one can be that cached answers are right: exact and anytime-valid bounds on wrong / served.

Pure functions over labelled candidates. Three uses:

- `threshold_for` (mode `enforce`): a fixed set of labels, looked at once. Thresholds are tested from the
  strictest to the loosest with the exact binomial bound of Clopper and Pearson (1934); the first failure ends it
  (fixed-sequence testing, as in Angelopoulos et al. 2021, "Learn then Test").
- `certify` (mode `certified`): labels that come one by one and are looked at after each. Every threshold carries a
  betting capital (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting"; for
  plain labels it is Robbins' 1970 mixture of likelihood ratios). Were the error above the bound, the capital would
  reach 1 / delta at any time with probability at most delta (Ville's inequality), so a capital that does certifies.
- `interval`, `shrunk_rate`: for reports.

Labels that were sampled with a known probability (shadow re-asks) are weighted by its inverse. What other scopes
have shown (`Prior`) decides where the search starts and how the bets are placed: a good prior certifies sooner, a
wrong one later, and neither can make the bound untrue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
# Scores at which a candidate may be served, strictest first. Fixed, so that choosing among them costs no confidence.
THRESHOLDS = (0.998, 0.996, 0.993, 0.99, 0.985, 0.98, 0.97, 0.96, 0.94, 0.92, 0.89, 0.85, 0.8, 0.7, 0.6, 0.5)
FINE = tuple(round(0.995 - 0.005 * i, 3) for i in range(100))
# The first threshold looked at must hold this many times the labels that would do if all were right.
SLACK = 1.6
# Error rates bet on, as shares of the bound.
SHARES = (0.0, 0.02, 0.05, 0.1, 0.18, 0.28, 0.4, 0.55, 0.72)
# Share of the allowed doubt that goes to the search started where the pool expects the bound to hold.
POOL_DOUBT = 0.8


@dataclass(frozen=True, slots=True)
class Labelled:
    """One candidate whose answer was checked.

    `score`: the verifier's probability, 0 to 1. `right`: the stored answer was right. `propensity`: the probability
    with which this candidate was picked for checking, above 0 and at most 1, fixed before the answer was seen.
    """

    score: float
    right: bool
    propensity: float = 1.0


@dataclass(frozen=True, slots=True)
class Chosen:
    """A threshold with what was seen at or above it, and the upper bound on wrong / served."""

    threshold: float
    served: int
    wrong: int
    upper: float


@dataclass(frozen=True, slots=True)
class Prior:
    """What the pool of all scopes expects at a threshold: `rates`, wrong / served, and `shares` of candidates served.

    Taken once, when a scope's evidence begins, and kept with it: changed afterwards it would see the labels it
    is to bet on, and the bound would no longer hold.
    """

    rates: dict[float, float]
    shares: dict[float, float]

    @classmethod
    def of(cls, pool: Sequence[Labelled], *, thresholds: Sequence[float] = THRESHOLDS) -> Prior:
        """Pool labels of many scopes, weighted by the inverse of their propensities (Beta(1/2, 1/2) smoothing)."""
        rates, shares = {}, {}
        total = sum(1.0 / x.propensity for x in pool)
        for threshold in thresholds:
            above = [x for x in pool if x.score >= threshold]
            weight = sum(1.0 / x.propensity for x in above)
            wrong = sum(1.0 / x.propensity for x in above if not x.right)
            scale = len(above) / weight if weight else 0.0
            rates[threshold] = (wrong * scale + 0.5) / (len(above) + 1.0)
            shares[threshold] = weight / total if total else 0.0
        return cls(rates, shares)


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a scope's own evidence allows.

    `threshold`: serve at or above it; None: nothing is certified, measure only. `labels`: labels at or above the
    threshold that is nearest to certification, `wrong` of them wrong. `missing`: about how many more are needed for
    the next threshold if they come in as the pool and the scope's own labels make expect; None when hopeless (the
    error there seems to be above the bound) or when all thresholds are certified.
    """

    threshold: float | None
    labels: int
    wrong: int
    missing: int | None


def binomial_tail(wrong: int, labels: int, rate: float) -> float:
    """Return P(at most `wrong` of `labels`) at an error rate (exact, summed in logarithms)."""
    if rate <= 0.0:
        return 1.0
    if rate >= 1.0:
        return float(wrong >= labels)
    log_p, log_q = math.log(rate), math.log1p(-rate)
    terms = [
        math.lgamma(labels + 1)
        - math.lgamma(k + 1)
        - math.lgamma(labels - k + 1)
        + k * log_p
        + (labels - k) * log_q
        for k in range(wrong + 1)
    ]
    largest = max(terms)
    return min(1.0, math.exp(largest) * math.fsum(math.exp(t - largest) for t in terms))


def clopper_pearson_upper(wrong: int, labels: int, *, confidence: float = CONFIDENCE) -> float:
    """Return the one-sided exact upper bound on the error rate (Clopper and Pearson 1934); 1.0 without labels."""
    if not 0 <= wrong <= labels:
        raise ValueError(f"wrong must be between 0 and labels, not {wrong} of {labels}")
    if wrong == labels:
        return 1.0
    low, high = wrong / labels, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if binomial_tail(wrong, labels, middle) > 1.0 - confidence else (low, middle)
        )
    return high


def threshold_for(
    labels: Sequence[Labelled],
    *,
    max_error: float,
    trap_share: float | None = None,
    confidence: float = CONFIDENCE,
    thresholds: Sequence[float] = FINE,
) -> Chosen | None:
    """Return the loosest threshold whose error is shown to be at most `max_error`, or None.

    For one look at labels that were all checked (propensity 1; raises ValueError otherwise). The labels count as
    they come; with `trap_share` they count as though that share of all candidates had a wrong answer stored, the
    bound then being on the share of those that is served.
    """
    _checked(max_error, confidence)
    if any(x.propensity != 1.0 for x in labels):
        raise ValueError("threshold_for takes labels with propensity 1; sampled labels go to certify")
    rights = sum(x.right for x in labels)
    traps = len(labels) - rights
    needed = SLACK * math.log(1.0 - confidence) / math.log1p(-max_error)
    best: Chosen | None = None
    for threshold in sorted(thresholds, reverse=True):
        above = [x.right for x in labels if x.score >= threshold]
        if best is None and len(above) < needed:
            # The start is set by how many labels there are, not by what they say: no look is spent here.
            continue
        right = sum(above)
        wrong = len(above) - right
        if trap_share is None or not rights or not traps:
            upper = clopper_pearson_upper(wrong, len(above), confidence=confidence)
        else:
            served_traps = trap_share * clopper_pearson_upper(wrong, traps, confidence=confidence)
            served_rights = (1.0 - trap_share) * right / rights
            upper = served_traps / (served_traps + served_rights)
        if upper > max_error:
            break
        best = Chosen(threshold, len(above), wrong, upper)
    return best


def certify(
    own: Sequence[Labelled],
    *,
    max_error: float,
    prior: Prior | None = None,
    confidence: float = CONFIDENCE,
    thresholds: Sequence[float] = THRESHOLDS,
    min_propensity: Callable[[float], float] | float = 1.0,
) -> Certificate:
    """Say what a scope's own labels, in the order they came, certify at this moment.

    May be called after every label: with probability `confidence`, no threshold it ever returns has an error
    above `max_error`. `min_propensity`: the least propensity that the policy can assign to a candidate at or above
    a given score (or to any), fixed beforehand; a label below it raises ValueError. Two searches share the allowed
    doubt: one starts where the pool expects the bound to hold, one at a strict threshold; each goes on to looser
    ones while they certify.
    """
    _checked(max_error, confidence)
    ordered = sorted(thresholds, reverse=True)
    starts = _starts(ordered, prior, max_error)
    shares = (POOL_DOUBT, 1.0 - POOL_DOUBT) if len(starts) == 2 else (1.0,)
    goals = [-math.log((1.0 - confidence) * share) for share in shares]
    scores = np.asarray([x.score for x in own])
    wrong = np.asarray([not x.right for x in own], dtype=np.float64)
    propensities = np.asarray([x.propensity for x in own])
    reached: dict[float, tuple[float, float]] = {}

    def capital(threshold: float) -> tuple[float, float]:
        """Return the highest log-capital so far and today's."""
        if threshold not in reached:
            above = scores >= threshold
            least = min_propensity(threshold) if callable(min_propensity) else min_propensity
            ratios = least / propensities[above]
            if ratios.max(initial=0.0) > 1.0 + 1e-9:
                raise ValueError(
                    f"a label at or above {threshold} was picked with less than min_propensity {least}"
                )
            rate = None if prior is None else prior.rates.get(threshold)
            path = _log_capital(wrong[above], ratios, max_error, rate)
            reached[threshold] = (float(path.max(initial=0.0)), float(path[-1]) if path.size else 0.0)
        return reached[threshold]

    certified: float | None = None
    pending: list[tuple[float, float]] = []
    for start, goal in zip(starts, goals, strict=True):
        for threshold in ordered[start:]:
            if capital(threshold)[0] < goal:
                pending.append((threshold, goal))
                break
            certified = threshold if certified is None else min(certified, threshold)
    pending = [(t, goal) for t, goal in pending if certified is None or t < certified]
    nearest = max(pending, key=lambda p: capital(p[0])[1] - p[1], default=(ordered[0], 0.0))[0]
    counted = nearest if certified is None else certified
    above = scores >= counted
    missing = [
        n
        for t, goal in pending
        if (
            n := _missing(
                wrong[scores >= t], max_error, prior.rates.get(t) if prior else None, goal - capital(t)[1]
            )
        )
        is not None
    ]
    return Certificate(certified, int(above.sum()), int(wrong[above].sum()), min(missing, default=None))


def _checked(max_error: float, confidence: float) -> None:
    if not 0.0 < max_error < 1.0:
        raise ValueError(f"max_error must lie between 0 and 1, not {max_error}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")


def _starts(ordered: Sequence[float], prior: Prior | None, max_error: float) -> list[int]:
    """Return the places in `ordered` at which the searches start, the pool's first.

    The pool's is where the labels needed take the least traffic: strict thresholds get few, loose ones need many.
    """
    strict = len(ordered) // 4
    if prior is None:
        return [strict]
    gains = [prior.shares.get(t, 0.0) * (_gain(prior.rates.get(t, 1.0), max_error) or 0.0) for t in ordered]
    place = int(np.argmax(gains)) if max(gains) > 0.0 else 0
    return [place] if place == strict else [place, strict]


def _gain(rate: float, max_error: float) -> float | None:
    """Return by how much a label raises the log-capital when the error is `rate`; None when that is hopeless."""
    if rate >= max_error * 0.9:
        return None
    return rate * math.log(max(rate, 1e-12) / max_error) + (1.0 - rate) * math.log(
        (1.0 - rate) / (1.0 - max_error)
    )


def _weights(max_error: float, rate: float | None) -> NDArray[np.float64]:
    """Spread the capital over the bets: evenly, half of it drawn to the pool's rate where there is one."""
    even = np.full(len(SHARES), 1.0 / len(SHARES))
    if rate is None:
        return even
    distance = np.abs(np.asarray(SHARES) - min(rate / max_error, 1.0))
    near = np.exp(-distance / 0.1)
    result: NDArray[np.float64] = 0.5 * even + 0.5 * near / near.sum()
    return result


def _log_capital(
    wrong: NDArray[np.float64], ratios: NDArray[np.float64], max_error: float, rate: float | None
) -> NDArray[np.float64]:
    """Return the log-capital after each label, betting that the error is below `max_error`.

    A bet on rate q multiplies the capital by 1 - r l (x - max_error) with l = (max_error - q) / (max_error (1 -
    max_error)), x = 1 for a wrong answer and r the label's weight over the largest possible weight. For r = 1
    this is the likelihood ratio of q against max_error. Its expectation is at most 1 whenever the error is at
    least max_error.
    """
    if not wrong.size:
        return np.empty(0)
    rates = np.asarray(SHARES) * max_error
    bets = (max_error - rates) / (max_error * (1.0 - max_error))
    steps = 1.0 - ratios[:, None] * bets[None, :] * (wrong[:, None] - max_error)
    with np.errstate(divide="ignore"):
        logs = np.cumsum(np.log(np.maximum(steps, 1e-300)), axis=0) + np.log(_weights(max_error, rate))
    top = logs.max(axis=1)
    result: NDArray[np.float64] = top + np.log(np.exp(logs - top[:, None]).sum(axis=1))
    return result


def _missing(wrong: NDArray[np.float64], max_error: float, rate: float | None, lacking: float) -> int | None:
    """Estimate how many more labels raise the log-capital by `lacking`, at the shrunk rate of what was seen."""
    expected = shrunk_rate(int(wrong.sum()), len(wrong), rate if rate is not None else max_error / 4)
    gain = _gain(expected, max_error)
    return None if gain is None else max(1, math.ceil(lacking / gain))


def shrunk_rate(wrong: float, labels: float, pool_rate: float, *, strength: float = 50.0) -> float:
    """Return a scope's error rate drawn to the pool's (posterior mean of a Beta prior worth `strength` labels)."""
    return (wrong + strength * pool_rate) / (labels + strength)


def interval(
    labels: Sequence[Labelled], *, confidence: float = CONFIDENCE, min_propensity: float = 1.0
) -> tuple[float, float, float]:
    """Return the weighted estimate of wrong / served and an interval around it that holds at any time.

    The interval is all rates that a bet against them has not refuted (each side with half of the doubt). Without
    labels it is (0.5, 0, 1).
    """
    if not labels:
        return 0.5, 0.0, 1.0
    wrong = np.asarray([not x.right for x in labels], dtype=np.float64)
    ratios = np.asarray([min_propensity / x.propensity for x in labels])
    estimate = float((wrong * ratios).sum() / ratios.sum())
    goal = -math.log((1.0 - confidence) / 2)

    def refuted(rate: float, above: bool) -> bool:
        """`above`: bet that the truth is below `rate`; otherwise that it is above."""
        path = (
            _log_capital(wrong, ratios, rate, None)
            if above
            else _log_capital(1.0 - wrong, ratios, 1.0 - rate, None)
        )
        return bool(path.max() >= goal)

    low, high = estimate, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if middle < 1.0 and refuted(middle, True) else (middle, high)
    upper = high
    low, high = 0.0, estimate
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if middle > 0.0 and refuted(middle, False) else (low, middle)
    return estimate, low, upper
