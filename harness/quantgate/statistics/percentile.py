"""Is a percentile of latency within its limit? MLPerf's binomial test on late requests.

A request is late when it took longer than the limit; a failed one is infinitely late. The
percentile p is within the limit when at most 1 - p of all requests are late, which needs no
distribution and no interpolation. Percentiles are 0–100.

Source: MLPerf inference rules, "early stopping" (tolerance 0): pass when I_p(h, t + 1) <= 1 - c for
t late and h timely requests, which is the Clopper-Pearson bound on the share of late ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import bdtr, bdtrc

from quantgate.statistics import binomial
from quantgate.statistics.interval import smallest_n


@dataclass(frozen=True, slots=True)
class PercentileBounds:
    """Order statistics around the percentile; None where it lies beyond every finite latency."""

    lower: float | None
    upper: float | None


def num_late(values: Sequence[float], failed: int, *, limit: float) -> int:
    """Requests above the limit (a latency exactly at it is in time), and all failed ones."""
    return sum(value > limit for value in values) + failed


def share_allowed(percentile: float) -> float:
    """The share of requests that may be late."""
    return (100 - percentile) / 100


def is_within(late: int, n: int, *, percentile: float, confidence: float) -> bool:
    """Proven: so few late requests would be improbable if the percentile were above the limit."""
    return float(bdtr(late, n, share_allowed(percentile))) <= 1 - confidence


def is_beyond(late: int, n: int, *, percentile: float, confidence: float) -> bool:
    """Proven: so many late requests would be improbable if the percentile were at the limit."""
    if late == 0:
        return False
    return float(bdtrc(late - 1, n, share_allowed(percentile))) <= 1 - confidence


def min_requests(late: int, *, percentile: float, confidence: float) -> int:
    """The smallest n at which `late` late requests still prove the percentile within its limit.

    At 99 % confidence for p95: 90, 130, 165 requests for 0, 1, 2 late ones.
    """
    n = smallest_n(
        lambda size: is_within(late, size, percentile=percentile, confidence=confidence),
        start=late + 1,
    )
    if n is None:
        raise ValueError(f"no number of requests proves p{percentile:g} with {late} late")
    return n


def required_requests(late: int, n: int, *, percentile: float, confidence: float) -> int | None:
    """Requests at which the same share of late ones would be decided; None when it never is."""
    return binomial.required_trials(late, n, limit=share_allowed(percentile), confidence=confidence)


def percentile_bounds(
    values: Sequence[float], failed: int, *, percentile: float, confidence: float
) -> PercentileBounds:
    """The interval of the percentile itself, consistent with the test: `is_within` a limit exactly
    when `upper` is at most the limit, `is_beyond` exactly when `lower` exceeds it.

    `lower` is 0 when too few requests exclude any latency from below: latencies are not negative.
    """
    n = len(values) + failed
    ordered = sorted(values)
    allowed = [
        late
        for late in range(n)
        if is_within(late, n, percentile=percentile, confidence=confidence)
    ]
    # With t late requests allowed, the (n - t)-th smallest latency is the smallest passing limit.
    upper = _at_rank(ordered, n - allowed[-1]) if allowed else None
    beyond = [
        late
        for late in range(1, n + 1)
        if is_beyond(late, n, percentile=percentile, confidence=confidence)
    ]
    lower = _at_rank(ordered, n - beyond[0] + 1) if beyond else 0.0
    return PercentileBounds(lower, upper)


def _at_rank(ordered: Sequence[float], rank: int) -> float | None:
    """The rank-th smallest request, from 1; None when that one failed."""
    return ordered[rank - 1] if rank <= len(ordered) else None
