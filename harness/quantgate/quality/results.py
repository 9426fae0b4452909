"""Per-item results of a golden set: stored as parquet, paired with the reference's, reduced."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from quantgate.quality.divergence import SAME_RATE, SHARED_TOKENS, divergence
from quantgate.quality.golden import GoldenSet
from quantgate.quality.lengths import STATISTIC as LENGTH_RATIO
from quantgate.quality.lengths import length_ratio
from quantgate.quality.rows import SCORE, VALID, check_names, tabulate
from quantgate.quality.scoring import BINARY_SCORERS
from quantgate.units import parse_metric, slice_of_tag

FloatArray: TypeAlias = npt.NDArray[np.float64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

_STOP_KEY = "quantgate.early_stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyStop:
    """Why a file of results does not hold every item of its set."""

    num_asked: int
    num_items: int
    metrics: tuple[str, ...]
    """Those of the sequential gates that had failed; nothing else is judged on a part."""
    seconds_saved: float
    """Estimated: as if the others had taken as long as those that were asked."""

    def __str__(self) -> str:
        return (
            f"stopped early at {self.num_asked:,} of {self.num_items:,} items, which saved about "
            f"{self.seconds_saved:.0f} s"
        )


def metrics_of(golden: GoldenSet) -> list[str]:
    """Every metric a golden set yields, over all items and over those with each tag."""
    task = golden.task
    checks = check_names(task.validity)
    if task.output_type == "generate_until":
        checks.append(LENGTH_RATIO)
    metrics = []
    for part in ("", *slices_of(golden)):
        metrics += [f"quality/{golden.name}{part}.{spec.metric}" for spec in task.metric_list]
        metrics += [f"validity/{golden.name}{part}.{name}" for name in checks]
    if task.output_type == "generate_until":
        metrics += [f"divergence/{golden.name}.{name}" for name in (SAME_RATE, SHARED_TOKENS)]
    return metrics


def slices_of(golden: GoldenSet) -> list[str]:
    """What ends the noun of each slice's metrics: `.tag-long` for items with the tag `long`."""
    return sorted({f".{slice_of_tag(tag)}" for item in golden.items for tag in item.tags})


def items_of(golden: GoldenSet, part: str) -> BoolArray:
    """The items that a slice's metrics are about; all of them for an empty `part`."""
    slices = [{f".{slice_of_tag(tag)}" for tag in item.tags} for item in golden.items]
    return np.array([not part or part in found for found in slices])


def write_results(
    path: Path, golden: GoldenSet, answers: Sequence[Answer], *, stop: EarlyStop | None = None
) -> None:
    """Scores and checks every answer, and stores one row per item.

    Args:
        golden: the items that were asked; not all of the set's where there is a `stop`.
    """
    table = tabulate(golden, answers)
    if stop is not None:
        table = table.replace_schema_metadata({_STOP_KEY: json.dumps(asdict(stop))})
    write_with(path, partial(pq.write_table, table))


def read_stop(path: Path) -> EarlyStop | None:
    """Where asking ended; None for results of every item."""
    return _stop_in(pq.read_schema(path))


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

    Of a candidate that was stopped early only what stopped it has a number.

    Raises:
        MeasurementError: a file does not hold the set's items.
    """
    stop = read_stop(candidate)
    if stop is not None:
        return _reduce_part(golden, reference, candidate, stop, source=source)
    ours, theirs = _read_rows(candidate, golden), _read_rows(reference, golden)
    num_failed = len(theirs) - theirs["error"].null_count
    if num_failed:
        reason = (
            f"the reference gave no answer to {num_failed} of {len(theirs)} items "
            f"(first: {next(e for e in theirs['error'].to_pylist() if e)})"
        )
        return [Missing(metric=m, reason=reason, source=source) for m in metrics_of(golden)]
    pair = _Pair(golden, theirs, ours, source)
    measurements: list[Measurement] = []
    for part in ("", *slices_of(golden)):
        measurements += pair.of(part, items_of(golden, part))
    if golden.task.output_type == "generate_until":
        measurements += pair.divergence()
    return measurements


def _read_rows(path: Path, golden: GoldenSet) -> pa.Table:
    """The rows in the order of the set's items: a lock allows the items in any order."""
    table = pq.read_table(path)
    ids = table["id"].to_pylist()
    rows = {item_id: row for row, item_id in enumerate(ids)}
    wanted = [item.id for item in golden.items]
    if len(ids) != len(wanted) or rows.keys() != set(wanted):
        raise MeasurementError(f"{path}: not the items of {golden.name}.")
    return table.take([rows[item_id] for item_id in wanted])


def measure_part(
    part: GoldenSet,
    reference: pa.Table,
    candidate: pa.Table,
    metrics: Sequence[str],
    *,
    source: str = "",
) -> dict[str, Measurement]:
    """The named scores over a part of the items; one whose slice has no item yet is left out.

    Raises:
        MeasurementError: the reference's results lack an item.
    """
    rows = {item_id: row for row, item_id in enumerate(reference["id"].to_pylist())}
    try:
        wanted = [rows[item_id] for item_id in candidate["id"].to_pylist()]
    except KeyError as error:
        raise MeasurementError(f"the reference was not asked item {error}.") from error
    pair = _Pair(part, reference.take(wanted), candidate, source)
    measured = {}
    for metric in metrics:
        name = parse_metric(metric)
        chosen = items_of(part, name.noun.removeprefix(part.name))
        if chosen.any():
            measured[metric] = pair.score(metric, name.statistic, chosen)
    return measured


def _reduce_part(
    golden: GoldenSet, reference: Path, candidate: Path, stop: EarlyStop, *, source: str
) -> list[Measurement]:
    asked = set(pq.read_table(candidate, columns=["id"])["id"].to_pylist())
    part = replace(golden, items=tuple(item for item in golden.items if item.id in asked))
    ours = _read_rows(candidate, part)
    found = measure_part(part, pq.read_table(reference), ours, stop.metrics, source=source)
    others = f"{stop}; its sequential gates had failed, and nothing else is judged on a part"
    return [
        replace(measured, early_stop=str(stop))
        if isinstance(measured := found.get(metric), PairedBinary)
        else Missing(metric=metric, reason=others, source=source)
        for metric in metrics_of(golden)
    ]


def _stop_in(schema: pa.Schema) -> EarlyStop | None:
    metadata: Mapping[bytes, bytes] = schema.metadata or {}
    text = metadata.get(_STOP_KEY.encode())
    if text is None:
        return None
    fields = json.loads(text)
    return EarlyStop(**fields | {"metrics": tuple(fields["metrics"])})


def missing_golden_set(golden: GoldenSet, reason: str) -> list[Measurement]:
    """Says of every metric of a set why it is not there."""
    return [Missing(metric=metric, reason=reason) for metric in metrics_of(golden)]


class _Pair:
    """Both arms' tables, row by row the same items."""

    def __init__(
        self, golden: GoldenSet, reference: pa.Table, candidate: pa.Table, source: str
    ) -> None:
        self._golden = golden
        self._reference = reference
        self._candidate = candidate
        self._source = source
        self._clusters = np.asarray(candidate["cluster"].to_pylist())

    def of(self, part: str, chosen: BoolArray) -> Iterator[Measurement]:
        """Scores, validity and lengths of some items; `part` names them, empty for all."""
        name, task = f"{self._golden.name}{part}", self._golden.task
        for spec in task.metric_list:
            yield self.score(f"quality/{name}.{spec.metric}", spec.metric, chosen)
        for check in check_names(task.validity):
            yield self._new_failures(
                f"validity/{name}.{check}", *self._columns(VALID + check, chosen)
            )
        if task.output_type == "generate_until":
            yield length_ratio(
                f"validity/{name}.{LENGTH_RATIO}",
                *self._columns("num_tokens", chosen),
                self._clusters[chosen].tolist(),
                source=self._source,
            )

    def score(self, metric: str, scorer: str, chosen: BoolArray) -> Measurement:
        reference, candidate = self._columns(SCORE + scorer, chosen)
        if scorer in BINARY_SCORERS:
            return self._paired_binary(metric, reference == 1.0, candidate == 1.0)
        return self._paired_scores(metric, candidate - reference, chosen)

    def divergence(self) -> list[Measurement]:
        return divergence(
            self._golden.name,
            self._reference["token_ids"].to_pylist(),
            self._candidate["token_ids"].to_pylist(),
            source=self._source,
        )

    def _columns(self, name: str, chosen: BoolArray) -> tuple[Any, Any]:
        arms = (self._reference, self._candidate)
        first, second = (arm[name].to_numpy(zero_copy_only=False)[chosen] for arm in arms)
        return first, second

    def _paired_binary(self, metric: str, right: BoolArray, still_right: BoolArray) -> Measurement:
        return PairedBinary(
            metric=metric,
            both=int((right & still_right).sum()),
            reference_only=int((right & ~still_right).sum()),
            candidate_only=int((~right & still_right).sum()),
            neither=int((~right & ~still_right).sum()),
            source=self._source,
        )

    def _paired_scores(
        self, metric: str, differences: FloatArray, chosen: BoolArray
    ) -> Measurement:
        _, index = np.unique(self._clusters[chosen], return_inverse=True)
        return Clustered(
            metric=metric,
            unit="1",
            totals=tuple(np.bincount(index, weights=differences)),
            counts=tuple(int(c) for c in np.bincount(index)),
            paired=True,
            source=self._source,
        )

    def _new_failures(self, metric: str, reference: BoolArray, candidate: BoolArray) -> Measurement:
        num_valid = int(reference.sum())
        if not num_valid:
            reason = "no output of the reference is valid"
            return Missing(metric=metric, reason=reason, source=self._source)
        return Binomial(
            metric=metric,
            events=int((reference & ~candidate).sum()),
            trials=num_valid,
            source=self._source,
        )
