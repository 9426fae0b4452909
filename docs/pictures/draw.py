"""Draws the pictures of docs/quality.md: `python docs/pictures/draw.py`.

Every interval, outcome and required n in them is the answer of the functions that judge a release,
to the measurements written down here. tests/test_pictures.py holds the files to this script.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from scipy.special import bdtr, ndtri

from quantgate.gate import Gate
from quantgate.measure import (
    Binomial,
    ClusteredRatio,
    Latencies,
    Measured,
    PairedBinary,
    PairedBlocks,
    Scalar,
)
from quantgate.statistics import noninferiority, sequential
from quantgate.units import convert
from quantgate.verdict import Verdict, judge

FOLDER = Path(__file__).parent
WIDTH = 760
LEFT, RIGHT = 250, 560
"""The axis runs between these; names stand left of it, outcomes right."""
ROW = 40

# Colours of their own on a card of its own, so that a page's theme does not matter.
STYLE = """
.card{fill:#fff;stroke:#d0d7de}.ink{fill:#1f2328}.soft{fill:#59636e}.line{stroke:#59636e}
.limit{stroke:#1f2328}.bad{fill:#cf222e;opacity:.08}.dot{fill:#59636e;opacity:.45}
.PASS{stroke:#1a7f37;fill:#1a7f37}.FAIL{stroke:#cf222e;fill:#cf222e}
.INCONCLUSIVE{stroke:#9a6700;fill:#9a6700}
text{stroke:none!important;font:13px system-ui,sans-serif}.small{font-size:11.5px}
.head{font-weight:600}.end{text-anchor:end}.middle{text-anchor:middle}
@media(prefers-color-scheme:dark){.card{fill:#151b23;stroke:#3d444d}.ink{fill:#f0f6fc}
.soft{fill:#9198a1}.line{stroke:#9198a1}.limit{stroke:#f0f6fc}.bad{fill:#f85149;opacity:.16}
.dot{fill:#9198a1}.PASS{stroke:#3fb950;fill:#3fb950}.FAIL{stroke:#f85149;fill:#f85149}
.INCONCLUSIVE{stroke:#d29922;fill:#d29922}}
""".replace("\n", "")


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
    shapes = [*_heading(title, caption), *_axis(axis, bottom)]
    limit = axis.x(convert(rule.limit.value, rule.limit.unit, to=axis.unit))
    bad_from, bad_to = (limit, RIGHT) if rule.direction == "max" else (LEFT, limit)
    shapes.insert(0, _rect(bad_from, top - 14, bad_to - bad_from, bottom - top + 14, "bad"))
    shapes.append(_line(limit, top - 20, limit, bottom, "limit", width=2))
    shapes.append(_text(limit, top - 26, limit_name, "ink small middle"))
    for index, row in enumerate(rows):
        found = judge(rule, row.measurement, variant="picture", baseline=None)
        shapes += _verdict_row(row, found, axis, top + ROW * index + ROW / 2)
    return _svg(title, caption, shapes, height=bottom + 44)


def _verdict_row(row: Row, found: Verdict, axis: Axis, y: float) -> Iterable[str]:
    yield _text(20, y - 3, row.name, "ink")
    yield _text(20, y + 12, row.note, "soft small")
    for value in row.dots:
        if axis.low <= value <= axis.high:
            yield f'<circle class="dot" cx="{axis.x(value):.1f}" cy="{y + 11:.1f}" r="2.2"/>'
    lower, estimate, upper = (
        math.inf if bound is None else convert(bound, found.unit, to=axis.unit)
        for bound in (found.lower, found.estimate, found.upper)
    )
    outcome = found.outcome.value
    if lower != upper:
        yield _line(axis.x(lower), y, axis.x(upper), y, outcome, width=3)
    for end in (lower, upper):
        if lower != upper and axis.low <= end <= axis.high:
            yield _line(axis.x(end), y - 5, axis.x(end), y + 5, outcome, width=3)
    if estimate <= axis.high:
        yield f'<circle class="{outcome}" cx="{axis.x(estimate):.1f}" cy="{y:.1f}" r="4.5"/>'
    yield _text(RIGHT + 24, y - 3, outcome, f"{outcome} head")
    beside = found.needed() if outcome == "INCONCLUSIVE" else _bounds(lower, upper, axis.unit)
    yield _text(RIGHT + 24, y + 12, beside, "soft small")


def _bounds(lower: float, upper: float, unit: str) -> str:
    if lower == upper:
        return "one number, no interval"
    ends = (f"{end:,.0f}" if abs(end) >= 100 else f"{end:.3g}" for end in (lower, upper))
    return f"{' to '.join(ends)} {unit}".replace("-", "−").replace("inf", "infinite")


def watching() -> str:
    """The interval while items are asked: sequential bounds beside fixed ones."""
    title = "non_inferiority, sequential: looked at while items are asked"
    caption = (
        "Dashed: holds at one size, chosen before. Green: at every size. "
        "At a dot the margin is excluded."
    )
    margin, low, high = 2.0, -6.0, 4.0
    sizes = [*range(60, 400, 20), *range(400, 3001, 40)]
    left, right, top, bottom = 70, 590, 76, 300

    def x(n: float) -> float:
        return left + (right - left) * n / sizes[-1]

    def y(points: float) -> float:
        return bottom - (bottom - top) * (points - low) / (high - low)

    shapes = [*_heading(title, caption)]
    shapes.append(_rect(left, y(-margin), right - left, bottom - y(-margin), "bad"))
    for tick in (-6, -4, -2, 0, 2, 4):
        name = f"{tick:+d} pt".replace("-", "−") if tick else "0"
        shapes.append(_text(left - 8, y(tick) + 4, name, "soft small end"))
    for n in range(500, sizes[-1] + 1, 500):
        shapes.append(_text(x(n), bottom + 18, f"{n:,}", "soft small middle"))
    shapes.append(_text((left + right) / 2, bottom + 36, "items asked so far", "soft small middle"))
    shapes.append(_line(left, y(0), right, y(0), "line", dash="2 4"))
    shapes.append(_line(left, y(-margin), right, y(-margin), "limit", width=2))
    shapes.append(_text(right - 8, y(-margin) + 16, "margin −2 pt", "ink small end"))
    for test, name, kind, dash in (
        (noninferiority, "fixed n", "soft", "5 4"),
        (sequential, "sequential", "PASS", ""),
    ):
        found = [test.difference_interval(0.010 * n, 0.009 * n, n, confidence=0.95) for n in sizes]
        for bounds in ([one.lower for one in found], [one.upper for one in found]):
            points = [
                (x(n), y(100 * bound))
                for n, bound in zip(sizes, bounds, strict=True)
                if low <= 100 * bound <= high
            ]
            shapes.append(_path(points, "line" if kind == "soft" else kind, dash=dash))
        first = next(n for n, one in zip(sizes, found, strict=True) if 100 * one.lower > -margin)
        shapes.append(f'<circle class="{kind}" cx="{x(first):.1f}" cy="{y(-margin):.1f}" r="4.5"/>')
        label = y(100 * found[-1].upper) + (8 if kind == "soft" else 0)
        shapes.append(_text(right + 10, label, f"{name}: {first:,} items", f"{kind} small"))
    return _svg(title, caption, shapes, height=bottom + 54)


def mcnemar() -> str:
    """The chance of each split of 20 changed items, if both models were equally good."""
    lost, won = 14, 6
    changed = lost + won
    p_value = noninferiority.mcnemar_p_value(lost, won)
    title = "McNemar's p-value, beside the verdict"
    caption = (
        f"{changed} items changed: {lost} lost, {won} won. Were both models equally good, {lost} "
        f"or more would be lost in {p_value:.1%} of cases."
    )
    chances = [
        float(bdtr(k, changed, 0.5) - (bdtr(k - 1, changed, 0.5) if k else 0.0))
        for k in range(changed + 1)
    ]
    left, right, top, bottom = 60, 700, 84, 250
    step = (right - left) / len(chances)
    shapes = [*_heading(title, caption)]
    for k, chance in enumerate(chances):
        height = (bottom - top) * chance / max(chances)
        kind = "FAIL" if k >= lost else "dot"
        shapes.append(_rect(left + step * k + 3, bottom - height, step - 6, height, kind))
        if k % 2 == 0:
            shapes.append(_text(left + step * (k + 0.5), bottom + 18, f"{k}", "soft small middle"))
    shapes.append(_line(left, bottom, right, bottom, "line"))
    shapes.append(
        _text(
            (left + right) / 2, bottom + 36, "items lost, of 20 that changed", "soft small middle"
        )
    )
    shapes.append(_text(left + step * (lost + 2), bottom - 70, f"p = {p_value:.3f}", "FAIL head"))
    return _svg(title, caption, shapes, height=bottom + 54)


def _paired(n: int, lost: int, won: int) -> PairedBinary:
    right = round(0.9 * n)
    return PairedBinary(
        metric="quality/set.exact_match",
        source="picture",
        both=right - lost,
        reference_only=lost,
        candidate_only=won,
        neither=n - right - won,
    )


def _quantiles(count: int, spread: float, middle: float) -> tuple[float, ...]:
    """Lognormal values without chance: the middles of equally likely slices."""
    return tuple(
        middle * math.exp(spread * float(ndtri((index + 0.5) / count))) for index in range(count)
    )


def _shuffled(values: Sequence[float]) -> list[float]:
    """The same values in an order that has nothing to do with their size."""
    return sorted(values, key=lambda value: math.sin(1e6 * value))


def _documents(count: int, ratio: float) -> tuple[ClusteredRatio, tuple[float, ...]]:
    baseline = _quantiles(count, 0.5, 0.02)
    ratios = _shuffled(_quantiles(count, 0.25, ratio))
    candidate = tuple(a * b for a, b in zip(baseline, ratios, strict=True))
    found = ClusteredRatio(
        metric="quality/kl_nats.healthy.ratio",
        source="picture",
        baseline=baseline,
        candidate=candidate,
    )
    return found, tuple(ratios)


def _blocks(*ratios: float) -> tuple[PairedBlocks, tuple[float, ...]]:
    champion = tuple(400.0 for _ in ratios)
    found = PairedBlocks(
        metric="perf/e2e_ms.p95.ratio",
        source="picture",
        unit="ms",
        champion=champion,
        candidate=tuple(400.0 * ratio for ratio in ratios),
    )
    return found, ratios


def _requests(count: int, middle: float, failed: int = 0) -> tuple[Latencies, tuple[float, ...]]:
    values = _quantiles(count - failed, 0.45, middle)
    found = Latencies(
        metric="perf/e2e_ms.p95", source="picture", unit="ms", values=values, failed=failed
    )
    return found, tuple(value for value in values if value > 500)


def non_inferiority() -> str:
    return verdicts(
        "non_inferiority: is the drop smaller than the margin?",
        "Each line is where the true difference can lie; its end towards the limit decides.",
        gate={"metric": "quality/set.exact_match", "test": "non_inferiority", "margin": "2 pt"},
        rows=[
            Row("1,600 items", "lost 16, won 12", _paired(1600, 16, 12)),
            Row("480 items", "lost 6, won 4", _paired(480, 6, 4)),
            Row("120 items, none changed", "too few to exclude 2 pt", _paired(120, 0, 0)),
            Row("1,600 items", "lost 90, won 30", _paired(1600, 90, 30)),
        ],
        axis=Axis(-6, 2, (-6, -4, -2, 0, 2), "pt"),
        limit_name="margin −2 pt",
    )


def mean() -> str:
    rows = []
    for name, count, ratio in (
        ("128 documents, healthy", 128, 0.98),
        ("40 documents", 40, 1.2),
        ("128 documents, one bad module", 128, 1.6),
    ):
        found, dots = _documents(count, ratio)
        rows.append(Row(name, "a dot is one document", found, dots))
    return verdicts(
        "mean: is it more than rounding does?",
        "KL against the source in units of the healthy twin's; documents are what is counted.",
        gate={"metric": "quality/kl_nats.healthy.ratio", "test": "mean", "max": "1.25 x"},
        rows=rows,
        axis=Axis(0.6, 2.2, (0.6, 1.0, 1.4, 1.8, 2.2), "x"),
        limit_name="limit 1.25 x",
    )


def rate() -> str:
    def share(events: int, trials: int) -> Binomial:
        return Binomial(
            metric="validity/set.json_schema", source="picture", events=events, trials=trials
        )

    return verdicts(
        "rate: how often may it happen, at most?",
        "New invalid outputs. None seen is not none: 100 items without one still allow 3 %.",
        gate={"metric": "validity/set.json_schema", "test": "rate", "max": "1 %"},
        rows=[
            Row("0 of 299", "the fewest that prove 1 %", share(0, 299)),
            Row("0 of 100", "none seen, little shown", share(0, 100)),
            Row("3 of 1,000", "a few, and enough items", share(3, 1000)),
            Row("12 of 480", "2.5 % seen", share(12, 480)),
        ],
        axis=Axis(0, 5, (0, 1, 2, 3, 4, 5), "%"),
        limit_name="limit 1 %",
    )


def percentile() -> str:
    rows = []
    for name, note, arguments in (
        ("1,000 requests", "dots: slower than 500 ms", (1000, 330)),
        ("150 requests", "p95 seen below the limit", (150, 340)),
        ("1,000 requests, 60 failed", "a failure is infinitely late", (1000, 330, 60)),
    ):
        found, dots = _requests(*arguments)
        rows.append(Row(name, note, found, dots))
    return verdicts(
        "percentile: is p95 within the limit?",
        "The interval of the percentile itself, from the number of late requests alone.",
        gate={
            "metric": "perf/e2e_ms.p95",
            "test": "percentile",
            "percentile": 95.0,
            "max": "800 ms",
        },
        rows=rows,
        axis=Axis(400, 1200, (400, 600, 800, 1000, 1200), "ms"),
        limit_name="limit 800 ms",
    )


def ratio() -> str:
    rows = []
    for name, values in (
        ("6 pairs of blocks", (1.01, 1.04, 0.99, 1.03, 1.02, 1.05)),
        ("4 noisy pairs", (0.93, 1.12, 1.02, 1.10)),
        ("6 pairs of blocks", (1.16, 1.21, 1.14, 1.19, 1.23, 1.15)),
    ):
        found, dots = _blocks(*values)
        rows.append(Row(name, "a dot is one pair", found, dots))
    return verdicts(
        "ratio: how much slower than the champion?",
        "Both arms replay the same requests; each pair of blocks gives one ratio.",
        gate={"metric": "perf/e2e_ms.p95.ratio", "test": "ratio", "max": "1.10 x"},
        rows=rows,
        axis=Axis(0.9, 1.3, (0.9, 1.0, 1.1, 1.2, 1.3), "x"),
        limit_name="limit 1.10 x",
    )


def limit() -> str:
    def memory(gib: float) -> Scalar:
        return Scalar(
            metric="memory/peak_bytes.max",
            source="picture",
            value=gib * 2**30,
            unit="B",
            n=1,
        )

    return verdicts(
        "limit: is one number within it?",
        "A count or a peak has no sampling error, so no interval; exactly at the limit passes.",
        gate={"metric": "memory/peak_bytes.max", "test": "limit", "max": "2 GiB"},
        rows=[
            Row("1.4 GiB", "peak memory of the server", memory(1.4)),
            Row("2.0 GiB", "exactly at the limit", memory(2.0)),
            Row("2.1 GiB", "", memory(2.1)),
        ],
        axis=Axis(1, 3, (1, 1.5, 2, 2.5, 3), "GiB"),
        limit_name="limit 2 GiB",
    )


PICTURES: Mapping[str, Callable[[], str]] = {
    "non-inferiority.svg": non_inferiority,
    "sequential.svg": watching,
    "mean.svg": mean,
    "rate.svg": rate,
    "percentile.svg": percentile,
    "ratio.svg": ratio,
    "limit.svg": limit,
    "mcnemar.svg": mcnemar,
}


def _svg(title: str, caption: str, shapes: Iterable[str], *, height: float) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
            f'width="{WIDTH}" height="{height:.0f}" role="img">',
            f"<title>{escape(title)}</title><desc>{escape(caption)}</desc>",
            f"<style>{STYLE}</style>",
            _rect(0.5, 0.5, WIDTH - 1, height - 1, "card", radius=8),
            *shapes,
            "</svg>\n",
        ]
    )


def _heading(title: str, caption: str) -> list[str]:
    return [_text(20, 28, title, "ink head"), _text(20, 48, caption, "soft small")]


def _axis(axis: Axis, bottom: float) -> Iterable[str]:
    yield _line(LEFT, bottom, RIGHT, bottom, "line")
    for tick in axis.ticks:
        yield _line(axis.x(tick), bottom, axis.x(tick), bottom + 5, "line")
        label = f"{tick:g} {axis.unit}".replace("-", "−")
        yield _text(axis.x(tick), bottom + 20, label, "soft small middle")


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _rect(x: float, y: float, width: float, height: float, kind: str, *, radius: int = 0) -> str:
    rounded = f' rx="{radius}"' if radius else ""
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}"{rounded}/>'
    )


def _line(
    x1: float, y1: float, x2: float, y2: float, kind: str, *, width: float = 1, dash: str = ""
) -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        f'stroke-width="{width}"{dashed}/>'
    )


def _path(points: Sequence[tuple[float, float]], kind: str, *, dash: str) -> str:
    steps = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline class="{kind}" points="{steps}" style="fill:none" stroke-width="2"{dashed}/>'


def main() -> None:
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
