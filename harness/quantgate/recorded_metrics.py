"""What charts of the record show: numbers by name, of measurements and of the load's blocks."""

from __future__ import annotations

import math

from quantgate.load.blocks import block_path
from quantgate.load.results import ArmLoad, read_arm
from quantgate.load.stage import find_arm
from quantgate.measure import (
    Binomial,
    Clustered,
    ClusteredRatio,
    Latencies,
    Measurement,
    Missing,
    PairedBinary,
    PairedBlocks,
    Scalar,
    percentile,
)
from quantgate.release_folder import ReleaseFolder


def metrics_of(measurement: Measurement) -> list[tuple[str, float]]:
    """What a chart can show of a measurement; nothing for one that is missing."""
    name = measurement.metric
    match measurement:
        case Missing():
            return []
        case Scalar():
            return [(name, measurement.value)]
        case Binomial():
            return [(name, measurement.events / measurement.trials)]
        case PairedBinary():
            right = measurement.both + measurement.candidate_only
            drop = measurement.reference_only - measurement.candidate_only
            return [(name, right / measurement.n), (f"{name}.drop", drop / measurement.n)]
        case Clustered():
            mean = sum(measurement.totals) / sum(measurement.counts)
            if measurement.transform == "exp":
                return [(name, math.exp(mean))]
            return [(f"{name}.change" if measurement.paired else name, mean)]
        case ClusteredRatio():
            return [(name, sum(measurement.candidate) / sum(measurement.baseline))]
        case PairedBlocks():
            pairs = zip(measurement.champion, measurement.candidate, strict=True)
            logs = [math.log(candidate / champion) for champion, candidate in pairs]
            return [(name, math.exp(sum(logs) / len(logs)))]
        case Latencies():
            value = percentile(measurement.values, 95.0, num_infinite=measurement.failed)
            return [] if value is None else [(name, value)]


def block_metrics(
    release: ReleaseFolder, variant: str, *, is_champion: bool
) -> list[tuple[str, float, int]]:
    """Throughput and p95 of each block, with the block as the step."""
    found = find_arm(release.load, variant, is_champion=is_champion)
    if found is None:
        return []
    num_blocks = 0
    while block_path(found.group, found.arm, num_blocks).is_file():
        num_blocks += 1
    load: ArmLoad = read_arm(found.group, found.arm, num_blocks)
    rates = load.output_tok_per_s()
    metrics = [("blocks/output_tok_per_s", value, step) for step, value in enumerate(rates)]
    p95s = load.e2e_p95_ms()
    return metrics + [
        ("blocks/e2e_ms.p95", value, step) for step, value in enumerate(p95s) if value is not None
    ]
