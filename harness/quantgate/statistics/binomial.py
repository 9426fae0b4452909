"""Bounds on a share from counts: Clopper-Pearson, exact and conservative.

Source: Clopper & Pearson, Biometrika 26 (1934), 404-413, through the beta distribution.
No event leaves the lower bound at exactly 0, nothing but events the upper bound at exactly 1.
"""

from __future__ import annotations

import math

from scipy.special import betaincinv, ndtri

from quantgate.statistics.interval import POWER, Interval, smallest_n


def upper_bound(events: float, trials: float, *, confidence: float) -> float:
    """The largest share under which this few events still have probability 1 - confidence.

    `events` and `trials` may be fractional: the same share at another sample size.
    """
    if events >= trials:
        return 1.0
    return float(betaincinv(events + 1, trials - events, confidence))


def lower_bound(events: float, trials: float, *, confidence: float) -> float:
    """The smallest share under which this many events still have probability 1 - confidence."""
    if events <= 0:
        return 0.0
    return float(betaincinv(events, trials - events + 1, 1 - confidence))


def share_interval(events: int, trials: int, *, confidence: float) -> Interval:
    """Both bounds around events / trials; `trials` is at least 1."""
    return Interval(
        lower=lower_bound(events, trials, confidence=confidence),
        estimate=events / trials,
        upper=upper_bound(events, trials, confidence=confidence),
    )


def trials_without_event(limit: float, *, confidence: float) -> int:
    """Trials after which zero events prove a share of at most `limit`: about 3 / limit at 95 %.

    Source: "rule of three", Hanley & Lippman-Hand, JAMA 249 (1983), 1743; here in its exact form
    ln(1 - c) / ln(1 - limit).
    """
    return math.ceil(math.log1p(-confidence) / math.log1p(-limit))


def required_trials(events: int, trials: int, *, limit: float, confidence: float) -> int | None:
    """Trials at which the same share would be decided against `limit`; None when it is at it."""
    share = events / trials
    if share == limit:
        return None

    def decides(n: int) -> bool:
        if share < limit:
            return upper_bound(share * n, n, confidence=confidence) <= limit
        return lower_bound(share * n, n, confidence=confidence) > limit

    return smallest_n(decides)


def smallest_detectable_excess(trials: int, *, limit: float, confidence: float) -> float:
    """How far from `limit` a true share must be to be told from it with 80 % power.

    Normal approximation at the limit, which lies strictly between 0 and 1.
    """
    z = float(ndtri(confidence) + ndtri(POWER))
    return z * math.sqrt(limit * (1 - limit) / trials)
