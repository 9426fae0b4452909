"""Paired log-ratios: Student's t interval, its symmetry, and what more blocks would buy."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import stdtrit

from quantgate.statistics import blocks

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)

PAIRS = st.lists(st.tuples(st.floats(1.0, 1e4), st.floats(1.0, 1e4)), min_size=4, max_size=20)
CHAMPION = [400.0, 410.0, 395.0, 405.0, 402.0, 398.0]
CANDIDATE = [390.0, 405.0, 392.0, 399.0, 400.0, 385.0]


@PROPERTY
@given(PAIRS)
def test_the_interval_contains_the_geometric_mean_ratio(pairs: list[tuple[float, float]]) -> None:
    champion, candidate = zip(*pairs, strict=True)
    interval = blocks.ratio_interval(champion, candidate, confidence=0.95)
    assert interval.lower <= interval.estimate <= interval.upper
    mean = sum(math.log(b / a) for a, b in pairs) / len(pairs)
    assert interval.estimate == pytest.approx(math.exp(mean))


@PROPERTY
@given(PAIRS)
def test_swapping_the_arms_inverts_the_interval(pairs: list[tuple[float, float]]) -> None:
    champion, candidate = zip(*pairs, strict=True)
    one = blocks.ratio_interval(champion, candidate, confidence=0.95)
    other = blocks.ratio_interval(candidate, champion, confidence=0.95)
    assert one.lower == pytest.approx(1 / other.upper)


@PROPERTY
@given(PAIRS, st.floats(0.01, 100))
def test_the_unit_of_the_values_does_not_matter(
    pairs: list[tuple[float, float]], factor: float
) -> None:
    champion, candidate = zip(*pairs, strict=True)
    one = blocks.ratio_interval(champion, candidate, confidence=0.95)
    other = blocks.ratio_interval(
        [factor * a for a in champion], [factor * b for b in candidate], confidence=0.95
    )
    assert one.upper == pytest.approx(other.upper)


@PROPERTY
@given(PAIRS)
def test_the_interval_widens_with_confidence(pairs: list[tuple[float, float]]) -> None:
    champion, candidate = zip(*pairs, strict=True)
    narrow = blocks.ratio_interval(champion, candidate, confidence=0.9)
    wide = blocks.ratio_interval(champion, candidate, confidence=0.99)
    assert wide.lower <= narrow.lower
    assert wide.upper >= narrow.upper


def test_the_interval_is_scipys_t_interval_of_the_log_ratios() -> None:
    # scipy.stats.ttest_1samp(logs, 0).confidence_interval(0.90), scipy 1.17.1
    interval = blocks.ratio_interval(CHAMPION, CANDIDATE, confidence=0.95)
    assert (math.log(interval.lower), math.log(interval.upper)) == pytest.approx(
        (-0.025314130358211093, -0.007463765778832867)
    )


def test_equal_ratios_leave_an_interval_of_width_zero() -> None:
    interval = blocks.ratio_interval([1.0, 2.0, 4.0, 8.0], [2.0, 4.0, 8.0, 16.0], confidence=0.95)
    assert interval.lower == interval.estimate == interval.upper == pytest.approx(2.0)


def test_required_blocks_are_the_fewest_that_reach_the_limit() -> None:
    mean, error = blocks._mean_and_error(CHAMPION, CANDIDATE)
    limit = math.exp(mean - error)
    n = blocks.required_blocks(CHAMPION, CANDIDATE, limit=limit, confidence=0.95)
    assert n is not None
    spread = error * math.sqrt(6)
    assert stdtrit(n - 1, 0.95) * spread / math.sqrt(n) <= error
    assert stdtrit(n - 2, 0.95) * spread / math.sqrt(n - 1) > error


def test_no_number_of_blocks_decides_a_ratio_at_the_limit() -> None:
    arm = [1.0, 2.0, 3.0, 4.0]
    assert blocks.required_blocks(arm, arm, limit=1.0, confidence=0.95) is None


def test_the_detectable_effect_grows_with_the_noise() -> None:
    quiet = blocks.smallest_detectable_effect(CHAMPION, CANDIDATE, confidence=0.95)
    noisy = blocks.smallest_detectable_effect(
        CHAMPION, [c * f for c, f in zip(CANDIDATE, (1.2, 0.8) * 3, strict=True)], confidence=0.95
    )
    assert 0 < quiet < noisy


def test_blocks_of_unequal_number_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        blocks.ratio_interval([1.0, 2.0], [1.0], confidence=0.95)
