"""Circuit breakers and live latency, with a clock that is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.health import (
    ENOUGH,
    FAILURES_IN_A_ROW,
    FORGET,
    OPEN_FIRST,
    OPEN_LONGEST,
    RECENT,
    WARM_SECONDS,
    WINDOW,
    Health,
)


def fail(health: Health, now: float, times: int = FAILURES_IN_A_ROW, **options: object) -> None:
    for _ in range(times):
        health.failure("p", "m", now, unreachable=bool(options.get("unreachable")))


def test_a_model_nobody_called_is_available() -> None:
    status = Health().status("p", "m", 0.0)
    assert status.available
    assert (status.first_token_p95, status.tokens_per_second) == (None, None)


def test_failures_in_a_row_open_the_breaker() -> None:
    health = Health()
    fail(health, 0.0, FAILURES_IN_A_ROW - 1)
    assert health.status("p", "m", 0.0).available
    fail(health, 0.0, 1)
    status = health.status("p", "m", 0.1)
    assert not status.available
    assert "breaker" in status.reason
    assert health.open_breakers(0.1) == [("p", "m")]
    assert health.status("p", "other", 0.1).available


def test_a_success_between_failures_keeps_it_closed() -> None:
    health = Health()
    for now in range(3):
        fail(health, float(now), FAILURES_IN_A_ROW - 1)
        health.success("p", "m", float(now))
        if now == 0:
            assert health.status("p", "m", float(now)).available


def test_half_of_ten_failing_opens_it() -> None:
    health = Health()
    for now in range(10):
        assert health.status("p", "m", float(now)).available
        health.failure("p", "m", float(now), unreachable=False)
        health.success("p", "m", float(now)) if now < 9 else None
    assert not health.status("p", "m", 9.0).available


def test_old_failures_do_not_count() -> None:
    health = Health()
    for number in range(9):
        health.failure("p", "m", 0.0, unreachable=False)
        health.success("p", "m", 0.0) if number % 2 else None
    health.success("p", "m", 0.0)
    health.failure("p", "m", WINDOW + 1, unreachable=False)
    assert health.status("p", "m", WINDOW + 1).available


def test_one_trial_at_a_time_closes_it_again() -> None:
    health = Health()
    fail(health, 0.0)
    later = OPEN_FIRST + 0.1
    assert health.status("p", "m", later).available
    health.trying("p", "m", later)
    assert not health.status("p", "m", later).available, "half-open: the trial is under way"
    health.success("p", "m", later)
    assert health.status("p", "m", later).available
    assert health.open_breakers(later) == []


def test_a_trial_that_fails_opens_it_for_longer() -> None:
    health = Health()
    fail(health, 0.0)
    now, spans = 0.0, []
    for _ in range(6):
        start = now
        while not health.status("p", "m", now).available:
            now += 0.5
        spans.append(now - start)
        health.trying("p", "m", now)
        health.failure("p", "m", now, unreachable=False)
    assert spans == sorted(spans)
    assert spans[0] == pytest.approx(OPEN_FIRST, abs=0.5)
    assert spans[-1] <= OPEN_LONGEST + 0.5


def test_a_trial_whose_client_left_says_nothing() -> None:
    health = Health()
    fail(health, 0.0)
    later = OPEN_FIRST + 0.1
    health.trying("p", "m", later)
    health.abandoned("p", "m")
    assert health.status("p", "m", later).available, "the next request is the trial"


def test_a_trial_that_never_reports_stops_counting() -> None:
    health = Health()
    fail(health, 0.0)
    health.trying("p", "m", OPEN_FIRST + 0.1)
    assert health.status("p", "m", OPEN_FIRST + OPEN_LONGEST + 1).available


def test_a_provider_that_cannot_be_reached_takes_its_models_along() -> None:
    health = Health()
    fail(health, 0.0, unreachable=True)
    assert "cannot be reached" in health.status("p", "other", 0.1).reason
    assert health.status("q", "m", 0.1).available


def test_retry_after_holds_a_model_back_at_once() -> None:
    health = Health()
    health.failure("p", "m", 0.0, unreachable=False, hold=3.0)
    assert not health.status("p", "m", 2.9).available
    assert health.status("p", "m", 3.1).available


def test_a_long_retry_after_is_capped() -> None:
    health = Health()
    health.failure("p", "m", 0.0, unreachable=False, hold=86_400.0)
    assert health.status("p", "m", OPEN_LONGEST + 0.1).available


def test_an_unusable_provider_says_why() -> None:
    health = Health()
    health.unusable["p"] = "KEY is not set"
    status = health.status("p", "m", 0.0)
    assert (status.available, status.reason) == (False, "KEY is not set")


# -- latency --


@given(st.lists(st.floats(0.001, 60), min_size=ENOUGH, max_size=300))
def test_the_percentile_is_a_percentile(seconds: list[float]) -> None:
    health = Health()
    for value in seconds:
        health.first_token("m", value, 0.0)
    p95 = health.status("p", "m", 0.2).first_token_p95
    assert p95 is not None
    assert sum(value <= p95 for value in seconds) >= 0.95 * len(seconds)
    assert sum(value < p95 for value in seconds) <= 0.95 * len(seconds)


def test_a_few_observations_say_nothing() -> None:
    health = Health()
    for _ in range(RECENT - 1):
        health.first_token("m", 9.0, 0.0)
    assert health.status("p", "m", 0.2).first_token_p95 is None
    health.first_token("m", 9.0, 0.2)
    assert health.status("p", "m", 0.4).first_token_p95 == 9.0


def test_slow_is_seen_soon_and_recovery_needs_a_handful() -> None:
    health = Health()
    now = 0.0
    for _ in range(200):  # ten seconds at 20 requests a second
        health.first_token("m", 0.1, now)
        now += 0.05
    assert health.status("p", "m", now).first_token_p95 == pytest.approx(0.1)
    slow = 0
    while (health.status("p", "m", now).first_token_p95 or 0) < 4.5:
        health.first_token("m", 4.5, now)
        slow += 1
        now += 0.05
    assert slow <= 20
    now += WINDOW + 1  # only probes since
    assert health.status("p", "m", now).first_token_p95 == pytest.approx(4.5)
    for good in range(RECENT):
        assert health.status("p", "m", now).first_token_p95 == pytest.approx(4.5), f"after {good} good probes"
        health.first_token("m", 0.1, now)
        now += 1
    assert health.status("p", "m", now).first_token_p95 == pytest.approx(0.1)


def test_old_observations_are_forgotten() -> None:
    health = Health()
    for _ in range(RECENT):
        health.first_token("m", 9.0, 0.0)
    assert health.status("p", "m", FORGET + 1).first_token_p95 is None


def test_the_rate_follows_what_is_seen() -> None:
    health = Health()
    health.rate("m", 4, 1.0)  # too short to mean something
    assert health.status("p", "m", 0.0).tokens_per_second is None
    health.rate("m", 100, 1.0)
    for _ in range(50):
        health.rate("m", 500, 10.0)
    assert health.status("p", "m", 1.0).tokens_per_second == pytest.approx(50, rel=0.05)


# -- conversations --


def test_a_conversation_stays_warm_for_a_while() -> None:
    health = Health()
    health.warmed("c", "m", 0.0)
    assert health.status("p", "m", 1.0, "c").warm
    assert not health.status("p", "other", 1.0, "c").warm
    assert not health.status("p", "m", 1.0, "d").warm
    assert not health.status("p", "m", 1.0).warm
    assert not health.status("p", "m", WARM_SECONDS + 1, "c").warm
