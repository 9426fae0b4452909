"""The ratio of two arms from pairs of blocks that replayed the same requests.

The block is the independent unit, not the request: requests in one block share a queue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import stdtrit

from quantgate.statistics.interval import POWER, Interval, smallest_n

MIN_BLOCKS = 4
"""Two ABBA rounds; with fewer, equal noise in two pairs can make the spread look like nothing."""


def ratio_interval(
    champion: Sequence[float], candidate: Sequence[float], *, confidence: float
) -> Interval:
    """Student's t on the log-ratio of each pair: an interval of the geometric mean ratio.

    Logarithms make "twice" and "half" equally far from 1 and swapping the arms an inversion.
    Pairs that all have the same ratio give an interval of width zero.

    Args:
        champion, candidate: positive values, paired by position, at least 2 of each.
    """
    mean, error = _mean_and_error(champion, candidate)
    half = float(stdtrit(len(champion) - 1, confidence)) * error
    return Interval(math.exp(mean - half), math.exp(mean), math.exp(mean + half))


def required_blocks(
    champion: Sequence[float], candidate: Sequence[float], *, limit: float, confidence: float
) -> int | None:
    """Pairs at which the same mean and spread would be decided; None when it is at the limit."""
    mean, error = _mean_and_error(champion, candidate)
    spread = error * math.sqrt(len(champion))
    distance = abs(mean - math.log(limit))
    if distance == 0:
        return None

    def decides(pairs: int) -> bool:
        return float(stdtrit(pairs - 1, confidence)) * spread / math.sqrt(pairs) <= distance

    return smallest_n(decides, start=MIN_BLOCKS)


def smallest_detectable_effect(
    champion: Sequence[float], candidate: Sequence[float], *, confidence: float
) -> float:
    """The relative change (0.03 for 3 %) that would be shown with 80 % power at this spread."""
    _, error = _mean_and_error(champion, candidate)
    df = len(champion) - 1
    return math.expm1(float(stdtrit(df, confidence) + stdtrit(df, POWER)) * error)


def _mean_and_error(champion: Sequence[float], candidate: Sequence[float]) -> tuple[float, float]:
    """Mean log-ratio and its standard error."""
    logs = [math.log(b / a) for a, b in zip(champion, candidate, strict=True)]
    n = len(logs)
    mean = math.fsum(logs) / n
    squares = math.fsum((value - mean) ** 2 for value in logs)
    return mean, math.sqrt(squares / (n - 1) / n)
