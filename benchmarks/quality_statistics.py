"""How often the gate's statistics are wrong, by simulation: coverage, type-I error, power.

    python benchmarks/quality_statistics.py [--quick] [--check] [--json FILE]

prints the table of docs/quality.md. Every arm draws 20,000 samples from a known truth and asks the
same functions that judge a release. `--check` exits with 1 when a figure misses what it claims;
`--quick` draws 2,000 and allows for the noise.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from machine import describe_machine
from numpy.typing import NDArray
from quality_clusters import SHAPES

from quantgate.files import write_json
from quantgate.statistics import (
    binomial,
    blocks,
    clusters,
    noninferiority,
    percentile,
    sequential,
)
from quantgate.statistics.interval import POWER

IntArray: TypeAlias = NDArray[np.int64]
Generator: TypeAlias = np.random.Generator

CONFIDENCE = 0.95
ERROR = 1 - CONFIDENCE
ALLOWED_EXCESS = 0.005
"""An error rate may exceed the nominal one by this: discrete counts, and unknown shapes."""
ALLOWED_POWER_GAP = 0.02
REPLICATES = 20_000
QUICK_REPLICATES = 2_000
SEED = 20_261_124
_CHUNK = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One simulated rate and what was claimed for it."""

    statistic: str
    situation: str
    kind: str
    """`error`: at most `claimed`. `power`: `claimed`, within `ALLOWED_POWER_GAP`."""
    claimed: float
    observed: float
    replicates: int

    @property
    def noise(self) -> float:
        """Three standard errors of the simulation, where it is short of the full number."""
        if self.replicates >= REPLICATES:
            return 0.0
        return 3 * math.sqrt(self.claimed * (1 - self.claimed) / self.replicates)

    @property
    def holds(self) -> bool:
        if self.kind == "error":
            return self.observed <= self.claimed + ALLOWED_EXCESS + self.noise
        return abs(self.observed - self.claimed) <= ALLOWED_POWER_GAP + self.noise


def _error(statistic: str, situation: str, misses: NDArray[np.bool_]) -> Figure:
    return Figure(
        statistic=statistic, situation=situation, kind="error", claimed=ERROR,
        observed=float(np.mean(misses)), replicates=len(misses),
    )  # fmt: skip


def _power(statistic: str, situation: str, shown: NDArray[np.bool_]) -> Figure:
    return Figure(
        statistic=statistic, situation=situation, kind="power", claimed=POWER,
        observed=float(np.mean(shown)), replicates=len(shown),
    )  # fmt: skip


def _by_counts(function: Callable[..., bool], *columns: IntArray) -> NDArray[np.bool_]:
    """`function` of each row of counts, called once for each different row."""
    rows, index = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)
    answers = np.array([function(*(int(value) for value in row)) for row in rows])
    return answers[index.reshape(-1)]


def _draw_pairs(
    generator: Generator, n: int, lost: float, won: float, replicates: int
) -> tuple[IntArray, IntArray]:
    drawn = generator.multinomial(n, [lost, won, 1 - lost - won], replicates)
    return drawn[:, 0], drawn[:, 1]


def paired_items(generator: Generator, replicates: int) -> Iterator[Figure]:
    """Tango's interval: coverage, the gate's own type-I error and its power; McNemar."""
    for n, lost, won in (
        (100, 0.02, 0.01), (400, 0.0068, 0.0), (400, 0.02, 0.0), (400, 0.03, 0.01),
        (1500, 0.01, 0.01), (1500, 0.08, 0.07),
    ):  # fmt: skip
        b, c = _draw_pairs(generator, n, lost, won, replicates)
        truth = won - lost
        where = f"{n} items, {lost:.2%} lost, {won:.2%} won"

        def bounds(b: int, c: int, n: int = n) -> tuple[float, float]:
            found = noninferiority.difference_interval(b, c, n, confidence=CONFIDENCE)
            return found.lower, found.upper

        yield _error(
            "Tango, lower bound", where,
            _by_counts(lambda b, c, t=truth, f=bounds: f(b, c)[0] > t + 1e-12, b, c),
        )  # fmt: skip
        yield _error(
            "Tango, upper bound", where,
            _by_counts(lambda b, c, t=truth, f=bounds: f(b, c)[1] < t - 1e-12, b, c),
        )  # fmt: skip
    for margin, discordance in ((0.02, 0.03), (0.02, 0.08), (0.01, 0.02), (0.01, 0.05)):
        n = noninferiority.planned_items(discordance, margin, confidence=CONFIDENCE)
        passes = _passes(n, margin)
        b, c = _draw_pairs(generator, n, discordance / 2, discordance / 2, replicates)
        where = f"margin {margin:.0%}, {discordance:.0%} differ, {n} items"
        yield _power("non-inferiority passes without a drop", where, _by_counts(passes, b, c))
        b, c = _draw_pairs(
            generator, n, (discordance + margin) / 2, (discordance - margin) / 2, replicates
        )
        yield _error("non-inferiority passes a drop at the margin", where, _by_counts(passes, b, c))
    for n, discordance in ((400, 0.01), (400, 0.05), (1500, 0.1)):
        b, c = _draw_pairs(generator, n, discordance / 2, discordance / 2, replicates)
        yield _error(
            "McNemar shows a loss without one", f"{n} items, {discordance:.0%} differ",
            _by_counts(lambda b, c: noninferiority.mcnemar_p_value(b, c) <= ERROR, b, c),
        )  # fmt: skip


def _passes(n: int, margin: float) -> Callable[[int, int], bool]:
    def passes(lost: int, won: int) -> bool:
        found = noninferiority.difference_interval(lost, won, n, confidence=CONFIDENCE)
        return found.lower >= -margin

    return passes


def peeking(generator: Generator, replicates: int) -> Iterator[Figure]:
    """The e-process looked at after every 20 items, and Tango's interval looked at as often."""
    looks = np.arange(20, 2001, 20)
    for margin, discordance in ((0.02, 0.05), (0.03, 0.1)):
        lost, won = (discordance + margin) / 2, (discordance - margin) / 2
        ever = np.zeros(replicates, dtype=bool)
        ever_fixed = np.zeros(replicates, dtype=bool)
        b, c = np.zeros((2, replicates), dtype=np.int64)
        for n in looks:
            more = _draw_pairs(generator, 20, lost, won, replicates)
            b, c = b + more[0], c + more[1]
            ever |= _by_counts(
                lambda b, c, n=n, m=margin: (
                    sequential.capital(b, c, n, difference=-m) >= 1 / ERROR
                ),
                b, c,
            )  # fmt: skip
            if n % 200 == 0:
                ever_fixed |= _by_counts(_passes(int(n), margin), b, c)
        where = f"at the margin of {margin:.0%}, {discordance:.0%} differ, 100 looks"
        yield _error("e-process ever passes", where, ever)
        print(
            f"for comparison: Tango's interval, looked at ten times, passes {where} "
            f"{ever_fixed.mean():.1%} of the time",
            file=sys.stderr,
        )


def shares(generator: Generator, replicates: int) -> Iterator[Figure]:
    """Clopper-Pearson, and the binomial test of a percentile."""
    for n, share in ((400, 0.0075), (400, 0.05), (60, 0.3), (25_000, 0.99)):
        events = generator.binomial(n, share, replicates)
        where = f"{share:.2%} of {n}"
        yield _error(
            "Clopper-Pearson, upper bound", where,
            _by_counts(
                lambda k, n=n, p=share: binomial.upper_bound(k, n, confidence=CONFIDENCE) < p,
                events,
            ),
        )  # fmt: skip
        yield _error(
            "Clopper-Pearson, lower bound", where,
            _by_counts(
                lambda k, n=n, p=share: binomial.lower_bound(k, n, confidence=CONFIDENCE) > p,
                events,
            ),
        )  # fmt: skip
    for n, percent in ((180, 95.0), (1000, 95.0), (1000, 99.0)):
        # Exactly 1 - p of all requests are late: neither outcome is proven.
        late = generator.binomial(n, percentile.share_allowed(percent), replicates)
        for name, proves in (("within", percentile.is_within), ("beyond", percentile.is_beyond)):
            yield _error(
                f"percentile test shows {name}", f"p{percent:g} at the limit, {n} requests",
                _by_counts(
                    lambda k, n=n, q=percent, f=proves: f(
                        k, n, percentile=q, confidence=CONFIDENCE
                    ),
                    late,
                ),
            )  # fmt: skip


def block_ratios(generator: Generator, replicates: int) -> Iterator[Figure]:
    """Student's t on log-ratios of paired blocks."""
    for n, sigma in ((4, 0.02), (6, 0.02), (6, 0.15), (12, 0.05)):
        candidate = np.exp(generator.normal(math.log(0.97), sigma, (replicates, n)))
        champion = [1.0] * n
        found = [
            blocks.ratio_interval(champion, row, confidence=CONFIDENCE)
            for row in candidate.tolist()
        ]
        where = f"{n} pairs, spread {sigma:.0%}"
        yield _error(
            "t on log-ratios, lower bound", where, np.array([i.lower > 0.97 for i in found])
        )
        yield _error(
            "t on log-ratios, upper bound", where, np.array([i.upper < 0.97 for i in found])
        )


def cluster_ratios(generator: Generator, replicates: int) -> Iterator[Figure]:
    """The reweighting interval over clusters, in the shapes that golden sets and KL have."""
    for name, m, support, draw in SHAPES:
        above, below = [], []
        for start in range(0, replicates, _CHUNK):
            rows = min(_CHUNK, replicates - start)
            totals, counts, truth = draw(generator, rows, m)
            above.append(clusters.exceedance(totals, counts, truth, support=support) <= ERROR)
            below.append(
                clusters.exceedance(-totals, counts, -truth, support=support.mirrored()) <= ERROR
            )
        where = f"{m} clusters: {name}"
        yield _error("clusters, upper bound", where, np.concatenate(above))
        yield _error("clusters, lower bound", where, np.concatenate(below))


ARMS = (paired_items, peeking, shares, block_ratios, cluster_ratios)


def simulate(replicates: int) -> list[Figure]:
    figures: list[Figure] = []
    for arm in ARMS:
        started = time.perf_counter()
        # Each arm has its own stream, so that changing one leaves the others' numbers alone.
        name = np.frombuffer(arm.__name__.encode(), dtype=np.uint8)
        generator = np.random.default_rng([SEED, *name.tolist()])
        figures += arm(generator, replicates)
        print(f"{arm.__name__}: {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return figures


def table(figures: list[Figure]) -> str:
    lines = ["| statistic | situation | claimed | simulated | |", "|---|---|---|---|---|"]
    for figure in figures:
        claimed = f"{'at most' if figure.kind == 'error' else 'about'} {figure.claimed:.0%}"
        mark = "" if figure.holds else "**misses**"
        lines.append(
            f"| {figure.statistic} | {figure.situation} | {claimed} | {figure.observed:.1%} "
            f"| {mark} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--check", action="store_true", help="exit 1 when a figure misses")
    parser.add_argument("--quick", action="store_true", help="2,000 samples an arm")
    options = parser.parse_args()
    replicates = QUICK_REPLICATES if options.quick else REPLICATES
    figures = simulate(replicates)
    machine = describe_machine()
    print(f"{machine['taken_at'][:10]}, {machine['cpu']}, {replicates:,} samples an arm\n")
    print(table(figures))
    if options.json:
        rows = [asdict(figure) | {"holds": figure.holds} for figure in figures]
        write_json(options.json, {"machine": machine, "figures": rows})
    missed = [figure for figure in figures if not figure.holds]
    for figure in missed:
        print(
            f"misses: {figure.statistic}, {figure.situation}: {figure.observed:.2%}, claimed "
            f"{figure.claimed:.0%}",
            file=sys.stderr,
        )
    if options.check and missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
