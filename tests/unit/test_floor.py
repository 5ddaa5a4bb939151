"""Certificates: exact bounds, what they promise in repeated draws, and what they ask for where labels are too few."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from classifiers.encoder import ArtefactError
from classifiers.floor import (
    GRID,
    Calibration,
    Rows,
    certify,
    draw_comparison,
    labels_needed,
    lower_bound,
    upper_bound,
)


def binomial_cdf(successes: int, rows: int, rate: float) -> float:
    return sum(math.comb(rows, k) * rate**k * (1 - rate) ** (rows - k) for k in range(successes + 1))


def rows(predicted: object, label: object, reference: object = 1.0, propensity: object = 0.1) -> Rows:
    score = np.asarray(predicted, dtype=float)
    excess = np.asarray(reference, dtype=float) - np.asarray(label, dtype=float)
    return Rows(
        score,
        np.broadcast_to(excess, score.shape),
        np.broadcast_to(np.asarray(propensity, dtype=float), score.shape),
    )


# -- the exact binomial --


@given(st.integers(1, 60), st.data(), st.sampled_from((0.2, 0.05, 0.001)))
def test_bounds_are_clopper_and_pearsons(n: int, data: st.DataObject, delta: float) -> None:
    successes = data.draw(st.integers(0, n))
    high, low = upper_bound(successes, n, delta), lower_bound(successes, n, delta)
    if successes < n:
        assert binomial_cdf(successes, n, high) == pytest.approx(delta, rel=1e-4)
    else:
        assert high == 1.0
    if successes > 0:
        assert 1 - binomial_cdf(successes - 1, n, low) == pytest.approx(delta, rel=1e-4)
    else:
        assert low == 0.0
    assert low <= successes / n <= high


def test_bounds_of_tables() -> None:
    # Rule of three and tables of the exact interval (Clopper and Pearson 1934): 95 % two-sided for 2 of 20.
    assert upper_bound(0, 100, 0.05) == pytest.approx(1 - 0.05 ** (1 / 100), abs=1e-8)
    assert lower_bound(2, 20, 0.025) == pytest.approx(0.0123, abs=1e-4)
    assert upper_bound(2, 20, 0.025) == pytest.approx(0.3170, abs=1e-4)


@given(st.integers(0, 30), st.sampled_from((0.02, 0.1, 0.3)), st.sampled_from((0.1, 0.05, 0.01)))
def test_labels_needed_is_the_least_number_that_passes(failures: int, excess: float, delta: float) -> None:
    needed = labels_needed(failures, excess, delta)
    assert upper_bound(failures, needed, delta / 2) <= excess + 1e-9
    if needed > failures + 1:
        assert upper_bound(failures, needed - 1, delta / 2) > excess


# -- certificates --


def test_no_labels_no_certificate_and_how_many_are_missing() -> None:
    found = certify(rows([], []), 0.1, 0.05)
    assert found.threshold is None
    assert (found.labels, found.missing, found.bound, found.share) == (0, 36, 1.0, 0.0)
    found = certify(rows([0.9] * 30, 1.0), 0.1, 0.05)
    assert (found.threshold, found.missing) == (None, 6)
    found = certify(rows([0.9] * 36, 1.0), 0.1, 0.05)
    assert (found.threshold, found.missing) == (0.0, 0)
    assert found.bound <= 0.1


def test_failures_raise_what_is_missing() -> None:
    clean = certify(rows([0.9] * 30, 1.0), 0.1, 0.05).missing
    failed = certify(rows([0.9] * 30, [0.0, *[1.0] * 29]), 0.1, 0.05).missing
    assert failed == labels_needed(1, 0.1, 0.05) - 30 > clean


def test_the_threshold_lies_above_the_failures() -> None:
    score = np.linspace(0, 1, 1000)
    found = certify(rows(score, (score > 0.6).astype(float)), 0.1, 0.05)
    assert found.threshold is not None
    assert 0.5 < found.threshold < 0.6
    assert found.harm == ((score >= found.threshold) & (score <= 0.6)).sum()
    assert found.share == pytest.approx((score >= found.threshold).mean())
    assert found.bound <= 0.1
    one_lower = GRID[list(GRID).index(found.threshold) + 1]
    harm = int(((score >= one_lower) & (score <= 0.6)).sum())
    assert upper_bound(harm, 1000, 0.025) > 0.1


def test_failures_the_reference_shares_do_not_count_and_its_own_make_room() -> None:
    score = np.full(500, 0.8)
    half = np.tile([0.0, 1.0], 250)
    assert certify(rows(score, half), 0.1, 0.05).threshold is None
    assert certify(rows(score, half, half), 0.1, 0.05).threshold == 0.0
    other = 1 - half
    found = certify(rows(score, half, other), 0.1, 0.05)
    assert (found.harm, found.gain) == (250, 250)
    assert found.threshold is not None


def test_rows_the_prior_spoke_for_are_not_routed() -> None:
    score = np.where(np.arange(400) < 200, np.nan, 0.9)
    found = certify(rows(score, np.where(np.isnan(score), 0.0, 1.0)), 0.1, 0.05)
    assert (found.threshold, found.harm, found.share, found.labels) == (0.0, 0, 0.5, 400)
    nothing = certify(rows(np.full(400, np.nan), 1.0), 0.1, 0.05)
    assert (nothing.threshold, nothing.missing) == (None, 1)


def test_degrees_of_success_count_by_their_size() -> None:
    score = np.full(20_000, 0.8)
    found = certify(rows(score, 0.7), 0.5, 0.05)
    assert found.harm == pytest.approx(0.3 * 20_000, rel=0.05)


def test_rows_stand_for_the_traffic_they_were_drawn_from() -> None:
    # Failures were drawn four times as readily as successes: counted as they come, they are 4 of 13.
    score = np.full(13_000, 0.8)
    label = np.tile([0.0] * 4 + [1.0] * 9, 1000)
    plain = certify(rows(score, label), 0.5, 0.05)
    fair = certify(rows(score, label, 1.0, np.where(label == 0, 0.4, 0.1)), 0.5, 0.05)
    assert plain.harm / plain.labels == pytest.approx(4 / 13)
    assert fair.harm / fair.labels == pytest.approx(1 / 10, abs=0.01)
    assert certify(rows(score, label, 1.0, 0.7), 0.5, 0.05) == plain, "equal propensities lose no row"


def test_a_changed_share_costs_no_more_than_the_time_it_was_thin() -> None:
    label = np.ones(1000)
    score = np.full(1000, 0.9)
    lowered = certify(rows(score, label, 1.0, np.where(np.arange(1000) < 900, 0.2, 0.02)), 0.1, 0.05)
    assert lowered.labels == 900, "900 of the time of 20 %, rather than 190 of all of it"
    raised = certify(rows(score, label, 1.0, np.where(np.arange(1000) < 100, 0.02, 0.2)), 0.1, 0.05)
    assert raised.labels == 900
    # One in ten of the dense time is kept beside all of the thin one, where that is more.
    mixed = certify(rows(score, label, 1.0, np.where(np.arange(1000) < 940, 0.02, 0.2)), 0.1, 0.05)
    assert 941 <= mixed.labels <= 960


def test_who_answered_has_no_part_in_the_draw() -> None:
    draws = np.random.default_rng(8)
    models = ("a", "b", "c")
    found = [draw_comparison(models, 0.3, float(draw)) for draw in draws.random(30_000)]
    assert all(pair[1] == pytest.approx(0.1) for pair in found if pair is not None)
    for model in models:
        assert sum(pair is not None and pair[0] == model for pair in found) == pytest.approx(3000, abs=200)
    assert draw_comparison(models, 0.0, 0.0) is None
    assert draw_comparison((), 1.0, 0.0) is None
    assert draw_comparison(("a",), 1.0, 0.999999) == ("a", 1.0)


@pytest.mark.parametrize("truth", [0.11, 0.28])
def test_evidence_that_is_little_believed_is_counted_at_its_worst(truth: float) -> None:
    """Answers that differ, without a judge: whichever of the two is wrong, nothing is certified beyond the bound."""
    draws = np.random.default_rng(2)
    certified = 0
    for _ in range(60):
        bad = draws.random(3000) < truth
        labels = np.stack([np.ones(3000), np.where(bad, draws.random(3000), 1.0)], axis=1)
        found = Calibration(
            ("big", "small"),
            np.zeros(3000, np.int8),
            np.full((3000, 2), 0.8, np.float32),
            labels.astype(np.float32),
            np.full(3000, 0.02, np.float32),
            ~bad,
        ).certificates("simple", ["small"], "big", 0.1, 0.05)["small"]
        certified += found.threshold is not None
        assert found.missing > 0 or found.threshold is not None
    assert certified <= 6


def test_it_repeats() -> None:
    draws = np.random.default_rng(5)
    given_rows = rows(draws.random(300), draws.random(300), draws.random(300), draws.random(300) + 0.1)
    assert certify(given_rows, 0.2, 0.05) == certify(given_rows, 0.2, 0.05)


def test_more_confidence_or_less_excess_routes_no_further() -> None:
    draws = np.random.default_rng(3)
    score = draws.random(2000)
    given_rows = rows(score, (draws.random(2000) < 0.3 + 0.7 * score).astype(float))
    by_excess = [certify(given_rows, excess, 0.05).threshold or 0.0 for excess in (0.02, 0.05, 0.1, 0.2)]
    by_delta = [certify(given_rows, 0.1, delta).threshold or 0.0 for delta in (0.001, 0.01, 0.1, 0.3)]
    assert all(first >= second for first, second in pairwise(by_excess))
    assert all(first >= second for first, second in pairwise(by_delta))


@pytest.mark.parametrize(("labels", "excess"), [(300, 0.1), (1000, 0.05)])
def test_the_bound_holds_as_often_as_it_says(labels: int, excess: float) -> None:
    """200 draws from a world whose success probabilities are known, with a predictor that is off."""
    draws = np.random.default_rng(11)
    hidden = draws.normal(size=50_000)
    strong = 1 / (1 + np.exp(-(2.8 - 0.8 * hidden)))
    weak = 1 / (1 + np.exp(-(1.9 - 1.6 * hidden)))
    score = np.clip(0.3 + 0.5 * weak + 0.1 * draws.normal(size=50_000), 0, 1)
    held = routed = 0
    for run in range(200):
        at = draws.integers(0, 50_000, labels)
        drawn = rows(
            score[at],
            (draws.random(labels) < weak[at]).astype(float),
            (draws.random(labels) < strong[at]).astype(float),
        )
        found = certify(drawn, excess, 0.05, seed=run)
        below = score >= (2.0 if found.threshold is None else found.threshold)
        held += bool(((strong - weak) * below).mean() <= excess)
        routed += bool(below.any())
    assert held >= 0.95 * 200
    assert routed >= 0.9 * 200


def test_a_certificate_takes_milliseconds() -> None:
    draws = np.random.default_rng(0)
    score = draws.random(3000)
    given_rows = rows(score, draws.random(3000) < score, (draws.random(3000) < 0.9).astype(float))
    best = math.inf
    for _ in range(3):
        start = time.thread_time()
        certify(given_rows, 0.2, 0.05)
        best = min(best, time.thread_time() - start)
    assert best < 0.05


def certified_in_turn(draws: np.random.Generator, *, everywhere: bool) -> list[float]:
    """True excess failure rates of four certificates, each resting on all comparisons so far: two kinds of prompts,
    of which the cheaper model fails one mostly, compared wherever they fall or only where it answers them.
    """

    def prompts(n: int) -> np.ndarray:
        return np.where(draws.random(n) < 0.6, 0.95, 0.30) + 0.02 * draws.random(n)

    everything = prompts(20_000)
    score, label = np.empty(0), np.empty(0)
    threshold, found = 0.0, []
    for wanted in (750, 3000, 3000, 3000):
        new = prompts(20_000)
        drawn = [draw_comparison(("small",), 0.5, float(draw)) is not None for draw in draws.random(20_000)]
        new = new[np.array(drawn) & (everywhere | (new >= threshold))][:wanted]
        score, label = np.append(score, new), np.append(label, draws.random(len(new)) < new)
        certificate = certify(rows(score, label), 0.1, 0.05)
        threshold = 2.0 if certificate.threshold is None else certificate.threshold
        found.append(float(((1 - everything) * (everything >= threshold)).mean()))
    return found


def test_the_bound_holds_when_it_is_certified_again_by_what_it_routes() -> None:
    draws = np.random.default_rng(2)
    blind = np.array([certified_in_turn(draws, everywhere=False) for _ in range(10)])
    assert (blind > 0.1).any(axis=1).mean() > 0.5, "where only its own answers are compared, it drifts"
    seen = np.array([certified_in_turn(draws, everywhere=True) for _ in range(25)])
    assert ((seen <= 0.1).mean(axis=0) >= 0.92).all()
    assert (seen[:, -1] > 0.01).all(), "and it is still certified"


# -- the rows an artefact carries --


def calibration(n: int = 400) -> Calibration:
    draws = np.random.default_rng(2)
    predicted = draws.random((n, 3)).astype(np.float32)
    labels = (draws.random((n, 3)) < 0.5 + 0.5 * predicted).astype(np.float32)
    labels[::2, 1] = np.nan
    labels[1::2, 0] = np.nan
    return Calibration(
        ("small", "middle", "large"),
        (np.arange(n) % 3).astype(np.int8),
        predicted,
        labels,
        np.full(n, 0.05, np.float32),
        np.arange(n) % 5 > 0,
    )


def test_rows_are_those_of_the_class_and_model() -> None:
    found = calibration().rows("medium", "small", "large")
    assert len(found.predicted) == 66
    which = np.arange(400)[(np.arange(400) % 3 == 1) & (np.arange(400) % 2 == 0)]
    unsure = found.excess[which % 5 == 0]
    assert (unsure == 1.0).all(), "what is not known is the worst that may be"
    reverse = calibration().rows("medium", "large", "small")
    assert len(reverse.predicted) == 66
    assert ((found.excess == -reverse.excess) | ((found.excess == 1) & (reverse.excess == 1))).all()
    assert len(calibration().rows("medium", "small", "middle").predicted) == 0, (
        "no request compared these two"
    )
    assert len(calibration().rows("medium", "small", "elsewhere").predicted) == 0
    assert len(calibration().rows("medium", "unheard-of", "large").predicted) == 0


def test_certificates_share_the_confidence() -> None:
    given_calibration = calibration()
    both = given_calibration.certificates("simple", ["small", "middle"], "large", 0.3, 0.05)
    assert set(both) == {"small", "middle"}
    assert both["small"].delta == 0.025
    alone = given_calibration.certificates("simple", ["small"], "large", 0.3, 0.05)["small"]
    assert (both["small"].threshold or 2) >= (alone.threshold or 2)


def test_calibration_rows_survive_being_stored() -> None:
    stored = calibration()
    found = Calibration.of(stored.models, stored.arrays())
    assert found.certificates("simple", ["small"], "large", 0.3, 0.05) == stored.certificates(
        "simple", ["small"], "large", 0.3, 0.05
    )


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("calibration_labels", np.full((400, 3), 1.5), "impossible"),
        ("calibration_labels", np.zeros((399, 3)), "do not fit"),
        ("calibration_propensities", np.zeros(400), "impossible"),
        ("calibration_propensities", np.full(400, np.nan), "impossible"),
        ("calibration_propensities", np.ones((400, 3)), "do not fit"),
        ("calibration_sure", np.ones(399, bool), "do not fit"),
        ("calibration_classes", np.full(400, 7), "impossible"),
        ("calibration_predicted", np.zeros((400, 2)), "do not fit"),
        ("calibration_predicted", None, "carries no calibration_predicted"),
    ],
)
def test_damaged_rows_are_refused(name: str, wrong: np.ndarray | None, message: str) -> None:
    arrays = calibration().arrays()
    if wrong is None:
        del arrays[name]
    else:
        arrays[name] = wrong
    with pytest.raises(ArtefactError, match=message):
        Calibration.of(("small", "middle", "large"), arrays)
