"""A picture of one gate and several measurements, as `judge` decides them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantgate.gate import Gate
from quantgate.measure import Measured
from quantgate.units import convert
from quantgate.verdict import Verdict, judge

from .shapes import heading, line, rect, svg, text

LEFT, RIGHT = 250, 560
"""The axis runs between these; names stand left of it, outcomes right."""
ROW = 40


@dataclass(frozen=True)
class Axis:
    """A linear axis in the unit that people read."""

    low: float
    high: float
    ticks: tuple[float, ...]
    unit: str

    def x(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return LEFT + (RIGHT - LEFT) * min(max(share, 0.0), 1.0)


@dataclass(frozen=True)
class Row:
    """One measurement, what to call it, and the single values behind it, if they can be shown."""

    name: str
    note: str
    measurement: Measured
    dots: tuple[float, ...] = ()


def verdicts(
    title: str,
    caption: str,
    *,
    gate: Mapping[str, Any],
    rows: Sequence[Row],
    axis: Axis,
    limit_name: str,
) -> str:
    """A picture of one gate and several measurements: interval, limit and outcome of each."""
    rule = Gate.model_validate({"id": "picture", **gate})
    top = 96
    bottom = top + ROW * len(rows)
    shapes = [*heading(title, caption), *_axis(axis, bottom)]
    limit = axis.x(convert(rule.limit.value, rule.limit.unit, to=axis.unit))
    bad_from, bad_to = (limit, RIGHT) if rule.direction == "max" else (LEFT, limit)
    shapes.insert(0, rect(bad_from, top - 14, bad_to - bad_from, bottom - top + 14, "bad"))
    shapes.append(line(limit, top - 20, limit, bottom, "limit", width=2))
    shapes.append(text(limit, top - 26, limit_name, "ink small middle"))
    for index, row in enumerate(rows):
        found = judge(rule, row.measurement, variant="picture", baseline=None)
        shapes += _verdict_row(row, found, axis, top + ROW * index + ROW / 2)
    return svg(title, caption, shapes, height=bottom + 44)


def _verdict_row(row: Row, found: Verdict, axis: Axis, y: float) -> Iterable[str]:
    yield text(20, y - 3, row.name, "ink")
    yield text(20, y + 12, row.note, "soft small")
    for value in row.dots:
        if axis.low <= value <= axis.high:
            yield f'<circle class="dot" cx="{axis.x(value):.1f}" cy="{y + 11:.1f}" r="2.2"/>'
    lower, estimate, upper = (
        math.inf if bound is None else convert(bound, found.unit, to=axis.unit)
        for bound in (found.lower, found.estimate, found.upper)
    )
    outcome = found.outcome.value
    if lower != upper:
        yield line(axis.x(lower), y, axis.x(upper), y, outcome, width=3)
    for end in (lower, upper):
        if lower != upper and axis.low <= end <= axis.high:
            yield line(axis.x(end), y - 5, axis.x(end), y + 5, outcome, width=3)
    if estimate <= axis.high:
        yield f'<circle class="{outcome}" cx="{axis.x(estimate):.1f}" cy="{y:.1f}" r="4.5"/>'
    yield text(RIGHT + 24, y - 3, outcome, f"{outcome} head")
    beside = found.needed() if outcome == "INCONCLUSIVE" else _bounds(lower, upper, axis.unit)
    yield text(RIGHT + 24, y + 12, beside, "soft small")


def _bounds(lower: float, upper: float, unit: str) -> str:
    if lower == upper:
        return "one number, no interval"
    ends = (f"{end:,.0f}" if abs(end) >= 100 else f"{end:.3g}" for end in (lower, upper))
    return f"{' to '.join(ends)} {unit}".replace("-", "−").replace("inf", "infinite")


def _axis(axis: Axis, bottom: float) -> Iterable[str]:
    yield line(LEFT, bottom, RIGHT, bottom, "line")
    for tick in axis.ticks:
        yield line(axis.x(tick), bottom, axis.x(tick), bottom + 5, "line")
        label = f"{tick:g} {axis.unit}".replace("-", "−")
        yield text(axis.x(tick), bottom + 20, label, "soft small middle")
