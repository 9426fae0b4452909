"""The noise floor: how far the reference differs from itself at another batch size and order (A/A).

Items that come out differently, and log-probabilities of the same tokens. What is below the floor
is no property of a variant; `resolution.py` refuses gates that are finer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from quantgate.measure import Clustered, ClusteredRatio, Measurement, Missing, Scalar
from quantgate.quality.completions import Batching
from quantgate.quality.distribution_results import reduce_rows
from quantgate.quality.golden import GoldenSet
from quantgate.quality.results import items_of, reduce_golden_set
from quantgate.quality.rows import SCORE, VALID
from quantgate.quality.scored_tokens import compare_paths, read_scored_tokens
from quantgate.quality.served import reduce_difference
from quantgate.resolution import NoiseFloor, has_noise_floor
from quantgate.units import parse_metric

OTHER_BATCHES = Batching(prompts_per_request=4, requests_in_flight=3, shuffle_seed=1)
"""A fifth of what is in flight otherwise, in no order: other batch mates, other chunks."""
METRICS = tuple(
    f"quality/noise_floor_{noun}.{statistic}"
    for noun in ("kl_nats", "logprob_difference_nats")
    for statistic in ("mean", "max")
)
_ITSELF = "of the reference against itself at another batch size and order"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rerun:
    """Two results of the reference, the second at another batch size and order."""

    first: Path
    second: Path


def floors_of_golden_set(golden: GoldenSet, rerun: Rerun, *, source: str) -> list[NoiseFloor]:
    """The share of items that come out differently, by scorer, check and slice.

    For scores between 0 and 1, the mean difference without its sign; for the ratio of lengths, its
    distance from 1.

    Raises:
        MeasurementError: the two results do not hold the same items.
    """
    first, second = pq.read_table(rerun.first), pq.read_table(rerun.second)
    floors: list[NoiseFloor] = []
    for one in reduce_golden_set(golden, rerun.first, rerun.second, source=source):
        if not has_noise_floor(one.metric):
            continue
        if isinstance(one, Missing | ClusteredRatio):
            floors += _floor_of(one)
            continue
        name = parse_metric(one.metric)
        column = (SCORE if name.section == "quality" else VALID) + name.statistic
        chosen = items_of(golden, name.noun.removeprefix(golden.name))
        values = (t[column].to_numpy(zero_copy_only=False)[chosen] for t in (first, second))
        differences = np.abs(np.subtract(*(v.astype(float) for v in values)))
        num_different, n = np.count_nonzero(differences), len(differences)
        floors.append(
            Scalar(
                metric=one.metric,
                value=float(differences.mean()),
                unit="1",
                n=n,
                note=f"{num_different:,} of {n:,} items {_ITSELF}",
                source=source,
            )
        )
    return floors


def floors_of_distribution(rerun: Rerun, *, source: str) -> list[NoiseFloor]:
    """Distances from no difference, by the metrics of the distribution and of the serving path.

    Raises:
        MeasurementError: the two results are not about the same tokens.
    """
    table = compare_paths(read_scored_tokens(rerun.first), read_scored_tokens(rerun.second))
    measured = [
        *reduce_rows(table, source=source),
        *reduce_difference(table, "served", source=source),
    ]
    return [floor for one in measured for floor in _floor_of(one)]


def missing_floors(metrics: Iterable[str], reason: str) -> list[NoiseFloor]:
    """Says of every metric that has a floor why it has none now."""
    return [Missing(metric=metric, reason=reason) for metric in metrics if has_noise_floor(metric)]


def reduce_noise(rerun: Rerun, *, source: str) -> list[Measurement]:
    """The floor as measurements of its own, for gates on it."""
    table = compare_paths(read_scored_tokens(rerun.first), read_scored_tokens(rerun.second))
    return reduce_difference(table, "noise_floor", source=source)


def _floor_of(measured: Measurement) -> Iterable[NoiseFloor]:
    if not has_noise_floor(measured.metric):
        return
    if isinstance(measured, Scalar):
        yield replace(measured, note=_ITSELF)
    elif isinstance(measured, Clustered):
        mean = math.fsum(measured.totals) / sum(measured.counts)
        if measured.transform == "exp":
            distance = abs(math.expm1(mean))
        else:
            distance = 1.0 - mean if measured.unit == "1" else mean
        yield Scalar(
            metric=measured.metric,
            value=distance,
            unit=measured.unit,
            n=sum(measured.counts),
            note=f"over {measured.n:,} documents, {_ITSELF}",
            source=measured.source,
        )
    elif isinstance(measured, ClusteredRatio):
        yield Scalar(
            metric=measured.metric,
            value=abs(math.fsum(measured.candidate) / math.fsum(measured.baseline) - 1),
            unit="x",
            n=measured.n,
            note=f"over {measured.n:,} clusters, {_ITSELF}",
            source=measured.source,
        )
    elif isinstance(measured, Missing):
        yield measured
