"""Reducing a candidate's rows, clustered by document: over all, by position, by tag."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quantgate.errors import MeasurementError
from quantgate.measure import Clustered, ClusteredRatio, Measurement, Missing, Scalar
from quantgate.quality.distribution_results import METRICS, reduce_distribution

ROWS: dict[str, list[Any]] = {
    "document": ["b", "a", "b"],
    "tags": [["long"], [], ["long"]],
    "position": [1, 1, 2],
    "kl_nats": [0.25, 1.0, 0.5],
    "healthy_kl_nats": [0.25, 0.5, 0.25],
    "reference_margin": [0.05, 0.5, 0.11],
    "is_top1_equal": [True, False, True],
    "reference_nll_nats": [1.0, 2.0, 1.0],
    "candidate_nll_nats": [1.5, 2.0, 0.75],
    "is_finite": [True, True, True],
}


def reduce(tmp_path: Path, **changes: list[Any]) -> dict[str, Measurement]:
    path = tmp_path / "distribution.parquet"
    pq.write_table(pa.table(ROWS | changes), path)
    found = reduce_distribution(path, source="s")
    return {measurement.metric: measurement for measurement in found}


def test_sums_and_counts_are_per_document(tmp_path: Path) -> None:
    found = reduce(tmp_path)
    kl = found["quality/kl_nats.mean"]
    agreement = found["quality/top1_agreement.rate"]
    perplexity = found["quality/perplexity.ratio"]
    assert isinstance(kl, Clustered)
    assert isinstance(agreement, Clustered)
    assert isinstance(perplexity, Clustered)
    assert (kl.totals, kl.counts) == ((1.0, 0.75), (1, 2))
    assert (agreement.totals, agreement.counts) == ((0.0, 2.0), (1, 2))
    assert (perplexity.totals, perplexity.counts) == ((0.0, 0.25), (1, 2))
    assert (perplexity.transform, perplexity.paired) == ("exp", True)


def test_every_metric_is_there_with_the_number_of_tokens(tmp_path: Path) -> None:
    found = reduce(tmp_path)
    assert set(found) >= set(METRICS)
    worst = found["quality/kl_nats.p99"]
    assert isinstance(worst, Scalar)
    assert (worst.value, worst.n) == (1.0, 3)


def test_one_position_that_is_not_finite_leaves_only_the_count(tmp_path: Path) -> None:
    found = reduce(tmp_path, is_finite=[True, False, True])
    counted = found.pop("quality/non_finite.count")
    assert isinstance(counted, Scalar)
    assert counted.value == 1
    assert set(found) == set(METRICS) - {counted.metric}
    for measurement in found.values():
        assert isinstance(measurement, Missing)
        assert "1 of 3 positions have non-finite logits" in measurement.reason


def test_no_rows_are_no_measurement(tmp_path: Path) -> None:
    empty = {name: values[:0] for name, values in ROWS.items()}
    with pytest.raises(MeasurementError, match="no tokens were compared"):
        reduce(tmp_path, **empty)


def test_a_perplexity_ratio_of_nothing_but_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finite"):
        reduce(tmp_path, candidate_nll_nats=[math.nan] * 3)


def test_the_tail_says_where_the_largest_divergence_is(tmp_path: Path) -> None:
    worst = reduce(tmp_path)["quality/kl_nats.max"]
    assert isinstance(worst, Scalar)
    assert (worst.value, worst.note) == (1.0, "the largest in a at position 1")


def test_the_tail_is_an_order_statistic_of_the_positions(tmp_path: Path) -> None:
    n = 2000
    rows = {name: [values[0]] * n for name, values in ROWS.items()}
    found = reduce(tmp_path, **(rows | {"kl_nats": [i / n for i in range(n)]}))
    values = {
        name: measured.value
        for name in ("p99", "p999", "max")
        if isinstance(measured := found[f"quality/kl_nats.{name}"], Scalar)
    }
    # The smallest values that 1,980 and 1,998 of the 2,000 do not exceed.
    assert values == {"p99": 1979 / n, "p999": 1997 / n, "max": 1999 / n}


def test_divergence_is_relative_to_the_healthy_twin_on_the_same_documents(tmp_path: Path) -> None:
    ratio = reduce(tmp_path)["quality/kl_nats.healthy.ratio"]
    assert isinstance(ratio, ClusteredRatio)
    assert (ratio.baseline, ratio.candidate) == ((0.5, 0.5), (1.0, 0.75))


def test_a_twin_that_does_not_differ_leaves_nothing_to_be_relative_to(tmp_path: Path) -> None:
    ratio = reduce(tmp_path, healthy_kl_nats=[0.0] * 3)["quality/kl_nats.healthy.ratio"]
    assert isinstance(ratio, Missing)


def test_confident_agreement_leaves_near_ties_out(tmp_path: Path) -> None:
    metric = "quality/top1_agreement.confident.rate"
    agreement = reduce(tmp_path)[metric]
    assert isinstance(agreement, Clustered)
    assert (agreement.totals, agreement.counts) == ((0.0, 1.0), (1, 1))
    assert isinstance(reduce(tmp_path, reference_margin=[0.1] * 3)[metric], Missing)


def test_a_tag_holds_the_documents_that_have_it(tmp_path: Path) -> None:
    found = reduce(tmp_path)
    kl = found["quality/kl_nats.tag-long.mean"]
    assert isinstance(kl, Clustered)
    assert (kl.totals, kl.counts) == ((0.75,), (2,))
    assert "quality/top1_agreement.tag-long.rate" in found


def test_length_buckets_hold_positions_from_their_first_to_the_next(tmp_path: Path) -> None:
    assert not any(".from-" in metric for metric in reduce(tmp_path))
    found = reduce(tmp_path, position=[127, 128, 255])
    first, second = (found[f"quality/kl_nats.from-{start}.mean"] for start in (0, 128))
    assert isinstance(first, Clustered)
    assert isinstance(second, Clustered)
    assert (sum(first.totals), sum(second.totals)) == (0.25, 1.5)


def test_positions_that_are_not_finite_are_counted_by_bucket(tmp_path: Path) -> None:
    found = reduce(tmp_path, position=[5, 300, 301], is_finite=[True, False, False])
    counted = found["quality/non_finite.count"]
    assert isinstance(counted, Scalar)
    assert counted.note == "the first at position 300, in 2 from position 256"
