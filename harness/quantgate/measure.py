"""The kinds of measurement: what a reduced number is, and that having none is a value of its own.

Construction refuses what is not a number (NaN, infinity, nothing at all), so `Missing` is the only
way to say that there is no measurement. A failed request is not a number either: `Latencies` counts
it in `failed`, infinitely late. Which test may judge a kind is decided in `finding.py`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, SupportsFloat, SupportsIndex, TypeAlias

from quantgate.errors import QuantgateError
from quantgate.units import UnitError, dimension_of_unit, parse_metric

Transform: TypeAlias = Literal["identity", "exp"]


class InvalidMeasurement(QuantgateError, ValueError):
    """Something that is not a measurement was offered as one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scalar:
    """One reduced number, for example peak memory or an OOM count.

    `n` is how many observations it was reduced from; `note` says in words what the number is about,
    for example which weight is the worst.
    """

    metric: str
    source: str
    value: float
    unit: str
    n: int
    note: str = ""

    def __post_init__(self) -> None:
        _check_unit(self.metric, self.unit)
        _keep(self, "value", _number(self.metric, "value", self.value))
        _keep(self, "n", _count(self.metric, "n", self.n, at_least=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedBinary:
    """0-1 items scored under reference and candidate: how many were right under which.

    `early_stop` says where and why asking ended before the last item; empty for all items. How many
    were asked then depends on their outcomes, which only a sequential gate allows for.
    """

    metric: str
    source: str
    both: int
    reference_only: int
    candidate_only: int
    neither: int
    early_stop: str = ""

    def __post_init__(self) -> None:
        _check_unit(self.metric, "1")
        for name in ("both", "reference_only", "candidate_only", "neither"):
            _keep(self, name, _count(self.metric, name, getattr(self, name)))
        _refuse_nothing(self.metric, self.n, "items")

    @property
    def n(self) -> int:
        return self.both + self.reference_only + self.candidate_only + self.neither


@dataclass(frozen=True, slots=True, kw_only=True)
class Clustered:
    """Per cluster (document): the sum of a quantity and how many observations it sums.

    `paired` says that the totals are sums of candidate − reference on the same observations.
    `transform` is applied to the overall ratio sum(totals) / sum(counts): `exp` makes a perplexity
    ratio of a mean difference in nats. `unit` is the unit after the transform.
    """

    metric: str
    source: str
    unit: str
    totals: tuple[float, ...]
    counts: tuple[int, ...]
    transform: Transform = "identity"
    paired: bool = False

    def __post_init__(self) -> None:
        _check_unit(self.metric, self.unit)
        if self.transform not in ("identity", "exp"):
            raise InvalidMeasurement(
                f'{self.metric}: transform is "{self.transform}"; expected "identity" or "exp"'
            )
        _keep(self, "totals", _numbers(self.metric, "totals", self.totals))
        _keep(self, "counts", _counts(self.metric, "counts", self.counts, at_least=1))
        _check_lengths(self.metric, totals=self.totals, counts=self.counts)
        _refuse_nothing(self.metric, self.n, "clusters")

    @property
    def n(self) -> int:
        """The number of clusters: the unit that is independent, not the observation."""
        return len(self.totals)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusteredRatio:
    """Per cluster the sum of one quantity under a baseline and under the candidate.

    The metric is the ratio of the two overall sums, for example KL in units of a healthy
    quantizer's.
    """

    metric: str
    source: str
    baseline: tuple[float, ...]
    candidate: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_unit(self.metric, "x")
        for side in ("baseline", "candidate"):
            values = _numbers(self.metric, side, getattr(self, side))
            for index, value in enumerate(values):
                if value < 0:
                    raise InvalidMeasurement(
                        f"{self.metric}: {side}[{index}] is {value:g}; expected 0 or more"
                    )
            _keep(self, side, values)
        _check_lengths(self.metric, baseline=self.baseline, candidate=self.candidate)
        _refuse_nothing(self.metric, self.n, "clusters")
        if not any(self.baseline):
            raise InvalidMeasurement(
                f"{self.metric}: the baseline is 0, so there is no ratio; write Missing"
            )

    @property
    def n(self) -> int:
        return len(self.baseline)


@dataclass(frozen=True, slots=True, kw_only=True)
class Binomial:
    """How many of the trials showed the event: invalid outputs, errors, top-1 agreements."""

    metric: str
    source: str
    events: int
    trials: int

    def __post_init__(self) -> None:
        _check_unit(self.metric, "1")
        _keep(self, "events", _count(self.metric, "events", self.events))
        _keep(self, "trials", _count(self.metric, "trials", self.trials))
        _refuse_nothing(self.metric, self.trials, "trials")
        if self.events > self.trials:
            raise InvalidMeasurement(f"{self.metric}: {self.events} events in {self.trials} trials")

    @property
    def n(self) -> int:
        return self.trials


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedBlocks:
    """One value per block and arm, both arms having replayed the same requests.

    `unit` is the unit of the values (tok/s, ms); the metric is their ratio candidate / champion.
    A block without a positive value in both arms has no log-ratio: write Missing instead.
    """

    metric: str
    source: str
    unit: str
    champion: tuple[float, ...]
    candidate: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_unit(self.metric, "x")
        dimension_of_unit(self.unit)
        for arm in ("champion", "candidate"):
            values = _numbers(self.metric, arm, getattr(self, arm))
            for index, value in enumerate(values):
                if value <= 0:
                    raise InvalidMeasurement(
                        f"{self.metric}: {arm}[{index}] is {value:g}; expected more than 0, "
                        "because blocks are compared by their ratio"
                    )
            _keep(self, arm, values)
        _check_lengths(self.metric, champion=self.champion, candidate=self.candidate)
        _refuse_nothing(self.metric, self.n, "blocks")

    @property
    def n(self) -> int:
        return len(self.champion)


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Each request's latency from its scheduled send time; `failed` ones are infinitely late."""

    metric: str
    source: str
    unit: str
    values: tuple[float, ...]
    failed: int

    def __post_init__(self) -> None:
        _check_unit(self.metric, self.unit)
        _keep(self, "values", _numbers(self.metric, "values", self.values))
        _keep(self, "failed", _count(self.metric, "failed", self.failed))
        _refuse_nothing(self.metric, self.n, "requests")

    @property
    def n(self) -> int:
        return len(self.values) + self.failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Why there is no number. `source` is a file that shows why, None when there is none."""

    metric: str
    reason: str
    source: str | None = None

    def __post_init__(self) -> None:
        _check_metric(self.metric)
        if not self.reason.strip():
            raise InvalidMeasurement(f"{self.metric}: Missing needs a reason, in words")


Measured: TypeAlias = (
    Scalar | PairedBinary | Clustered | ClusteredRatio | Binomial | PairedBlocks | Latencies
)
Measurement: TypeAlias = Measured | Missing


def percentile(values: Sequence[float], percent: float, *, num_infinite: int = 0) -> float | None:
    """The smallest value that at least `percent` % of the observations do not exceed.

    The inverse of the empirical distribution function: an order statistic, never an interpolation
    (numpy's `inverted_cdf`, R's type 1). The one convention in quantgate; percentiles are 0–100.

    Args:
        values: finite observations, in any order.
        percent: 0 (the minimum) to 100 (the maximum).
        num_infinite: further observations above every finite one, such as failed requests.

    Returns:
        None when the percentile falls on an infinite observation.

    Raises:
        InvalidMeasurement: no observations, or `percent` outside 0–100.
    """
    n = len(values) + num_infinite
    if n == 0:
        raise InvalidMeasurement("no observations have no percentile; write Missing")
    if not 0 <= percent <= 100:
        raise InvalidMeasurement(f"percentile {percent:g} is outside 0–100")
    # In Fractions: 0.95 * 260 is 247.00000000000003 in floats, one observation too far.
    rank = max(1, math.ceil(Fraction(repr(float(percent))) * n / 100))
    if rank > len(values):
        return None
    return sorted(values)[rank - 1]


def _keep(measurement: object, name: str, value: object) -> None:
    object.__setattr__(measurement, name, value)


def _check_metric(metric: str) -> str:
    """The dimension of the metric, as its name says."""
    try:
        return parse_metric(metric).dimension
    except UnitError as error:
        raise InvalidMeasurement(str(error)) from error


def _check_unit(metric: str, unit: str) -> None:
    expected = _check_metric(metric)
    try:
        actual = dimension_of_unit(unit)
    except UnitError as error:
        raise InvalidMeasurement(f"{metric}: {error}") from error
    if actual != expected:
        raise InvalidMeasurement(f'{metric}: measured in "{unit}", but its name says {expected}')


def _number(metric: str, name: str, value: SupportsFloat) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise InvalidMeasurement(
            f"{metric}: {name} is {number}; expected a finite number, or Missing with the reason"
        )
    return number


def _numbers(metric: str, name: str, values: Iterable[SupportsFloat]) -> tuple[float, ...]:
    return tuple(_number(metric, f"{name}[{i}]", value) for i, value in enumerate(values))


def _count(metric: str, name: str, value: SupportsIndex, *, at_least: int = 0) -> int:
    try:
        count = operator.index(value)
    except TypeError as error:
        raise InvalidMeasurement(
            f"{metric}: {name} is {value!r}; expected a whole number"
        ) from error
    if count < at_least:
        raise InvalidMeasurement(f"{metric}: {name} is {count}; expected at least {at_least}")
    return count


def _counts(
    metric: str, name: str, values: Iterable[SupportsIndex], *, at_least: int
) -> tuple[int, ...]:
    return tuple(
        _count(metric, f"{name}[{i}]", value, at_least=at_least) for i, value in enumerate(values)
    )


def _check_lengths(metric: str, **columns: tuple[float, ...] | tuple[int, ...]) -> None:
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InvalidMeasurement(f"{metric}: columns of unequal length ({listed})")


def _refuse_nothing(metric: str, n: int, noun: str) -> None:
    if n == 0:
        raise InvalidMeasurement(f"{metric}: no {noun}; write Missing with the reason")
