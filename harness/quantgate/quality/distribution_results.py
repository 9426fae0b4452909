"""From the teacher's rows to measurements: over all tokens, by position, by tag, against the twin.

Slices are named in the noun: `quality/kl_nats.from-256.mean` holds positions 256 to 511,
`quality/kl_nats.tag-invoice.mean` the documents with the tag `invoice`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from quantgate.errors import MeasurementError
from quantgate.measure import Clustered, ClusteredRatio, Measurement, Missing, Scalar, percentile
from quantgate.units import slice_of_tag

BoolArray: TypeAlias = npt.NDArray[np.bool_]

METRICS = (
    "quality/kl_nats.mean",
    "quality/kl_nats.p99",
    "quality/kl_nats.p999",
    "quality/kl_nats.max",
    "quality/kl_nats.healthy.ratio",
    "quality/top1_agreement.rate",
    "quality/top1_agreement.confident.rate",
    "quality/perplexity.ratio",
    "quality/non_finite.count",
)
"""Of every variant; slices come on top."""
CONFIDENT_MARGIN = 0.1
"""Where the reference prefers its first choice by this much, a change of it is no near-tie."""
BUCKETS = (0, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768)
"""First positions of the length buckets."""


def reduce_distribution(path: Path, *, source: str) -> list[Measurement]:
    """Reduces one candidate's rows, clustered by document.

    Raises:
        MeasurementError: the file holds no rows.
    """
    table = pq.read_table(path)
    if table.num_rows == 0:
        raise MeasurementError(f"{path}: no tokens were compared.")
    return reduce_rows(table, source=source)


def reduce_rows(table: pa.Table, *, source: str) -> list[Measurement]:
    """The same, of rows in memory; at least one."""
    rows = _Rows(table, source)
    bad = rows.positions[~rows.is_finite]
    first = f"the first at position {bad.min()}, in {rows.bad_buckets()}" if len(bad) else ""
    counted = Scalar(
        metric="quality/non_finite.count", value=len(bad), unit="count", n=table.num_rows,
        note=first, source=source,
    )  # fmt: skip
    if len(bad):
        reason = f"{len(bad)} of {table.num_rows} positions have non-finite logits, {first}"
        others = [m for m in METRICS if m != counted.metric]
        return [counted, *(Missing(metric=m, reason=reason, source=source) for m in others)]
    return [
        *rows.of("", rows.all),
        *rows.worst(),
        rows.against_healthy(),
        rows.confident_agreement(),
        rows.perplexity(),
        counted,
        *rows.by_position(),
        *rows.by_tag(),
    ]


class _Rows:
    """The teacher's columns as arrays."""

    def __init__(self, table: pa.Table, source: str) -> None:
        self.source = source
        self.all = np.ones(table.num_rows, dtype=np.bool_)
        self.kl = table["kl_nats"].to_numpy()
        self.healthy_kl = table["healthy_kl_nats"].to_numpy()
        self.agrees = table["is_top1_equal"].to_numpy()
        self.margin = table["reference_margin"].to_numpy()
        self.nll = table["candidate_nll_nats"].to_numpy() - table["reference_nll_nats"].to_numpy()
        self.is_finite = table["is_finite"].to_numpy()
        self.positions = table["position"].to_numpy()
        self.documents = np.asarray(table["document"].to_pylist())
        self._tags = table["tags"].to_pylist()

    def of(self, part: str, chosen: BoolArray) -> list[Measurement]:
        """KL and agreement of some rows; `part` names them, empty for all."""
        return [
            self._clustered(f"quality/kl_nats{part}.mean", self.kl, chosen, unit="nats"),
            # Tokens of one document are not independent, so agreement is clustered like KL.
            self._clustered(f"quality/top1_agreement{part}.rate", self.agrees, chosen, unit="1"),
        ]

    def worst(self) -> list[Measurement]:
        """The tail, where a fault in few positions or few directions shows first."""
        tails = {
            name: value
            for name, percent in (("p99", 99.0), ("p999", 99.9), ("max", 100.0))
            if (value := percentile(self.kl.tolist(), percent)) is not None
        }
        at = int(self.kl.argmax())
        where = f"the largest in {self.documents[at]} at position {self.positions[at]}"
        return [
            Scalar(
                metric=f"quality/kl_nats.{name}", value=value, unit="nats", n=len(self.kl),
                note=where, source=self.source,
            )
            for name, value in tails.items()
        ]  # fmt: skip

    def against_healthy(self) -> Measurement:
        """KL in units of the healthy twin's on the same documents."""
        metric = "quality/kl_nats.healthy.ratio"
        if not self.healthy_kl.any():
            reason = "the healthy twin does not differ from the reference, so nothing is relative"
            return Missing(metric=metric, reason=reason, source=self.source)
        _, index = np.unique(self.documents, return_inverse=True)
        return ClusteredRatio(
            metric=metric,
            baseline=tuple(np.bincount(index, weights=self.healthy_kl)),
            candidate=tuple(np.bincount(index, weights=self.kl)),
            source=self.source,
        )

    def confident_agreement(self) -> Measurement:
        metric = "quality/top1_agreement.confident.rate"
        chosen = self.margin > CONFIDENT_MARGIN
        if not chosen.any():
            reason = f"no position where the reference's margin exceeds {CONFIDENT_MARGIN:g}"
            return Missing(metric=metric, reason=reason, source=self.source)
        return self._clustered(metric, self.agrees, chosen, unit="1")

    def perplexity(self) -> Measurement:
        return self._clustered(
            "quality/perplexity.ratio", self.nll, self.all, unit="x",
            transform="exp", paired=True,
        )  # fmt: skip

    def by_position(self) -> Iterator[Measurement]:
        """Length buckets, where there is more than one: faults of RoPE, KV cache and range."""
        buckets = np.searchsorted(BUCKETS, self.positions, side="right") - 1
        found = np.unique(buckets)
        for bucket in found if len(found) > 1 else ():
            yield from self.of(f".from-{BUCKETS[bucket]}", buckets == bucket)

    def by_tag(self) -> Iterator[Measurement]:
        slices = [{slice_of_tag(tag) for tag in tags} for tags in self._tags]
        for name in sorted(set().union(*slices)):
            yield from self.of(f".{name}", np.array([name in found for found in slices]))

    def bad_buckets(self) -> str:
        buckets = np.searchsorted(BUCKETS, self.positions[~self.is_finite], side="right") - 1
        return ", ".join(
            f"{count} from position {BUCKETS[bucket]}"
            for bucket, count in zip(*np.unique(buckets, return_counts=True), strict=True)
        )

    def _clustered(
        self, metric: str, values: npt.NDArray[Any], chosen: BoolArray, **fields: Any
    ) -> Clustered:
        _, index = np.unique(self.documents[chosen], return_inverse=True)
        return Clustered(
            metric=metric,
            totals=tuple(np.bincount(index, weights=values[chosen].astype(float))),
            counts=tuple(int(c) for c in np.bincount(index)),
            source=self.source,
            **fields,
        )
