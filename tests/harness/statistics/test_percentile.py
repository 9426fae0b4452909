"""MLPerf's percentile test: its published floors, and its agreement with its own interval."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import betainc

from quantgate.statistics import binomial, percentile

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)

LATENCIES = st.lists(st.integers(1, 50).map(float), min_size=0, max_size=120)


@pytest.mark.parametrize(
    ("late", "p95", "p99"),
    # inference_rules.adoc at 99 % confidence, recomputed in the field notes
    [(0, 90, 459), (1, 130, 662), (2, 165, 838), (5, 259, 1307), (10, 398, 2010), (20, 656, 3304)],
)
def test_the_floors_of_mlperf_are_reproduced(late: int, p95: int, p99: int) -> None:
    assert percentile.min_requests(late, percentile=95, confidence=0.99) == p95
    assert percentile.min_requests(late, percentile=99, confidence=0.99) == p99


@PROPERTY
@given(st.integers(0, 60), st.integers(1, 600))
def test_the_test_is_mlperfs_incomplete_beta_condition(late: int, timely: int) -> None:
    condition = betainc(timely, late + 1, 0.95) <= 1 - 0.99
    assert percentile.is_within(late, late + timely, percentile=95, confidence=0.99) == condition


@PROPERTY
@given(st.integers(0, 60), st.integers(1, 600))
def test_within_and_beyond_are_the_clopper_pearson_bounds(late: int, timely: int) -> None:
    n = late + timely
    upper = binomial.upper_bound(late, n, confidence=0.95)
    lower = binomial.lower_bound(late, n, confidence=0.95)
    assert percentile.is_within(late, n, percentile=95, confidence=0.95) == (upper <= 0.05)
    assert percentile.is_beyond(late, n, percentile=95, confidence=0.95) == (lower >= 0.05)


@PROPERTY
@given(LATENCIES, st.integers(0, 30), st.integers(0, 51).map(float))
def test_the_interval_of_the_percentile_agrees_with_the_test(
    values: list[float], failed: int, limit: float
) -> None:
    n = len(values) + failed
    if n == 0:
        return
    late = percentile.num_late(values, failed, limit=limit)
    bounds = percentile.percentile_bounds(values, failed, percentile=90, confidence=0.95)
    within = percentile.is_within(late, n, percentile=90, confidence=0.95)
    beyond = percentile.is_beyond(late, n, percentile=90, confidence=0.95)
    assert within == (bounds.upper is not None and bounds.upper <= limit)
    assert beyond == (bounds.lower is None or bounds.lower > limit)


def test_a_request_exactly_at_the_limit_is_in_time() -> None:
    assert percentile.num_late([100.0, 100.1], 0, limit=100.0) == 1


def test_a_failed_request_is_late_at_any_limit() -> None:
    assert percentile.num_late([1.0], 3, limit=1e12) == 3


def test_too_few_requests_bound_nothing_from_above() -> None:
    bounds = percentile.percentile_bounds([1.0] * 58, 0, percentile=95, confidence=0.95)
    assert bounds.upper is None


def test_the_first_sufficient_number_of_requests_bounds_by_the_maximum() -> None:
    values = [float(v) for v in range(1, 60)]
    bounds = percentile.percentile_bounds(values, 0, percentile=95, confidence=0.95)
    assert bounds.upper == 59.0


def test_requests_that_all_failed_put_the_percentile_beyond_every_latency() -> None:
    bounds = percentile.percentile_bounds([], 100, percentile=95, confidence=0.95)
    assert bounds.lower is None
    assert bounds.upper is None


def test_required_requests_keep_the_share_of_late_ones() -> None:
    n = percentile.required_requests(4, 120, percentile=95, confidence=0.95)
    assert n is not None
    assert binomial.upper_bound(n * 4 / 120, n, confidence=0.95) <= 0.05


def test_no_number_of_requests_decides_a_share_at_what_is_allowed() -> None:
    assert percentile.required_requests(5, 100, percentile=95, confidence=0.95) is None


def test_a_percentile_that_no_number_of_requests_proves_is_an_error() -> None:
    with pytest.raises(ValueError, match="no number of requests"):
        percentile.min_requests(0, percentile=100, confidence=0.95)
