"""From stored blocks to measurements, after asking whether the run may be believed at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from quantgate.errors import MeasurementError
from quantgate.load.blocks import BURST, STEADY, block_path, read_block
from quantgate.load.client import PhaseRecord
from quantgate.measure import Latencies, Measurement, Missing, PairedBlocks, percentile

FloatArray: TypeAlias = npt.NDArray[np.float64]

RATIO_METRICS = ("perf/output_tok_per_s.ratio", "perf/e2e_ms.p95.ratio")
ABSOLUTE_METRICS = ("perf/e2e_ms.p95",)

# Above this share of a core the client may be what is measured (asyncio runs on one core).
MAX_CLIENT_CPU_SHARE = 0.8
# A request sent later than this after its schedule, as a share of the median latency, means that
# the client could not keep its own schedule; 5 ms are always allowed.
MAX_SEND_DELAY_SHARE = 0.10
MIN_SEND_DELAY_MS = 5.0
# Requests in flight may not grow by more than this factor from the second third of the arrivals to
# the last, unless by less than one request. The first third fills an empty server at any speed.
MAX_IN_FLIGHT_GROWTH = 2.0
MIN_IN_FLIGHT_GROWTH = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmLoad:
    """All blocks of one arm, read back."""

    arm: str
    blocks: tuple[dict[str, PhaseRecord], ...]

    @property
    def num_requests(self) -> int:
        return sum(len(p.requests) for block in self.blocks for p in block.values())

    @property
    def num_errors(self) -> int:
        phases = [phase for block in self.blocks for phase in block.values()]
        return sum(r.error is not None for phase in phases for r in phase.requests)

    def output_tok_per_s(self) -> list[float]:
        """Per block: output tokens of answered requests over the burst's duration."""
        return [
            sum(r.output_tokens for r in block[BURST].requests if r.error is None)
            / (block[BURST].duration_ms / 1e3)
            for block in self.blocks
        ]

    def e2e_p95_ms(self) -> list[float | None]:
        """Per block; None where the 95th percentile is a failed request."""
        return [
            percentile(
                [r.e2e_ms for r in block[STEADY].requests if r.error is None],
                95.0,
                num_infinite=sum(r.error is not None for r in block[STEADY].requests),
            )
            for block in self.blocks
        ]


def read_arm(folder: Path, arm: str, num_blocks: int) -> ArmLoad:
    """Reads an arm's blocks.

    Raises:
        MeasurementError: a block is missing, so the arms would not be paired.
    """
    paths = [block_path(folder, arm, block) for block in range(num_blocks)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise MeasurementError(f"{arm}: {len(missing)} of {num_blocks} blocks were not measured")
    return ArmLoad(arm=arm, blocks=tuple(read_block(path) for path in paths))


def why_not_believed(load: ArmLoad) -> str | None:
    """The reason an arm's latencies say nothing about the server; None when they may be judged."""
    steady = [block[STEADY] for block in load.blocks]
    share = max(phase.client_cpu_share for phase in steady)
    if share > MAX_CLIENT_CPU_SHARE:
        return (
            f"{load.arm}: the load client used {share:.0%} of a core (limit "
            f"{MAX_CLIENT_CPU_SHARE:.0%}), so it may be what was measured; lower workload.rate"
        )
    requests = [r for phase in steady for r in phase.requests]
    delay = percentile([r.sent_ms - r.scheduled_ms for r in requests], 99.0) or 0.0
    median = percentile([r.e2e_ms for r in requests], 50.0) or 0.0
    limit = max(MIN_SEND_DELAY_MS, MAX_SEND_DELAY_SHARE * median)
    if delay > limit:
        return (
            f"{load.arm}: requests were sent up to {delay:.1f} ms late (p99, limit {limit:.1f} ms)"
            ": the client could not keep its schedule; lower workload.rate"
        )
    growth = _in_flight_growth(steady)
    if growth > MAX_IN_FLIGHT_GROWTH:
        return (
            f"{load.arm}: requests in flight grew {growth:.1f}-fold within a block (limit "
            f"{MAX_IN_FLIGHT_GROWTH:g}): the server is saturated and latency has no steady value; "
            "lower workload.rate"
        )
    return None


def compare_arms(champion: ArmLoad, candidate: ArmLoad, *, source: str) -> list[Measurement]:
    """Block by block: throughput of the burst, and p95 latency of the steady phase."""
    measurements: list[Measurement] = [
        _paired(
            "perf/output_tok_per_s.ratio",
            "tok/s",
            champion.output_tok_per_s(),
            candidate.output_tok_per_s(),
            source=source,
        )
    ]
    reason = why_not_believed(champion) or why_not_believed(candidate)
    metric = "perf/e2e_ms.p95.ratio"
    if reason:
        measurements.append(Missing(metric=metric, reason=reason, source=source))
    else:
        measurements.append(
            _paired(metric, "ms", champion.e2e_p95_ms(), candidate.e2e_p95_ms(), source=source)
        )
    return measurements


def absolute_latency(load: ArmLoad, *, source: str) -> Measurement:
    """Every steady request's latency, failed ones infinitely late."""
    metric = "perf/e2e_ms.p95"
    reason = why_not_believed(load)
    if reason:
        return Missing(metric=metric, reason=reason, source=source)
    requests = [r for block in load.blocks for r in block[STEADY].requests]
    return Latencies(
        metric=metric,
        unit="ms",
        values=tuple(r.e2e_ms for r in requests if r.error is None),
        failed=sum(r.error is not None for r in requests),
        source=source,
    )


def _paired(
    metric: str,
    unit: str,
    champion: Sequence[float | None],
    candidate: Sequence[float | None],
    *,
    source: str,
) -> Measurement:
    ours = [value for value in champion if value]
    theirs = [value for value in candidate if value]
    if len(ours) < len(champion) or len(theirs) < len(candidate):
        reason = "a block has no value: too many of its requests failed"
        return Missing(metric=metric, reason=reason, source=source)
    return PairedBlocks(
        metric=metric, unit=unit, champion=tuple(ours), candidate=tuple(theirs), source=source
    )


def _in_flight_growth(phases: Sequence[PhaseRecord]) -> float:
    """Mean requests in flight in the last third of the arrivals over the second third."""
    before, after = 0.0, 0.0
    for phase in phases:
        times = np.asarray([r.scheduled_ms for r in phase.requests])
        done = np.asarray([r.done_ms for r in phase.requests])
        third = times[-1] / 3
        before += _mean_in_flight(times, done, third, 2 * third) / len(phases)
        after += _mean_in_flight(times, done, 2 * third, 3 * third) / len(phases)
    if after - before <= MIN_IN_FLIGHT_GROWTH:
        return 1.0
    return after / before if before > 0 else float("inf")


def _mean_in_flight(start: FloatArray, done: FloatArray, low: float, high: float) -> float:
    overlap = np.clip(np.minimum(done, high) - np.maximum(start, low), 0.0, None)
    return float(overlap.sum() / (high - low)) if high > low else 0.0
