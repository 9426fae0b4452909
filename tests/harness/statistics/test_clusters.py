"""Intervals over clusters: agreement with theory where theory exists, invariants, coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaincc, ndtr, stdtrit

from quantgate.statistics import binomial, clusters
from quantgate.statistics.clusters import NON_NEGATIVE, SCORE_DIFFERENCES, SHARES, UNBOUNDED

PROPERTY = settings(max_examples=20, deadline=None, derandomize=True)

CLUSTERS = st.lists(st.tuples(st.floats(-100, 100), st.integers(1, 500)), min_size=20, max_size=40)
SCORES = st.lists(st.tuples(st.floats(-1, 1), st.integers(1, 9)), min_size=30, max_size=60)
ZERO_ONE = clusters.Support(lowest=0.0, highest=1.0, unseen=1.0)


def normal_clusters(m: int, *, seed: int = 3) -> tuple[list[float], list[int]]:
    values = np.random.default_rng(seed).normal(1.0, 0.5, m)
    return [float(value) * 10 for value in values], [10] * m


@PROPERTY
@given(CLUSTERS)
def test_the_interval_contains_the_estimate(found: list[tuple[float, int]]) -> None:
    totals, counts = zip(*found, strict=True)
    interval = clusters.ratio_interval(totals, counts, confidence=0.95)
    assert interval.lower <= interval.estimate <= interval.upper
    assert interval.estimate == pytest.approx(sum(totals) / sum(counts))


@PROPERTY
@given(SCORES)
def test_an_interval_of_scores_stays_within_what_scores_can_be(
    found: list[tuple[float, int]],
) -> None:
    counts = [count for _, count in found]
    totals = [mean * count for mean, count in found]
    interval = clusters.ratio_interval(totals, counts, confidence=0.99, support=SCORE_DIFFERENCES)
    assert -1 <= interval.lower < interval.upper <= 1


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize(("events", "m"), [(0, 30), (0, 107), (1, 107), (7, 40), (40, 40)])
def test_zero_one_clusters_of_equal_size_give_the_interval_of_clopper_and_pearson(
    events: int, m: int, confidence: float
) -> None:
    totals = [5.0] * events + [0.0] * (m - events)
    interval = clusters.ratio_interval(totals, [5] * m, confidence=confidence, support=ZERO_ONE)
    exact = binomial.share_interval(events, m, confidence=confidence)
    assert interval.lower == pytest.approx(exact.lower, abs=1e-6)
    assert interval.upper == pytest.approx(exact.upper, abs=1e-6)


def test_clusters_without_a_difference_prove_the_rule_of_three_and_no_more() -> None:
    interval = clusters.ratio_interval(
        [0.0] * 107, [4] * 107, confidence=0.95, support=SCORE_DIFFERENCES
    )
    rare = binomial.upper_bound(0, 107, confidence=0.95)
    assert (-interval.lower, interval.upper) == pytest.approx((rare, rare), abs=1e-6)


def test_an_unseen_cluster_of_unequal_ones_is_as_large_as_a_random_item_finds_it() -> None:
    equal = clusters.ratio_interval(
        [0.0] * 100, [2] * 100, confidence=0.95, support=SCORE_DIFFERENCES
    )
    unequal = clusters.ratio_interval(
        [0.0] * 100, [1, 3] * 50, confidence=0.95, support=SCORE_DIFFERENCES
    )
    assert unequal.lower < equal.lower


def test_all_tokens_agreeing_does_not_prove_that_all_ever_will() -> None:
    interval = clusters.ratio_interval([100.0] * 128, [100] * 128, confidence=0.95, support=SHARES)
    assert interval.upper == interval.estimate == 1.0
    assert 1 - interval.lower == pytest.approx(0.1 * 3.0 / 128, rel=0.02)


def test_a_document_may_be_worse_than_the_worst_one_seen() -> None:
    totals = [0.0] * 39 + [400.0]
    interval = clusters.ratio_interval(totals, [100] * 40, confidence=0.95, support=NON_NEGATIVE)
    alone = np.random.default_rng(1).exponential(size=(20_000, 40))
    without = np.quantile(alone[:, -1] * 4 / alone.sum(axis=1), 0.95)
    assert interval.upper > 1.3 * without
    assert interval.lower >= 0


def test_the_interval_widens_with_confidence() -> None:
    data = normal_clusters(40)
    bounds = [clusters.ratio_interval(*data, confidence=c) for c in (0.8, 0.9, 0.95, 0.99)]
    assert [b.upper for b in bounds] == sorted(b.upper for b in bounds)
    assert [b.lower for b in bounds] == sorted((b.lower for b in bounds), reverse=True)


def test_negating_the_totals_mirrors_the_interval() -> None:
    totals, counts = normal_clusters(60)
    one = clusters.ratio_interval(totals, counts, confidence=0.95)
    other = clusters.ratio_interval([-t for t in totals], counts, confidence=0.95)
    assert one.upper == pytest.approx(-other.lower)


def test_the_order_of_the_clusters_does_not_matter() -> None:
    totals, counts = normal_clusters(60)
    one = clusters.ratio_interval(totals, counts, confidence=0.95)
    other = clusters.ratio_interval(totals[::-1], counts, confidence=0.95)
    assert (one.lower, one.upper) == pytest.approx((other.lower, other.upper))


def test_many_normal_clusters_of_equal_size_come_near_to_students_interval() -> None:
    totals, counts = normal_clusters(5000)
    interval = clusters.ratio_interval(totals, counts, confidence=0.95)
    half = stdtrit(4999, 0.95) * np.std(np.divide(totals, counts), ddof=1) / math.sqrt(5000)
    assert half < interval.upper - interval.estimate < 1.06 * half
    assert half < interval.estimate - interval.lower < 1.06 * half


def test_equal_clusters_leave_an_interval_of_width_zero() -> None:
    interval = clusters.ratio_interval([2.0] * 35, [4] * 35, confidence=0.95, support=NON_NEGATIVE)
    assert interval.lower == interval.estimate == interval.upper == 0.5


def test_a_bound_never_crosses_the_estimate() -> None:
    # Forty far below and one huge cluster near: reweighting rarely reaches above the ratio.
    totals, counts = [-100.0] * 40 + [0.0], [1] * 40 + [10**6]
    interval = clusters.ratio_interval(totals, counts, confidence=0.95, support=UNBOUNDED)
    assert interval.lower <= interval.estimate <= interval.upper


def test_tokens_count_by_the_document_they_are_in_not_each_for_itself() -> None:
    totals, counts = normal_clusters(30)
    by_document = clusters.standard_error(totals, counts)
    longer = clusters.standard_error([10 * t for t in totals], [10 * c for c in counts])
    assert longer == pytest.approx(by_document)


def test_unequal_clusters_weigh_like_fewer() -> None:
    assert clusters.num_effective([7] * 40) == pytest.approx(40)
    assert clusters.num_effective([1, 3]) == pytest.approx(1.6)


@pytest.mark.parametrize(
    ("distribution", "support"),
    [("lognormal", NON_NEGATIVE), ("sparse", SCORE_DIFFERENCES), ("t3", UNBOUNDED)],
)
def test_the_bound_misses_the_truth_no_more_often_than_it_says(
    distribution: str, support: clusters.Support
) -> None:
    """1,000 samples give 5 % ± 1.4; `benchmarks/quality.py` has the table."""
    generator = np.random.default_rng(11)
    counts = generator.integers(50, 400, (1000, 50)).astype(float)
    if distribution == "lognormal":
        totals, truth = generator.lognormal(0, 0.8, counts.shape) * counts, math.exp(0.32)
    elif distribution == "sparse":
        totals = np.where(generator.random(counts.shape) < 0.05, -counts, 0.0)
        truth = -0.05
    else:
        totals, truth = generator.standard_t(3, counts.shape) * counts, 0.0
    above = clusters.exceedance(totals, counts, truth, support=support)
    below = clusters.exceedance(-totals, counts, -truth, support=support.mirrored())
    assert np.mean(above <= 0.05) <= 0.06
    assert np.mean(below <= 0.05) <= 0.06


@pytest.mark.parametrize(
    ("coefficients", "shapes", "expected"),
    [
        pytest.param([1.0], [1.0], 1.0, id="one above"),
        pytest.param([-2.0], [1.0], 0.0, id="one below"),
        pytest.param([0.0, 0.0], [1.0, 1.0], 0.0, id="nothing is not positive"),
        pytest.param([1.0, -1.0], [1.0, 1.0], 0.5, id="even"),
        pytest.param([3.0, -1.0], [1.0, 1.0], 0.75, id="three to one"),
        pytest.param([1.0, -1e-7], [1.0, 1e7], math.exp(-1.0), id="one against its mean"),
        pytest.param([1.0, -1e-8], [5.0, 8e8], gammaincc(5, 8), id="gamma against a constant"),
        pytest.param([-1.0, 0.001], [1000.0, 1.0], 0.0, id="beyond any doubt"),
    ],
)
def test_the_chance_of_a_positive_sum_is_that_of_theory(
    coefficients: list[float], shapes: list[float], expected: float
) -> None:
    chance = clusters._positive_sum(np.array(coefficients), np.array(shapes))
    assert float(chance) == pytest.approx(expected, abs=2e-7)


@pytest.mark.parametrize("z", [-4.0, -1.645, 0.5, 3.0, 7.0])
def test_the_chance_of_a_sum_of_many_is_the_normal_one(z: float) -> None:
    m = 10**8
    half = m / 2
    # Half at +1, half at -1, shifted so that the mean is z standard deviations above 0.
    shift = z / math.sqrt(m)
    chance = clusters._positive_sum(np.array([1 + shift, -1 + shift]), np.array([half, half]))
    assert float(chance) == pytest.approx(ndtr(z), abs=1e-5)


def test_required_clusters_are_the_first_that_decide() -> None:
    totals, counts = normal_clusters(40)
    found = clusters.ratio_interval(totals, counts, confidence=0.95)
    limit = (found.estimate + found.upper) / 2
    n = clusters.required_clusters(totals, counts, limit=limit, confidence=0.95)
    assert n is not None
    enough = math.ceil(n / 40)
    more = clusters.ratio_interval(totals * enough, counts * enough, confidence=0.95)
    less = clusters.ratio_interval(totals * (enough - 1), counts * (enough - 1), confidence=0.95)
    assert more.upper <= limit < less.upper


def test_required_clusters_below_a_limit_mirror_those_above_it() -> None:
    totals, counts = normal_clusters(40)
    above = clusters.required_clusters(totals, counts, limit=1.2, confidence=0.95)
    mirrored = clusters.required_clusters([-t for t in totals], counts, limit=-1.2, confidence=0.95)
    assert above == mirrored


def test_required_clusters_without_a_difference_are_those_of_the_rule_of_three() -> None:
    n = clusters.required_clusters(
        [0.0] * 50, [3] * 50, limit=-0.02, confidence=0.95, support=SCORE_DIFFERENCES
    )
    assert n == binomial.trials_without_event(0.02, confidence=0.95) == 149


def test_no_number_of_clusters_decides_an_estimate_at_the_limit() -> None:
    assert clusters.required_clusters([1.0] * 30, [2] * 30, limit=0.5, confidence=0.95) is None


@pytest.mark.parametrize("limit", [1000.0, math.inf, -math.inf])
def test_required_clusters_are_never_below_the_floor(limit: float) -> None:
    n = clusters.required_clusters(*normal_clusters(40), limit=limit, confidence=0.95)
    assert n == clusters.MIN_CLUSTERS


def test_the_detectable_effect_exceeds_the_half_width() -> None:
    totals, counts = normal_clusters(40)
    effect = clusters.smallest_detectable_effect(totals, counts, confidence=0.95)
    assert effect > stdtrit(39, 0.95) * clusters.standard_error(totals, counts)
