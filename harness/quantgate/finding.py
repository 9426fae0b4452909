"""What a measurement says about a gate's question, in numbers; `verdict.py` makes it an outcome.

One function per test, each in the measurement's own unit. A kind that cannot answer the question,
or too few samples for any interval, is a `NoFinding`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantgate.gate import Gate
from quantgate.measure import (
    Binomial,
    Clustered,
    ClusteredRatio,
    Latencies,
    Measured,
    PairedBinary,
    PairedBlocks,
    Scalar,
    percentile,
)
from quantgate.statistics import binomial, blocks, clusters, noninferiority, sequential
from quantgate.statistics import percentile as percentile_test
from quantgate.statistics.interval import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The answer in `unit`: estimate and interval (infinite where a failed request decides)."""

    unit: str
    limit: float
    interval: Interval
    n: int
    n_required: int | None
    """Samples that would decide if the estimate held; None when none would."""
    smallest_detectable_effect: float | None
    """None where the test has no such notion: exact limits, percentiles."""
    reason: str
    """The counts behind the estimate, or what a single number is about, in words."""


@dataclass(frozen=True, slots=True)
class NoFinding:
    """The measurement cannot answer, and why."""

    reason: str
    n: int


def find(gate: Gate, measurement: Measured) -> Finding | NoFinding:
    """Ask the gate's question of the measurement."""
    if gate.min_n is not None and measurement.n < gate.min_n:
        reason = f"too few samples: {measurement.n:,}, and the gate asks for {gate.min_n:,}"
        return NoFinding(reason, measurement.n)
    match gate.test, measurement:
        case "limit", Scalar():
            return _find_value(gate, measurement)
        case "rate", Binomial():
            return _find_share(gate, measurement)
        case "mean", Clustered():
            return _find_mean(gate, measurement)
        case "mean", ClusteredRatio():
            return _find_cluster_ratio(gate, measurement)
        case "ratio", PairedBlocks():
            return _find_ratio(gate, measurement)
        case "percentile", Latencies():
            return _find_percentile(gate, measurement)
        case "non_inferiority", PairedBinary(early_stop=stop) if stop and not gate.sequential:
            reason = f"{stop}; how many were asked is no accident, so only a sequential gate judges"
            return NoFinding(reason, measurement.n)
        case "non_inferiority", PairedBinary():
            return _find_paired_drop(gate, measurement)
        case "non_inferiority", Clustered(paired=True) if not gate.sequential:
            return _find_mean(gate, measurement)
    kind = type(measurement).__name__
    if isinstance(measurement, Clustered):
        kind = "Clustered" if measurement.paired else "Clustered (not paired)"
    test = f"sequential {gate.test}" if gate.sequential else gate.test
    return NoFinding(f'wrong kind: test "{test}" cannot judge {kind}', measurement.n)


def _find_value(gate: Gate, measured: Scalar) -> Finding:
    return Finding(
        unit=measured.unit,
        limit=gate.limit.to(measured.unit),
        interval=Interval(measured.value, measured.value, measured.value),
        n=measured.n,
        n_required=None,
        smallest_detectable_effect=None,
        reason=measured.note,
    )


def _find_share(gate: Gate, measured: Binomial) -> Finding:
    limit, confidence = gate.limit.to("1"), gate.confidence
    events, trials = measured.events, measured.trials
    # For a smallest acceptable share the question is about the trials without the event, so that
    # the required n sees the same small-count bounds from both sides.
    return Finding(
        unit="1",
        limit=limit,
        interval=binomial.share_interval(events, trials, confidence=confidence),
        n=trials,
        n_required=binomial.required_trials(
            *(events, trials) if gate.direction == "max" else (trials - events, trials),
            limit=limit if gate.direction == "max" else 1 - limit,
            confidence=confidence,
        ),
        smallest_detectable_effect=binomial.smallest_detectable_excess(
            trials, limit=limit, confidence=confidence
        ),
        reason=f"{events:,} of {trials:,}",
    )


def _find_mean(gate: Gate, measured: Clustered) -> Finding | NoFinding:
    limit = gate.limit.to(measured.unit)
    if too_few := _too_few_clusters(measured.counts):
        return too_few
    totals, counts, confidence = measured.totals, measured.counts, gate.confidence
    support = _support(measured)
    interval = clusters.ratio_interval(totals, counts, confidence=confidence, support=support)
    effect = clusters.smallest_detectable_effect(
        totals, counts, confidence=confidence, support=support
    )
    plain_limit = limit
    if measured.transform == "exp":
        plain_limit = math.log(limit) if limit > 0 else -math.inf
        effect = math.exp(interval.estimate) * math.expm1(effect)
    n_required = clusters.required_clusters(
        totals, counts, limit=plain_limit, confidence=confidence, support=support
    )
    if measured.transform == "exp":
        interval = Interval(
            math.exp(interval.lower), math.exp(interval.estimate), math.exp(interval.upper)
        )
    return Finding(
        unit=measured.unit,
        limit=limit,
        interval=interval,
        n=measured.n,
        n_required=n_required,
        smallest_detectable_effect=effect,
        reason=f"{sum(counts):,} observations in {measured.n:,} clusters",
    )


def _find_cluster_ratio(gate: Gate, measured: ClusteredRatio) -> Finding | NoFinding:
    limit, confidence = gate.limit.to("x"), gate.confidence
    if too_few := _too_few_clusters(measured.baseline):
        return too_few
    sums = measured.candidate, measured.baseline
    support = clusters.NON_NEGATIVE
    return Finding(
        unit="x",
        limit=limit,
        interval=clusters.ratio_interval(*sums, confidence=confidence, support=support),
        n=measured.n,
        n_required=clusters.required_clusters(
            *sums, limit=limit, confidence=confidence, support=support
        ),
        smallest_detectable_effect=clusters.smallest_detectable_effect(
            *sums, confidence=confidence, support=support
        ),
        reason=f"{math.fsum(sums[0]):.4g} against {math.fsum(sums[1]):.4g} "
        f"in {measured.n:,} clusters",
    )


def _find_ratio(gate: Gate, measured: PairedBlocks) -> Finding | NoFinding:
    limit, confidence = gate.limit.to("x"), gate.confidence
    arms = (measured.champion, measured.candidate)
    if measured.n < blocks.MIN_BLOCKS:
        reason = f"too few samples: {measured.n} blocks, at least {blocks.MIN_BLOCKS} needed"
        return NoFinding(reason, measured.n)
    champion, candidate = (math.exp(math.fsum(map(math.log, arm)) / measured.n) for arm in arms)
    return Finding(
        unit="x",
        limit=limit,
        interval=blocks.ratio_interval(*arms, confidence=confidence),
        n=measured.n,
        n_required=blocks.required_blocks(*arms, limit=limit, confidence=confidence),
        smallest_detectable_effect=blocks.smallest_detectable_effect(*arms, confidence=confidence),
        reason=f"{candidate:.4g} against {champion:.4g} {measured.unit}",
    )


def _find_percentile(gate: Gate, measured: Latencies) -> Finding | NoFinding:
    if gate.percentile is None:
        return NoFinding(f"gate {gate.id} names no percentile", measured.n)
    limit, percent, confidence = gate.limit.to(measured.unit), gate.percentile, gate.confidence
    late = percentile_test.num_late(measured.values, measured.failed, limit=limit)
    bounds = percentile_test.percentile_bounds(
        measured.values, measured.failed, percentile=percent, confidence=confidence
    )
    estimate = percentile(measured.values, percent, num_infinite=measured.failed)
    return Finding(
        unit=measured.unit,
        limit=limit,
        interval=Interval(*map(_or_infinite, (bounds.lower, estimate, bounds.upper))),
        n=measured.n,
        n_required=percentile_test.required_requests(
            late, measured.n, percentile=percent, confidence=confidence
        ),
        smallest_detectable_effect=None,
        reason=f"{late:,} of {measured.n:,} late, {measured.failed:,} of them failed",
    )


def _find_paired_drop(gate: Gate, measured: PairedBinary) -> Finding:
    limit, confidence = gate.limit.to("1"), gate.confidence
    lost, won, n = measured.reference_only, measured.candidate_only, measured.n
    p_value = noninferiority.mcnemar_p_value(lost, won)
    test = sequential if gate.sequential else noninferiority
    return Finding(
        unit="1",
        limit=limit,
        interval=test.difference_interval(lost, won, n, confidence=confidence),
        n=n,
        n_required=test.required_items(lost, won, n, margin=-limit, confidence=confidence),
        smallest_detectable_effect=test.smallest_detectable_drop(
            lost, won, n, confidence=confidence
        ),
        reason=f"{(measured.both + won) / n:.2%} against {(measured.both + lost) / n:.2%}, "
        f"lost {lost:,} and won {won:,}, McNemar p {p_value:.2g}"
        + (f", {measured.early_stop}" if measured.early_stop else ""),
    )


def _support(measured: Clustered) -> clusters.Support:
    """What bounds an observation. Scores lie in 0–1, so their differences in −1–1."""
    if measured.unit == "1":
        return clusters.SCORE_DIFFERENCES if measured.paired else clusters.SHARES
    return clusters.UNBOUNDED if measured.paired else clusters.NON_NEGATIVE


def _too_few_clusters(sizes: Sequence[float]) -> NoFinding | None:
    effective = clusters.num_effective(sizes)
    if effective >= clusters.MIN_CLUSTERS:
        return None
    found = f"{len(sizes)} clusters"
    if effective < len(sizes) - 0.05:
        found += f" of unequal size, which weigh like {effective:.1f}"
    reason = f"too few samples: {found}, at least {clusters.MIN_CLUSTERS} needed"
    return NoFinding(reason, len(sizes))


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value
