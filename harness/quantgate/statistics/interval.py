"""The interval every test answers with, and the sample size at which it would decide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MAX_REQUIRED_N = 10**9
"""Above this, no sample size is named: the estimate is at the limit for every practical purpose."""
POWER = 0.8
"""The power behind each "smallest detectable effect": found in four of five repetitions."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Bounds that each hold with the stated one-sided confidence, around (or at) the estimate."""

    lower: float
    estimate: float
    upper: float


def smallest_n(decides: Callable[[int], bool], *, start: int = 1) -> int | None:
    """The smallest n >= start for which `decides(n)`, which must stay true once it is true.

    Doubles, then halves the gap: O(log n) calls. None when no n up to `MAX_REQUIRED_N` decides.
    """
    low, high = start - 1, start
    while not decides(high):
        if high >= MAX_REQUIRED_N:
            return None
        low, high = high, min(high * 2, MAX_REQUIRED_N)
    while high - low > 1:
        middle = (low + high) // 2
        if decides(middle):
            high = middle
        else:
            low = middle
    return high
