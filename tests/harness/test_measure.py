"""What may be called a measurement: a number with unit and n, or Missing with a reason."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantgate.measure import (
    Binomial,
    Clustered,
    ClusteredRatio,
    InvalidMeasurement,
    Latencies,
    Missing,
    PairedBinary,
    PairedBlocks,
    Scalar,
    percentile,
)

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)

GOOD: dict[type[Any], dict[str, Any]] = {
    Scalar: {"metric": "memory/peak_bytes.max", "value": 5.0, "unit": "MiB", "n": 3},
    PairedBinary: {
        "metric": "quality/set.exact_match",
        "both": 5,
        "reference_only": 1,
        "candidate_only": 2,
        "neither": 0,
    },
    Clustered: {
        "metric": "quality/kl_nats.mean",
        "unit": "nats",
        "totals": (1.0, 2.0),
        "counts": (10, 20),
    },
    ClusteredRatio: {
        "metric": "quality/kl_nats.healthy.ratio",
        "baseline": (0.5, 0.0),
        "candidate": (0.25, 0.125),
    },
    Binomial: {"metric": "stability/error.rate", "events": 1, "trials": 10},
    PairedBlocks: {
        "metric": "perf/output_tok_per_s.ratio",
        "unit": "tok/s",
        "champion": (10.0, 11.0),
        "candidate": (9.0, 12.0),
    },
    Latencies: {"metric": "perf/e2e_ms.p95", "unit": "ms", "values": (1.0, 2.0), "failed": 1},
}


def build(kind: type[Any], **changes: Any) -> Any:
    return kind(**{"source": "file.parquet", **GOOD[kind], **changes})


@pytest.mark.parametrize(
    ("kind", "n"),
    [
        (Scalar, 3),
        (PairedBinary, 8),
        (Clustered, 2),
        (ClusteredRatio, 2),
        (Binomial, 10),
        (PairedBlocks, 2),
        (Latencies, 3),
    ],
)
def test_every_kind_knows_its_n(kind: type[Any], n: int) -> None:
    assert build(kind).n == n


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (Scalar, "value"),
        (Clustered, "totals"),
        (ClusteredRatio, "baseline"),
        (ClusteredRatio, "candidate"),
        (PairedBlocks, "champion"),
        (PairedBlocks, "candidate"),
        (Latencies, "values"),
    ],
)
def test_what_is_not_a_number_is_refused(kind: type[Any], field: str, bad: float) -> None:
    value = bad if field == "value" else (1.0, bad)
    with pytest.raises(InvalidMeasurement, match=rf"{field}.* is -?(nan|inf); expected a finite"):
        build(kind, **{field: value})


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (Scalar, "n", 0),
        (PairedBinary, "both", -1),
        (PairedBinary, "reference_only", -1),
        (Clustered, "counts", (10, 0)),
        (Binomial, "events", -1),
        (Binomial, "trials", -1),
        (Latencies, "failed", -1),
    ],
)
def test_a_count_below_its_floor_is_refused(kind: type[Any], field: str, value: Any) -> None:
    with pytest.raises(InvalidMeasurement, match=rf"{field}.*expected at least"):
        build(kind, **{field: value})


def test_a_count_that_is_not_whole_is_refused() -> None:
    with pytest.raises(InvalidMeasurement, match=r"events is 1\.5; expected a whole number"):
        build(Binomial, events=1.5)


@pytest.mark.parametrize(
    ("kind", "changes", "noun"),
    [
        (PairedBinary, {"both": 0, "reference_only": 0, "candidate_only": 0}, "items"),
        (Clustered, {"totals": (), "counts": ()}, "clusters"),
        (ClusteredRatio, {"baseline": (), "candidate": ()}, "clusters"),
        (Binomial, {"events": 0, "trials": 0}, "trials"),
        (PairedBlocks, {"champion": (), "candidate": ()}, "blocks"),
        (Latencies, {"values": (), "failed": 0}, "requests"),
    ],
)
def test_nothing_at_all_is_missing_not_a_measurement(
    kind: type[Any], changes: dict[str, Any], noun: str
) -> None:
    with pytest.raises(InvalidMeasurement, match=f"no {noun}; write Missing"):
        build(kind, **changes)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (Clustered, {"counts": (10,)}),
        (ClusteredRatio, {"candidate": (9.0,)}),
        (PairedBlocks, {"candidate": (9.0,)}),
    ],
)
def test_columns_of_unequal_length_are_refused(kind: type[Any], changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidMeasurement, match="unequal length"):
        build(kind, **changes)


@pytest.mark.parametrize("side", ["baseline", "candidate"])
def test_a_sum_below_zero_has_no_ratio(side: str) -> None:
    with pytest.raises(InvalidMeasurement, match=rf"{side}\[1\] is -1; expected 0 or more"):
        build(ClusteredRatio, **{side: (1.0, -1.0)})


def test_a_ratio_to_nothing_is_missing_not_a_measurement() -> None:
    with pytest.raises(InvalidMeasurement, match="the baseline is 0"):
        build(ClusteredRatio, baseline=(0.0, 0.0))


@pytest.mark.parametrize(("events", "trials"), [(11, 10)])
def test_more_events_than_trials_are_refused(events: int, trials: int) -> None:
    with pytest.raises(InvalidMeasurement, match="11 events in 10 trials"):
        build(Binomial, events=events, trials=trials)


def test_as_many_events_as_trials_are_a_measurement() -> None:
    assert build(Binomial, events=10, trials=10).events == 10


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_block_without_a_positive_value_has_no_ratio(value: float) -> None:
    with pytest.raises(InvalidMeasurement, match=r"candidate\[1\] is .*expected more than 0"):
        build(PairedBlocks, candidate=(9.0, value))


def test_requests_that_all_failed_are_a_measurement() -> None:
    assert build(Latencies, values=(), failed=4).n == 4


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (Scalar, {"unit": "ms"}, 'measured in "ms", but its name says size'),
        (Scalar, {"unit": "bytes"}, 'unknown unit "bytes"'),
        (Scalar, {"metric": "memory.max"}, "is not a metric name"),
        (Binomial, {"metric": "quality/kl_nats.mean"}, "its name says nats"),
        (PairedBlocks, {"metric": "perf/e2e_ms.p95"}, "its name says time"),
        (PairedBlocks, {"unit": "tokens"}, 'unknown unit "tokens"'),
        (Clustered, {"transform": "log"}, 'transform is "log"'),
    ],
)
def test_unit_and_name_must_agree(kind: type[Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(kind, **changes)


def test_numpy_values_are_kept_as_plain_numbers() -> None:
    clustered = build(Clustered, totals=np.array([1, 2], np.float32), counts=np.array([3, 4]))
    assert clustered.totals == (1.0, 2.0)
    assert [type(count) for count in clustered.counts] == [int, int]


def test_measurements_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        build(Scalar).value = 6.0


def test_missing_needs_a_reason_and_a_real_metric() -> None:
    assert Missing(metric="stability/oom.count", reason="server died").source is None
    with pytest.raises(InvalidMeasurement, match="needs a reason"):
        Missing(metric="stability/oom.count", reason=" ")
    with pytest.raises(InvalidMeasurement, match="is not a metric name"):
        Missing(metric="oom", reason="server died")


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1.0), (10, 1.0), (10.1, 2.0), (50, 5.0), (95, 10.0), (100, 10.0)]
)
def test_a_percentile_is_the_smallest_value_that_covers_the_share(
    percent: float, expected: float
) -> None:
    assert percentile([float(v) for v in range(10, 0, -1)], percent) == expected


def test_a_percentile_does_not_slip_one_rank_by_rounding() -> None:
    # 0.95 * 260 is 247.00000000000003 in floats.
    assert percentile([float(v) for v in range(1, 261)], 95) == 247.0


def test_a_percentile_on_a_failed_request_is_none() -> None:
    assert percentile([1.0] * 94, 95, num_infinite=6) is None
    assert percentile([1.0] * 95, 95, num_infinite=5) == 1.0


def test_no_observations_have_no_percentile() -> None:
    with pytest.raises(InvalidMeasurement, match="no observations"):
        percentile([], 95)


@pytest.mark.parametrize("percent", [-0.1, 100.1, math.nan])
def test_a_percentile_outside_0_to_100_is_refused(percent: float) -> None:
    with pytest.raises(InvalidMeasurement, match="outside 0–100"):
        percentile([1.0], percent)


@PROPERTY
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.integers(0, 100))
def test_percentiles_agree_with_numpys_inverted_cdf(values: list[float], percent: int) -> None:
    assert percentile(values, percent) == np.percentile(values, percent, method="inverted_cdf")
