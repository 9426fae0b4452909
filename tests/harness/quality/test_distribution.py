"""Reducing a candidate's rows, clustered by document."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quantgate.errors import MeasurementError
from quantgate.measure import Clustered, Measurement, Missing, Scalar
from quantgate.quality.distribution import METRICS, compare_with_reference, reduce_distribution
from quantgate.quality.golden import GoldenItem
from quantgate.quality.rendering import RenderedPrompt

ROWS: dict[str, list[Any]] = {
    "document": ["b", "a", "b"],
    "position": [1, 1, 2],
    "kl_nats": [0.25, 1.0, 0.5],
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
    assert set(found) == set(METRICS)
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


def test_a_candidate_that_cannot_be_scored_fails_with_the_last_lines_of_the_log(
    tmp_path: Path,
) -> None:
    item = GoldenItem(
        id="a", text="x", messages=None, target="", choices=(), tags=(), cluster="a", line=1
    )
    failures = compare_with_reference(
        tmp_path / "no-model",
        {"int8": tmp_path / "int8"},
        [RenderedPrompt(item=item, ids=(1, 2))],
        out={"int8": tmp_path / "int8.parquet"},
        log=tmp_path / "log" / "distribution.log",
        device="cpu",
        dtype="float32",
        threads=1,
        max_tokens=8,
        on_done=lambda _: pytest.fail("nothing was scored"),
    )
    assert "teacher-forced scoring failed (exit 1)" in failures["int8"]
    assert "no-model" in failures["int8"]
