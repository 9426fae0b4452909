"""Values without chance, so that a picture is the same each time it is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import ndtri


def quantiles(count: int, spread: float, middle: float) -> tuple[float, ...]:
    """Lognormal values: the middles of equally likely slices."""
    return tuple(
        middle * math.exp(spread * float(ndtri((index + 0.5) / count))) for index in range(count)
    )


def shuffled(values: Sequence[float]) -> list[float]:
    """The same values in an order that has nothing to do with their size."""
    return sorted(values, key=lambda value: math.sin(1e6 * value))
