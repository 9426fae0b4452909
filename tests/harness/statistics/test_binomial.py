"""Clopper-Pearson bounds against published values, the definition, and each other."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import bdtr, bdtrc

from quantgate.statistics import binomial

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)

COUNTS = st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
CONFIDENCES = st.floats(0.6, 0.999)


def test_no_events_leave_the_lower_bound_at_exactly_zero() -> None:
    assert binomial.share_interval(0, 50, confidence=0.95).lower == 0.0


def test_nothing_but_events_leave_the_upper_bound_at_exactly_one() -> None:
    assert binomial.share_interval(50, 50, confidence=0.95).upper == 1.0


@pytest.mark.parametrize(
    ("events", "n", "lower", "upper"),
    # 95 % two-sided intervals, R: binom.test(x, n)$conf.int
    [(5, 10, 0.187086, 0.812914), (1, 20, 0.001265, 0.248733), (0, 20, 0.0, 0.168433)],
)
def test_two_sided_intervals_agree_with_r(events: int, n: int, lower: float, upper: float) -> None:
    interval = binomial.share_interval(events, n, confidence=0.975)
    assert (interval.lower, interval.upper) == pytest.approx((lower, upper), abs=1e-5)


@PROPERTY
@given(COUNTS, CONFIDENCES)
def test_the_interval_contains_the_estimate(counts: tuple[int, int], confidence: float) -> None:
    interval = binomial.share_interval(*counts, confidence=confidence)
    assert 0 <= interval.lower <= interval.estimate <= interval.upper <= 1


@PROPERTY
@given(COUNTS, CONFIDENCES)
def test_the_interval_widens_with_confidence(counts: tuple[int, int], confidence: float) -> None:
    narrow = binomial.share_interval(*counts, confidence=confidence)
    wide = binomial.share_interval(*counts, confidence=(1 + confidence) / 2)
    assert wide.lower <= narrow.lower
    assert wide.upper >= narrow.upper


@PROPERTY
@given(COUNTS, CONFIDENCES)
def test_counting_the_other_outcome_mirrors_the_interval(
    counts: tuple[int, int], confidence: float
) -> None:
    events, n = counts
    one = binomial.share_interval(events, n, confidence=confidence)
    other = binomial.share_interval(n - events, n, confidence=confidence)
    assert one.lower == pytest.approx(1 - other.upper, abs=1e-9)


@PROPERTY
@given(COUNTS, CONFIDENCES)
def test_each_bound_is_where_its_tail_has_the_stated_probability(
    counts: tuple[int, int], confidence: float
) -> None:
    events, n = counts
    interval = binomial.share_interval(events, n, confidence=confidence)
    if events < n:
        assert bdtr(events, n, interval.upper) == pytest.approx(1 - confidence, abs=1e-6)
    if events > 0:
        assert bdtrc(events - 1, n, interval.lower) == pytest.approx(1 - confidence, abs=1e-6)


@pytest.mark.parametrize(("limit", "trials"), [(0.01, 299), (0.006, 498), (0.003, 998)])
def test_the_rule_of_three_in_its_exact_form(limit: float, trials: int) -> None:
    assert binomial.trials_without_event(limit, confidence=0.95) == trials
    assert binomial.upper_bound(0, trials, confidence=0.95) <= limit
    assert binomial.upper_bound(0, trials - 1, confidence=0.95) > limit


def test_required_trials_of_a_good_share_are_the_fewest_that_prove_it() -> None:
    n = binomial.required_trials(2, 400, limit=0.01, confidence=0.95)
    assert n is not None
    assert binomial.upper_bound(0.005 * n, n, confidence=0.95) <= 0.01
    assert binomial.upper_bound(0.005 * (n - 1), n - 1, confidence=0.95) > 0.01


def test_required_trials_of_a_bad_share_are_the_fewest_that_prove_it() -> None:
    n = binomial.required_trials(6, 400, limit=0.01, confidence=0.95)
    assert n is not None
    assert n > 400
    assert binomial.lower_bound(0.015 * n, n, confidence=0.95) > 0.01


def test_no_number_of_trials_decides_a_share_exactly_at_the_limit() -> None:
    assert binomial.required_trials(4, 400, limit=0.01, confidence=0.95) is None


def test_a_share_next_to_the_limit_needs_more_than_can_be_named() -> None:
    assert binomial.required_trials(1, 3, limit=1 / 3 + 1e-9, confidence=0.95) is None


def test_the_detectable_excess_shrinks_with_the_root_of_n() -> None:
    few = binomial.smallest_detectable_excess(100, limit=0.01, confidence=0.95)
    many = binomial.smallest_detectable_excess(10_000, limit=0.01, confidence=0.95)
    assert few == pytest.approx(10 * many)
