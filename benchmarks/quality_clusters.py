"""Clusters drawn from a known truth, in the shapes that golden sets, KL and agreement have."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from quantgate.statistics import clusters

FloatArray: TypeAlias = NDArray[np.float64]
Generator: TypeAlias = np.random.Generator
# Totals and counts [rows, clusters], and the mean that they are drawn around.
Drawn: TypeAlias = tuple[FloatArray, FloatArray, float]
# Of a generator, rows, and clusters a row.
Draw: TypeAlias = Callable[[Generator, int, int], Drawn]
Sizes: TypeAlias = Callable[[Generator, int, int], FloatArray]


def _even(generator: Generator, rows: int, m: int) -> FloatArray:
    return np.full((rows, m), 200.0)


def _uneven(generator: Generator, rows: int, m: int) -> FloatArray:
    """Document lengths from 20 to 500 tokens."""
    return generator.integers(20, 501, (rows, m)).astype(float)


def _long_tailed(generator: Generator, rows: int, m: int) -> FloatArray:
    """Lognormal lengths: 40 % of the tokens in a tenth of the documents."""
    return np.ceil(generator.lognormal(4, 1, (rows, m)))


def _lognormal(sigma: float, sizes: Sizes) -> Draw:
    def draw(generator: Generator, rows: int, m: int) -> Drawn:
        counts = sizes(generator, rows, m)
        means = generator.lognormal(0, sigma, (rows, m))
        return means * counts, counts, math.exp(sigma**2 / 2)

    return draw


def _nll(generator: Generator, rows: int, m: int) -> Drawn:
    """Differences with a few heavy documents on either side: Student's t with 3 degrees."""
    counts = _uneven(generator, rows, m)
    return (0.01 + 0.02 * generator.standard_t(3, (rows, m))) * counts, counts, 0.01


def _scores(lost: float, won: float, *, whole: bool) -> Draw:
    """Clusters of 1–8 items of which a few differ: whole clusters, or a field of some items."""

    def draw(generator: Generator, rows: int, m: int) -> Drawn:
        counts = generator.integers(1, 9, (rows, m)).astype(float)
        hit = generator.random((rows, m))
        sign = np.where(hit < lost, -1.0, np.where(hit < lost + won, 1.0, 0.0))
        size = 1.0 if whole else generator.choice([0.05, 0.2, 0.6], (rows, m))
        return sign * size * counts, counts, (won - lost) * (1.0 if whole else 0.85 / 3)

    return draw


def _agreement(mean: float, concentration: float) -> Draw:
    """Top-1 agreement: the rate of each document is beta, its tokens are binomial."""

    def draw(generator: Generator, rows: int, m: int) -> Drawn:
        counts = generator.integers(50, 501, (rows, m))
        rates = generator.beta(mean * concentration, (1 - mean) * concentration, (rows, m))
        return generator.binomial(counts, rates).astype(float), counts.astype(float), mean

    return draw


_KL, _SCORES, _SHARES = clusters.NON_NEGATIVE, clusters.SCORE_DIFFERENCES, clusters.SHARES
SHAPES: tuple[tuple[str, int, clusters.Support, Draw], ...] = (
    ("KL, lognormal 0.5, even", 30, _KL, _lognormal(0.5, _even)),
    ("KL, lognormal 0.8, even", 30, _KL, _lognormal(0.8, _even)),
    ("KL, lognormal 0.8, uneven", 40, _KL, _lognormal(0.8, _uneven)),
    ("KL, lognormal 0.8, uneven", 120, _KL, _lognormal(0.8, _uneven)),
    ("KL, lognormal 1.0, uneven", 120, _KL, _lognormal(1.0, _uneven)),
    ("KL, lognormal 0.8, long-tailed sizes", 90, _KL, _lognormal(0.8, _long_tailed)),
    ("KL, lognormal 0.5, uneven", 500, _KL, _lognormal(0.5, _uneven)),
    ("NLL difference, t3, uneven", 40, clusters.UNBOUNDED, _nll),
    ("NLL difference, t3, uneven", 120, clusters.UNBOUNDED, _nll),
    ("scores, 1 % lost, 1 % won, whole", 107, _SCORES, _scores(0.01, 0.01, whole=True)),
    ("scores, 3 % lost, whole", 107, _SCORES, _scores(0.03, 0.0, whole=True)),
    ("scores, 3 % lost, a field", 107, _SCORES, _scores(0.03, 0.0, whole=False)),
    ("scores, 2 % lost, 1 % won, whole", 480, _SCORES, _scores(0.02, 0.01, whole=True)),
    ("scores, 2 % lost, 1 % won, a field", 480, _SCORES, _scores(0.02, 0.01, whole=False)),
    ("agreement 95 %, spread 10", 40, _SHARES, _agreement(0.95, 10)),
    ("agreement 99 %, spread 50", 128, _SHARES, _agreement(0.99, 50)),
    ("agreement 99.9 %, spread 50", 128, _SHARES, _agreement(0.999, 50)),
)
