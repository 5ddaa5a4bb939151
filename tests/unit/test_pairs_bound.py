"""The bound on wrong / served: exact values, no false certificate, labels that count."""

from __future__ import annotations

import math

import numpy as np
import pytest

from classifiers.pairs import bound
from classifiers.pairs.bound import Labelled, Prior


def labels(count: int, wrong: int, *, score: float = 0.999, propensity: float = 1.0) -> list[Labelled]:
    """`count` labels of one score, the wrong ones spread evenly."""
    every = {round((i + 0.5) * count / wrong) for i in range(wrong)} if wrong else set()
    return [Labelled(score, i not in every, propensity) for i in range(count)]


@pytest.mark.parametrize(
    ("wrong", "count", "upper"),
    # 1 - 0.05 ** (1 / n) for no wrong answer; the others are quantiles of the beta distribution.
    [(0, 298, 0.01000), (0, 59, 0.04951), (1, 100, 0.04656), (3, 50, 0.14784), (10, 10, 1.0), (0, 0, 1.0)],
)
def test_clopper_pearson(wrong: int, count: int, upper: float) -> None:
    assert bound.clopper_pearson_upper(wrong, count) == pytest.approx(upper, abs=2e-5)


def test_the_binomial_tail_is_exact() -> None:
    direct = sum(math.comb(40, k) * 0.07**k * 0.93 ** (40 - k) for k in range(4))
    assert bound.binomial_tail(3, 40, 0.07) == pytest.approx(direct, rel=1e-12)


def test_bad_input_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="3 of 2"):
        bound.clopper_pearson_upper(3, 2)
    with pytest.raises(ValueError, match="max_error"):
        bound.certify([], max_error=0.0)
    with pytest.raises(ValueError, match="confidence"):
        bound.certify([], max_error=0.1, confidence=1.0)
    with pytest.raises(ValueError, match="min_propensity"):
        bound.certify(labels(5, 0, propensity=0.1), max_error=0.05, min_propensity=0.5)
    with pytest.raises(ValueError, match="certify"):
        bound.threshold_for(labels(5, 0, propensity=0.5), max_error=0.05)


def test_enforce_picks_the_loosest_threshold_that_is_shown_to_hold() -> None:
    seen = labels(500, 0) + labels(300, 3, score=0.95) + labels(300, 60, score=0.86)
    chosen = bound.threshold_for(seen, max_error=0.02)
    assert chosen is not None
    assert chosen.threshold == 0.865
    assert (chosen.served, chosen.wrong) == (800, 3)
    assert chosen.upper <= 0.02
    assert bound.threshold_for(labels(200, 0), max_error=0.01) is None
    assert bound.threshold_for([], max_error=0.05) is None


def test_a_scope_is_certified_after_about_three_hundred_clean_labels_at_one_percent() -> None:
    assert bound.certify(labels(250, 0), max_error=0.01).threshold is None
    waiting = bound.certify(labels(100, 0), max_error=0.01)
    assert waiting.threshold is None
    assert waiting.missing is not None
    assert 100 < waiting.missing < 400
    assert bound.certify(labels(100, 0), max_error=0.01, prior=None).missing == waiting.missing
    certified = bound.certify(labels(400, 0), max_error=0.01)
    assert certified.threshold is not None
    assert certified.wrong == 0


def test_labels_below_a_threshold_do_not_certify_it() -> None:
    assert bound.certify(labels(2000, 0, score=0.3), max_error=0.05).threshold is None


def test_wrong_answers_keep_a_scope_in_shadow() -> None:
    certificate = bound.certify(labels(2000, 100), max_error=0.01)
    assert certificate.threshold is None
    assert certificate.missing is None


def test_sampled_labels_count_by_their_probability() -> None:
    """A wrong answer picked with a tenth of the chance of the right ones weighs ten times as much."""
    right = labels(900, 0, propensity=1.0)
    for propensity, certified in ((1.0, True), (0.1, False)):
        wrong = [Labelled(0.999, False, propensity)] * 8
        mixed = right[:100] + wrong + right[100:]
        found = bound.certify(mixed, max_error=0.05, min_propensity=0.1)
        reference = bound.certify(mixed, max_error=0.05, min_propensity=propensity)
        assert (reference.threshold is not None) is certified
        assert found.threshold is None or certified


@pytest.mark.parametrize("max_error", [0.02, 0.05])
@pytest.mark.parametrize("misleading", [False, True])
def test_a_bound_that_does_not_hold_is_rarely_certified_however_often_one_looks(
    max_error: float, misleading: bool
) -> None:
    """The error is just above the bound at every threshold; a pool that claims otherwise must not help."""
    prior = (
        Prior(dict.fromkeys(bound.THRESHOLDS, 0.0001), dict.fromkeys(bound.THRESHOLDS, 0.9))
        if misleading
        else None
    )
    false = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        propensities = rng.choice([0.25, 0.5, 1.0], size=1600)
        picked = rng.random(1600) < propensities
        right = rng.random(1600) >= max_error * 1.02
        own = [
            Labelled(0.9999, bool(r), float(p))
            for r, p in zip(right[picked], propensities[picked], strict=True)
        ]
        # The certificate keeps the best look so far, so that one call stands for a look after every label.
        found = bound.certify(own, max_error=max_error, prior=prior, min_propensity=0.25)
        false += found.threshold is not None
    assert false <= 18


def test_a_good_pool_certifies_sooner() -> None:
    def first(prior: Prior | None) -> int:
        return next(
            n for n in range(20, 600, 5) if bound.certify(labels(n, 0), max_error=0.02, prior=prior).threshold
        )

    rates = dict.fromkeys(bound.THRESHOLDS, 0.0005)
    shares = {t: 0.3 + 0.5 * (1 - t) for t in bound.THRESHOLDS}
    place = bound.THRESHOLDS[len(bound.THRESHOLDS) // 4]
    agreeing = Prior(rates, shares | {place: 0.99})
    assert first(agreeing) < first(None)


def test_pooling_weighs_by_propensity() -> None:
    pool = labels(100, 0, propensity=1.0) + [Labelled(0.999, False, 0.1)] * 10
    prior = Prior.of(pool)
    assert prior.rates[0.998] == pytest.approx(0.5, abs=0.01)
    assert prior.shares[0.998] == pytest.approx(1.0)
    assert Prior.of([]).shares[0.5] == 0.0


def test_the_interval_holds_and_narrows() -> None:
    held = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        own = [Labelled(0.9, bool(r)) for r in rng.random(300) >= 0.1]
        estimate, low, high = bound.interval(own)
        assert low <= estimate <= high
        held += low <= 0.1 <= high
    assert held >= 55
    few, many = bound.interval(labels(50, 2)), bound.interval(labels(1000, 40))
    assert many[2] - many[1] < few[2] - few[1]
    assert bound.interval([]) == (0.5, 0.0, 1.0)


def test_a_rate_is_drawn_to_the_pool_by_fifty_labels() -> None:
    assert bound.shrunk_rate(0, 0, 0.02) == pytest.approx(0.02)
    assert bound.shrunk_rate(5, 50, 0.02) == pytest.approx(0.06)
