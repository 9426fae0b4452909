"""Per-item results of a golden set: stored as parquet, paired with the reference's, reduced."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from quantgate.errors import MeasurementError
from quantgate.files import write_with
from quantgate.measure import Binomial, Clustered, Measurement, Missing, PairedBinary
from quantgate.quality.answers import Answer
from quantgate.quality.golden import GoldenSet, ValidityCheck
from quantgate.quality.scoring import BINARY_SCORERS, score_items
from quantgate.quality.validity import is_valid
from quantgate.units import slice_of_tag

FloatArray: TypeAlias = npt.NDArray[np.float64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

SCORE = "score."
VALID = "valid."


def check_names(checks: Sequence[ValidityCheck]) -> list[str]:
    """The statistic of each check's metric; a type used twice is numbered."""
    types = [check.type for check in checks]
    return [
        kind if types.count(kind) == 1 else f"{kind}{types[: i + 1].count(kind)}"
        for i, kind in enumerate(types)
    ]


def metrics_of(golden: GoldenSet) -> list[str]:
    """Every metric a golden set yields."""
    scores = [f"quality/{golden.name}.{spec.metric}" for spec in golden.task.metric_list]
    checks = [f"validity/{golden.name}.{name}" for name in check_names(golden.task.validity)]
    return scores + checks


def write_results(path: Path, golden: GoldenSet, answers: Sequence[Answer]) -> None:
    """Scores and checks every answer, and stores one row per item."""
    items = golden.items
    columns: dict[str, list[Any]] = {
        "id": [item.id for item in items],
        "cluster": [item.cluster for item in items],
        "tags": [list(item.tags) for item in items],
        "target": [item.target for item in items],
        "output": [answer.output for answer in answers],
        "finish_reason": [answer.finish_reason for answer in answers],
        "num_tokens": [len(answer.token_ids) for answer in answers],
        "token_ids": [list(answer.token_ids) for answer in answers],
        "choice_log_probs": [list(answer.choice_log_probs) for answer in answers],
        "error": [answer.error for answer in answers],
    }
    if [answer.item_id for answer in answers] != columns["id"]:
        raise MeasurementError(f"{golden.name}: answers are not those of the items, in order.")
    for spec in golden.task.metric_list:
        scores = score_items(spec.metric, columns["output"], columns["target"])
        # No answer is a wrong answer, also where an empty output would equal an empty target.
        columns[SCORE + spec.metric] = [
            0.0 if answer.error else score for answer, score in zip(answers, scores, strict=True)
        ]
    for name, check in zip(check_names(golden.task.validity), golden.task.validity, strict=True):
        columns[VALID + name] = [
            answer.error is None
            and is_valid(check, answer.output, finish_reason=answer.finish_reason)
            for answer in answers
        ]
    table = pa.table(columns).replace_schema_metadata({"scorers": json.dumps(metrics_of(golden))})
    write_with(path, partial(pq.write_table, table))


def count_errors(path: Path) -> tuple[int, int]:
    """(items without an answer, items)."""
    errors = pq.read_table(path, columns=["error"])["error"]
    return len(errors) - errors.null_count, len(errors)


def accuracy_by_scorer(path: Path) -> dict[str, float]:
    """The mean score of one variant on one set, by scorer: for the record, not for judging."""
    table = pq.read_table(path)
    return {
        name.removeprefix(SCORE): float(np.mean(table[name].to_numpy()))
        for name in table.column_names
        if name.startswith(SCORE)
    }


def reduce_golden_set(
    golden: GoldenSet, reference: Path, candidate: Path, *, source: str
) -> list[Measurement]:
    """Pairs two variants' results item by item: over all items, and over those with each tag.

    Raises:
        MeasurementError: the two files do not hold the same items.
    """
    ours, theirs = pq.read_table(candidate), pq.read_table(reference)
    if ours["id"].to_pylist() != theirs["id"].to_pylist():
        raise MeasurementError(f"{candidate}: not the same items as {reference}.")
    num_failed = len(theirs) - theirs["error"].null_count
    if num_failed:
        reason = (
            f"the reference gave no answer to {num_failed} of {len(theirs)} items "
            f"(first: {next(e for e in theirs['error'].to_pylist() if e)})"
        )
        return [Missing(metric=m, reason=reason, source=source) for m in metrics_of(golden)]
    measurements: list[Measurement] = []
    slices = [{slice_of_tag(tag) for tag in item.tags} for item in golden.items]
    parts = [("", np.ones(len(ours), dtype=np.bool_))] + [
        (f".{name}", np.array([name in found for found in slices]))
        for name in sorted(set().union(*slices))
    ]
    clusters = np.asarray(ours["cluster"].to_pylist())
    for spec in golden.task.metric_list:
        column = SCORE + spec.metric
        for part, chosen in parts:
            metric = f"quality/{golden.name}{part}.{spec.metric}"
            pair = theirs[column].to_numpy()[chosen], ours[column].to_numpy()[chosen]
            if spec.metric in BINARY_SCORERS:
                measurements.append(_paired_binary(metric, *pair, source=source))
            else:
                measurements.append(_paired_scores(metric, *pair, clusters[chosen], source=source))
    for name in check_names(golden.task.validity):
        measurements.append(
            _new_failures(
                f"validity/{golden.name}.{name}",
                theirs[VALID + name].to_numpy(zero_copy_only=False),
                ours[VALID + name].to_numpy(zero_copy_only=False),
                source=source,
            )
        )
    return measurements


def missing_golden_set(golden: GoldenSet, reason: str) -> list[Measurement]:
    """Says of every metric of a set why it is not there."""
    return [Missing(metric=metric, reason=reason) for metric in metrics_of(golden)]


def _paired_binary(
    metric: str, reference: FloatArray, candidate: FloatArray, *, source: str
) -> Measurement:
    right, still_right = reference == 1.0, candidate == 1.0
    return PairedBinary(
        metric=metric,
        both=int((right & still_right).sum()),
        reference_only=int((right & ~still_right).sum()),
        candidate_only=int((~right & still_right).sum()),
        neither=int((~right & ~still_right).sum()),
        source=source,
    )


def _paired_scores(
    metric: str,
    reference: FloatArray,
    candidate: FloatArray,
    clusters: FloatArray,
    *,
    source: str,
) -> Measurement:
    _, index = np.unique(clusters, return_inverse=True)
    return Clustered(
        metric=metric,
        unit="1",
        totals=tuple(np.bincount(index, weights=candidate - reference)),
        counts=tuple(int(c) for c in np.bincount(index)),
        paired=True,
        source=source,
    )


def _new_failures(
    metric: str, reference: BoolArray, candidate: BoolArray, *, source: str
) -> Measurement:
    num_valid = int(reference.sum())
    if not num_valid:
        return Missing(metric=metric, reason="no output of the reference is valid", source=source)
    return Binomial(
        metric=metric, events=int((reference & ~candidate).sum()), trials=num_valid, source=source
    )
