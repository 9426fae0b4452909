"""The drop between two arms, valid at every number of items at once: it may be looked at any time.

A fixed-n interval that is looked at after every hundred items errs far more often than it says.
This one is made of bets: capital of 1 is staked item by item against "the difference is d", such
that it does not grow on average when d is true. By Ville's inequality it then ever reaches
1 / (1 - confidence) with probability at most 1 - confidence, at whatever moment one looks.

Source: Waudby-Smith & Ramdas, Estimating means of bounded random variables by betting, JRSS B 86
(2024), 1-27. The bet is a mixture over stakes, so that the capital needs only the counts.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtri

from quantgate.statistics.interval import POWER, Interval, smallest_n

_STAKES = np.geomspace(0.005, 0.995, 48)
"""Shares of the capital staked; the best one is about 2 * margin / discordance."""
_BISECTIONS = 40


def difference_interval(
    reference_only: float, candidate_only: float, n: float, *, confidence: float
) -> Interval:
    """candidate - reference, for items in an order that does not depend on their outcomes.

    Counts may be fractional: the same shares at another n.
    """
    return Interval(
        lower=_bound(reference_only, candidate_only, n, confidence=confidence),
        estimate=(candidate_only - reference_only) / n,
        # Swapping the arms mirrors the interval exactly.
        upper=-_bound(candidate_only, reference_only, n, confidence=confidence),
    )


def required_items(
    reference_only: int, candidate_only: int, n: int, *, margin: float, confidence: float
) -> int | None:
    """Items at which the same shares would be decided; None when the estimate is at the margin."""
    estimate = (candidate_only - reference_only) / n
    if estimate == -margin:
        return None

    def decides(size: int) -> bool:
        scale = size / n
        lost, won = reference_only * scale, candidate_only * scale
        if estimate > -margin:
            return capital(lost, won, size, difference=-margin) >= 1 / (1 - confidence)
        return capital(won, lost, size, difference=0.0) >= 1 / (1 - confidence)

    return smallest_n(decides)


def smallest_detectable_drop(
    reference_only: int, candidate_only: int, n: int, *, confidence: float
) -> float:
    """The true drop that would be shown with 80 % power: the bound and the power's quantile."""
    found = difference_interval(reference_only, candidate_only, n, confidence=confidence)
    error = math.sqrt((reference_only + candidate_only) / n / n)
    return found.estimate - found.lower + float(ndtri(POWER)) * error


def capital(reference_only: float, candidate_only: float, n: float, *, difference: float) -> float:
    """What bets against "candidate - reference is at most `difference`" have made of 1.

    Args:
        difference: above -1, at most 1.
    """
    # Outcomes -1, 0, 1 moved to 0, 1/2, 1, and what they are on average under the hypothesis.
    mean = (difference + 1) / 2
    logarithms = (
        reference_only * np.log1p(-_STAKES)
        + (n - reference_only - candidate_only) * np.log1p(_STAKES * (0.5 / mean - 1))
        + candidate_only * np.log1p(_STAKES * (1 / mean - 1))
    )
    largest = float(logarithms.max())
    # exp overflows beyond 709, long after everything is decided.
    return float(np.exp(logarithms - largest).mean()) * math.exp(min(largest, 700.0))


def _bound(reference_only: float, candidate_only: float, n: float, *, confidence: float) -> float:
    """The smallest difference that the bets have not ruled out."""
    if reference_only >= n:
        return -1.0
    low, high = -1.0, (candidate_only - reference_only) / n
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        won = capital(reference_only, candidate_only, n, difference=middle)
        if won >= 1 / (1 - confidence):
            low = middle
        else:
            high = middle
    return low
