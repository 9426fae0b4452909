"""Units, dimensions and the one way to read "250 ms"; which dimension a metric name implies.

Conversion happens inside one dimension only and is exact in decimal (`Fraction`), so that a value
written at a limit in another unit still compares as *at* the limit.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from quantgate.errors import UsageError

# unit -> size in the first unit of its dimension
DIMENSIONS: dict[str, dict[str, Fraction]] = {
    "time": {
        "ms": Fraction(1),
        "ns": Fraction(1, 10**6),
        "us": Fraction(1, 1000),
        "s": Fraction(1000),
        "min": Fraction(60_000),
    },
    "size": {
        "B": Fraction(1),
        "KiB": Fraction(2**10),
        "MiB": Fraction(2**20),
        "GiB": Fraction(2**30),
        "kB": Fraction(10**3),
        "MB": Fraction(10**6),
        "GB": Fraction(10**9),
    },
    # "pt" (percentage points) is a difference of fractions: only margins may be written in it.
    "fraction": {"1": Fraction(1), "%": Fraction(1, 100), "pt": Fraction(1, 100)},
    "ratio": {"x": Fraction(1)},
    "nats": {"nats": Fraction(1)},
    "count": {"count": Fraction(1)},
    "bits": {"bit": Fraction(1)},
    "token rate": {"tok/s": Fraction(1)},
    "request rate": {"req/s": Fraction(1)},
}
MARGIN_UNIT = "pt"

_DIMENSION_OF = {unit: name for name, units in DIMENSIONS.items() for unit in units}
_QUANTITY = re.compile(r"\s*([+-]?(?:\d+(?:_\d+)*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(\S+)?\s*")

SECTIONS = ("audit", "quality", "validity", "divergence", "perf", "memory", "stability")
DISTRIBUTION_NOUNS = ("kl_nats", "nll_nats", "top1_agreement", "perplexity", "non_finite")
"""Quality metrics measured off the server on token ids."""
SERVED_NOUNS = (
    "served_kl_nats",
    "served_logprob_difference_nats",
    "noise_floor_kl_nats",
    "noise_floor_logprob_difference_nats",
)
"""Quality metrics of the serving path on the same token ids; any other noun is a golden set."""

_METRIC = re.compile(
    r"(?P<section>[a-z]+)/(?P<noun>[A-Za-z0-9][\w.-]*)\.(?P<statistic>[A-Za-z]\w*)"
)
_PERCENTILE_STATISTIC = re.compile(r"p\d+")
_NOUN_DIMENSIONS = (
    ("tok_per_s", "token rate"),
    ("req_per_s", "request rate"),
    ("_ms", "time"),
    ("_bytes", "size"),
    ("_tokens", "count"),
    ("_nats", "nats"),
    ("_bits", "bits"),
    ("_cosine", "fraction"),
)
_STATISTIC_DIMENSIONS = {"ratio": "ratio", "rate": "fraction", "count": "count"}


class UnitError(UsageError, ValueError):
    """A quantity or a metric name that has no meaning here; the message says what to write."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with its unit, as written."""

    value: float
    unit: str

    @property
    def dimension(self) -> str:
        return dimension_of_unit(self.unit)

    def to(self, unit: str) -> float:
        """The value in `unit`; UnitError across dimensions."""
        return convert(self.value, self.unit, to=unit)

    def __str__(self) -> str:
        return f"{self.value:g} {self.unit}"


@dataclass(frozen=True, slots=True)
class MetricName:
    """The parts of `section/noun_unit.statistic`. The statistic holds no dot; the noun may."""

    section: str
    noun: str
    statistic: str

    @property
    def is_golden_set(self) -> bool:
        """The noun names a golden set, and the statistic a scorer or a validity check."""
        if self.section == "validity":
            return True
        return self.section == "quality" and self.stem not in (*DISTRIBUTION_NOUNS, *SERVED_NOUNS)

    @property
    def stem(self) -> str:
        """The noun without its slice: `kl_nats` of `kl_nats.from-256`."""
        return self.noun.split(".", maxsplit=1)[0]

    @property
    def is_percentile(self) -> bool:
        return _PERCENTILE_STATISTIC.fullmatch(self.statistic) is not None

    @property
    def percentile(self) -> float | None:
        """0–100 when the statistic is a percentile (`p95`, and `p999` for 99.9), else None."""
        if not self.is_percentile:
            return None
        digits = self.statistic[1:]
        return float(digits) if len(digits) <= 2 else float(f"{digits[:2]}.{digits[2:]}")

    @property
    def dimension(self) -> str:
        """What the metric is measured in; UnitError when its name does not say."""
        if self.is_golden_set and self.statistic != "ratio":
            return "fraction"
        if self.statistic in _STATISTIC_DIMENSIONS:
            return _STATISTIC_DIMENSIONS[self.statistic]
        # `e2e_ms.p95.ratio` keeps its inner statistic in the noun; the unit ends the first part.
        # Of a golden set, whose name is the first part, it ends the last.
        stem = self.noun if self.section == "divergence" else self.stem
        for ending, dimension in _NOUN_DIMENSIONS:
            if stem.endswith(ending):
                return dimension
        raise UnitError(
            f'metric "{self}" does not say its unit; expected a noun that ends in '
            f"{', '.join(ending for ending, _ in _NOUN_DIMENSIONS)}, "
            f"or a statistic {', '.join(_STATISTIC_DIMENSIONS)}"
        )

    def __str__(self) -> str:
        return f"{self.section}/{self.noun}.{self.statistic}"


def parse_metric(text: str) -> MetricName:
    """Split a metric name; UnitError for another form or an unknown section."""
    match = _METRIC.fullmatch(text)
    if match is None:
        raise UnitError(
            f'"{text}" is not a metric name; expected section/noun_unit.statistic, '
            "for example perf/e2e_ms.p95"
        )
    name = MetricName(match["section"], match["noun"], match["statistic"])
    if name.section not in SECTIONS:
        raise UnitError(
            f'unknown metric section "{name.section}" in "{text}"; '
            f"expected one of {', '.join(SECTIONS)}{did_you_mean(name.section, SECTIONS)}"
        )
    if name.is_percentile and (name.percentile == 0 or name.statistic == "p100"):
        raise UnitError(
            f'"{text}": a percentile lies between 0 and 100, as p50, p95 or p999 (99.9); '
            "the largest is max"
        )
    return name


def slice_of_tag(tag: str) -> str:
    """What a metric's noun ends in for the items with a tag: `order-lookup.tag-long`."""
    return "tag-" + re.sub(r"[^\w-]+", "-", tag)


def dimension_of_unit(unit: str) -> str:
    """The dimension a unit belongs to; UnitError with the nearest known unit."""
    dimension = _DIMENSION_OF.get(unit)
    if dimension is None:
        raise UnitError(
            f'unknown unit "{unit}"; expected one of {", ".join(_DIMENSION_OF)}'
            f"{did_you_mean(unit, _DIMENSION_OF)}"
        )
    return dimension


def units_of(dimension: str) -> tuple[str, ...]:
    return tuple(DIMENSIONS[dimension])


def parse_quantity(text: str) -> Quantity:
    """Read "250 ms", "1 %", "0 count"; a number without a unit is refused."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise UnitError(f'"{text}" is not a quantity; expected a number and a unit, as in "250 ms"')
    if match[2] is None:
        raise UnitError(f'"{text}" has no unit; expected a number and a unit, as in "250 ms"')
    dimension_of_unit(match[2])
    value = float(match[1])
    if value in (float("inf"), float("-inf")):
        raise UnitError(f'"{text}" is too large to be a number; expected a finite one')
    return Quantity(value, match[2])


def convert(value: float, unit: str, *, to: str) -> float:
    """`value` in another unit of the same dimension, rounded once."""
    if unit == to:
        return value
    here, there = dimension_of_unit(unit), dimension_of_unit(to)
    if here != there:
        raise UnitError(f'"{unit}" is a unit of {here}, "{to}" of {there}; they do not convert')
    # repr is the shortest decimal of the float: 7 % becomes exactly the float written 0.07.
    return float(Fraction(repr(float(value))) * DIMENSIONS[here][unit] / DIMENSIONS[here][to])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean "x"?` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f'; did you mean "{near[0]}"?' if near else ""
