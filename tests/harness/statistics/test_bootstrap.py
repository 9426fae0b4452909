"""The cluster bootstrap: invariants, agreement with theory where theory exists, coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import stdtrit

from quantgate.statistics import bootstrap

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)

CLUSTERS = st.lists(st.tuples(st.floats(-100, 100), st.integers(1, 500)), min_size=20, max_size=40)


def normal_clusters(m: int, *, seed: int = 3) -> tuple[list[float], list[int]]:
    values = np.random.default_rng(seed).normal(1.0, 0.5, m)
    return [float(value) * 10 for value in values], [10] * m


@PROPERTY
@given(CLUSTERS)
def test_the_interval_contains_the_estimate(clusters: list[tuple[float, int]]) -> None:
    totals, counts = zip(*clusters, strict=True)
    interval = bootstrap.ratio_interval(totals, counts, confidence=0.95)
    assert interval.lower <= interval.estimate <= interval.upper
    assert interval.estimate == pytest.approx(sum(totals) / sum(counts))


def test_the_interval_widens_with_confidence() -> None:
    data = normal_clusters(40)
    bounds = [bootstrap.ratio_interval(*data, confidence=c) for c in (0.8, 0.9, 0.95, 0.99)]
    assert [b.upper for b in bounds] == sorted(b.upper for b in bounds)
    assert [b.lower for b in bounds] == sorted((b.lower for b in bounds), reverse=True)


def test_the_same_clusters_always_give_the_same_interval() -> None:
    data = normal_clusters(30)
    first = bootstrap.ratio_interval(*data, confidence=0.95)
    assert first == bootstrap.ratio_interval(*data, confidence=0.95)


def test_negating_the_totals_mirrors_the_interval() -> None:
    totals, counts = normal_clusters(60)
    one = bootstrap.ratio_interval(totals, counts, confidence=0.95)
    other = bootstrap.ratio_interval([-t for t in totals], counts, confidence=0.95)
    assert one.upper == pytest.approx(-other.lower, abs=1e-3)


def test_normal_clusters_of_equal_size_give_students_interval() -> None:
    totals, counts = normal_clusters(200)
    interval = bootstrap.ratio_interval(totals, counts, confidence=0.95)
    half = stdtrit(199, 0.95) * np.std(np.divide(totals, counts), ddof=1) / math.sqrt(200)
    assert interval.upper - interval.estimate == pytest.approx(half, rel=0.06)
    assert interval.estimate - interval.lower == pytest.approx(half, rel=0.06)


def test_equal_clusters_leave_an_interval_of_width_zero() -> None:
    interval = bootstrap.ratio_interval([2.0] * 25, [4] * 25, confidence=0.95)
    assert interval.lower == interval.estimate == interval.upper == 0.5


def test_tokens_count_by_the_document_they_are_in_not_each_for_itself() -> None:
    totals, counts = normal_clusters(30)
    by_document = bootstrap.standard_error(totals, counts)
    longer = bootstrap.standard_error([10 * t for t in totals], [10 * c for c in counts])
    assert longer == pytest.approx(by_document)


def test_chunking_covers_every_resample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_CHUNK_DRAWS", 700)
    interval = bootstrap.ratio_interval(*normal_clusters(30), confidence=0.95)
    assert interval.lower < interval.estimate < interval.upper


def test_the_bound_misses_the_truth_about_as_often_as_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bootstrap, "RESAMPLES", 500)
    generator = np.random.default_rng(11)
    missed = 0
    for _ in range(200):
        counts = generator.integers(50, 400, 60)
        totals = generator.lognormal(0, 0.5, 60) * counts
        bounds = bootstrap.ratio_interval(
            totals.tolist(), [int(c) for c in counts], confidence=0.95
        )
        missed += bounds.upper < math.exp(0.125)
    # 5 % nominal: 200 trials give 10 ± 3.1; skewness adds a little.
    assert 2 <= missed <= 22


def test_required_clusters_shrink_the_half_width_to_the_distance() -> None:
    totals, counts = normal_clusters(40)
    estimate = sum(totals) / sum(counts)
    error = bootstrap.standard_error(totals, counts)
    n = bootstrap.required_clusters(totals, counts, limit=estimate + error / 2, confidence=0.95)
    assert n is not None
    spread = error * math.sqrt(40)
    assert stdtrit(n - 1, 0.95) * spread / math.sqrt(n) <= error / 2
    assert stdtrit(n - 2, 0.95) * spread / math.sqrt(n - 1) > error / 2


def test_no_number_of_clusters_decides_an_estimate_at_the_limit() -> None:
    assert bootstrap.required_clusters([1.0] * 20, [2] * 20, limit=0.5, confidence=0.95) is None


def test_required_clusters_are_never_below_the_floor() -> None:
    n = bootstrap.required_clusters(*normal_clusters(40), limit=1000.0, confidence=0.95)
    assert n == bootstrap.MIN_CLUSTERS


def test_the_detectable_effect_exceeds_the_half_width() -> None:
    totals, counts = normal_clusters(40)
    effect = bootstrap.smallest_detectable_effect(totals, counts, confidence=0.95)
    assert effect > stdtrit(39, 0.95) * bootstrap.standard_error(totals, counts)


@pytest.mark.parametrize(("z", "expected"), [(10.0, 1.0), (-10.0, 0.0)])
def test_beyond_the_pole_of_the_acceleration_the_extreme_resample_answers(
    z: float, expected: float
) -> None:
    assert bootstrap._adjusted(0.0, math.copysign(0.2, z), z) == expected
