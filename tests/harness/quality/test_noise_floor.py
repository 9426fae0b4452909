"""The share of items that come out differently when the reference is asked again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantgate.errors import MeasurementError
from quantgate.measure import Missing, Scalar
from quantgate.quality.answers import Answer
from quantgate.quality.golden import GoldenSet, load_golden_set
from quantgate.quality.noise_floor import Rerun, floors_of_golden_set, missing_floors
from quantgate.quality.results import metrics_of, write_results
from quantgate.resolution import NoiseFloor

TARGETS = ["a", "b", "c", "d"]


@pytest.fixture
def golden(write_set: Callable[..., Path], text_task: dict[str, Any]) -> GoldenSet:
    lines = [
        {"id": f"i{n}", "input": "x", "target": target, "tags": ["long"] if n < 2 else []}
        for n, target in enumerate(TARGETS)
    ]
    checks = {"validity": [{"type": "non_empty"}]}
    return load_golden_set(write_set(*lines, task=text_task | checks))


def results(golden: GoldenSet, path: Path, outputs: list[str]) -> Path:
    answers = [
        Answer(item_id=item.id, output=output, finish_reason="stop", token_ids=(1,) * len(output))
        for item, output in zip(golden.items, outputs, strict=True)
    ]
    write_results(path, golden, answers)
    return path


def by_metric(floors: list[NoiseFloor]) -> dict[str, float]:
    assert all(isinstance(floor, Scalar) for floor in floors)
    return {floor.metric: floor.value for floor in floors if isinstance(floor, Scalar)}


def test_flips_both_ways_count_and_do_not_cancel(golden: GoldenSet, tmp_path: Path) -> None:
    rerun = Rerun(
        first=results(golden, tmp_path / "1.parquet", ["a", "x", "c", "d"]),
        second=results(golden, tmp_path / "2.parquet", ["x", "b", "c", ""]),  # one token less
    )
    floors = floors_of_golden_set(golden, rerun, source="again")
    assert by_metric(floors) == {
        "quality/small.exact_match": 0.75,
        "quality/small.tag-long.exact_match": 1.0,
        "validity/small.non_empty": 0.25,
        "validity/small.tag-long.non_empty": 0.0,
        "validity/small.output_tokens.ratio": 0.25,
        "validity/small.tag-long.output_tokens.ratio": 0.0,
    }
    assert isinstance(floors[0], Scalar)
    assert floors[0].note.startswith("3 of 4 items of the reference against itself")


def test_a_reference_that_repeats_itself_has_a_floor_of_zero(
    golden: GoldenSet, tmp_path: Path
) -> None:
    one = results(golden, tmp_path / "1.parquet", ["a", "x", "c", "d"])
    floors = floors_of_golden_set(golden, Rerun(first=one, second=one), source="again")
    assert set(by_metric(floors).values()) == {0.0}


def test_other_items_are_an_error(golden: GoldenSet, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    one = results(golden, tmp_path / "1.parquet", TARGETS)
    pq.write_table(pq.read_table(one).slice(1), tmp_path / "2.parquet")
    with pytest.raises(MeasurementError, match="not the items of small"):
        floors_of_golden_set(
            golden, Rerun(first=one, second=tmp_path / "2.parquet"), source="again"
        )


def test_a_rerun_that_failed_leaves_its_reason_under_every_metric(golden: GoldenSet) -> None:
    metrics = [*metrics_of(golden), "quality/kl_nats.mean", "quality/kl_nats.healthy.ratio"]
    floors = {floor.metric: floor for floor in missing_floors(metrics, "it died")}
    assert floors.keys() == {m for m in metrics[:-1] if not m.startswith("divergence/")}
    for floor in floors.values():
        assert isinstance(floor, Missing)
        assert floor.reason == "it died"
