"""What a chart of the record shows of a measurement."""

from __future__ import annotations

from typing import Any

import pytest

from quantgate.measure import (
    Binomial,
    Clustered,
    Latencies,
    Missing,
    PairedBinary,
    PairedBlocks,
    Scalar,
)
from quantgate.recorded_metrics import metrics_of


@pytest.mark.parametrize(
    ("measurement", "expected"),
    [
        (
            Scalar(metric="memory/peak_bytes.max", source="f", value=7, unit="B", n=1),
            {"memory/peak_bytes.max": 7.0},
        ),
        (
            PairedBinary(
                metric="quality/a.exact_match",
                source="f",
                both=6,
                reference_only=3,
                candidate_only=1,
                neither=0,
            ),
            {"quality/a.exact_match": 0.7, "quality/a.exact_match.drop": 0.2},
        ),
        (
            Binomial(metric="stability/error.rate", source="f", events=1, trials=4),
            {"stability/error.rate": 0.25},
        ),
        (
            Clustered(
                metric="quality/perplexity.ratio",
                source="f",
                unit="x",
                totals=(0.0, 0.0),
                counts=(1, 3),
                transform="exp",
                paired=True,
            ),
            {"quality/perplexity.ratio": 1.0},
        ),
        (
            PairedBlocks(
                metric="perf/output_tok_per_s.ratio",
                source="f",
                unit="tok/s",
                champion=(1.0, 4.0),
                candidate=(2.0, 2.0),
            ),
            {"perf/output_tok_per_s.ratio": 1.0},
        ),
        (
            Latencies(metric="perf/e2e_ms.p95", source="f", unit="ms", values=(1.0,), failed=1),
            {},
        ),
        (Missing(metric="perf/e2e_ms.p95", reason="the server died"), {}),
    ],
    ids=["scalar", "paired binary", "binomial", "clustered", "blocks", "failed p95", "missing"],
)
def test_a_chart_shows_a_number_only_where_there_is_one(
    measurement: Any, expected: dict[str, float]
) -> None:
    assert dict(metrics_of(measurement)) == pytest.approx(expected)
