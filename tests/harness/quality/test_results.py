"""From two variants' answers to paired measurements."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from quantgate.errors import MeasurementError
from quantgate.measure import (
    Binomial,
    Clustered,
    ClusteredRatio,
    Measurement,
    Missing,
    PairedBinary,
)
from quantgate.quality.answers import Answer
from quantgate.quality.golden import GoldenSet, load_golden_set
from quantgate.quality.results import (
    accuracy_by_scorer,
    count_errors,
    metrics_of,
    missing_golden_set,
    reduce_golden_set,
    write_results,
)

WriteSet = Callable[..., Path]
CHECKS = {"validity": [{"type": "regex", "pattern": "[0-9]"}, {"type": "finished"}]}


@pytest.fixture
def golden(write_set: WriteSet, text_task: dict[str, Any]) -> GoldenSet:
    lines = [{"id": f"i{n}", "input": "q", "target": str(n)} for n in range(4)]
    return load_golden_set(write_set(*lines, task=text_task | CHECKS))


@pytest.fixture
def reduce(golden: GoldenSet, tmp_path: Path) -> Callable[..., dict[str, Measurement]]:
    def run(
        reference: Sequence[str | None], candidate: Sequence[str | None]
    ) -> dict[str, Measurement]:
        write_results(tmp_path / "r.parquet", golden, answers(golden, reference))
        write_results(tmp_path / "c.parquet", golden, answers(golden, candidate))
        reduced = reduce_golden_set(
            golden, tmp_path / "r.parquet", tmp_path / "c.parquet", source="c.parquet"
        )
        return {measurement.metric: measurement for measurement in reduced}

    return run


def answers(golden: GoldenSet, outputs: Sequence[str | None]) -> list[Answer]:
    """None is an item without an answer."""
    return [
        Answer(item_id=item.id, output="", finish_reason="error", error="HTTP 500: no")
        if output is None
        else Answer(item_id=item.id, output=output, finish_reason="stop", token_ids=(1,))
        for item, output in zip(golden.items, outputs, strict=True)
    ]


def test_items_are_paired_into_four_counts(
    reduce: Callable[..., dict[str, Measurement]],
) -> None:
    found = reduce(["0", "1", "x", "x"], ["0", "x", "2", "x"])
    assert found["quality/small.exact_match"] == PairedBinary(
        metric="quality/small.exact_match",
        source="c.parquet",
        both=1,
        reference_only=1,
        candidate_only=1,
        neither=1,
    )


def test_an_item_the_candidate_did_not_answer_is_wrong_and_invalid(
    reduce: Callable[..., dict[str, Measurement]],
) -> None:
    found = reduce(["0", "1", "2", "3"], ["0", "1", None, None])
    scored = found["quality/small.exact_match"]
    assert isinstance(scored, PairedBinary)
    assert (scored.both, scored.reference_only) == (2, 2)
    valid = found["validity/small.regex"]
    assert isinstance(valid, Binomial)
    assert (valid.events, valid.trials) == (2, 4)


def test_an_item_the_reference_did_not_answer_leaves_nothing_to_compare(
    reduce: Callable[..., dict[str, Measurement]], golden: GoldenSet
) -> None:
    found = reduce(["0", None, "2", "3"], ["0", "1", "2", "3"])
    assert found.keys() == set(metrics_of(golden))
    for measurement in found.values():
        assert isinstance(measurement, Missing)
        assert "no answer to 1 of 4 items (first: HTTP 500: no)" in measurement.reason


def test_validity_counts_only_items_on_which_the_reference_is_valid(
    reduce: Callable[..., dict[str, Measurement]],
) -> None:
    # The candidate is invalid on items 1, 2 and 3; the reference already on 3.
    valid = reduce(["0", "1", "2", "x"], ["0", "x", "x", "x"])["validity/small.regex"]
    assert isinstance(valid, Binomial)
    assert (valid.events, valid.trials) == (2, 3)


def test_a_reference_that_is_never_valid_has_no_rate(
    reduce: Callable[..., dict[str, Measurement]],
) -> None:
    found = reduce(["x"] * 4, ["0", "1", "2", "3"])["validity/small.regex"]
    assert isinstance(found, Missing)
    assert "no output of the reference is valid" in found.reason


def test_a_fractional_score_is_a_difference_per_cluster(
    write_set: WriteSet, text_task: dict[str, Any], tmp_path: Path
) -> None:
    target = '{"a": 1, "b": 2}'
    lines = [
        {"id": f"i{n}", "input": "q", "target": target, "cluster": cluster}
        for n, cluster in enumerate(("one", "two", "one"))
    ]
    task = text_task | {"metric_list": [{"metric": "json_fields"}]}
    small = load_golden_set(write_set(*lines, task=task))
    half = '{"a": 1, "b": 0}'
    for name, outputs in (("r", [target, target, half]), ("c", [half, target, "no"])):
        write_results(tmp_path / f"{name}.parquet", small, answers(small, outputs))
    found, *_ = reduce_golden_set(
        small, tmp_path / "r.parquet", tmp_path / "c.parquet", source="c.parquet"
    )
    assert isinstance(found, Clustered)
    assert found.paired
    assert (found.totals, found.counts) == ((-1.0, 0.0), (2, 1))


def test_two_checks_of_one_type_are_numbered(
    write_set: WriteSet, text_task: dict[str, Any]
) -> None:
    checks = [{"type": "regex", "pattern": p} for p in ("a", "b")]
    task = text_task | {"validity": [*checks, {"type": "non_empty"}]}
    small = load_golden_set(write_set({"id": "a", "input": "q", "target": "x"}, task=task))
    assert [m for m in metrics_of(small) if "ratio" not in m and m.startswith("validity")] == [
        "validity/small.regex1",
        "validity/small.regex2",
        "validity/small.non_empty",
    ]


def test_answers_to_other_items_are_refused(golden: GoldenSet, tmp_path: Path) -> None:
    swapped = answers(golden, ["0", "1", "2", "3"])[::-1]
    with pytest.raises(MeasurementError, match="answers are not those of the items"):
        write_results(tmp_path / "r.parquet", golden, swapped)
    assert list(tmp_path.glob("*.parquet")) == []


def test_items_are_paired_by_their_id_in_whatever_order_they_were_asked(
    golden: GoldenSet, tmp_path: Path
) -> None:
    backwards = dataclasses.replace(golden, items=golden.items[::-1])
    write_results(tmp_path / "r.parquet", golden, answers(golden, ["0", "1", "x", "x"]))
    write_results(tmp_path / "c.parquet", backwards, answers(backwards, ["x", "2", "x", "0"]))
    for one in (golden, backwards):
        found, *_ = reduce_golden_set(
            one, tmp_path / "r.parquet", tmp_path / "c.parquet", source="c.parquet"
        )
        assert isinstance(found, PairedBinary)
        counts = (found.both, found.reference_only, found.candidate_only, found.neither)
        assert counts == (1, 1, 1, 1)


def test_results_of_other_items_are_not_paired(
    golden: GoldenSet, write_set: WriteSet, tmp_path: Path
) -> None:
    write_results(tmp_path / "r.parquet", golden, answers(golden, ["0", "1", "2", "3"]))
    other = load_golden_set(write_set({"id": "z", "input": "q", "target": "x"}))
    write_results(tmp_path / "c.parquet", other, answers(other, ["x"]))
    with pytest.raises(MeasurementError, match="not the items of small"):
        reduce_golden_set(golden, tmp_path / "r.parquet", tmp_path / "c.parquet", source="s")


def test_errors_and_accuracy_are_counted_over_all_items(golden: GoldenSet, tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    write_results(path, golden, answers(golden, ["0", "x", None, "3"]))
    assert count_errors(path) == (1, 4)
    assert accuracy_by_scorer(path) == {"exact_match": 0.5}


def test_a_set_that_was_not_measured_says_so_of_every_metric(golden: GoldenSet) -> None:
    missing = missing_golden_set(golden, "the server died")
    assert [m.metric for m in missing] == metrics_of(golden)


def test_items_with_a_tag_are_a_slice_of_their_own(
    write_set: WriteSet, text_task: dict[str, Any], tmp_path: Path
) -> None:
    lines: list[dict[str, Any]] = [
        {"id": f"i{n}", "input": "q", "target": str(n), "tags": ["noise:typo"] if n < 2 else []}
        for n in range(5)
    ]
    checked = text_task | {"validity": [{"type": "regex", "pattern": "[0-9]"}]}
    tagged = load_golden_set(write_set(*lines, task=checked))
    for name, outputs in (("r", "01234"), ("c", "0x234")):
        write_results(tmp_path / f"{name}.parquet", tagged, answers(tagged, list(outputs)))
    reduced = reduce_golden_set(
        tagged, tmp_path / "r.parquet", tmp_path / "c.parquet", source="c.parquet"
    )
    assert [m.metric for m in reduced] == metrics_of(tagged)
    found = {m.metric: (m.n, m.reference_only) for m in reduced if isinstance(m, PairedBinary)}
    assert found == {
        "quality/small.exact_match": (5, 1),
        "quality/small.tag-noise-typo.exact_match": (2, 1),
    }
    invalid = {m.metric: (m.events, m.trials) for m in reduced if isinstance(m, Binomial)}
    assert invalid == {
        "validity/small.regex": (1, 5),
        "validity/small.tag-noise-typo.regex": (1, 2),
        "divergence/small.same_answer.rate": (5, 5),
    }
    lengths = {m.metric: m.n for m in reduced if isinstance(m, ClusteredRatio)}
    assert lengths == {
        "validity/small.output_tokens.ratio": 5,
        "validity/small.tag-noise-typo.output_tokens.ratio": 2,
    }
