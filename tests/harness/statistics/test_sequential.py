"""The interval that may be looked at any time: bets, their limits, and their agreement."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantgate.statistics import noninferiority, sequential

PROPERTY = settings(max_examples=50, deadline=None, derandomize=True)
TABLES = st.integers(1, 2000).flatmap(
    lambda n: st.integers(0, n).flatmap(
        lambda lost: st.tuples(st.just(lost), st.integers(0, n - lost), st.just(n))
    )
)


@PROPERTY
@given(TABLES)
def test_the_interval_contains_the_estimate_and_stays_inside_minus_one_to_one(
    table: tuple[int, int, int],
) -> None:
    interval = sequential.difference_interval(*table, confidence=0.95)
    assert -1 <= interval.lower <= interval.estimate <= interval.upper <= 1


@PROPERTY
@given(TABLES)
def test_swapping_the_arms_mirrors_the_interval(table: tuple[int, int, int]) -> None:
    lost, won, n = table
    one = sequential.difference_interval(lost, won, n, confidence=0.95)
    other = sequential.difference_interval(won, lost, n, confidence=0.95)
    assert (one.lower, one.upper) == (-other.upper, -other.lower)


@pytest.mark.parametrize("difference", [-0.3, -0.02, 0.0, 0.4])
def test_capital_does_not_grow_on_average_when_the_hypothesis_is_true(difference: float) -> None:
    lost, won = (0.5 - difference) / 2, (0.5 + difference) / 2
    after_one = (
        lost * sequential.capital(1, 0, 1, difference=difference)
        + won * sequential.capital(0, 1, 1, difference=difference)
        + 0.5 * sequential.capital(0, 0, 1, difference=difference)
    )
    assert after_one == pytest.approx(1.0)
    assert sequential.capital(0, 0, 0, difference=difference) == pytest.approx(1.0)


def test_looking_costs_width_against_the_interval_that_is_looked_at_once() -> None:
    once = noninferiority.difference_interval(20, 20, 1000, confidence=0.95)
    always = sequential.difference_interval(20, 20, 1000, confidence=0.95)
    assert always.lower < once.lower
    assert always.upper > once.upper


def test_a_broken_variant_is_shown_long_before_the_end() -> None:
    # 60 % against 30 % right.
    assert sequential.difference_interval(20, 2, 60, confidence=0.95).upper < 0


def test_peeking_after_every_twenty_items_errs_no_more_often_than_it_says() -> None:
    generator = np.random.default_rng(5)
    ever, runs = 0, 300
    for _ in range(runs):
        steps = generator.multinomial(20, [0.035, 0.015, 0.95], 50).cumsum(axis=0)
        ever += any(
            sequential.capital(lost, won, lost + won + same, difference=-0.02) >= 20
            for lost, won, same in steps.tolist()
        )
    # 5 % of 300 is 15 ± 4.
    assert ever <= 23


def test_all_items_lost_is_a_difference_of_minus_one_with_room_above_only() -> None:
    interval = sequential.difference_interval(50, 0, 50, confidence=0.95)
    assert interval.lower == interval.estimate == -1
    assert -1 < interval.upper < -0.7


def test_required_items_are_the_first_that_decide() -> None:
    n = sequential.required_items(10, 8, 400, margin=0.02, confidence=0.95)
    assert n is not None
    for size, decided in ((n, True), (n - 1, False)):
        bounds = sequential.difference_interval(
            10 * size / 400, 8 * size / 400, size, confidence=0.95
        )
        assert (bounds.lower >= -0.02) is decided


def test_required_items_of_an_unacceptable_drop_are_those_that_show_it() -> None:
    n = sequential.required_items(14, 5, 400, margin=0.02, confidence=0.95)
    assert n is not None
    bounds = sequential.difference_interval(14 * n / 400, 5 * n / 400, n, confidence=0.95)
    assert bounds.upper <= 0


def test_no_number_of_items_decides_an_estimate_at_the_margin() -> None:
    assert sequential.required_items(8, 0, 400, margin=0.02, confidence=0.95) is None


def test_capital_beyond_any_number_stays_a_number() -> None:
    assert math.isfinite(sequential.capital(0, 10**6, 10**6, difference=-0.5))


def test_the_detectable_drop_exceeds_the_half_width() -> None:
    interval = sequential.difference_interval(10, 10, 1000, confidence=0.95)
    detectable = sequential.smallest_detectable_drop(10, 10, 1000, confidence=0.95)
    assert -interval.lower < detectable < -2 * interval.lower
